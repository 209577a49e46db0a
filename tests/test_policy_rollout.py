"Properties of `policy` and `rollout` that hold for any shape, mask and number."
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import distributions

from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy, action_log_prob, choose_action, entropy, kl_divergence
from ssm_metarl.rollout import (Rollout, Trajectories, collect, discounted_sum, masked_mean, policy_inputs)
from ssm_metarl.policy_gradient import (SURROGATES, advantages, gae, linear_baseline, normalise, policy_surrogate,
    value_loss)

torch.set_num_threads(1)
settings.register_profile('short', max_examples=15, deadline=None, derandomize=True)
settings.load_profile('short')

size, seeds = st.integers(1, 4), st.integers(0, 2**20)
spaces_of = {'box': spaces.Box(-.1, .1, (2,), np.float32), 'discrete': spaces.Discrete(3)}
kinds = st.sampled_from(sorted(spaces_of))


def normal(seed, *shape): return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def make_policy(kind, seed=0, **kw):
    return SSMMetaPolicy(spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces_of[kind], PolicyConfig(8, 4, **kw), seed)


def stacked(policy, M, seed):
    return {k: v + .1 * normal([seed, i], M, *v.shape).to(v.dtype) for i, (k, v) in enumerate(policy.get_params().items())}


def lengths_mask(lengths, T): return torch.arange(T) < lengths.unsqueeze(-1)


@st.composite
def experience(draw):
    "Trajectories of random lengths, numbers and shapes, float64."
    M, K, T, seed = draw(size), draw(size), draw(st.integers(1, 6)), draw(seeds)
    mask = lengths_mask(torch.from_numpy(np.random.default_rng(seed).integers(1, T + 1, (M, K))), T)
    end = mask & ~torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)
    first = torch.zeros_like(mask)
    first[..., 0] = True
    return Trajectories(normal([seed, 1], M, K, T, 2), normal([seed, 2], M, K, T, 2), normal([seed, 3], M, K, T), end, torch.zeros_like(end), mask,
                        first, first, normal([seed, 4], M, K, T), normal([seed, 5], M, K, T))


def overwrite(traj, filling):
    "Other numbers wherever the mask is off."
    def change(x): return x.masked_fill(~traj.mask.view(*traj.mask.shape, *[1] * (x.dim() - 3)), filling) if x.is_floating_point() else x
    return Trajectories(**{f.name: change(getattr(traj, f.name)) for f in fields(traj)})


def losses(traj, logp):
    "All losses of a batch, and their gradient by the log-probabilities."
    logp = logp.clone().requires_grad_()
    returns = discounted_sum(traj.reward.masked_fill(~traj.mask, 0), .9)
    total = [policy_surrogate(logp, traj.logp, advantages(traj, .9, .95), traj.mask, kind) for kind in SURROGATES]
    total += [policy_surrogate(logp, traj.logp, advantages(traj), traj.mask, clip=.2), value_loss(logp, returns, traj.mask)]
    return torch.stack(total).detach(), torch.autograd.grad(sum(total).sum(), logp)[0]


@given(kinds, size, size, size, seeds)
def test_stacked_parameters_equal_a_loop_over_tasks(kind, M, K, T, seed):
    policy = make_policy(kind).double()
    params, obs = stacked(policy, M, seed), normal(seed, M, K, T, 2)
    together = policy.functional(params, obs)
    for m in range(M):
        for k, v in policy.functional({n: p[m] for n, p in params.items()}, obs[m]).items(): torch.testing.assert_close(together[k][m], v, rtol=0, atol=1e-10)


@given(kinds, st.integers(2, 7), st.data(), seeds)
def test_resets_and_carried_state_cut_a_sequence_anywhere(kind, T, data, seed):
    policy = make_policy(kind).double()
    params, obs = stacked(policy, 2, seed), normal(seed, 2, 3, T, 2)
    reset = torch.from_numpy(np.random.default_rng(seed).random((2, 3, T)) < .3)
    whole, step, state = policy.functional(params, obs, reset=reset), policy.stepper(params), policy.initial_state(2, 3)
    for t in range(T):
        out, state = step(obs[:, :, t], state.masked_fill(reset[:, :, t, None], 0))
        torch.testing.assert_close(out['features'], whole['features'][:, :, t], rtol=0, atol=1e-10)
    cut = data.draw(st.integers(1, T - 1))
    first = policy.functional(params, obs[:, :, :cut], reset=reset[:, :, :cut])
    second = policy.functional(params, obs[:, :, cut:], first['state'], reset[:, :, cut:])
    torch.testing.assert_close(second['features'], whole['features'][:, :, cut:], rtol=0, atol=1e-10)


@pytest.mark.parametrize('kind', sorted(spaces_of))
def test_twice_differentiable(kind):
    policy = make_policy(kind).double()
    obs, action = normal(0, 2, 5, 2), torch.zeros(2, 5) if kind == 'discrete' else normal(1, 2, 5, 2)
    names = ['encoder.weight', 'core.log_decay', 'norm.weight', 'action.bias']
    values = [policy.get_params()[n].requires_grad_() for n in names]
    def loss(*values): return action_log_prob(policy.functional(policy.get_params() | dict(zip(names, values)), obs), action).mean()
    torch.autograd.gradgradcheck(loss, values)


@given(kinds, st.floats(.01, 30), seeds)
def test_distributions(kind, scale, seed):
    out = lambda i: ({'logits': scale * normal([seed, i], 4, 3)} if kind == 'discrete'
                     else {'mean': scale * normal([seed, i], 4, 2), 'log_std': normal([seed, i, 1], 4, 2)})
    def reference(o): return (distributions.Categorical(logits=o['logits']) if kind == 'discrete'
                              else distributions.Independent(distributions.Normal(o['mean'], o['log_std'].exp()), 1))
    p, q = out(0), out(1)
    noise = torch.from_numpy(np.random.default_rng(seed).gumbel(size=(4, 3))) if kind == 'discrete' else normal(seed, 4, 2)
    action = choose_action(p, noise)
    torch.testing.assert_close(action_log_prob(p, action), reference(p).log_prob(action))
    torch.testing.assert_close(entropy(p), reference(p).entropy())
    torch.testing.assert_close(kl_divergence(p, q), distributions.kl_divergence(reference(p), reference(q)))
    assert (kl_divergence(p, q) >= -1e-12).all()


def test_extreme_outputs_stay_finite():
    logits = torch.tensor([[1e4, 0., -1e4]], requires_grad=True)
    p, q = {'logits': logits}, {'mean': torch.zeros(1, 2), 'log_std': torch.full((1, 2), -60.)}
    total = action_log_prob(p, torch.tensor([2])) + entropy(p) + kl_divergence(p, {'logits': torch.zeros(1, 3)})
    assert torch.isfinite(total).all() and torch.isfinite(torch.autograd.grad(total.sum(), logits)[0]).all()
    assert torch.isfinite(kl_divergence(q, {'mean': torch.zeros(1, 2), 'log_std': torch.zeros(1, 2)})).all()


@given(experience(), st.sampled_from([torch.nan, torch.inf, -1e30, 7.]))
def test_nothing_after_the_end_changes_a_loss_or_gradient(traj, filling):
    logp = traj.logp + .1 * normal(0, *traj.logp.shape)
    other = overwrite(traj, filling)
    for a, b in zip(losses(traj, logp), losses(other, overwrite(replace(traj, logp=logp), filling).logp)): assert torch.equal(a, b)
    assert torch.equal(traj.returns, other.returns) and torch.equal(linear_baseline(traj, traj.reward), linear_baseline(other, other.reward))


def squared_error(prediction, y, mask): return masked_mean((y - prediction)**2, mask)


columns = st.lists(st.tuples(st.integers(-30, 30), st.sampled_from([0., 1., -30_000., 1e6]), st.booleans()), min_size=1, max_size=4)


@given(experience(), columns, st.integers(-12, 12))
def test_the_baseline_is_never_worse_than_the_mean_in_any_unit(traj, columns, unit):
    "Columns in units from 1e-30 to 1e30, with offsets, two of them constant; returns in units from 1e-12 to 1e12."
    noise = normal(5, *traj.reward.shape)
    rows = [10.**power * (offset + varies * (noise + i * traj.obs[..., 0])) for i, (power, offset, varies) in enumerate(columns)]
    two = [torch.full_like(noise, 1000.)] * 2
    y = 10.**unit * traj.reward
    fitted = linear_baseline(replace(traj, obs=torch.stack(rows + two, -1)), y)
    mean = masked_mean(y, traj.mask)[:, None, None].expand_as(y)
    assert (squared_error(fitted, y, traj.mask) <= squared_error(mean, y, traj.mask) * (1 + 1e-9)).all()


def test_two_columns_of_1000_and_offsets_of_30000_change_no_baseline():
    g = np.random.default_rng(0)
    obs, y = torch.from_numpy(g.standard_normal((2, 8, 50, 2))), torch.from_numpy(g.standard_normal((2, 8, 50)))
    zero, mask = torch.zeros(2, 8, 50), torch.ones(2, 8, 50).bool()
    def fitted(obs): return linear_baseline(Trajectories(obs, zero, zero, mask, mask, mask, mask, mask, zero, zero), y)
    torch.testing.assert_close(fitted(torch.cat([obs, torch.full((2, 8, 50, 2), 1000.)], -1)), fitted(obs), rtol=0, atol=1e-12)
    torch.testing.assert_close(fitted(obs + 30_000), fitted(obs), rtol=0, atol=1e-8)
    torch.testing.assert_close(fitted(obs * torch.tensor([1e-9, 1e9])), fitted(obs), rtol=0, atol=1e-12)
    torch.testing.assert_close(fitted((obs + 30_000).float()), fitted(obs), rtol=0, atol=1e-2)  # float32 keeps 0.002


def test_five_steps_do_not_lose_their_signal():
    config, policy = EnvConfig('MetaGymToy-v0', 1, 5), make_policy('box')
    traj = collect(policy, policy.get_params(), sample_tasks(config, 1) * 500, config)
    G = discounted_sum(traj.reward, .99).double()
    one = Trajectories(**{f.name: getattr(traj, f.name).flatten(0, 1)[None] for f in fields(traj)})
    pooled = normalise(G - linear_baseline(one, G.flatten(0, 1)[None]).view_as(G), traj.mask)
    assert (normalise(G - linear_baseline(traj, G), traj.mask) * pooled).mean() > .25  # a whole fit leaves -.05


@pytest.mark.parametrize('features', [294, 27_648])  # pictures of MiniGrid and of CarRacing
def test_a_baseline_of_images_fits_into_memory(features):
    g = torch.Generator().manual_seed(0)
    obs, y = torch.randn(1, 4, 50, features, generator=g), torch.randn(1, 4, 50, generator=g)
    zero, mask = torch.zeros(1, 4, 50), torch.ones(1, 4, 50).bool()
    fitted = linear_baseline(Trajectories(obs, zero, zero, mask, mask, mask, mask, mask, zero, zero), y)
    assert fitted.isfinite().all()  # F equations of F numbers would take 24 GB


def test_rollouts_without_noise_and_in_float64():
    config, policy = EnvConfig('MetaGymToy-v0', 4, 6), make_policy('box')
    params, tasks = stacked(policy, 3, 0), sample_tasks(config, 3)
    quiet = collect(policy, params, tasks, config, deterministic=True)
    torch.testing.assert_close(quiet.action, quiet.action[:, :1].expand_as(quiet.action))
    exact = collect(make_policy('box').double(), {k: v.double() for k, v in params.items()}, tasks, config)
    assert exact.logp.dtype == torch.float64
    torch.testing.assert_close(exact.action.float(), collect(policy, params, tasks, config).action, rtol=0, atol=1e-4)
    broken = params | {'mixer.bias': params['mixer.bias'].index_fill(0, torch.tensor(1), torch.nan)}
    with pytest.raises(FloatingPointError, match=r'action probabilities of tasks \[1\] are not finite'): collect(policy, broken, tasks, config)


@given(experience(), st.integers(1, 4))
def test_longer_filling_changes_no_loss(traj, extra):
    def longer(x): return torch.cat([x, x.new_zeros(*x.shape[:2], extra, *x.shape[3:])], 2)
    more = Trajectories(**{f.name: longer(getattr(traj, f.name)) for f in fields(traj)})
    A, B = normalise(traj.reward, traj.mask), normalise(more.reward, more.mask)
    torch.testing.assert_close(longer(A), B)
    torch.testing.assert_close(policy_surrogate(traj.logp, 0 * traj.logp, A, traj.mask), policy_surrogate(more.logp, 0 * more.logp, B, more.mask))
    torch.testing.assert_close(value_loss(traj.value, traj.reward, traj.mask), value_loss(more.value, more.reward, more.mask))
    torch.testing.assert_close(longer(linear_baseline(traj, traj.reward)), linear_baseline(more, more.reward))


@given(experience())
def test_tasks_do_not_touch_each_other(traj):
    for m in range(len(traj.obs)):
        alone = Trajectories(**{f.name: getattr(traj, f.name)[m:m + 1] for f in fields(traj)})
        torch.testing.assert_close(advantages(alone), advantages(traj)[m:m + 1], rtol=1e-6, atol=1e-6)


@given(experience(), st.floats(.1, 100), st.floats(-100, 100))
def test_normalise_ignores_scale_and_offset(traj, scale, offset):
    x, real = traj.reward, traj.mask
    assume((real.sum((1, 2)) > 1).all())  # a single number has no spread
    torch.testing.assert_close(normalise(scale * x + offset, real), normalise(x, real), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(masked_mean(normalise(x, real)**2, real), torch.ones(len(x), dtype=x.dtype))


@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), seeds)
def test_sums_follow_their_definitions(T, gamma, lam, seed):
    r, v = normal([seed, 0], 2, T), normal([seed, 1], 2, T)
    weight = lambda d: torch.tensor([[d**(k - t) if k >= t else 0. for k in range(T)] for t in range(T)], dtype=r.dtype)
    torch.testing.assert_close(discounted_sum(r, gamma), r @ weight(gamma).T)
    after = torch.cat([v[:, 1:], torch.zeros(2, 1, dtype=r.dtype)], 1)
    torch.testing.assert_close(gae(r, v, gamma, lam), (r + gamma * after - v) @ weight(gamma * lam).T)
    torch.testing.assert_close(gae(r, v, gamma, 1.), discounted_sum(r, gamma) - v)


@given(experience(), st.floats(.05, .5))
def test_surrogate_slopes_and_clipping(traj, clip):
    logp = traj.logp.clone().requires_grad_()
    slope = lambda kind, clip=None: torch.autograd.grad(policy_surrogate(logp, traj.logp, traj.reward, traj.mask, kind, clip).sum(), logp)[0]
    torch.testing.assert_close(slope('ratio'), slope('logprob'))
    torch.testing.assert_close(slope('dice'), slope('logprob'))
    torch.testing.assert_close(slope('ratio', clip), slope('ratio'))  # at the old policy nothing is clipped
    moved = traj.logp + normal(1, *traj.logp.shape)
    ratio, A = (moved - traj.logp).exp(), traj.reward
    gain = torch.where(A > 0, ratio.clamp(max=1 + clip), ratio.clamp(min=1 - clip)) * A  # clipped only where the policy has already gained
    torch.testing.assert_close(policy_surrogate(moved, traj.logp, A, traj.mask, clip=clip), -masked_mean(gain, traj.mask))


@given(size, size, st.booleans(), st.integers(0, 5))
def test_collect(M, K, use_history, start):
    config = EnvConfig('MetaGymToy-v0', K, 6, seed=1)
    random_state = torch.get_rng_state()
    policy = make_policy('box', history=use_history)
    params, tasks = stacked(policy, M, 0), sample_tasks(config, M)
    traj = collect(policy, params, tasks, config, start=start)
    assert torch.equal(random_state, torch.get_rng_state())
    assert traj.memory_reset[..., 0].all() and not traj.memory_reset[..., 1:].any() and torch.equal(traj.memory_reset, traj.episode_start)
    for f in fields(traj): assert getattr(traj, f.name).shape[:3] == (M, K, 6)
    assert traj.mask[..., 0].all() and (traj.mask[..., :-1] >= traj.mask[..., 1:]).all()
    assert ((traj.terminated | traj.truncated).sum(-1) == 1).all()
    logp = action_log_prob(policy.functional(params, policy_inputs(policy, traj), reset=traj.memory_reset), traj.action)
    torch.testing.assert_close(logp[traj.mask], traj.logp[traj.mask], rtol=0, atol=1e-5)
    m = M - 1
    alone = collect(policy, {k: v[m:] for k, v in params.items()}, tasks[m:], config, start=start + m)
    fewer = collect(policy, params, tasks, replace(config, num_envs=1), start=start)
    torch.testing.assert_close(alone.action, traj.action[m:], rtol=0, atol=1e-5)
    torch.testing.assert_close(fewer.action, traj.action[:, :1], rtol=0, atol=1e-5)


def test_an_episode_ends_once():
    policy = make_policy('box')
    still = {k: v * (not k.startswith('action.')) for k, v in policy.get_params().items()}  # mean action 0
    tasks = [{'goal': np.zeros(2, np.float32)}, {'goal': np.full(2, .5, np.float32)}]  # at the goal from the start, and far from it
    traj = collect(policy, still, tasks, EnvConfig('MetaGymToy-v0', 1, 3), deterministic=True)
    assert traj.mask[:, 0].tolist() == [[True, False, False], [True, True, True]]
    assert traj.terminated[:, 0].tolist() == [[True, False, False], [False] * 3] and traj.truncated[:, 0].tolist() == [[False] * 3, [False, False, True]]
    assert traj.num_steps == 4 and traj.returns[0].item() == 0


@pytest.mark.parametrize('kind', sorted(spaces_of))
def test_the_value_does_not_shape_the_features(kind):
    policy = make_policy(kind)
    policy(torch.ones(2, 5, 2))['value'].sum().backward()
    assert {k for k, v in policy.named_parameters() if v.grad is not None} == {'value.weight', 'value.bias'}


@given(st.integers(1, 5))
def test_a_pause_changes_nothing(cut):
    config, policy = EnvConfig('MetaGymToy-v0', 3, 6, seed=2), make_policy('box', history=True)
    tasks, params = sample_tasks(config, 2), policy.get_params()
    rollout = Rollout(policy, tasks, config)
    rollout.recompute_memory(params, rollout.run(params, cut))
    torch.testing.assert_close(rollout.run(params, 6 - cut).action, collect(policy, params, tasks, config).action, rtol=0, atol=1e-5)


@given(st.booleans(), st.integers(1, 5))
def test_the_value_after_the_clock_is_that_of_a_longer_episode(use_history, T):
    policy = make_policy('box', history=use_history)
    config = EnvConfig('MetaGymToy-v0', 1, T + 1)  # one trajectory: its noise does not depend on the length
    params, tasks = stacked(policy, 3, 0), sample_tasks(config, 3)
    longer, rollout = collect(policy, params, tasks, config), Rollout(policy, tasks, replace(config, time_limit=T), bootstrap=True)
    traj = rollout.run(params, T)
    torch.testing.assert_close(rollout.after[..., -1], longer.value[..., -1], rtol=0, atol=1e-6)
    assert not rollout.after[..., :-1].any() and torch.equal(traj.value, longer.value[..., :-1])
    returns = discounted_sum(traj.reward + .9 * rollout.after, .9)
    torch.testing.assert_close(gae(traj.reward, traj.value, .9, 1., rollout.after), returns - traj.value)


def test_nothing_follows_an_episode_that_the_task_ended():
    policy, config = make_policy('box'), EnvConfig('MetaGymToy-v0', 1, 3)
    still = {k: v * (not k.startswith('action.')) for k, v in policy.get_params().items()} | {'value.bias': torch.ones(1)}
    rollout = Rollout(policy, [{'goal': np.zeros(2, np.float32)}, {'goal': np.full(2, .5, np.float32)}], config, deterministic=True, bootstrap=True)
    traj = rollout.run(still, 3)
    assert traj.terminated.any(-1).flatten().tolist() == [True, False]
    assert not rollout.after[0].any() and (rollout.after[1, 0] != 0).tolist() == [False, False, True]


def test_a_trial_is_cut_after_its_last_episode_only():
    policy, config = make_policy('box', history=True), EnvConfig('MetaGymToy-v0', 2, 3, episodes_per_trial=2)
    params, tasks = stacked(policy, 2, 0), sample_tasks(config, 2)
    rollout = Rollout(policy, tasks, config, bootstrap=True)
    traj, final = rollout.run(params, 5), {}
    step = rollout.env.step
    def remembered(actions):
        result = step(actions)
        final.update(result[-1])
        return result
    rollout.env.step = remembered
    traj = rollout.run(params, 1)
    inputs = policy_inputs(policy, traj)
    last = torch.cat([torch.from_numpy(np.stack(final['final_obs'])).view(2, 2, 2), traj.action[..., -1, :], traj.reward[..., -1:], torch.zeros(2, 2, 1)], -1)
    value = policy.functional(params, torch.cat([inputs, last.unsqueeze(2)], 2))['value']
    torch.testing.assert_close(rollout.after[..., -1], value[..., -1], rtol=0, atol=1e-6)
    assert not rollout.after[..., :-1].any()


def test_errors_say_what_to_do():
    config, policy = EnvConfig('MetaGymToy-v0', 2, 4), make_policy('box')
    tasks = sample_tasks(config, 3)
    with pytest.raises(ValueError, match='parameters of 2 tasks for observations of 3'): collect(policy, stacked(policy, 2, 0), tasks, config)
    with pytest.raises(ValueError, match='tasks is empty'): collect(policy, policy.get_params(), [], config)
    with pytest.raises(ValueError, match='leaves'): Rollout(policy, tasks, config).run(policy.get_params(), 5)
    with pytest.raises(ValueError, match='one step'): policy(torch.zeros(1, 2, 3, 2))
    x = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match='not one of'): policy_surrogate(x, x, x, x.bool(), kind='vanilla')
    with pytest.raises(ValueError, match='needs a ratio'): policy_surrogate(x, x, x, x.bool(), kind='logprob', clip=.2)


def boxes():
    "Boxes of every dtype, each dimension bounded on two sides, on one, or not at all; some of the bounds are huge."
    def make(dtype, ends, kinds):
        dtype, bounds = np.dtype(dtype), []
        for (low, high), (below, above) in zip(ends, kinds):
            limits = np.finfo(dtype) if dtype.kind == 'f' else np.iinfo(dtype)
            low, high = sorted((max(min(x, limits.max), limits.min) for x in (low, high)))
            if dtype.kind == 'f': low, high = low if below else -np.inf, high if above else np.inf
            bounds.append((dtype.type(low), dtype.type(high)))
        low, high = (np.array(x, dtype) for x in zip(*bounds))
        return spaces.Box(low, high, dtype=dtype)
    number = st.one_of(st.integers(-300, 300), st.sampled_from([2**31 - 1, -2**63, 2**63 - 1, 2**64 - 1, 10**30]))
    pairs = st.lists(st.tuples(number, number), min_size=3, max_size=3)
    return st.builds(make, st.sampled_from(['f2', 'f4', 'f8', 'i1', 'u1', 'i4', 'i8', 'u8']), pairs, st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=3))


def policy_in(space): return SSMMetaPolicy(spaces.Box(-1, 1, (2,), np.float32), space, PolicyConfig(8, 4))


@settings(max_examples=60)
@given(boxes(), seeds)
def test_every_action_is_a_member_of_its_box(space, seed):
    policy = policy_in(space)
    chosen = np.concatenate([np.float32(10.**np.arange(-2, 12))[:, None] * np.random.default_rng(seed).standard_normal((14, 3)), np.zeros((1, 3)), np.ones((1, 3)), -np.ones((1, 3))]).astype(np.float32)
    for dtype in (np.float32, np.float64):
        taken = policy.to_env(chosen.astype(dtype))
        assert all(space.contains(a) for a in taken)
    both, low, high = space.bounded_below & space.bounded_above, space.low.astype(float), space.high.astype(float)
    off = np.abs(taken[[-1, -2]].astype(float) - [low, high])[:, both]  # -1 and 1 are the bounds
    assert (off <= (2.**-9 if space.dtype == np.float16 else 1e-6) * np.maximum(np.abs(low), np.abs(high))[both]).all()


@given(st.integers(1, 5), st.integers(-10, 10), st.sampled_from(['i1', 'i4', 'i8', 'u1']))
def test_every_action_is_a_member_of_its_discrete_space(n, start, dtype):
    space = spaces.Discrete(n, start=abs(start) if dtype == 'u1' else start, dtype=np.dtype(dtype).type)
    assert all(space.contains(a) for a in policy_in(space).to_env(np.arange(n)))


def test_clipped_actions_keep_their_log_probability():
    config = EnvConfig('MetaGymToy-v0', 4, 10)
    policy, taken = make_policy('box', init_log_std=1.), []
    rollout = Rollout(policy, sample_tasks(config, 2), config)
    step = rollout.env.step
    rollout.env.step = lambda actions: taken.append(actions) or step(actions)
    traj = rollout.run(policy.get_params(), 10)
    assert (traj.action.abs() > 1).any() and all(spaces_of['box'].contains(a) for actions in taken for a in actions)
    out = policy.functional(policy.get_params(), traj.obs)
    normal = distributions.Independent(distributions.Normal(out['mean'], out['log_std'].exp()), 1)
    torch.testing.assert_close(normal.log_prob(traj.action), traj.logp, rtol=0, atol=1e-4)


def test_empty_spaces_are_refused():
    empty, plane = spaces.Box(-1, 1, (0,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
    with pytest.raises(ValueError, match='not a one-dimensional Box'): SSMMetaPolicy(empty, plane)
    with pytest.raises(ValueError, match='neither a one-dimensional Box nor Discrete'): SSMMetaPolicy(plane, empty)


@given(st.lists(st.booleans(), min_size=5, max_size=5).filter(lambda allowed: any(allowed)), seeds)
def test_actions_that_are_not_allowed_count_for_nothing(allowed, seed):
    "Entropy, divergence and log-probability, with first and second derivatives: as if the forbidden actions were not there."
    allowed = torch.tensor(allowed)
    x, y = normal([seed, 0], 5).requires_grad_(), normal([seed, 1], 5)
    def results(keep):
        p, q = ({'logits': keep(v)} for v in (x, y))
        value = entropy(p) + kl_divergence(p, q) + kl_divergence(q, p) + action_log_prob(p, torch.tensor(0))
        slope, = torch.autograd.grad(value, x, create_graph=True)
        return value, slope, torch.autograd.grad((slope * y).sum(), x)[0]
    first = allowed.nonzero()[0]  # allowed, and the action whose log-probability we take
    order = torch.cat([first, torch.tensor([i for i in range(5) if i != first])])
    masked = results(lambda v: v.masked_fill(~allowed, -torch.inf)[order])
    for a, b in zip(masked, results(lambda v: v[order][allowed[order]])): torch.testing.assert_close(a, b)


def test_masked_logits_roll_out():
    class Masked(SSMMetaPolicy):
        def stepper(self, params=None):
            step = super().stepper(params)
            def masked(obs, state):
                out, state = step(obs, state)
                return out | dict(logits=out['logits'].index_fill(-1, torch.tensor(0), -torch.inf)), state
            return masked

    config = EnvConfig('MetaCartPole-v0', 3, 5)
    policy = Masked(config.family.observation_space, config.family.action_space, PolicyConfig(8, 4))
    traj = collect(policy, policy.get_params(), sample_tasks(config, 2), config)
    assert (traj.action == 1).all() and not traj.logp.any()


def test_parameters_land_on_the_default_device():
    with torch.device('meta'): there = [make_policy(kind, core=core) for kind in spaces_of for core in ('ssm', 'none')]
    assert all(p.device.type == 'meta' for policy in there for p in policy.parameters())
    with torch.device('cpu'): here = make_policy('box')
    for k, v in make_policy('box').get_params().items(): assert torch.equal(v, here.get_params()[k])


def test_a_policy_config_takes_numpy_numbers():
    config = PolicyConfig(np.int64(8), np.int32(4), init_log_std=np.float32(-.5), history=np.bool_(True))
    assert config == PolicyConfig(8, 4, init_log_std=-.5, history=True) and all(type(v) in (int, float, str, bool) for v in vars(config).values())


def test_nan_observations_are_those_of_an_environment():
    config, policy = EnvConfig('MetaGymToy-v0', 2, 5), make_policy('box')
    rollout = Rollout(policy, sample_tasks(config, 3), config, start=10)
    step = rollout.env.step
    def spoiled(actions):
        obs, *rest = step(actions)
        obs[3, 1] = np.nan
        return obs, *rest
    rollout.env.step = spoiled
    with pytest.raises(FloatingPointError, match=r'observations of environments \[3\] \(tasks \[11\]\) are not finite at step 1'): rollout.run(policy.get_params(), 5)


def test_a_log_ratio_of_a_hundred_behind_the_clip():
    one, old = torch.tensor([[[100., 0.]]], requires_grad=True), torch.zeros(1, 1, 2)
    loss = policy_surrogate(one, old, torch.ones(1, 1, 2), old == 0, clip=.2)
    assert loss.item() == pytest.approx(-1.1) and torch.autograd.grad(loss, one)[0].tolist() == [[[0., -.5]]]
    loss = policy_surrogate(-one, old, -torch.ones(1, 1, 2), old == 0, clip=.2)
    assert loss.item() == pytest.approx(.9) and torch.autograd.grad(loss, one)[0].tolist() == [[[0., -.5]]]


@settings(max_examples=60)
@given(st.lists(st.floats(-200, 200, width=32), min_size=4, max_size=4), st.lists(st.sampled_from([-1., 0., 1.]), min_size=4, max_size=4), st.sampled_from([*((k, None) for k in SURROGATES), ('ratio', .2), ('ratio', 3.)]))
def test_a_finite_loss_has_finite_derivatives(change, advantage, kind):
    logp, old = torch.tensor(change).view(1, 1, 4).requires_grad_(), torch.zeros(1, 1, 4)
    loss = policy_surrogate(logp, old, torch.tensor(advantage).view(1, 1, 4), old == 0, *kind)
    slope, = torch.autograd.grad(loss, logp, create_graph=True)
    if loss.isfinite(): assert slope.isfinite().all()
    if loss.isfinite() and slope.requires_grad: assert torch.autograd.grad(slope.sum(), logp)[0].isfinite().all()


@pytest.mark.parametrize('kind', SURROGATES)
def test_an_advantage_after_the_end_reaches_no_gradient_even_if_it_is_nan(kind):
    logp, mask = torch.zeros(1, 1, 3, requires_grad=True), torch.tensor([[[True, True, False]]])
    policy_surrogate(logp, torch.zeros(1, 1, 3), torch.tensor([[[1., 2., torch.nan]]]), mask, kind).sum().backward()
    assert logp.grad.isfinite().all() and logp.grad[0, 0, 0] != 0


@pytest.mark.parametrize('kind', ['ratio', 'dice'])
def test_the_old_probabilities_are_constants_even_if_they_are_the_new_ones(kind):
    "Over all trajectories of two steps with three actions: the slope of the expected return, and with DiCE its curvature, too."
    A, T = 3, 2
    first, second = torch.cartesian_prod(torch.arange(A), torch.arange(A)).T
    reward = torch.stack([normal(1, A)[first], normal(2, A, A)[first, second]], -1)  # of each trajectory, [A * A, T]
    at, mask = normal(3, T, A), torch.ones(1, A * A, T, dtype=torch.bool)
    def logp(theta): return torch.stack([theta[0].log_softmax(-1)[first], theta[1].log_softmax(-1)[second]], -1)
    def chance(theta): return logp(theta).sum(-1).exp()
    def expected(theta): return chance(theta) @ reward.sum(-1)
    to_come = torch.stack([reward.sum(-1), reward[:, 1]], -1)
    weighed = (chance(at)[:, None] * to_come * mask.sum()).unsqueeze(0)  # times the number of steps: the surrogate is a mean
    def gain(theta):
        now = logp(theta).unsqueeze(0)
        return -policy_surrogate(now, now, weighed, mask, kind).sum()
    slope, curvature = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    torch.testing.assert_close(slope(gain, at), slope(expected, at))
    assert slope(expected, at).abs().max() > .01
    if kind == 'dice': torch.testing.assert_close(curvature(gain, at), curvature(expected, at))


@given(experience())
def test_dice_weighs_a_step_by_what_it_adds_to_the_product_of_all_ratios_so_far(traj):
    moved = traj.logp + .3 * normal(1, *traj.logp.shape)
    loss = torch.zeros(len(moved), dtype=moved.dtype)
    for m, k in np.ndindex(*moved.shape[:2]):
        so_far = 1.
        for t in range(int(traj.mask[m, k].sum())):
            now = so_far * (moved - traj.logp)[m, k, t].exp()
            loss[m], so_far = loss[m] - (now - so_far) * traj.reward[m, k, t], now
    torch.testing.assert_close(policy_surrogate(moved, traj.logp, traj.reward, traj.mask, 'dice'), loss / traj.mask.sum((1, 2)))


@pytest.mark.parametrize('unit', [1e-6, 1., 1e6, 1e12])
def test_rounding_is_no_advantage_in_any_unit(unit):
    g = torch.Generator().manual_seed(0)
    obs, reward, on = torch.randn(1, 1, 2, 1, generator=g), torch.randn(1, 1, 2, generator=g) * unit, torch.ones(1, 1, 2).bool()
    traj = Trajectories(obs, reward, reward, ~on, ~on, on, on, on, reward, reward)  # a line in t goes through both returns
    assert not advantages(traj).any()


@pytest.mark.parametrize('dtype', ['f4', 'i4'])
def test_a_dimension_without_room_takes_any_action(dtype):
    policy = policy_in(spaces.Box(np.array([2, -1, 0], dtype), np.array([2, 1, 5], dtype), dtype=np.dtype(dtype)))
    for action in ([np.inf] * 3, [-np.inf] * 3, [7.] * 3): assert policy.action_space.contains(policy.to_env(np.array([action], np.float32))[0])


@pytest.mark.parametrize('core', ['gru', 'h3'])
def test_a_policy_asks_of_its_core_what_the_core_needs(core):
    assert policy_in(spaces.Discrete(2)).config.core == 'ssm'
    SSMMetaPolicy(spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2), PolicyConfig(8, 5, core=core))  # odd: no pairs here
    with pytest.raises(ValueError, match='has no effect'): PolicyConfig(8, 4, init='legs', core=core)
    with pytest.raises(ValueError, match='hidden_dim=True'): PolicyConfig(True, 4, core=core)
