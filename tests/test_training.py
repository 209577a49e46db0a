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
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_metarl import checkpoints, cli, files, training
from ssm_metarl.checkpoints import CheckpointError, load_checkpoint, make_learner
from ssm_metarl.config import CONFIGS
from ssm_metarl.maml import MetaMAML
from ssm_metarl.meta_learner import LEARNERS, LearnerState
from ssm_metarl.policy import PolicyConfig
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
            assert str(said).endswith(f'after {done} of {self.end} outer steps; --resume (resume=True) goes on from {self.run}'), (where, said)
            assert said.status in (130, 143)
        now = tuple(names(self.run)), str(log), int(kept['step']), int(parameters(self.run / 'best.npz')['step'])
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
    assert said.keys() == {'None', 'stopped by SIGINT after 10 of 11 outer steps'} and min(said.values()) > 50  # the step is finished


def test_two_signals_at_every_line(story, places):
    said = Counter(str(story.struck([place, place])[1]).partition(';')[0] for place in range(places))
    assert said.keys() == {'None', *(f'stopped by SIGINT after {n} of 11 outer steps' for n in (9, 10))} and said['stopped by SIGINT after 9 of 11 outer steps'] > 10  # dropped


def test_a_second_signal_at_every_line_after_the_first(story, places):
    said = Counter(str(story.struck([1, place])[1]).partition(';')[0] for place in range(2, places // 2 + 20))
    assert said.keys() == {f'stopped by SIGINT after {n} of 11 outer steps' for n in (9, 10)} and min(said.values()) > 10


def test_two_signals_at_every_instruction_of_the_loop(story):
    codes = code_of(training._finish_or_save, Stops.shielded)
    found, _ = story.struck([], codes, opcodes=True)
    assert len(found) > 100
    for place in range(len(found)): story.struck([place, place], codes, opcodes=True)


def test_signals_while_the_stopped_run_is_saved(story, monkeypatch):
    save = Run.save
    def interrupted(run, name):
        for signum in (INT, TERM, INT): signal.raise_signal(signum)
        save(run, name)
        for signum in (TERM, INT): signal.raise_signal(signum)
    monkeypatch.setattr(Run, 'save', interrupted)
    _, said = story.struck([])
    assert 'after 10 of 11' in str(said)


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
    for place in range(0, number, 2):
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
    assert len(said) == 2 and min(said.values()) > 5


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
    for place in range(0, report.value, 3):
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
