"Build the documentation pages without Quarto and check every link and anchor: `python tools/preview.py`, then open _preview/index.html."
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml
from nbconvert import HTMLExporter
from nbdev.config import get_config
from nbdev.serve import proc_nbs

OUT = Path('_preview')


class Page(HTMLParser):
    "Links and anchors of a page."
    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag == 'img' and attrs.get('src'): self.links.append(attrs['src'])
        self.anchors |= {unquote(attrs[k]).lower() for k in ('id', 'name') if attrs.get(k)}


def sidebar(items):
    "Files that the sidebar names, in order."
    for item in items:
        if isinstance(item, str): yield item
        else: yield from sidebar(item.get('contents', [])) if 'contents' in item else [item['href']]


def page_name(path):
    "Name of a processed notebook's page: its front matter says so, as for Quarto (04_maml.ipynb becomes maml.html)."
    first = nbformat.read(path, 4).cells[0]
    about = yaml.safe_load(first.source.strip('- \n')) if first.cell_type == 'raw' else {}
    return about.get('output-file', f'{path.stem}.html')


def build():
    "HTML of every notebook, into _preview; returns page name -> text."
    proc_nbs(force=True, n_workers=0)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    nav = list(sidebar(yaml.safe_load(Path('_quarto.yml').read_text())['website']['sidebar']['contents']))
    names = {path.name: page_name(path) for path in sorted(Path('_proc').glob('*.ipynb'))}
    menu = ' | '.join(f'<a href="{names.get(x, x)}">{Path(x).stem}</a>' for x in nav)
    pages = {}
    for notebook, name in names.items():
        nb = nbformat.read(Path('_proc') / notebook, 4)
        for cell in nb.cells:  # links between notebooks become links between pages
            if cell.cell_type == 'markdown': cell.source = re.sub(r'\]\(([\w-]+\.ipynb)', lambda m: f']({names.get(m[1], m[1])}', cell.source)
        body, _ = HTMLExporter(template_name='basic').from_notebook_node(nb)
        pages[name] = f'<!doctype html><meta charset="utf-8"><title>{name}</title><nav>{menu}</nav>{body}'
    for name, text in pages.items(): (OUT / name).write_text(text, encoding='utf-8')
    for folder in Path('nbs').glob('images'): shutil.copytree(folder, OUT / folder.name)
    return pages, nav


def broken_links(pages):
    "Links to pages, files or anchors that do not exist."
    parsed, cfg = {name: Page(text) for name, text in pages.items()}, get_config()
    home, git = f'{cfg.doc_host}{cfg.doc_baseurl}/', f'{cfg.git_url}/blob/{cfg.branch}/'
    for name, page in parsed.items():
        for link in page.links:
            target = link.removeprefix(home)
            if target.startswith(git):
                if not Path(target.removeprefix(git).split('#')[0]).exists(): yield f'{name}: {link} names a file that is not there'
                continue
            if re.match(r'(https?:|mailto:|data:|javascript:)', target): continue
            file, _, anchor = unquote(target).partition('#')
            file = file or name
            if file in parsed:
                if anchor and anchor.lower() not in parsed[file].anchors: yield f'{name}: {link} names an anchor that is not there'
            elif not (OUT / file).exists(): yield f'{name}: {link} names a page that is not there'


def main():
    pages, nav = build()
    problems = sorted(set(broken_links(pages)))
    problems += [f'{x}: in the sidebar of _quarto.yml, but not in nbs' for x in nav if not (Path('nbs') / x).exists()]
    problems += [f'{p.name}: not in the sidebar of _quarto.yml' for p in sorted(Path('nbs').glob('*.ipynb')) if p.name not in nav]
    print('\n'.join(problems) or f'{len(pages)} pages, every link leads somewhere: open _preview/index.html')
    return bool(problems)


if __name__ == '__main__': sys.exit(main())
