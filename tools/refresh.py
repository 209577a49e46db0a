"""Execute the notebooks at full size, store their outputs, and report the printed outputs that changed.

    python tools/refresh.py                 # all of them, one after another
    python tools/refresh.py 00_ssm 04       # those whose names begin so
    python tools/refresh.py --check         # execute and report, but write nothing

Run from the top of the repository. Ends with status 1 if a notebook fails; a change of the outputs is reported, not an error."""
import argparse
import difflib
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from clean import strip
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def printed(cell):
    "What a cell shows as text: prints, tables, values."
    shown = []
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        shown.append(output.get('text') or data.get('text/markdown') or ('' if any(kind.startswith('image/') for kind in data) else data.get('text/plain', '')))
    return ''.join(shown)


def changes(before, after):
    "Lines of text that differ, by cell; empty if none does."
    for i, (old, new) in enumerate(zip(before.cells, after.cells)):
        lines = list(difflib.unified_diff(printed(old).splitlines(), printed(new).splitlines(), lineterm='', n=0))[2:]
        changed = [line for line in lines if not line.startswith('@@')]
        if changed: yield f'  cell {i} ({new.get("id", "")})'
        yield from (f'    {line[:200]}' for line in changed)


def execute(path, timeout):
    "The notebook with new outputs, as it would be stored."
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in notebook.cells: cell.metadata.pop('execution', None)
    strip(notebook)
    return notebook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='beginnings of notebook names; none: all')
    parser.add_argument('--check', action='store_true', help='report what changes, and write nothing')
    parser.add_argument('--timeout', type=int, default=1200, help='seconds for a cell')
    args = parser.parse_args()
    paths = [path for path in sorted(Path('nbs').glob('*.ipynb')) if not args.names or path.name.startswith(tuple(args.names))]
    if not paths: parser.error(f'no notebook in nbs/ begins with {", ".join(args.names)}; run from the top of the repository')
    for name in ('IN_TEST', 'MPLBACKEND'): os.environ.pop(name, None)  # the full size, with figures
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get('PYTHONPATH')]))
    failed = []
    for path in paths:
        before, start = nbformat.read(path, 4), time.perf_counter()
        try: after = execute(path, args.timeout)
        except CellExecutionError as error:
            failed.append(path.name)
            print(f'{path.name}: FAILED after {time.perf_counter() - start:.0f} s\n{error}', flush=True)
            continue
        if not args.check:
            nbformat.write(after, path)
            subprocess.run(['nbdev_clean', '--fname', str(path)], check=True)
        report = list(changes(before, after))
        took = f'{path.name}: {time.perf_counter() - start:.0f} s'
        print('\n'.join([f'{took}, text outputs changed:', *report] if report else [f'{took}, text outputs as before']), flush=True)
    if failed: print(f'failed: {", ".join(failed)}')
    sys.exit(bool(failed))


if __name__ == '__main__': main()
