"Three hundred command lines from a fixed seed, most of them wrong: one line, the right status, never a traceback."
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from ssm_metarl.cli import COMMANDS, KINDS, _kind, main
from ssm_metarl.config import ExperimentConfig

ROOT = Path(__file__).resolve().parent.parent
CASES, PROCESSES = 300, 20
SMALL = '--num-envs 2 --time-limit 4 --tasks-per-batch 2 --outer-steps 1 --ckpt-dir {f}/out{n}'.split()
BASES = {'train': SMALL, 'eval': ['--checkpoint', '{f}/run/latest.npz', '--episodes', '2'],
         'adapt': ['--checkpoint', '{f}/run/latest.npz', '--episodes', '2', '--adapt-steps', '1'],
         'experiment': ['nav2d', '--out', '{f}/file/x'], 'demo': ['--out', '{f}/file/x'],  # these two would take long, so they fail
         'list': [], 'plot': ['--figure', '{f}/curve{n}.svg', '{f}/run']}
BIG = str(10**30)
# what is certainly wrong, whatever the flag, by kind of its value
WRONG = {int: ['', ' ', 'x', '1.5', '1e3', 'nan', 'inf', '9' * 5000, '0x10', 'None', '💥', '\udcff', '1 2', '½', '-', '١.'],
         float: ['', 'x', '1,5', '💥', '\udcff', '0x1p', '1e', 'None', '1' * 5000 + 'x'], str: ['\udcff', 'a\udc80b'], Path: ['', 'a\0b']}
# what may be wrong, or not
ODD = {int: [BIG, '-' + BIG, '0', '-1'], float: ['nan', 'inf', '-inf', '1e400', '-5e-1', '1e308', '0'],
       str: ['', ' ', 'x' * 3000, '💥', "'; true", '%s%n', '../..', '{{x}}', 'a\0b', '-1', 'hpu', '\u202e', 'None', '["a"]'],
       Path: ['{f}/file', '{f}/folder', '{f}/pipe', '/dev/null', '/dev/full', '/dev/zero', '💥', '\udcff', 'x' * 3000, '/proc/x', '{f}/file/x', '{f}/short.npz', '{f}/deep.toml', '.png', '{f}/folder/x.png']}
UNKNOWN = [['--sed', '1'], ['-x'], ['--meta.nothing', '1'], ['---'], ['--policy', '1'], ['--\udcff'], ['--' + 'x' * 3000], ['--seed.x', '1'], ['--💥=1']]
PLUGINS = ['', '{f}/none.py', '{f}/bad.py', '{f}/leaves.py', '{f}/pipe.py', '{f}/latin.py', 'no_such_module', '..', 'a\0b', '\udcff.py', '-']
GOOD = {'train': [['--seed', '7'], ['--meta.inner-lr', '0.02'], ['--meta.first-order'], ['--device', 'cpu'], ['--env-options', 'gain', '0.1'], ['--resume'], ['--policy.hidden-dim=8'], ['--learner', 'anil'], ['--meta.inner-lr', '1e-2']],
        'eval': [['--deterministic'], ['--seed', '3'], ['--split', 'far'], ['--device=cpu']], 'adapt': [['--online'], ['--lr', '0.1'], ['--strategy', 'tent'], ['--figure', '{f}/a{n}.png'], ['--optimizer', 'sgd']],
        'plot': [['{f}/run/latest.npz'], ['{f}/run']], 'list': [['cores']], 'experiment': [], 'demo': []}
# large numbers here are only slow, and so no request that a program could refuse
PATIENT = {'outer_steps', 'inner_steps', 'outer_epochs', 'steps', 'adapt_steps', 'episodes', 'seeds', 'first_seed', 'online_interval', 'trajectories'}


def flags_of(cls, prefix=''):
    "(flag, kind of its value, name of the field) of a command."
    for f in fields(cls):
        kind = get_type_hints(cls)[f.name]
        if is_dataclass(kind): yield from flags_of(kind, '' if kind is ExperimentConfig else f'{prefix}{f.name}.')
        elif _kind(kind) in WRONG and kind is not bool and not f.metadata.get('positional'): yield f'--{prefix}{f.name}'.replace('_', '-'), _kind(kind), f.name


FLAGS = {name: list(flags_of(command)) for name, command in COMMANDS.items()}


def mutation(draw, command):
    "Words, and the status that they bring about: 2, 0 (they are fine), None (1 or 2 or 0)."
    kind = draw.choices(['good', 'wrong', 'odd', 'unknown', 'missing', 'plugin', 'options', 'both'], [3, 4, 4, 2, 1, 1, 1, 1])[0]
    flags = FLAGS[command]
    if kind == 'good' and GOOD[command]: return draw.choice(GOOD[command]), 0
    if kind == 'plugin': return ['--plugin', draw.choice(PLUGINS)], 2
    if kind == 'options' and command == 'train':
        return draw.choice([(['--env-options', 'gain'], 2), (['--env-options', 'gain', '\udcff'], 2), (['--env-options', 'gain', '1e308'], None), (['--env-options', 'rotation', 'x'], 2), (['--env-options', 'rotation', '1e308'], 2), (['--env-options.gain'], 2), (['--env-options.gain', '0.1'], None)])
    if kind == 'both' and command == 'train': return draw.choice([['--learner', 'rl2', '--adapt.online'], ['--learner', 'meta-sgd', '--adapt.optimizer', 'adam'], ['--outer-steps', '2', '--meta.outer-steps', '3']]), 2
    if kind == 'unknown' or not flags: return draw.choice(UNKNOWN), 2
    flag, value, name = draw.choice(flags)
    if kind == 'missing': return [flag], 2
    if kind == 'odd':
        words = [word for word in ODD[value] if not (name in PATIENT and word == BIG)]
        return [flag, draw.choice(words)], None
    word = draw.choice(WRONG[value])
    return draw.choice([[flag, word], [f'{flag}={word}']]), 2


def command_line(n):
    "Words, and the status that they must bring about (None: any)."
    draw = random.Random(n)
    if draw.random() < .08: return draw.choice([[], [''], ['trian'], ['\udcff'], ['-5'], ['--'], ['💥' * 400], ['a\0b'], ['Train'], ['--config', 'basic'], ['train eval']]), 2
    command = draw.choices([*BASES], [8, 4, 5, 2, 1, 2, 2])[0]
    found = [mutation(draw, command) for _ in range(draw.choice([0, 1, 1, 1, 2, 3]))]
    if draw.random() < .1 and found: found.append(found[0])  # twice
    words, states = [command, *BASES[command]], [status for _, status in found]
    last = [more for more, status in found if status == 2 and len(more) == 1]  # a flag without a value needs to be the last
    for more, _ in found: words += more if more not in last else []
    for more in last: words += more
    if 2 in states: status = 2
    elif command in ('experiment', 'demo'): status = 1 if not states else None
    else: status = 0 if len(states) <= 1 and states in ([], [0]) else None
    return [word.replace('{n}', str(n)) for word in words], status


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    f = tmp_path_factory.mktemp('f')
    assert main(['train', *' '.join(SMALL).format(f=f, n='').split()[:-1], str(f / 'run')]) == 0
    (f / 'file').write_text(''), (f / 'folder').mkdir(), (f / 'short.npz').write_bytes((f / 'run' / 'latest.npz').read_bytes()[:999])
    (f / 'deep.toml').write_text('env_options = ' + '[' * 3000 + ']' * 3000)
    (f / 'bad.py').write_text('1 / 0'), (f / 'leaves.py').write_text('raise SystemExit(0)'), (f / 'latin.py').write_bytes(b'x = "\xe9"')
    for name in ('pipe', 'pipe.py'):
        if hasattr(os, 'mkfifo'): os.mkfifo(f / name)
        else: (f / name).mkdir()
    return f


def check(words, wanted, status, out, err):
    lines = [line for line in err.replace('\r', '\n').splitlines() if line.startswith('ssm-metarl: ') and not line.startswith('ssm-metarl: note:')]
    about = f'{[word[:60] for word in words]} -> {status}, wanted {wanted}: {err[-600:]!r}'
    assert status in (0, 1, 2) and 'Traceback' not in err + out and 'internal error' not in err, about
    assert len(lines) == (status != 0) and max(map(len, err.splitlines()), default=0) < 500, about
    if wanted is not None: assert status == wanted, about
    if status == 2: assert out == '', about


@pytest.mark.parametrize('n', range(CASES))
def test_a_line_of_words(n, place, capsys, monkeypatch):
    monkeypatch.chdir(place / 'folder')
    words, wanted = command_line(n)
    words = [word.replace('{f}', str(place)) for word in words]
    status = main(words)
    check(words, wanted, status, *capsys.readouterr())


def test_the_lines_are_of_all_kinds():
    "No test of the program: of these tests."
    cases = [command_line(n) for n in range(CASES)]
    assert {words[0] for words, _ in cases if words} >= COMMANDS.keys()
    for wanted, least in ((2, 100), (0, 30), (None, 30)): assert sum(status == wanted for _, status in cases) >= least


SURROUNDINGS = [dict(), dict(LANG='C', LC_ALL='C', PYTHONIOENCODING='ascii'), dict(PYTHONIOENCODING='cp1252'), dict(COLUMNS='20', TERM='dumb'), dict(PYTHONIOENCODING='ascii:strict')]


def test_processes_in_odd_surroundings(place):
    cases = [command_line(n) for n in range(CASES)]
    cases = [(words, wanted) for words, wanted in cases if words and not any('\0' in word for word in words)][::CASES // PROCESSES - 2][:PROCESSES]
    assert len(cases) == PROCESSES

    def run(case):
        number, (words, wanted) = case
        words = [word.replace('{f}', str(place)).replace('/out', '/process') for word in words]
        env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'} | SURROUNDINGS[number % len(SURROUNDINGS)]
        done = subprocess.run([sys.executable, ROOT / 'main.py', *words], cwd=place / 'folder', capture_output=True, env=env, stdin=subprocess.DEVNULL, timeout=300)
        return words, wanted, done.returncode, done.stdout.decode(errors='replace'), done.stderr.decode(errors='replace')

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run, enumerate(cases)): check(*result)
