"Intervals: what they resample, what they cover, and that other people's software finds the same."

import numpy as np
import pytest
from scipy import stats

from ssm_metarl.evaluation import compare, interval_over, iqm, nested_interval, seed_intervals, stratified_interval, t_interval


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
