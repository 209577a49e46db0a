"Adaptation of a policy: what the callback sees, what it may break, which paths are kept, and the line search against one by hand."
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.evaluation import evaluation_trajectories
from ssm_metarl.inner_loop import stack
from ssm_metarl.meta_learner import MetaConfig, inner_step
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.policy_adaptation import AdaptingPolicies, adapt_policy, online_advantages, piece_weight, reward_fell
from ssm_metarl.policy_steps import AdaptConfig, choose_trajectories, did_worse, next_share
from ssm_metarl.rollout import collect, policy_inputs

ENV = EnvConfig(num_envs=3, time_limit=8, seed=42)
META = MetaConfig(inner_lr=.05)
TASKS = sample_tasks(ENV, 4)


def make_policy():
    return SSMMetaPolicy(ENV.family.observation_space, ENV.family.action_space, PolicyConfig(8, 4), 0)


def adapt(policy, config=AdaptConfig(steps=3, lr=.05), **kw):
    return adapt_policy(policy, policy.get_params(), TASKS, ENV, META, config, **kw)


def same_trajectories(a, b):
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def same_results(a, b):
    arrays = all(np.array_equal(getattr(a, x), getattr(b, x)) for x in ('returns_by_step', 'drift', 'kept'))
    params = all(torch.equal(a.params[k], v) for k, v in b.params.items())
    return arrays and params and same_trajectories(a.before, b.before) and same_trajectories(a.after, b.after)


# --- the callback

def test_the_callback_is_called_before_any_step_and_after_each():
    policy, seen = make_policy(), []
    result = adapt(policy, on_step=lambda k, info: seen.append((k, info)))
    assert [k for k, _ in seen] == [0, 1, 2, 3]
    for k, info in seen:
        assert info.returns_by_step.shape == (k + 1, 4) and info.kept.shape == (k, 4) and info.kept.dtype == bool
        np.testing.assert_array_equal(info.returns_by_step, result.returns_by_step[:k + 1])
        np.testing.assert_array_equal(info.drift, result.drift[:k + 1])
        np.testing.assert_array_equal(info.kept, result.kept[:k])
        np.testing.assert_array_equal(info.after.returns[:, 0], result.returns_by_step[k])
        assert same_trajectories(info.before, result.before)
        assert info.summary()['returns_by_step'] == result.summary()['returns_by_step'][:k + 1]
    assert same_results(seen[-1][1], result)


def test_the_callback_changes_nothing():
    policy = make_policy()
    quiet = adapt(policy)

    def spoil(k, info):  # arrays and parameters are the callback's own
        for x in (info.returns_by_step, info.drift, info.kept): x[...] = 0
        for v in info.params.values(): v.zero_()
        if info.paths: info.paths.clear()
    assert same_results(adapt(policy, on_step=spoil), quiet)
    assert same_results(adapt(policy, on_step=spoil, keep_paths=True), quiet)


def test_parameters_that_the_callback_sees_play_the_episode_that_it_sees():
    policy, seen = make_policy(), []
    adapt(policy, on_step=lambda k, info: seen.append(info))
    assert any(not torch.equal(seen[0].params[k], v) for k, v in seen[-1].params.items())
    for info in seen:
        assert same_trajectories(evaluation_trajectories(policy, info.params, TASKS, ENV), info.after)


def test_the_callback_sees_no_online_episode():
    policy, calls = make_policy(), []
    config = AdaptConfig(steps=1, lr=.05, online=True, online_interval=4)
    result = adapt(policy, config, on_step=lambda k, info: calls.append(info.after), keep_paths=True)
    assert len(calls) == len(result.paths) == 2
    assert same_trajectories(result.paths[1], calls[1]) and not same_trajectories(result.after, calls[1])


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize('when', [0, 2])
def test_a_callback_that_raises_leaves_nothing_half_done(error, when, capsys):
    policy, reached = make_policy(), []
    params = policy.get_params()
    before = {k: v.clone() for k, v in params.items()}
    flags = [p.requires_grad for p in policy.parameters()]

    def stop(k, info):
        reached.append(info)
        if k == when: raise error
    with pytest.raises(error): adapt_policy(policy, params, TASKS, ENV, META, AdaptConfig(steps=3, lr=.05), progress=True, on_step=stop)
    assert len(reached) == when + 1
    assert all(torch.equal(params[k], v) for k, v in before.items())
    assert all(torch.equal(policy.get_params()[k], v) for k, v in before.items())
    assert [p.requires_grad for p in policy.parameters()] == flags and torch.is_grad_enabled()
    assert all(p.grad is None for p in policy.parameters())
    assert not sys.modules['tqdm'].tqdm._instances  # the bar is closed
    whole = adapt(policy)  # as if nothing had happened
    np.testing.assert_array_equal(reached[-1].returns_by_step, whole.returns_by_step[:when + 1])
    assert same_trajectories(evaluation_trajectories(policy, reached[-1].params, TASKS, ENV), reached[-1].after)


# --- paths

def test_paths_are_kept_only_if_asked():
    policy, seen = make_policy(), []
    assert adapt(policy).paths is None
    result = adapt(policy, keep_paths=True, on_step=lambda k, info: seen.append(info.paths))
    assert len(result.paths) == 4 and [len(paths) for paths in seen] == [1, 2, 3, 4]
    for path, returns in zip(result.paths, result.returns_by_step): np.testing.assert_array_equal(path.returns[:, 0], returns)
    assert same_trajectories(result.paths[0], result.before) and same_trajectories(result.paths[-1], result.after)
    assert len(adapt(policy, AdaptConfig(steps=0), keep_paths=True).paths) == 1


# --- the line search

def test_the_search_equals_one_by_hand():
    policy, M = make_policy(), len(TASKS)
    config = AdaptConfig(steps=6, lr=.8, later_scale=.5, max_grad_norm=1e6, trust_radius=1e6)
    result = adapt(policy, config)
    assert result.kept.any() and not result.kept.all()  # both branches are walked
    for m in range(M):  # one task after the other, without an adapter
        def play(params, k, m=m): return collect(policy, params, TASKS[m:m + 1], ENV, 'support', (k,), start=m)
        phi = stack(policy.get_params(), 1)
        support, share, started = play(phi, 0), 1., False
        for k in range(config.steps):
            theta = {n: v.clone().requires_grad_() for n, v in phi.items()}
            new = {n: v.detach() for n, v in inner_step(policy, theta, support, META, lr=config.lr * share).items()}
            fresh = play(new, k + 1)
            old, now = (x.returns[0].double().numpy() for x in (support, fresh))
            error = np.sqrt(old.var(ddof=1) / len(old) + now.var(ddof=1) / len(now))
            kept = now.mean() >= old.mean() - .5 * error
            assert kept == result.kept[k, m]
            if kept: phi, support = new, fresh
            if not kept: share = share / 2
            elif not started: share, started = share * config.later_scale, True
        for n, v in phi.items(): torch.testing.assert_close(result.params[n][m], v[0], atol=1e-4, rtol=1e-3)


def test_the_next_share():
    share, fell = torch.tensor([1., 1., .5, .5]), torch.tensor([True, False, True, False])
    started = torch.tensor([False, False, True, True])
    share, started = next_share(share, fell, started, .1)
    np.testing.assert_allclose(share, [.5, .1, .25, .5])
    assert started.tolist() == [False, True, True, True]


def test_without_rollback_every_step_is_kept():
    policy = make_policy()
    wild = adapt(policy, AdaptConfig(steps=3, lr=5., rollback=False))
    assert wild.kept.all() and adapt(policy, AdaptConfig(steps=3, lr=5.)).kept.mean() < 1


def test_a_step_that_is_taken_back_leaves_no_trace():
    result = adapt(make_policy(), AdaptConfig(steps=4, lr=1e3, max_grad_norm=1e6), keep_paths=True)
    back = ~result.kept
    assert back.any() and np.isfinite(result.returns_by_step).all()
    np.testing.assert_array_equal(result.drift[1:][back], result.drift[:-1][back])
    for k, m in zip(*back.nonzero()): assert torch.equal(result.paths[k].obs[m], result.paths[k + 1].obs[m])


def test_support_of_a_task_that_went_back_is_the_one_before():
    policy = make_policy()
    a, b = (collect(policy, policy.get_params(), TASKS, ENV, key=(i,)) for i in range(2))
    which = torch.tensor([True, False, True, False])
    mixed = choose_trajectories(which, a, b)
    for f in fields(a):
        for m in range(4): assert torch.equal(getattr(mixed, f.name)[m], getattr(a if which[m] else b, f.name)[m])


def test_as_many_support_trajectories_as_asked():
    policy = make_policy()
    def shape(**kw): return AdaptingPolicies(policy, policy.get_params(), TASKS, ENV, META, AdaptConfig(**kw)).collect(0).reward.shape
    assert shape() == (4, 3, 8) and shape(trajectories=5) == (4, 5, 8)


def test_only_tasks_that_fell_go_back():
    policy = make_policy()
    policies = AdaptingPolicies(policy, policy.get_params(), TASKS, ENV, META, AdaptConfig(tolerance=0.))
    support = policies.collect(0)
    policies.step(support, torch.ones(4))
    drift = policies.adapter.drift().tolist()
    assert min(drift) > 0
    change = torch.tensor([1., -1., 0., -.01])  # of the return
    fresh = SimpleNamespace(returns=support.returns + change[:, None])
    assert policies.take_back(support, fresh).tolist() == [False, True, False, True]
    assert policies.adapter.drift().tolist() == [drift[0], 0., drift[2], 0.]


# --- online

def test_online_advantages_by_a_loop():
    policy, gamma, lam = make_policy(), .9, .7
    traj = collect(policy, policy.get_params(), TASKS[:2], replace(ENV, num_envs=1))
    new = torch.zeros_like(traj.mask)
    new[..., 2:-1] = True
    found = online_advantages(traj, new, replace(META, gamma=gamma, gae_lambda=lam))
    for m in range(2):
        r, v = (x[m, 0].double().numpy() for x in (traj.reward, traj.value))
        delta, raw = r[:-1] + gamma * v[1:] - v[:-1], []
        for t in range(2, 7): raw.append(sum((gamma * lam)**i * delta[t + i] for i in range(7 - t)))
        np.testing.assert_allclose(found[m, 0, 2:7], (raw - np.mean(raw)) / np.std(raw), atol=1e-4)
    assert not found[~new].any()


def spy_on_scales(monkeypatch):  # -> list, to which each step of an adapter adds its scales
    from ssm_metarl import adapter
    scales, old = [], adapter.Adapter.adapt

    def spy(self, *args, scale=None, **kw):
        scales.append(scale.tolist())
        return old(self, *args, scale=scale, **kw)
    monkeypatch.setattr(adapter.Adapter, 'adapt', spy)
    return scales


@pytest.mark.parametrize('largest', [.25, .6, 1.])
def test_an_online_update_is_the_share_of_its_piece_and_halved_where_it_hurt(monkeypatch, largest):
    scales, fallen = spy_on_scales(monkeypatch), []
    result = adapt(make_policy(), AdaptConfig(steps=0, online=True, online_interval=2, online_scale=largest, lr=.05))
    reward, size = result.after.reward[:, 0].double(), np.ones(4)
    for k, found in enumerate(scales, 1):  # pieces of 2 steps, of 2 k so far
        if k > 1:
            now, before = (reward[:, 2 * j - 2:2 * j].mean(1) for j in (k, k - 1))
            fallen.append((now < before).numpy())
            size = np.where(fallen[-1], size / 2, 1.5 * size)
        size = np.minimum(size, min(largest, 1 / k))
        np.testing.assert_allclose(found, size, rtol=1e-6)
    assert len(scales) == 3 and 0 < np.mean(fallen) < 1


def test_what_a_search_has_seen_makes_online_updates_short(monkeypatch):
    scales, search = spy_on_scales(monkeypatch), 3 * 3 * 8  # two steps need three batches of 3 trajectories of 8 steps
    config = AdaptConfig(steps=2, online=True, online_interval=4, online_scale=1., lr=.05)
    kept = adapt(make_policy(), config).kept
    share = .5**(~kept).sum(0)
    np.testing.assert_allclose(scales[-1], share * 4 / (search + 4), rtol=1e-6)
    scales.clear()
    adapt(make_policy(), AdaptConfig(steps=0, gate=True, online=True, online_interval=4, online_scale=1., lr=.05))
    assert scales[-1] == [1.] * 4  # the gate looked at a batch, and nothing was learned from it


def test_the_weight_of_a_piece_is_that_in_a_running_average():
    x, mean = np.random.default_rng(0).normal(size=20), 0.
    for k in range(1, 21): mean += piece_weight(10, 10 * k, torch.zeros(1), 1.).item() * (x[k - 1] - mean)
    assert mean == pytest.approx(x.mean(), abs=1e-6)
    assert piece_weight(10, 10, torch.tensor([0., 10., 90.]), .3).tolist() == pytest.approx([.3, .3, .1])


def test_checkpoints_of_an_earlier_default_can_be_read():
    assert AdaptConfig(online_scale=.1) == AdaptConfig() and AdaptConfig(online=True, online_scale=.1).online_scale == .1


def test_an_online_update_that_hurt_is_undone(monkeypatch):
    import ssm_metarl.policy_adaptation as module
    drifts, step = [], module.online_step

    def spy(policy, adapter, *args):
        drifts.append(adapter.drift().tolist())
        step(policy, adapter, *args)
    monkeypatch.setattr(module, 'online_step', spy)
    monkeypatch.setattr(module, 'reward_fell', lambda traj, interval: torch.tensor([True, False, True, False]))
    adapt(make_policy(), AdaptConfig(steps=0, online=True, online_interval=3, lr=.05))
    assert [x > 0 for x in drifts[1]] == [False, True, False, True] and drifts[0] == [0.] * 4
    drifts.clear()
    adapt(make_policy(), AdaptConfig(steps=0, online=True, online_interval=3, lr=.05, rollback=False))
    assert min(drifts[1]) > 0


def test_rewards_that_fell():
    reward = torch.tensor([[1., 1, 2, 2], [2, 2, 1, 1], [1, 1, 1, 1], [5, 5, 0, 0], [0, 9, 1, 9]])[:, None]
    mask = torch.ones_like(reward, dtype=torch.bool)
    mask[3, 0, 2:] = False  # an episode that has ended
    mask[4, 0, 1] = mask[4, 0, 3] = False
    traj = SimpleNamespace(reward=reward, mask=mask)
    assert reward_fell(traj, 2).tolist() == [False, True, False, False, False]


# --- the judge, the bound, the gate

def test_a_judge_that_knows_about_noise():
    old = torch.tensor([[0., 2.], [0., 2.], [0., 2.], [5., 5.], [1., 1.]])
    fresh = torch.tensor([[-.5, 1.5], [-1., 1.], [-2., 0.], [5., 5.], [torch.nan, 1.]])
    # each mean has standard error 1, their difference sqrt 2
    assert did_worse(old, fresh).tolist() == [True, True, True, False, True]
    assert did_worse(old, fresh, .6).tolist() == [False, True, True, False, True]  # .85 is put up with
    assert did_worse(old, fresh, 1.).tolist() == [False, False, True, False, True]
    assert did_worse(old[:, :1], fresh[:, :1], 9.).tolist() == [True, True, True, False, True]  # of one trajectory nothing is known


def test_no_step_passes_the_bound_on_the_divergence(monkeypatch):
    from ssm_metarl import adapter
    reports, old = [], adapter.Adapter.adapt
    monkeypatch.setattr(adapter.Adapter, 'adapt', lambda self, *a, **kw: reports.append(old(self, *a, **kw)))
    free = adapt(make_policy(), AdaptConfig(steps=3, lr=1., rollback=False))
    bound = float(free.kl[1:].min()) / 4
    reports.clear()
    held = adapt(make_policy(), AdaptConfig(steps=3, lr=1., rollback=False, max_kl=bound))
    assert len(reports) == 3 and all((r['kl'] <= bound * (1 + 1e-6)).all() for r in reports)
    assert (held.kl[1:] < free.kl[1:]).all() and (held.kl[-1] > 0).all()


def test_divergence_from_the_start_by_hand():
    policy = make_policy()
    result = adapt(policy, AdaptConfig(steps=2, lr=.05))
    out = [policy.functional(p, policy_inputs(policy, result.after), reset=result.after.memory_reset)
           for p in (stack(policy.get_params(), 4), result.params)]
    start, now = (torch.distributions.Normal(o['mean'].double(), o['log_std'].double().exp()) for o in out)
    kl = torch.distributions.kl_divergence(start, now).sum(-1)
    np.testing.assert_allclose(result.kl[-1], [k[m].mean().item() for k, m in zip(kl, result.after.mask)], rtol=1e-4)
    assert not result.kl[0].any()


def test_the_gate_opens_for_experience_unlike_that_of_training():
    policy = make_policy()
    config = AdaptConfig(steps=1, lr=.05, gate=True)
    windy = replace(ENV, options=dict(bias=.02))
    tasks = sample_tasks(windy, 20, 'held_out')
    storm = [task | dict(bias=np.full(2, .2, np.float32)) for task in tasks]  # ten times the strongest wind of training
    def gated(tasks): return adapt_policy(policy, policy.get_params(), tasks, windy, META, config)
    home = gated(tasks)
    assert home.gated.mean() >= .7  # 5 % of false alarms: P(more than 6 of 20) < 1e-4
    far = gated(storm)
    assert far.gated.mean() <= .3
    for result in (home, far):
        moved = result.drift[-1] > 0
        assert not moved[result.gated].any() and result.summary()['gated'] == result.gated.mean()


def test_what_adaptation_costs():
    policy = make_policy()
    assert adapt(policy, AdaptConfig(steps=3)).env_steps.tolist() == [4 * 3 * 8] * 4  # one batch more than steps, to judge
    assert adapt(policy, AdaptConfig(steps=0)).env_steps.tolist() == [0] * 4
    online = adapt(policy, AdaptConfig(steps=1, online=True, online_interval=4, lr=.05))
    assert online.env_steps.tolist() == [2 * 3 * 8 + 8] * 4
    summary, gain = online.summary(), online.after.returns[:, 0].numpy() - online.returns_by_step[-1]
    assert summary['online_gain'] == pytest.approx(gain.mean()) and summary['online_gain_ci95'][0] <= gain.mean() <= summary['online_gain_ci95'][1]
    assert 'online_gain' not in adapt(policy).summary()


def test_tqdm_is_imported_when_it_is_used():
    import subprocess
    code = "import sys; import ssm_metarl.policy_adaptation as p; print('tqdm' in vars(p))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'False'
