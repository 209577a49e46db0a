"""Speed of a rollout with parameters of its own for each task, as ratios to a Python loop over tasks in the same run (below 1: stacked is faster).

python benchmarks/rollout.py                     all rows
python benchmarks/rollout.py navigation          only rows whose name contains one of these words
python benchmarks/rollout.py --json FILE         also write {"rows": [{"name", "ratio", "peer", "ms"}]}
python benchmarks/rollout.py --device cuda       on a GPU

Stacked: M tasks x K trajectories as one batch of environments, and a policy whose parameters are stacked [M, ...]. The loop does one task after the other: K environments, and a policy of its own. Both get the same trajectories
(checked). T = 100 steps; one CPU thread. The policy is the library's (a 64-unit encoder, an SSM with 64 real numbers of state, heads), smaller where the name says so. Steps per second are those of the stacked rollout, without what comes after the end of an episode.
"""
import argparse

import torch
from paired import paired, write_rows

from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.rollout import collect

SIZES = (8, 10, 64), (20, 10, 64), (20, 10, 32), (20, 20, 64), (40, 20, 64)  # tasks, trajectories, width
FAMILIES = {'navigation': 'MetaGymToy-v0', 'cart-pole': 'MetaCartPole-v0'}


def rollouts(family, M, K, width, device):
    "Two functions that do the same: stacked, and task by task."
    env = EnvConfig(family, num_envs=K, time_limit=100)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(hidden_dim=width, state_dim=width)).to(device)
    generator, tasks = torch.Generator().manual_seed(0), sample_tasks(env, M)
    stacked = {k: v.detach() + .01 * torch.randn(M, *v.shape, generator=generator).to(device) for k, v in policy.named_parameters()}
    alone = [{k: v[m].contiguous() for k, v in stacked.items()} for m in range(M)]
    return lambda: [collect(policy, stacked, tasks, env)], lambda: [collect(policy, alone[m], tasks[m:m + 1], env, start=m) for m in range(M)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', help='only rows whose name contains one of them')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    torch.set_num_threads(1)
    wait = torch.cuda.synchronize if args.device.startswith('cuda') else lambda: None
    rows = []
    for label, family in FAMILIES.items():
        for M, K, width in SIZES:
            name = f'rollout of {label}, {M} tasks x {K} trajectories, width {width}'
            if args.words and not any(word in name for word in args.words): continue
            ours, peer = rollouts(family, M, K, width, args.device)
            stacked = ours()
            torch.testing.assert_close(torch.cat([t.reward for t in stacked]), torch.cat([t.reward for t in peer()]), rtol=1e-3, atol=1e-3)
            (ratio, ms), steps = paired(ours, peer, args.repeats, wait), sum(t.num_steps for t in stacked)  # real steps, before the ends of episodes
            rows.append(dict(name=name, ratio=round(ratio, 4), peer='task by task', ms=round(ms, 3)))
            print(f'{name:64} {ratio:6.3f} of task by task ({1 / ratio:4.1f} times as fast), {steps / ms / 1e3:5.2f} million steps/s', flush=True)
    write_rows(rows, args.json)


if __name__ == '__main__': main()
