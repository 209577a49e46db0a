"Experiments and configs: what their files say, and that one can run again what they name."
import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssm_metarl import checkpoints, experiments, pipeline, training
from ssm_metarl.envs import register_family
from ssm_metarl.meta_learner import MetaConfig
from ssm_metarl.files import to_json
from ssm_metarl.policy_steps import AdaptConfig
from ssm_metarl.config import ExperimentConfig
from ssm_metarl.training import provenance, train
from ssm_metarl.experiments import EXPERIMENTS, Experiment, paired_differences, run_experiment
from ssm_metarl.cli import main, parse
from ssm_metarl.policy import PolicyConfig

SMALL = dict(episodes=3, outer_steps=2, progress=False)


@pytest.fixture(autouse=True)
def tiny_navigation(monkeypatch):  # the experiment 'nav2d', small enough for tests
    nav2d = EXPERIMENTS['nav2d']
    config = replace(nav2d.config, time_limit=10, num_envs=3, meta=replace(nav2d.config.meta, tasks_per_batch=3), adapt=replace(nav2d.config.adapt, trajectories=4))
    monkeypatch.setitem(EXPERIMENTS, 'nav2d', replace(nav2d, config=config))


def strict(text):  # JSON as its standard has it
    def refuse(word): raise AssertionError(f'{word} is not JSON')
    return json.loads(text, parse_constant=refuse)


def row(variant, seed, steps=3, M=5, offset=0.):
    rng = np.random.default_rng(seed)
    return dict(variant=variant, seed=seed, returns_by_step=(rng.normal(size=(steps + 1, M)) + offset).tolist())


def test_differences_of_variants_with_different_numbers_of_steps():
    rows = [row('a', 0), row('a', 1), row('b', 0, steps=1), row('b', 1, steps=1), row('c', 0, steps=7)]
    found = paired_differences(rows)
    assert [(d['variant'], d['step'], d['seeds']) for d in found] == [('b', 0, [0, 1]), ('b', 1, [0, 1]), *[('c', k, [0]) for k in range(4)]]
    assert found[-1]['t95'] == [None, None] and found[-1]['interval_over'] == 'tasks of one training seed only'
    assert found[0]['interval_over'] == '2 seeds, and tasks within them'


def test_intervals_of_differences_are_over_seeds():
    rows = [row(name, seed, M=200, offset=offset * seed) for name, offset in (('a', 5.), ('b', 0.)) for seed in range(5)]
    low, high = paired_differences(rows)[0]['ci95']
    assert low < 6 and high > 14  # the seeds' differences are 0, 5, 10, 15, 20; over tasks alone the interval would be a point


def test_one_test_task_gives_null_and_no_nan(tmp_path):
    results = run_experiment('bandit-10-5', tmp_path, [0], ['SSM'], **SMALL | dict(episodes=1, tasks_per_batch=2))
    text = (tmp_path / 'results.json').read_text()
    assert strict(text) == json.loads(json.dumps(results)) and results['table'][0]['iqm_ci95'][0] == [None, None]
    strict((tmp_path / 'rows' / 'SSM_0.json').read_text())


def test_json_has_no_nan():
    assert strict(to_json(dict(a=float('nan'), b=[1, np.inf], c=np.float32(2), d=np.array([1., np.nan]), e=(True, 'x', None)))) == dict(
        a=None, b=[1, None], c=2, d=[1, None], e=[True, 'x', None])


def test_an_experiment_of_one_task_in_a_terminal(tmp_path, capsys):
    assert main(f'experiment bandit-10-5 --seeds 1 --variants SSM --outer-steps 1 --episodes 1 --out {tmp_path}'.split()) == 0
    out, err = capsys.readouterr()
    strict(out.splitlines()[-1]), strict((tmp_path / 'bandit-10-5' / 'results.json').read_text())
    assert 'nan' not in err and 'tasks of one training seed only' in err


def test_rows_carry_what_they_were_run_with(tmp_path, monkeypatch):
    run_experiment('nav2d', tmp_path, [0], ['SSM'], **SMALL)
    for module in (experiments, training): monkeypatch.setattr(module, 'provenance', lambda device: dict(commit='elsewhere', device=device))  # another machine gathers, and adds a seed
    results = run_experiment('nav2d', tmp_path, [1], ['SSM'], **SMALL)
    rows = [json.loads((tmp_path / 'rows' / f'SSM_{seed}.json').read_text()) for seed in (0, 1)]
    here = json.loads(json.dumps(provenance('cpu')))
    assert rows[0]['provenance']['training'] == [here] and rows[0]['provenance']['evaluation'] == here
    assert rows[1]['provenance']['training'] == [dict(commit='elsewhere', device='cpu')]
    parameters = EXPERIMENTS['nav2d'].variant('SSM', 0).make_policy().get_params()
    assert rows[0]['provenance']['parameters']['total'] == sum(v.numel() for v in parameters.values())
    assert [p['training'][0]['commit'] for p in results['table'][0]['provenance']] == [here['commit'], 'elsewhere'] and 'torch' not in results
    assert {'ssm_metarl', 'python', 'torch', 'numpy', 'gymnasium'} <= here['versions'].keys() and here['cpu'] and here['threads'] >= 1


def test_each_session_of_a_training_leaves_its_own_provenance(tmp_path, monkeypatch):
    config = EXPERIMENTS['nav2d'].variant('SSM', 0, outer_steps=2, tasks_per_batch=2)
    config = replace(config, meta=replace(config.meta, outer_lr_decay=False))
    training.train(config, tmp_path, progress=False)
    monkeypatch.setattr(training, 'provenance', lambda device: dict(commit='elsewhere'))
    training.train(replace(config, meta=replace(config.meta, outer_steps=4)), tmp_path, resume=True, progress=False)
    log = training.read_log(tmp_path)
    assert [line['step'] for line in log if 'provenance' in line] == [0, 2] and log[2]['provenance'] == dict(commit='elsewhere')


def test_commit_of_a_checkout_and_of_none(tmp_path, monkeypatch):
    source_commit = training.source_commit.__wrapped__  # without its cache
    assert source_commit(tmp_path) == 'unknown'
    git = lambda *words: training.subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=a', '-c', 'user.email=a@b', *words], check=True, capture_output=True, text=True).stdout.strip()
    git('init'), (tmp_path / '__init__.py').write_text('')
    assert source_commit(tmp_path) == 'unknown'  # in a repository, but not of it
    git('add', '.'), git('commit', '-m', 'one')
    commit = git('rev-parse', '--short=12', 'HEAD')
    assert source_commit(tmp_path) == commit
    (tmp_path / '__init__.py').write_text('changed = True')
    assert source_commit(tmp_path) == commit + '+'
    monkeypatch.setenv('PATH', '')
    assert source_commit(tmp_path) == 'unknown'


@pytest.mark.parametrize('seeds, variants, changes', [([0, 1], ['SSM'], {}), ([3], ['no memory'], {}), ([0, 2, 3], ['SSM', 'no memory'], dict(outer_steps=3))])
def test_the_printed_command_gives_the_row_again(seeds, variants, changes, tmp_path):
    results = run_experiment('nav2d', tmp_path / 'first', seeds, variants, **SMALL | changes)
    (tmp_path / 'again').mkdir()
    for line in results['table']:
        for command in line['command'].split(' && '):
            program, *words = shlex.split(command)
            assert program == 'ssm-metarl' and main([*words, '--out', str(tmp_path / 'again')]) == 0
    again = json.loads((tmp_path / 'again' / 'nav2d' / 'results.json').read_text())
    what = lambda results: [{k: v for k, v in line.items() if k not in ('training_s', 'training_cpu_s', 'provenance')} for line in results['table']]
    assert what(again) == what(json.loads(json.dumps(results)))


def test_what_the_command_line_cannot_say_is_said_in_python(tmp_path, monkeypatch):
    results = run_experiment('nav2d', tmp_path, [1], ['SSM'], **SMALL, tasks_per_batch=2)
    python, flag, code = shlex.split(results['table'][0]['command'])
    assert (python, flag) == ('python', '-c') and 'tasks_per_batch=2' in code
    monkeypatch.chdir(tmp_path)
    exec(code)
    again = json.loads((tmp_path / 'experiments' / 'nav2d' / 'results.json').read_text())
    assert again['table'][0]['iqm'] == results['table'][0]['iqm']


def test_nothing_is_done_twice_and_what_is_damaged_is_done_again(tmp_path):
    small, both = SMALL | dict(tasks_per_batch=2), ['SSM', 'no memory']
    results = run_experiment('nav2d', tmp_path, [0, 1], both, **small)
    path = tmp_path / 'rows' / 'SSM_1.json'
    first, begin = json.loads(path.read_text()), path.stat().st_mtime_ns
    found = lambda: sorted((tmp_path / 'rows' / 'SSM_1').glob('*/latest.npz'))
    np.testing.assert_allclose(pipeline.evaluate_with_adaptation(found()[0], episodes=3).returns_by_step, first['returns_by_step'], atol=1e-3)
    assert run_experiment('nav2d', tmp_path, [0, 1], both, **small) == results and path.stat().st_mtime_ns == begin
    path.write_text(path.read_text()[:100])  # torn
    again = run_experiment('nav2d', tmp_path, [0, 1], both, **small)
    assert [r['iqm'] for r in again['table']] == [r['iqm'] for r in results['table']]
    assert json.loads(path.read_text())['training_s'] == first['training_s']  # trained once, and that is the time it took
    assert json.loads(path.read_text())['provenance']['training'] == first['provenance']['training']
    run_experiment('nav2d', tmp_path, [1], ['SSM'], **small | dict(outer_steps=3))
    assert len(found()) == 2


def test_experiments_and_variants_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="experiment='nav3d' is not one of 'digits', 'cartpole-shift', 'nav2d'"): run_experiment('nav3d', tmp_path / 'x')
    with pytest.raises(ValueError, match="variant='LSTM' is not one of 'SSM', 'no memory', 'GRU'"): run_experiment('nav2d', tmp_path / 'x', variants=['LSTM'])
    assert not (tmp_path / 'x').exists()


# --- configs ---

BASIC = pipeline.CONFIGS['basic']
TINY = replace(BASIC, num_envs=2, time_limit=5, meta=replace(BASIC.meta, tasks_per_batch=2, outer_steps=10))
TWO = np.int64(2)


def test_numpy_numbers_train_save_and_resume(tmp_path):
    config = ExperimentConfig(seed=TWO, num_envs=TWO, time_limit=np.int32(5), env_options={'rotation': np.float64(.5)}, adapt=AdaptConfig(steps=TWO, lr=np.float64(.01), trajectories=TWO, rollback=np.bool_(True)))
    config = replace(config, meta=replace(BASIC.meta, outer_steps=10, tasks_per_batch=2))
    assert type(config.num_envs) is type(config.adapt.steps) is int and type(config.env_options['rotation']) is type(config.adapt.lr) is float and config.adapt.rollback is True
    checkpoint = train(config, tmp_path, progress=False)['checkpoint']  # it used to end at step 10, in a TypeError
    assert checkpoints.load_checkpoint(checkpoint)[0] == config
    assert train(config, tmp_path, resume=True, progress=False)['outer_steps'] == 10
    result = pipeline.evaluate(checkpoint, episodes=TWO, seed=TWO)
    assert strict(json.dumps(result))['episodes'] == 2
    strict(json.dumps(pipeline.evaluate_with_adaptation(checkpoint, episodes=TWO, steps=TWO, lr=np.float64(.02)).summary()))


@register_family('Optional-v0')
class Optional(type(BASIC.env.family)):
    "Navigation that takes any option, and does not look at it."
    def __init__(self, option=None): super().__init__()


@pytest.mark.parametrize('option', ['text', 3, .5, True, None, [1, 2, 'x'], (1, (2, 3)), {'size': 3, 'inner': {'a': [1.5, None]}}, np.float32(.5), [np.int64(3)]])
def test_options_that_are_accepted_come_back_from_a_file(option, tmp_path):
    config = replace(TINY, env_name='Optional-v0', env_options={'option': option})
    checkpoints.save_checkpoint(tmp_path / 'a.npz', config, checkpoints.make_learner(config).state_dict())
    assert checkpoints.load_checkpoint(tmp_path / 'a.npz')[0] == config


@pytest.mark.parametrize('option', [np.zeros(3), {1: 2}, float('nan'), float('inf'), print, b'bytes', {1, 2}, [np.zeros(2)], torch.zeros(2)])
def test_options_that_no_file_can_hold_are_refused(option):
    with pytest.raises(ValueError, match='env_options') as error: replace(TINY, env_name='Optional-v0', env_options={'option': option})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('make, message', [
    (lambda: dict(policy=replace(BASIC.policy, history=1)), 'history'), (lambda: dict(meta=replace(BASIC.meta, first_order=1)), 'first_order'), (lambda: dict(learner=3), 'ExperimentConfig.learner'),
    (lambda: dict(env_options=[('rotation', 1.)]), 'ExperimentConfig.env_options'), (lambda: dict(meta={}), 'ExperimentConfig.meta'), (lambda: dict(adapt=None), 'ExperimentConfig.adapt')])
def test_what_would_not_come_back_from_a_file_is_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message): replace(TINY, **make())


@pytest.mark.parametrize('wrong, message', [
    (dict(lr='x'), 'lr'), (dict(steps=1.5), 'steps'), (dict(steps=True), 'steps'), (dict(optimizer=print), 'optimizer'), (dict(max_grad_norm=None), 'max_grad_norm'),
    (dict(online=1), 'online'), (dict(rollback='no'), 'rollback'), (dict(lr=np.ones(2)), 'lr'),
    (dict(online_interval=5), 'not used with online=False'), (dict(entropy_weight=.5), "not used with strategy='none'")])
def test_adaptation_settings_that_are_wrong_or_ignored(wrong, message):
    with pytest.raises(ValueError, match=message) as error: AdaptConfig(**wrong)
    assert '\n' not in str(error.value)


def test_every_built_in_config_comes_back_from_a_file(tmp_path):
    for config in [*pipeline.CONFIGS.values(), *(experiment.variant(name, 3) for experiment in EXPERIMENTS.values() if isinstance(experiment, Experiment) for name in experiment.variants)]:
        checkpoints.save_checkpoint(tmp_path / 'a.npz', config, checkpoints.make_learner(config).state_dict())
        assert checkpoints.load_checkpoint(tmp_path / 'a.npz')[0] == config


def test_ignored_settings_are_refused_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="optimizer='adam' divides"): train(replace(TINY, learner='anil', adapt=AdaptConfig(optimizer='adam')), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
    checkpoint = train(replace(TINY, meta=replace(TINY.meta, outer_steps=1)), tmp_path, progress=False)['checkpoint']
    with pytest.raises(ValueError, match='steps=0 takes no step, so lr, strategy would not be used'): pipeline.evaluate_with_adaptation(checkpoint, episodes=2, steps=0, lr=.1, strategy='tent')
    with pytest.raises(ValueError, match='so trajectories would not be used'): pipeline.evaluate_with_adaptation(checkpoint, episodes=2, steps=0, online=True, trajectories=3)
    pipeline.evaluate_with_adaptation(checkpoint, episodes=2, steps=0, online=True, lr=.1, rollback=False, tolerance=AdaptConfig.tolerance)
    assert pipeline.evaluate_with_adaptation(checkpoint, episodes=2, steps=0).summary()['improvement'] == 0


def test_a_checkpoint_adapts_as_it_was_trained_whatever_the_config(tmp_path):
    checkpoint = train(replace(TINY, learner='anil', meta=replace(TINY.meta, outer_steps=1, gamma=.9)), tmp_path, progress=False)['checkpoint']
    config = checkpoints.load_learner(checkpoint, replace(TINY, time_limit=7))[1]
    assert (config.learner, config.meta.gamma, config.time_limit) == ('anil', .9, 7)


@pytest.mark.parametrize('words, message', [
    ('train --outer-steps 3 --meta.outer-steps 4', 'contradict each other'),
    ('train --adapt.online-interval 5', 'online_interval=5 is not used with online=False'),
    ('train --learner meta-sgd --adapt.optimizer adam --num-envs 2 --time-limit 5', "divides the step sizes out that 'meta-sgd' has")])
def test_settings_that_would_be_ignored_in_a_terminal(words, message, tmp_path, capsys):
    assert main([*words.split(), '--ckpt-dir', str(tmp_path / 'x')]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and message in err


def test_nested_options_of_a_file_pass_the_command_line(tmp_path, capsys, recwarn):
    (tmp_path / 'mine.toml').write_text('env_name = "Optional-v0"\n[env_options]\noption = {sizes = [1, 2], name = "x"}\n')
    assert parse(['train', '--config', str(tmp_path / 'mine.toml')]).experiment.env_options == {'option': {'sizes': [1, 2], 'name': 'x'}}
    assert parse('train --env-name Optional-v0 --env-options option text'.split()).experiment.env_options == {'option': 'text'}
    assert not [w for w in recwarn if 'tyro' in str(w.filename)]


def test_numpy_numbers_in_an_experiment(tmp_path):
    results = run_experiment('nav2d', tmp_path, np.arange(2), ['SSM'], episodes=np.int64(3), progress=False, outer_steps=TWO)
    assert results['table'][0]['seeds'] == [0, 1] and results['table'][0]['command'] == 'ssm-metarl experiment nav2d --variants SSM --seeds 2 --outer-steps 2 --episodes 3'


@pytest.mark.parametrize('learner, ignored', [
    ('joint', dict(inner_kl=.1)), ('joint', dict(first_order=True)), ('joint', dict(inner_steps=2)), ('joint', dict(head='log_std')), ('joint', dict(max_kl=.1)),
    ('rl2', dict(inner_kl=.1)), ('rl2', dict(first_order=True)), ('rl2', dict(inner_steps=2)), ('rl2', dict(head='log_std')), ('rl2', dict(max_kl=.1)),
    ('maml', dict(head='nonsense')), ('maml', dict(max_kl=.1)), ('maml', dict(outer='trpo', clip=.3)), ('maml', dict(outer='trpo', outer_epochs=5)), ('reptile', dict(clip=.3)), ('reptile', dict(entropy_coef=.1))])
def test_settings_that_a_learner_ignores_are_refused(learner, ignored, capsys):
    with pytest.raises(ValueError, match=next(iter(ignored.keys() - {'outer'}))) as error: replace(BASIC, learner=learner, meta=replace(BASIC.meta, **ignored))
    assert '\n' not in str(error.value)
    words = [word for k, v in ignored.items() for word in ([f'--meta.{k.replace("_", "-")}'] if v is True else [f'--meta.{k.replace("_", "-")}', str(v)])]
    assert main(['train', '--learner', learner, *words]) == 2 and capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('learner', ['joint', 'rl2'])
def test_what_adaptation_uses_afterwards_stays_allowed(learner):
    assert replace(BASIC, learner=learner, meta=replace(BASIC.meta, surrogate='dice')).meta.surrogate == 'dice'


def test_numpy_numbers_in_every_config(tmp_path):
    two, half = np.int64(2), np.float64(.5)
    config = ExperimentConfig(seed=two, num_envs=two, time_limit=np.int64(5), meta=MetaConfig(outer_steps=np.int64(10), tasks_per_batch=two, inner_steps=two, outer_epochs=two, gamma=half, first_order=np.bool_(True)),
                              adapt=AdaptConfig(steps=two, lr=half), policy=PolicyConfig(hidden_dim=np.int64(8), state_dim=np.int64(4), history=np.bool_(True)))
    checkpoint = train(config, tmp_path, progress=False)['checkpoint']
    assert checkpoints.load_checkpoint(checkpoint)[0] == config and train(config, tmp_path, resume=True, progress=False)['outer_steps'] == 10
