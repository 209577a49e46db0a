"""Fold in JupyterLab what the site folds or does not show: cells of imports alone, and cells with `#| code-fold: true`
(tests and solutions), `#| echo: false` or `#| hide`. A cell with `#| code-fold: show` stays open.

    python tools/fold.py                 # set the metadata of every notebook's cells
    python tools/fold.py 03b 04_maml     # of those whose names begin so
    python tools/fold.py --check         # write nothing; say which notebooks differ

JupyterLab reads `jupyter.source_hidden` in a cell's metadata; settings.ini permits the key `jupyter`, so that nbdev_clean leaves it."""
import argparse
import ast
import re
import sys

import nbformat
from sidebar import NBS


def only_imports(source):
    "Whether a cell imports, and does nothing else."
    try: body = ast.parse(source).body
    except SyntaxError: return False  # magics
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def is_folded(cell):
    marked = re.search(r'^#\|\s*(code-fold:\s*true|echo:\s*false|hide)\b', cell.source, re.M) is not None
    shown = re.search(r'^#\|\s*code-fold:\s*show\b', cell.source, re.M) is not None
    return cell.cell_type == 'code' and (marked or only_imports(cell.source) and not shown)


def fold(notebook):
    "Set the folding of every cell, and nothing else of what JupyterLab keeps there; True if that changed a cell."
    before = [dict(cell.metadata) for cell in notebook.cells]
    for cell in notebook.cells:
        cell.metadata.pop('jupyter', None)
        if is_folded(cell): cell.metadata['jupyter'] = {'source_hidden': True}
    return [dict(cell.metadata) for cell in notebook.cells] != before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='beginnings of notebook names; none: all')
    parser.add_argument('--check', action='store_true', help='write nothing; exit with status 1 if a notebook differs')
    args, changed = parser.parse_args(), []
    for path in sorted(NBS.glob('*.ipynb')):
        if args.names and not path.name.startswith(tuple(args.names)): continue
        if not fold(notebook := nbformat.read(path, 4)): continue
        changed.append(path.name)
        if not args.check: nbformat.write(notebook, path)
    print(f'{"to be folded" if args.check else "folded"}: {", ".join(changed) or "none"}')
    return args.check and bool(changed)


if __name__ == '__main__': sys.exit(main())
