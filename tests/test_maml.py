"What the MAML notebook promises, in the cases that would lengthen its story."
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from ssm_metarl.envs import FAMILIES, EnvConfig, Family, PointNavigation, register_family, sample_tasks
from ssm_metarl.inner_loop import stack
from ssm_metarl.maml import JointTraining, MetaMAML, query_losses
from ssm_metarl.meta_learner import MetaConfig, MetaLearner, inner_step, never_negative, support_logp, trust_region
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy, action_log_prob, kl_divergence
from ssm_metarl.rollout import Rollout, collect, discounted_sum, masked_mean, policy_inputs, require_finite
from ssm_metarl.policy_gradient import advantages, gae, linear_baseline, normalise, policy_surrogate

M, K, T = 3, 4, 10


if 'MamlTestCorridor-v0' not in FAMILIES:
    @register_family('MamlTestCorridor-v0')
    class Corridor(Family):
        "Find the exit of a corridor of unknown length: discrete actions, episodes that end early."
        observation_space, action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32), spaces.Discrete(2)
        def draw_task(self, rng): return {'exit': rng.uniform(.5, 4)}
        def reset(self, tasks, noise): return np.zeros_like(tasks['exit'])[:, None]
        def step(self, state, action, tasks, noise):
            state = state + np.where(action == 1, 1, -1).astype(np.float32)[:, None]
            return state, np.full(len(state), -1, np.float32), state[:, 0] >= tasks['exit']
        def observe(self, state, tasks): return state.copy()


def make(name='MetaGymToy-v0', history=False, seed=0, state=2, core='ssm', **kw):
    env = EnvConfig(name, num_envs=K, time_limit=T, seed=seed)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(4, state, history=history, core=core), seed).double()
    return MetaMAML(policy, env, MetaConfig(tasks_per_batch=M, **dict(inner_lr=.3) | kw))


def tasks_of(learner, step=0): return sample_tasks(learner.env, M, step=step)


def trajectories(learner):
    *support, query = learner.collect_all(tasks_of(learner))[0]
    return support, *query


def pick(traj, m): return type(traj)(**{k: v[m:m + 1] for k, v in vars(traj).items()})


def gradient(learner, *data):
    grads = torch.autograd.grad(learner.outer_loss(*data)[0].mean(), list(learner.params.values()), allow_unused=True)
    return torch.cat([torch.zeros_like(v).flatten() if g is None else g.flatten() for g, v in zip(grads, learner.params.values())])


def assert_same(a, b):
    assert set(a) == set(b)
    for k in a: assert a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes(), k


CASES = [dict(), dict(history=True), dict(name='MamlTestCorridor-v0'), dict(name='MamlTestCorridor-v0', history=True, inner_steps=2), dict(inner_steps=2, first_order=True)]


@pytest.mark.parametrize('case', CASES, ids=str)
def test_meta_gradient_of_a_batch_is_the_mean_over_its_tasks_weighed_by_their_steps(case):
    learner = make(**case)
    support, query, advantage = trajectories(learner)
    if 'name' in case: assert not query.mask.all()
    alone = [gradient(learner, [(pick(t, m), a[m:m + 1]) for t, a in support], pick(query, m), advantage[m:m + 1]) for m in range(M)]
    share = query.mask.sum((1, 2)) / query.mask.sum().double()
    torch.testing.assert_close(gradient(learner, support, query, advantage), share @ torch.stack(alone), atol=1e-10, rtol=0)


@pytest.mark.parametrize('case', CASES[:4], ids=str)
def test_meta_gradient_is_the_slope_of_the_outer_loss(case):
    learner = make(**case, entropy_coef=.01)
    data = trajectories(learner)
    g = torch.Generator().manual_seed(1)
    centre = {k: v.detach() + .02 * torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in learner.params.items()}
    def at(direction, eps):
        with torch.no_grad():
            for k, v in learner.params.items(): v.copy_(centre[k] + eps * direction[k])
        return learner
    for _ in range(5):
        d = {k: torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in centre.items()}
        slope = sum(s * at(d, s * 1e-6).outer_loss(*data)[0].mean().item() for s in (1, -1)) / 2e-6
        exact = gradient(at(d, 0), *data) @ torch.cat([v.flatten() for v in d.values()])
        assert abs(slope - exact.item()) < 1e-7 * max(1, abs(slope))


@pytest.mark.parametrize('case', [dict(), dict(first_order=True), dict(first_order=True, inner_steps=2, tasks_per_chunk=2)])
def test_outer_step_moves_against_the_meta_gradient(case):
    learner = make(outer_epochs=1, max_grad_norm=1e9, **case)
    support, query, advantage = trajectories(learner)
    expected, before = gradient(learner, support, query, advantage), {k: v.detach().clone() for k, v in learner.params.items()}
    learner.outer_step(tasks_of(learner))
    slopes = [torch.zeros_like(v) if v.grad is None or k.startswith('value.') else v.grad for k, v in learner.params.items()]
    torch.testing.assert_close(torch.cat([s.flatten() for s in slopes]), expected, rtol=1e-10, atol=1e-12)
    change = torch.cat([(learner.params[k] - v).detach().flatten() for k, v in before.items()])
    clear = expected.abs() > 1e-5  # the first step of Adam is -outer_lr * sign(gradient), but for gradients near its epsilon
    assert clear.sum() > 50
    torch.testing.assert_close(change[clear], -learner.config.outer_lr * expected[clear].sign(), atol=1e-5, rtol=0)


def test_support_and_query_see_different_noise_and_each_step_new_noise():
    learner = make()
    (support, _), *_ = trajectories(learner)[0]
    query = learner.collect_all(tasks_of(learner))[0][1][0]
    assert not torch.isclose(support.action[:, :, 0], query.action[:, :, 0]).any()
    (_, (query, _)), adapted = learner.collect_all(tasks_of(learner))
    def noise(params, traj):  # what was added to the mean of the first action
        out = learner.policy.functional(params, policy_inputs(learner.policy, traj), reset=traj.memory_reset)
        return ((traj.action - out['mean']) / out['log_std'].exp()).detach()[:, :, 0]
    assert not torch.isclose(noise(stack(learner.params, M), support), noise(adapted, query)).any()
    learner.step = 1
    assert not torch.isclose(support.action[:, :, 0], learner.collect_all(tasks_of(learner))[0][0][0].action[:, :, 0]).any()


def test_metrics():
    assert abs(make(outer_epochs=1).outer_step(tasks_of(make()))['kl']) < 1e-12  # nothing has moved yet
    assert abs(make(outer_epochs=5, outer_lr=.03).outer_step(tasks_of(make()))['kl']) > 1e-6
    steps = [make(inner_steps=n).outer_step(tasks_of(make()))['env_steps'] for n in (1, 2)]
    assert steps == [2 * M * K * T, 3 * M * K * T]


def test_adapt_needs_no_help_and_leaves_no_trace():
    learner = make(name='MamlTestCorridor-v0', history=True)
    traj = collect(learner.policy, learner.params, tasks_of(learner), learner.env)
    before, rng = learner.state_dict(), torch.get_rng_state()
    adapted = learner.adapt(learner.params, traj)
    for m in range(M):
        for k, v in learner.adapt(learner.params, pick(traj, m)).items(): torch.testing.assert_close(v[0], adapted[k][m], atol=1e-12, rtol=0)
    broken = replace(traj, reward=traj.reward.masked_fill(~traj.mask, torch.nan))  # what follows the end is nobody's business
    assert not traj.mask.all()
    for k, v in learner.adapt(stack(learner.params, M), broken).items(): assert torch.equal(v, adapted[k]) and not v.requires_grad
    assert torch.equal(rng, torch.get_rng_state())
    assert_same(before, learner.state_dict())


def test_value_head_is_not_adapted():
    learner = make()
    adapted = learner.adapt(learner.params, collect(learner.policy, learner.params, tasks_of(learner), learner.env))
    for k, v in adapted.items():
        assert torch.equal(v, learner.params[k].expand_as(v)) == k.startswith('value.'), k


def test_training_does_not_read_or_write_the_global_generator():
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed)
        learner = make()
        learner.outer_step(tasks_of(learner))
        assert torch.initial_seed() == seed and torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())
        results.append(learner.state_dict())
    assert_same(*results)


def test_state_is_a_copy_and_must_fit():
    learner = make()
    learner.outer_step(tasks_of(learner))
    saved = learner.state_dict()
    learner.outer_step(tasks_of(learner, 1))
    before = learner.state_dict()
    assert not np.array_equal(saved['params/action.bias'], before['params/action.bias'])
    for bad, message in (({k: v for k, v in saved.items() if k != 'params/norm.bias'}, r'norm.bias has shape None in this state, and this policy needs \(4,\)'),
                         (saved | {'params/log_std': np.zeros(3)}, r'log_std has shape \(3,\) in this state, and this policy needs \(2,\)'),
                         (saved | {'params/new': np.zeros(3)}, r'new has shape \(3,\) in this state, and this policy needs None')):
        with pytest.raises(ValueError, match=message): learner.load_state_dict(bad)
        assert_same(before, learner.state_dict())
    learner.load_state_dict(saved)
    learner.outer_step(tasks_of(learner, 1))
    assert_same(before, learner.state_dict())
    learner.load_state_dict(make().state_dict())  # also a state from before the first step
    learner.outer_step(tasks_of(learner))
    assert_same(saved, learner.state_dict())


def poison_support(learner, monkeypatch):
    from ssm_metarl import maml
    def poisoned(*args, **kw):
        traj = collect(*args, **kw)
        traj.reward[2, 1, 3] = torch.inf
        return traj
    monkeypatch.setattr(maml, 'collect', poisoned)
    return FloatingPointError, r'rewards of tasks \[2\]'


def poison_query(learner, monkeypatch):
    collect_all = learner.collect_all
    def poisoned(tasks):
        pairs, adapted = collect_all(tasks)
        pairs[1][1][1, 0, 0] = torch.nan
        return pairs, adapted
    monkeypatch.setattr(learner, 'collect_all', poisoned)
    return FloatingPointError, r'losses of tasks \[1\]'


def poison_inner_step(learner, monkeypatch):
    monkeypatch.setattr(learner, 'config', replace(learner.config, inner_lr=1e308))
    return FloatingPointError, r'(adapted parameters|action probabilities) of tasks \[0, 1, 2\]'  # the parameters, or what so large ones lead to


def fail_in_third_epoch(error):
    def accident(learner, monkeypatch):
        update, calls = learner.update, []
        def fails(*args):
            calls.append(1)
            if len(calls) == 3: raise error('stop')
            return update(*args)
        monkeypatch.setattr(learner, 'update', fails)
        return error, 'stop'
    return accident


@pytest.mark.parametrize('accident', [poison_support, poison_query, poison_inner_step, fail_in_third_epoch(FloatingPointError), fail_in_third_epoch(KeyboardInterrupt)])
@pytest.mark.parametrize('steps_before', [0, 1])
def test_an_outer_step_happens_completely_or_not_at_all(accident, steps_before, monkeypatch):
    learner, twin = make(), make()
    for i in range(steps_before): learner.outer_step(tasks_of(learner, i)), twin.outer_step(tasks_of(twin, i))
    before = learner.state_dict()
    with monkeypatch.context() as m:
        error, message = accident(learner, m)
        with pytest.raises(error, match=message): learner.outer_step(tasks_of(learner, steps_before))
    assert_same(before, learner.state_dict())
    assert learner.outer_step(tasks_of(learner, steps_before)) == twin.outer_step(tasks_of(twin, steps_before))
    assert_same(learner.state_dict(), twin.state_dict())


def test_gradient_may_be_infinite_where_the_loss_is_not():
    learner = make()
    learner.outer_step(tasks_of(learner))
    before, x = learner.state_dict(), learner.params['log_std']
    with pytest.raises(FloatingPointError, match='norm inf.*all losses are finite'): learner.descend((x - x.detach()).sqrt().sum().expand(M), torch.zeros(M))
    with pytest.raises(FloatingPointError, match=r'errors of the value head of tasks \[1\]'): learner.descend(x.sum().expand(M), torch.tensor([0., torch.nan, 0.]))
    assert_same(before, learner.state_dict())


def test_require_finite():
    require_finite('losses', torch.zeros(3), torch.ones(3, 2, 2))
    with pytest.raises(FloatingPointError, match=r'losses of tasks \[0, 2\] are not finite'):
        require_finite('losses', torch.tensor([torch.nan, 0., 0.]), torch.tensor([[0., 0.], [0., 0.], [0., -torch.inf]]))


def test_descend_clips_the_policy_and_the_value_head_separately():
    learner = make(max_grad_norm=1.)
    value = sum(v.sum() for k, v in learner.params.items() if k.startswith('value.'))
    norm = learner.descend(learner.params['log_std'].sum().expand(M), (1e6 * value).expand(M))
    assert norm == pytest.approx(2**.5)
    norms = [torch.cat([v.grad.flatten() for k, v in learner.params.items() if v.grad is not None and k.startswith('value.') == head]).norm().item() for head in (False, True)]
    assert norms == pytest.approx([1, 1], rel=1e-4)  # a huge error of the value head does not drown the policy's gradient


@pytest.mark.parametrize('field, values', [
    ('outer_steps', (0, -1, 1.5)), ('tasks_per_batch', (0,)), ('inner_steps', (0,)), ('outer_epochs', (0,)), ('inner_lr', (0., -1., np.nan, np.inf)), ('outer_lr', (0., np.inf)),
    ('clip', (0.,)), ('max_grad_norm', (-1.,)), ('gamma', (-.1, 1.1, np.nan)), ('gae_lambda', (2.,)), ('entropy_coef', (-1., np.nan)), ('surrogate', ('vanilla', '')), ('outer', ('sgd',)), ('inner_kl', (-1.,)), ('max_kl', (0.,)), ('tasks_per_chunk', (-1, .5))])
def test_config_refuses_nonsense(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f'^{field}=.* is not .*; the default is'): MetaConfig(**{field: value})


def test_a_learner_of_your_own_needs_outer_step_only():
    with pytest.raises(TypeError, match='outer_step'): MetaLearner(make().policy, make().env)
    class Idle(MetaLearner):
        def outer_step(self, tasks): return {}
    learner = Idle(make().policy, make().env)
    traj = collect(learner.policy, learner.params, tasks_of(learner), learner.env)
    expected = inner_step(learner.policy, {k: v.detach().clone().requires_grad_() for k, v in stack(learner.params, M).items()}, traj, learner.config)
    for k, v in learner.adapt(learner.params, traj).items(): torch.testing.assert_close(v, expected[k].detach(), atol=1e-12, rtol=0)


# Chunks, trust region, penalty.

@pytest.mark.parametrize('case', [dict(), dict(name='MamlTestCorridor-v0', history=True), dict(surrogate='dice', inner_steps=2), dict(inner_kl=1., entropy_coef=.01), dict(first_order=True)], ids=str)
def test_chunks_change_nothing(case):
    whole = make(**case)
    metrics = whole.outer_step(tasks_of(whole))
    for size in (1, 2, 3, 7):
        parts = make(**case, tasks_per_chunk=size)
        assert parts.outer_step(tasks_of(parts)) == pytest.approx(metrics, rel=1e-9, abs=1e-9)
        for k in whole.params: torch.testing.assert_close(parts.params[k], whole.params[k], rtol=1e-9, atol=1e-11)


def test_a_chunk_names_the_tasks_by_their_index_in_the_batch():
    learner = make(tasks_per_chunk=1)
    support, query, advantage = trajectories(learner)
    advantage[2] = torch.nan
    before = learner.state_dict()
    with pytest.raises(FloatingPointError, match=r'losses of tasks \[2\] are not finite'):
        with learner.all_or_nothing(): learner.outer_epoch(support, query, advantage)
    assert_same(before, learner.state_dict())


@pytest.mark.parametrize('core', ['ssm', 'gru'])
@pytest.mark.parametrize('history', [False, True])
def test_a_reset_within_a_trajectory_cuts_the_memory(history, core):
    "Two trajectories one after the other, with a reset where they meet, count as the two that they are."
    learner = make(history=history, core=core, state=4)
    ((support, _),), query, advantage = trajectories(learner)
    def glue(x): return x.reshape(M, K // 2, 2 * T, *x.shape[3:])
    def glued(traj): return type(traj)(**{k: glue(v) for k, v in vars(traj).items()})
    assert glued(query).memory_reset.sum(-1).eq(2).all()
    params = {k: v.detach().expand(M, *v.shape) + .1 * torch.randn(M, *v.shape, dtype=v.dtype, generator=torch.Generator().manual_seed(i))
              for i, (k, v) in enumerate(learner.params.items())}
    apart = support_logp(learner.policy, params, support)
    torch.testing.assert_close(support_logp(learner.policy, params, glued(support)), glue(apart))
    uncut = replace(glued(support), memory_reset=torch.zeros_like(glue(support.mask)))
    assert not torch.allclose(support_logp(learner.policy, params, uncut), glue(apart))
    returns = discounted_sum(query.reward, .9)
    results = [query_losses(learner.policy, params, traj, a, learner.config, 1., r, torch.tensor(1.))
               for traj, a, r in ((query, advantage, returns), (glued(query), glue(advantage), glue(returns)))]
    for x, y in zip(*results): torch.testing.assert_close(x, y)
    act = lambda traj: learner.act_after({}, [(support, advantage)], traj, None, ())[0]['mean']  # in a trust region
    torch.testing.assert_close(act(glued(query)), glue(act(query)))
    rollout = Rollout(learner.policy, tasks_of(learner), learner.env)
    def memory(traj):
        rollout.recompute_memory(params, traj)
        return rollout.memory
    torch.testing.assert_close(memory(glued(query)), memory(query)[:, 1::2])


def test_dice_equals_the_ratio_over_one_step():
    "Where there is no past, both have all of the curvature."
    grads = {}
    for kind in ('ratio', 'dice', 'logprob'):
        learner = make(surrogate=kind)
        support, query, advantage = trajectories(learner)
        short = lambda t: type(t)(**{k: v[:, :, :1] for k, v in vars(t).items()})
        grads[kind] = gradient(learner, [(short(t), a[:, :, :1]) for t, a in support], query, advantage)
    torch.testing.assert_close(grads['dice'], grads['ratio'], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(grads['logprob'], grads['ratio'], rtol=1e-3)


@pytest.mark.parametrize('name', ['MetaGymToy-v0', 'MamlTestCorridor-v0'])
def test_a_trust_region_step_is_a_natural_gradient_step(name):
    "Direction against the Hessian of the divergence written out, and length against delta."
    delta = 1e-4  # so short that the quadratic form is exact
    learner = make(name, outer='trpo', max_kl=delta, inner_lr=.1)
    names = [k for k in learner.params if not k.startswith('value.')]
    start = {k: v.detach().clone() for k, v in learner.params.items()}
    support, query, advantage = trajectories(learner)
    unflatten = lambda flat: dict(zip(names, (x.view_as(start[k]) for x, k in zip(flat.split([start[k].numel() for k in names]), names))))
    flat = torch.cat([start[k].flatten() for k in names])
    act = lambda params: learner.policy.functional(params, policy_inputs(learner.policy, query), reset=query.memory_reset)
    before = {k: v.detach() for k, v in act(learner.adapted({k: v.requires_grad_() for k, v in start.items()}, support)[0]).items()}
    def divergence(flat): return masked_mean(kl_divergence(before, act(learner.adapted(start | unflatten(flat), support)[0])), query.mask).mean()
    def loss(flat): return policy_surrogate(action_log_prob(act(learner.adapted(start | unflatten(flat), support)[0]), query.action), query.logp, advantage, query.mask).mean()
    flat.requires_grad_()
    g, = torch.autograd.grad(loss(flat), flat)
    F = torch.autograd.functional.hessian(divergence, flat) + 1e-5 * torch.eye(len(flat), dtype=flat.dtype)
    metrics = learner.outer_step(tasks_of(learner))
    step = torch.cat([(learner.params[k].detach() - start[k].detach()).flatten() for k in names])
    natural = -torch.linalg.solve(F, g)
    size = lambda x: (x @ F @ x).sqrt()
    fall = lambda x: -(g @ x / (size(x) * size(natural))).item()  # per nat, as a share of the best
    assert fall(step) > max(.6, 1.2 * fall(-g))  # ten conjugate gradients are most of the way, and steeper than the gradient
    assert g @ step < 0 and .2 * delta < metrics['kl'] <= delta


@pytest.mark.parametrize('case', [dict(), dict(name='MamlTestCorridor-v0', history=True, entropy_coef=.05), dict(inner_steps=2, first_order=True)], ids=str)
def test_a_trust_region_in_chunks_is_the_same_region(case):
    "Gradients and Fisher products are sums over chunks."
    whole = make(outer='trpo', **case)
    metrics = whole.outer_step(tasks_of(whole))
    assert metrics['kl'] > 0
    for size in (1, 2, 7):
        parts = make(outer='trpo', tasks_per_chunk=size, **case)
        assert parts.outer_step(tasks_of(parts)) == pytest.approx(metrics, rel=1e-6, abs=1e-8)
        for k, v in whole.params.items(): torch.testing.assert_close(parts.params[k], v, rtol=1e-5, atol=1e-8)
    learner = make(outer='trpo', tasks_per_chunk=1)
    support, query, advantage = trajectories(learner)
    advantage[2] = torch.nan
    with pytest.raises(FloatingPointError, match=r'losses of tasks \[2\] are not finite'): learner.trust_region_step(support, query, advantage)


def test_a_trust_region_step_never_ends_where_the_loss_is_not_finite():
    "A wild ratio can overflow to a loss of minus infinity, where the divergence is still small."
    cliff = lambda p: (torch.where(p[0] < -.01, -torch.inf, p[0].sum())[None], 1e-3 * (p[0]**2).sum()[None])
    start = [torch.zeros((), dtype=torch.float64, requires_grad=True)]
    (new,), loss, kl, _ = trust_region([cliff], start, .01, shorten=.3)
    assert -.01 <= new < 0 and loss.isfinite().all()


def test_a_wild_step_has_a_finite_penalty_and_a_gradient_that_leads_back():
    change = torch.tensor([0., 1., 19., 21., 100., 1e4, -100.], requires_grad=True)
    value = never_negative(change)
    slope, = torch.autograd.grad(value.sum(), change)
    assert value.isfinite().all() and slope.isfinite().all() and (value >= 0).all() and (slope[1:6] > 0).all() and slope[6] == -1
    torch.testing.assert_close(value[:3], change[:3].exp() - 1 - change[:3], rtol=1e-6, atol=0)
    learner = make(inner_kl=1.)
    support, query, advantage = trajectories(learner)
    support = [(replace(t, logp=t.logp.float() - 100), a.float()) for t, a in support]  # in float32, exp(100) overflows
    learner.policy.float(), learner.params.update({k: v.detach().float().requires_grad_() for k, v in learner.params.items()})
    _, extra = learner.adapted(learner.params, [(type(t)(**{k: v.float() if v.is_floating_point() else v for k, v in vars(t).items()}), a) for t, a in support])
    grads = torch.autograd.grad(extra.sum(), list(learner.params.values()), allow_unused=True)
    assert extra.isfinite().all() and all(g.isfinite().all() for g in grads if g is not None)


def test_joint_training_counts_what_would_follow_a_cut():
    "Returns and advantages against loops; an episode that ends by its own rules has nothing to follow."
    plain = make('MamlTestCorridor-v0', history=True)
    learner = JointTraining(plain.policy, plain.env, replace(plain.config, bootstrap=True, gamma=.9, gae_lambda=.7))
    tasks, params = tasks_of(learner), {k: v.detach() for k, v in learner.params.items()}
    rollout = Rollout(learner.policy, tasks, learner.env, bootstrap=True)
    traj = rollout.run(params, T)
    cut = (traj.truncated & traj.mask).any(-1)
    assert cut.any() and not cut.all()
    advantage, returns, _ = learner.targets(traj, rollout.after)
    for m in range(M):
        for k in range(K):
            steps = traj.mask[m, k].nonzero().flatten().tolist()
            G = rollout.after[m, k, steps[-1]].item()
            assert (G != 0) == bool(cut[m, k])
            for t in reversed(steps):
                G = traj.reward[m, k, t].item() + .9 * G
                assert returns[m, k, t].item() == pytest.approx(G, abs=1e-10)
    baseline = linear_baseline(traj, returns)
    A = normalise(gae(traj.reward.masked_fill(~traj.mask, 0), baseline, .9, .7, rollout.after), traj.mask)
    torch.testing.assert_close(advantage, A, rtol=0, atol=1e-10)
    learner.outer_step(tasks)


def test_the_outer_rate_decays_to_nothing():
    learner = make(outer_lr_decay=True, outer_steps=2, outer_epochs=1)
    for left in (1., .5):
        learner.outer_step(tasks_of(learner))
        assert learner.optimizer.param_groups[0]['lr'] == pytest.approx(left * learner.config.outer_lr)


def test_the_penalty_is_nothing_in_the_first_epoch():
    learner, tied = make(), make(inner_kl=3.)
    torch.testing.assert_close(gradient(learner, *trajectories(learner)), gradient(tied, *trajectories(tied)), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        for v in tied.params.values(): v += .05
    data = trajectories(make())
    assert tied.adapted(tied.params, data[0])[1].min() > 0


@pytest.mark.parametrize('case', [dict(), dict(first_order=True, inner_steps=2), dict(surrogate='dice', inner_kl=.5, tasks_per_chunk=2)])
@pytest.mark.parametrize('history', [False, True])
def test_the_traced_meta_gradient_is_that_of_autograd(case, history):
    plain, traced = make(history=history, **case), make(history=history, compile=True, **case)
    traced.backend = 'eager'  # inductor itself: below
    for step in range(2):
        assert traced.outer_step(tasks_of(traced, step)) == pytest.approx(plain.outer_step(tasks_of(plain, step)), rel=1e-10, abs=1e-10)
    assert len(traced.compiled('gradient').graphs) == (2 if 'tasks_per_chunk' in case or 'first_order' in case else 1)  # one for each size of a chunk, and one for where the step is known to lead
    assert_same({k: v.round(10) + 0 for k, v in plain.state_dict().items()}, {k: v.round(10) + 0 for k, v in traced.state_dict().items()})


def test_the_compiled_meta_gradient_is_of_second_order():
    compiled, second, first = (make(state=4, max_grad_norm=1e9, outer_epochs=1, **case) for case in (dict(compile=True), dict(), dict(first_order=True)))
    for learner in (compiled, second, first): learner.outer_step(tasks_of(learner))
    slopes = [torch.cat([p.grad.flatten() for p in learner.params.values() if p.grad is not None]) for learner in (compiled, second, first)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-10)
    assert (slopes[2] - slopes[1]).norm() > 1e-3 * slopes[1].norm()


def test_the_compiled_step_names_tasks_that_are_not_finite_and_changes_nothing(monkeypatch):
    learner = make(compile=True, tasks_per_chunk=2)
    learner.backend = 'eager'
    before = learner.state_dict()
    error, match = poison_query(learner, monkeypatch)
    with pytest.raises(error, match=match): learner.outer_step(tasks_of(learner))
    assert_same(before, learner.state_dict())


@pytest.mark.parametrize('cls', ['joint', 'rl2'])
def test_joint_training_in_chunks_is_joint_training(cls):
    from ssm_metarl.rl2 import RL2
    def learner(**kw):
        plain = make(history=True)
        return {'joint': JointTraining, 'rl2': RL2}[cls](plain.policy, replace(plain.env, episodes_per_trial=2), replace(plain.config, **kw))
    whole, parts = learner(), learner(tasks_per_chunk=2)
    for step in range(2): assert whole.outer_step(tasks_of(whole, step)) == pytest.approx(parts.outer_step(tasks_of(parts, step)), rel=1e-9, abs=1e-9)
    for k, v in whole.params.items(): torch.testing.assert_close(v, parts.params[k], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('core', ['stack', 'h3', 'gru', 'none'])
def test_every_core_can_be_traced_and_another_config_is_another_graph(core):
    plain, traced = make(core=core), make(core=core, compile=True)
    traced.backend = 'eager'
    for changes in (dict(), dict(inner_lr=.1, clip=.05, entropy_coef=.5)):
        plain.config, traced.config = replace(plain.config, **changes), replace(traced.config, **changes)
        assert traced.outer_step(tasks_of(traced)) == pytest.approx(plain.outer_step(tasks_of(plain)), rel=1e-9, abs=1e-9)


def test_before_torch_2_7_steps_are_called_from_python(monkeypatch):
    "Its C++ wrapper could not call operations on complex numbers."
    import torch._inductor
    from torch.torch_version import TorchVersion

    from ssm_metarl.compiling import CompiledStepper
    wrapped, compile = [], torch._inductor.compile
    monkeypatch.setattr(torch._inductor, 'compile', lambda *args, options: wrapped.append(options['cpp_wrapper']) or compile(*args, options=options))
    results = []
    for version in ('2.6.0', '2.7.0+cpu', '2.13.0'):
        monkeypatch.setattr(torch, '__version__', TorchVersion(version))
        step = CompiledStepper(lambda p: lambda x: [torch.view_as_real(torch.complex(p['a'], p['a']) * torch.complex(x, -x))])
        results.append(step({'a': torch.ones(4)})(torch.arange(4.))[0])
    assert wrapped == [False, True, True]
    for x in results: torch.testing.assert_close(x, torch.stack([2 * torch.arange(4.), torch.zeros(4)], -1))


def test_a_missing_compiler_is_named(tmp_path):
    code = "import torch; from ssm_metarl.compiling import Compiled; Compiled(lambda x: (x * 2 + 1,))(torch.ones(3))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'CXX': '/nowhere/g++', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path)})
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('RuntimeError: there is no C++ compiler')


@pytest.mark.parametrize('core', ['ssm', 'stack', 'h3', 'gru'])
@pytest.mark.parametrize('family, episodes', [('MetaGymToy-v0', 1), ('MetaTabularMDP-v0', 2)])
def test_a_compiled_actor_does_what_the_policy_does(core, family, episodes):
    "Traced and cut in two; what inductor makes of it is tested in notebook 03d."
    from ssm_metarl.compiling import CompiledStepper
    env = EnvConfig(family, num_envs=2, time_limit=6, episodes_per_trial=episodes)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(5, 4, core=core, history=True)).double()
    actor, tasks = CompiledStepper(policy.actor, 'eager'), sample_tasks(env, 3)
    for size, params in ((.1, stack(policy.get_params(), 3)), (.2, policy.get_params()), (.3, stack(policy.get_params(), 3))):
        params = {k: v + size * torch.randn(v.shape, generator=torch.Generator().manual_seed(i), dtype=v.dtype) for i, (k, v) in enumerate(params.items())}
        for deterministic in (False, True):
            plain, traced = (collect(policy, params, tasks, env, deterministic=deterministic, actor=a) for a in (None, actor))
            for name, v in vars(plain).items(): torch.testing.assert_close(getattr(traced, name), v, rtol=1e-10, atol=1e-10)
        parts = Rollout(policy, tasks, env, actor=actor)  # the parameters change on the way
        parts.run(params, 2), parts.recompute_memory(params, parts.run({k: 2 * v for k, v in params.items()}, 1))
        whole = Rollout(policy, tasks, env)
        whole.run(params, 2), whole.recompute_memory(params, whole.run({k: 2 * v for k, v in params.items()}, 1))
        for a, b in zip(vars(parts.run(params, 2)).values(), vars(whole.run(params, 2)).values()): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert len(actor.graphs) == 4  # one or a set of parameters for each task, with noise or without


# What an outer step leaves behind.

def test_a_penalty_keeps_the_policy_that_collected_near():
    def moved(**kw):
        learner = make(outer_epochs=10, **kw)
        before = {k: v.detach().clone() for k, v in learner.params.items()}
        traj = collect(learner.policy, before, tasks_of(learner), learner.env, key=(0, 0))
        learner.outer_step(tasks_of(learner))
        change = support_logp(learner.policy, stack(learner.params, M), traj) - traj.logp
        return masked_mean(never_negative(change), traj.mask).mean().item()
    assert moved(inner_kl=10.) < .8 * moved()


def test_adapt_takes_a_shared_start_and_an_inner_step_takes_one_rate_for_one_parameter():
    learner = make()
    traj = collect(learner.policy, learner.params, tasks_of(learner), learner.env)
    adapted = learner.adapt(learner.params, traj)
    for k, v in learner.adapt(stack(learner.params, M), traj).items(): assert torch.equal(v, adapted[k])
    start = {k: v.detach().clone().requires_grad_() for k, v in stack(learner.params, M).items()}
    for k, v in inner_step(learner.policy, start, traj, learner.config, lr={'action.bias': .3}).items():
        assert torch.equal(v.detach(), adapted[k] if k == 'action.bias' else learner.params[k].detach().expand_as(v))
    assert not torch.equal(adapted['action.bias'][0], adapted['action.bias'][1])  # tasks go different ways


def test_joint_training_resumes_bit_for_bit():
    plain = make()
    first, second = (JointTraining(make().policy, plain.env, plain.config) for _ in range(2))
    for step in range(2): first.outer_step(tasks_of(first, step))
    second.load_state_dict(first.state_dict())
    assert first.outer_step(tasks_of(first, 2)) == second.outer_step(tasks_of(second, 2))
    assert_same(first.state_dict(), second.state_dict())


if 'MamlTestPayday-v0' not in FAMILIES:
    @register_family('MamlTestPayday-v0')
    class Payday(PointNavigation):
        "A task that pays 1 in every step and never ends."
        def step(self, state, action, tasks, noise): return state, np.ones(len(state), np.float32), np.zeros(len(state), bool)
        def observe(self, state, tasks): return np.zeros_like(state)


@pytest.mark.parametrize('bootstrap', [False, True])
def test_a_time_limit_belongs_to_the_task_or_only_cuts(bootstrap):
    "1 in each step for ever is worth 1 / (1 - gamma); within five steps less, and without memory or clock the value is a mean over them."
    plain = make(state=2, gamma=.8, outer_lr=.1, outer_lr_decay=True, outer_steps=120, inner_lr=.01)
    learner = JointTraining(plain.policy, replace(plain.env, env_name='MamlTestPayday-v0', time_limit=5), replace(plain.config, bootstrap=bootstrap))
    for step in range(120): learner.outer_step(tasks_of(learner, step))
    value = collect(learner.policy, learner.params, tasks_of(learner), learner.env).value[0, 0].mean().item()
    if bootstrap: assert value == pytest.approx(5, abs=.3)
    else: assert value == pytest.approx(np.mean([(1 - .8**n) / .2 for n in (5, 4, 3, 2, 1)]), abs=.3)


def test_one_complex_mode_cannot_be_compiled():
    with pytest.raises(ValueError, match='a single complex mode.*take state_dim=4 or more'): make(compile=True).outer_step(tasks_of(make()))
