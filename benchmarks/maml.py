"""Speed of MAML, as ratios to the same thing done task by task in the same run (below 1: ours is faster).

python benchmarks/maml.py                        all rows
python benchmarks/maml.py iteration              only rows whose name contains one of these words
python benchmarks/maml.py --json FILE            also write {"rows": [{"name", "ratio", "peer", "ms"}]}

An iteration at the size of nav2d: 20 tasks x 20 trajectories x 100 steps, collected before and after one inner step, and one outer gradient. The peer does what a reader of the paper would write: for each task a Gymnasium
`SyncVectorEnv` of plain environments, actions sampled with `torch.distributions`, and autograd through the adaptation of that task (in first order neither side adapts again for the outer gradient); its network is the same, with parameters of its own. The meta-step alone has the trajectories
given, in float64 for the check: both must give the same meta-gradient, to 1e-8. "GRU" is the same with a gated recurrent unit as memory (`nn.GRU` has no functional form per task, so the peer takes ours, one task at a time).
One CPU thread; the allocator keeps freed memory (`keep_memory`), as in the command line.
"""
from dataclasses import replace
from itertools import product

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from paired import main

from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.meta_learner import mean_steps, returns_variance
from ssm_metarl.maml import MetaMAML
from ssm_metarl.config import CONFIGS
from ssm_metarl.policy import action_log_prob
from ssm_metarl.rollout import Trajectories, discounted_sum
from ssm_metarl.policy_gradient import advantages


class Point(gym.Env):
    "Point navigation as one would write it for Gymnasium."
    observation_space, action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.Box(-.1, .1, (2,), np.float32)

    def __init__(self, goal): self.goal = goal
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(2, np.float32)
        return self.position, {}

    def step(self, action):
        self.position = self.position + np.clip(action, -.1, .1)
        gap = self.position - self.goal
        return self.position, -np.sqrt(gap @ gap), False, False, {}


def learner(core='ssm', dtype=torch.float32, **meta):
    "Ours, at the size of nav2d."
    config = CONFIGS['nav2d']
    config = replace(config, policy=replace(config.policy, core=core), meta=replace(config.meta, outer_epochs=1, **meta))
    return MetaMAML(config.make_policy().to(dtype), config.env, config.meta)


def collect_one(policy, params, env, T=100):
    "K episodes of one task, with a Distribution in each step."
    obs, _ = env.reset()
    state, act, rows = policy.initial_state(env.num_envs), policy.stepper(params), []
    with torch.no_grad():
        for _ in range(T):
            out, state = act(torch.from_numpy(obs), state)
            normal = torch.distributions.Normal(out['mean'], out['log_std'].exp())
            action = normal.sample()
            logp = normal.log_prob(action).sum(-1)
            new, reward, *_ = env.step(policy.to_env(action.numpy()))
            rows.append((torch.from_numpy(obs), action, torch.from_numpy(reward).float(), logp, out['value']))
            obs = new
    obs, action, reward, logp, value = (torch.stack(x, 1)[None] for x in zip(*rows))  # [1, K, T, ...]
    on = torch.ones_like(reward, dtype=torch.bool)
    first = torch.zeros_like(on)
    first[..., 0] = True
    return Trajectories(obs, action, reward, ~on, ~on, on, first, first, logp, value)


def one_task_loss(policy, theta, config, support, advantage, query, query_advantage, scale, reached=None):
    "Adapt one task by a step, unless it is known where that leads, and judge it: plain autograd, for the parameters of one network."
    if reached: return query_loss(policy, {k: v + (reached[k] - v).detach() for k, v in theta.items()}, config, query, query_advantage, scale)
    logp = action_log_prob(policy.functional(theta, support.obs[0], reset=support.memory_reset[0]), support.action[0])
    loss = -((logp - support.logp[0]).exp() * advantage[0])[support.mask[0]].mean()
    grads = torch.autograd.grad(loss, list(theta.values()), create_graph=not config.first_order, allow_unused=True)
    phi = {k: v if g is None else v - config.inner_lr * g for (k, v), g in zip(theta.items(), grads)}
    return query_loss(policy, phi, config, query, query_advantage, scale)


def query_loss(policy, phi, config, query, query_advantage, scale):
    "Clipped ratio and error of the value head for one task."
    out = policy.functional(phi, query.obs[0], reset=query.memory_reset[0])
    ratio = (action_log_prob(out, query.action[0]) - query.logp[0]).exp()
    loss = -torch.minimum(ratio * query_advantage[0], ratio.clamp(1 - config.clip, 1 + config.clip) * query_advantage[0])[query.mask[0]].mean()
    returns = discounted_sum(query.reward[0], config.gamma)
    return loss + ((out['value'] - returns)**2)[query.mask[0]].mean() / scale


def loop_iteration(ours, envs):
    "One outer gradient, task by task."
    policy, config, theta, data = ours.policy, ours.config, ours.params, []
    for env in envs:
        support = collect_one(policy, {k: v.detach() for k, v in theta.items()}, env)
        advantage = advantages(support, config.gamma, config.gae_lambda)
        logp = action_log_prob(policy.functional(theta, support.obs[0], reset=support.memory_reset[0]), support.action[0])
        grads = torch.autograd.grad(-((logp - support.logp[0]).exp() * advantage[0]).mean(), list(theta.values()), allow_unused=True)
        phi = {k: (v if g is None else v - config.inner_lr * g).detach() for (k, v), g in zip(theta.items(), grads)}
        query = collect_one(policy, phi, env)
        data.append((support, advantage, query, advantages(query, config.gamma, config.gae_lambda), phi if config.first_order else None))
    scale = torch.stack([discounted_sum(d[2].reward, config.gamma) for d in data]).var()
    ours.optimizer.zero_grad()
    for *d, reached in data: (one_task_loss(policy, theta, config, *d, scale, reached) / len(data)).backward()


def meta_steps(core, first_order, dtype=torch.float32, compiled=False):
    "Two functions that give the meta-gradient of the same trajectories: stacked, and task by task."
    ours = learner(core, dtype, first_order=first_order, compile=compiled)
    tasks = sample_tasks(ours.env, 20)
    ((support, A), (query, A_query)), _ = ours.collect_all(tasks)
    scale, steps, names = returns_variance(query, .99), torch.stack([mean_steps(support), mean_steps(query)]), list(ours.params)
    def stacked():
        ours.optimizer.zero_grad()
        if compiled: ours.accumulate_compiled(([(support, A)], query, A_query, scale, {}, steps), 20)
        else: ours.accumulate(*ours.outer_loss([(support, A)], query, A_query, scale, steps=steps)[:2], 20)
        return [ours.params[k].grad for k in names]
    def loop():
        ours.optimizer.zero_grad()
        for m in range(20):
            row = slice(m, m + 1)
            share = query.mask[m].sum() / query.mask.sum()  # every step of the batch counts alike
            (share * one_task_loss(ours.policy, ours.params, ours.config, support.of_tasks(row), A[row], query.of_tasks(row), A_query[row], scale)).backward()
        return [ours.params[k].grad for k in names]
    return stacked, loop


def cases():
    "Rows (name, ours, peer's name, peer)."
    for first_order, compiled in product((False, True), (False, True)):
        order = f'{"first" if first_order else "second"} order{", compiled" * compiled}'
        ours = learner(first_order=first_order, compile=compiled)
        tasks = sample_tasks(ours.env, 20)
        envs = [SyncVectorEnv([lambda g=task['goal']: Point(g)] * 20, autoreset_mode=AutoresetMode.DISABLED) for task in tasks]
        yield f'iteration, {order}', lambda ours=ours, tasks=tasks: ours.outer_step(tasks), 'SyncVectorEnv and autograd, task by task', lambda ours=ours, envs=envs: loop_iteration(ours, envs)
    for core in ('ssm', 'gru'):
        for first_order in (False, True):
            for x, y in zip(*(f() for f in meta_steps(core, first_order, torch.float64))):
                if x is None or y is None: assert x is y  # neither depends on it
                else: torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)
            if core == 'ssm':
                fast, plain = (meta_steps(core, first_order, compiled=compiled)[0] for compiled in (True, False))
                for x, y in zip(fast(), plain()):
                    if x is not None and y is not None: torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-4)  # float32
                yield f'meta-step, {"first" if first_order else "second"} order, ssm, compiled', fast, 'the same, not compiled', plain
            yield f'meta-step, {"first" if first_order else "second"} order, {core}', *(lambda pair=meta_steps(core, first_order): (pair[0], 'autograd, task by task', pair[1]))()


if __name__ == '__main__': main(__doc__, cases, repeats=5)
