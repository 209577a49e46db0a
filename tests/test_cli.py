"The command line as a user meets it: processes, their output and their exit status."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ssm_metarl import cli, training
from ssm_metarl.config import CONFIGS
from ssm_metarl.envs import sample_tasks
from ssm_metarl.cli import main

ROOT = Path(__file__).resolve().parent.parent
REFERENCES = {'random_return', 'nothing_return', 'oracle_return'}
PROGRAMS = [[sys.executable, 'main.py'], [sys.executable, '-m', 'ssm_metarl'], [str(Path(sys.executable).parent / 'ssm-metarl')]]


def run(*words, program=PROGRAMS[0]):
    return subprocess.run([*program, *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1', 'COLUMNS': '100'})


def answer(*words):
    done = run(*words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    return folder, answer('train', '--config', 'basic', '--seed', 3, '--outer-steps', 11, '--tasks-per-batch', 2, '--num-envs', 3, '--time-limit', 12, '--ckpt-dir', folder)


def test_three_names_of_one_program():
    helps = [run('train', '--help', program=p) for p in PROGRAMS]
    assert {h.returncode for h in helps} == {0} and len({h.stdout for h in helps}) == 1
    assert '--outer-steps' in helps[0].stdout and '--meta.inner-lr' in helps[0].stdout


def test_train(trained):
    folder, result = trained
    assert result.keys() == {'outer_steps', 'wall_s', 'cpu_s', 'env_steps', 'final_pre_return', 'final_post_return', 'checkpoint', 'best_checkpoint'}
    assert result['outer_steps'] == 11 and 0 < result['env_steps'] <= 11 * 2 * 2 * 3 * 12  # some episodes end early
    assert sorted(p.name for p in folder.iterdir()) == ['best.npz', 'latest.npz', 'step_10.npz', 'train.jsonl']
    with np.load(folder / 'latest.npz', allow_pickle=False) as file:
        header = json.loads(str(file['header']))
        assert int(file['step']) == 11 and header['format_version'] == 1 and header['config']['time_limit'] == 12 and 'wall_s' not in str(header)


def test_eval_and_adapt_play_the_same_episodes(trained, tmp_path):
    checkpoint = trained[0] / 'latest.npz'
    before = answer('eval', '--checkpoint', checkpoint, '--episodes', 7)
    after = answer('adapt', '--checkpoint', checkpoint, '--episodes', 7, '--adapt-steps', 2, '--online', '--figure', tmp_path / 'a.png')
    assert before.keys() == {'mean_return', 'std_return', 'episodes'} | REFERENCES
    assert after.keys() == {'pre_return', 'post_return', 'improvement', 'improvement_ci95', 'interval_over', 'normalised_gain', 'hurt_rate', 'returns_by_step', 'episodes',
                            'kept', 'drift', 'kl', 'env_steps', 'gated', 'online_gain', 'online_gain_ci95'} | REFERENCES
    assert after['pre_return'] == before['mean_return'] == after['returns_by_step'][0] and len(after['returns_by_step']) == 3
    assert {k: before[k] for k in REFERENCES} == {k: after[k] for k in REFERENCES} and after['episodes'] == before['episodes'] == 7
    assert (tmp_path / 'a.png').stat().st_size > 10_000
    assert after['interval_over'] == 'tasks of one training seed only'
    other = answer('eval', '--checkpoint', checkpoint, '--episodes', 7, '--seed', 5)
    assert other['mean_return'] != before['mean_return'] and answer('eval', '--checkpoint', checkpoint, '--episodes', 7) == before


def test_flags_of_adaptation(trained):
    def adapt(*words): return answer('adapt', '--checkpoint', trained[0] / 'latest.npz', '--episodes', 7, '--adapt-steps', 3, '--lr', .5, *words)
    usual, bold, bound = adapt(), adapt('--no-rollback'), adapt('--no-rollback', '--max-kl', .01)
    assert min(usual['kept']) < 1 and set(bold['kept']) == {1} and adapt('--rollback') == usual
    assert 0 < bound['kl'][-1] < bold['kl'][-1] and bound['drift'][-1] < bold['drift'][-1]
    few, small, shut = adapt('--trajectories', 2), adapt('--no-rollback', '--trust-radius', 1e-4), adapt('--gate')
    assert few['env_steps'] == usual['env_steps'] * 2 / 3 and 0 < small['drift'][-1] < bold['drift'][-1] / 10
    assert shut['gated'] > .5 and (shut['gated'] < 1 or shut['improvement'] == 0)
    wrong = run('adapt', '--checkpoint', trained[0] / 'latest.npz', '--rollback', '--no-rollback')
    assert wrong.returncode == 2 and 'contradict each other' in wrong.stderr and len(wrong.stderr.splitlines()) == 1


def test_out_of_distribution(trained):
    checkpoint = trained[0] / 'latest.npz'
    usual, far = (answer('eval', '--checkpoint', checkpoint, '--episodes', 20, *words) for words in ((), ('--split', 'far')))
    assert far['nothing_return'] < usual['nothing_return'] - 2 and far['mean_return'] < usual['mean_return']  # the goals are farther away
    assert answer('adapt', '--checkpoint', checkpoint, '--episodes', 20, '--split', 'far', '--adapt-steps', 1)['pre_return'] == far['mean_return']


def test_interrupted_and_resumed(trained, tmp_path):
    words = ['train', '--seed', 3, '--tasks-per-batch', 2, '--num-envs', 3, '--time-limit', 12, '--ckpt-dir', tmp_path, '--outer-steps', 11]
    process = subprocess.Popen([*PROGRAMS[0], *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    while process.poll() is None and not (tmp_path / 'train.jsonl').exists() or (tmp_path / 'train.jsonl').read_text() == '': time.sleep(.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    if process.returncode != 0: assert (process.returncode, out) == (130, '') and err.splitlines()[-1].startswith('ssm-metarl: stopped by SIGINT after') and '--resume' in err.splitlines()[-1]  # else it was faster than we
    answer(*words, '--resume')
    with np.load(trained[0] / 'latest.npz') as whole, np.load(tmp_path / 'latest.npz') as parts:
        for k in set(whole.files) - {'header'}: assert whole[k].tobytes() == parts[k].tobytes(), k


def test_a_signal_in_the_last_training_step_stops_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, 'train', lambda *args, **options: dict(interrupted_by='SIGINT', checkpoint=str(tmp_path / 'latest.npz')))
    assert main(['demo', '--out', str(tmp_path)]) == 130
    assert capsys.readouterr() == ('', 'ssm-metarl: stopped by SIGINT\n')


def test_resume_after_a_stop(trained, tmp_path):
    words = ['train', '--seed', 3, '--tasks-per-batch', 2, '--num-envs', 3, '--time-limit', 12, '--ckpt-dir', tmp_path]
    answer(*words, '--outer-steps', 10), answer(*words, '--outer-steps', 11, '--resume')
    with np.load(trained[0] / 'latest.npz') as whole, np.load(tmp_path / 'latest.npz') as parts:
        for k in set(whole.files) - {'header'}: assert whole[k].tobytes() == parts[k].tobytes(), k


def test_an_experiment_in_small(tmp_path):
    words = ['experiment', 'nav2d', '--variants', 'SSM', '--outer-steps', 2, '--episodes', 4, '--out', tmp_path]
    first = answer(*words, '--seeds', 1, '--first-seed', 1)
    both = answer(*words, '--seeds', 2)  # the second seed is there already
    results = json.loads((tmp_path / 'nav2d' / 'results.json').read_text())
    rows = [json.loads((tmp_path / 'nav2d' / 'rows' / f'SSM_{seed}.json').read_text()) for seed in (0, 1)]
    assert len(first['SSM']) == len(both['SSM']) == 4 and results['table'][0]['seeds'] == [0, 1] and results['table'][0]['iqm'] == both['SSM']
    returns = np.array([row['returns_by_step'] for row in rows])  # [2, 4, 4]
    np.testing.assert_allclose(both['SSM'], [np.mean(np.sort(returns[:, k].ravel())[2:6]) for k in range(4)], atol=2e-3)  # the middle half of eight
    assert results['published']['MAML (Finn et al. 2017)'] == [-40.41, -11.68, -3.33, -3.23]
    assert all(row['summary']['hurt_rate'] >= 0 and row['config']['seed'] == seed for seed, row in enumerate(rows))
    assert (tmp_path / 'nav2d' / 'results.png').stat().st_size > 10_000


def bad_files(folder, checkpoint):
    content = checkpoint.read_bytes()
    (folder / 'short.npz').write_bytes(content[:len(content) // 2]), (folder / 'text.npz').write_text('hello'), (folder / 'file').write_text('')
    np.savez(folder / 'foreign.npz', weights=np.ones(3))


@pytest.mark.parametrize('words, status, message', [
    ('eval --checkpoint {f}/none.npz', 1, 'does not exist'),
    ('eval --checkpoint {f}/short.npz', 1, 'is damaged'),
    ('adapt --checkpoint {f}/text.npz', 1, 'is damaged'),
    ('adapt --checkpoint {f}/foreign.npz', 1, 'is not a ssm_metarl checkpoint'),
    ('eval --checkpoint {c} --config nav2d', 1, 'latest.npz does not fit the config'),
    ('train --config bsaic', 2, "'bsaic' is not one of 'basic', 'nav2d'"),
    ('train --config {f}/no.toml', 2, 'no such file'),
    ('train --env-name Nowhere-v0', 2, "'Nowhere-v0' is not one of"),
    ('train --outer-steps 1000000000000000000000000000000', 2, 'outer_steps=1000000000000000000000000000000 is too large; take a number below 2**31 = 2,147,483,648'),
    ('train --adapt.steps 2147483648', 2, 'steps=2147483648 is too large'),
    ('train --env-options rotation x', 2, "rotation='x' is not of type float, as this option of 'MetaGymToy-v0' must be"),
    ('train --env-options.rotation True', 2, 'rotation=True is not of type float'),
    ('train --env-name MetaBandit-v0 --env-options arms 2.5', 2, "arms=2.5 is not of type int, as this option of 'MetaBandit-v0' must be"),
    ('train --env-name MetaPendulum-v0 --env-options sensor_bias x', 2, "sensor_bias='x' is not of type float"),
    ('train --outer-steps 0', 2, 'outer_steps=0 is not a positive integer'),
    ('train --tasks-per-batch -3', 2, 'tasks_per_batch=-3'),
    ('train --num-envs 0', 2, 'num_envs=0'),
    ('train --seed -1', 2, 'seed=-1'),
    ('train --meta.inner-lr nan', 2, 'inner_lr=nan'),
    ('train --ckpt-dir {f}/file/x', 1, 'is not a folder that can be written to'),
    ('train --ckpt-dir /proc/x', 1, 'is not a folder that can be written to'),
    ('eval --checkpoint {c} --episodes 0', 2, 'episodes=0 is not a number from 1'),
    ('eval --checkpoint {c} --seed -1', 2, 'seed=-1'),
    ('adapt --checkpoint {c} --adapt-steps -1', 2, 'steps=-1 is negative'),
    ('adapt --checkpoint {c} --strategy tnet', 2, "'tnet' is not one of 'none', 'norm', 'tent'"),
    ('adapt --checkpoint {c} --lr 0', 2, 'lr=0.0 is not a positive number'),
    ('adapt --checkpoint {c} --figure {f}/file/a.png', 1, 'is not a folder that can be written to'),
    ('adapt --checkpoint {c} --figure {f}/a.docx', 2, 'must end in .png, .pdf or .svg'),
    ('train --device cuda:99', 2, "device='cuda:99' cannot be used"),
    ('train --device meta', 2, "device='meta' cannot be used"),
    ('train --tasks-per-batch 99999999999999999999', 2, 'tasks_per_batch=99999999999999999999 is not at most 1,000,000'),
    ('train --seed 99999999999999999999', 2, 'below 2**63'),
    ('train --policy.init-log-std nan', 2, 'not both finite'),
    ('train --policy.init-log-std -5e1', 2, 'min_log_std=-2.5 is above init_log_std=-50.0'),
    ('train --seed', 2, '--seed'),
    ('train --outer-steps many', 2, '--outer-steps'),
    ('eval --checkpoint {f}', 1, 'cannot be read'),
    ('experiment nav3d --out {f}', 2, "experiment='nav3d' is not one of 'digits', 'cartpole-shift', 'nav2d'"),
    ('experiment nav2d --out {f}/x --variants LSTM', 2, "variant='LSTM' is not one of 'SSM', 'no memory', 'GRU'"),
    ('experiment nav2d --out {f} --seeds 0', 2, 'seeds=0 is not a positive number'),
    ('experiment nav2d --out {f}/file/x', 1, 'is not a folder that can be written to'),
    ('eval --checkpoint {c} --split nowhere', 2, "split='nowhere' is not one of 'train', 'validation', 'held_out', 'far'"),
    ('eval', 2, '--checkpoint'),
    ('trian', 2, 'trian'),
    ('', 2, 'train')])
def test_what_is_wrong_is_said_in_one_line(words, status, message, trained, tmp_path, capsys):
    bad_files(tmp_path, trained[0] / 'latest.npz')
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(words.format(f=tmp_path, c=trained[0] / 'latest.npz').split()) == status
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize('words, status', [('eval --checkpoint none.npz', 1), ('train --outer-steps 0', 2)])
def test_a_process_ends_with_that_status(words, status):
    done = run(*words.split())
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (status, '', 1)


def here(capsys, *words):  # the same program, without a process of its own
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize('words', [
    ('--learner', 'reptile', '--meta.inner-steps', 2), ('--learner', 'anil'), ('--learner', 'meta-sgd'), ('--learner', 'joint'), ('--learner', 'rl2', '--policy.history', '--episodes-per-trial', 2),
    ('--config', 'bandit-dependent'), ('--config', 'mdp-10', '--episodes-per-trial', 3), ('--config', 'nav2d-rotated')])
def test_every_learner_trains_goes_on_evaluates_and_adapts(words, tmp_path, capsys, monkeypatch):
    sizes = '--tasks-per-batch', 3, '--num-envs', 2, '--time-limit', 6, '--seed', 5, '--outer-steps', 3
    here(capsys, 'train', *words, *sizes, '--ckpt-dir', tmp_path / 'whole')
    def interrupted(*args, step=0, **kw):
        if step == 2: raise KeyboardInterrupt
        return sample_tasks(*args, step=step, **kw)
    with monkeypatch.context() as patch:
        patch.setattr(training, 'sample_tasks', interrupted)
        assert main([str(word) for word in ('train', *words, *sizes, '--ckpt-dir', tmp_path)]) == 130
    capsys.readouterr()
    checkpoint = tmp_path / 'latest.npz'
    assert int(np.load(checkpoint)['step']) == 2
    assert here(capsys, 'train', *words, *sizes, '--ckpt-dir', tmp_path, '--resume')['outer_steps'] == 3
    with np.load(checkpoint) as gone_on, np.load(tmp_path / 'whole' / 'latest.npz') as whole:
        assert sorted(gone_on.files) == sorted(whole.files)
        for name in whole.files: assert np.array_equal(gone_on[name], whole[name]), name
        online = () if json.loads(str(whole['header']))['config']['learner'] == 'rl2' else ('--online',)
    before = here(capsys, 'eval', '--checkpoint', checkpoint, '--episodes', 4)
    after = here(capsys, 'adapt', '--checkpoint', checkpoint, '--episodes', 4, '--adapt-steps', 2, *online, '--figure', tmp_path / 'a.png')
    assert after['pre_return'] == before['mean_return'] == after['returns_by_step'][0] and len(after['returns_by_step']) == 3
    assert {k: v for k, v in before.items() if k in REFERENCES} == {k: v for k, v in after.items() if k in REFERENCES}


def test_what_there_is(capsys):
    assert main(['list']) == 0
    out = capsys.readouterr().out
    for name in ('basic', 'MetaHalfCheetahVel-v0', 'meta-sgd', 'h3', 'tent', 'nav2d-relatives'): assert any(line.split()[0] == name and len(line.split()) > 3 for line in out.splitlines() if line.strip()), name
    assert main(['list', 'cores']) == 0 and [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ['ssm', 'stack', 'h3', 'gru', 'none']
    assert main(['--version']) == 0 and capsys.readouterr().out.startswith('ssm-metarl 0.')
    assert main(['--help']) == 0
    out = capsys.readouterr().out
    for name in ('train', 'demo', '--plugin', '--version'): assert f'\n  {name} ' in out


def test_list_shows_what_each_config_is_for_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    assert main(['list', 'configs']) == 0
    lines = dict(line.split('  ', 1) for line in capsys.readouterr().out.splitlines())
    for name in ('basic', 'nav2d', 'nav2d-rotated', 'bandit-dependent', 'bandit-independent', 'bandit-10-5', 'bandit-100-5', 'mdp-10'):
        assert lines[name].strip() == CONFIGS.makers[name].__doc__ and len(CONFIGS.makers[name].__doc__) > 20


def test_help_names_what_a_plugin_adds_and_fits_a_terminal(tmp_path):
    (tmp_path / 'mine.py').write_text('from ssm_metarl.adapter import AdaptationStrategy, register_adaptation_strategy\n@register_adaptation_strategy("sleepy")\nclass Sleepy(AdaptationStrategy): "Does nothing, slowly."\n')
    helped = subprocess.run([*PROGRAMS[0], 'train', '--plugin', str(tmp_path / 'mine.py'), '--help'], cwd=ROOT, capture_output=True, text=True, env=os.environ | {'COLUMNS': '80'})
    text = ' '.join(helped.stdout.replace('│', ' ').split())
    assert helped.returncode == 0 and max(map(len, helped.stdout.splitlines())) <= 80
    assert 'none, norm, tent, t3a, eata, sar, ttt, kl_anchor, sleepy' in text and '--plugin FILE.py|MODULE' in text
    assert text.index('--seed') < text.index('--meta.outer-steps') < text.index('--adapt.steps') < text.index('--policy.hidden-dim')
    listed = run('list', 'strategies', f'--plugin={tmp_path / "mine.py"}')
    assert listed.returncode == 0 and 'sleepy (from mine.py) Does nothing, slowly.' in ' '.join(listed.stdout.split())


def test_learning_curves_of_two_runs(trained, tmp_path, capsys):
    assert here(capsys, 'plot', trained[0], trained[0] / 'latest.npz', '--figure', tmp_path / 'a.png') == dict(runs=2, figure=str(tmp_path / 'a.png'))
    assert (tmp_path / 'a.png').stat().st_size > 10_000
    assert main(['plot', str(tmp_path)]) == 1 and 'holds no log of a training' in capsys.readouterr().err


def test_options_are_replaced_with_a_note_or_changed_one_by_one(tmp_path, capsys):
    words = ['train', '--config', 'nav2d-rotated', '--num-envs', '2', '--time-limit', '4', '--tasks-per-batch', '2', '--outer-steps', '1', '--ckpt-dir', str(tmp_path)]
    options = lambda: json.loads(str(np.load(tmp_path / 'latest.npz')['header']))['config']['env_options']
    assert main([*words, '--env-options', 'gain', '0.2']) == 0 and options() == {'gain': .2}
    assert "note: --env-options replaces the config's rotation 3.14" in capsys.readouterr().err
    assert main([*words, '--env-options.gain', '0.2']) == 0 and options() == {'rotation': np.pi, 'gain': .2}
    assert '--env-options' not in capsys.readouterr().err


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='this system has no /dev/full')
def test_streams_that_cannot_be_written(trained):
    words = [*PROGRAMS[0], 'eval', '--checkpoint', str(trained[0] / 'latest.npz'), '--episodes', '2']
    def shell(redirection): return subprocess.run(['sh', '-c', f'"$@" {redirection}', 'sh', *words], cwd=ROOT, capture_output=True, text=True)
    full, closed, silent = shell('>/dev/full'), shell('2>&-'), shell('2>/dev/full')
    assert full.returncode == 1 and full.stderr.splitlines()[-1] == 'ssm-metarl: the result cannot be written to standard output (No space left on device)'
    for done in (closed, silent): assert done.returncode == 0 and json.loads(done.stdout)['episodes'] == 2


def test_a_figure_that_cannot_be_written_loses_no_result(trained, tmp_path, capsys, monkeypatch):
    from matplotlib.figure import Figure
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Figure, 'savefig', full)
    assert main(['adapt', '--checkpoint', str(trained[0] / 'latest.npz'), '--episodes', '2', '--adapt-steps', '1', '--figure', str(tmp_path / 'a.png')]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)['episodes'] == 2 and 'cannot be written (No space left on device); the results are complete without it' in err.splitlines()[-1]


def test_contradictions_are_refused_before_a_folder_is_made(tmp_path, capsys):
    for words in ('--learner rl2 --policy.history --adapt.online', '--learner meta-sgd --adapt.optimizer adam', '--num-envs 1000000 --time-limit 1000000', '--env-options rotation 1e308', '--device hpu'):
        assert main(['train', *words.split(), '--ckpt-dir', str(tmp_path / 'x')]) == 2
        assert capsys.readouterr().err.count('\n') == 1 and list(tmp_path.iterdir()) == []
