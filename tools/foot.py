"""End each notebook with links to the one before and the one after it, in the order of the sidebar, so that JupyterLab and GitHub have them too.

    python tools/foot.py                 # write the line into the last Markdown cell of every notebook
    python tools/foot.py 03b 04_maml     # of those whose names begin so
    python tools/foot.py --check         # write nothing; say which notebooks lack it, or have an old one"""
import argparse
import re
import sys

import nbformat
from sidebar import NBS, contents, links

FOOT = re.compile(r'\n*^(Previous|Next): \[[^\]]*\]\([\w-]+\.ipynb\)(?: · Next: \[[^\]]*\]\([\w-]+\.ipynb\))?\s*\Z', re.M)


def feet():
    "Name of each notebook -> the line at its foot; index.ipynb has none, it is the README too."
    order = list(links(contents()))
    for before, (file, _), after in zip([None, *order], order, [*order[1:], None]):
        near = [f'{word}: [{link[1]}]({link[0]})' for word, link in (('Previous', before), ('Next', after)) if link]
        if file != 'index.ipynb': yield file, ' · '.join(near)


def with_foot(text, line):
    "The text of a cell with this line as its last paragraph, in place of an older one."
    return f'{FOOT.sub("", text).rstrip()}\n\n{line}'


def put(notebook, line):
    "Set the foot of a notebook; True if that changed it."
    cell = [cell for cell in notebook.cells if cell.cell_type == 'markdown'][-1]
    before, cell.source = cell.source, with_foot(cell.source, line)
    return cell.source != before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='beginnings of notebook names; none: all')
    parser.add_argument('--check', action='store_true', help='write nothing; exit with status 1 if a line is missing or old')
    args, changed = parser.parse_args(), []
    for file, line in feet():
        if args.names and not file.startswith(tuple(args.names)) or not (NBS / file).exists(): continue
        if not put(notebook := nbformat.read(NBS / file, 4), line): continue
        changed.append(file)
        if not args.check: nbformat.write(notebook, NBS / file)
    print(f'{"without a true foot" if args.check else "foot written"}: {", ".join(changed) or "none"}')
    return args.check and bool(changed)


if __name__ == '__main__': sys.exit(main())
