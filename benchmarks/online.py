"""How large may the updates be of a policy that learns while it acts, if it has adapted before, and if it has not?

python benchmarks/online.py FOLDER                train what FOLDER lacks (70 s a policy), and print the rows
python benchmarks/online.py FOLDER --split held_out  only the rows that are reported
python benchmarks/online.py FOLDER --json FILE    also write {"tasks", "rows": [{"split", "seeds", "steps", "kind", "size", "gain", "ci95", "worse"}]}

The policies are those of `train --config basic --outer-steps 100 --tasks-per-batch 8 --seed S --ckpt-dir FOLDER/basic_S`. Sizes are compared on validation tasks of seeds 10 to 14, and told on held-out tasks of seeds 0 to 4. A size is constant, or falls with the weight of
a piece in all that was seen (`piece_weight`), up to a bound; both have the judge. The gain is the return with updates minus the return without, its interval nested over seeds and tasks; `worse` is the share of episodes with a lower return.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ssm_metarl import policy_adaptation
from ssm_metarl.config import load_config
from ssm_metarl.evaluation import nested_interval
from ssm_metarl.pipeline import evaluate_with_adaptation
from ssm_metarl.training import train

SPLITS = {'validation': range(10, 15), 'held_out': range(5)}
SIZES = {'constant': (.1, .2, .3, .4), 'falling': (.1, .2, .3, .4, 1.)}
FALLING = policy_adaptation.piece_weight


def checkpoint(folder, seed):
    "Of one policy, which is trained if there is none."
    path, config = folder / f'basic_{seed}' / 'latest.npz', load_config('basic')
    if not path.exists(): train(replace(config, seed=seed, meta=replace(config.meta, outer_steps=100, tasks_per_batch=8)), path.parent)
    return path


def constant(interval, played, seen, largest): return torch.full_like(seen, largest)


def gains(folder, split, steps, kind, size, tasks):
    "Of every task of every seed, [S, M]."
    policy_adaptation.piece_weight = FALLING if kind == 'falling' else constant
    found = [evaluate_with_adaptation(checkpoint(folder, seed), episodes=tasks, steps=steps, online=True, online_scale=size, split=split) for seed in SPLITS[split]]
    return np.stack([(result.after.returns - result.offline.returns)[:, 0].numpy() for result in found])


def rows(folder, tasks, splits):
    "The choice without a search before, on validation tasks; then what it does on held-out ones."
    wanted = [('validation', 0, kind, size) for kind, sizes in SIZES.items() for size in sizes]
    for steps in (0, 5): wanted += [('held_out', steps, 'constant', .1), ('held_out', steps, 'constant', .4), ('held_out', steps, 'falling', .3)]
    for split, steps, kind, size in (row for row in wanted if row[0] in splits):
        gain = gains(folder, split, steps, kind, size, tasks)
        yield dict(split=split, seeds=list(SPLITS[split]), steps=steps, kind=kind, size=size, gain=float(gain.mean()), ci95=list(nested_interval(gain, np.mean)), worse=float((gain < 0).mean()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--tasks', type=int, default=50)
    parser.add_argument('--split', nargs='+', choices=list(SPLITS), default=list(SPLITS), help='which rows')
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in rows(args.folder, args.tasks, args.split):
        found.append(row)
        print(f"{row['split']:10} after {row['steps']} steps, {row['kind']:8} {row['size']:3}: {row['gain']:+.2f} [{row['ci95'][0]:+.2f}, {row['ci95'][1]:+.2f}], {row['worse']:.0%} worse", flush=True)
    if args.json: args.json.write_text(json.dumps(dict(tasks=args.tasks, rows=found), indent=1) + '\n')


if __name__ == '__main__': main()
