"Intervals: what they resample, what they cover, and that other people's software finds the same; power; reference players and common noise."

from dataclasses import replace

import numpy as np
import pytest
from gymnasium import spaces
from scipy import stats

from ssm_metarl.envs import EnvConfig, Family, register_family, sample_tasks
from ssm_metarl.evaluation import (bootstrap_interval, compare, crossed_interval, evaluate_returns, expected_returns, interval_over, iqm, nested_interval, play,
                                   power_of_seeds, reference_returns, reference_row, seed_intervals, seeds_needed, stratified_interval, t_interval,
                                   variance_components)
from ssm_metarl.inner_loop import stack
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy


def seeds_and_tasks(S=5, M=40, skill=1.0, rng=0):  # returns [S, M], with tasks of its own for each seed
    rng = np.random.default_rng(rng)
    return rng.normal(0, skill, (S, 1)) + rng.normal(0, 2, (S, M))


def coverage(interval, S, experiments=200, M=30):
    bounds = np.array([interval(seeds_and_tasks(S, M, rng=[S, e])) for e in range(experiments)])
    return np.mean((bounds[:, 0] <= 0) & (0 <= bounds[:, 1]))


@pytest.mark.parametrize('S', [5, 10])
def test_the_default_covers_what_resampling_tasks_alone_does_not(S):
    nested = coverage(lambda x: nested_interval(x, np.mean, n_resamples=300), S)
    assert coverage(lambda x: stratified_interval(x, np.mean, n_resamples=300), S) < .65 < .78 < nested
    assert coverage(lambda x: t_interval(x.mean(1)), S) > .9


def test_nested_against_a_loop():
    x, rng = seeds_and_tasks(4, 7), np.random.default_rng(1)
    draws = []
    for _ in range(20_000):
        rows = x[rng.integers(4, size=4)]  # seeds first
        draws.append(iqm(np.concatenate([row[rng.integers(7, size=7)] for row in rows])))  # then tasks within each drawn seed
    np.testing.assert_allclose(nested_interval(x, n_resamples=20_000), np.quantile(draws, [.025, .975]), atol=.05)


def test_nested_of_one_seed_is_the_bootstrap_over_its_tasks():
    x = seeds_and_tasks(1, 50)
    np.testing.assert_allclose(nested_interval(x, np.mean, n_resamples=20_000), stratified_interval(x, np.mean), atol=.03)
    assert interval_over(1) == 'tasks of one training seed only' and 'seeds' in interval_over(5)
    assert seed_intervals(x)['t95'] == [None, None] and None not in seed_intervals(x)['ci95']


def test_single_values_have_no_interval_and_nothing_is_nan():
    assert seed_intervals([[3.]]) == dict(ci95=[None, None], t95=[None, None])
    assert None not in seed_intervals([[3.], [4.], [5.]])['ci95']  # one task of each seed: seeds and tasks vary together
    assert compare([0.], [1.])['improvement_ci95'] == [None, None]


def test_t_interval_against_scipy():
    x = np.array([1., 2., 4., 8.])
    np.testing.assert_allclose(t_interval(x), stats.ttest_1samp(x, 0).confidence_interval())
    assert t_interval([2., 2., 2.]) == (2., 2.) and np.isnan(t_interval([2.])).all()


def test_paired_differences_need_no_luck_in_common():
    tasks, rng = np.random.default_rng(0).normal(0, 10, (5, 100)), np.random.default_rng(1)
    a, b = tasks + 1 + rng.normal(0, 1, tasks.shape), tasks + rng.normal(0, 1, tasks.shape)
    low, high = nested_interval(a - b, np.mean)
    assert .5 < low < 1 < high < 1.5 and np.ptp(nested_interval(a, np.mean)) > 4 * (high - low)


@pytest.mark.parametrize('over_seeds', [False, True])
def test_equal_to_rliable(over_seeds):
    "Agarwal et al. arrange [runs, tasks] and resample runs within a task; with tasks in place of runs and seeds in place of tasks that is ours."
    library, metrics = pytest.importorskip('rliable.library'), pytest.importorskip('rliable.metrics')
    x = seeds_and_tasks(5, 40)
    assert iqm(x) == metrics.aggregate_iqm(x.T)
    np.random.seed(0)
    scores, theirs = library.get_interval_estimates({'ours': x.T}, lambda scores: np.array([metrics.aggregate_iqm(scores)]), task_bootstrap=over_seeds, reps=5000)
    assert scores['ours'] == iqm(x)
    ours = nested_interval(x, n_resamples=5000) if over_seeds else stratified_interval(x, n_resamples=5000)
    np.testing.assert_allclose(ours, theirs['ours'].ravel(), atol=.06)


def test_pooling_all_episodes_covers_even_less_than_strata():
    assert coverage(lambda x: bootstrap_interval(x.ravel(), n_resamples=300), 5) < .65 < .78 < coverage(lambda x: nested_interval(x, np.mean, n_resamples=300), 5)


def test_the_variance_of_nested_resamples_is_the_one_that_was_derived():
    x = seeds_and_tasks(40, 30)
    variance = (x.mean(1).var() + x.var(1).mean() / x.shape[1]) / len(x)  # draws with replacement divide by n
    np.testing.assert_allclose(np.ptp(nested_interval(x, np.mean, n_resamples=20_000)), 2 * 1.96 * variance**.5, rtol=.04)


def test_variance_components_find_those_of_a_world():
    np.testing.assert_allclose(variance_components(seeds_and_tasks(3000, 20, skill=1.5)), (1.5, 2), rtol=.05)
    between, within = variance_components(np.random.default_rng(0).normal(0, 2, (3000, 4)))  # seeds that do not differ
    assert between < .3 and abs(within - 2) < .05
    for shape in ((1, 5), (5, 1)):
        with pytest.raises(ValueError, match='at least two seeds and two tasks'): variance_components(np.zeros(shape))


# --- how many seeds ---

@pytest.mark.parametrize('size, seeds', [(.2, 199), (.5, 34), (.8, 15)])
def test_seeds_needed_are_those_of_gpower(size, seeds):  # two-sided paired t-test, alpha 5 %, power 80 %, in G*Power 3
    assert seeds_needed(size, 1.) == seeds_needed(10 * size, 10.) == seeds
    assert power_of_seeds(seeds - 1, size, 1.) < .8 <= power_of_seeds(seeds, size, 1.)


@pytest.mark.parametrize('S, size', [(3, 2.), (5, 1.), (12, .7)])
def test_power_is_how_often_the_interval_lies_above_zero(S, size):
    rng, n = np.random.default_rng(S), 4000
    found = np.mean([t_interval(row)[0] > 0 for row in rng.normal(size, 1, (n, S))])
    power = power_of_seeds(S, size, 1.)
    assert abs(found - power) < 4 * (power * (1 - power) / n)**.5


def test_what_the_calculator_refuses_is_one_line():
    for wrong in (lambda: power_of_seeds(1, 1., 1.), lambda: power_of_seeds(5, 0., 1.), lambda: power_of_seeds(5, 1., -1.), lambda: power_of_seeds(5, float('nan'), 1.),
                  lambda: power_of_seeds(5, 1., 1., 1.), lambda: seeds_needed(1., 1., 1.), lambda: seeds_needed(1., 1., 0.), lambda: seeds_needed(1e-4, 1.)):
        with pytest.raises(ValueError) as error: wrong()
        assert '\n' not in str(error.value)
    assert seeds_needed(1., 1e-9) == 2


# --- players, and the same luck for everyone ---

ENV = EnvConfig('MetaGymToy-v0', 1, 100)


def test_doing_nothing_costs_the_distance_to_the_goal_which_is_known():
    tasks = sample_tasks(ENV, 2000, 'held_out')
    found = reference_returns(tasks, ENV)
    np.testing.assert_allclose(found['nothing'], [-100 * np.hypot(*task['goal']) for task in tasks], atol=1e-3)
    exact = -100 * (2**.5 + np.arcsinh(1)) / 6  # mean distance from the centre of a unit square
    assert abs(found['nothing'].mean() - exact) < 4 * found['nothing'].std() / 2000**.5 and abs(exact + 38.26) < .005
    assert found['random'].mean() < exact < found['oracle'].mean() < 0
    assert reference_row(found) == {f'{name}_return': x.mean() for name, x in found.items()}


def test_neither_company_nor_copies_nor_chunks_change_a_score():
    policy, tasks = SSMMetaPolicy(ENV.family.observation_space, ENV.family.action_space, PolicyConfig(8, 4), seed=0), sample_tasks(ENV, 20, 'held_out')
    params = policy.get_params()
    returns, references = evaluate_returns(policy, params, tasks, ENV), reference_returns(tasks, ENV)
    assert np.array_equal(returns, evaluate_returns(policy, params, tasks, ENV))
    np.testing.assert_allclose(returns, evaluate_returns(policy, stack(params, 20), tasks, ENV), atol=1e-3)
    np.testing.assert_allclose(returns[12:], evaluate_returns(policy, params, tasks[12:], ENV, start=12), atol=1e-3)
    np.testing.assert_allclose(returns, expected_returns(policy, params, tasks, ENV, chunk=7), atol=1e-3)
    for name, x in reference_returns(tasks[12:], ENV, start=12).items(): assert np.array_equal(x, references[name][12:])


def test_expected_rewards_of_a_bandit_lack_only_the_luck():
    env = EnvConfig('MetaBandit-v0', 1, 20, seed=3, options={'arms': 3})
    policy, tasks = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(8, 4, history=True)), sample_tasks(env, 400, 'held_out')
    expected, real = expected_returns(policy, policy.get_params(), tasks, env, chunk=150), evaluate_returns(policy, policy.get_params(), tasks, env)
    assert np.array_equal(expected, expected_returns(policy, policy.get_params(), tasks, env))
    assert abs((expected - real).mean()) < 4 * (expected - real).std() / 20 and (expected - real).std() > .5


@register_family('Levers-v0')
class Levers(Family):
    "The reward is the action itself, in the environment's own units."
    observation_space, action_space = spaces.Box(-1, 1, (1,), np.float32), spaces.Discrete(2, start=5)
    def draw_task(self, rng): return {'any': np.float32(rng.random())}
    def reset(self, tasks, noise): return np.zeros((len(noise), 1), np.float32)
    def step(self, state, action, tasks, noise): return state, action.astype(np.float32), np.zeros(len(state), bool)
    def observe(self, state, tasks): return state
    def expected_reward(self, obs, action, tasks): return action


def test_a_family_is_asked_in_its_own_units():
    env = EnvConfig('Levers-v0', 1, 3)
    policy, tasks = SSMMetaPolicy(Levers.observation_space, Levers.action_space, PolicyConfig(8, 4)), sample_tasks(env, 5, 'held_out')
    found = expected_returns(policy, policy.get_params(), tasks, env)
    np.testing.assert_allclose(found, evaluate_returns(policy, policy.get_params(), tasks, env), atol=1e-5)
    assert (found >= 15).all()  # three pulls of 5 or 6


@register_family('Lottery-v0')
class Lottery(Family):
    "The reward is luck, drawn at reset; it pays the same for every action."
    observation_space, action_space, reset_noise = spaces.Box(-np.inf, np.inf, (1,), np.float32), spaces.Discrete(3), 1
    def draw_task(self, rng): return {'prize': np.float32(rng.uniform(1, 2))}
    def reset(self, tasks, noise): return noise
    def step(self, state, action, tasks, noise): return state, tasks['prize'] * state[:, 0], np.zeros(len(state), bool)
    def observe(self, state, tasks): return state
    def nothing(self, state, tasks): return np.zeros(len(state), int)
    def oracle(self, state, tasks): return np.full(len(state), 2)


@register_family('Unsolved-v0')
class Unsolved(Lottery):
    "A family that offers no oracle."
    oracle = Family.oracle


@pytest.mark.parametrize('episodes', [1, 3])
def test_policies_and_players_have_the_same_luck(episodes):
    env = EnvConfig('Lottery-v0', num_envs=1, time_limit=3, seed=5, episodes_per_trial=episodes)
    policy, tasks = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(8, 4), seed=0), sample_tasks(env, 6, 'held_out')
    found = reference_returns(tasks, env) | {'policy': evaluate_returns(policy, policy.get_params(), tasks, env)}
    assert list(found) == ['random', 'nothing', 'oracle', 'policy'] and np.ptp(found['oracle']) > 1
    for x in found.values(): np.testing.assert_allclose(x, found['oracle'], atol=1e-5)
    assert list(reference_returns(tasks, replace(env, env_name='Unsolved-v0'))) == ['random', 'nothing']


def test_players_walk_to_goals_that_can_be_checked_by_hand():
    tasks = [dict(goal=np.array(goal, np.float32)) for goal in ([.1, 0], [.2, 0], [0, 0])]  # one step away, two, none
    np.testing.assert_allclose(play(lambda env, t: env.family.oracle(env.state, env.tasks), tasks, ENV), [0, -.1, 0], atol=1e-6)
    np.testing.assert_allclose(play(lambda env, t: env.family.nothing(env.state, env.tasks), tasks, ENV), [-10, -20, 0], atol=1e-5)


def test_crossed_draws_whole_rows_and_columns():
    assert crossed_interval(np.full((3, 4), 2.)) == (2., 2.) and np.isnan(crossed_interval(np.zeros((1, 5)))).all()
    rows, columns = np.repeat([[0.], [100.]], 3, 1), np.repeat([[0., 100.]], 3, 0)
    assert crossed_interval(rows, np.mean) == crossed_interval(columns, np.mean) == (0., 100.)
