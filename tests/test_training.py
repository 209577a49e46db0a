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
        self.places, self.codes, self.opcodes, self.seen, self.calls = Counter(places), codes, opcodes, [], Counter()

    def watch(self, frame, event, arg):
        if frame.f_code not in self.codes: return None
        frame.f_trace_opcodes = self.opcodes
        self.calls[frame.f_code] += 1
        visited = set()
        def strike(frame, event, arg):
            where = frame.f_lasti if self.opcodes else frame.f_lineno
            if event != ('opcode' if self.opcodes else 'line') or where in visited: return strike
            visited.add(where)
            place = len(self.seen)
            self.seen.append((frame.f_code.co_name, frame.f_lineno))
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


def test_a_signal_at_every_line(story, outside, tmp_path, capfd):
    places, _ = story.struck([])
    assert {name for name, _ in places} >= {f.co_name for f in RUNNING | WRITING} - {'set_aside', 'load_state_dict'}
    begin = time.time()
    for place in range(len(places))[::40]: story.struck([place])
    with capfd.disabled(): print(len(places), len(story.known), time.time() - begin)
