"""Begin each notebook with the title that the sidebar has for it, and end it with links to the one before and the one after, so that JupyterLab and GitHub have them too.

    python tools/foot.py                 # write title and last line of every notebook
    python tools/foot.py 03b 04_maml     # of those whose names begin so
    python tools/foot.py --check         # write nothing; say which notebooks have other ones"""
import argparse
import re
import sys

import nbformat
from sidebar import NBS, contents, links

FOOT = re.compile(r'\n*^(?:Part \d+ of \d+ of the course · )?(?:Previous|Next): \[[^\]]*\]\([\w-]+\.ipynb\)(?: · Next: \[[^\]]*\]\([\w-]+\.ipynb\))?\s*\Z', re.M)


def feet():
    "File, title and last line of each notebook; index.ipynb has none, it is the README too."
    order, course = list(links(contents())), [file for file, _ in links([section for section in contents() if section['section'] == 'The course'])]
    for before, (file, title), after in zip([None, *order], order, [*order[1:], None]):
        near = [f'{word}: [{link[1]}]({link[0]})' for word, link in (('Previous', before), ('Next', after)) if link]
        if file in course: near = [f'Part {course.index(file) + 1} of {len(course)} of the course', *near]
        if file != 'index.ipynb': yield file, title, ' · '.join(near)


def with_foot(text, line):
    "The text of a cell with this line as its last paragraph, in place of an older one."
    return f'{FOOT.sub("", text).rstrip()}\n\n{line}'


def put(notebook, title, line):
    "Set the title and the foot of a notebook; True if that changed it."
    first, last = notebook.cells[0], [cell for cell in notebook.cells if cell.cell_type == 'markdown'][-1]
    before = first.source, last.source
    first.source = re.sub(r'\A# .*', lambda _: f'# {title}', first.source)
    last.source = with_foot(last.source, line)
    return before != (first.source, last.source)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='beginnings of notebook names; none: all')
    parser.add_argument('--check', action='store_true', help='write nothing; exit with status 1 if a title or a line is another one')
    args, changed = parser.parse_args(), []
    for file, title, line in feet():
        if args.names and not file.startswith(tuple(args.names)) or not (NBS / file).exists(): continue
        if not put(notebook := nbformat.read(NBS / file, 4), title, line): continue
        changed.append(file)
        if not args.check: nbformat.write(notebook, NBS / file)
    print(f'{"with another title or foot" if args.check else "written"}: {", ".join(changed) or "none"}')
    return args.check and bool(changed)


if __name__ == '__main__': sys.exit(main())
