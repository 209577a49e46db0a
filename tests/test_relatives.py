"What the notebook on the relatives of MAML promises, in the cases that would lengthen its story."
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_maml import K, M, T, assert_same, fail_in_third_epoch, pick, poison_query, poison_support, tasks_of, trajectories

from ssm_metarl.envs import EnvConfig
from ssm_metarl.meta_learner import LEARNERS, MetaConfig, mean_steps
from ssm_metarl.maml import MetaMAML
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy, action_log_prob, entropy
from ssm_metarl.relatives import ANIL, MetaSGD, Reptile
from ssm_metarl.rollout import policy_inputs

NAMES = 'maml', 'reptile', 'anil', 'meta-sgd'
RELATIVES = [('anil', dict()), ('anil', dict(head='mixer.* action.*', inner_steps=2)), ('anil', dict(first_order=True)), ('reptile', dict(inner_steps=2)), ('reptile', dict(inner_steps=3, surrogate='logprob')),
             ('meta-sgd', dict()), ('meta-sgd', dict(inner_steps=2)), ('meta-sgd', dict(inner_steps=2, first_order=True))]
PLACES = [dict(), dict(name='MamlTestCorridor-v0'), dict(name='MamlTestCorridor-v0', history=True)]


def make(cls, name='MetaGymToy-v0', history=False, seed=0, **kw):
    env = EnvConfig(name, num_envs=K, time_limit=T, seed=seed)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(4, 2, history=history), seed).double()
    return LEARNERS[cls](policy, env, MetaConfig(tasks_per_batch=M, **dict(inner_lr=.3) | kw))


def shake(learner, size=.02, seed=1):
    "Away from the policy that collected, and from step sizes that are all equal."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for v in learner.learned.values(): v += size * torch.randn(v.shape, generator=g, dtype=v.dtype)


def gradient(loss, tensors):
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    return torch.cat([torch.zeros_like(v).flatten() if g is None else g.flatten() for g, v in zip(grads, tensors)])


def one_task(learner, support, query, advantage):
    "The loss of one task, from the equations: nothing stacked, nothing of the library's learning code."
    config, theta, names = learner.config, dict(learner.params), list(learner.params)
    if isinstance(learner, ANIL): names = [k for k in theta if any(k.startswith(group.rstrip('*')) for group in config.head.split())]
    rate = {k: config.inner_lr * learner.learned[f'log_step.{k}'].exp() if f'log_step.{k}' in learner.learned else config.inner_lr for k in names}
    logp = lambda params, t: (out := learner.policy.functional(params, policy_inputs(learner.policy, t)[0]), action_log_prob(out, t.action[0]))
    phi = theta
    for traj, A in support:
        now = logp(phi, traj)[1]
        gain = now if config.surrogate == 'logprob' else (now - traj.logp[0]).exp()
        used = [k for k in names if not k.startswith('value.')]
        slopes = torch.autograd.grad(-(gain * A[0])[traj.mask[0]].mean(), [phi[k] for k in used], create_graph=not (config.first_order or isinstance(learner, Reptile)))
        phi = phi | {k: phi[k] - rate[k] * g for k, g in zip(used, slopes)}
    if isinstance(learner, Reptile): return sum(((theta[k] - phi[k].detach())**2).sum() for k in theta) / (2 * config.inner_lr)
    out, now = logp(phi, query)
    ratio = (now - query.logp[0]).exp()
    gain = torch.minimum(ratio * advantage[0], ratio.clamp(.8, 1.2) * advantage[0]) + config.entropy_coef * entropy(out)
    return -gain[query.mask[0]].mean()


@pytest.mark.parametrize('place', PLACES, ids=str)
@pytest.mark.parametrize('cls, case', RELATIVES, ids=str)
def test_the_stack_is_the_loop_over_tasks(cls, case, place):
    "Losses and meta-gradients, those of learned step sizes included, in float64."
    learner = make(cls, **place, **case, **{} if cls == 'reptile' else dict(entropy_coef=.01))
    support, query, advantage = trajectories(learner)
    if 'name' in place: assert not query.mask.all()
    shake(learner)
    alone = [one_task(learner, [(pick(t, m), a[m:m + 1]) for t, a in support], pick(query, m), advantage[m:m + 1]) for m in range(M)]
    loss, alone = learner.outer_loss(support, query, advantage)[0], torch.stack(alone)
    if cls != 'reptile': alone = M * alone * query.mask.sum((1, 2)) / query.mask.sum().double()  # by their steps; a distance has none
    torch.testing.assert_close(loss, alone, atol=1e-10, rtol=0)
    learned = [v for k, v in learner.learned.items() if not k.startswith('value.')]
    torch.testing.assert_close(gradient(loss.mean(), learned), gradient(alone.mean(), learned), atol=1e-10, rtol=0)


@pytest.mark.parametrize('place', PLACES, ids=str)
@pytest.mark.parametrize('cls, case', [x for x in RELATIVES if x[0] != 'reptile' and 'first_order' not in x[1]], ids=str)
def test_the_meta_gradient_is_the_slope_of_the_outer_loss(cls, case, place):
    learner, g = make(cls, **place, **case), torch.Generator().manual_seed(2)
    data = trajectories(learner)
    shake(learner)
    learned = list(learner.learned.values())
    exact = gradient(learner.outer_loss(*data)[0].mean(), learned)
    for _ in range(3):
        direction = [torch.randn(v.shape, generator=g, dtype=v.dtype) for v in learned]
        def move(length):
            for v, d in zip(learned, direction): v.data += length * d
            return learner.outer_loss(*data)[0].mean().item()
        slope = (move(1e-6) - move(-2e-6)) / 2e-6
        move(1e-6)
        assert abs(slope - (exact @ torch.cat([d.flatten() for d in direction])).item()) < 1e-6 * max(1, abs(slope))


def test_first_order_keeps_the_slope_along_the_step_sizes():
    "After one step it is exact, also without second derivatives."
    slopes = []
    for first_order in (False, True):
        learner = make('meta-sgd', first_order=first_order)
        data = trajectories(make('meta-sgd'))
        shake(learner)
        slopes.append(gradient(learner.outer_loss(*data)[0].mean(), [v for k, v in learner.learned.items() if k.startswith('log_step.')]))
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=0)


@pytest.mark.parametrize('kw', [dict(), dict(inner_steps=2, first_order=True), dict(inner_kl=.5, tasks_per_chunk=2), dict(surrogate='dice', outer_lr_decay=True), dict(history=True, name='MamlTestCorridor-v0')], ids=str)
def test_anil_of_all_names_and_frozen_step_sizes_are_maml(kw):
    maml, anil, meta_sgd = make('maml', **kw), make('anil', head='*', **kw), make('meta-sgd', **kw)
    for k, v in meta_sgd.learned.items(): v.requires_grad_(not k.startswith('log_step.'))
    for step in range(2):
        metrics = [learner.outer_step(tasks_of(learner, step)) for learner in (maml, anil, meta_sgd)]
        assert metrics[0] == metrics[1] == metrics[2]
    assert_same(maml.state_dict(), anil.state_dict())
    assert_same(maml.state_dict(), {k: v for k, v in meta_sgd.state_dict().items() if 'log_step.' not in k})


def test_anil_takes_a_step_in_a_trust_region_too():
    anil, maml = make('anil', outer='trpo', head='*'), make('maml', outer='trpo')
    assert anil.outer_step(tasks_of(anil)) == maml.outer_step(tasks_of(maml))
    metrics = make('anil', outer='trpo').outer_step(tasks_of(anil))
    assert 0 < metrics['kl'] <= .01 and metrics['loss'] < 0


@pytest.mark.parametrize('cls, case', RELATIVES, ids=str)
def test_chunks_change_nothing(cls, case):
    whole = make(cls, **case, inner_kl=.1)
    metrics = whole.outer_step(tasks_of(whole))
    for size in (1, 2, 7):
        parts = make(cls, **case, inner_kl=.1, tasks_per_chunk=size)
        assert parts.outer_step(tasks_of(parts)) == pytest.approx(metrics, rel=1e-9, abs=1e-9)
        for k in whole.learned: torch.testing.assert_close(parts.learned[k], whole.learned[k], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('cls, case', RELATIVES, ids=str)
def test_resume_is_exact_and_a_state_must_fit(cls, case):
    learner, other = make(cls, **case), make(cls, seed=5, **case)
    other.env = learner.env  # begun from another seed, it goes on from the save
    for step in range(2): learner.outer_step(tasks_of(learner, step))
    shake(other)
    other.load_state_dict(saved := learner.state_dict())
    assert_same(saved, other.state_dict())
    assert learner.outer_step(tasks_of(learner, 2)) == other.outer_step(tasks_of(other, 2))
    assert_same(learner.state_dict(), other.state_dict())
    assert ('params/log_step.log_std' in saved) == (cls == 'meta-sgd')
    if cls == 'meta-sgd':
        assert 'optimizer/log_step.log_std/exp_avg' in saved and not np.array_equal(saved['params/log_step.log_std'], learner.state_dict()['params/log_step.log_std'])
        with pytest.raises(ValueError, match='log_step.action.bias has shape None in this state'): make('meta-sgd').load_state_dict(make('maml').state_dict())
        with pytest.raises(ValueError, match=r"log_step.* has shape \(2,\) in this state, and this policy needs None"): make('maml').load_state_dict({k: v for k, v in saved.items() if 'log_step.' not in k or 'log_std' in k})


@pytest.mark.parametrize('accident', [poison_support, poison_query, fail_in_third_epoch(KeyboardInterrupt)])
@pytest.mark.parametrize('cls', ['anil', 'meta-sgd'])
def test_an_outer_step_happens_completely_or_not_at_all(cls, accident, monkeypatch):
    learner, twin = make(cls), make(cls)
    for x in (learner, twin): x.outer_step(tasks_of(x))
    before = learner.state_dict()
    with monkeypatch.context() as m:
        error, message = accident(learner, m)
        with pytest.raises(error, match=message): learner.outer_step(tasks_of(learner, 1))
    assert_same(before, learner.state_dict())
    assert learner.outer_step(tasks_of(learner, 1)) == twin.outer_step(tasks_of(twin, 1))
    assert_same(learner.state_dict(), twin.state_dict())


@pytest.mark.parametrize('chunk', [0, 1])
def test_reptile_names_the_task_that_goes_astray_and_changes_nothing(chunk, monkeypatch):
    learner = make('reptile', inner_steps=2, tasks_per_chunk=chunk)
    learner.outer_step(tasks_of(learner))
    before, collect_all = learner.state_dict(), learner.collect_all
    def poisoned(tasks):
        (first, (second, advantage), query), adapted = collect_all(tasks)
        bad = torch.arange(M)[:, None, None] == 1
        return [first, (second, torch.where(bad, torch.nan, advantage)), query], {k: v + torch.where(bad.view(-1, *[1] * (v.dim() - 1)), torch.nan, 0.) for k, v in adapted.items()}
    monkeypatch.setattr(learner, 'collect_all', poisoned)
    with pytest.raises(FloatingPointError, match=r'losses of tasks \[1\] are not finite'): learner.outer_step(tasks_of(learner, 1))
    assert_same(before, learner.state_dict())


def test_a_step_size_that_is_not_finite_is_refused():
    learner = make('meta-sgd')
    with torch.no_grad(): learner.learned['log_step.action.bias'].fill_(torch.inf)
    before = learner.state_dict()
    with pytest.raises(FloatingPointError, match=r'(adapted parameters|action probabilities) of tasks \[0, 1, 2\]'): learner.outer_step(tasks_of(learner))
    assert_same(before, learner.state_dict())


def test_step_sizes_stay_positive_and_have_a_rate_of_their_own():
    "However large the rate is; and outer_lr decays for both."
    learner = make('meta-sgd', step_size_lr=2., outer_lr=.01, outer_lr_decay=True, outer_steps=4)
    for step in range(3): learner.outer_step(tasks_of(learner, step))
    sizes = torch.cat([v.detach().flatten() for v in learner.inner_lr.values()])
    assert (sizes > 0).all() and sizes.max() > 3 * .3 and sizes.min() < .3 / 3
    assert [group['lr'] for group in learner.optimizer.param_groups] == pytest.approx([.005, 1.])
    still, quick = make('meta-sgd', outer_epochs=1, step_size_lr=1e-4), make('meta-sgd', outer_epochs=1, step_size_lr=.1)
    for x in (still, quick): x.outer_step(tasks_of(x))
    for k, v in still.params.items(): assert torch.equal(v, quick.params[k])  # the rate is that of the step sizes alone
    change = torch.cat([v.detach().flatten() for k, v in quick.learned.items() if k.startswith('log_step.')])
    torch.testing.assert_close(change.abs().median(), torch.tensor(.1, dtype=change.dtype), rtol=.01, atol=0)  # the first step of Adam


def test_reptile_measures_the_query_in_units_of_the_query():
    "A chunk is told the units of all sets; the whole batch finds them by itself."
    learner = make('reptile', name='MamlTestCorridor-v0', inner_steps=2)
    support, query, advantage = trajectories(learner)
    units = torch.stack([mean_steps(t) for t in (*(t for t, _ in support), query)])
    assert units[0] != units[-1]
    for a, b in zip(learner.outer_loss(support, query, advantage), learner.outer_loss(support, query, advantage, steps=units)): torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_reptile_finds_the_start_that_is_near_to_all_ends():
    "Where there is nothing to learn from, the start stays; and its config is the caller's."
    learner = make('reptile', inner_steps=2)
    (support, query, advantage), start = trajectories(learner), {k: v.detach().clone() for k, v in learner.params.items()}
    loss, _, kl, _ = learner.outer_loss([(t, torch.zeros_like(a)) for t, a in support], query, advantage)
    assert torch.equal(loss, torch.zeros(M, dtype=loss.dtype)) and not gradient(loss.mean(), [v for k, v in learner.params.items() if not k.startswith('value.')]).any()
    assert learner.config == MetaConfig(tasks_per_batch=M, inner_lr=.3, inner_steps=2)
    learner.outer_step(tasks_of(learner))
    assert all((learner.params[k] != v).any() for k, v in start.items())  # the value head learns from the query


def test_bad_settings_are_refused():
    for cls, kw, message in (('reptile', dict(), 'inner_steps=1: Reptile with one inner step is joint training; take 2 or more'),
                             ('reptile', dict(inner_steps=2, clip=.1, outer='trpo'), "Reptile does not use outer='trpo', clip=0.1 with these settings; leave it at outer='ppo', clip=0.2"),
                             ('anil', dict(head=''), "head='': it names no parameter"),
                             ('anil', dict(head='action.* mixr.*'), 'mixr.[*] names no parameter'),
                             ('anil', dict(head='value.*'), 'names no parameter'),
                             ('anil', dict(head='log_std', name='MamlTestCorridor-v0'), "head='log_std': it names no parameter"),
                             ('meta-sgd', dict(outer='trpo'), "MetaSGD does not use outer='trpo' with these settings")):
        with pytest.raises(ValueError, match=message): make(cls, **kw)
    policy = make('maml').policy
    assert Reptile(policy, make('maml').env).config.inner_steps == 2  # its default config is one that it can work with
    assert all(issubclass(LEARNERS[name], MetaMAML) for name in NAMES) and LEARNERS['meta-sgd'] is MetaSGD


def test_training_does_not_read_or_write_the_global_generator():
    for cls in NAMES:
        results = []
        for seed in (0, 1):
            torch.manual_seed(seed), np.random.seed(seed)
            learner = make(cls, inner_steps=2)
            learner.outer_step(tasks_of(learner))
            assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())
            results.append(learner.state_dict())
        assert_same(*results)


@pytest.mark.parametrize('cls, kw', [('anil', dict()), ('reptile', dict(inner_steps=2)), ('meta-sgd', dict())])
def test_the_traced_meta_gradient_is_that_of_autograd(cls, kw):
    plain, traced = make(cls, **kw), make(cls, compile=True, **kw)
    traced.backend = 'eager'
    assert traced.outer_step(tasks_of(traced)) == pytest.approx(plain.outer_step(tasks_of(plain)), rel=1e-9, abs=1e-9)
    a, b = plain.state_dict(), traced.state_dict()
    assert set(a) == set(b)
    for k in a: np.testing.assert_allclose(a[k], b[k], rtol=1e-9, atol=1e-9)
