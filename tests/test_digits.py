"The experiment on digits: what was measured keeps its promises, and a study runs like an experiment."
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_metarl.adapter import AdaptationConfig, create_adapter
from ssm_metarl.cli import main
from ssm_metarl.digits import DIGIT_GRID, DIGIT_SETTINGS, DigitNet, StreamGate, digits_data, corrupted, predict_stream, stream_order, train_digits
from ssm_metarl.experiments import EXPERIMENTS, register_experiment, run_experiment
from ssm_metarl.studies import Study, digits_table

RESULTS = Path(__file__).parents[1] / 'benchmarks' / 'results'
STEPPING = ('tent', 'eata', 'sar', 'kl_anchor')


@pytest.fixture(scope='module')
def table():
    rows = json.loads((RESULTS / 'digits.json').read_text(encoding='utf-8'))['table']
    return {(row['variant'], row['protocol'], row['strategy'], row['mode']): row for row in rows}


def test_batch_statistics_halve_the_error(table):
    for protocol in ('reset', 'continual'):
        source, norm = (table['BatchNorm', protocol, name, 'free']['error'] for name in ('none', 'norm'))
        assert norm <= source / 2


def test_entropy_minimisation_is_not_worse_than_batch_statistics(table):
    for name in ('tent', 'eata', 'sar'):
        for protocol in ('reset', 'continual'): assert table['BatchNorm', protocol, name, 'free']['difference'] <= .5


def test_prototypes_repair_a_part_and_need_a_reset(table):
    alone = {protocol: table['BatchNorm', protocol, 't3a', 'free']['error'] for protocol in ('reset', 'continual')}
    source = table['BatchNorm', 'reset', 'none', 'free']['error']
    assert alone['reset'] < source - 10 < source < alone['continual']


@pytest.mark.xfail(strict=True, reason='a target that was missed: on top of repaired features prototypes win nothing, and notebook 05b shows why')
def test_prototypes_help_on_top_of_batch_statistics(table): assert table['BatchNorm', 'reset', 't3a+norm', 'free']['difference_ci95'][1] < 0


def test_the_gate_keeps_sorted_labels_from_harm(table):
    for variant, settings in DIGIT_SETTINGS.items():
        source = table[variant, 'sorted', 'none', 'free']['errors']
        for name in set(settings) - {'none'}:
            gated = table[variant, 'sorted', name, 'gated']['errors']
            assert max(gated[world] - source[world] for world in source) <= 2
    clean = table['BatchNorm', 'sorted', 'tent', 'free']['errors']['clean']
    assert clean > table['BatchNorm', 'sorted', 'none', 'free']['errors']['clean'] + 10


def test_committed_table_is_that_of_its_rows(table):
    measured = [json.loads(path.read_text(encoding='utf-8')) for path in sorted((RESULTS / 'rows' / 'digits').glob('*.json'))]
    assert [(m['variant'], m['seed']) for m in measured] == [(v, s) for v in ('BatchNorm', 'GroupNorm') for s in range(5)]
    again = json.loads(json.dumps(digits_table(measured)))
    assert {row['name']: row for row in again} == {row['name']: row for row in table.values()}
    assert all(m['settings'] == json.loads(json.dumps(DIGIT_SETTINGS[m['variant']])) for m in measured)


def test_settings_are_those_that_won():
    tuning = json.loads((RESULTS / 'digits-tuning.json').read_text(encoding='utf-8'))
    for norm, settings in DIGIT_SETTINGS.items():
        for name, setting in settings.items():
            tried = tuning[norm][name]['tried']
            assert [row['setting'] for row in tried] == DIGIT_GRID[name]
            assert min(tried, key=lambda row: row['error'])['setting'] == setting, (norm, name)


@pytest.fixture(scope='module')
def source():
    data = digits_data(7)
    return data, train_digits('BatchNorm', *data['train'], seed=7, epochs=8)


@pytest.mark.parametrize('by_label', [False, True])
def test_gate_at_home_and_abroad(source, by_label):
    "At home it stays closed; abroad it opens for mixed labels alone, and a closed gate gives the source's own predictions."
    (data, model), images, labels = source, *source[0]['stream']
    gate = StreamGate(model, *data['validation'])
    adapter = create_adapter(model, AdaptationConfig(mode='continual'), 'norm')
    gate.calibrate(adapter)
    order = stream_order(labels, 7, by_label)
    for world, most in (('clean', 0), ('contrast', 0 if by_label else 1)):
        adapter.reset(), gate.forget()
        spoilt = images if world == 'clean' else corrupted(images, world, 7)
        predicted, adapted = predict_stream(adapter, spoilt[order].split(64), gate)
        assert adapted == 0 if most == 0 else adapted > .8
        with torch.no_grad(): own = model(spoilt[order])['logits'].argmax(-1)
        if adapted == 0: assert torch.equal(predicted, own)


def test_gate_is_closed_for_one_batch_of_many(source):
    data, model = source
    gate = StreamGate(model, *data['validation'])
    adapter = create_adapter(model, AdaptationConfig(mode='continual'), 'norm')
    gate.calibrate(adapter)
    assert gate(adapter, 1 - data['stream'][0][:64]) is not None  # nothing to compare with
    assert gate(adapter, 1 - data['stream'][0][64:128]) is None


def test_missing_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match=r"pip install 'ssm-metarl\[digits\]'"): digits_data(0)


@pytest.fixture
def study():
    calls = []
    def measure(variant, seed):
        calls.append((variant, seed))
        return [dict(x=seed + len(variant))]
    def tabulate(measured):
        return [dict(name=f'{m["variant"]} {m["seed"]}', value=m['rows'][0]['x']) for m in measured]
    def draw(table):
        import matplotlib.pyplot as plt
        return plt.figure()
    made = Study(('one', 'three'), measure, tabulate, draw, lambda row: f'{row["name"]}: {row["value"]}', dict(one=[1]))
    register_experiment('tiny-study')(lambda: made)
    yield calls
    EXPERIMENTS.remove('tiny-study')


def test_study_goes_on(study, tmp_path):
    run_experiment('tiny-study', tmp_path, [0], progress=False)
    results = run_experiment('tiny-study', tmp_path, [0, 10], progress=False)
    assert study == [('one', 0), ('three', 0), ('one', 10), ('three', 10)]
    assert [row['value'] for row in results['table']] == [3, 13, 5, 15]
    assert json.loads((tmp_path / 'results.json').read_text())['table'] == results['table']
    for damage in ('[]', '{', '{"variant": "one"}'):
        (tmp_path / 'rows' / 'one_0.json').write_text(damage)
        assert run_experiment('tiny-study', tmp_path, [0], ['one'], progress=False)['table'] == results['table']
    assert study[4:] == [('one', 0)] * 3 and (tmp_path / 'results.png').stat().st_size > 0


def test_study_refuses(study, tmp_path):
    with pytest.raises(ValueError, match="'two' is not one of 'one', 'three'"): run_experiment('tiny-study', tmp_path, [0], ['two'])
    with pytest.raises(ValueError, match='trains no policy and has no outer_steps'): run_experiment('tiny-study', tmp_path, [0], outer_steps=3)
    with pytest.raises(ValueError, match='has no episodes'): run_experiment('tiny-study', tmp_path, [0], episodes=3)
    with pytest.raises(ValueError, match='has no device'): run_experiment('tiny-study', tmp_path, [0], device='cuda')
    assert not study


def test_study_from_the_terminal(study, tmp_path, capsys):
    main(['experiment', 'tiny-study', '--seeds', '2', '--out', str(tmp_path)])
    out, err = capsys.readouterr()
    assert json.loads(out)['three 1'] == 6 and 'one 1: 4' in err


def test_network_with_group_normalisation_looks_at_one_image():
    model, x = DigitNet('GroupNorm').eval(), torch.rand(4, 1, 8, 8)
    with torch.no_grad(): alone, together = model(x[:1])['logits'], model(x)['logits'][:1]
    assert np.allclose(alone, together, atol=1e-5)
