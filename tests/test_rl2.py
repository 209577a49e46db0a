"What the notebook on RL² promises, in the cases that would lengthen its story."
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_maml import assert_same  # registers the corridor, too

from ssm_metarl.bandits import regret
from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.meta_learner import LEARNERS, MetaConfig
from ssm_metarl.maml import MetaMAML, query_losses
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy, action_log_prob

from ssm_metarl.rl2 import RL2, over_batch, trial_targets
from ssm_metarl.rollout import Rollout, Trajectories, collect, policy_inputs

M, K = 3, 4
PAIR = {'arms': 2, 'dependent': True}
PLACES = {'bandit': EnvConfig('MetaBandit-v0', K, 9, options=PAIR), 'episodes of one pull': EnvConfig('MetaBandit-v0', K, 1, options=PAIR, episodes_per_trial=5),
          'MDP': EnvConfig('MetaTabularMDP-v0', K, 3, options={'states': 3, 'actions': 2, 'horizon': 3}, episodes_per_trial=3),
          'episodes that end early': EnvConfig('MamlTestCorridor-v0', K, 6, episodes_per_trial=3), 'continuous actions': EnvConfig('MetaGymToy-v0', K, 4, episodes_per_trial=2)}
places, cores = pytest.mark.parametrize('place', PLACES), pytest.mark.parametrize('core', ['ssm', 'stack', 'h3', 'gru', 'none'])


def make(place='episodes that end early', core='ssm', seed=0, cls=RL2, **kw):
    env = replace(PLACES[place], seed=seed)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(6, 4, core=core, history=True), seed).double()
    return cls(policy, env, MetaConfig(**dict(gamma=1., outer_epochs=1, tasks_per_batch=M) | kw))


def tasks_of(learner, step=0): return sample_tasks(learner.env, M, step=step)
def params_of(learner): return {k: v.detach() for k, v in learner.params.items()}
def play(learner): return collect(learner.policy, params_of(learner), tasks_of(learner), learner.env)
def replay(learner, inputs, reset): return learner.policy.functional(params_of(learner), inputs, reset=reset)
def gradient(loss, learner): return torch.cat([torch.zeros_like(v).flatten() if g is None else g.flatten() for g, v in zip(torch.autograd.grad(loss, list(learner.params.values()), allow_unused=True), learner.params.values())])


@places
@cores
def test_a_trial_replayed_is_the_rollout(core, place):
    "Log-probabilities and values, step by step and whole sequences at once; so ratios begin at 1, and the loss at minus the mean advantage."
    learner = make(place, core)
    traj = play(learner)
    out = replay(learner, policy_inputs(learner.policy, traj), traj.memory_reset)
    torch.testing.assert_close(action_log_prob(out, traj.action)[traj.mask], traj.logp[traj.mask], rtol=0, atol=1e-10)
    torch.testing.assert_close(out['value'][traj.mask], traj.value[traj.mask], rtol=0, atol=1e-10)
    advantage, target, scale = learner.targets(traj)
    loss, error, kl, _ = query_losses(learner.policy, params_of(learner), traj, advantage, learner.config, scale, target)
    real = traj.mask.sum().double() / M  # every step weighs alike
    torch.testing.assert_close(loss, -advantage.sum((1, 2)) / real, rtol=0, atol=1e-10)
    torch.testing.assert_close(error, ((target - traj.value).masked_fill(~traj.mask, 0)**2).sum((1, 2)) / real, rtol=0, atol=1e-10)
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-10)


@places
def test_flags_of_a_trial(place):
    learner = make(place)
    traj, episodes = play(learner), learner.env.episodes_per_trial
    ends = traj.terminated | traj.truncated
    assert (traj.episode_start.sum(-1) == episodes).all() and (ends.sum(-1) == episodes).all() and not (ends & ~traj.mask).any()
    assert torch.equal(traj.episode_start[..., 1:], ends[..., :-1] & traj.mask[..., 1:]) and traj.episode_start[..., 0].all()
    assert traj.memory_reset[..., 0].all() and not traj.memory_reset[..., 1:].any()
    assert torch.equal(traj.mask, ends.flip(-1).cumsum(-1).flip(-1) > 0)  # real until the last episode is over
    assert place != 'episodes that end early' or len(set(traj.mask.sum(-1).flatten().tolist())) > 1


@places
def test_history_is_what_happened_one_step_before(place):
    learner = make(place)
    traj, policy = play(learner), learner.policy
    inputs = policy_inputs(policy, traj)
    assert torch.equal(inputs[..., :policy.obs_dim], traj.obs)
    action, reward, begins = inputs[..., policy.obs_dim:-2], inputs[..., -2], inputs[..., -1]
    before = torch.nn.functional.one_hot(traj.action, policy.action_dim).double() if policy.discrete else traj.action
    real = traj.mask[..., 1:]
    assert torch.equal(action[..., 1:, :][real], before[..., :-1, :][real]) and torch.equal(reward[..., 1:][real], traj.reward[..., :-1][real])  # at starts of episodes, too
    assert torch.equal(begins[traj.mask] == 1, traj.episode_start[traj.mask])
    assert not action[..., 0, :].any() and not reward[..., 0].any()


@pytest.mark.parametrize('core', ['ssm', 'stack', 'h3', 'gru'])
def test_memory_lasts_over_episodes_and_not_over_trials(core):
    learner = make('MDP', core)
    traj = play(learner)
    inputs = policy_inputs(learner.policy, traj)
    logits, cut = (replay(learner, inputs, reset)['logits'] for reset in (traj.memory_reset, traj.episode_start))
    torch.testing.assert_close(cut[..., :3, :], logits[..., :3, :], rtol=0, atol=1e-12)
    gap = (cut[..., 3:, :] - logits[..., 3:, :]).abs().amax(-1)
    assert (gap.amax(-1) if core == 'h3' else gap).min() > 1e-9  # in each step; H3 reads nothing where a tiny encoder gives 0, so in each trial
    for m in range(M):  # all trials of a task as one sequence
        glued = replay(learner, inputs[m].flatten(0, 1)[None], traj.memory_reset[m].flatten()[None])['logits']
        torch.testing.assert_close(glued.view(logits[m].shape), logits[m], rtol=0, atol=1e-12)


def test_without_dynamics_nothing_lasts():
    learner = make('MDP', 'none')
    traj = play(learner)
    inputs = policy_inputs(learner.policy, traj)
    logits, cut = (replay(learner, inputs, reset)['logits'] for reset in (traj.memory_reset, torch.ones_like(traj.mask)))
    torch.testing.assert_close(cut, logits, rtol=0, atol=1e-12)


@cores
def test_a_rollout_in_pieces_is_the_whole(core):
    learner = make('episodes that end early', core)
    rollout = Rollout(learner.policy, tasks_of(learner), learner.env)
    for _ in range(learner.env.trial_length): pieces = rollout.run(params_of(learner), 1)
    for name, x in vars(play(learner)).items(): torch.testing.assert_close(getattr(pieces, name), x, rtol=0, atol=1e-12)


@cores
def test_what_follows_the_end_reaches_neither_loss_nor_gradient(core):
    learner = make('episodes that end early', core, entropy_coef=.1)
    traj = play(learner)
    assert not traj.mask.all()
    def losses(traj):
        advantage, target, scale = learner.targets(traj)
        loss, error, *_ = query_losses(learner.policy, learner.params, traj, advantage, learner.config, scale, target)
        return loss, error, gradient(loss.sum() + error.sum(), learner)
    spoil = lambda x, junk: torch.where(traj.mask, x, junk)
    spoilt = replace(traj, reward=spoil(traj.reward, torch.nan), value=spoil(traj.value, torch.nan), logp=spoil(traj.logp, -7.), action=spoil(traj.action, 1 - traj.action), obs=torch.where(traj.mask[..., None], traj.obs, 5.))
    for a, b in zip(losses(traj), losses(spoilt)): assert torch.equal(a, b)


def by_loops(reward, value, mask, gamma, lam, after=None):
    "Targets from the equations: lists, no tensors."
    n, T = len(reward), len(reward[0])
    real = [[t for t in range(T) if mask[i][t]] for i in range(n)]
    to_go = lambda: [{t: sum(gamma**(u - t) * reward[i][u] for u in real[i] if u >= t) for t in real[i]} for i in range(n)]
    returns = to_go()
    if after is not None:
        mean = {t: np.mean([returns[i][t] for i in range(n) if t in returns[i]]) for t in range(T) if any(t in G for G in returns)}
        unit = np.sqrt(np.mean([(returns[i][t] - mean[t])**2 for i in range(n) for t in real[i]]))
        reward = [[reward[i][t] + gamma * unit * after[i][t] for t in range(T)] for i in range(n)]
        returns = to_go()
    mean = {t: np.mean([returns[i][t] for i in range(n) if t in returns[i]]) for t in range(T) if any(t in G for G in returns)}
    unit = max(np.sqrt(np.mean([(returns[i][t] - mean[t])**2 for i in range(n) for t in real[i]])), 1e-6)
    V = [{t: mean[t] + unit * value[i][t] for t in real[i]} for i in range(n)]
    delta = [{t: reward[i][t] + gamma * V[i].get(t + 1, 0) - V[i][t] for t in real[i]} for i in range(n)]
    A = [{t: sum((gamma * lam)**(u - t) * delta[i][u] for u in real[i] if u >= t) / unit for t in real[i]} for i in range(n)]
    target = [{t: A[i][t] + value[i][t] for t in real[i]} for i in range(n)]
    centre = {t: np.mean([A[i][t] for i in range(n) if t in A[i]]) for t in mean}
    A = [{t: A[i][t] - centre[t] for t in real[i]} for i in range(n)]
    size = max(np.sqrt(np.mean([x * x for row in A for x in row.values()])), 1e-6)
    dense = lambda rows, unit: np.array([[rows[i].get(t, 0) / unit for t in range(T)] for i in range(n)])
    return dense(A, size), dense(target, 1)


def made_up(seed=0, T=7):
    g = torch.Generator().manual_seed(seed)
    reward, value = (torch.randn(M, K, T, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(T) < torch.randint(1, T, (M, K, 1), generator=g)  # nobody reaches the last step
    return Trajectories(reward[..., None], reward, reward, ~mask, ~mask, mask, mask, mask, reward, value)


@pytest.mark.parametrize('gamma, lam', [(1., 1.), (.9, 1.), (1., .5), (.8, .3), (0., 1.), (1., 0.)])
def test_targets_are_those_of_the_equations(gamma, lam):
    traj = made_up()
    rows = [x.flatten(0, 1).tolist() for x in (traj.reward, traj.value, traj.mask)]
    for x, y in zip(trial_targets(traj, gamma, lam), by_loops(*rows, gamma, lam)): np.testing.assert_allclose(x.flatten(0, 1).numpy(), y, atol=1e-12)


@pytest.mark.parametrize('gamma, lam', [(1., 1.), (.9, .5)])
def test_bootstrapped_targets_are_those_of_the_equations(gamma, lam):
    traj = made_up()
    last = traj.mask & ~traj.mask.roll(-1, -1)
    after = torch.randn(traj.reward.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).masked_fill(~last, 0)
    after[0] = 0  # a task whose value head expects the mean
    rows = [x.flatten(0, 1).tolist() for x in (traj.reward, traj.value, traj.mask)]
    for x, y in zip(trial_targets(traj, gamma, lam, after), by_loops(*rows, gamma, lam, after.flatten(0, 1).tolist())): np.testing.assert_allclose(x.flatten(0, 1).numpy(), y, atol=1e-12)
    for x, y in zip(trial_targets(traj, gamma, lam, torch.zeros_like(after)), trial_targets(traj, gamma, lam)): torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    never = torch.zeros_like(traj.mask)
    whole = replace(traj, mask=~never, terminated=never)  # all are cut at the same time, so what they have in common drops out
    end = torch.arange(7) == 6
    for x, y in zip(trial_targets(whole, gamma, lam, after * 0 + end * 5.), trial_targets(whole, gamma, lam)): torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize('place', ['continuous actions', 'bandit'])
def test_bootstrapping_learns_and_resumes(place):
    learner, plain = make(place, bootstrap=True, gamma=.9), make(place, gamma=.9)
    for x in (learner, plain): x.outer_step(tasks_of(x))
    assert any((learner.params[k] != v).any() for k, v in plain.params.items())
    other = make(place, bootstrap=True, gamma=.9)
    other.load_state_dict(learner.state_dict())
    assert learner.outer_step(tasks_of(learner, 1)) == other.outer_step(tasks_of(other, 1))
    assert_same(learner.state_dict(), other.state_dict())


def test_advantages_do_not_depend_on_units_order_or_what_all_have_in_common():
    traj = made_up()
    A, target = trial_targets(traj)
    flip = lambda t: Trajectories(**{k: v.flip(0, 1) for k, v in vars(t).items()})
    for x, y in ((trial_targets(replace(traj, reward=1000 * traj.reward)), (A, target)), (trial_targets(flip(traj)), (A.flip(0, 1), target.flip(0, 1)))):
        for a, b in zip(x, y): torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    told = replace(traj, value=traj.value + torch.randn(7, generator=torch.Generator().manual_seed(5)))  # a value that depends on time alone
    torch.testing.assert_close(trial_targets(told)[0], A, rtol=0, atol=1e-10)
    torch.testing.assert_close(over_batch(A, traj.mask), torch.zeros(1, 1, 7, dtype=A.dtype), rtol=0, atol=1e-12)
    assert not A[~traj.mask].any() and not target[~traj.mask].any()


def test_where_there_is_nothing_to_compare_nothing_is_learned():
    traj = made_up()
    for alike in (replace(traj, reward=torch.ones_like(traj.reward), value=torch.zeros_like(traj.value), mask=torch.ones_like(traj.mask)), Trajectories(**{k: v[:1, :1, :1] * (v.dtype == torch.bool) for k, v in vars(traj).items()})):
        for x in trial_targets(alike): assert not x.any()  # and not nan
    lonely = Trajectories(**{k: v[:1, :1] for k, v in vars(made_up()).items()})
    assert trial_targets(lonely)[0].isfinite().all()


@cores
def test_resume_is_exact(core):
    kw = dict(core=core, outer_epochs=2, outer_steps=4, outer_lr_decay=True, entropy_coef=.1, entropy_fade=.8)
    learner, other = make(**kw), make(**kw | dict(seed=5))
    other.env = learner.env
    for step in range(2): learner.outer_step(tasks_of(learner, step))
    other.load_state_dict(saved := learner.state_dict())
    assert_same(saved, other.state_dict())
    assert learner.outer_step(tasks_of(learner, 2)) == other.outer_step(tasks_of(other, 2))
    assert_same(learner.state_dict(), other.state_dict())
    assert learner.config_now.entropy_coef < .1 and learner.optimizer.param_groups[0]['lr'] < learner.config.outer_lr


@pytest.mark.parametrize('accident', ['reward', 'interrupt'])
def test_an_outer_step_happens_completely_or_not_at_all(accident, monkeypatch):
    learner, twin = make(outer_epochs=2), make(outer_epochs=2)
    for x in (learner, twin): x.outer_step(tasks_of(x))
    before, family, update, calls = learner.state_dict(), type(learner.env.family), learner.update, []
    def interrupted():
        calls.append(update())
        if len(calls) == 2: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        if accident == 'reward': m.setattr(family, 'step', lambda self, state, action, tasks, noise: (state, np.where(tasks['exit'] == tasks['exit'][K], np.float32(np.nan), np.float32(-1)), np.ones(len(state), bool)))
        else: m.setattr(learner, 'update', interrupted)
        with pytest.raises(FloatingPointError if accident == 'reward' else KeyboardInterrupt) as info: learner.outer_step(tasks_of(learner, 1))
    assert accident == 'interrupt' or 'of tasks [1] are not finite' in str(info.value)
    assert_same(before, learner.state_dict())
    assert learner.outer_step(tasks_of(learner, 1)) == twin.outer_step(tasks_of(twin, 1))


def test_bad_settings_are_refused_and_the_default_is_good():
    env = PLACES['bandit']
    policy = lambda history: SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(4, 2, history=history), 0)
    with pytest.raises(ValueError, match=r'history=False, so it cannot know what its actions led to; make it with PolicyConfig\(history=True\)'): RL2(policy(False), env)
    learner = LEARNERS['rl2'](policy(True), env)
    assert isinstance(learner, RL2) and (learner.config.gamma, learner.config.gae_lambda, learner.config.outer_epochs) == (1, 1, 1)
    metrics = learner.outer_step(sample_tasks(env, 2))
    assert metrics['env_steps'] == 2 * K * 9 and metrics['pre_return'] == metrics['post_return'] and abs(metrics['kl']) < 1e-5


def test_training_does_not_read_or_write_the_global_generator():
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed)
        learner = make()
        learner.outer_step(tasks_of(learner))
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())
        results.append(learner.state_dict())
    assert_same(*results)


@cores
def test_adaptation_and_maml_take_trials_as_well(core):
    "One step of adaptation for each task by itself is that of the stack, and MAML's meta-gradient reaches encoder and memory."
    learner = make('MDP', core, inner_lr=.3)
    traj = play(learner)
    stacked = learner.adapt(learner.params, traj)
    for m in range(M):
        for k, v in learner.adapt(learner.params, traj.of_tasks(slice(m, m + 1))).items(): torch.testing.assert_close(v[0], stacked[k][m], rtol=0, atol=1e-10)
    maml = make('MDP', core, cls=MetaMAML, inner_lr=.3)
    before = params_of(maml) | {k: v.clone() for k, v in params_of(maml).items()}
    maml.outer_step(tasks_of(maml))
    assert all((maml.params[k] != before[k]).any() for k in maml.params if k.startswith(('encoder.', 'action.')))
    assert any((maml.params[k] != before[k]).any() for k in maml.params if k.startswith('core.'))


def test_it_learns_to_learn():
    env = EnvConfig('MetaBandit-v0', 1, 15, options=PAIR)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(32, 16, history=True), 0)
    learner = RL2(policy, env, MetaConfig(gamma=1., outer_epochs=1, outer_lr=1e-2, outer_steps=40))
    for step in range(40): learner.outer_step(sample_tasks(env, 128, step=step))
    tasks = sample_tasks(env, 500, 'held_out')
    arms = collect(policy, params_of(learner), tasks, env, 'evaluation', deterministic=True).action[:, 0].numpy()
    assert regret(np.stack([task['chance'] for task in tasks]), arms)[:, -1].mean() < 1.5  # chance: 3.75


def test_cut_trials_beside_ended_ones_are_refused():
    "Without a mean for the time after the cut, the one that survived would count as if an average future were worth nothing."
    mask = torch.ones(1, 2, 4, dtype=torch.bool)
    mask[0, 0, 3] = False
    zero, never = torch.zeros(1, 2, 4), torch.zeros_like(mask)
    ended, cut = never.clone(), never.clone()
    ended[0, 0, 2], cut[0, 1, 3] = True, True
    traj = Trajectories(zero[..., None], zero, mask.float(), ended, cut, mask, never, never, zero, zero)
    with pytest.raises(ValueError, match="bootstrap=True needs trials that the clock cuts, all of them"): trial_targets(traj, after=zero)
    trial_targets(traj), trial_targets(replace(traj, terminated=never), after=zero)  # neither is a mixture
    learner = make('episodes that end early', bootstrap=True)
    before = learner.state_dict()
    with pytest.raises(ValueError, match='some of these ended by the rules'): learner.outer_step(tasks_of(learner))
    assert_same(learner.state_dict(), before)
