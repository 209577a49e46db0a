"""Cost of `import ssm_metarl.X` as a ratio to `import torch` alone.

python benchmarks/imports.py                   every module
python benchmarks/imports.py cli training      only these
python benchmarks/imports.py --json FILE       also write {"rows": [{"name", "ratio", "peer", "ms"}]}

User and system time of fresh processes, in turns: torch, then each module, and again. A row is the median of a module's times divided by that of torch's; "ms" is the module's. The first round, which writes
the byte code, does not count.
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from paired import write_rows

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in (ROOT / 'ssm_metarl').glob('*.py') if path.stem not in ('__init__', '__main__', '_modidx'))
ENV = {k: v for k, v in os.environ.items() if k != 'PYTHONDONTWRITEBYTECODE'} | {'PYTHONPATH': str(ROOT)}


def cost(module):
    "Seconds of computing, user and system, that a new process takes to import a module."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, '-c', f'import {module}'], check=True, env=ENV)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('modules', nargs='*', default=MODULES, help='only these')
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    names = ['torch', *(f'ssm_metarl.{module}' for module in args.modules)]
    rounds = [[cost(name) for name in names] for _ in range(args.repeats + 1)][1:]
    torch, *medians = map(statistics.median, zip(*rounds))
    rows = [dict(name=name, ratio=round(seconds / torch, 4), peer='import torch', ms=round(1e3 * seconds, 1)) for name, seconds in zip(names[1:], medians)]
    for row in rows: print(f'{row["name"]:32} {row["ratio"]:6.3f} of import torch, {row["ms"]:7.1f} ms', flush=True)
    write_rows(rows, args.json)


if __name__ == '__main__': main()
