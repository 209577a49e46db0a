"""Step sizes of the strategies on streams of shifted cart-poles: three for each, judged on validation tasks with policies that no result uses.

python benchmarks/shift.py --json benchmarks/results/cartpole-shift-tuning.json    notebook 06e: `STREAM_STRATEGIES` has what is tried (`lrs`) and what won (`lr`)

Each step size gets the mean length of an episode over all shifts and home, without guards: 8 validation tasks under each, the last 1000 of 1500 steps. The longest wins. One CPU thread; about two minutes for a seed, and one more to train its policy.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ssm_metarl.envs import sample_tasks
from ssm_metarl.policy_shift import CART_POLE, SHIFTS, train_source
from ssm_metarl.shift_strategies import STREAM_STRATEGIES, make_learner, play_adapted, shifted_streams, source_windows, stream_rows


def tuning_lengths(seed, n=8, T=1500, train=train_source):
    "Strategy -> step size -> mean length of an episode; and without adaptation."
    env, policy, names = replace(CART_POLE, seed=seed), train(seed), list(SHIFTS)
    tasks = sample_tasks(env, n, 'validation')
    windows = source_windows(policy, sample_tasks(env, 16, step=1001), 10, seed=seed)
    def mean(learner=None):
        ends, _ = play_adapted(policy, shifted_streams(tasks, names, seed), T, learner)
        return float(np.mean([row['late'] for row in stream_rows(ends, names)]))
    found = {name: {lr: mean(make_learner(policy, tried._replace(lr=lr), 'unguarded', n * len(names), windows)) for lr in tried.lrs}
             for name, tried in STREAM_STRATEGIES.items() if tried.lrs}
    return found, mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', type=Path, help='file for the results')
    parser.add_argument('--seeds', type=int, nargs='*', default=[100], help='of the policies')
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [tuning_lengths(seed) for seed in args.seeds]
    results = dict(seeds=args.seeds, none=round(float(np.mean([alone for _, alone in found])), 2), strategies={})
    for name, tried in STREAM_STRATEGIES.items():
        means = [round(float(np.mean([lengths[name][lr] for lengths, _ in found])), 2) for lr in tried.lrs]
        if not means: continue
        results['strategies'][name] = dict(lrs=tried.lrs, lengths=means, best=tried.lrs[int(np.argmax(means))])
        print(f'{name:>18}: {means} of {results["none"]} without adaptation, best {results["strategies"][name]["best"]}', flush=True)
    if args.json: args.json.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__': main()
