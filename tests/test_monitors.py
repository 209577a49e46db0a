"Alarms of `monitors`: false ones at the rate that was stated, on source streams of any kind; shifts of MetaCartPole-v0 that must be seen."
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssm_metarl.monitors import (
    FeatureMonitor, Moments, Monitors, check_features, choose, conformal_threshold, described,
    distance_from, halves, is_categorical, per_task, predictions, shift_distances,
    shrunk_covariance, softmax_entropy, stream_batches, task_mean, uncertainty)

sys.path.insert(0, str(Path(__file__).parent.parent / 'benchmarks'))
import drift  # noqa: E402

torch.set_num_threads(1)
settings.register_profile('monitors', max_examples=20, deadline=None, derandomize=True)
settings.load_profile('monitors')


def random(seed, *shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heavy_streams(seed, S, T=6, n=3, d=2):
    "Nothing normal: own means, dependent steps, heavy tails, missing samples."
    own, noise = random(seed, S, 1, 1, d)**3, random(seed + 1, S, T, n, d)
    x = own + noise.cumsum(1) / noise.abs().clamp(min=.05)
    return x, random(seed + 2, S, T, n) > -1


def alarmed(monitor, x, mask):
    monitor.forget()
    for t in range(x.shape[1]): monitor.update(x[:, t], mask[:, t])
    return monitor.raised


def test_outputs_of_many_kinds():
    assert softmax_entropy(torch.zeros(3, 5)).tolist() == pytest.approx([math.log(5)] * 3)
    assert is_categorical(dict(logits=1)) and not is_categorical(dict(mean=1, log_std=1))
    assert described(torch.zeros(2)) == 'a tensor torch.float32 [2]'
    assert described(dict(b=1, a=2)) == "a mapping with ['a', 'b']" and described(3.) == 'a float'
    logits = torch.zeros(2, 5)
    assert list(predictions(logits)) == ['logits']
    for odd in (torch.zeros(2), torch.zeros(2, 1), logits.long(), torch.zeros(2, 5, 4, 4), (logits,), dict(out=logits)):
        with pytest.raises(ValueError, match='write an fwd_fn'): predictions(odd)


def one(*logits): return dict(logits=torch.tensor([logits]))


def gaussian(mean, log_std=0.): return dict(mean=torch.tensor([[mean]]), log_std=torch.tensor([[log_std]]))


@pytest.mark.parametrize('members, expected', [
    ([one(40., -40.), one(-40., 40.)], (math.log(2), math.log(2), .5, .5, .5, 1)),  # sure of opposite things: all of it is epistemic
    ([one(0., 0.), one(0., 0.)], (math.log(2), 0, .5, 0, .5, 1)),  # both toss a coin: none of it is
    ([one(0., 0.)], (math.log(2), None, .5, None, .5, 1)),  # alone: there is no such thing
    ([gaussian(0.), gaussian(4.)], (math.log(2 * math.pi * math.e * 5) / 2, None, 5, 4, None, None)),
    ([gaussian(4.)], (math.log(2 * math.pi * math.e) / 2, None, 1, None, None, None))])
def test_uncertainty_by_hand(members, expected):
    report = uncertainty(members)
    names = 'entropy', 'mutual_information', 'variance', 'epistemic_variance', 'confidence', 'entropy_normalised'
    for name, value in zip(names, expected):
        if value is None: assert report[name] is None, name
        else: assert report[name].item() == pytest.approx(value, abs=1e-6), name


@given(st.integers(0, 1000), st.integers(2, 5), st.integers(2, 6))
def test_mutual_information_is_the_mean_divergence_from_the_mean(seed, S, K):
    logits = 3 * random(seed, S, 7, K)
    p = logits.softmax(-1).numpy()
    expected = stats.entropy(p, p.mean(0, keepdims=True), axis=-1).mean(0)
    np.testing.assert_allclose(uncertainty([dict(logits=x) for x in logits])['mutual_information'], expected, atol=1e-9)


def test_how_far_predictions_moved():
    moved = distance_from(one(40., -40.), one(-40., 40.))
    assert [moved[k].item() for k in ('kl_to_source', 'jensen_shannon', 'label_flips')] == pytest.approx([80, math.log(2), 1], rel=1e-4)
    moved = distance_from(gaussian(4.), gaussian(0.))
    assert moved['kl_to_source'].item() == pytest.approx(8) and moved['jensen_shannon'] is moved['label_flips'] is None


def test_rows_of_tasks_and_masks():
    assert per_task(torch.tensor([1., 2.]), torch.zeros(2, 3, 1)).shape == (2, 1, 1)
    picked = choose(torch.tensor([True, False]), {'w': torch.ones(2, 3)}, {'w': torch.zeros(2, 3)})
    assert picked['w'].sum(1).tolist() == [3, 0]
    x, mask = torch.tensor([[1., 3., 99.], [5., 99., 99.]]), torch.tensor([[True, True, False], [True, False, False]])
    assert task_mean(x, {'mask': mask}, stacked=True).tolist() == [2., 5.]
    assert task_mean(x, {'mask': mask}, stacked=False).tolist() == [3.]
    assert task_mean(x, None, stacked=True).tolist() == pytest.approx([103 / 3, 203 / 3])


def test_moments_by_hand_and_tasks_without_a_sample():
    "Values 0, then 3, decay 1/2: weights 1/4 and 1/2, so the mean is 1.5 / 0.75, worth 0.75^2 / (1/16 + 1/4) samples."
    moments, on = Moments(.5), torch.ones(1, 1, dtype=torch.bool)
    for v in (0., 3.): moments.update(torch.full((1, 1, 1), v), on)
    assert [moments.mean.item(), moments.var.item(), moments.samples.item(), moments.batches.item()] == pytest.approx([2, 2, 1.8, 2])
    before = moments.sums
    moments.update(torch.full((1, 1, 1), math.nan), ~on)
    assert all(torch.equal(v, before[k]) for k, v in moments.sums.items())


def test_batches_of_streams():
    assert stream_batches(torch.arange(8.).view(1, 2, 4), 2).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    assert stream_batches(torch.zeros(3, 2, 6, 5), 3).shape == (3, 2, 6, 5)


def test_halves_and_covariance():
    assert torch.cat(halves(7)).sort().values.tolist() == list(range(7)) and list(map(len, halves(7))) == [3, 4]
    x = random(0, 4, 4)
    assert shrunk_covariance(x)[0, 1].item() == pytest.approx(np.cov(x.T.numpy())[0, 1] * 4 / (4 + 4))
    with pytest.raises(ValueError, match='x has 1 sample; a covariance needs two'): shrunk_covariance(x[:1])
    with pytest.raises(ValueError, match='features are a ndarray; give a tensor'): check_features(np.zeros((2, 3)))


@given(st.integers(1, 200), st.floats(.01, .99))
def test_the_threshold_is_the_smallest_that_keeps_the_rate(n, rate):
    "One more score is equally likely in each of n + 1 places, so a threshold of rank r is passed with probability (n + 1 - r) / (n + 1)."
    scores = torch.from_numpy(np.random.default_rng(n).permutation(n) + 1.)  # rank r is the number r
    allowed = [r for r in range(1, n + 1) if (n + 1 - r) / (n + 1) <= rate + 1e-12]
    if not allowed:
        with pytest.raises(ValueError, match='needs at least'): conformal_threshold(scores, rate)
    else: assert conformal_threshold(scores, rate).item() == allowed[0]


@pytest.mark.parametrize('n', [6, 19, 48, 97])
def test_the_fewest_scores_that_allow_a_rate(n):
    "The largest of them is the threshold, whatever the rounding of 1 / (n + 1)."
    assert conformal_threshold(torch.arange(float(n)), 1 / (n + 1)).item() == n - 1


def test_p_values_are_uniform_for_independent_samples():
    monitor = FeatureMonitor(.95)
    monitor.calibrate(random(0, 20_000, 8) @ random(1, 8, 8))
    for t in range(100): monitor.moments.update(random(2 + t, 1000, 4, 8) @ random(1, 8, 8), torch.ones(1000, 4, dtype=torch.bool))
    p = shift_distances(monitor.moments, monitor.source)['shift_p'].numpy()
    assert stats.kstest(p, 'uniform').pvalue > .001


def test_a_state_is_put_back():
    monitors, other = Monitors(.9, stacked=True), Monitors(.9, stacked=True)
    outputs, mask = dict(logits=torch.zeros(2, 3, 5)), torch.tensor([[True, True, False], [True, False, False]])
    report = monitors.observe(outputs, {'mask': mask}, torch.ones(2, 3, 4), None)
    assert report['entropy'].tolist() == pytest.approx([math.log(5)] * 2) and report['mutual_information'] is None and 'mahalanobis' not in report
    assert monitors.features.moments.samples.tolist() == pytest.approx([2, 1])
    other.put(monitors.state())
    assert other.state() == monitors.state()
    with pytest.raises(ValueError, match='those of 3 tasks, and those before of 2'): other.observe(dict(logits=torch.zeros(3, 3, 5)), {}, None, None)


@pytest.mark.parametrize('rate', [.05, .2])
@pytest.mark.parametrize('decay', [0., .9])
def test_false_alarms_have_the_stated_rate_whatever_the_distribution(rate, decay):
    "Over many calibrations, each with few streams: the rate may be neither above the stated one nor much below, up to the noise of the mean."
    rates = []
    for seed in range(40):
        monitor = FeatureMonitor(decay)
        monitor.calibrate(*heavy_streams(1000 * seed, 80), false_alarms=rate)
        rates.append(alarmed(monitor, *heavy_streams(1000 * seed + 500, 300)).double().mean().item())
    expected = 1 - math.ceil(41 * (1 - rate)) / 41  # 40 streams set the threshold
    assert expected <= rate and abs(np.mean(rates) - expected) < 4 * np.std(rates) / 40**.5


@given(st.integers(0, 10_000), st.floats(0, .95), st.integers(1, 4))
def test_the_score_is_a_distance_from_streams_of_the_same_age(seed, decay, age):
    x, mask = random(seed, 20, 5, 1, 3), torch.ones(20, 5, 1, dtype=torch.bool)
    monitor = FeatureMonitor(decay)
    monitor.calibrate(x, mask, false_alarms=.3)
    for t in range(age): monitor.update(x[:, t], mask[:, t])
    weights = np.array([(decay or 1e-300)**(age - 1 - t) for t in range(age)])
    means = np.average(x[:, :age, 0].numpy(), axis=1, weights=weights)
    half = means[halves(20)[0]]
    inverse, delta = np.linalg.inv(shrunk_covariance(torch.from_numpy(half)).numpy()), means - half.mean(0)
    np.testing.assert_allclose(monitor.score(), np.sqrt(np.einsum('si,ij,sj->s', delta, inverse, delta)), rtol=1e-6)


def test_batches_without_a_sample_do_not_age_a_stream_and_an_alarm_stays():
    monitor = FeatureMonitor(.5)
    monitor.calibrate(random(0, 40, 5, 2, 3), false_alarms=.2)
    x, on = random(1, 2, 2, 3) + torch.tensor([0., 1e4]).view(2, 1, 1), torch.ones(2, 2, dtype=torch.bool)
    monitor.update(x, on)
    score = monitor.score()
    monitor.update(x * math.nan, ~on)
    assert torch.equal(monitor.score(), score) and monitor.raised.tolist() == [False, True]
    for t in range(50): monitor.update(random(2 + t, 2, 2, 3) * .1, on)
    assert monitor.raised[1] and monitor.score()[1] < score[1]
    monitor.forget()
    assert monitor.raised is None and monitor.shift() == {}


ORDERS = dict(sorted=lambda x: x.argsort(), outer_first=lambda x: x.abs().argsort(descending=True), inner_first=lambda x: x.abs().argsort(), alternating=lambda x: x.abs().argsort().view(2, -1).T.flatten())


@pytest.mark.parametrize('order', ORDERS)
def test_the_order_of_source_streams_does_not_matter(order):
    "A sweep over what makes streams differ, in several orders; the streams to come are drawn from it at random."
    sweep, monitor = torch.linspace(-3, 3, 400, dtype=torch.float64), FeatureMonitor(.9)
    make = lambda own, seed: own.view(-1, 1, 1, 1) + .1 * random(seed, len(own), 6, 2, 2)
    monitor.calibrate(make(sweep[ORDERS[order](sweep)], 1), false_alarms=.05)
    home = make(sweep[torch.randint(400, (2000,), generator=torch.Generator().manual_seed(0))], 2)
    assert .02 < alarmed(monitor, home, torch.ones(home.shape[:3], dtype=torch.bool)).double().mean() < .08


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_do_not_count_in_a_calibration(value):
    x, mask, spoilt, masked = *heavy_streams(0, 80), FeatureMonitor(.9), FeatureMonitor(.9)
    holes = (random(5, *mask.shape) > 1) & (torch.arange(3) > 0)  # never all samples of a batch
    mask[..., 0] = True
    spoilt.calibrate(torch.where(holes.unsqueeze(-1), value, x), mask, .1)
    masked.calibrate(x, mask & ~holes, .1)
    for k, v in masked.source.items(): assert torch.equal(spoilt.source[k], v)
    plain = FeatureMonitor(.9)
    plain.calibrate(torch.where(holes.unsqueeze(-1), value, x), mask)
    assert torch.equal(plain.source['mean'], x[mask & ~holes].mean(0))


@pytest.mark.parametrize('broken', [1, 20])
def test_source_streams_that_fall_silent_count_as_alarms(broken):
    "Few of them raise the threshold, as many as make it infinite are refused, and then nothing has changed."
    x, monitor = random(0, 80, 4, 2, 3), FeatureMonitor(.9)
    monitor.calibrate(x, false_alarms=.1)
    monitor.update(x[:2, 0], torch.ones(2, 2, dtype=torch.bool))
    before, moments = monitor.source, monitor.moments
    x[halves(80)[1][:broken], 2] = math.nan
    if broken == 1:
        monitor.calibrate(x, false_alarms=.1)
        assert before['threshold'] <= monitor.source['threshold'] < math.inf
        return
    with pytest.raises(ValueError, match='threshold of the source would not be finite'): monitor.calibrate(x, false_alarms=.1)
    assert monitor.source is before and monitor.moments is moments


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_features_of_which_none_is_finite_raise_the_alarm(value):
    "From the first batch or later, in one task of a stack; samples that are not wanted, and a single bad one, do not."
    outputs, on = dict(logits=torch.zeros(3, 4, 2)), torch.tensor([True, True, False, False])
    for late in (False, True):
        monitors = Monitors(.9, stacked=True)
        monitors.features.calibrate(random(0, 80, 5, 4, 3), false_alarms=.1)
        if late: assert not monitors.observe(outputs, {'mask': on.expand(3, 4)}, random(1, 3, 4, 3) * .1, None)['shift_alarm'].any()
        x, mask = random(2, 3, 4, 3) * .1, on.repeat(3, 1)
        x[0, :2], x[1, 0, 0], x[2] = value, value, value
        mask[2] = False
        for _ in range(2): assert monitors.observe(outputs, {'mask': mask}, x, None)['shift_alarm'].tolist() == [True, False, False]
    quiet = Monitors(.9, stacked=True)  # no alarm without a threshold
    quiet.features.calibrate(random(0, 80, 3))
    assert 'shift_alarm' not in quiet.observe(outputs, None, x * value, None)
    single = Monitors(.9, stacked=False)
    single.features.calibrate(random(0, 80, 5, 4, 3), false_alarms=.1)
    assert single.observe(dict(logits=torch.zeros(4, 2)), None, torch.full((4, 3), value), None)['shift_alarm'].tolist() == [True]


def test_a_rate_expires_after_as_many_batches_as_source_streams_have():
    monitor, on = FeatureMonitor(.9), torch.ones(2, 3, dtype=torch.bool)
    monitor.calibrate(random(0, 80, 5, 3, 2), false_alarms=.1)
    for t in range(7):
        monitor.update(random(t, 2, 3, 2), on & torch.tensor([[True], [t != 5]]))
        assert monitor.shift()['shift_expired'].tolist() == [t > 4, t > 5]
    monitor.forget(), monitor.update(random(0, 2, 3, 2), on)
    assert not monitor.shift()['shift_expired'].any()


def test_calibrating_again_starts_afresh():
    monitor = FeatureMonitor(.9)
    for d in (2, 3):
        monitor.calibrate(random(0, 80, 5, 3, d), false_alarms=.1)
        assert monitor.raised is None and monitor.shift() == {}
        monitor.update(random(1, 4, 3, d) + 100, torch.ones(4, 3, dtype=torch.bool))
        assert monitor.raised.all()


@pytest.mark.parametrize('name', ['symmetric_kl', 'frechet', 'mahalanobis'])
def test_distances_of_gaussians(name):
    "Of diagonal Gaussians in closed form, and the symmetric KL by numerical integration."
    x, y = random(0, 4000, 2) * torch.tensor([1., 2.]), random(1, 1, 4000, 2) * torch.tensor([.5, 2.]) + torch.tensor([1., -1.])
    monitor = FeatureMonitor(0.)
    monitor.calibrate(x), monitor.update(y, torch.ones(1, 4000, dtype=torch.bool))
    m0, s0, m1, s1 = x.mean(0).numpy(), x.std(0).numpy(), y[0].mean(0).numpy(), y[0].std(0).numpy()
    grid = np.linspace(-30, 30, 200_001)
    kl = sum(np.trapezoid((p := stats.norm.pdf(grid, a, b)) * (stats.norm.logpdf(grid, a, b) - stats.norm.logpdf(grid, c, d)), grid) for i in range(2) for a, b, c, d in ((m0[i], s0[i], m1[i], s1[i]), (m1[i], s1[i], m0[i], s0[i])))
    expected = dict(symmetric_kl=kl, frechet=((m0 - m1)**2 + (s0 - s1)**2).sum(), mahalanobis=np.sqrt((m1 - m0) @ np.linalg.solve(np.cov(x.T.numpy()), m1 - m0)))
    assert monitor.shift()[name].item() == pytest.approx(expected[name], rel=2e-3)


def test_what_cannot_be_is_refused():
    monitor = FeatureMonitor(.9)
    for x, rate, words in ((torch.zeros(30, 4, 2, 3), .05, 'at least 38 streams'), (torch.zeros(40, 3), .1, 'needs'), (torch.zeros(40, 4, 2, 3), 1., 'not between 0 and 1'), (torch.zeros(1, 3), None, 'need two at least')):
        with pytest.raises(ValueError, match=words): monitor.calibrate(x, false_alarms=rate)
    mask = torch.zeros(40, 4, 2, dtype=torch.bool)
    mask[:3] = True
    with pytest.raises(ValueError, match='leave such streams out'): monitor.calibrate(random(0, 40, 4, 2, 3), mask, .2)
    with pytest.raises(ValueError, match='does not divide'): stream_batches(torch.zeros(1, 1, 5), 2)


def test_cart_poles():
    "False alarms on held-out source streams within a factor of 2 of the stated rate; power and delay for each shift that the family offers."
    seen = {}
    for row in drift.rows(river=False):
        if row['detector'] == 'score': seen[row['shift']] = row
    print(*seen.values(), sep='\n')
    assert drift.RATE / 2 <= seen['none']['power'] <= 2 * drift.RATE
    for shift, power, delay in (('long pole', .6, 60), ('sensor bias 0.1', .9, 40), ('sensor noise 0.03', .4, 150), ('sensor noise 0.1', .9, 40), ('reversed motor', .9, 30)):
        assert seen[shift]['power'] > power and seen[shift]['delay'] <= delay, shift
    for shift in ('strong gravity', 'sticky track'):  # not seen, and harmless
        assert seen[shift]['mean_return'] > 195
