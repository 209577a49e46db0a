"""Build the pages of the site without Quarto, and check what can be checked without it.

    python tools/preview.py            # then open _preview/index.html
    python tools/preview.py --again    # render the notebooks that were processed last time once more
    python tools/preview.py --of _docs # only check, and the pages that Quarto built

The published site is made by Quarto (.github/workflows/site.yaml). These pages have the same content, the
same structure around it and the same nbs/styles.css; instead of Quarto's theme they have tools/preview.css,
and formulas stay as they were written. Checked here: every link and anchor leads somewhere, every notebook is
in the sidebar, no link stands raw inside code, every public function, class and method of the library is
described with a link to its source. tools/browse.py opens the pages in a browser and measures them.
"""
import argparse
import re
import shutil
import sys
from html import escape
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml
from nbconvert.filters import ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

import reference
from sidebar import contents, links, unlisted

OUT = Path('_preview')
SHELL = '''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="images/favicon.svg"><link rel="stylesheet" href="preview.css"><link rel="stylesheet" href="styles.css"></head>
<body class="quarto-light"><script>if (location.search === '?dark') document.body.className = 'quarto-dark'</script>
<header class="navbar"><a href="index.html">{site}</a><a href="?dark">dark</a><a href="?">light</a></header>
<div id="quarto-content"><nav id="quarto-sidebar"><details><summary>Contents</summary>{menu}</details></nav>
<script>document.querySelector('#quarto-sidebar details').open = innerWidth >= 992</script>
<main class="content"><header id="title-block-header"><h1 class="title">{title}</h1><p class="description">{description}</p></header>
{body}
</main></div></body></html>'''


class Renderer(IPythonRenderer):
    "Markdown as pandoc would write it: its identifiers of headings, its classes of formulas."
    def __init__(self):
        super().__init__(escape=False)
        self.used = set()

    def heading(self, text, level, **attrs):
        base = re.sub(r'^[^a-z]+', '', re.sub(r'[^\w\s.-]', '', re.sub(r'<[^>]+>', '', text).lower()).strip().replace(' ', '-')) or 'section'
        name = next(x for x in (base, *(f'{base}-{i}' for i in range(1, 99))) if x not in self.used)
        self.used.add(name)
        return f'<h{level} id="{name}">{text}</h{level}>\n'

    def block_math(self, body): return f'<p><span class="math display">{escape(body)}</span></p>\n'

    def inline_math(self, body): return f'<span class="math inline">{escape(body)}</span>'

    def block_code(self, code, info=None): return code_block(code, (info or '').split() or ['text'])


def code_block(code, language=('python',)):
    try: lexer = get_lexer_by_name(language[0])
    except ValueError: lexer = get_lexer_by_name('text')
    inner = highlight(code, lexer, HtmlFormatter(nowrap=True)).rstrip('\n')
    return f'<div class="sourceCode"><pre class="sourceCode"><code>{inner}</code></pre></div>\n'


def directives(source):
    "Quarto's options at the top of a cell, and the code below them."
    lines = source.split('\n')
    options = [line for line in lines if re.match(r'#\|', line)]
    return dict(re.match(r'#\|\s*([\w-]+):?\s*(.*)', line).groups() for line in options), '\n'.join(line for line in lines if line not in options).strip('\n')


def cell_output(output, options, markdown):
    "What a cell stored, as Quarto would show it."
    data = output.get('data', {})
    if 'text/markdown' in data: return markdown(''.join(data['text/markdown']))
    if 'text/html' in data: return f'<div class="cell-output-display">{"".join(data["text/html"])}</div>'
    if 'image/svg+xml' in data: return f'<figure class="figure">{"".join(data["image/svg+xml"])}</figure>'
    if 'image/png' in data:
        caption = options.get('fig-cap', '').strip('"\'')
        size = ''.join(f' {side}="{n}"' for side, n in output.metadata.get('image/png', {}).items())
        picture = f'<img class="figure-img"{size} src="data:image/png;base64,{data["image/png"].strip()}" alt="{escape(options.get("fig-alt", "").strip(chr(34)))}">'
        return f'<figure class="figure">{picture}<figcaption>{markdown(caption)}</figcaption></figure>'
    text = ''.join(output.get('text') or data.get('text/plain', ''))
    return f'<div class="cell-output cell-output-stdout"><pre><code>{ansi2html(text)}</code></pre></div>' if text else ''


def cell_page(cell, markdown):
    "One cell as HTML: its code, folded where it says so, and its outputs."
    if cell.cell_type == 'markdown': return markdown(cell.source)
    if cell.cell_type == 'raw': return ''
    options, code = directives(cell.source)
    shown = code_block(code) if code and options.get('echo') != 'false' else ''
    if shown and 'code-fold' in options:
        summary = options.get('code-summary', 'Code').strip('"\'')
        shown = f'<details class="code-fold"{" open" * (options["code-fold"] == "show")}><summary>{escape(summary)}</summary>{shown}</details>'
    return f'<div class="cell">{shown}{"".join(cell_output(x, options, markdown) for x in cell.outputs)}</div>'


class Page(HTMLParser):
    "Links and anchors of a page, what is written inside code blocks, and the text that follows each heading."
    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.in_code, self.code = [], set(), 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.in_code += tag == 'pre'
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag == 'img' and attrs.get('src'): self.links.append(attrs['src'])
        self.anchors |= {unquote(attrs[k]) for k in ('id', 'name') if attrs.get(k)}

    def handle_endtag(self, tag): self.in_code -= tag == 'pre'

    def handle_data(self, data):
        if self.in_code: self.code.append(data)


def menu(section, names):
    "The sidebar as nested lists."
    lines = []
    for item in section:
        if isinstance(item, dict) and 'contents' in item: lines.append(f'<li><b>{item["section"]}</b>{menu(item["contents"], names)}</li>')
        else: lines += [f'<li><a href="{names.get(file, file)}">{text}</a></li>' for file, text in links([item])]
    return f'<ul>{"".join(lines)}</ul>'


def front_matter(notebook):
    first = notebook.cells[0]
    return yaml.safe_load(first.source.strip('- \n')) if first.cell_type == 'raw' else {}


def render(notebook, names):
    "The body of a page."
    renderer = Renderer()
    link = lambda text: re.sub(r'\]\(([\w-]+\.ipynb)', lambda m: f']({names.get(m[1], m[1])}', text)  # links between notebooks become links between pages
    markdown = lambda text: MarkdownWithMath(renderer=renderer).render(link(text))
    return '\n'.join(cell_page(cell, markdown) for cell in notebook.cells)


def build(again=False):
    "HTML of every notebook, into _preview."
    if not again: proc_nbs(force=True, n_workers=0)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    notebooks = {path.name: nbformat.read(path, 4) for path in sorted(Path('_proc').glob('*.ipynb'))}
    about = {name: front_matter(notebook) for name, notebook in notebooks.items()}
    names = {name: about[name].get('output-file', f'{Path(name).stem}.html') for name in notebooks}
    for name, notebook in notebooks.items():
        title, description = (escape(about[name].get(key, '')) for key in ('title', 'description'))
        page = SHELL.format(title=title, description=description, site=get_config().title, menu=menu(contents(), names), body=render(notebook, names))
        (OUT / names[name]).write_text(page, encoding='utf-8')
    for folder in Path('nbs').glob('images'): shutil.copytree(folder, OUT / folder.name)
    for sheet in (Path('nbs/styles.css'), Path('tools/preview.css')): shutil.copy(sheet, OUT)


def broken_links(parsed, folder=OUT):
    "Links to pages, files or anchors that do not exist."
    cfg = get_config()
    home, git = f'{cfg.doc_host}{cfg.doc_baseurl}/', f'{cfg.git_url}/blob/{cfg.branch}/'
    for name, page in parsed.items():
        for link in page.links:
            target = link.removeprefix(home)
            if target.startswith(git):
                if not Path(target.removeprefix(git).split('#')[0]).exists(): yield f'{name}: {link} names a file that is not there'
                continue
            if re.match(r'(https?:|mailto:|data:|javascript:|\?|/)', target): continue
            file, _, anchor = unquote(target).partition('#')
            file = file.removeprefix('./') or name
            if file.startswith('..'): yield f'{name}: {link} leads out of the site'
            elif file in parsed:
                if anchor and anchor not in parsed[file].anchors: yield f'{name}: {link} names an anchor that is not there'
            elif not (folder / file).exists(): yield f'{name}: {link} names a page that is not there'


def links_in_code(parsed):
    "Links that stand as they were written inside a code block, because something made a link of a name in backticks."
    for name, page in parsed.items():
        for found in re.findall(r'.{0,40}\]\(https?://.{0,20}', ''.join(page.code)): yield f'{name}: a raw link inside code: {found.strip()}'


def undescribed(parsed):
    "Public functions, classes and methods that their page does not name, or that have no description."
    for module, symbols in reference.index['syms'].items():
        for name in reference.public_names(module):
            page, symbol = symbols[f'{module}.{name}'][0].split('#')[0], getattr(import_module(module), name)
            methods = reference.public_methods(symbol) if isinstance(symbol, type) else {}
            for member in ['', *methods]:
                full = f'{name}.{member}' if member else name
                text = reference.description(symbol, member) if member else reference.about(symbol)
                if page not in parsed or full.lower() not in parsed[page].anchors: yield f'{page}: {module}.{full} is not on the page'
                elif not text or text.startswith(f'{name}('): yield f'{page}: {module}.{full} has no description'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--again', action='store_true', help='render what was processed last time')
    parser.add_argument('--of', type=Path, metavar='FOLDER', help='build nothing; check the pages of this folder')
    args = parser.parse_args()
    if not args.of: build(args.again)
    folder = args.of or OUT
    parsed = {path.name: Page(path.read_text(encoding='utf-8')) for path in sorted(folder.glob('*.html'))}
    problems = sorted({*broken_links(parsed, folder), *links_in_code(parsed), *undescribed(parsed), *unlisted()})
    print('\n'.join([*problems, f'{len(parsed)} pages, {len(problems)} problems: open {folder}/index.html']))
    return bool(problems)


if __name__ == '__main__': sys.exit(main())
