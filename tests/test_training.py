"A training under attack: signals at every line, kills, full disks, damaged logs. It always goes on to the same bits."
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_metarl import checkpoints, cli, files, stops, training
from ssm_metarl.checkpoints import CheckpointError, load_checkpoint, make_learner
from ssm_metarl.config import CONFIGS
from ssm_metarl.maml import MetaMAML
from ssm_metarl.meta_learner import LEARNERS, LearnerState
from ssm_metarl.policy import PolicyConfig
from ssm_metarl.rollout import Trajectories
from ssm_metarl.stops import Stopped, Stops
from ssm_metarl.training import Run, Schedule, TrainingStopped, read_log, train, validation_scores

INT, TERM = signal.SIGINT, signal.SIGTERM
FORKS = pytest.mark.skipif(sys.platform != 'linux', reason='forks, and reads /proc')
BASIC = CONFIGS['basic']


def tiny(outer_steps, learner='maml', **changes):
    meta = replace(BASIC.meta, tasks_per_batch=2, outer_steps=outer_steps, inner_steps=1 + (learner == 'reptile'))
    policy = PolicyConfig(hidden_dim=4, state_dim=4, history=learner == 'rl2', core='ssm' if learner == 'rl2' else 'none')
    return replace(BASIC, learner=learner, num_envs=3, time_limit=10, meta=meta, adapt=replace(BASIC.adapt, steps=1), policy=policy, **changes)


class Quick(MetaMAML):
    "A learner whose outer step takes no time: real parameters, real Adam, made-up tasks."
    def outer_step(self, tasks):
        with self.all_or_nothing():
            aim = np.random.default_rng([self.env.seed, self.step]).standard_normal()
            loss = sum(((v - aim)**2).sum() for v in self.params.values())
            self.descend(loss.expand(2), torch.zeros(2))
            self.step += 1
        return dict(pre_return=-loss.item(), post_return=aim, env_steps=60)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(monkeypatch):  # trainings in milliseconds; what they write, and how, is as ever
    def validate(learner, config, tasks):
        value = float(sum(v.detach().sum() for v in learner.params.values()))
        return dict(pre=value, post=-abs(value), tasks=tasks)
    monkeypatch.setitem(LEARNERS, 'maml', Quick)
    monkeypatch.setattr(training, 'validate', validate)
    monkeypatch.setattr(training, 'sample_tasks', lambda *args, **kwargs: [])
    monkeypatch.setattr(os, 'fsync', lambda handle: None)
    monkeypatch.setattr(stops, 'say', lambda text: None)
    monkeypatch.setattr(checkpoints, 'shapes_without_memory', lambda make: None)  # the file's own are believed


@pytest.fixture
def outside():  # what a program does with a signal that comes before or after the training
    def leave(signum, frame): raise Stopped(signum)
    old = {signum: signal.signal(signum, leave) for signum in (INT, TERM)}
    yield
    for signum, handler in old.items(): signal.signal(signum, handler)


def go(folder, steps, resume=True, **kwargs):
    config = kwargs.pop('config', None) or tiny(steps)
    return train(config, folder, resume=resume, progress=False, **dict(eval_every=2, eval_tasks=2) | kwargs)


def parameters(path):
    return {k: torch.from_numpy(v) for k, v in load_checkpoint(path)[1].items()}


def same(one, other): return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def results(folder): return [{k: v for k, v in line.items() if k in ('step', 'pre_return', 'post_return', 'validation')} for line in read_log(folder)]


def names(folder): return sorted(p.name for p in Path(folder).iterdir())


# --- signals at every line ---

class Strikes:
    "Raise signals when a line of some functions is about to run, for the first time in the nth call of the function."
    def __init__(self, places, codes, opcodes=False):
        self.places, self.codes, self.opcodes, self.seen, self.kill = Counter(places), codes, opcodes, [], None

    def watch(self, frame, event, arg):
        if frame.f_code not in self.codes: return None
        frame.f_trace_opcodes = self.opcodes
        visited = set()
        def strike(frame, event, arg):
            where = frame.f_lasti if self.opcodes else frame.f_lineno
            if event != ('opcode' if self.opcodes else 'line') or where in visited: return strike
            visited.add(where)
            place = len(self.seen)
            self.seen.append((frame.f_code.co_name, frame.f_lineno))
            if place == self.kill: os.kill(os.getpid(), signal.SIGKILL)
            for signum in (INT, TERM)[:self.places.pop(place, 0)]: signal.raise_signal(signum)
            return strike
        return strike

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.watch)
        return self

    def __exit__(self, *error): sys.settrace(self.before)


def code_of(*functions):
    return {getattr(f, '__wrapped__', f).__code__ for f in functions}


LEARNING = code_of(LearnerState.all_or_nothing, LearnerState.state_dict, LearnerState.load_state_dict, Quick.outer_step)
WRITING = code_of(files.write_npz, files._whole, files._open_unfinished, files.append_line, files.write_text_whole, files._digest, training.save_checkpoint, training.keep_newest, training.set_aside)
RUNNING = code_of(Run.step, Run.commit, Run._begin, Run.save, Run.save_latest, training._finish_or_save, training.show_step, Stops.shielded)
EVERYTHING = LEARNING | WRITING | RUNNING


def copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


class Story:
    "A run of `start` steps, to be gone on with to `end`; where it would stand after each of these steps; and what signals make of it."
    def __init__(self, monkeypatch, path, start=9, end=11, steps=(10,)):
        self.monkeypatch, self.first, self.whole, self.end, self.known = monkeypatch, path / 'first', path / 'whole', end, set()
        self.run = path / 'run'
        go(self.first, start, keep=1)
        go(copy(self.first, self.whole), end, keep=1)
        self.states = {n: parameters(f / 'latest.npz') for n, f in ((start, self.first), (end, self.whole))}
        for n in steps:
            go(copy(self.first, self.run), n, keep=1)
            self.states[n] = parameters(self.run / 'latest.npz')

    def struck(self, places, codes=EVERYTHING, opcodes=False):
        "Go on, with signals at these places; then see what is there, and go on to the end. -> what was seen, what was said"
        copy(self.first, self.run)
        inside, strikes, said = training._finish_or_save, Strikes(places, codes, opcodes), None
        def traced(*args):
            with strikes: inside(*args)
        with self.monkeypatch.context() as patch:
            patch.setattr(training, '_finish_or_save', traced)
            try: go(self.run, self.end, keep=1)
            except TrainingStopped as error: said = error
        self.check([strikes.seen[p] for p in places if p < len(strikes.seen)], said)
        return strikes.seen, said

    def check(self, where, said):
        kept, log = parameters(self.run / 'latest.npz'), results(self.run)
        done = int(kept['step'])
        assert same(kept, self.states[done]) and len(log) >= done, where
        assert not [n for n in names(self.run) if n.startswith(('.', 'earlier'))], where
        if said is None: assert done == self.end, where
        else:
            advice = f'--resume (resume=True) goes on from {self.run}' if done < self.end else f'all is done, and saved in {self.run}'
            assert str(said).endswith(f'after {done} of {self.end} outer steps; {advice}'), (where, said)
            assert said.status in (130, 143)
        now = tuple(names(self.run)), str(log), int(kept['step']), *((self.run / name).stat().st_size for name in names(self.run) if name.endswith('.npz'))
        if now not in self.known: self.resumed(where)  # what follows depends on nothing else
        self.known.add(now)

    def resumed(self, where):
        go(self.run, self.end, keep=1)
        for name in ('latest.npz', 'best.npz', 'step_10.npz'): assert same(parameters(self.run / name), parameters(self.whole / name)), (where, name)
        assert results(self.run) == results(self.whole) and names(self.run) == names(self.whole), where


@pytest.fixture
def story(quick, tmp_path, monkeypatch): return Story(monkeypatch, tmp_path)


# every line of these functions is a place where signals strike; one signal asks for an end, a second one makes it

@pytest.fixture
def places(story):
    found, said = story.struck([])
    assert said is None and {name for name, _ in found} >= {f.co_name for f in RUNNING | WRITING} - {'set_aside'} | {'all_or_nothing', 'outer_step'}
    return len(found)


def test_a_signal_at_every_line(story, places):
    said = Counter(str(story.struck([place])[1]).partition(';')[0] for place in range(places))
    assert said.keys() == {'None', *(f'stopped by SIGINT after {n} of 11 outer steps' for n in (9, 10))}
    assert said['stopped by SIGINT after 9 of 11 outer steps'] < 6 and said['stopped by SIGINT after 10 of 11 outer steps'] > 50  # what has begun is finished


def test_two_signals_at_every_line(story, places):
    said = Counter(str(story.struck([place, place])[1]).partition(';')[0] for place in range(places))
    assert said.keys() == {f'stopped by SIGINT after {n} of 11 outer steps' for n in (9, 10, 11)} and said['stopped by SIGINT after 9 of 11 outer steps'] > 10  # dropped


def test_a_second_signal_at_every_line_after_the_first(story, places):
    first = [name for name, _ in story.struck([])[0]].index('step')
    said = Counter(str(story.struck([first, place])[1]).partition(';')[0] for place in range(first + 1, places))
    assert said.keys() == {f'stopped by SIGINT after {n} of 11 outer steps' for n in (9, 10)} and min(said.values()) > 10


def test_two_signals_at_every_instruction_of_the_loop(story):
    codes = code_of(training._finish_or_save, Stops.shielded)
    found, _ = story.struck([], codes, opcodes=True)
    assert len(found) > 100
    for place in range(len(found)): story.struck([place, place], codes, opcodes=True)


def test_signals_while_the_stopped_run_is_saved(story, monkeypatch):
    save, names = Run.save, []
    def interrupted(run, name):
        names.append(name)
        for signum in (INT, TERM, INT)[:3 * (len(names) < 4)]: signal.raise_signal(signum)
        save(run, name)
        for signum in (TERM, INT)[:2 * (len(names) < 4)]: signal.raise_signal(signum)
    monkeypatch.setattr(Run, 'save', interrupted)
    _, said = story.struck([])
    assert 'after 10 of 11' in str(said) and names[:3] == ['best.npz', 'step_10.npz', 'latest.npz']


def test_signals_while_an_earlier_run_is_moved(story, tmp_path, outside):
    "A new run over an earlier one: whatever happens, every file of the earlier run is there."
    earlier, config = {name: (story.first / name).read_bytes() for name in names(story.first)}, tiny(2, seed=3)
    def start(folder, places=()):
        inside, strikes, said = training._finish_or_save, Strikes(places, EVERYTHING), None
        def traced(*args):
            with strikes: inside(*args)
        with story.monkeypatch.context() as patch:
            patch.setattr(training, '_finish_or_save', traced)
            try: go(folder, 2, resume=False, config=config)
            except TrainingStopped as error: said = str(error)
        return len(strikes.seen), said
    number, _ = start(copy(story.first, tmp_path / 'whole'))
    whole, said = parameters(tmp_path / 'whole' / 'latest.npz'), Counter()
    for place in range(0, number, 3):
        folder = copy(story.first, tmp_path / 'run')
        _, words = start(folder, [place, place])
        now = folder / 'earlier_1' if (folder / 'earlier_1').exists() else folder
        assert {name: (now / name).read_bytes() for name in earlier} == earlier
        if words is None: continue
        said[words.partition(';')[2]] += 1
        assert words.endswith('nothing was saved') == (now == folder)
        if now == folder: continue
        go(folder, 2, config=config)
        assert same(parameters(folder / 'latest.npz'), whole)
    assert len(said) == 3 and min(said.values()) > 5


# --- signals that come from outside ---

def test_outside_the_main_thread_nobody_listens(quick, tmp_path):
    before, done = {s: signal.getsignal(s) for s in (INT, TERM)}, []
    def work():
        done.append(go(tmp_path, 3)['outer_steps'])
        assert {s: signal.getsignal(s) for s in (INT, TERM)} == before
    thread = threading.Thread(target=work)
    thread.start(), thread.join()
    assert done == [3]


@pytest.mark.parametrize('where', ['outer_step', 'state_dict', 'validate'])
def test_an_interrupt_that_is_raised_like_that_of_a_notebook(where, story, monkeypatch):
    "Handlers of somebody else: KeyboardInterrupt out of nowhere, in a step or in a commit."
    owner = training if where == 'validate' else Quick
    real, calls = getattr(owner, where), []
    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == {'state_dict': 3}.get(where, 1): raise KeyboardInterrupt
        return real(*args, **kwargs)
    folder = copy(story.first, story.run)
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt): go(folder, 11, keep=1)
    assert same(parameters(folder / 'latest.npz'), story.states[int(parameters(folder / 'latest.npz')['step'])])
    story.resumed(where)


LEARNING_METHODS = ('maml', 'reptile', 'anil', 'meta-sgd', 'joint', 'rl2')


@pytest.mark.parametrize('learner', LEARNING_METHODS)
def test_every_learner_goes_on_from_two_signals_in_a_step(learner, tmp_path, monkeypatch):
    "The first at the beginning of the third step, the second in the middle of its validation, for which it waits."
    config = tiny(5, learner)
    go(tmp_path / 'whole', 5, config=config)
    adapt, calls = training.adapt_policy, []
    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            for signum in (TERM, INT): signal.raise_signal(signum)
        return adapt(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(training, 'adapt_policy', interrupted)
        with pytest.raises(TrainingStopped, match='stopped by SIGTERM after 3 of 5 outer steps; --resume') as error: go(tmp_path / 'run', 5, config=config)
    assert error.value.status == 143 and int(parameters(tmp_path / 'run' / 'latest.npz')['step']) == 3
    go(tmp_path / 'run', 5, config=config)
    for name in ('latest.npz', 'best.npz'): assert same(parameters(tmp_path / 'run' / name), parameters(tmp_path / 'whole' / name))
    assert results(tmp_path / 'run') == results(tmp_path / 'whole')


WORDS = '--num-envs 3 --time-limit 10 --tasks-per-batch 2 --policy.hidden-dim 4 --policy.state-dim 4'.split()


@pytest.mark.parametrize('signals, status', [([INT], 130), ([TERM], 143), ([INT, TERM], 130)])
def test_a_process_that_is_stopped(signals, status, tmp_path):
    words = [sys.executable, '-m', 'ssm_metarl', 'train', '--outer-steps', '500', '--ckpt-dir', str(tmp_path), *WORDS]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / 'train.jsonl').exists() and process.poll() is None: time.sleep(.02)
    for signum in signals:
        process.send_signal(signum)
        time.sleep(.005)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and out == '' and 'Traceback' not in err
    done = int(parameters(tmp_path / 'latest.npz')['step'])
    assert len(read_log(tmp_path)) == done > 0
    assert '--resume' in err.splitlines()[-1] and not [n for n in names(tmp_path) if n.startswith('.')]


# --- SIGKILL ---

def in_fork(function, *args):  # -> exit code; a negative one is a signal
    child = multiprocessing.get_context('fork').Process(target=function, args=args)
    child.start()
    return child


def quietly(function, *args, **kwargs):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    function(*args, **kwargs)


def left_over(folder):  # files that nobody will read or remove
    return [n for n in names(folder) if n != '.lock' and not n.endswith('.unfinished')]


@FORKS
def test_killed_at_20_random_moments(tmp_path):
    draw, steps = random.Random(20), 12
    begin = time.monotonic()
    in_fork(quietly, go, tmp_path / 'whole', steps).join()
    seconds, stood = time.monotonic() - begin, []
    whole, expected = parameters(tmp_path / 'whole' / 'latest.npz'), names(tmp_path / 'whole')
    assert expected == ['best.npz', 'latest.npz', 'step_10.npz', 'train.jsonl']
    for _ in range(20):
        folder = tmp_path / 'run'
        child = in_fork(quietly, go, folder, steps)
        child.join(draw.uniform(.1, 1) * seconds)
        child.kill(), child.join()
        if not (folder / 'train.jsonl').exists(): continue  # it had not begun
        unfinished = set(names(folder)) - {*expected, '.lock'}
        assert len(unfinished) <= 1 and all(n.endswith('.unfinished') for n in unfinished)
        if (folder / 'latest.npz').exists(): parameters(folder / 'latest.npz')
        stood.append(len(read_log(folder)))
        go(folder, steps)
        assert same(parameters(folder / 'latest.npz'), whole) and names(folder) == expected and results(folder) == results(tmp_path / 'whole')
        shutil.rmtree(folder)
    assert len(set(stood)) > 5


def killed_at(place, folder, steps, kwargs, report):
    inside = training._finish_or_save
    def traced(*args):
        with Strikes([], EVERYTHING) as strikes:
            strikes.kill = place
            inside(*args)
        report.value = len(strikes.seen)
    training._finish_or_save = traced
    quietly(go, folder, steps, **kwargs)


@FORKS
@pytest.mark.parametrize('fresh', [False, True])
def test_killed_at_every_line(fresh, story, tmp_path):
    "Also in the middle of a file, of a line of the log, and of moving an earlier run away."
    report, whole, moments = multiprocessing.get_context('fork').Value('i', 0), story.whole, Counter()
    steps, kwargs = (2, dict(resume=False, config=tiny(2, seed=3))) if fresh else (11, dict(keep=1))
    earlier = {name: (story.first / name).read_bytes() for name in names(story.first) if name.endswith('.npz')}
    if fresh: go(tmp_path / 'fresh', steps, **kwargs); whole = tmp_path / 'fresh'
    in_fork(killed_at, None, copy(story.first, story.run), steps, kwargs, report).join()
    for place in range(0, report.value, 4):
        folder = copy(story.first, story.run)
        child = in_fork(killed_at, place, folder, steps, kwargs, report)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert len([n for n in names(folder) if n.endswith('.unfinished')]) <= 1
        now = tuple(left_over(folder)), len(read_log(folder)), (folder / 'latest.npz').exists() and int(parameters(folder / 'latest.npz')['step'])
        moments[now] += 1
        if fresh:
            places = [f for f in (folder, folder / 'earlier_1') if f.exists()]
            assert all(any((f / name).exists() and (f / name).read_bytes() == content for f in places) for name, content in earlier.items())
        if moments[now] > 2: continue
        go(folder, steps, **kwargs)
        assert same(parameters(folder / 'latest.npz'), parameters(whole / 'latest.npz')) and results(folder) == results(whole)
        assert [n for n in names(folder) if not n.startswith('earlier')] == names(whole)
    assert len(moments) > 4


# --- full disks and folders that cannot be written ---

def limited(size, function, *args, **kwargs):  # in a process of its own: files end at this size, as on a full disk
    def work(queue):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try: queue.put(('done', function(*args, **kwargs)))
        except BaseException as error: queue.put((type(error).__name__, str(error)))
    context = multiprocessing.get_context('fork')
    queue = context.SimpleQueue()
    child = context.Process(target=work, args=(queue,))
    child.start()
    found = queue.get()
    child.join()
    return found


@contextmanager
def small_disk(path, size):
    path.mkdir()
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', path], capture_output=True)
    if made.returncode: pytest.skip('no right to mount a file system')
    try: yield path
    finally: subprocess.run(['umount', '-l', path], check=True)


def content(folder): return {name: (folder / name).read_bytes() for name in names(folder) if name.endswith('.npz')}


@FORKS
@pytest.mark.parametrize('size', [0, 10_000])  # no byte fits; the log fits, but no checkpoint
@pytest.mark.parametrize('fresh', [False, True])
def test_full_disk(size, fresh, story):
    before, log = content(story.first), results(story.first)
    kind, said = limited(size, go, story.first, 11, resume=not fresh, keep=1, **dict(config=tiny(10, seed=4)) if fresh else {})
    assert kind == 'OSError' and said.count('\n') == 0 and str(story.first) in said, said
    assert 'no space left' in said and 'name another' in said
    assert content(story.first) == before, 'the earlier run is where it was'
    assert results(story.first)[:len(log)] == log and names(story.first) == [*before, 'train.jsonl']
    copy(story.first, story.run)
    story.resumed('full disk')


@FORKS
@pytest.mark.parametrize('room', ['one checkpoint', 'two checkpoints', 'the log'])
def test_a_disk_that_fills_up(room, story, tmp_path):
    "A file system of its own, with less and less room; with more of it the same run goes on."
    with small_disk(tmp_path / 'disk', '2M') as disk:
        folder, ballast = copy(story.first, disk / 'run'), disk / 'ballast'
        free = {'one checkpoint': 1.6, 'two checkpoints': 3.5, 'the log': .2}[room] * (folder / 'latest.npz').stat().st_size
        with open(ballast, 'wb', buffering=0) as file:
            with suppress(OSError):
                while True: file.write(bytes(4096))
            file.truncate(max(0, os.fstat(file.fileno()).st_size - int(free) // 4096 * 4096))
        before = parameters(folder / 'latest.npz')
        try: go(folder, 11, keep=1)
        except OSError as error: assert '(no space left); free some space' in str(error) and '\n' not in str(error) and 'the previous file is untouched' in str(error) or 'step_10' in str(error) or room == 'the log', error
        else: assert room == 'two checkpoints'
        kept = parameters(folder / 'latest.npz')
        assert same(kept, story.states[int(kept['step'])]) and len(read_log(folder)) >= int(kept['step'])
        assert not [n for n in names(folder) if n.startswith('.')]
        ballast.unlink()
        copy(folder, story.run)
    story.resumed(room)


def test_full_disk_in_a_terminal(tmp_path, capfd, monkeypatch):
    script = f'ulimit -f 8; exec {sys.executable} -m ssm_metarl train --outer-steps 12 --ckpt-dir {tmp_path / "run"} {" ".join(WORDS)}'
    done = subprocess.run(['sh', '-c', script], capture_output=True, text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and '(no space left)' in done.stderr.splitlines()[-1]
    assert done.stdout == '' and not [n for n in names(tmp_path / 'run') if n.endswith(('.npz', '.unfinished'))]


def as_nobody(folder, when, queue):  # a folder that others have made read-only
    os.chown(folder, 65534, 65534)
    for path in folder.iterdir(): os.chown(path, 65534, 65534)
    if os.getuid() == 0: os.setgid(65534), os.setuid(65534)
    owner, name = {'at the start': (training, 'train'), 'at the first commit': (Run, '_begin'), 'at a later checkpoint': (training, 'keep_newest')}[when]
    real = getattr(owner, name)
    def locking(*args, **kwargs):
        folder.chmod(0o555)
        return real(*args, **kwargs)
    setattr(owner, name, locking)
    try: queue.put(training.train(tiny(11), folder, resume=True, progress=False, eval_every=2, eval_tasks=2, keep=1))
    except BaseException as error: queue.put((type(error).__name__, str(error)))


@FORKS
@pytest.mark.skipif(os.getuid() != 0, reason='needs the right to become somebody else')
@pytest.mark.parametrize('when', ['at the start', 'at the first commit', 'at a later checkpoint'])
def test_a_folder_that_turns_read_only(when, story):
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        folder, queue = copy(story.first, Path(path) / 'run'), multiprocessing.get_context('fork').SimpleQueue()
        before, log = content(folder), results(folder)
        child = in_fork(as_nobody, folder, when, queue)
        kind, said = queue.get()
        child.join()
        assert kind == 'OSError' and '\n' not in said and 'Permission denied' in said and 'name another' in said, said
        assert when == 'at a later checkpoint' or content(folder) == before
        assert results(folder)[:len(log)] == log and int(parameters(folder / 'latest.npz')['step']) == 9
        folder.chmod(0o755)
        (folder / '.lock').unlink(missing_ok=True)  # it could not be removed; it keeps nobody out
        copy(folder, story.run)
    story.resumed(when)


# --- two trainings, damaged logs, files that are missing ---

def waiting(folder, ready):
    def outer_step(self, tasks):
        ready.set()
        time.sleep(60)
    Quick.outer_step = outer_step
    quietly(go, folder, 11)


@FORKS
def test_two_trainings_in_one_folder(story):
    ready = multiprocessing.get_context('fork').Event()
    first, before = in_fork(waiting, story.first, ready), content(story.first)
    assert ready.wait(30)
    for resume in (False, True):
        with pytest.raises(OSError, match='another training writes into'): go(story.first, 11, resume=resume, keep=1)
    assert cli.main(['train', '--ckpt-dir', str(story.first), '--resume']) == 1
    assert content(story.first) == before
    first.kill(), first.join()
    copy(story.first, story.run)
    story.resumed('after a kill')


def rewrite(folder, change):
    lines = (folder / 'train.jsonl').read_text().splitlines(keepends=True)
    (folder / 'train.jsonl').write_text(''.join(change(lines)))


def with_line(text): return lambda lines: [*lines[:4], text + '\n', *lines[4:]]


@pytest.mark.parametrize('change', [
    lambda lines: [line + '\n' for line in lines], lambda lines: ['\r\n', *lines, '   \n'], lambda lines: lines + [lines[-1][:-20]],
    lambda lines: [*lines, json.dumps(json.loads(lines[-1]) | dict(step=len(lines))) + '\n']], ids=['blank', 'blank around', 'torn', 'one ahead'])
def test_logs_that_are_as_good_as_new(change, story):
    copy(story.first, story.run), rewrite(story.run, change)
    story.resumed('')


def field(**changes): return lambda lines: [*lines[:4], json.dumps(json.loads(lines[4]) | changes) + '\n', *lines[5:]]


@pytest.mark.parametrize('change', [
    with_line('1'), with_line('[]'), with_line('null'), with_line('{}'), with_line('{"step": 3'), lambda lines: [], lambda lines: lines[:-2], lambda lines: lines[:3] + lines[5:],
    lambda lines: lines[::-1], lambda lines: lines[:2] + lines, field(step='4'), field(step=None), field(step=4.), field(step=True), field(step=-1), field(wall_s='1'), field(wall_s=None),
    field(env_steps=[]), field(pre_return='x'), field(post_return={}), field(validation=3), field(validation=[1]), field(validation=dict(pre=1)), field(validation=dict(pre='x', post=1.))])
def test_logs_that_do_not_fit_are_refused_in_a_line(change, story, capsys):
    copy(story.first, story.run), rewrite(story.run, change)
    before = content(story.run), (story.run / 'train.jsonl').read_bytes()
    with pytest.raises((CheckpointError, ValueError), match='train.jsonl') as error: go(story.run, 11, keep=1)
    assert '\n' not in str(error.value) and len(str(error.value)) < 500 and 'delete' in str(error.value) or 'without --resume' in str(error.value)
    assert (content(story.run), (story.run / 'train.jsonl').read_bytes()) == before


def test_a_log_that_lost_a_line_twice(story):
    "It goes on, and again, and the numbers are those of a whole one; only the lines are missing."
    folder = copy(story.first, story.run)
    for steps in (11, 13, 14):
        rewrite(folder, lambda lines: lines[:-1])
        go(folder, steps, keep=1)
    go(story.whole, 14, keep=1)
    assert same(parameters(folder / 'latest.npz'), parameters(story.whole / 'latest.npz')) and [line['step'] for line in read_log(folder)] == [*range(8), 9, 11, 13]
    (folder / 'train.jsonl').unlink()
    with pytest.raises(CheckpointError, match='does not hold the 14 steps'): go(folder, 15, keep=1)


def test_one_step_and_no_line(quick, tmp_path):
    go(tmp_path, 1)
    (tmp_path / 'train.jsonl').unlink()
    found = go(tmp_path, 1)
    assert found['outer_steps'] == 1 and found['env_steps'] == 0 and found['wall_s'] is found['final_pre_return'] is None


def test_scores_that_are_not_finite(quick, tmp_path, monkeypatch):
    "A validation that is nan is the worst, in this session and in the next, where it comes back as null."
    scores = [float('nan'), 1., float('nan'), 2., float('inf'), 1.5]
    monkeypatch.setattr(training, 'validate', lambda learner, *args: dict(pre=0., post=scores[learner.step - 1]))
    for steps in (1, 2, 3, 4, 5, 6): found = go(tmp_path, steps, eval_every=1)
    assert int(parameters(found['best_checkpoint'])['step']) == 4
    live = [-np.inf, 1., -np.inf, 2., -np.inf, 1.5]
    assert validation_scores(read_log(tmp_path), 'maml') == live
    assert validation_scores([dict(validation=dict(pre=0., post=s)) for s in scores], 'maml') == live


def test_without_latest(story):
    for damage in (None, b'', b'PK', (story.whole / 'step_10.npz').read_bytes()[:-200]):
        folder = copy(story.whole, story.run)
        (folder / 'latest.npz').unlink()
        for name in ('step_²0.npz', 'step_x.npz', 'step_.npz', 'latest.npz.txt'): (folder / name).write_text('')
        if damage is not None: (folder / 'step_20.npz').write_bytes(damage)
        found = go(folder, 10, eval_every=0, eval_tasks=10)
        assert found['outer_steps'] == 10 and Path(found['checkpoint']).exists() and same(parameters(folder / 'latest.npz'), story.states[10])
        (folder / 'latest.npz').unlink()
        go(folder, 11)
        assert same(parameters(folder / 'latest.npz'), story.states[11])


def test_more_steps_done_than_asked(story, capsys):
    before = content(story.whole)
    found = go(story.whole, 3, keep=1)
    assert found['outer_steps'] == 11 and content(story.whole) == before and 'holds 11 outer steps already' in capsys.readouterr().err


def test_a_clock_that_goes_backwards(quick, tmp_path, monkeypatch):
    clocks = {name: iter(np.linspace(0, -1e6, 1000)) for name in ('monotonic', 'process_time')}
    for name, ticks in clocks.items(): monkeypatch.setattr(training.time, name, lambda ticks=ticks: next(ticks))
    go(tmp_path, 2), go(tmp_path, 4)
    for line in read_log(tmp_path): assert type(line['wall_s']) is float and line['env_steps_per_s'] > 0


class Broken:  # stderr on a terminal that is gone, or on a full disk
    encoding = 'utf-8'
    def write(self, text): raise OSError(28, 'No space left on device')
    def flush(self): raise OSError(28, 'No space left on device')
    def isatty(self): return True


@pytest.mark.parametrize('stderr', [None, Broken()], ids=['closed', 'broken'])
def test_what_cannot_be_said_stops_nothing(stderr, story, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', stderr)
    for resume, steps in ((False, 2), (True, 2), (True, 3)):
        assert train(tiny(steps, seed=8), story.first, resume=resume)['outer_steps'] == steps
    assert (story.first / 'earlier_1' / 'latest.npz').exists()


# --- validation, patience, what is kept ---

def test_best_is_the_step_with_the_best_validation(tmp_path, monkeypatch):
    "`best.npz` holds what a training that ends there holds, and says what was logged."
    config = replace(tiny(7), meta=replace(tiny(7).meta, outer_lr=.05))
    found = go(tmp_path / 'a', 7, config=config, eval_every=1, eval_tasks=3)
    scores = [line['validation']['post'] for line in read_log(tmp_path / 'a')]
    best = 7 - int(np.argmax(scores[::-1]))
    go(tmp_path / 'b', best, config=replace(config, meta=replace(config.meta, outer_steps=best)), eval_every=0, eval_tasks=10)
    assert same(parameters(found['best_checkpoint']), parameters(tmp_path / 'b' / 'latest.npz'))
    learner = make_learner(*load_checkpoint(found['best_checkpoint']))
    assert training.validate(learner, config, 3)['post'] == max(scores)


def test_validation_is_the_same_whether_it_was_resumed_or_not(tmp_path):
    config = tiny(6)
    go(tmp_path / 'whole', 6, config=config, patience=2, eval_every=1)
    for steps in range(1, 7): go(tmp_path / 'parts', steps, config=tiny(steps), patience=2, eval_every=1)
    assert results(tmp_path / 'whole') == results(tmp_path / 'parts')
    for name in ('best.npz', 'latest.npz'): assert same(parameters(tmp_path / 'whole' / name), parameters(tmp_path / 'parts' / name))


def test_patience_counts_over_sessions(quick, tmp_path, monkeypatch):
    scores = [1., 5., 4., 3., 5., 2., 2., 2., 9.]
    monkeypatch.setattr(training, 'validate', lambda learner, *args: dict(pre=0., post=scores[learner.step - 1]))
    whole = go(tmp_path / 'whole', 9, eval_every=1, patience=4)
    for steps in range(1, 10): found = go(tmp_path / 'parts', steps, eval_every=1, patience=4)
    assert whole['outer_steps'] == found['outer_steps'] == 6 and int(parameters(found['best_checkpoint'])['step']) == 5  # the last of two that are equal
    assert go(tmp_path / 'parts', 9, eval_every=1, patience=7)['outer_steps'] == 9  # it may go on


@pytest.mark.parametrize('keep', [0, 1, 2])
def test_kept_checkpoints(keep, quick, tmp_path):
    go(tmp_path, 25, keep=keep), go(tmp_path, 41, keep=keep)
    assert sorted(tmp_path.glob('step_*')) == [tmp_path / f'step_{n}.npz' for n in (10, 20, 30, 40)[-keep:]]
    for path in tmp_path.glob('step_*'): assert int(parameters(path)['step']) == int(path.stem[5:])


def test_refused_before_anything_is_touched(story):
    before = content(story.first)
    for wrong in (dict(keep=-1), dict(eval_every=True), dict(patience=10**30), dict(patience=2**31), dict(eval_tasks=10**6 + 1), dict(eval_tasks=0), dict(unknown=1), dict(tensorboard=True, eval_every=0, eval_tasks=3)):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong)) if len(wrong) == 1 else 'eval_tasks'): go(story.first, 11, **wrong)
    with pytest.raises(CheckpointError, match='comes from a run with other settings'): go(story.first, 11, config=tiny(11, seed=1))
    (story.first / 'latest.npz').write_bytes(b'PK')
    with pytest.raises(CheckpointError, match='latest.npz'): go(story.first, 11)
    assert {**content(story.first), 'latest.npz': before['latest.npz']} == before


# --- memory ---

def usage():
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * resource.getpagesize(), len(os.listdir('/proc/self/fd'))


def watched(learner, folder, steps, queue):
    from ssm_metarl.compiling import keep_memory
    keep_memory()  # as the command line does
    seen, commit = {}, Run.commit
    def watching(run, line):
        commit(run, line)
        if run.done in steps: seen[run.done] = usage()
    Run.commit = watching
    go(folder, max(steps), config=tiny(max(steps), learner), eval_every=0, eval_tasks=10, keep=2)
    queue.put(seen)


@FORKS
@pytest.mark.parametrize('learner', ['maml', 'rl2'])
def test_memory_and_file_descriptors_stay(learner, tmp_path):
    queue = multiprocessing.get_context('fork').SimpleQueue()
    child = in_fork(watched, learner, tmp_path, (100, 500), queue)
    (memory, files), (later, more) = queue.get().values()
    child.join()
    assert later < 1.05 * memory and more == files


def test_tensorboard_shows_what_the_log_says(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(tiny(3), tmp_path, progress=False, eval_every=2, eval_tasks=2, tensorboard=True)
    train(tiny(5), tmp_path, resume=True, progress=False, eval_every=2, eval_tasks=2, tensorboard=True)
    events, log = EventAccumulator(str(tmp_path / 'tensorboard')), read_log(tmp_path)
    events.Reload()
    for name in ('pre_return', 'post_return', 'entropy', 'explained_variance', 'clip_fraction', 'grad_norm'):
        shown = [(e.step, e.value) for e in events.Scalars(name)]
        assert [step for step, _ in shown] == [1, 2, 3, 4, 5]
        np.testing.assert_allclose([value for _, value in shown], [line[name] for line in log], rtol=1e-6)
    assert [e.step for e in events.Scalars('validation/post')] == [line['step'] + 1 for line in log if 'validation' in line]


def test_without_tensorboard_the_training_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(ValueError, match=r"needs the package 'tensorboard', .*ssm-metarl\[tensorboard\] @ git\+https"): train(tiny(3), tmp_path / 'run', tensorboard=True)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name', ['maml', 'reptile', 'anil', 'meta-sgd', 'joint', 'rl2'])
def test_metrics_of_a_step_by_hand(name):
    learner = make_learner(tiny(1, name))
    tasks = training.sample_tasks(learner.env, 2)
    got, again = learner.outer_step(tasks), make_learner(tiny(1, name))
    if isinstance(again, MetaMAML):
        pairs, _ = again.collect_all(tasks)
        first, query = pairs[0][0], pairs[-1][0]
    else: first = query = Trajectories(**again.collect_some(tasks, 0)[0])
    for key, traj in (('pre', first), ('post', query)):
        returns = traj.returns.mean(1).numpy()
        assert got[f'{key}_return'] == pytest.approx(returns.mean(), abs=1e-5) and got[f'{key}_spread'] == pytest.approx(returns.std(), abs=1e-5)
    assert got['entropy'] == pytest.approx(-float(query.logp[query.mask].mean()), abs=1e-5)
    assert 0 <= got['clip_fraction'] <= 1 and got['explained_variance'] <= 1
    if again.config.outer_epochs == 1: assert got['clip_fraction'] == 0
    if name != 'rl2':
        gamma, rows = again.config.gamma, []
        for m, k in np.ndindex(*query.mask.shape[:2]):
            n, total = int(query.mask[m, k].sum()), 0.
            for t in reversed(range(n)):
                total = query.reward[m, k, t].item() + gamma * total
                rows.append((total, query.value[m, k, t].item()))
        wanted, said = np.array(rows).T
        assert got['explained_variance'] == pytest.approx(1 - np.var(wanted - said) / np.var(wanted), abs=1e-3)

