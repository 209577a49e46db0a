"E-MAML's term against enumeration: all support sets and all query trajectories of a world with two states."
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_maml import M, assert_same, make, tasks_of, trajectories

from ssm_metarl.envs import EnvConfig
from ssm_metarl.inner_loop import gradient_step, stack
from ssm_metarl.meta_learner import MetaConfig, exploration_loss, query_gain
from ssm_metarl.maml import MetaMAML
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy, action_log_prob
from ssm_metarl.rollout import Trajectories, discounted_sum
from ssm_metarl.policy_gradient import policy_surrogate

T, ALPHA = 2, 2.
P = torch.tensor([[[.9, .1], [.3, .7]], [[.6, .4], [.2, .8]]], dtype=torch.float64)  # state, action, next state
R = torch.tensor([[.5, 0.], [0., 2.]], dtype=torch.float64)
CHOICES = torch.cartesian_prod(*[torch.arange(2)] * 3)  # action, next state, action: 8 trajectories
STATE, ACTION = torch.stack([torch.zeros(8, dtype=int), CHOICES[:, 1]], 1), CHOICES[:, [0, 2]]
REWARD = R[STATE, ACTION]
TO_GO = discounted_sum(REWARD, 1.)
CHANCE = P[0, CHOICES[:, 0], CHOICES[:, 1]]  # of the transition


def learner_of(**kw):
    policy = SSMMetaPolicy(spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2), PolicyConfig(4, 2), 3).double()
    return MetaMAML(policy, EnvConfig('MetaTabularMDP-v0', 1, T, options={'states': 2, 'actions': 2, 'horizon': 2}), MetaConfig(inner_lr=ALPHA, gamma=1., **kw))


def some(which, learner, params):
    "These trajectories, [M, K] indices, as the policy would have played them."
    obs, action, reward = torch.nn.functional.one_hot(STATE, 2).double()[which], ACTION[which], REWARD[which]
    on, first = torch.ones_like(reward, dtype=torch.bool), (torch.arange(T) == 0).expand(reward.shape)
    with torch.no_grad(): out = learner.policy.functional(params, obs, reset=first)
    return Trajectories(obs, action, reward, ~on, ~on, on, first, first, action_log_prob(out, action), out['value'])


def log_probs(learner, params):  # of the actions of all eight, [8, T], for one set of parameters
    first = (torch.arange(T) == 0).expand(8, T)
    return action_log_prob(learner.policy.functional(params, torch.nn.functional.one_hot(STATE, 2).double(), reset=first), ACTION)


def probabilities(learner, params): return log_probs(learner, params).sum(-1).exp() * CHANCE
def J(learner, params): return probabilities(learner, params) @ TO_GO[:, 0]
def gradient(x, learner): return torch.cat([torch.zeros_like(v).flatten() if g is None else g.flatten() for g, v in zip(torch.autograd.grad(x, list(learner.params.values()), allow_unused=True), learner.params.values())])


def adapt(learner, indices):  # along the return of these trajectories, held fixed
    logp = log_probs(learner, learner.params)[list(indices)]
    loss = -(TO_GO[list(indices)] * logp).mean()
    names = [k for k in learner.params if not k.startswith('value.')]
    g = torch.autograd.grad(loss, [learner.params[k] for k in names], create_graph=True)
    return learner.params | {k: learner.params[k] - ALPHA * x for k, x in zip(names, g)}


def expected_gradient(learner, K, gain=True):
    "Of the library's outer loss, over all support sets of K trajectories and all query trajectories; and the exact one."
    sets = torch.cartesian_prod(*[torch.arange(8)] * K).view(-1, K)
    p = probabilities(learner, learner.params)
    adapted = [adapt(learner, row.tolist()) for row in sets]
    returns = torch.stack([J(learner, phi) for phi in adapted])
    exact = gradient((p[sets].prod(1) * returns).sum(), learner)
    weight, losses = p[sets].prod(1).detach(), 0
    support = some(sets, learner, learner.params)
    for q in range(8):  # the same query trajectory for all support sets
        phi = {k: torch.stack([x[k].detach() for x in adapted]) for k in adapted[0]}
        query = some(torch.full((len(sets), K), q), learner, phi)  # K times the same: a mean over trajectories
        chance = torch.stack([probabilities(learner, x)[q] for x in adapted]).detach()
        score = query.reward.sum((1, 2)) / K if gain else None
        loss = learner.outer_loss([(support, TO_GO[sets])], query, TO_GO[q].expand(len(sets), K, T), gain=score)[0]
        losses = losses + (weight * chance * loss).sum()
    return -T * gradient(losses, learner), exact


@pytest.mark.parametrize('K', [1, 2])
def test_the_expected_gradient_is_that_of_the_meta_objective(K):
    "The distribution of the support trajectories included."
    ours, exact = expected_gradient(learner_of(surrogate='logprob', exploration_term=True), K)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    without, _ = expected_gradient(learner_of(surrogate='logprob'), K, gain=False)
    assert (without - exact).norm() > .1 * exact.norm()
    twice, _ = expected_gradient(learner_of(), K)  # the ratio has a part of it already
    assert (twice - exact).norm() > .01 * exact.norm()


def test_gain_by_hand():
    learner = make('MamlTestCorridor-v0', history=True)
    _, query, _ = trajectories(learner)
    gain = query_gain(query, .9, 1.)
    from ssm_metarl.policy_gradient import gae, linear_baseline
    returns = discounted_sum(query.reward.masked_fill(~query.mask, 0), .9)
    start, advantage = returns[..., 0].mean(1), gae(query.reward.masked_fill(~query.mask, 0), linear_baseline(query, returns), .9, 1.)
    for m in range(M):
        others = torch.stack([start[i] for i in range(M) if i != m]).mean()
        torch.testing.assert_close(gain[m], (start[m] - others) / advantage[m][query.mask[m]].std(correction=0), rtol=1e-9, atol=1e-9)
    alike = replace(query, reward=-torch.ones_like(query.reward), mask=torch.ones_like(query.mask))
    assert query_gain(alike, .9, 1.).abs().max() < 1e-9 and not query_gain(query.of_tasks(slice(0, 1)), .9, 1.).isnan().any()


@pytest.mark.parametrize('kw', [dict(tasks_per_chunk=2), dict(compile=True), dict(compile=True, tasks_per_chunk=1)], ids=str)
@pytest.mark.parametrize('more', [dict(surrogate='logprob', inner_steps=2), dict(first_order=True, inner_kl=.1)], ids=str)
def test_chunks_and_graphs_have_the_term_too(kw, more):
    common = dict(name='MamlTestCorridor-v0', history=True, exploration_term=True) | more
    whole, other = make(**common), make(**common, **kw)
    other.backend = 'eager'
    assert other.outer_step(tasks_of(other)) == pytest.approx(whole.outer_step(tasks_of(whole)), rel=1e-9, abs=1e-9)
    for k, v in whole.params.items(): torch.testing.assert_close(other.params[k], v, rtol=1e-8, atol=1e-10)
    plain = make(**common | dict(exploration_term=False))
    plain.outer_step(tasks_of(plain))
    assert any((plain.params[k] - v).abs().max() > 1e-4 for k, v in whole.params.items())


def test_a_trust_region_has_the_term_too_and_resume_is_exact():
    learner, other = (make('MamlTestCorridor-v0', outer='trpo', exploration_term=True, surrogate='logprob') for _ in range(2))
    plain = make('MamlTestCorridor-v0', outer='trpo', surrogate='logprob')
    assert learner.outer_step(tasks_of(learner))['grad_norm'] != pytest.approx(plain.outer_step(tasks_of(plain))['grad_norm'], rel=1e-2)
    other.load_state_dict(learner.state_dict())
    assert learner.outer_step(tasks_of(learner, 1)) == other.outer_step(tasks_of(other, 1))
    assert_same(learner.state_dict(), other.state_dict())
