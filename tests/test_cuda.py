"On a GPU everything gives what it gives on the CPU; where there is no GPU, these tests are skipped."
import json

import numpy as np
import pytest
import torch

from ssm_metarl.adapter import AdaptationConfig, create_adapter
from ssm_metarl.compiling import CompiledStepper
from ssm_metarl.cores import CORES
from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.inner_loop import stack
from ssm_metarl.meta_learner import MetaConfig
from ssm_metarl.cli import main
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl import rl2
from ssm_metarl.meta_learner import LEARNERS
from ssm_metarl.rollout import collect
from ssm_metarl.scan import scan
from ssm_metarl.ssm import SSM, SSMConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')
PLACES = ('cpu', 'cuda')


def random(seed, *shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a, b, **kw): torch.testing.assert_close(torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu(), **dict(rtol=1e-9, atol=1e-9) | kw)


@pytest.mark.parametrize('T', [1, 7, 300])
@pytest.mark.parametrize('cut', [False, True])
def test_the_scan_and_two_of_its_derivatives(T, cut):
    results = []
    for device in PLACES:
        a, b, h = (x.to(device).requires_grad_() for x in (torch.complex(.9 * random(0, 5).tanh(), .3 * random(1, 5)), torch.complex(random(2, 3, T, 5), random(3, 3, T, 5)), torch.complex(random(4, 3, 5), random(5, 3, 5))))
        reset = (random(6, 3, T) > 1).to(device) if cut else None
        out = scan(a, b, h, reset)
        first = torch.autograd.grad(out.abs().square().sum(), (a, b, h), create_graph=True)
        second = torch.autograd.grad(sum(g.abs().square().sum() for g in first), (a, b, h))
        results.append((out, *first, *second))
    for x, y in zip(*results): same(x, y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('core', list(CORES))
@pytest.mark.parametrize('family, episodes', [('MetaGymToy-v0', 1), ('MetaTabularMDP-v0', 2)])
def test_a_rollout_compiled_or_not(core, family, episodes):
    env = EnvConfig(family, num_envs=2, time_limit=12, episodes_per_trial=episodes)
    results = []
    for device, compiled in (('cpu', False), ('cuda', False), ('cuda', True)):
        policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(8, 4, core=core, history=True)).double().to(device)
        params = {k: v + .1 * random(i, 3, *v.shape).to(device) for i, (k, v) in enumerate(policy.get_params().items())}
        results.append(collect(policy, params, sample_tasks(env, 3), env, actor=CompiledStepper(policy.actor) if compiled else None))
    for other in results[1:]:
        for name, v in vars(results[0]).items(): same(getattr(other, name), v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', list(LEARNERS))
@pytest.mark.parametrize('chunk', [0, 2])
def test_training_and_a_state_that_moves_to_the_other_device(name, chunk):
    env = EnvConfig('MetaBandit-v0' if name == 'rl2' else 'MetaGymToy-v0', num_envs=3, time_limit=10)
    meta = MetaConfig(tasks_per_batch=3, inner_steps=2 if name == 'reptile' else 1, inner_lr=.3, outer_epochs=2, tasks_per_chunk=chunk)
    def learner(device): return LEARNERS[name](SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(6, 4, history=name == 'rl2')).double(), env, meta, device)
    learners = [learner(device) for device in PLACES]
    metrics = [[x.outer_step(sample_tasks(env, 3, step=i)) for i in range(2)] for x in learners]
    for cpu, cuda in zip(*metrics): assert cuda == pytest.approx(cpu, rel=1e-6, abs=1e-6)
    crossed = [learner(device) for device in PLACES]
    for x, other in zip(crossed, reversed(learners)): x.load_state_dict(other.state_dict())
    for x in learners + crossed: x.outer_step(sample_tasks(env, 3, step=2))
    for x in learners[1:] + crossed:
        for k, v in learners[0].state_dict().items(): np.testing.assert_allclose(x.state_dict()[k], v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('first_order', [False, True])
def test_the_compiled_meta_gradient(first_order):
    env, losses = EnvConfig(num_envs=4, time_limit=12), []
    for device, compiled in (('cpu', False), ('cuda', True)):
        policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(6, 4)).double()
        learner = LEARNERS['maml'](policy, env, MetaConfig(tasks_per_batch=3, inner_lr=.3, outer_epochs=1, first_order=first_order, compile=compiled, max_grad_norm=1e9), device)
        learner.outer_step(sample_tasks(env, 3))
        losses.append(torch.cat([v.grad.flatten() for v in learner.params.values() if v.grad is not None]))
    same(*losses, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
def test_the_adapter_and_its_way_back(stacked, optimizer, tmp_path):
    results = []
    for device in PLACES:
        model = SSM(SSMConfig(3, 4, 2)).double().to(device)
        x, y = random(0, 2, 4, 9, 3).to(device), random(1, 2, 4, 9, 2).to(device)
        config = AdaptationConfig(optimizer=optimizer, lr=.1, trust_radius=.3, ema_decay=.5)
        if stacked:
            params = {k: v.clone() for k, v in stack({k: v.detach() for k, v in model.named_parameters()}, 2).items()}
            adapter = create_adapter(params, config, stacked=True)
            for factor in (1., 100.): info = adapter.adapt(lambda _, b: factor * (model.functional(adapter.params, b)[0] - y).square().mean((1, 2, 3)), x)
            results.append((info['loss'], *adapter.params.values(), adapter.drift()))
        else:
            before = {k: v.clone() for k, v in model.state_dict().items()}
            adapter = create_adapter(model, config)
            with adapter.context(model):
                for factor in (1., 100.): info = adapter.adapt(lambda o, b: factor * (o[0] - y[0]).square().mean(), x[0])
                results.append((info['loss'], *[v.detach().clone() for v in model.parameters()], adapter.drift()))
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for a, b in zip(*results): same(a, b, rtol=1e-7, atol=1e-8)


def test_the_command_line(tmp_path, capsys):
    folder, returns = tmp_path / 'run', {}
    small = ['--num-envs', '4', '--time-limit', '20', '--outer-steps', '2', '--tasks-per-batch', '2']
    assert main(['train', '--device', 'cuda', '--ckpt-dir', str(folder), *small]) == 0
    for device in PLACES:
        assert main(['eval', '--device', device, '--checkpoint', str(folder / 'latest.npz'), '--episodes', '5']) == 0
        assert main(['adapt', '--device', device, '--checkpoint', str(folder / 'latest.npz'), '--episodes', '5', '--adapt-steps', '2']) == 0
        returns[device] = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{')][-2:]
    for a, b in zip(*returns.values()):
        for k in ('mean_return', 'pre_return', 'post_return'):
            if k in a: assert b[k] == pytest.approx(a[k], rel=1e-3)
