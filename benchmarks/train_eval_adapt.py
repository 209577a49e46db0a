"""Train, evaluate and adapt with a built-in config on several seeds, through the command line; every figure of the README comes from here.

python benchmarks/train_eval_adapt.py basic --outer-steps 100 --tasks-per-batch 8 --adapt-steps 5 --also-steps 10

Results go to benchmarks/results/NAME.json after every seed, each with what it was run with. Seeds that stand there already, from the same commands and version, are not run again.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ssm_metarl import __version__
from ssm_metarl.evaluation import t_interval
from ssm_metarl.files import to_json
from ssm_metarl.checkpoints import load_learner
from ssm_metarl.training import provenance
from ssm_metarl.experiments import parameter_counts, show_interval

ROOT = Path(__file__).resolve().parent.parent


def main_py(words):
    "The JSON object in the last line of what `main.py` prints."
    out = subprocess.run([sys.executable, 'main.py', *words.split()], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def commands(args):
    "The commands of one seed, by the name of their result; S stands for the seed, D for a folder."
    changes = ''.join(f' --{name.replace("_", "-")} {value}' for name in ('outer_steps', 'tasks_per_batch') if (value := getattr(args, name)) is not None)
    adapt = lambda steps: f'adapt --checkpoint D/latest.npz --adapt-steps {steps} --episodes {args.episodes}'
    wanted = dict(train=f'train --config {args.config}{changes} --seed S --ckpt-dir D', eval=f'eval --checkpoint D/latest.npz --episodes {args.episodes}',
                  adapt=adapt(args.adapt_steps))
    return wanted | {f'adapt_{n}': adapt(n) for n in args.also_steps}


def run_seed(seed, wanted):
    with tempfile.TemporaryDirectory() as folder:
        row = {name: main_py(words.replace('S --ckpt', f'{seed} --ckpt').replace('D/', f'{folder}/').replace('-dir D', f'-dir {folder}')) for name, words in wanted.items()}
        parameters = parameter_counts(load_learner(Path(folder) / 'latest.npz')[0])
    del row['train']['checkpoint']
    return {'seed': seed} | row | dict(provenance=provenance('cpu') | dict(parameters=parameters))


def over_seeds(values):
    "Mean over seeds with its t-interval, for a line of text."
    return f'{np.mean(values):.2f} {show_interval([None if np.isnan(bound) else bound for bound in t_interval(values)])}'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='built-in config')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4])
    parser.add_argument('--outer-steps', type=int)
    parser.add_argument('--tasks-per-batch', type=int)
    parser.add_argument('--adapt-steps', type=int, default=5)
    parser.add_argument('--also-steps', type=int, nargs='*', default=[], help='further numbers of adaptation steps')
    parser.add_argument('--episodes', type=int, default=50, help='held-out tasks')
    parser.add_argument('--name', help='of the result file (default: the config)')
    args = parser.parse_args()
    path = ROOT / 'benchmarks' / 'results' / f'{args.name or args.config}.json'
    about = dict(version=__version__, commands=commands(args))
    old = json.loads(path.read_text()) if path.exists() else {}
    rows = {row['seed']: row for row in old.get('rows', [])} if {k: old.get(k) for k in about} == about else {}
    for seed in args.seeds:
        if seed not in rows: rows[seed] = run_seed(seed, about['commands'])
        path.write_text(to_json(about | dict(rows=[rows[s] for s in sorted(rows)]), indent=1) + '\n')
    for seed in args.seeds:
        a = rows[seed]['adapt']
        print(f'seed {seed}: trained in {rows[seed]["train"]["wall_s"]:.0f} s; return by step {[round(x, 2) for x in a["returns_by_step"]]}, gain {a["improvement"]:.1f} '
              f'{show_interval(a["improvement_ci95"])} over tasks, normalised {a["normalised_gain"]:.3f}, hurt {a["hurt_rate"]:.2f}')
    if len(args.seeds) > 1: print(f'gain over {len(args.seeds)} seeds, with a t-interval: {over_seeds([rows[seed]["adapt"]["improvement"] for seed in args.seeds])}')


if __name__ == '__main__': main()
