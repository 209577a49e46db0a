"""Memory, gradient, or both, on the same bandits: two dependent arms, thirty pulls a trial.

python benchmarks/memory_and_gradient.py

Three learners see the same number of trials in training. Each has six settings, of which one is chosen on validation tasks with a seed of its own; then five seeds are trained and
tested on held-out tasks and on bandits of another kind. Results go to benchmarks/results/memory-and-gradient.json after every run; runs that stand there are not repeated.
"""
import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ssm_metarl.bandits import regret
from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.meta_learner import MetaConfig
from ssm_metarl.maml import MetaMAML
from ssm_metarl.files import to_json
from ssm_metarl.training import provenance
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.rl2 import RL2
from ssm_metarl.rollout import collect

T, K, STEPS = 30, 8, 200  # pulls a trial, support trials, outer steps
ENV = EnvConfig('MetaBandit-v0', num_envs=1, time_limit=T, options={'arms': 2, 'dependent': True})
COMMON = dict(gamma=1., outer_steps=STEPS, outer_epochs=1, outer_lr_decay=True, entropy_coef=.05, entropy_fade=.7)
ARMS = {  # class, memory, trials per task, tasks per batch: 256 trials an outer step for each (a gradient needs support and query trials), settings to choose from
    'memory': (RL2, 'ssm', 1, 256, [dict(outer_lr=lr, gae_lambda=lam) for lr, lam in itertools.product((1e-3, 3e-3, 1e-2), (1., .95))]),
    'gradient': (MetaMAML, 'none', K, 256 // (2 * K), [dict(outer_lr=lr, inner_lr=alpha) for lr, alpha in itertools.product((1e-3, 3e-3), (.1, .3, 1.))]),
    'both': (MetaMAML, 'ssm', K, 256 // (2 * K), [dict(outer_lr=lr, inner_lr=alpha) for lr, alpha in itertools.product((1e-3, 3e-3), (.1, .3, 1.))]),
}


def learner_of(arm, settings, seed):
    cls, core, num_envs, tasks, _ = ARMS[arm]
    env = replace(ENV, num_envs=num_envs, seed=seed)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(history=True, core=core), seed)
    return cls(policy, env, MetaConfig(tasks_per_batch=tasks, **COMMON, **settings))


def play(learner, params, tasks, pulls=T):
    "Greedy choices, and regret after each pull, [N, pulls]."
    trial = collect(learner.policy, params, tasks, replace(ENV, time_limit=pulls), 'evaluation', deterministic=True)
    return regret(np.stack([task['chance'] for task in tasks]), trial.action[:, 0].numpy())


def scores(arm, learner, tasks):
    "Mean regret of thirty pulls: at once, and after 240 pulls of experience in the task."
    params = {name: value.detach() for name, value in learner.params.items()}
    found = dict(at_once=play(learner, params, tasks)[:, -1].mean())
    if arm == 'memory':
        curve = play(learner, params, tasks, (K + 1) * T)
        return found | dict(after_240=(curve[:, -1] - curve[:, -T - 1]).mean())
    support = collect(learner.policy, params, tasks, replace(ENV, num_envs=K), 'support', key=(1,))
    return found | dict(after_240=play(learner, learner.adapt(learner.params, support), tasks)[:, -1].mean())


def train(arm, settings, seed):
    learner = learner_of(arm, settings, seed)
    for step in range(STEPS): learner.outer_step(sample_tasks(learner.env, learner.config.tasks_per_batch, step=step))
    return learner


def judged(arm, scored):
    "By what a setting is chosen: a memory is there to be used at once, a gradient step after the support trials."
    return scored['at_once' if arm == 'memory' else 'after_240']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--tasks', type=int, default=1000)
    parser.add_argument('--out', default=str(Path(__file__).parent / 'results' / 'memory-and-gradient.json'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(args.out)
    results = json.loads(path.read_text()) if path.exists() else dict(provenance=provenance('cpu'), tuning={}, rows={})
    save = lambda: path.write_text(to_json(results, indent=1) + '\n')
    splits = {split: sample_tasks(ENV, args.tasks, split) for split in ('validation', 'held_out', 'both-good')}
    for arm, (*_, choices) in ARMS.items():
        tuned = results['tuning'].setdefault(arm, [])
        for settings in choices[len(tuned):]:
            scored = scores(arm, train(arm, settings, 100), splits['validation'])
            tuned.append(settings | dict(regret=judged(arm, scored)))
            print(arm, tuned[-1], flush=True)
            save()
        best = {name: value for name, value in min(tuned, key=lambda row: row['regret']).items() if name != 'regret'}
        rows = results['rows'].setdefault(arm, [])
        for seed in range(len(rows), args.seeds):
            learner = train(arm, best, seed)
            rows.append(dict(seed=seed, settings=best) | {split: scores(arm, learner, splits[split]) for split in ('held_out', 'both-good')})
            print(arm, rows[-1], flush=True)
            save()


if __name__ == '__main__': main()
