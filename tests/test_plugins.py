"Plug-ins from outside the package: the files of examples/ in other folders, in processes of their own and in this one."
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_metarl import registry
from ssm_metarl.adapter import AdaptationConfig, Adapter
from ssm_metarl.checkpoints import CheckpointError, load_checkpoint, load_policy
from ssm_metarl.cli import main
from ssm_metarl.env_checks import check_family
from ssm_metarl.envs import EnvBatch, EnvConfig, sample_tasks
from ssm_metarl.files import read_npz, write_npz
from ssm_metarl.meta_learner import LEARNERS, MetaConfig
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.registry import PLUGINS, REGISTRIES, load_plugin

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / 'examples'
TINY = '--seed 3 --outer-steps 2 --tasks-per-batch 2 --num-envs 3 --time-limit 12 --policy.hidden-dim 8 --policy.state-dim 4'.split()
CHAINS = dict(windy=['--env-name', 'WindyNavigation-v0'], reservoir=['--policy.core', 'reservoir'],
              stay_close=['--adapt.strategy', 'l2-sp'], worst_first=['--learner', 'worst-first'])


def process(*words, cwd, program=('-m', 'ssm_metarl'), **env):
    env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'} | {k: str(v) for k, v in env.items()}
    return subprocess.run([sys.executable, *program, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)


def answer(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def header_of(checkpoint): return read_npz(checkpoint, 'ssm_metarl checkpoint', 1)[0]


@pytest.fixture(scope='module')
def chains(tmp_path_factory):
    "For each plug-in: a folder beside that of the plug-ins, in which a process trained with it, and its answer."
    folder = tmp_path_factory.mktemp('outside')
    shutil.copytree(EXAMPLES, folder / 'plugins')

    def chain(item):
        (folder / item[0]).mkdir()
        done = process('train', '--plugin', f'../plugins/{item[0]}.py', *TINY, *item[1], '--ckpt-dir', 'run', cwd=folder / item[0])
        return item[0], (folder / item[0], answer(done))
    with ThreadPoolExecutor(2) as pool: return dict(pool.map(chain, CHAINS.items()))


@pytest.fixture
def outside(tmp_path, monkeypatch):
    "A folder with the files of examples/, to work in; what is loaded there is forgotten afterwards."
    for file in EXAMPLES.glob('*.py'): shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    before = set(PLUGINS)
    yield tmp_path
    for name in set(PLUGINS) - before: forget(name)


def forget(name):
    registry._forget(registry._entries(name))
    sys.modules.pop(PLUGINS.pop(name).__name__, None)


@pytest.fixture
def terminal(capsys):
    "The program, in this process: words -> status, answer or None, lines of stderr."
    def run(*words):
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if out else None, err.strip().splitlines()
    return run


def registered(): return {field: dict(table) for field, table in REGISTRIES.items()}


@pytest.mark.parametrize('name', CHAINS)
def test_each_plugin_in_train_eval_and_adapt(chains, terminal, outside, monkeypatch, name):
    "The first in three processes that know nothing of each other; eval and adapt of the others in this one, to save time."
    cwd, trained = chains[name]
    monkeypatch.chdir(cwd)

    def ask(*words):
        words = (*words, '--checkpoint', 'run/latest.npz', '--episodes', 4, '--plugin', f'../plugins/{name}.py')
        return answer(process(*words, cwd=cwd)) if name == 'windy' else terminal(*words)[1]
    before, after = ask('eval'), ask('adapt', '--adapt-steps', 2)
    assert header_of(trained['checkpoint'])['plugins'] == [f'{name}.py'] and trained['outer_steps'] == 2
    assert before['mean_return'] == after['pre_return'] == after['returns_by_step'][0]
    assert after['post_return'] != after['pre_return'] and len(after['returns_by_step']) == 3
    assert sorted(path.name for path in cwd.iterdir()) == ['run']  # nothing was written beside it


def test_what_is_missing_is_named(chains, terminal, outside):
    checkpoint = chains['windy'][0] / 'run' / 'latest.npz'
    for mode in 'eval', 'adapt':
        status, _, (line,) = terminal(mode, '--checkpoint', checkpoint)
        assert status == 1 and "latest.npz does not fit: it needs the plug-in 'windy.py', which is not loaded; give --plugin PATH/windy.py" in line
    with pytest.raises(CheckpointError, match=r"\(in Python: load_plugin\('PATH/windy.py'\)\)$"): load_policy(checkpoint)
    load_plugin('windy.py')
    assert load_policy(checkpoint)[2].env_name == 'WindyNavigation-v0'


def test_two_plugins_and_one_of_them_missing(terminal, outside):
    both = ['--plugin', 'windy.py', '--plugin=reservoir.py']
    assert terminal('train', *both, *TINY, *CHAINS['windy'], *CHAINS['reservoir'], '--ckpt-dir', 'run')[0] == 0
    assert header_of('run/latest.npz')['plugins'] == ['reservoir.py', 'windy.py']
    for name in 'windy.py', 'reservoir.py': forget(name)
    status, _, (line,) = terminal('eval', '--checkpoint', 'run/latest.npz')
    assert status == 1 and "the plug-ins 'reservoir.py', 'windy.py', which are not loaded; give --plugin PATH/reservoir.py --plugin PATH/windy.py" in line
    status, _, (line,) = terminal('eval', '--checkpoint', 'run/latest.npz', '--plugin', 'windy.py')
    assert status == 1 and "the plug-in 'reservoir.py', which is not loaded" in line and 'windy.py' not in line
    assert terminal('eval', '--checkpoint', 'run/latest.npz', '--plugin', 'reservoir.py', '--episodes', 2)[0] == 0


def test_one_config_that_imports_the_others(terminal, outside):
    small = [word for word in TINY if 'policy' not in word and word not in '84']
    assert terminal('train', '--plugin', 'windy_lab.py', '--config', 'windy-lab', *small, '--ckpt-dir', 'run')[0] == 0
    header = header_of('run/latest.npz')
    config = header['config']
    assert header['plugins'] == ['windy_lab.py']
    assert (config['env_name'], config['learner'], config['policy']['core'], config['adapt']['strategy']) == ('WindyNavigation-v0', 'worst-first', 'reservoir', 'l2-sp')
    before, after = (terminal(mode, '--checkpoint', 'run/latest.npz', '--episodes', 3)[1] for mode in ('eval', 'adapt'))
    assert before['mean_return'] == after['pre_return']
    forget('windy_lab.py')
    assert 'windy' not in sys.modules  # its siblings, too
    for name in CHAINS: load_plugin(f'{name}.py')  # the names are known, so the file that is missing is not missed
    assert terminal('eval', '--checkpoint', 'run/latest.npz', '--episodes', 3)[1] == before


def test_resumed_with_the_plugin(terminal, outside):
    words = ['train', *TINY, *CHAINS['windy'], *CHAINS['worst_first'], '--ckpt-dir']
    both = ['--plugin', 'windy.py', '--plugin', 'worst_first.py']
    assert terminal(*words, 'whole', *both, '--outer-steps', 4)[0] == 0
    assert terminal(*words, 'halved')[0] == 0
    for name in 'windy.py', 'worst_first.py': forget(name)
    status, _, lines = terminal(*words, 'halved', '--resume', '--outer-steps', 4)
    assert status == 2 and len(lines) == 1 and '(--plugin)' in lines[0]
    assert terminal(*words, 'halved', '--resume', *both, '--outer-steps', 4)[0] == 0
    whole, halved = (load_checkpoint(f'{name}/latest.npz')[1] for name in ('whole', 'halved'))
    assert whole.keys() == halved.keys() and all(np.array_equal(whole[k], halved[k]) for k in whole) and whole['step'] == 4


def test_a_checkpoint_imports_nothing(chains, terminal, outside):
    header, state = read_npz(chains['windy'][0] / 'run' / 'latest.npz', 'ssm_metarl checkpoint', 1)
    Path('trap.py').write_text("open('sprung', 'w').close()")
    sys.path.insert(0, str(outside))
    for plugin in 'trap', 'trap.py', str(outside / 'trap.py'), 'this', 'trap; rm x.py':
        write_npz('odd.npz', header | dict(plugins=[plugin]), state)
        status, _, (line,) = terminal('eval', '--checkpoint', 'odd.npz')
        assert status == 1 and f'needs the plug-in {plugin!r}, which' in line and len(line) <= 320  # long names are cut
    assert "--plugin 'PATH/trap; rm x.py'" in line  # may be copied into a shell
    for wrong in None, 3, 'windy.py', {'windy.py': 1}, [3], [None], [['windy.py']], [''], ['x' * 300], ['x'] * 1000, True:
        write_npz('odd.npz', header | dict(plugins=wrong), state)
        status, _, (line,) = terminal('eval', '--checkpoint', 'odd.npz')
        assert status == 1 and 'plugins must be a list of names, not ' in line and len(line) < 200
    assert not {'trap', 'this'} & set(sys.modules) and not Path('sprung').exists()


@pytest.mark.parametrize('end, said', [('1 / 0', 'line 6: ZeroDivisionError: division by zero'), ('raise SystemExit(0)', 'line 6: SystemExit: 0'),
                                       ('import no_such_module', "line 6: ModuleNotFoundError: No module named 'no_such_module'"), ('def f(:', 'line 6: SyntaxError'),
                                       ("register_core('half')(7)", "line 6: TypeError: 7 has no method functional")])
def test_half_a_plugin_leaves_nothing(terminal, outside, end, said):
    text = 'import windy\nfrom ssm_metarl.cores import register_core\nfrom reservoir import Reservoir\nregister_core("half")(type("Half", (Reservoir,), {}))\n\n'
    before = registered()
    Path('half.py').write_text(text + end)
    status, out, lines = terminal('train', '--plugin', 'half.py', *TINY)
    assert status == 2 and out is None and len(lines) == 1
    assert lines[0].startswith(f"ssm-metarl: plugin='half.py' cannot be loaded (half.py, {said}")
    assert registered() == before and not {'half', 'windy', 'reservoir'} & set(sys.modules) and 'half.py' not in PLUGINS
    Path('half.py').write_text(text + '# mended\n')
    load_plugin('half.py')
    assert {name for table in REGISTRIES.values() for name, origin in table.origins.items() if origin == 'half.py'} == {'WindyNavigation-v0', 'half', 'reservoir'}


def test_interrupted_half_way(outside):
    before = registered()
    Path('slow.py').write_text('import windy\nraise KeyboardInterrupt')
    with pytest.raises(KeyboardInterrupt): load_plugin('slow.py')
    assert registered() == before and 'slow' not in sys.modules and not registry._loading


CLASHES = {
    'env_name': ('MetaCartPole-v0', 'from ssm_metarl.envs import Family as Base, register_family as register'),
    'core': ('gru', 'from ssm_metarl.ssm import SSM as Base\nfrom ssm_metarl.cores import register_core as register'),
    'learner': ('maml', 'from ssm_metarl.meta_learner import MetaLearner as Base, register_learner as register'),
    'strategy': ('none', 'from ssm_metarl.adapter import AdaptationStrategy as Base, register_adaptation_strategy as register'),
}


@pytest.mark.parametrize('field', CLASHES)
def test_names_of_the_library_stay_its_own(terminal, outside, field):
    (name, imports), before = CLASHES[field], registered()
    Path('clash.py').write_text(f'{imports}\n@register({name!r})\nclass Mine(Base): pass')
    status, _, lines = terminal('train', '--plugin', 'clash.py', *TINY)
    assert status == 2 and len(lines) == 1 and f'{name!r} is registered already, by ssm_metarl.' in lines[0] and 'clash.py, line ' in lines[0]
    assert registered() == before


def test_the_name_of_a_config_stays_its_own(terminal, outside):
    Path('clash.py').write_text("from ssm_metarl.config import ExperimentConfig, register_config\n@register_config('basic')\ndef mine(): return ExperimentConfig(seed=1)")
    status, _, (line,) = terminal('train', '--plugin', 'clash.py', *TINY)
    assert status == 2 and "config 'basic' is registered already, by ssm_metarl.config" in line


def distribution(site, name, code, entry_points):
    "What pip would leave in site-packages."
    package, info = site / name, site / f'{name}-1.0.dist-info'
    for folder in package, info: folder.mkdir(parents=True)
    (package / '__init__.py').write_text('')
    (package / 'worlds.py').write_text(code)
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text(entry_points)


def test_an_installed_plugin_needs_no_flag(terminal, outside, monkeypatch):
    site = outside / 'site'
    declared = '[ssm_metarl.plugins]\nworlds = {0}.worlds\n'
    distribution(site, 'windy_pack', (outside / 'windy.py').read_text(), declared.format('windy_pack'))
    distribution(site, 'broken_pack', 'width = 3\nprint(widht)', declared.format('broken_pack'))
    distribution(site, 'garbled_pack', '', '[ssm_metarl.plugins]\nworlds = no module\n')
    distribution(site, 'other_pack', 'raise RuntimeError("not asked for")', '[console_scripts]\nworlds = other_pack.worlds:main\n')
    done = process('train', *TINY, *CHAINS['windy'], '--ckpt-dir', 'run', cwd=outside, PYTHONPATH=f'{ROOT}{os.pathsep}{site}')
    assert answer(done)['outer_steps'] == 2
    notes = [line for line in done.stderr.splitlines() if line.startswith('ssm-metarl: note:')]
    assert len(notes) == 2 and "plugin='broken_pack.worlds' cannot be loaded (worlds.py, line 2: NameError: name 'widht'" in notes[0] and "plugin='no module' is neither" in notes[1]
    assert header_of('run/latest.npz')['plugins'] == ['windy_pack.worlds']

    status, _, (line,) = terminal('eval', '--checkpoint', 'run/latest.npz')
    assert status == 1 and "needs the plug-in 'windy_pack.worlds', which is not loaded; give --plugin windy_pack.worlds" in line
    monkeypatch.syspath_prepend(str(site))
    status, result, _ = terminal('eval', '--checkpoint', 'run/latest.npz', '--episodes', 2)
    assert status == 0 and np.isfinite(result['mean_return'])
    status, _, lines = terminal('train', '--plugin', 'windy.py', *TINY)  # two of the same name: the one that was named is refused
    assert status == 2 and "plugin='windy.py' cannot be loaded (windy.py, line 5: ValueError: family 'WindyNavigation-v0' is regist" in lines[-1]


def test_before_the_library_was_imported(outside):
    "What belongs to the library is never taken for the plug-in's, also if the plug-in imports it first, or fails."
    Path('first.py').write_text("import ssm_metarl.bandits, reservoir\nfrom ssm_metarl.envs import FAMILIES\nFAMILIES.find('MetaPendulum-v0')\n")
    Path('wrong.py').write_text("import windy\nfrom ssm_metarl.meta_learner import register_learner, MetaLearner\n@register_learner('maml')\nclass Mine(MetaLearner): pass\n")
    code = '''
from ssm_metarl.registry import load_plugin, REGISTRIES
try: load_plugin('wrong.py')
except ValueError as error: print('is registered already, by ssm_metarl.maml' in str(error))
origins = lambda: [(name, origin) for table in REGISTRIES.values() for name, origin in table.origins.items()]
print(origins(), 'WindyNavigation-v0' in REGISTRIES['env_name'])
load_plugin('first.py')
print(origins())
'''
    done = process(cwd=outside, program=('-c', code))
    assert done.stdout.splitlines() == ['True', '[] False', "[('reservoir', 'first.py')]"], done.stderr


def test_windy_moves_as_the_file_says(outside):
    load_plugin('windy.py')
    check_family('WindyNavigation-v0')
    config = EnvConfig('WindyNavigation-v0', num_envs=30, time_limit=40, seed=5)
    for split in 'held_out', 'storm':
        tasks = sample_tasks(config, 30, split)
        wind = np.stack([task['wind'] for task in tasks])
        assert (np.abs(wind).max(1) > .05).all() if split == 'storm' else (np.abs(wind) <= .05).all()
        env = EnvBatch(config, tasks, freeze=True)
        env.reset()
        for t in range(1, 4): obs = env.step(np.zeros((30, 2), np.float32))[0]
        np.testing.assert_allclose(obs, 3 * wind, atol=1e-6)  # carried away, by one wind a step
        reached = np.zeros(30, bool)
        env.reset()
        for _ in range(40):
            _, reward, terminated, *_ = env.step(env.family.oracle(env.state, env.tasks))
            reached |= terminated
        assert split == 'storm' or reached.all()  # who knows goal and wind arrives


def test_the_reservoir_does_not_move_and_is_saved(chains):
    header, state = read_npz(chains['reservoir'][0] / 'run' / 'latest.npz', 'ssm_metarl checkpoint', 1)
    load_plugin(EXAMPLES / 'reservoir.py')
    try:
        config, _ = load_checkpoint(chains['reservoir'][0] / 'run' / 'latest.npz')
        start = config.make_policy().get_params()
    finally: forget('reservoir.py')
    moved = {k for k, v in start.items() if not np.array_equal(state[f'params/{k}'], v.detach())}
    core = {k for k in start if k.startswith('core.')}
    assert core - moved == {'core.log_decay', 'core.frequency', 'core.log_dt'} and len(core & moved) == 5


@pytest.mark.parametrize('M', [1, 3])
def test_the_pull_is_that_of_the_equation(outside, M):
    "Two steps on the loss c . p: d1 = -lr c, d2 = d1 - lr (c + w d1)."
    strategy = load_plugin('stay_close.py').StayClose()
    strategy.weight, lr = 3., .1
    start, slope = torch.arange(2. * M).view(M, 2).double(), torch.tensor([1., -2.]).double()
    config = AdaptationConfig(lr=lr, optimizer='sgd', steps=2, max_grad_norm=None, trust_radius=None)
    adapter = Adapter({'p': start}, config, strategy, stacked=True)
    adapter.adapt(lambda outputs, batch: adapter.params['p'] @ slope, batch={})
    torch.testing.assert_close(adapter.params['p'].detach() - start, (-lr * slope * (2 - lr * 3)).expand(M, 2))
    with pytest.raises(ValueError, match='overshoot'): Adapter({'p': start}, AdaptationConfig(lr=.5, optimizer='sgd'), type(strategy)(), stacked=True)


def test_the_worst_tasks_weigh_most(outside):
    "The meta-gradient is that of MAML with the loss of each task times a softmax of its standardised return, worked out in NumPy."
    load_plugin('worst_first.py')
    env = EnvConfig(num_envs=3, time_limit=8)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(8, 4), 0).double()
    losses, errors, params = {}, {}, {}
    for name in 'maml', 'worst-first':
        learner = LEARNERS.find(name)(policy, env, MetaConfig())
        (*support, (query, advantage)), _ = learner.collect_all(sample_tasks(env, 4))
        losses[name], errors[name], *_ = learner.outer_loss(support, query, advantage)
        params[name] = [v for k, v in learner.params.items() if not k.startswith('value.')]
    returns = query.returns.mean(1).numpy()
    weight = np.exp(-(returns - returns.mean()) / returns.std())
    weight *= 4 / weight.sum()
    wanted = torch.autograd.grad((torch.from_numpy(weight) * losses['maml']).sum(), params['maml'])
    found = torch.autograd.grad(losses['worst-first'].sum(), params['worst-first'])
    for a, b in zip(found, wanted, strict=True): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    assert max(x.abs().max() for x in wanted) > 1e-3
    torch.testing.assert_close(*errors.values())  # the value head learns as before
    assert weight.argmax() == returns.argmin()
