"""Write README.md from nbs/index.ipynb. Run from the top of the repository.

    python tools/readme.py            # first put the true names and minutes into the tables of nbs/index.ipynb
    python tools/readme.py --check    # write nothing; exit with status 1 if one of the two files is not in step

A page has one name, that of the sidebar in _quarto.yml, and takes as many minutes as its own first cells say."""
import re
import sys
from pathlib import Path

import nbformat
from sidebar import NBS, contents, links

HOME = NBS / 'index.ipynb'
ROW = re.compile(r'^\| \[[^\]]*\]\(([\w-]+\.ipynb)\) \|( \d+ \|)?', re.M)  # of a table of pages: link, and minutes where it has them
TOTAL = re.compile(r'^\| \*\*in all\*\* \| \*\*\d+\*\* \|', re.M)
HIDDEN = re.compile(r'^#\|\s*(hide|default_exp|export\b)', re.M)
OUTPUT_ONLY = re.compile(r'^#\|\s*echo:\s*false', re.M)


def minutes(notebook):
    "How long a page takes, as it says where it begins."
    text = '\n'.join(cell.source for cell in notebook.cells[:8] if cell.cell_type == 'markdown')
    found = re.search(r'(\d+)\s+minutes', text)
    if found is None: sys.exit(f'{notebook.cells[0].source.splitlines()[0]!r} does not say how many minutes it takes; say so in one of its first cells')
    return int(found[1])


def with_pages(text):
    "A text with the true name of each page in its tables, the minutes of each, and their sum."
    names, times = dict(links(contents())), []

    def row(match):
        start = f'| [{names[match[1]]}]({match[1]}) |'
        if match[2] is None: return start
        times.append(minutes(nbformat.read(NBS / match[1], 4)))
        return f'{start} {times[-1]} |'
    return TOTAL.sub(lambda _: f'| **in all** | **{sum(times)}** |', ROW.sub(row, text))


def put_pages(notebook):
    "Set names and minutes in the tables of a notebook; True if that changed it."
    before = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == 'markdown': cell.source = with_pages(cell.source)
    return [cell.source for cell in notebook.cells] != before


def outputs_as_text(cell):
    "What a code cell printed or returned: text as indented blocks, Markdown as it is."
    shown = []
    for output in cell.outputs:
        data = output.get('data', {})
        text = output.get('text') or data.get('text/plain', '')
        shown.append(data.get('text/markdown') or '\n'.join(f'    {line}' for line in text.splitlines()))
    return '\n\n'.join(shown)


def cell_as_markdown(cell):
    if cell.cell_type == 'markdown': return cell.source
    if HIDDEN.search(cell.source): return ''
    code = '\n'.join(line for line in cell.source.splitlines() if not line.startswith('#|'))
    shown = outputs_as_text(cell)
    if OUTPUT_ONLY.search(cell.source): return shown.rstrip()
    return f'```python\n{code}\n```' + (f'\n\n{shown.rstrip()}' if shown else '')


def readme(notebook):
    "The whole README, as text: the notebook's cells, with links turned towards the top folder."
    parts = [text for cell in notebook.cells if (text := cell_as_markdown(cell))]
    text = '<!-- Written by tools/readme.py from nbs/index.ipynb: edit that. -->\n\n' + '\n\n'.join(parts) + '\n'
    return re.sub(r'\]\((?!https?:|#|nbs/)([\w./-]+\.\w+)', r'](nbs/\1', text)


def broken_links(text):
    "Links to files that are not there."
    return [link for link in re.findall(r'\]\(([^)#]+)', text) if not re.match(r'https?:', link) and not Path(link).exists()]


def main():
    notebook, target = nbformat.read(HOME, 4), Path('README.md')
    changed, text = put_pages(notebook), readme(notebook)
    if broken := broken_links(text): sys.exit(f'README.md would link to {", ".join(broken)}, which is not there')
    if '--check' in sys.argv[1:]:
        same = not changed and target.exists() and target.read_text(encoding='utf-8') == text
        print('README.md is in step' if same else 'README.md, or a name or a time in nbs/index.ipynb, is not in step; run tools/readme.py')
        return not same
    if changed: nbformat.write(notebook, HOME)
    target.write_text(text, encoding='utf-8')
    print('wrote README.md')


if __name__ == '__main__': sys.exit(main())
