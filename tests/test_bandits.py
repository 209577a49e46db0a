"""The references for bandits and tabular MDPs at full size, against figures from elsewhere, enumerations and closed forms.

SECOND marks figures of a second implementation, written independently of this one, with its standard errors where it gave them.
"""
import subprocess
import sys
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import factorial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq

from ssm_metarl.bandits import (Bandit, TabularMDP, backward_induction, bayes_optimal_value, dependent_regret, evidence, greedy_dependent, index_policy, index_table, myopic, play_bandit,
                                play_plan, psrl, random_arm, regret, sample_mdp, thompson, thompson_dependent, total_reward, ucb1)
from ssm_metarl.env_checks import check_family
from ssm_metarl.batch import EnvBatch, play_actions, stream
from ssm_metarl.envs import EnvConfig, checksum_split, register_family, sample_tasks, unregister_family

few = settings(max_examples=25, deadline=None, derandomize=True)
BANDIT, MDP = 'MetaBandit-v0', 'MetaTabularMDP-v0'
POLICIES = {'random': random_arm, 'UCB1': ucb1(), 'UCB1 with prior': ucb1(.2, prior=1), 'Thompson': thompson, 'index': index_policy(12)}


def error(x): return x.std() / len(x)**.5


def assert_agrees(x, exact):
    "A sample mean within four standard errors of a number that is known exactly."
    assert abs(x.mean() - exact) < 4 * error(x), f'{x.mean():.4f} ± {error(x):.4f} is not {exact}'


def assert_matches(x, figure, spread):
    "A sample mean within three combined standard errors of somebody else's figure, whose own standard error is `spread`."
    assert abs(x.mean() - figure) < 3 * np.hypot(error(x), spread), f'{x.mean():.4f} ± {error(x):.4f} is not {figure} ± {spread}'


# The environments.

@pytest.mark.parametrize('name', [BANDIT, MDP])
def test_module_is_found_by_the_name_of_the_family(name):
    code = f"from ssm_metarl.envs import EnvBatch, EnvConfig; print(type(EnvBatch(EnvConfig('{name}')).family).__module__)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'ssm_metarl.bandits'


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name, options', [(BANDIT, {}), (BANDIT, {'arms': 2, 'dependent': True}), (MDP, {}), (MDP, {'states': 1, 'actions': 1, 'horizon': 1})])
def test_checkers_are_content(name, options):
    check_family(name, num_envs=5, steps=25)
    check_env(gym.make(name, time_limit=20, **options).unwrapped)
    assert gym.make_vec(name, num_envs=3, **options).num_envs == 3


@few
@given(st.sampled_from([(BANDIT, {'arms': 3}), (BANDIT, {'arms': 2, 'dependent': True}), (MDP, {'states': 4, 'actions': 3, 'horizon': 5})]), st.integers(0, 2**31), st.integers(2, 6))
def test_first_environment_is_the_same_alone(family, seed, n):
    name, options = family
    many, one = (EnvConfig(name, k, 7, seed, options) for k in (n, 1))
    tasks, actions = sample_tasks(many, n), stream(seed, 'test').integers(many.family.action_space.n, size=(12, n))
    for mode, freeze in ((AutoresetMode.DISABLED, True), (AutoresetMode.SAME_STEP, False), (AutoresetMode.NEXT_STEP, False)):
        for x, y in zip(play_actions(EnvBatch(many, tasks, mode, freeze), actions), play_actions(EnvBatch(one, tasks[:1], mode, freeze), actions[:, :1]), strict=True):
            np.testing.assert_array_equal(x[:, :1], y, strict=True)


def test_bandit_never_ends_but_by_its_limit():
    _, rewards, terminated, truncated = play_actions(EnvBatch(EnvConfig(BANDIT, 50, 30), freeze=True), stream(0, 'test').integers(5, size=(33, 50)))
    assert not terminated.any() and not truncated[:29].any() and truncated[29:].all() and not rewards[30:].any()
    assert set(np.unique(rewards)) == {0., 1.}


def test_mdp_terminates_at_its_horizon_and_starts_in_state_0():
    config = EnvConfig(MDP, 40, options={'horizon': 6})
    env = EnvBatch(config, autoreset_mode=AutoresetMode.SAME_STEP)
    obs, _, terminated, truncated = play_actions(env, stream(0, 'test').integers(5, size=(18, 40)))
    assert not truncated.any() and (terminated == (np.arange(1, 19) % 6 == 0)[:, None]).all()
    assert (obs[::6].argmax(-1) == 0).all() and (obs[3].argmax(-1) != 0).any() and (obs.sum(-1) == 1).all()
    obs, rewards, terminated, _ = play_actions(EnvBatch(config, freeze=True), stream(0, 'test').integers(5, size=(9, 40)))
    assert terminated[5:].all() and not terminated[:5].any() and not rewards[6:].any()  # frozen
    frozen = EnvBatch(config, freeze=True)
    play_actions(frozen, np.zeros((9, 40), int))
    assert frozen.family.oracle(frozen.state, frozen.tasks).shape == (40,)  # also after the end


@few
@given(st.integers(0, 2**31))
def test_dependent_tasks(seed):
    config = EnvConfig(BANDIT, seed=seed, options={'arms': 2, 'dependent': True})
    for split in ('train', 'validation', 'held_out'):
        for task in sample_tasks(config, 5, split):
            assert abs(task['chance'].sum() - 1) < 1e-6 and config.tasks.split_of(task) == split == checksum_split(task)
    for task in sample_tasks(config, 5, 'both-good'):
        assert task['chance'].min() >= .5 and config.tasks.split_of(task) == 'out of distribution'


def test_independent_bandits_and_mdps_have_no_other_distribution():
    for family in (Bandit(), TabularMDP()): assert not family.ood_splits
    assert Bandit(2).in_distribution({'chance': [1, .5]}) and not Bandit(2).in_distribution({'chance': [1, 1.5]})
    with pytest.raises(ValueError, match="split='both-good' is not one of"): sample_tasks(EnvConfig(BANDIT), 1, 'both-good')


@pytest.mark.parametrize('options, message', [({'arms': 1}, 'arms=1 is not an integer >= 2'), ({'arms': 2.5}, 'arms=2.5'), ({'dependent': True}, 'got arms=5, set arms=2'),
                                              ({'arms': 2, 'dependent': 'no'}, "dependent='no' is not of type bool"),
                                              ({'arm': 3}, 'arms, dependent')])
def test_impossible_bandits(options, message):
    with pytest.raises(ValueError, match=message): EnvConfig(BANDIT, options=options)


@pytest.mark.parametrize('size', ['states', 'actions', 'horizon'])
def test_impossible_mdps(size):
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f'{size}={value}'): EnvConfig(MDP, options={size: value})


def test_tasks_that_are_none_are_named():
    env = EnvBatch(EnvConfig(BANDIT, 4, options={'arms': 2}))
    with pytest.raises(ValueError, match=r'tasks \[2\] break a rule .* chances lie between 0 and 1'): env.set_tasks([{'chance': [-.1, 1]}], mask=np.arange(4) == 2)
    tasks = sample_tasks(EnvConfig(MDP), 3)
    tasks[1]['transition'][2, 3] *= 2
    with pytest.raises(ValueError, match=r'tasks \[1\] break a rule .* sum 1'): EnvBatch(EnvConfig(MDP, 3), tasks)
    tasks[1]['transition'][2, 3] = [2, -1, *[0] * 8]
    with pytest.raises(ValueError, match=r'tasks \[1\] break a rule .* none negative'): EnvBatch(EnvConfig(MDP, 3), tasks)
    for chance in (1.5, -.1, float('nan')):
        with pytest.raises(ValueError, match=r'tasks \[0\] break a rule .* chances lie between 0 and 1'): play_bandit(thompson, np.array([[.5, chance], [.5, .5]]), 3)


def test_only_an_mdp_is_in_the_distribution_of_mdps():
    family, config = TabularMDP(4, 2), EnvConfig(MDP, options={'states': 4, 'actions': 2})
    for split in ('train', 'validation', 'held_out'):
        for task in sample_tasks(config, 3, split): assert family.in_distribution(task)
    m, P = task['mean_reward'], task['transition']
    for bad in ({'transition': P * 1.01}, {'transition': np.stack([P[..., 0] + 2, P[..., 1] - 2, P[..., 2], P[..., 3]], -1)}, {'transition': P * np.nan}, {'transition': P[0]}, {'mean_reward': m[:3]}, {'mean_reward': m * np.inf}):
        assert not family.in_distribution(task | bad) and config.tasks.split_of(task | bad) == 'out of distribution'
    assert not TabularMDP(5, 2).in_distribution(task)


def test_counts_must_be_positive_integers():
    for n, k in ((-1, 2), (0, 2), (2.5, 2), (2, 0), (2, 1.5)):
        with pytest.raises(ValueError, match='is not a positive integer'): bayes_optimal_value(n, k)
    for n in (-1, 0, 2.5):
        with pytest.raises(ValueError, match=f'n={n} is not a positive integer'): dependent_regret(n)


def test_plans_need_episodes_that_stay_where_they_end():
    config = EnvConfig(MDP, 4, options={'horizon': 3})
    same_step, plan = EnvBatch(config, autoreset_mode=AutoresetMode.SAME_STEP), np.zeros((4, 6, 10), int)
    with pytest.raises(ValueError, match='SAME_STEP would show'): play_plan(same_step, plan[:, :3])
    with pytest.raises(ValueError, match='SAME_STEP would show'): psrl(same_step, 2)
    with pytest.raises(ValueError, match='the plan has 6 steps, but an episode is over after 3'): play_plan(EnvBatch(config), plan)
    for steps in (1, 2, 3):
        states, actions, rewards = play_plan(EnvBatch(config), plan[:, :steps])
        assert states.shape == (4, steps + 1) and actions.shape == rewards.shape == (4, steps) and (rewards != 0).all()


@pytest.mark.parametrize('c', [0, 1e-12, .1, 1, 100])
def test_ucb1_pulls_each_arm_once_first(c):
    chance = stream(0, 'test').random((50, 6))
    assert (np.sort(play_bandit(ucb1(c), chance, 6), 1) == np.arange(6)).all()
    best = play_bandit(ucb1(0), np.tile([0., 1, 0], (5, 1)), 9)
    assert (best[:, 3:] == 1).all()


@pytest.mark.parametrize('w, l', [((1, 0), (0, 0)), ((0, 0), (0, 3)), ((5, 2), (1, 3)), ((2, 4), (6, 0))])
def test_thompson_pulls_an_arm_as_often_as_it_is_the_best(w, l):
    "P(x > y) for Beta distributions with integer parameters: a sum of Beta functions, here in exact fractions."
    (a, c), (b, d) = (np.add(x, 1).tolist() for x in (w, l))  # x ~ Beta(a, b), y ~ Beta(c, d)
    B = lambda p, q: Fraction(factorial(p - 1) * factorial(q - 1), factorial(p + q - 1))
    exact = sum(B(a + i, b + d + c - 1 - i) * Fraction(factorial(c + d - 1), factorial(i) * factorial(c + d - 1 - i)) for i in range(c, c + d)) / B(a, b)
    n = 100_000
    assert_agrees(thompson(np.tile(w, (n, 1)), np.tile(l, (n, 1)), 9, stream(0, 'test')) == 0, float(exact))


def test_a_sampled_mdp_has_the_moments_of_the_posterior():
    "Of Dirichlet(1 + c) and N((1 + paid) / (1 + n), 1 / (1 + n))."
    many, seen = 20_000, np.array([3., 0, 1])
    m, P = sample_mdp(np.tile(seen, (many, 1, 1, 1)), np.full((many, 1, 1), 9.), stream(0, 'test'))
    assert_agrees(m[:, 0, 0], 10 / 5)
    assert_agrees((m[:, 0, 0] - 2)**2, 1 / 5)
    for i, c in enumerate(seen + 1):
        assert_agrees(P[:, 0, 0, i], c / 7)
        assert_agrees((P[:, 0, 0, i] - c / 7)**2, c * (7 - c) / (7**2 * 8))


def test_rewards_and_transitions_are_those_of_held_out_tasks():
    tasks = sample_tasks(EnvConfig(MDP), 2, 'held_out')
    env = EnvBatch(EnvConfig(MDP, 6000, seed=5), [tasks[i % 2] for i in range(6000)])
    actions = stream(1, 'test').integers(5, size=(10, 6000))
    obs, reward, *_ = play_actions(env, actions)
    which, s, after = np.arange(6000) % 2 + np.zeros((10, 1), int), obs[:-1].argmax(-1), obs[1:].argmax(-1)
    m, P = (np.array([task[field] for task in tasks], float) for field in ('mean_reward', 'transition'))
    noise = (reward - m[which, s, actions]).ravel()
    assert_agrees(noise, 0)
    assert_agrees(noise**2, 1)
    assert_agrees(noise**4, 3)
    counts = np.zeros(P.shape)
    np.add.at(counts, (which, s, actions, after), 1)
    n = counts.sum(-1, keepdims=True)
    assert_agrees(((counts - n * P)**2 / (n * P * (1 - P))).ravel(), 1)  # binomial variance


# Exact values by enumeration.

def likelihood(arms, rewards, k, dependent=False):
    "Probability of rewards for pulls of these arms: the Beta integral of each arm, or of p."
    if dependent:
        pro = sum(r != a for a, r in zip(arms, rewards))
        return Fraction(factorial(pro) * factorial(len(arms) - pro), factorial(len(arms) + 1))
    probability = Fraction(1)
    for arm in range(k):
        w, l = (sum(r == x for a, r in zip(arms, rewards) if a == arm) for x in (1, 0))
        probability *= Fraction(factorial(w) * factorial(l), factorial(w + l + 1))
    return probability


def best_by_enumeration(n, k, dependent=False):
    "Value of the best of all deterministic policies: one arm for each history of rewards."
    histories = [h for t in range(n) for h in product((0, 1), repeat=t)]
    def value(policy): return sum(likelihood([policy[r[:t]] for t in range(n)], r, k, dependent) * sum(r) for r in product((0, 1), repeat=n))
    return float(max(value(dict(zip(histories, arms))) for arms in product(range(k), repeat=len(histories))))


@pytest.mark.parametrize('n, k', [(1, 3), (2, 2), (3, 2), (3, 3)])
def test_bayes_optimal_value_is_the_best_of_all_policies(n, k): assert bayes_optimal_value(n, k) == pytest.approx(best_by_enumeration(n, k), abs=1e-12)


@pytest.mark.parametrize('n', [1, 2, 3])
def test_dependent_regret_is_that_of_the_best_of_all_policies(n): assert n * 3 / 4 - dependent_regret(n) == pytest.approx(best_by_enumeration(n, 2, dependent=True), abs=1e-12)


def test_bayes_optimal_values_of_ten_pulls():  # SECOND
    assert [round(bayes_optimal_value(10, k), 3) for k in (5, 10, 50)] == [6.660, 6.714, 6.714]


def test_bayes_optimal_regrets_of_dependent_arms():
    exact = lambda n: float(sum(Fraction(3, 4) - sum(Fraction(max(x + 1, t - x + 1), t + 2) for x in range(t + 1)) / (t + 1) for t in range(n)))
    for n in (1, 30, 100): assert dependent_regret(n) == pytest.approx(exact(n), abs=1e-9)
    games = stream(0, 'test').random(20_000)
    loss = regret(np.stack([games, 1 - games], 1), play_bandit(greedy_dependent, np.stack([games, 1 - games], 1), 30))[:, -1]
    assert_agrees(loss, dependent_regret(30))
    assert_matches(loss, .929, error(loss))  # SECOND, of 20 000 simulated tasks
    for p, second in ((None, 1.22), ([.1, .9], .62), ([.25, .75], 1.00)): assert dependent_regret(100, p) == pytest.approx(second, abs=.0051)
    hard = np.tile([[.4, .6], [.6, .4]], (10_000, 1))
    loss = regret(hard, play_bandit(greedy_dependent, hard, 100))[:, -1]
    assert_agrees(loss, dependent_regret(100, [.4, .6]))
    assert_matches(loss, 2.30, error(loss))  # SECOND


@pytest.mark.parametrize('w, l', [(0, 0), (1, 0), (0, 1), (2, 3)])
def test_index_is_the_best_ratio_of_reward_to_time(w, l):
    "The other definition (Gittins 1979): the largest E[rewards until stopping] / E[pulls until stopping] over all stopping rules."
    histories, best = [h for t in (1, 2) for h in product((0, 1), repeat=t)], 0
    for goes_on in product((False, True), repeat=len(histories)):
        goes_on, paid, pulls = dict(zip(histories, goes_on)), 0, 0
        for r in product((0, 1), repeat=3):
            wins = sum(r)
            probability = Fraction(factorial(w + wins) * factorial(l + 3 - wins) * factorial(w + l + 1), factorial(w) * factorial(l) * factorial(w + l + 4))
            stop = next((t for t in (1, 2) if not goes_on[r[:t]]), 3)
            paid, pulls = paid + probability * sum(r[:stop]), pulls + probability * stop
        best = max(best, paid / pulls)
    table = index_table(w + l + 3)
    assert 0 <= table[3, w, l] - float(best) + 1e-12 < 1e-3
    assert index_table(w + l + 3, charges=4000)[3, w, l] == pytest.approx(float(best), abs=1e-5)


def test_index_rises_with_wins_and_time_and_falls_with_losses():
    table = index_table(40)
    assert (np.diff(table[:, :, :], axis=1)[np.isfinite(table[:, 1:])] > 0).all()
    for left in range(1, 40):
        m = 40 - left
        assert (table[left + 1, :m, :m] >= table[left, :m, :m] - 1e-9).all() and (np.diff(table[left, :m, :m], axis=1) < 0).all()
    w, l = np.mgrid[:40, :40]
    np.testing.assert_allclose(table[1], (w + 1) / (w + l + 2), atol=1e-3)
    assert np.nanmax(abs(table - index_table(40, charges=1600))) < 1e-3


@pytest.mark.parametrize('n, k', [(2, 2), (3, 2), (5, 3), (10, 2), (10, 5)])
def test_index_policy_is_nearly_optimal(n, k):
    table = index_table(n)
    exact, own = bayes_optimal_value(n, k), bayes_optimal_value(n, k, score=lambda w, l, left: table[left, w, l])
    assert -1e-12 <= exact - own < (1e-12 if n < 4 else 3e-4)
    assert_agrees(total_reward(chance := stream(0, 'test').random((5000, k)), play_bandit(index_policy(n), chance, n)), own)


@pytest.mark.parametrize('name', POLICIES)
def test_first_bandits_do_not_depend_on_how_many_follow(name):
    chance = stream(3, 'test').random((30, 4))
    many = play_bandit(POLICIES[name], chance, 12, seed=7)
    np.testing.assert_array_equal(many[:9], play_bandit(POLICIES[name], chance[:9], 12, seed=7))
    assert many.shape == (30, 12) and (many != play_bandit(POLICIES[name], chance, 12, seed=8)).any()
    assert (np.diff(regret(chance, many)) >= 0).all()
    np.testing.assert_allclose(total_reward(chance, many), 12 * chance.max(1) - regret(chance, many)[:, -1])


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_plan_is_the_best_of_all_plans(S, A, H, seed):
    A = min(A, 2) if S * H > 4 else A
    rng = stream(seed, 'test')
    m, P = rng.normal(1, 1, (S, A)), rng.dirichlet(np.ones(S), (S, A))
    values, plan = backward_induction(m[None], P[None], H)
    best, rows = np.full(S, -np.inf), np.arange(S)
    for actions in product(range(A), repeat=S * H):
        value = np.zeros(S)
        for action in np.reshape(actions, (H, S)): value = m[rows, action] + P[rows, action] @ value
        best = np.maximum(best, value)
    np.testing.assert_allclose(values[0, 0], best, atol=1e-12)
    value = np.zeros(S)
    for action in plan[0, ::-1]: value = m[rows, action] + P[rows, action] @ value
    np.testing.assert_allclose(value, best, atol=1e-12)


def test_oracle_earns_the_optimal_value():
    config = EnvConfig(MDP, 2000, 10)
    env = EnvBatch(config, sample_tasks(config, 2000, 'held_out'))
    values, _ = backward_induction(env.tasks['mean_reward'], env.tasks['transition'], 10)
    env.reset()
    total = sum(env.step(env.family.oracle(env.state, env.tasks))[1].astype(float) for _ in range(10))
    assert_agrees(total - values[:, 0, 0], 0)


# Published tables.

SECOND = {  # (pulls, arms): UCB1 with the best of eight c, Thompson, index; standard error
    (10, 5): (6.67, 5.85, 6.62, .02), (10, 10): (6.72, 5.57, 6.73, .02), (10, 50): (6.71, 5.14, 6.74, .02),
    (100, 5): (78.4, 74.9, 78.76, .23), (100, 10): (82.8, 77.1, 83.91, .16), (100, 50): (84.6, 64.6, 85.65, .12)}


@pytest.mark.parametrize('n, k', SECOND)
def test_bandits_of_duan(n, k):
    chance = stream(1, 'test', n, k).random((10_000 if n == 10 else 4000, k))
    total = lambda policy: total_reward(chance, play_bandit(policy, chance, n))
    tuned = max((total(ucb1(c, prior=1)) for c in (.1, .2, .3, .5, .7, 1, 1.4, 2)), key=np.mean)
    *seconds, spread = SECOND[n, k]
    for ours, theirs in zip((tuned, total(thompson), total(index_policy(n))), seconds): assert_matches(ours, theirs, spread)
    assert_agrees(total(random_arm), n / 2)


@pytest.mark.parametrize('tasks, printed', [('dependent', (7.53, 2.89, 1.85, 1.50)), ('independent', (5.01, 2.47, 1.72, 1.67)), ('both-good', (2.49, 1.72, 1.25, 1.24))])
def test_thirty_pulls_of_two_arms(tasks, printed):  # by a public textbook chapter, on 20 000 tasks
    u = stream(1, 'test').random((20_000, 2))
    chance = {'dependent': np.stack([u[:, 0], 1 - u[:, 0]], 1), 'independent': u, 'both-good': .5 + u / 2}[tasks]
    for policy, theirs in zip((random_arm, ucb1(), thompson, thompson_dependent), printed):
        loss = regret(chance, play_bandit(policy, chance, 30))[:, -1]
        assert_matches(loss, theirs, error(loss))


def test_hundred_pulls_of_two_arms():  # SECOND
    chance = stream(1, 'test').random((20_000, 2))
    for policy, theirs in ((random_arm, 16.62), (ucb1(), 5.61), (thompson, 2.79), (index_policy(100), 1.74)):
        loss = regret(chance, play_bandit(policy, chance, 100))[:, -1]
        assert_matches(loss, theirs, error(loss))


def test_optimum_of_random_mdps():  # SECOND, of 20 000
    rng, N = stream(1, 'test'), 10_000
    values, _ = backward_induction(rng.normal(1, 1, (N, 10, 5)), rng.dirichlet(np.ones(10), (N, 10, 5)), 10)
    assert_matches(values[:, 0, 0], 21.83, .02)


def test_psrl_of_duan():
    mdps = lambda: EnvBatch(EnvConfig(MDP, 1000, 10, seed=1))
    returns, pessimist = psrl(mdps(), 100, seed=1), psrl(mdps(), 100, seed=1, prior_mean=0)
    second = {10: (133.2, .8), 25: (402.2, None), 50: (898.7, None), 75: (1411.8, None), 100: (1933.7, 7)}  # SECOND
    published = {10: 138.1, 25: 408.8, 50: 904.4, 75: 1417.1, 100: 1939.5}
    for n, (theirs, spread) in second.items():
        total, other = returns[:, :n].sum(1), pessimist[:, :n].sum(1)
        assert_matches(total, theirs, spread or error(total))
        assert_matches(other, published[n], error(other))  # the published one, with a prior mean of 0
    env = mdps()
    plans = stream(1, 'plans').integers(5, size=(10, 1000, 10, 10))
    assert_agrees(sum(play_plan(env, plan)[2].sum(1) for plan in plans), 100)  # at random, 1 for each step


def test_psrl_knows_what_it_has_seen():
    visits, paid = np.zeros((1, 2, 2, 2)), np.zeros((1, 2, 2))
    visits[0, 0, 1], paid[0, 0, 1] = [1e6, 3e6], 8e6
    m, P = sample_mdp(visits, paid, stream(0, 'test'))
    assert m[0, 0, 1] == pytest.approx(2, abs=.01) and P[0, 0, 1] == pytest.approx([.25, .75], abs=.01)
    assert P.sum(-1) == pytest.approx(np.ones((1, 2, 2)))


# Details, by hand.

def raises(pattern): return pytest.raises(ValueError, match=pattern)


def test_one_pull_of_two_bandits():
    tasks = {'chance': np.float32([[.2, .7], [.9, .1]])}
    state, win, over = Bandit(2).step(np.zeros((2, 1), np.float32), np.array([1, 1]), tasks, np.float32([[.69], [.11]]))
    assert win.tolist() == [1, 0] and over.tolist() == [False, False] and win.dtype == np.float32
    assert Bandit(2).oracle(state, tasks).tolist() == [1, 0] and Bandit(2).nothing(state, tasks).tolist() == [0, 0]
    with raises(r'tasks \[1\] break a rule of their family: chances lie'):
        EnvBatch(EnvConfig(BANDIT, 2, options={'arms': 2}), [{'chance': [0, 1]}, {'chance': [.5, 1.1]}])
    assert EnvConfig(BANDIT, options={'arms': 2, 'dependent': True}).tasks.splits == ('train', 'validation', 'held_out', 'both-good')


def test_bandits_pay_what_they_promise():
    n, arms, N = 1000, 5, 100
    env = EnvBatch(EnvConfig(BANDIT, N, n, options={'arms': arms}))
    chance = env.tasks['chance'].astype(float)
    wins = np.stack([play_actions(env, np.full((n, N), arm))[1].sum(0) for arm in range(arms)], 1)
    assert_agrees(((wins - n * chance)**2 / (n * chance * (1 - chance))).ravel(), 1)  # binomial variance
    sure = EnvBatch(EnvConfig(BANDIT, 2, n, options={'arms': 2}), [{'chance': [0, 1]}] * 2)
    assert play_actions(sure, np.tile([0, 1], (n, 1)))[1].sum(0).tolist() == [0, n]
    env = EnvBatch(EnvConfig(BANDIT, 2000, 20))
    env.reset()
    assert_agrees(sum(env.step(env.family.oracle(env.state, env.tasks))[1] for _ in range(20)), 20 * 5 / 6)


def test_players_see_their_counts():
    seen = []
    def note(wins, losses, left, rng):
        seen.append((wins.tolist(), losses.tolist(), left))
        return np.full(len(wins), len(seen) % 2)  # arms 1, 0, 1
    assert play_bandit(note, np.array([[0., 1.], [1., 0.]]), 3).tolist() == [[1, 0, 1], [1, 0, 1]]
    assert seen == [([[0, 0], [0, 0]], [[0, 0], [0, 0]], 3), ([[0, 1], [0, 0]], [[0, 0], [0, 1]], 2), ([[0, 1], [1, 0]], [[1, 0], [0, 1]], 1)]


def test_regret_and_total_reward():
    p, pulled = np.array([[.2, .7], [.9, .1]]), np.array([[0, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(regret(p, pulled), [[.5, .5, 1], [0, 0, .8]])
    np.testing.assert_allclose(total_reward(p, pulled), [1.1, 1.9])
    chance = stream(0, 'many bandits').random((5000, 5))
    assert_agrees(total_reward(chance, play_bandit(random_arm, chance, 20)), 20 / 2)


def test_ucb1_by_hand():
    wins, losses = np.array([[1, 3, 0]]), np.array([[1, 6, 0]])
    bound = lambda mean, pulls: mean + np.sqrt(2 * np.log(12) / pulls)  # pull number 12
    assert bound(1 / 2, 2) > bound(1 / 3, 9)
    assert ucb1()(wins, losses, 9, None) == [2] and ucb1()(wins[:, :2], losses[:, :2], 9, None) == [0]
    assert ucb1(c=0, prior=1)(wins, losses, 9, None) == ((wins + 1) / (wins + losses + 2)).argmax(1)
    # with c = 0.5 and a prior: 1/2 + .5 sqrt(2 ln 12 / 3), 4/11 + .5 sqrt(2 ln 12 / 10), 1/2 + .5 sqrt(2 ln 12)
    assert ucb1(.5, prior=1)(wins, losses, 9, None) == [2]


def test_bayes_optimal_value_of_scores_and_wrong_counts():
    assert bayes_optimal_value(7, 1) == pytest.approx(7 / 2)
    assert bayes_optimal_value(3, 3, score=lambda w, l, left: -w - l) == pytest.approx(3 / 2)  # always a new arm
    for wrong in ((-1, 2), (2.5, 2), (2, 0)):
        with raises('is not a positive integer'): bayes_optimal_value(*wrong)


def test_index_by_a_root_finder_and_beside_a_known_arm():
    table = index_table(100)
    assert table[1, 3, 1] == pytest.approx(4 / 6, abs=1e-3) and table[2, 0, 0] == pytest.approx(5 / 9, abs=1e-3)
    def worth(charge, w, l, left):  # Q
        if not left: return 0
        mean = (w + 1) / (w + l + 2)
        return mean - charge + mean * max(worth(charge, w + 1, l, left - 1), 0) + (1 - mean) * max(worth(charge, w, l + 1, left - 1), 0)
    for w, l, left in [(0, 0, 10), (2, 0, 9), (0, 3, 8), (9, 1, 7), (30, 0, 6), (4, 4, 10)]:
        assert -1e-9 < table[left, w, l] - brentq(worth, 0, 1, (w, l, left)) < 1e-3

    @lru_cache(None)
    def best_of_two(known, w, l, left):  # pull the unknown arm first, or the known one
        if not left: return 0, 0
        mean, go_on = (w + 1) / (w + l + 2), lambda w, l: max(best_of_two(known, w, l, left - 1))
        return mean * (1 + go_on(w + 1, l)) + (1 - mean) * go_on(w, l + 1), known + go_on(w, l)
    for w, l, left in [(0, 0, 12), (1, 0, 8), (0, 2, 10)]:
        for step in (-.003, .003):
            unknown, known = best_of_two(table[left, w, l] + step, w, l, left)
            assert (unknown > known) == (step < 0)
    with raises(r'12 pulls are left, but this is index_policy\(10\)'): play_bandit(index_policy(10), np.full((2, 3), .5), 12)


def test_evidence_of_dependent_arms():
    wins, losses = np.array([[2, 0], [0, 1]]), np.array([[0, 1], [1, 1]])
    np.testing.assert_array_equal(evidence(wins, losses), ([3, 1], [0, 2]))
    assert greedy_dependent(wins, losses, 9, None).tolist() == [0, 1]
    many = 20_000
    assert_agrees(thompson_dependent(np.tile([1, 0], (many, 1)), np.zeros((many, 2), int), 9, stream(0, 'test')) == 0, 3 / 4)  # density 2p
    with raises('3 arms cannot have the chances p and 1 - p'): thompson_dependent(np.zeros((1, 3), int), np.zeros((1, 3), int), 9, None)


def test_dependent_regret_checks_its_arguments():
    assert dependent_regret(1, [.1, .9]) == pytest.approx(.4)  # one pull is a guess
    for wrong in (([1.1],), ([.1, .9], [.5, .4]), ([.1, .9], [1])):
        with raises('give as many weights as chances'): dependent_regret(9, *wrong)
    with raises('n=-1 is not a positive integer'): dependent_regret(-1)


def test_one_step_of_an_mdp():
    family, edge = TabularMDP(states=3, actions=2, horizon=4), np.float32(1 - 2**-24)  # the largest noise that there is
    fixed = {'mean_reward': np.tile(np.float32([[5, 7]]), (2, 3, 1)), 'transition': np.tile(np.float32([0, .25, .75]), (2, 3, 2, 1))}
    fixed['transition'][1] = [.5, .5, 0]
    ready = family.prepare(fixed)
    for noise, there in ((np.float32(2**-24), [1, 0]), (np.float32(.2499), [1, 0]), (np.float32(.2501), [2, 0]), (edge, [2, 1])):
        state, reward, over = family.step(family.reset(ready, np.zeros((2, 0))), np.array([0, 1]), ready, np.tile(np.float32([noise, .5]), (2, 1)))
        assert state[:, 0].tolist() == there and state[:, 1].tolist() == [1, 1] and not over.any()  # never a state with chance 0
        np.testing.assert_allclose(reward, [5, 7], atol=1e-6)
    assert family.observe(state, ready).tolist() == [[0, 0, 1], [0, 1, 0]] and reward.dtype == np.float32
    np.testing.assert_allclose(family.step(state, np.array([0, 0]), ready, np.float32([[.5, stats.norm.cdf(-2)]] * 2))[1], [3, 3], atol=1e-5)
    assert family.step(np.array([[0, 3], [0, 2]]), np.array([0, 0]), ready, np.float32([[.5, .5]] * 2))[2].tolist() == [True, False]


def test_wrong_mdps_are_named():
    record = {'mean_reward': np.zeros((3, 2)), 'transition': np.full((3, 2, 3), 1 / 3)}
    wrong, small = record | {'transition': np.full((3, 2, 3), .3)}, TabularMDP(3, 2)
    with raises(r'tasks \[1, 2\] break a rule of their family: transition\[s, a\] is a distribution'):
        EnvBatch(EnvConfig(MDP, 3, options={'states': 3, 'actions': 2}), [record, wrong, wrong])
    other = [wrong, record | {'mean_reward': np.full((3, 2), np.inf)}, record | {'transition': np.tile([2., -1, 0], (3, 2, 1))}, {'mean_reward': np.zeros((2, 2)), 'transition': np.full((2, 2, 2), .5)}]
    assert [small.in_distribution(task) for task in (record, *other)] == [True, *[False] * 4]
    with raises('states=10, actions=0, horizon=10: all must be integers >= 1'): TabularMDP(actions=0)
    with raises('states=True'): TabularMDP(states=True)


def test_mdps_are_drawn_from_their_distribution():
    drawn = [TabularMDP().draw_task(stream(0, 'drawn', i)) for i in range(200)]
    assert stats.kstest(np.concatenate([task['mean_reward'].ravel() for task in drawn]), 'norm', (1, 1)).pvalue > 1e-4
    assert stats.kstest(np.concatenate([task['transition'][0, :, 0] for task in drawn]), stats.beta(1, 9).cdf).pvalue > 1e-4  # of one component of Dirichlet(1)
    config = EnvConfig(MDP, 500)
    env = EnvBatch(config)
    actions = stream(0, 'any').integers(5, size=(10, 500))
    obs, reward, terminated, truncated = play_actions(env, actions)
    assert (terminated.sum(0) == 1).all() and not truncated.any() and (obs[0].argmax(1) == 0).all()
    noise = reward - env.tasks['mean_reward'][np.arange(500), obs[:-1].argmax(-1), actions]
    assert stats.kstest(noise.ravel(), 'norm').pvalue > 1e-4


def test_oracle_follows_the_plan():
    env, again = (EnvBatch(EnvConfig(MDP, 50, 10)) for _ in range(2))
    _, plan = backward_induction(env.tasks['mean_reward'], env.tasks['transition'], 10)
    again.reset()
    rewards = [again.step(again.family.oracle(again.state, again.tasks))[1] for _ in range(10)]
    np.testing.assert_allclose(play_plan(env, plan)[2], np.stack(rewards, 1), atol=1e-6)
    with raises('time_limit=9 would cut an episode of 10 steps'): play_plan(EnvBatch(EnvConfig(MDP, 50, 9)), plan)


def test_first_mdps_do_not_depend_on_how_many_follow():
    many, few = (lambda: EnvBatch(EnvConfig(MDP, 60, 10))), (lambda: EnvBatch(EnvConfig(MDP, 3, 10)))
    for player in (psrl, myopic): np.testing.assert_array_equal(player(many(), 3)[:3], player(few(), 3))


def test_myopic_by_hand():
    "Actions pay -100, 200 and 300. A bonus of 500 makes the player try all three."
    class OneState(TabularMDP):
        def __init__(self): super().__init__(states=1, actions=3, horizon=5)
    register_family('OneState-v0')(OneState)
    try:
        one = lambda: EnvBatch(EnvConfig('OneState-v0', 1, 5), [{'mean_reward': np.array([[-100, 200, 300]], np.float32), 'transition': np.ones((1, 3, 1), np.float32)}])
        np.testing.assert_allclose(myopic(one(), 2), [[-100 + 4 * 200, 5 * 200]], atol=20)
        np.testing.assert_allclose(myopic(one(), 1, bonus=500), [[-100 + 200 + 3 * 300]], atol=20)
    finally: unregister_family('OneState-v0')


@pytest.mark.parametrize('c, prior', [(.5, 1.), (2, 0.)])
def test_myopic_is_the_player_with_a_dictionary(c, prior):
    config = EnvConfig(MDP, 3, 10)
    env, paid, returns = EnvBatch(config), {}, []
    for _ in range(20):
        obs, total = env.reset()[0], 0.
        for _ in range(10):
            state = int(obs[1].argmax())
            rewards = [paid.get((state, a), []) for a in range(5)]
            action = int(np.argmax([(prior + sum(r)) / (1 + len(r)) + c / (1 + len(r))**.5 for r in rewards]))
            obs, reward, *_ = env.step(np.full(3, action))
            paid.setdefault((state, action), []).append(float(reward[1]))
            total += float(reward[1])
        returns.append(total)
    np.testing.assert_allclose(myopic(EnvBatch(config), 20, c, prior)[1], returns, atol=1e-9)


def test_myopic_needs_whole_episodes():
    with raises('time_limit=9 would cut an episode of 10 steps'): myopic(EnvBatch(EnvConfig(MDP, 3, 9)), 1)
    with raises('SAME_STEP would start'): myopic(EnvBatch(EnvConfig(MDP, 3, 10), autoreset_mode=AutoresetMode.SAME_STEP), 1)


def test_myopic_is_ahead_of_what_was_published_and_of_psrl():
    mdps = lambda: EnvBatch(EnvConfig(MDP, 1000, 10))
    near, sampled = myopic(mdps(), 100, 1.), psrl(mdps(), 100)
    total = near[:, :10].sum(1)
    assert total.mean() > 156.2 + 3 * error(total) and near.sum(1).mean() > sampled.sum(1).mean()
