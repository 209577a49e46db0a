"Write README.md from nbs/index.ipynb; with --check, only say whether it is in step. Run from the top of the repository."
import re
import sys
from pathlib import Path

import nbformat

HIDDEN = re.compile(r'^#\|\s*(hide|default_exp|export\b)', re.M)
OUTPUT_ONLY = re.compile(r'^#\|\s*echo:\s*false', re.M)


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


if __name__ == '__main__':
    text, target = readme(nbformat.read('nbs/index.ipynb', 4)), Path('README.md')
    if broken := broken_links(text): sys.exit(f'README.md would link to {", ".join(broken)}, which is not there')
    if '--check' in sys.argv[1:]:
        same = target.exists() and target.read_text(encoding='utf-8') == text
        print('README.md is in step' if same else 'README.md is not in step with nbs/index.ipynb; run tools/readme.py')
        sys.exit(not same)
    target.write_text(text, encoding='utf-8')
    print('wrote README.md')
