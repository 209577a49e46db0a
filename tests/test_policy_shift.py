"A policy under shift: derivatives, the filter against exact numbers, what is recovered, what stays as it was, and what is refused."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch.func import jacrev, vmap

from ssm_metarl.calibration import HYPOTHESES, CalibrationBank, Gate, alarm_scores, calibrate, compare_modes, kalman_update, play_calibrated, shift_scores
from ssm_metarl.envs import sample_tasks
from ssm_metarl.policy_shift import CART_POLE, SHIFTS, ForwardModel, Prior, Shift, Streams, collect_source, episode_length, play, train_forward
from ssm_metarl.studies import shift_table

RESULTS = Path(__file__).parents[1] / 'benchmarks' / 'results'


class Balancer:
    "A linear controller that balances all cart-poles of the family; it needs no training and no memory."
    weights = torch.tensor([.1, .3, 3., .6])

    def initial_state(self, *shape): return torch.zeros(*shape, 1)

    def stepper(self):
        def step(obs, state):
            push = 20 * obs @ self.weights
            return dict(logits=torch.stack([-push, push], -1)), state
        return step


@pytest.fixture(scope='module')
def source():
    "A controller with its forward model and calibration."
    with torch.random.fork_rng(): data = collect_source(Balancer(), sample_tasks(CART_POLE, 64), 150, seed=1)
    model, prior = train_forward(data, steps=1500)
    return model, prior, calibrate(Balancer(), model, prior, sample_tasks(CART_POLE, 150, 'validation'), T=300)


def random_model(seed=1):
    torch.manual_seed(seed)
    model = ForwardModel(seed=seed).double()
    for x in (model.L, model.b1, model.b2, model.b3): x.data.normal_()
    model.scale.uniform_(.5, 2), model.unit.uniform_(.5, 2)
    return model


def test_derivatives_of_the_forward_model():
    model, n = random_model(), 5
    o, u, z = torch.randn(n, 4).double(), torch.randn(n).double(), torch.randn(n, 6).double()
    after, *slopes = model.with_jacobian(o, u, z)
    assert torch.allclose(after, model(o, u, z), atol=1e-14)
    for i, slope in enumerate(slopes):
        assert torch.allclose(slope, vmap(jacrev(lambda *x: model(*x), i))(o, u, z), atol=1e-12)


def test_forward_model_is_affine_in_action_and_context():
    model = random_model()
    o, z, y = torch.randn(4).double(), torch.randn(6).double(), torch.randn(6).double()
    f = lambda u, z: model(o, torch.tensor(u).double(), z).detach()
    assert torch.allclose(f(.5, z), (f(0., z) + f(1., z)) / 2, atol=1e-12)
    assert torch.allclose(f(1., .3 * z + .7 * y), .3 * f(1., z) + .7 * f(1., y), atol=1e-12)


def test_update_is_conditioning_of_a_gaussian():
    "Against the textbook's conditional distribution of the joint one, and against regression with all data at once."
    torch.manual_seed(0)
    B = torch.randn(5, 5).double()
    P, x, A, R, y = B @ B.T, torch.randn(5).double(), torch.randn(2, 5).double(), torch.tensor([.3, .7]).double(), torch.randn(2).double()
    precision = torch.linalg.inv(P) + A.T @ torch.diag(1 / R) @ A  # information form
    cov = torch.linalg.inv(precision)
    mean = cov @ (torch.linalg.solve(P, x) + A.T @ (y / R))
    found, spread = kalman_update(x, P, y - A @ x, A, R)
    assert torch.allclose(found, mean, atol=1e-10) and torch.allclose(spread, cov, atol=1e-10)


class Linear(torch.nn.Module):
    "o' = F o + b u + B z, behind the interface of a forward model."
    z_dim = 2

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        self.F, self.b, self.B = .9 * torch.eye(3).double() + .1 * draw(3, 3), draw(3), draw(3, 2)
        self.scale, self.unit = torch.ones(3).double(), torch.ones(3).double()

    def with_jacobian(self, o, u, z):
        n = len(o)
        after = o @ self.F.T + u[:, None] * self.b + z @ self.B.T
        return after, self.F.expand(n, 3, 3), self.b.expand(n, 3), self.B.expand(n, 3, 2)


def test_filter_is_exact_where_the_world_is_linear():
    "The belief after ten steps against one regression on the joint Gaussian of everything that was drawn."
    model, T = Linear(), 10
    prior = Prior(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.tensor([.1, .2, .3]), torch.ones(3))
    q = torch.tensor([1e-4, 2e-4, 3e-4]).double()
    only = HYPOTHESES | dict(offset=HYPOTHESES['offset']._replace(noisy=False, motor=True))
    bank = CalibrationBank(model, prior, 1, q, only)
    rng = np.random.default_rng(0)
    u, y = rng.choice([-1., 1.], (T, 1)), rng.normal(size=(T + 1, 1, 3))
    bank.begin(y[0], np.ones(1, bool))
    for t in range(T):
        bank.predict(u[t])
        bank.observe(y[t + 1])
    # everything is a linear function of independent numbers: o_0, wandering o, c, g, z (and their wandering)
    D, O = 3 + 3 + 1 + 2, 3
    wander = bank.wander[bank.names.index('offset'), 0].numpy()
    start = np.r_[[.1, .2, .3], bank.offset_sd**2 * np.ones(3), bank.gain_sd**2, 1, 1]
    joint, mean = np.zeros(((T + 1) * D, (T + 1) * D)), np.zeros((T + 1) * D)
    mean[6] = 1.  # the gain
    joint[:D, :D] = np.diag(start)
    for t in range(T):
        step = np.eye(D)
        step[:O, :O], step[:O, 6], step[:O, 7:] = model.F.numpy(), u[t, 0] * model.b.numpy(), model.B.numpy()
        a, b = slice(t * D, (t + 1) * D), slice((t + 1) * D, (t + 2) * D)
        mean[b], joint[b] = step @ mean[a], step @ joint[a]
        joint[:, b] = joint[b].T
        joint[b, b] = step @ joint[a, a] @ step.T + np.diag(wander)
    see = np.kron(np.eye(T + 1), np.hstack([np.eye(O), np.eye(O), np.zeros((O, 3))]))
    noise = np.tile(.1 * bank.kappa * q.numpy(), T + 1)
    gain = joint @ see.T @ np.linalg.inv(see @ joint @ see.T + np.diag(noise))
    exact, spread = mean + gain @ (y.reshape(-1) - see @ mean), joint - gain @ see @ joint
    h = bank.names.index('offset')
    assert np.allclose(bank.x[h, 0].numpy(), exact[-D:], atol=1e-8)
    assert np.allclose(bank.P[h, 0].numpy(), spread[-D:, -D:], atol=1e-8)


def test_offset_and_gain_are_recovered(source):
    "The offset of the sensor that errs, in the middle of eight streams within 0.01 rad, rad/s or m/s (of the position 0.1 m), and the sign of a motor."
    model, prior, calibration = source
    names = [name for name in SHIFTS if 'bias' in name and 'strong' in name] + ['reversed motor, strong']
    tasks, n = sample_tasks(CART_POLE, 8, 'held_out'), 8
    streams = Streams(tasks * len(names), [SHIFTS[k] for k in names for _ in tasks], 3)
    bank = CalibrationBank(model, prior, streams.N, calibration.q)
    play_calibrated(Balancer(), bank, streams, 400, Gate(bank, calibration, ['gated'] * streams.N))
    error = np.abs(bank.x[bank.names.index('offset'), :, bank.c].numpy() - streams.bias).reshape(len(names), n, 4)[:4]
    for i, within in enumerate((.1, .01, .01, .01)): assert np.median(error[i, :, i]) < within, (names[i], error[i])
    gain = bank.x[bank.names.index('reversed'), -n:, bank.g]
    assert (gain < 0).all()


def test_offsets_help_the_controller(source):
    model, prior, calibration = source
    rows = compare_modes(Balancer(), lambda N: CalibrationBank(model, prior, N, calibration.q), calibration,
                         sample_tasks(CART_POLE, 8, 'held_out'), ['angular velocity bias, strong', 'reversed motor, strong'], T=600)
    none, _, gated, none_reversed, _, reversed_ = (np.mean(row['late']) for row in rows)
    assert gated > 3 * none and reversed_ > 5 * none_reversed


def test_a_closed_gate_changes_nothing(source):
    "While no alarm rings, actions are those of the policy alone, bit by bit."
    model, prior, calibration = source
    deaf = replace(calibration, thresholds={k: torch.full_like(v, torch.inf) for k, v in calibration.thresholds.items()})
    names, tasks = ['none', 'angle bias, strong', 'sensor noise, strong', 'reversed motor, strong'], sample_tasks(CART_POLE, 3, 'held_out')
    def streams(): return Streams(tasks * len(names), [SHIFTS[k] for k in names for _ in tasks], 5)
    bank = CalibrationBank(model, prior, 12, calibration.q)
    gated, applied = play_calibrated(Balancer(), bank, streams(), 200, Gate(bank, deaf, ['gated'] * 12))
    assert np.array_equal(gated, play(Balancer(), streams(), 200)) and not applied.any()


def test_noise_leaves_observations_as_they_are(source):
    "Streams that follow 'noisy' are those of the policy alone."
    model, prior, calibration = source
    rows = compare_modes(Balancer(), lambda N: CalibrationBank(model, prior, N, calibration.q), calibration,
                         sample_tasks(CART_POLE, 8, 'held_out'), ['sensor noise, strong'], T=300)
    none, _, gated = rows
    assert gated['rung'] == 1
    if gated['applied']['offset'] + gated['applied']['reversed'] == 0: assert none['whole'] == gated['whole']


def test_false_alarms_at_home(source):
    "New streams at home ring at most at the stated rate, up to the luck of a binomial."
    model, prior, calibration = source
    n = 100
    bank = CalibrationBank(model, prior, n, calibration.q)
    gate = Gate(bank, calibration, ['gated'] * n)
    streams = Streams(sample_tasks(CART_POLE, n, 'held_out', step=7), [SHIFTS['none']] * n, 9)
    play_calibrated(Balancer(), bank, streams, 300, gate)
    assert int(gate.rung.sum()) <= scipy.stats.binom.ppf(.999, n, .05)


def test_unguarded_and_none(source):
    model, prior, calibration = source
    bank = CalibrationBank(model, prior, 2, calibration.q)
    streams = Streams(sample_tasks(CART_POLE, 1) * 2, [SHIFTS['angle bias, strong']] * 2, 4, [0, 0])
    _, applied = play_calibrated(Balancer(), bank, streams, 60, Gate(bank, calibration, ['none', 'unguarded']))
    assert not applied[:, 0].any() and applied[20:, 1].all() and not applied[:5].any()


def test_streams_of_one_key_share_their_luck():
    tasks = sample_tasks(CART_POLE, 1) * 3
    streams = Streams(tasks, [SHIFTS['sensor noise, strong'], SHIFTS['angle bias, mild'], SHIFTS['sensor noise, strong']], 0, [4, 4, 4])
    seen = streams.reset()
    for _ in range(60):
        assert np.array_equal(seen[0], seen[2])
        after, over, seen = streams.step(np.array([0, 0, 0]))
    assert abs(streams.bias[1, 2]) == .1 and not streams.bias[[0, 2]].any()


def test_shifts_change_what_they_say():
    task, rng = sample_tasks(CART_POLE, 1)[0], np.random.default_rng(0)
    assert SHIFTS['none'].moved(task, rng) == task
    assert SHIFTS['reversed motor, mild'].moved(task, rng)['force'] == np.float32(-.5 * task['force'])
    assert 3 <= SHIFTS['long pole, strong'].moved(task, rng)['length'] <= 4
    assert episode_length(np.array([[0, 1], [0, 1], [0, 0], [0, 0]], bool), 3).tolist() == [3, 2]


def test_last_observation_and_first_one():
    "`step` shows the end of an episode, and then the start of the next one."
    streams = Streams(sample_tasks(CART_POLE, 1), [Shift()], 0)
    streams.reset()
    for _ in range(100):
        after, over, seen = streams.step(np.array([1]))
        if over[0]: break
        assert np.array_equal(after, seen)
    assert abs(after[0, 2]) > .2 and abs(seen).max() <= .05


def test_measurement_of_a_seed():
    "All shifts and modes, in plain values, and the same ones a second time."
    measure = lambda: shift_scores(3, n=1, validation=150, T=30, steps=20, train=lambda seed: Balancer())
    rows = measure()
    assert [(row['shift'], row['mode']) for row in rows] == [(shift, mode) for shift in SHIFTS for mode in Gate.modes]
    for row in rows:
        assert sum(row['applied'].values()) == pytest.approx(1) and len(row['late']) == len(row['whole']) == 1
        if row['mode'] == 'none': assert row['applied']['source'] == 1
    assert json.dumps(rows) == json.dumps(measure())


@pytest.mark.parametrize('call, message', [
    (lambda s: Streams(sample_tasks(CART_POLE, 2), [Shift()], 0), '2 tasks, 1 shifts and 2 keys; give one of each'),
    (lambda s: CalibrationBank(*s[:2], 3, torch.zeros(4)), 'is not 4 positive numbers'),
    (lambda s: CalibrationBank(*s[:2], 3, torch.ones(3)), 'is not 4 positive numbers'),
    (lambda s: CalibrationBank(*s[:2], 3, hypotheses={'source': HYPOTHESES['source']}), "give ['source', 'noisy', 'offset', 'reversed']"),
    (lambda s: Gate(CalibrationBank(*s[:2], 2), s[2], ['gated']), '1 modes for 2 streams'),
    (lambda s: Gate(CalibrationBank(*s[:2], 1), s[2], ['open']), "mode='open' is not one of 'none', 'unguarded', 'gated'"),
    (lambda s: calibrate(Balancer(), *s[:2], sample_tasks(CART_POLE, 10, 'validation'), T=20), 'tasks; rate=0.05 needs at least'),
    (lambda s: compare_modes(Balancer(), None, s[2], [], ['none']), 'no tasks'),
    (lambda s: compare_modes(Balancer(), None, s[2], sample_tasks(CART_POLE, 1), ['hail']), "'hail' is not one of 'none', 'position bias, mild'"),
])
def test_what_is_refused(source, call, message):
    with pytest.raises(ValueError) as error: call(source)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.fixture(scope='module')
def table():
    rows = json.loads((RESULTS / 'cartpole-shift.json').read_text(encoding='utf-8'))['table']
    return {(row['shift'], row['mode']): row for row in rows}


def test_committed_table_is_that_of_its_rows(table):
    measured = [json.loads(path.read_text(encoding='utf-8')) for path in (RESULTS / 'rows' / 'cartpole-shift').glob('*.json')]
    assert sorted(m['seed'] for m in measured) == list(range(10, 15))
    again = json.loads(json.dumps(shift_table(measured)))
    assert {(row['shift'], row['mode']): row for row in again} == table


def test_what_the_table_has_to_show(table):
    "Never worse than without adaptation by more than 3 %, a fifth better on eight shifts, reversed motors ten times better, few false alarms."
    gated = {shift: row for (shift, mode), row in table.items() if mode == 'gated'}
    assert min(row['ratio'] for row in gated.values()) > .97
    assert sum(row['ratio'] > 1.2 for row in gated.values()) >= 8
    for size in ('mild', 'strong'): assert gated[f'reversed motor, {size}']['ratio_ci95'][0] > 10
    assert gated['none']['rung'] <= scipy.stats.binom.ppf(.999, 80, .05) / 80
    for shift, row in gated.items():
        if 'bias' in shift or 'reversed' in shift: assert row['rung'] > .95, shift


def test_alarm_hears_a_world_that_its_filter_explains(source):
    "Motors with a thirtieth of the force: no prediction needs to be wrong, but the carts hardly move."
    model, prior, calibration = source
    tasks = sample_tasks(CART_POLE, 8, 'held_out')
    bank = CalibrationBank(model, prior, 8, calibration.q)
    gate = Gate(bank, calibration, ['gated'] * 8)
    play_calibrated(Balancer(), bank, Streams(tasks, [Shift(field='force', factor=1 / 30)] * 8, 1), 200, gate)
    ratio = (alarm_scores(bank)['changes'] / calibration.thresholds['changes']).amax(1)
    assert (ratio > 1).all() and gate.rung.all()
    expected = 2 * np.log(1 / 30)  # of squares
    assert bank.evidence.change_sizes[:, 1].median() < expected / 2
