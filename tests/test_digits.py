"The experiment on digits: what was measured keeps its promises, and a study runs like an experiment."
import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ssm_metarl.adapter import AdaptationConfig, create_adapter
from ssm_metarl.cli import main
from ssm_metarl.digits import DIGIT_GRID, DIGIT_SETTINGS, DigitNet, StreamGate, corrupted, digit_adapter, digits_data, predict_stream, stream_order, train_digits
from ssm_metarl.experiments import EXPERIMENTS, register_experiment, run_experiment
from ssm_metarl.studies import Study, digits_table

RESULTS = Path(__file__).parents[1] / 'benchmarks' / 'results'
STEPPING = ('tent', 'eata', 'sar', 'kl_anchor')


@pytest.fixture(scope='module')
def measured(): return [json.loads(path.read_text(encoding='utf-8')) for path in sorted((RESULTS / 'rows' / 'digits').glob('*.json'))]


@pytest.fixture(scope='module', params=['committed', 'seeds that the gate was not designed on'])
def table(request, measured):
    if request.param == 'committed': rows = json.loads((RESULTS / 'digits.json').read_text(encoding='utf-8'))['table']
    else: rows = digits_table([m for m in measured if m['seed'] >= 5])
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


def test_the_gate_keeps_sorted_labels_from_harm(measured):
    "In each world and with each seed; without the gate most of these streams end at least ten points below the source."
    harmed = []
    for m in measured:
        error = {(row['strategy'], row['mode']): row['errors'] for row in m['rows'] if row['protocol'] == 'sorted'}
        for name in set(DIGIT_SETTINGS[m['variant']]) - {'none'}:
            for world, source in error['none', 'free'].items():
                assert error[name, 'gated'][world] <= source + 2, (m['variant'], m['seed'], name, world)
                if m['variant'] == 'BatchNorm' and name != 't3a': harmed.append(error[name, 'free'][world] >= source + 10)
    assert np.mean(harmed) > .5


def test_committed_table_is_that_of_its_rows(measured):
    results = json.loads((RESULTS / 'digits.json').read_text(encoding='utf-8'))
    assert [(m['variant'], m['seed']) for m in measured] == [(v, s) for v in ('BatchNorm', 'GroupNorm') for s in range(10)]
    assert results['table'] == json.loads(json.dumps(digits_table(measured)))
    assert results['command'] == 'ssm-metarl experiment digits --seeds 10'
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


def test_prototypes_are_those_of_the_papers_code(source):
    "matsuolab/T3A, domainbed/adapt_algorithms.py, on features with batch statistics: take the batch in, keep the surest examples, then predict."
    (data, model), weight = source, source[1].head.weight.detach()
    batches = corrupted(data['stream'][0], 'fog', 7).split(64)
    adapter = digit_adapter(model, 't3a+norm', dict(per_class=20, norm=True), data['train'])
    predicted, _ = predict_stream(adapter, batches)
    net, found = copy.deepcopy(model).train(), []
    kept = [weight, model.head(weight)]  # supports and their logits
    with torch.no_grad():
        for batch in batches:
            z = net.extract_features(batch)
            kept = [torch.cat(pair) for pair in zip(kept, (z, net.head(z)))]
            labels, entropy = kept[1].argmax(1), torch.distributions.Categorical(logits=kept[1]).entropy()
            best = torch.cat([torch.where(labels == k)[0][entropy[labels == k].argsort()[:20]] for k in range(10)])
            kept, labels = [part[best] for part in kept], labels[best]
            centres = F.normalize(F.normalize(kept[0], dim=1).T @ F.one_hot(labels, 10).float(), dim=0)
            found.append((z @ centres).argmax(1))
    assert torch.equal(predicted, torch.cat(found))


def test_missing_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match='not installed') as caught: digits_data(0)
    assert "run: pip install 'ssm-metarl[digits] @ git+https://github.com/ssm-metarl/ssm-metarl'" in str(caught.value)
    assert "in a clone: pip install -e '.[digits]'" in str(caught.value)


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
    assert results['command'] == 'ssm-metarl experiment tiny-study --seeds 11'
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
