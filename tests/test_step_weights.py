"Outer losses weigh every step of a batch alike, however its trajectories are divided into tasks, trials and chunks."

import pytest
import torch
from test_maml import K, M, gradient, make, tasks_of, trajectories  # registers the corridor, too

from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.meta_learner import MetaConfig
from ssm_metarl.maml import JointTraining
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy, action_log_prob, entropy, kl_divergence
from ssm_metarl.rl2 import RL2
from ssm_metarl.rollout import collect, discounted_sum, policy_inputs

SETTINGS = dict(gamma=.9, outer_epochs=1, max_grad_norm=1e9, entropy_coef=.05, tasks_per_batch=M)


def of_policy(cls, episodes=1, seed=0, **kw):
    env = EnvConfig('MamlTestCorridor-v0', num_envs=K, time_limit=6, episodes_per_trial=episodes, seed=seed)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(4, 2, history=True), seed).double()
    return cls(policy, env, MetaConfig(**SETTINGS | kw))


def grads_of(learner): return torch.cat([torch.zeros_like(v).flatten() if v.grad is None else v.grad.flatten() for v in learner.params.values()]).clone()
def slopes(value, learner): return torch.cat([torch.zeros_like(v).flatten() if g is None else g.flatten() for g, v in zip(torch.autograd.grad(value, list(learner.params.values()), allow_unused=True), learner.params.values())])
def rows(traj, shape): return type(traj)(**{k: v.reshape(*shape, *v.shape[2:]) for k, v in vars(traj).items()})


def played(learner, seed=3):
    "Trials of unequal length, made-up advantages, and a learner that has moved since."
    traj = collect(learner.policy, {k: v.detach() for k, v in learner.params.items()}, sample_tasks(learner.env, M), learner.env)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for v in learner.params.values(): v += .05 * torch.randn(v.shape, generator=g, dtype=v.dtype)
    advantage = torch.randn(traj.reward.shape, generator=g, dtype=traj.reward.dtype)
    assert len(set(traj.mask.sum((1, 2)).tolist())) == M
    return traj, advantage


def by_hand(learner, traj, advantage, target, unit):
    "Sum over all steps of all trials, divided by their number: loss, error of the value head, divergence; nothing of the library's learning code."
    out = learner.policy.functional(learner.params, policy_inputs(learner.policy, traj), reset=traj.memory_reset)
    logp, bonus, total = action_log_prob(out, traj.action), entropy(out), torch.zeros(3, dtype=torch.float64)
    for m, k, t in traj.mask.nonzero().tolist():
        ratio, A = (logp[m, k, t] - traj.logp[m, k, t]).exp(), advantage[m, k, t]
        gain = torch.minimum(ratio * A, ratio.clamp(.8, 1.2) * A) + learner.config.entropy_coef * bonus[m, k, t]
        total = total + torch.stack([-gain, (out['value'][m, k, t] - target[m, k, t])**2 / unit, traj.logp[m, k, t] - logp[m, k, t]])
    return total / traj.mask.sum()


@pytest.mark.parametrize('cls', [JointTraining, RL2])
@pytest.mark.parametrize('chunk', [0, 1, 2])
def test_trials_of_unequal_length_weigh_by_their_steps(cls, chunk):
    learner = of_policy(cls, episodes=2, tasks_per_chunk=chunk)
    traj, advantage = played(learner)
    target = torch.randn(traj.reward.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    loss, error, kl = by_hand(learner, traj, advantage, target, 2.)
    expected = slopes(loss + error, learner)
    learner.update = lambda: 0.  # the gradient is what we look at
    last, _ = learner.epoch(traj, advantage, target, 2.)
    losses, divergences = last['loss'], last['kl']
    torch.testing.assert_close(grads_of(learner), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses.mean(), loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(divergences.mean(), kl.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('chunk', [0, 1, 3])
def test_one_task_of_twelve_trajectories_or_twelve_tasks_of_one(chunk):
    "Given the same advantages, joint training has the same gradient."
    found = []
    for shape in ((M, K), (M * K, 1), (1, M * K)):
        learner = of_policy(JointTraining, tasks_per_chunk=chunk)
        traj, advantage = played(learner)
        returns = discounted_sum(traj.reward.masked_fill(~traj.mask, 0), .9)
        learner.update = lambda: 0.
        learner.epoch(rows(traj, shape), advantage.reshape(*shape, -1), returns.reshape(*shape, -1), 1.)
        found.append(grads_of(learner))
    for other in found[1:]: torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


def outer_by_hand(learner, support, query, advantage):
    "MAML's outer loss and ProMP's penalty: sums over all steps, divided by their number."
    phi, penalty = [{k: v for k, v in learner.params.items()} for _ in range(M)], 0
    act = lambda params, t, m: learner.policy.functional(params, policy_inputs(learner.policy, t)[m], reset=t.memory_reset[m])
    for traj, A in support:
        for m in range(M):
            real = traj.mask[m]
            change = action_log_prob(act(phi[m], traj, m), traj.action[m]) - traj.logp[m]
            penalty = penalty + (change.exp() - 1 - change)[real].sum() / traj.mask.sum() / len(support)
            used = [k for k in phi[m] if not k.startswith('value.')]
            g = torch.autograd.grad(-(change.exp() * A[m])[real].mean(), [phi[m][k] for k in used], create_graph=True)  # the task's own mean
            phi[m] = phi[m] | {k: phi[m][k] - learner.config.inner_lr * x for k, x in zip(used, g)}
    loss = kl = 0
    for m in range(M):
        out, real = act(phi[m], query, m), query.mask[m]
        change = action_log_prob(out, query.action[m]) - query.logp[m]
        gain = torch.minimum(change.exp() * advantage[m], change.exp().clamp(.8, 1.2) * advantage[m]) + learner.config.entropy_coef * entropy(out)
        loss, kl = loss - gain[real].sum() / query.mask.sum(), kl - change[real].sum().detach() / query.mask.sum()
    return loss + learner.config.inner_kl * penalty, kl


@pytest.mark.parametrize('kw', [dict(), dict(tasks_per_chunk=2), dict(tasks_per_chunk=1, inner_steps=2), dict(compile=True, tasks_per_chunk=2), dict(compile=True)], ids=str)
def test_maml_weighs_steps_alike_stacked_in_chunks_and_compiled(kw):
    learner = make('MamlTestCorridor-v0', history=True, entropy_coef=.05, inner_kl=.7, max_grad_norm=1e9, **kw)
    learner.backend = 'eager'
    data = trajectories(learner)
    assert len(set(data[1].mask.sum((1, 2)).tolist())) == M
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for v in learner.params.values(): v += .05 * torch.randn(v.shape, generator=g, dtype=v.dtype)
    loss, kl = outer_by_hand(learner, *data)
    expected = slopes(loss, learner)
    learner.update = lambda: 0.
    last, _ = learner.outer_epoch(*data)
    losses, divergences = last['loss'], last['kl']
    policy = torch.cat([torch.full((v.numel(),), not k.startswith('value.')) for k, v in learner.params.items()])
    torch.testing.assert_close(grads_of(learner)[policy], expected[policy], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(losses.mean(), loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(divergences.mean(), kl, rtol=1e-10, atol=1e-12)


def test_a_trust_region_weighs_steps_alike():
    learner = make('MamlTestCorridor-v0', outer='trpo', entropy_coef=.05)
    support, query, advantage = trajectories(learner)
    def judge():
        phi = learner.adapted(learner.params, support)[0]
        return {k: v.detach() for k, v in learner.policy.functional(phi, policy_inputs(learner.policy, query), reset=query.memory_reset).items() if k != 'state'}
    before = judge()
    last, _ = learner.trust_region_step(support, query, advantage)
    loss, kl = last['loss'], last['kl']
    out = judge()
    gain = (action_log_prob(out, query.action) - query.logp).exp() * advantage + .05 * entropy(out)
    torch.testing.assert_close(loss.mean(), -gain[query.mask].mean(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kl.mean(), kl_divergence(before, out)[query.mask].mean(), rtol=1e-9, atol=1e-12)


def test_emaml_weighs_a_support_trajectory_like_one_of_the_query():
    "E-MAML's term of a task is -K gain times its support steps, divided by the mean number of *query* steps, as the outer loss is."
    learner = make('MamlTestCorridor-v0', history=True, surrogate='logprob', exploration_term=True)
    support, query, advantage = trajectories(learner)
    assert len({support[0][0].num_steps, query.num_steps}) == 2  # adaptation changes how long episodes are
    gain = torch.linspace(-1, 1, M, dtype=torch.float64)
    extra = learner.outer_loss(support, query, advantage, gain=gain)[0] - learner.outer_loss(support, query, advantage)[0]
    steps = support[0][0].mask.sum((1, 2))
    torch.testing.assert_close(extra, -K * gain * steps / (query.num_steps / M), rtol=1e-9, atol=1e-12)
