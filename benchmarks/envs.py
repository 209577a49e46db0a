"""Speed of the batched environments, as ratios to other simulators in the same run (below 1: ours is faster).

python benchmarks/envs.py                         all rows
python benchmarks/envs.py CartPole bandit         only rows whose name contains one of these words
python benchmarks/envs.py --json FILE             also write {"rows": [{"name", "ratio", "peer", "ms"}]}

Time per call of `step` for N environments, with the same random actions for both, on one CPU core; "ms" is ours. Environments start again where an episode ends, and that is included: in the same step for ours, SyncVectorEnv's and,
in the next step, for Gymnasium's own vector cart-pole and EnvPool. Each of ours has its own physics (its own task), theirs have all the same. Point navigation and the bandit are compared with plain Gymnasium environments in SyncVectorEnv.
EnvPool is measured, with one thread, where it is installed.
"""
import argparse
import importlib.util

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from paired import paired, write_rows

from ssm_metarl.batch import EnvBatch
from ssm_metarl.envs import EnvConfig


class Point(gym.Env):
    "Point navigation as one would write it for Gymnasium."
    observation_space, action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.Box(-.1, .1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.goal = np.zeros(2, np.float32), self.np_random.uniform(-.5, .5, 2).astype(np.float32)
        return self.position, {}

    def step(self, action):
        self.position = self.position + np.clip(action, -.1, .1)
        gap = self.position - self.goal
        return self.position, -np.sqrt(gap @ gap), bool((np.abs(gap) < .01).all()), False, {}


class Bandit(gym.Env):
    "A bandit with as many arms as ours, as one would write it for Gymnasium."
    observation_space = spaces.Box(0, 1, (1,), np.float32)

    def __init__(self, arms): self.action_space = spaces.Discrete(arms)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.chance = self.np_random.random(self.action_space.n)
        return np.zeros(1, np.float32), {}

    def step(self, action): return np.zeros(1, np.float32), float(self.np_random.random() < self.chance[action]), False, False, {}


def loop(make, N): return SyncVectorEnv([make] * N, autoreset_mode=AutoresetMode.SAME_STEP)


def cases():
    "Rows (label, family, time limit, N, peer's name, function that makes the peer); label, N and peer are the name of a row."
    for N in (64, 512): yield 'CartPole', 'MetaCartPole-v0', 500, N, 'SyncVectorEnv', lambda N: loop(lambda: gym.make('CartPole-v1'), N)
    for N in (64, 512, 4096): yield 'CartPole', 'MetaCartPole-v0', 500, N, 'CartPoleVectorEnv', lambda N: gym.make_vec('CartPole-v1', N, vectorization_mode='vector_entry_point')
    for N in (64, 512): yield 'Pendulum', 'MetaPendulum-v0', 200, N, 'SyncVectorEnv', lambda N: loop(lambda: gym.make('Pendulum-v1'), N)
    for N in (64, 512): yield 'point navigation', 'MetaGymToy-v0', 100, N, 'SyncVectorEnv', lambda N: loop(lambda: TimeLimit(Point(), 100), N)
    arms = EnvConfig('MetaBandit-v0').family.action_space.n
    for N in (64, 512): yield 'bandit', 'MetaBandit-v0', 100, N, 'SyncVectorEnv', lambda N: loop(lambda: TimeLimit(Bandit(arms), 100), N)
    if importlib.util.find_spec('envpool'):
        import envpool
        for label, name, limit in (('CartPole', 'CartPole-v1', 500), ('Pendulum', 'Pendulum-v1', 200)):
            for N in (64, 512, 4096): yield label, f'Meta{name[:-3]}-v0', limit, N, 'EnvPool', lambda N, name=name: envpool.make(name, env_type='gymnasium', num_envs=N, num_threads=1, seed=0)


def play(env, actions):
    for a in actions: env.step(a)


def compare(family, limit, N, make, repeats, steps):
    "Median of the ratios of interleaved pairs, and our median time per step in ms."
    ours, peer = EnvBatch(EnvConfig(family, N, limit), autoreset_mode=AutoresetMode.SAME_STEP), make(N)
    ours.action_space.seed(0)
    actions = np.stack([ours.action_space.sample() for _ in range(steps)])
    for env in (ours, peer): env.reset(), play(env, actions)  # after these, episodes are at different stages
    ratio, ms = paired(lambda: play(ours, actions), lambda: play(peer, actions), repeats)
    return ratio, ms / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', help='only rows whose name contains one of them')
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--steps', type=int, default=100, help='of each repeat')
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    rows = []
    for label, family, limit, N, peer, make in cases():
        name = f'{label} N={N}, {peer}'
        if args.words and not any(word in name for word in args.words): continue
        ratio, ms = compare(family, limit, N, make, args.repeats, args.steps)
        rows.append(dict(name=name, ratio=round(ratio, 5), peer=peer, ms=round(ms, 4)))
        print(f'{name:40} {ratio:8.4f} of its time, {1 / ratio:6.1f} times as fast, {ms:7.4f} ms, {N / ms / 1e3:6.2f} million steps/s', flush=True)
    write_rows(rows, args.json)


if __name__ == '__main__': main()
