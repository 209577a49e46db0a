"Experiments: whose rows are believed, who may share a folder, what an interrupt leaves, and what can be plugged in."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssm_metarl import cli, experiments, training
from ssm_metarl.experiments import EXPERIMENTS, Experiment, experiment_command, paired_differences, read_row, register_experiment, run_experiment
from ssm_metarl.registry import PLUGINS, load_plugin

RESULTS = Path(__file__).parents[1] / 'benchmarks' / 'results'
PLUGIN = '''
from ssm_metarl.config import CONFIGS, config_from_dict
from ssm_metarl.experiments import Experiment, register_experiment

@register_experiment('tiny')
def tiny():
    changes = dict(num_envs=2, time_limit=5, policy=dict(hidden_dim=8, state_dim=4), meta=dict(outer_steps=2, tasks_per_batch=2), adapt=dict(steps=1, trajectories=2))
    return Experiment(config_from_dict(CONFIGS['nav2d'], changes), {'SSM': {}, 'no memory': {'policy': {'core': 'none'}}}, episodes=4, validation=3)
'''


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / 'tiny_plugin.py'
    path.write_text(PLUGIN)
    load_plugin(path)
    yield path
    EXPERIMENTS.remove('tiny', missing_ok=True), sys.modules.pop(PLUGINS.pop(path.name).__name__)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):  # a folder with one finished run of the tiny experiment, to be copied
    folder = tmp_path_factory.mktemp('finished')
    (folder / 'tiny_plugin.py').write_text(PLUGIN)
    load_plugin(folder / 'tiny_plugin.py')
    run_experiment('tiny', folder / 'tiny', [0], ['SSM'], progress=False)
    EXPERIMENTS.remove('tiny'), sys.modules.pop(PLUGINS.pop('tiny_plugin.py').__name__)
    return folder / 'tiny'


@pytest.fixture
def folder(finished, plugin, tmp_path): return Path(shutil.copytree(finished, tmp_path / 'tiny'))


def run(folder, seeds=(0,), variants=('SSM',), **changes): return run_experiment('tiny', folder, seeds, variants, progress=False, **changes)


def process(plugin, folder, seeds, **changes):  # a Python of its own that does the same
    code = f'from ssm_metarl.registry import load_plugin; load_plugin({str(plugin)!r})\nfrom ssm_metarl.experiments import run_experiment\nrun_experiment("tiny", {str(folder)!r}, {seeds}, progress=False, **{changes})'
    return subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg'))


# --- rows ---

WRONG = dict(returns_by_step=[None, 3, 'x', [], [[]], [1., 2.], [[1., 2.], [3.]], [[1., None]], [[1., 'x']], {}, [[10**400]], [[1., 2., 3.]] * 2, [[1., 2., 3., 4.]], [[1., 2., 3., 4.]] * 3],
             seed=[True, 1.5, '0', None, -1], variant=['LSTM', None, [], 3], references=[None, [1.], {'random': 3}, {'random': [None]}],
             scores=[[], {'held_out': []}, {'held_out': {'greedy': {'reward': 3}}}, {'held_out': {'greedy': {'reward': ['x', 1]}}}], provenance=[[], 'here', {}, {'evaluation': 3}, {'evaluation': {'device': 3}}],
             episodes=[5], version=['0.0.0'], config=[None, [], {}])


def damages(row):
    text = json.dumps(row)
    yield from (x.encode() for x in ('', '[]', '1', 'null', '"row"', '{}', text[:100], text + '}', '[' * 100_000, '[' + '9' * 5000 + ']', text.replace('"returns_by_step": [[', '"returns_by_step": [[NaN, ')))
    yield from (b'\xff\xfe' + text.encode('utf-16')[2:], b'\x00' * 200)
    yield from (json.dumps(row | {name: value}).encode() for name, values in WRONG.items() for value in values)


def test_what_is_no_row_is_done_again(folder, monkeypatch):
    path = folder / 'rows' / 'SSM_0.json'
    whole = json.loads(path.read_text())
    monkeypatch.setattr(experiments, 'run_variant', lambda *args: {k: v for k, v in whole.items() if k not in ('variant', 'seed', 'version', 'config', 'episodes', 'validation', 'score_tasks')})
    monkeypatch.setattr(experiments, 'save_figure', lambda *args: None)
    expected = [row['iqm'] for row in run(folder)['table']]
    for damage in damages(whole):
        path.write_bytes(damage)
        (folder / 'rows' / 'no-memory_3.json').write_bytes(damage)  # nobody asks for this one
        assert [row['iqm'] for row in run(folder)['table']] == expected, damage[:100]
        assert json.loads(path.read_text()) == whole


def test_a_damaged_row_is_trained_no_second_time(folder):
    path = folder / 'rows' / 'SSM_0.json'
    whole = json.loads(path.read_text())
    path.write_text('[]')
    run(folder)
    assert json.loads(path.read_text()) == whole  # with the times of the training, too


def test_a_copy_of_a_row_is_not_another_seed(folder):
    rows = folder / 'rows'
    shutil.copy(rows / 'SSM_0.json', rows / 'SSM_0 (copy).json'), shutil.copy(rows / 'SSM_0.json', rows / 'SSM_1.json')
    assert run(folder)['table'][0]['seeds'] == [0]


def test_a_row_without_a_player(folder):
    results, path = run(folder, [0, 1]), folder / 'rows' / 'SSM_1.json'
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | dict(references={k: v for k, v in row['references'].items() if k != 'oracle'})))
    assert run(folder)['table'][0]['references'] == {k: v for k, v in results['table'][0]['references'].items() if k != 'oracle'}


def test_rows_that_were_published_are_still_read():
    rows = [path for path in sorted(RESULTS.glob('rows/*/*.json')) if path.parent.name not in ('digits', 'cartpole-shift', 'cartpole-shift-strategies')]  # studies; see test_digits, test_policy_shift and test_shift_strategies
    assert len(rows) > 20 and all(read_row(path) for path in rows)


@pytest.mark.parametrize('name', ['nav2d', 'nav2d-rotated', 'nav2d-relatives', 'bandit-dependent', 'bandit-independent', 'bandit-10-5', 'bandit-100-5', 'mdp-10'])
def test_settings_are_those_of_the_published_results(name):
    def within(old, new): return all(within(v, new[k]) if isinstance(v, dict) else v == new[k] for k, v in old.items())
    published, experiment = json.loads((RESULTS / f'{name}.json').read_text()), EXPERIMENTS[name]
    assert published['variants'] == experiment.variants and published['published'] == experiment.published
    assert published['config']['adapt'].pop('online') is experiment.config.adapt.online is False
    del published['config']['adapt']['online_interval']  # which `online` alone uses, and whose default was another one
    assert within(published['config'], json.loads(json.dumps(experiments.asdict(experiment.config))))


@pytest.mark.parametrize('damage', [lambda text: '\n' + text, lambda text: '1\n' + text, lambda text: 'null\n' + text, lambda text: text.replace('\n', '\n\n'), lambda text: text[:20] + '\n' + text, lambda text: '{}\n' + text, lambda text: text[:-20], lambda text: ''])
def test_a_damaged_log_gives_the_row_again_or_one_line(damage, folder):
    path = folder / 'rows' / 'SSM_0.json'
    returns = json.loads(path.read_text())['returns_by_step']
    log = next(folder.rglob('train.jsonl'))
    log.write_text(damage(log.read_text())), path.unlink()
    try: run(folder)
    except RuntimeError as error: assert '\n' not in str(error) and 'train.jsonl' in str(error)
    else: assert json.loads(path.read_text())['returns_by_step'] == returns


# --- sharing and stopping ---

def test_a_row_that_comes_while_the_results_are_written_is_in_them(folder, monkeypatch):
    run(folder, [1])
    late, rows = folder / 'late.json', folder / 'rows'
    (rows / 'SSM_0.json').rename(late)
    write = experiments.write_text_whole
    def slow(path, text):  # another process writes its row, and its results, before ours are there
        if late.exists(): late.rename(rows / 'SSM_0.json')
        write(path, text)
    monkeypatch.setattr(experiments, 'write_text_whole', slow)
    results = run(folder, [1])
    assert results['table'][0]['seeds'] == [0, 1] == json.loads((folder / 'results.json').read_text())['table'][0]['seeds']


def test_two_processes_with_different_seeds_share_a_folder(plugin, tmp_path):
    alone = run(tmp_path / 'alone', [0, 1], None)
    both = [process(plugin, tmp_path / 'shared', seeds) for seeds in ([0], [1])]
    for p in both: assert p.communicate()[1] == '' and p.returncode == 0
    shared = json.loads((tmp_path / 'shared' / 'results.json').read_text())
    assert [(row['variant'], row['seeds'], row['iqm'], row['mean_ci95']) for row in shared['table']] == [(row['variant'], row['seeds'], row['iqm'], row['mean_ci95']) for row in alone['table']]
    assert sorted(path.name for path in (tmp_path / 'shared').iterdir()) == ['results.json', 'results.png', 'rows']


@pytest.mark.skipif(sys.platform == 'win32', reason='has no SIGINT for another process')
@pytest.mark.parametrize('late', [0., .4])
def test_an_interrupt_leaves_whole_files_and_the_same_call_goes_on(late, plugin, tmp_path):
    changes, where = dict(outer_steps=12), tmp_path / 'stopped'
    p = process(plugin, where, [0, 1], **changes)
    while p.poll() is None and not list(where.rglob('train.jsonl')): time.sleep(.01)  # it trains
    time.sleep(late)
    p.send_signal(signal.SIGINT), p.communicate()
    for path in where.rglob('*.json'): json.loads(path.read_text())
    for path in where.rglob('*.npz'): experiments.load_learner(path)
    again, whole = run(where, [0, 1], None, **changes), run(tmp_path / 'whole', [0, 1], None, **changes)
    assert [(row['iqm'], row['seeds'], row['mean_by_seed']) for row in again['table']] == [(row['iqm'], row['seeds'], row['mean_by_seed']) for row in whole['table']]


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_training_step_stops_the_experiment(signum, plugin, tmp_path, monkeypatch, capsys):
    whole, commit, words = run(tmp_path / 'whole', [0], None), training.Run.commit, ['experiment', 'tiny', '--seeds', '1', '--out', str(tmp_path / 'stopped')]
    trained = []
    def interrupted(self, line):
        commit(self, line)
        trained.append(self.done)
        if self.over: signal.raise_signal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, 'commit', interrupted)
        assert cli.main(words) == 128 + signum
    out, err = capsys.readouterr()
    rows = tmp_path / 'stopped' / 'tiny' / 'rows'
    assert trained == [1, 2] and out == '' and err.splitlines()[-1] == 'ssm-metarl: interrupted; the same command goes on'  # nothing of the second variant
    assert not list(rows.glob('*.json')) and list(rows.rglob('latest.npz'))
    assert cli.main(words) == 0 and len(list(rows.rglob('latest.npz'))) == 2
    again = json.loads((tmp_path / 'stopped' / 'tiny' / 'results.json').read_text())
    assert [row['mean'] for row in again['table']] == [row['mean'] for row in whole['table']]


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(folder, monkeypatch):
    from matplotlib.figure import Figure
    old = (folder / 'results.png').read_bytes()
    def stopped(self, path, **options):
        Path(path).write_bytes(b'half')
        raise KeyboardInterrupt
    monkeypatch.setattr(Figure, 'savefig', stopped)
    with pytest.raises(KeyboardInterrupt): run(folder)
    assert (folder / 'results.png').read_bytes() == old and sorted(path.name for path in folder.iterdir()) == ['results.json', 'results.png', 'rows']


# --- experiments of one's own ---

def test_a_plugged_in_experiment_says_so_in_its_commands(plugin):
    assert EXPERIMENTS.origins['tiny'] == 'tiny_plugin.py'
    assert experiment_command('tiny', 'SSM', [0]) == 'ssm-metarl experiment tiny --variants SSM --seeds 1 --plugin tiny_plugin.py'
    assert "load_plugin('tiny_plugin.py')" in experiment_command('tiny', 'SSM', [0], dict(gamma=.9))
    assert 'plugin' not in experiment_command('nav2d', 'SSM', [0])


def test_experiments_that_cannot_be(plugin):
    config = EXPERIMENTS['tiny'].config
    with pytest.raises(ValueError, match="experiment 'nav2d' is registered already"): register_experiment('nav2d')(lambda: EXPERIMENTS['tiny'])
    with pytest.raises(TypeError, match='returned 3, not an Experiment'): register_experiment('new')(lambda: 3)
    with pytest.raises(TypeError, match=r"write @register_experiment\('a name'\)"): register_experiment(lambda: 3)
    for variants, message in (({}, 'variants is empty'), ({'a/b': {}}, "'a/b' cannot be part of a file name"), ({'..': {}}, 'cannot be part'), ({3: {}}, 'cannot be part'), ({'': {}}, 'cannot be part'),
                              ({'no memory': {}, 'no-memory': {}}, 'would share one file'), ({'x': {'polcy': {}}}, 'has no field polcy'), ({'x': {'policy': {'core': 'LSTM'}}}, "core='LSTM'")):
        with pytest.raises(ValueError, match=message) as error: Experiment(config, variants)
        assert '\n' not in str(error.value)
    assert 'new' not in EXPERIMENTS


def test_no_seeds(plugin, tmp_path):
    with pytest.raises(ValueError, match='seeds is empty'): run(tmp_path / 'x', [])
    assert not (tmp_path / 'x').exists() and paired_differences([]) == []


def test_a_choice_is_made_on_validation_tasks_alone(plugin, tmp_path, monkeypatch):
    judged = []
    def evaluate(path, config, episodes, seed=None, device='cpu', split=None, progress=False):
        judged.append((path.name, split, seed))
        good = dict(step_50=3., step_100=9., latest=6.)[path.stem] if split == 'validation' else 0.
        return experiments_result(np.full((2, episodes), good))
    def experiments_result(returns): return type('Result', (), dict(returns_by_step=returns, references={}, summary=lambda self: {}))()
    experiment = replace(EXPERIMENTS['tiny'], validation=3)
    config = experiment.variant('SSM', 5, outer_steps=110)
    monkeypatch.setattr(experiments, 'evaluate_with_adaptation', evaluate)
    monkeypatch.setattr(experiments, 'train', lambda *args, **options: dict(wall_s=1., cpu_s=1., env_steps=1))
    monkeypatch.setattr(experiments, '_made_with', lambda *args: {})
    row = experiments.run_variant(experiment, config, tmp_path)
    assert row['checkpoint'] == 100 and row['validation_return'] == {'100': 9., '110': 6.}
    assert judged == [('step_100.npz', 'validation', 1_000_005), ('latest.npz', 'validation', 1_000_005), ('step_100.npz', None, None)]
    assert experiments.run_variant(replace(experiment, validation=0), config, tmp_path)['checkpoint'] == 110


def test_pyplot_is_imported_only_for_a_figure():
    code = "import sys, ssm_metarl.experiments; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
