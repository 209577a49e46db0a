"Strategies on streams of a policy: memory, gate, guards and prototypes against other ways to compute them; the memory's inputs; the table."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from ssm_metarl.calibration import CalibrationBank, Gate, calibrate, play_calibrated
from ssm_metarl.control import CartPole
from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.policy_shift import CART_POLE, SHIFTS, Player, collect_source, play, train_forward
from ssm_metarl.rollout import collect, policy_inputs
from ssm_metarl.shift_strategies import MODES, SHIFT_VARIANTS, STREAM_STRATEGIES, MemoryPlayer, PrototypeSteps, ShiftedCartPole, StackPlayer, alarm_steps, make_learner, memory_rows, play_adapted, shifted_streams, source_windows, strategy_rows, stream_rows, train_memory
from ssm_metarl.studies import strategy_table

RESULTS = Path(__file__).parents[1] / 'benchmarks' / 'results'
NAMES = ['none', 'angle bias, mild', 'reversed motor, strong']


@pytest.fixture(scope='module')
def policy():
    "Weights that are large enough to make decisions of both kinds, with a memory that matters."
    family = CART_POLE.family
    policy = SSMMetaPolicy(family.observation_space, family.action_space, PolicyConfig(hidden_dim=16, state_dim=8), 3)
    with torch.no_grad(): policy.action.weight *= 20
    return policy


@pytest.fixture(scope='module')
def windows(policy): return source_windows(policy, sample_tasks(CART_POLE, 4), 2)


def streams(n=2): return shifted_streams(sample_tasks(CART_POLE, n, 'validation'), NAMES, 0)


def learner(policy, windows, name='tent, all weights', mode='unguarded', lr=.03, N=6):
    return make_learner(policy, STREAM_STRATEGIES[name]._replace(lr=lr), mode, N, windows)


def test_a_stack_plays_like_one_policy(policy):
    ends, share = play_adapted(policy, streams(), 200)
    assert (ends == play(policy, streams(), 200)).all() and not share.any() and ends.sum() > 10


def test_recomputed_memory_is_the_carried_one_if_the_weights_are_the_same(policy):
    "In parallel over the window against step by step."
    player, place = StackPlayer(policy, 6, every=30), streams()
    seen = place.reset()
    for t in range(90):
        _, over, seen = place.step(player.act(seen))
        player.cut(over)
        if (window := player.window()) is None: continue
        carried = player.memory.clone()
        player.recompute(window, torch.tensor([True] * 3 + [False] * 3))
        assert torch.equal(player.memory[3:], carried[3:])
        assert torch.allclose(player.memory, carried, atol=1e-5) and carried.abs().max() > .01


def test_windows_hold_what_was_seen_and_where_episodes_end(policy):
    found = []
    ends, _ = play_adapted(policy, streams(), 100, every=25, watch=found.append)
    over = torch.cat([w.over for w in found], 1)
    assert over.T.numpy().tolist() == ends.tolist()
    begins = torch.cat([w.begins for w in found], 1)
    assert begins[:, 0].all() and torch.equal(begins[:, 1:], over[:, :-1])
    place, rows = streams(), []
    seen = place.reset()
    for actions in torch.cat([w.actions for w in found], 1).T.numpy():
        rows.append(seen)
        seen = place.step(actions)[2]
    assert np.array_equal(torch.cat([w.obs for w in found], 1), np.stack(rows, 1).astype(np.float32))


@pytest.mark.parametrize('name', list(STREAM_STRATEGIES))
def test_a_closed_gate_leaves_a_stream_bit_for_bit_as_it_was(policy, windows, name):
    alone, _ = play_adapted(policy, streams(), 200)
    source = {k: v.detach() for k, v in policy.named_parameters()}
    found = learner(policy, windows, name)
    since = np.array([0, 200, 100, 200, 200, 0])
    ends, share = play_adapted(policy, streams(), 200, found, since)
    shut = since == 200
    assert (ends[:, shut] == alone[:, shut]).all() and not share[shut].any()
    assert (ends[:100, 2] == alone[:100, 2]).all()
    assert all(torch.equal(v[shut], source[k].expand_as(v[shut])) for k, v in found.params.items())
    if name in ('tent', 'tent, all weights', 'kl_anchor', 'ttt', 't3a'): assert share.tolist() == [1, 0, .5, 0, 0, 1]
    if share.any(): assert any((v[0] != source[k]).any() for k, v in found.params.items())


@pytest.mark.parametrize('name', [name for name in STREAM_STRATEGIES if name != 't3a'])
def test_guards_hold_and_without_them_weights_go_far(policy, windows, name):
    "The ball around the source against distances computed here."
    far = {}
    for mode in ('unguarded', 'guarded'):
        found = learner(policy, windows, name, mode, lr=3.)
        play_adapted(policy, streams(), 150, found)
        source = dict(policy.named_parameters())
        chosen = found.adapter.weights.selected
        gap = torch.cat([(found.params[k] - source[k]).detach().flatten(1) for k in chosen], 1).double().norm(dim=1)
        far[mode] = (gap / torch.cat([source[k].detach().flatten() for k in chosen]).double().norm()).max().item()
    assert far['guarded'] <= .1 * (1 + 1e-6)
    if name != 'eata': assert far['unguarded'] > .2


def test_which_weights_a_strategy_adapts(policy, windows):
    norm, everything = ['norm.weight', 'norm.bias'], [k for k, _ in policy.named_parameters()]
    for name, tried in STREAM_STRATEGIES.items():
        if name != 't3a': assert learner(policy, windows, name).adapter.weights.selected == (everything if tried.include else norm)


def test_prototypes_by_hand(policy):
    "Iwasawa and Matsuo's equations in NumPy: the 20 surest features of each action and its source row, all of length 1."
    found, steps = [], PrototypeSteps(policy, 6)
    play_adapted(policy, streams(), 60, every=60, watch=found.append)
    w = found[0]
    who = torch.tensor([True] * 5 + [False])
    assert steps.learn(w, who).tolist() == who.tolist()
    for i in range(5):
        out = policy(w.obs[i:i + 1], w.memory[i:i + 1], w.begins[i:i + 1])
        z, logits = out['features'][0].detach().numpy().astype(float), out['logits'][0].detach().numpy().astype(float)
        rows = policy.action.weight.detach().numpy().astype(float)
        start = rows @ rows.T + policy.action.bias.detach().numpy()
        z, logits, labels = np.r_[rows, z], np.r_[start, logits], np.r_[0, 1, logits.argmax(1)]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
        for k in (0, 1):
            best = [j for j in np.argsort(entropy, kind='stable') if labels[j] == k][:20]
            mean = (z[best] / np.linalg.norm(z[best], axis=1, keepdims=True)).sum(0)
            assert np.allclose(steps.params['action.weight'][i, k], mean / np.linalg.norm(mean), atol=1e-3)
    assert torch.equal(steps.params['action.weight'][5], policy.action.weight.detach())
    assert not steps.params['action.bias'][:5].any()


def test_the_alarm_rings_when_the_gate_of_the_filters_hears_it(policy):
    tasks = sample_tasks(CART_POLE, 160, 'validation')
    model, prior = train_forward(collect_source(policy, tasks[:16], 60), steps=200)
    calibration = calibrate(policy, model, prior, tasks, T=60)
    N, heard = 6, []
    bank = CalibrationBank(model, prior, N, calibration.q)
    gate = Gate(bank, calibration, ['none'] * N)
    place = streams()
    play_calibrated(policy, bank, place, 60, gate, lambda t, bank: heard.append(gate.rung.numpy().copy()))
    heard = np.array(heard)
    wanted = np.where(heard.any(0), heard.argmax(0), 60)
    rung = alarm_steps(policy, CalibrationBank(model, prior, N, calibration.q), calibration, streams(), 60)
    assert rung.tolist() == wanted.tolist() and 0 < (rung < 60).sum()


def test_shifted_cart_poles():
    env = EnvConfig('MetaShiftedCartPole-v0', seed=1)
    tasks = sample_tasks(env, 2000)
    bias, force = np.array([t['bias'] for t in tasks]), np.array([t['force'] for t in tasks])
    sizes, faulty = np.array(ShiftedCartPole.sizes), bias != 0
    assert np.allclose(np.abs(bias).max(0), 1.2 * sizes, rtol=.03) and np.abs(bias.mean(0) / sizes).max() < .06
    assert np.abs(faulty.mean(0) - .25).max() < .05 and abs((force < 0).mean() - .5) < .05  # five standard deviations
    together = faulty.sum(1)
    assert np.allclose(np.bincount(together, minlength=5) / 2000, scipy.stats.binom.pmf(range(5), 4, .25), atol=.05)
    small = np.array([t['bias'] for t in sample_tasks(replace(env, options=dict(width=.5, share=1.)), 500)])
    assert (small != 0).all() and np.abs(small).max(0) == pytest.approx(.5 * sizes, rel=.03)
    family, plain = ShiftedCartPole(), CartPole(sensor_bias=1.)
    prepared = family.prepare({k: np.array([t[k] for t in tasks]) for k in tasks[0]})
    state = np.random.default_rng(0).uniform(-.3, .3, (4, 2000)).astype(np.float32)
    action = np.arange(2000) % 2
    after, reward, over = family.move(state, action, prepared)
    same, one, also = plain.move(state, action, prepared)
    assert np.array_equal(after, same) and np.array_equal(over, also) and 0 < over.mean() < 1
    assert np.array_equal(reward, np.where(over, -1, 0)) and (one == 1).all()
    for wrong in (dict(width=-1), dict(share=1.5)):
        with pytest.raises(ValueError, match=next(iter(wrong))): ShiftedCartPole(**wrong)


def test_a_memory_sees_at_test_time_what_it_saw_in_training():
    "Inputs of the player against those that a rollout gives to training."
    env = EnvConfig('MetaShiftedCartPole-v0', num_envs=1, time_limit=25, episodes_per_trial=4, seed=2)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(hidden_dim=16, state_dim=8, history=True), 0)
    M = 5
    traj = collect(policy, {k: v.detach() for k, v in policy.named_parameters()}, sample_tasks(env, M), env)
    inputs, player = policy_inputs(policy, traj)[:, 0], MemoryPlayer(policy, M)
    over = (traj.terminated | traj.truncated)[:, 0]
    assert over[:, :-1].any() and traj.truncated.any() and traj.terminated.any()
    for t in range(int(traj.mask.sum(-1).min())):
        assert torch.equal(player.past[0], inputs[:, t, 4:])
        player.act(traj.obs[:, 0, t].numpy())
        player.action = traj.action[None, :, 0, t]
        player.cut(over[:, t].numpy(), limit=25)


def test_a_memory_is_not_emptied_between_episodes():
    policy = train_memory(0, ((1., 10, 2, 1, 1e-3),))
    rows = memory_rows(policy, sample_tasks(CART_POLE, 2, 'validation'), NAMES, 40)
    assert [row['shift'] for row in rows] == NAMES and all(len(row['late']) == 2 for row in rows)
    player = MemoryPlayer(policy, 3)
    player.act(np.ones((3, 4)))
    before = player.memory.clone()
    player.cut(np.array([True, False, True]))
    assert torch.equal(player.memory, before) and before.abs().max() > 0
    assert player.past[0, :, -1].tolist() == [1, 0, 1] and player.past[0, :, -2].tolist() == [-1, 0, -1]


def test_training_of_a_memory_is_the_same_again_and_reports():
    seen, phases = [], ((.5, 10, 2, 2, 1e-3), (1., 12, 2, 1, 1e-3))
    a, b = (train_memory(4, phases, seen.append) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values())) and len(seen) == 6
    other = train_memory(5, phases)
    assert any((x != y).any() for x, y in zip(a.state_dict().values(), other.state_dict().values()))


def test_rows_of_streams():
    ends = np.zeros((9, 4), bool)
    ends[[2, 5, 8], 0] = True  # three episodes of 3
    ends[4, 1] = True  # one of 5, then one that does not end
    a, b = stream_rows(ends, ['x', 'y'], strategy='s', mode='m')
    assert (a['first'], a['whole'], a['late']) == ([3, 5], [3, 9], [3, 6])
    assert (b['first'], b['shift'], b['strategy']) == ([9, 9], 'y', 's')


def test_every_strategy_in_every_mode(policy, windows):
    rows = strategy_rows(policy, np.array([20, 99]), sample_tasks(CART_POLE, 1), windows, ['none', 'sensor noise, mild'], T=99)
    kinds = [(row['strategy'], row['mode']) for row in rows[::2]]
    assert kinds == [('none', 'none')] + [(s, m) for s in STREAM_STRATEGIES for m in MODES if (s, m) != ('t3a', 'guarded')]
    late = {row['strategy']: row for row in rows if row['mode'] == 'gated' and row['shift'] == 'sensor noise, mild'}
    assert all(row['adapted'] == 0 and row['late'] == rows[1]['late'] for row in late.values())


def measured(variant, seed, **late):
    return dict(variant=variant, seed=seed, rows=[dict(shift='none', strategy=name, mode='none' if name == 'none' else 'guarded', late=x, whole=x, first=x) for name, x in late.items()])


def test_verdicts_are_of_pairs():
    "Shifted by 3 in each pair, in both directions, under a spread that hides it; noise of both signs is nothing."
    base = np.arange(0., 160, 10)
    rows = [measured('strategies', s, none=(base + s).tolist(), up=(base + s + 3).tolist(), down=(base + s - 3).tolist(), zigzag=(base + s + 3 * (-1)**np.arange(16)).tolist()) for s in range(5)]
    rows += [measured('memory', s, memory=(base + s + 1).tolist()) for s in range(5)]
    table = {row['strategy']: row for row in strategy_table(rows)}
    assert {k: row.get('verdict') for k, row in table.items()} == dict(none=None, up='better', down='worse', zigzag='same', memory='better')
    assert table['up']['difference'] == 3 and table['down']['difference_ci95'] == [-3, -3]
    assert table['none']['length'] == pytest.approx(77) and 'difference' not in table['none']
    alone = strategy_table(rows[5:])
    assert [row['strategy'] for row in alone] == ['memory'] and 'verdict' not in alone[0]


def test_what_is_refused(policy, windows):
    with pytest.raises(ValueError, match="mode='open' is not one of 'unguarded', 'guarded', 'gated'"): learner(policy, windows, mode='open')


def test_step_sizes_are_those_that_won():
    found = json.loads((RESULTS / 'cartpole-shift-tuning.json').read_text(encoding='utf-8'))['strategies']
    assert set(found) == set(STREAM_STRATEGIES) - {'t3a'}
    for name, row in found.items():
        tried = STREAM_STRATEGIES[name]
        assert list(tried.lrs) == row['lrs'] and len(row['lrs']) == 3 and tried.lr == row['best'] == row['lrs'][np.argmax(row['lengths'])]


@pytest.fixture(scope='module')
def published():
    table = json.loads((RESULTS / 'cartpole-shift-strategies.json').read_text(encoding='utf-8'))['table']
    rows = [json.loads(path.read_text(encoding='utf-8')) for path in sorted((RESULTS / 'rows' / 'cartpole-shift-strategies').glob('*.json'))]
    return {(row['strategy'], row['mode'], row['shift']): row for row in table if 'strategy' in row}, rows


def test_committed_table_is_that_of_its_rows(published):
    table, rows = published
    again = json.loads(json.dumps(strategy_table(rows)))
    assert {(row['strategy'], row['mode'], row['shift']): row for row in again} == table
    seeds = {v: sorted(row['seed'] for row in rows if row['variant'] == v) for v in SHIFT_VARIANTS}
    assert all(seeds.values()) and set().union(*seeds.values()).isdisjoint(range(15)) and 100 not in seeds['strategies']


def test_all_variants_played_the_same_streams(published):
    "Without adaptation, filters and strategies saw the same worlds; two stacks round differently, so single streams may part."
    _, rows = published
    alone = {(m['variant'], m['seed'], row['shift']): np.array(row['late']) for m in rows for row in m['rows'] if row['mode'] == 'none'}
    pairs = [(x, alone['strategies', *key]) for (variant, *key), x in alone.items() if variant == 'calibration' and ('strategies', *key) in alone]
    assert len(pairs) >= 19 and np.mean([np.mean(np.isclose(a, b)) for a, b in pairs]) > .9
