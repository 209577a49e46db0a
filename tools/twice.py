"""Run each cell of notebooks twice in a row, and then each whole notebook again, as readers do: python tools/twice.py [--full] NAME ...

A cell that cannot be run again (it registers a name, or draws from a generator of an earlier cell) is named. Without --full the long cells run in small.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

NBS = Path('nbs')


def cells(path):
    "Source of the code cells that nbdev_test would run."
    sources = [''.join(cell['source']) for cell in json.loads(path.read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == 'code']
    return [source for source in sources if not re.search(r'^#\|\s*(eval:\s*false|slow)\b', source, re.M)]


def failures(path):
    "One line for each run of a cell that raised; a notebook starts in a fresh namespace, in its own folder."
    from execnb.shell import CaptureShell
    shell, sources = CaptureShell(path=path.parent), cells(path)
    once_more = [(i, when) for i in range(len(sources)) for when in ('at first', 'run twice')] + [(i, 'Run All again') for i in range(len(sources))]
    for i, when in once_more:
        shell.run(sources[i])
        if shell.exc: yield f'{path.name}, code cell {i}, {when}: {type(shell.exc).__name__}: {str(shell.exc)[:300]}\n    {sources[i][:100]!r}'


def check(path):
    "Whether a notebook passes; run in a process of its own."
    os.chdir(path.parent)
    sys.path.insert(0, str(path.parent.parent))
    found = list(failures(path))
    print('\n'.join(found) or f'{path.name}: every cell runs twice, and the notebook runs again', flush=True)
    return not found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='+', metavar='NAME', help='of a notebook in nbs, such as 02a_own_env, or the path of one')
    parser.add_argument('--full', action='store_true', help='also the long cells in full')
    args = parser.parse_args()
    paths = [Path(name) if name.endswith('.ipynb') else NBS / f'{name}.ipynb' for name in args.names]
    if missing := [str(path) for path in paths if not path.exists()]: sys.exit(f'twice.py: {", ".join(missing)} does not exist')
    if len(paths) > 1: return any([subprocess.run([sys.executable, __file__, *['--full'] * args.full, str(path)]).returncode for path in paths])
    os.environ['MPLBACKEND'] = 'agg'
    if args.full: os.environ.pop('IN_TEST', None)
    else: os.environ['IN_TEST'] = '1'
    return not check(paths[0].resolve())


if __name__ == '__main__': sys.exit(main())
