"""Cost of guarded test-time adaptation, as ratios measured in the same run.

python benchmarks/adapter.py                        all rows
python benchmarks/adapter.py "64 tasks"             only rows whose name contains one of these words
python benchmarks/adapter.py --json FILE            also write {"rows": [{"name", "ratio", "peer", "ms"}]}

The policy is that of the experiment nav2d, with a batch of 20 trajectories of 100 steps for each task, or with 1 trajectory of 20 steps, as in adaptation within an episode. "Observe + adapt": a forward pass, all monitors on outputs and features, with
a calibrated alarm, then one step of policy gradient with Adam and the default guards; "at the edge": in a trust region so small that each step has to be projected; "KL bound": with `max_kl`, which takes a forward pass of the source and one after the step, and "at its edge" more, for steps that are too long. The peer is one plain gradient step: the same loss, backward, a step of `torch.optim.Adam` on the same parameters, and nothing else.
"None": what a call of `adapt` with strategy 'none' and no loss takes, beside the forward pass that its caller makes anyway. One CPU thread; the allocator keeps freed memory (`keep_memory`), as in the command line.
"""
from dataclasses import replace

import torch
from paired import main

from ssm_metarl.adapter import AdaptationConfig, MetaRLHook, create_adapter
from ssm_metarl.envs import sample_tasks
from ssm_metarl.inner_loop import stack
from ssm_metarl.config import CONFIGS
from ssm_metarl.rollout import collect
from ssm_metarl.policy_gradient import advantages

SIZES = {'20 x 100': (20, 100), '1 x 20': (1, 20)}  # trajectories x steps of each task


def experience(M, K, T):
    "Policy, its parameters for M tasks, and a batch of trajectories, as the loss wants it."
    config = CONFIGS['nav2d']
    policy, env = config.make_policy(), replace(config.env, num_envs=K, time_limit=T)
    theta = stack(policy.get_params(), M)
    traj = collect(policy, theta, sample_tasks(env, M), env)
    advantage = advantages(traj) if K > 1 else torch.randn(traj.reward.shape, generator=torch.Generator().manual_seed(0))
    return policy, theta, dict(obs=traj.obs, actions=traj.action, advantages=advantage, logp_old=traj.logp, mask=traj.mask)


def steps(M, K, T, radius=.1, max_kl=None):
    "Four functions: observe + adapt, one plain gradient step, a forward pass, and `adapt` with nothing to do."
    policy, theta, batch = experience(M, K, T)
    config = AdaptationConfig(mode='continual', exclude='value.*', trust_radius=radius, max_kl=max_kl)
    if M == 1: return steps_of_module(policy, {k: v[0] for k, v in batch.items()}, config)
    adapter, idle = (create_adapter(theta, config, stacked=True) for _ in range(2))
    plain = {k: v.clone().requires_grad_() for k, v in theta.items()}
    return compare(adapter, idle, list(v for k, v in plain.items() if not k.startswith('value.')), batch, lambda b: policy.functional(adapter.params, b['obs']), lambda b: policy.functional(plain, b['obs']))


def steps_of_module(policy, batch, config):
    "The same for a single policy, a module."
    ours, plain = policy, CONFIGS['nav2d'].make_policy()
    adapter, idle = (create_adapter(ours, config) for _ in range(2))
    return compare(adapter, idle, [p for k, p in plain.named_parameters() if not k.startswith('value.')], batch, lambda b: ours(b['obs']), lambda b: plain(b['obs']))


def compare(adapter, idle, parameters, batch, forward, plain_forward):
    "What `steps` says."
    hook, optimizer = MetaRLHook(adapter), torch.optim.Adam(parameters, lr=1e-3)
    with torch.no_grad(): d = forward(batch)['features'].shape[-1]
    adapter.calibrate(torch.randn(40, 5, 4, d, generator=torch.Generator().manual_seed(0)), false_alarms=.1)
    def observe():
        with torch.no_grad(): outputs = forward(batch)
        return adapter.observe(outputs, batch, outputs['features'])
    def observe_and_adapt():
        observe()
        return adapter.adapt(hook.policy_loss, batch, forward)
    def plain_step():
        optimizer.zero_grad()
        hook.policy_loss(plain_forward(batch), batch).sum().backward()
        optimizer.step()
    @torch.no_grad()
    def look(): forward(batch)
    return observe_and_adapt, plain_step, look, lambda: idle.adapt(batch=batch)


def cases():
    "Rows (name, ours, peer's name, peer)."
    for M in (1, 64):
        for size, (K, T) in SIZES.items():
            ours, plain, look, idle = steps(M, K, T)
            name = f'{M} task{"s" * (M > 1)}, {size}'
            yield f'observe + adapt, {name}', ours, 'one plain gradient step', plain
            ours, plain, *_ = steps(M, K, T, radius=1e-4)
            yield f'observe + adapt at the edge, {name}', ours, 'one plain gradient step', plain
            for bound, where in ((1., ''), (1e-4, ', at its edge')):
                ours, plain, *_ = steps(M, K, T, max_kl=bound)
                yield f'observe + adapt, KL bound{where}, {name}', ours, 'one plain gradient step', plain
            yield f'none, {name}', idle, 'a forward pass', look


if __name__ == '__main__': main(__doc__, cases, repeats=21)
