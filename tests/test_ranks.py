"Several processes give what one gives, and none waits for another that is gone. Run as a program, this file is one of the ranks."
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_metarl import ranks, training
from ssm_metarl.checkpoints import load_checkpoint, make_learner
from ssm_metarl.cli import main
from ssm_metarl.config import ExperimentConfig
from ssm_metarl.envs import EnvConfig, PointNavigation, register_family, sample_tasks
from ssm_metarl.evaluation import evaluation_trajectories
from ssm_metarl.meta_learner import MetaConfig, MetaLearner, trust_region
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.registry import load_plugin
from ssm_metarl.rl2 import LEARNERS
from ssm_metarl.rollout import collect
from ssm_metarl.training import read_log

STEPS = 5
CASES = {  # name: learner, settings
    'maml': ('maml', dict(entropy_coef=.01)), 'first order': ('maml', dict(first_order=True, inner_steps=2, tasks_per_chunk=1)),
    'e-maml, promp': ('maml', dict(exploration_term=True, surrogate='logprob', inner_kl=.1, tasks_per_chunk=2)),
    'reptile': ('reptile', dict(inner_steps=2)), 'anil': ('anil', {}), 'meta-sgd': ('meta-sgd', {}),
    'joint': ('joint', dict(tasks_per_chunk=1, bootstrap=True)), 'rl2': ('rl2', dict(gamma=1., outer_epochs=2)), 'traced': ('maml', dict(compile=True, first_order=True, outer_epochs=1)),
    'own, one loss': ('own', dict(tasks_per_chunk=0)), 'own, chunks': ('own', dict(tasks_per_chunk=2)),
}
RUNS = [(name, 5) for name in CASES] + [('maml', 4), ('maml', 1), ('reptile', 1), ('rl2', 1)]


class Own(MetaLearner):
    "A learner that knows nothing of ranks: the same loss of all tasks on each of them."
    def outer_step(self, tasks):
        with self.all_or_nothing():
            traj = collect(self.policy, {k: v.detach() for k, v in self.params.items()}, tasks, self.env, key=(self.step, 0))
            M, size = len(tasks), self.config.tasks_per_chunk
            if not size: norm = self.descend(*self.losses(traj))
            else:
                self.optimizer.zero_grad()
                for start in range(0, M, size): self.accumulate(*self.losses(traj.of_tasks(slice(start, start + size))), M)
                norm = self.update()
            self.step += 1
        return dict(grad_norm=norm)

    def losses(self, traj):
        out = self.policy.functional(self.params, traj.obs, reset=traj.memory_reset)
        return ((out['mean'] - traj.action)**2).mean((1, 2, 3)), (out['value'] - traj.reward).square().mean((1, 2))


def make(name, M):
    kind, kw = CASES[name]
    env = EnvConfig('MetaGymToy-v0', num_envs=3, time_limit=8, seed=3, episodes_per_trial=2 if kind == 'rl2' else 1)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(4, 2, history=kind == 'rl2'), 0).double()
    learner = (LEARNERS | {'own': Own})[kind](policy, env, MetaConfig(tasks_per_batch=M, **dict(inner_lr=.3) | kw))
    learner.backend = 'eager'
    return learner


def digest(learner):
    return sha256(b''.join(k.encode() + v.tobytes() for k, v in learner.state_dict().items())).hexdigest()


def train(name, M, steps=STEPS, state=None):
    "Of each step: state, its digest, metrics."
    learner, found = make(name, M), []
    if state: learner.load_state_dict(state)
    for _ in range(learner.step, steps):
        metrics = learner.outer_step(sample_tasks(learner.env, M, step=learner.step))
        found.append((learner.state_dict(), digest(learner), metrics))
    return found


# what a rank can be told to do; each function returns what it found

def runs(n): return [run for run in RUNS if n < 3 or run[0] in ('maml', 'reptile', 'joint', 'rl2')]  # three processes take long on two cores
def all_runs(): return {run: train(*run) for run in runs(ranks.world())}


def exchanges():
    found, some = {}, lambda tasks, first: [dict(x=torch.tensor(tasks) / 7, flag=torch.tensor(tasks) > 1), torch.tensor(tasks)[:, None, None].expand(-1, 2, 3).mT]
    for M in (1, 2, 7): found[M] = ranks.by_shares(some, list(range(M)))
    odd = torch.tensor([[float('nan')], [-0.], [float('inf')]], dtype=torch.float64)
    found['odd'] = ranks.by_shares(lambda tasks, first: odd[first:first + len(tasks)], [0, 1, 2])
    found['agree'] = ranks.agree(ranks.rank() == 1), ranks.agree(False)
    leaves = [torch.zeros(2, 3, requires_grad=True) for _ in range(3)]
    if ranks.rank() == 0: leaves[0].grad = torch.ones(2, 3)
    leaves[1].grad = torch.full((2, 3), 1. + ranks.rank())
    ranks.sum_gradients(leaves)
    found['gradients'] = [p.grad for p in leaves]
    ranks.require_same('config', 'the same')
    for what, f in dict(same=lambda: ranks.require_same('config', str(ranks.rank())), total=lambda: ranks.total(torch.ones(2 + ranks.rank()))).items():
        try: f()
        except ValueError as error: found[what] = str(error)
    return found


def natural_step():
    "Losses g p and divergences p F p / 2 of five tasks: where TRPO goes, from where it starts."
    g = torch.Generator().manual_seed(0)
    G, R = torch.randn(5, 3, generator=g, dtype=torch.float64), torch.randn(5, 3, 3, generator=g, dtype=torch.float64)
    F = R @ R.mT + torch.eye(3)
    chunk = lambda rows: lambda params: (G[rows] @ params[0], ((params[0] @ F[rows]) @ params[0]) / 2)
    start = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    new, *_ = trust_region([chunk(rows) for rows in ranks.task_chunks(5, 2)], [start], .01, damping=0.)
    best = torch.linalg.solve(F.mean(0), G.mean(0))
    return new[0], -(.02 / (best @ G.mean(0))).sqrt() * best


@register_family('RanksTestBrittle-v0')
class Brittle(PointNavigation):
    "The reward is nan for a goal on the far right."
    def step(self, state, action, tasks, noise):
        state, reward, terminated = super().step(state, action, tasks, noise)
        return state, np.where(tasks['goal'][:, 0] > 5, np.nan, reward), terminated


def failure():
    "One task of five fails; then the same learner goes on with others."
    learner = make('maml', 5)
    learner.env = EnvConfig('RanksTestBrittle-v0', num_envs=3, time_limit=8, seed=3)
    tasks, before, found = sample_tasks(learner.env, 5), digest(learner), []
    bad = [*tasks[:4], dict(tasks[4], goal=np.array([9., 0.]))]
    try: learner.outer_step(bad)
    except Exception as error: found.append((type(error).__name__, str(error)))
    found.append(digest(learner) == before)
    learner.outer_step(tasks)
    return *found, digest(learner)


def late_failure():
    "A rank fails after the last exchange of a step, where the others are done; and in a block within a block."
    learner, found = make('maml', 5), []
    before = digest(learner)
    for within in (False, True):
        try:
            with learner.all_or_nothing():
                learner.outer_step(sample_tasks(learner.env, 5))
                with ranks.unanimous() if within else nullcontext():
                    if ranks.rank() == 1: raise OSError('disk full')
        except Exception as error: found.append((type(error).__name__, str(error), digest(learner) == before))
    return found, ranks.agree(ranks.rank() == 1)  # they still understand each other


def leave(how):
    "Rank 1 leaves in the middle of the second step."
    learner = make('maml', 5)
    collect_some = learner.collect_some
    def collect_or_leave(tasks, first):
        if learner.step == 1 and ranks.rank() == 1: how()
        return collect_some(tasks, first)
    learner.collect_some = collect_or_leave
    for step in range(3): learner.outer_step(sample_tasks(learner.env, 5, step=step))


def small(name):
    config = ExperimentConfig(learner=name, num_envs=3, time_limit=8, seed=3, policy=PolicyConfig(history=name == 'rl2'), episodes_per_trial=2 if name == 'rl2' else 1)
    return make_learner(config), config


def validations():
    "Of untrained learners, on numbers of tasks that divide and that do not, and on fewer tasks than ranks."
    return {(name, M): training.validate(*small(name), M) for name in ('maml', 'meta-sgd', 'rl2') for M in (6, 5, 1)}


def failing_validation():
    "The last rank cannot play its share; then the ranks go on."
    adapt_policy, found = training.adapt_policy, []
    def fail(*args, **kwargs): raise OSError('no simulator')
    if ranks.rank() == ranks.world() - 1: training.adapt_policy = fail
    try: training.validate(*small('maml'), 5)
    except Exception as error: found.append((type(error).__name__, str(error)))
    training.adapt_policy = adapt_policy
    return *found, ranks.agree(ranks.rank() == 1)


def everything():
    return dict(validations=validations(), failing_validation=failing_validation(), all_runs=all_runs(), exchanges=exchanges(), natural_step=natural_step(), failure=failure(), late_failure=late_failure())


def dies(): leave(lambda: os._exit(9))
def interrupted():
    def interrupt(): raise KeyboardInterrupt
    leave(interrupt)


# the tests

def launch(job, n):
    "Status, output and errors of each of n ranks, and what they found."
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    environment = os.environ | dict(WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), OMP_NUM_THREADS='1')
    with tempfile.TemporaryDirectory() as folder:
        group = [subprocess.Popen([sys.executable, __file__, job, folder], env=environment | dict(RANK=str(i)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(n)]
        try: said = [process.communicate(timeout=240) for process in group]  # longer: they wait for each other
        finally:
            for process in group: process.kill()
        files = [Path(folder) / f'{i}.pickle' for i in range(n)]
        found = [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
    return [(process.returncode, *texts) for process, texts in zip(group, said)], found


@lru_cache
def group(n):
    "What n ranks found."
    ended, found = launch('everything', n)
    assert [status for status, *_ in ended] == [0] * n, ended
    return found


def found_by(job, n): return [found[job] for found in group(n)]


def gap(a, b):
    assert a.keys() == b.keys()
    return max(np.abs(np.asarray(a[k], float) - b[k]).max() for k in a)


def test_training_is_that_of_one_process():
    "Five outer steps in float64, tasks that divide and that do not, and fewer tasks than ranks."
    alone = all_runs()
    for n in (2, 3):
        together = found_by('all_runs', n)
        for run in runs(n):
            first = together[0][run]
            for other in together[1:]: assert [step[1:] for step in other[run]] == [step[1:] for step in first], (n, run)  # to the last bit
            assert len({step[1] for step in first}) == STEPS  # it moves
            for (state, _, metrics), (expected, _, known) in zip(first, alone[run]):
                assert gap(state, expected) < 1e-8, (n, run)
                assert metrics.keys() == known.keys() and all(abs(metrics[k] - known[k]) < 1e-8 for k in known), (n, run)
        resumed = train('maml', 5, state=together[0]['maml', 5][1][0])  # after two steps, by one process
        assert len(resumed) == STEPS - 2 and gap(resumed[-1][0], alone['maml', 5][-1][0]) < 1e-8


def test_what_is_exchanged_arrives_bit_for_bit():
    for n in (2, 3):
        for found in found_by('exchanges', n):
            for M in (1, 2, 7):
                (first, second), i = found[M], torch.arange(M)
                assert torch.equal(first['x'], i / 7) and torch.equal(first['flag'], i > 1) and torch.equal(second, i[:, None, None].expand(M, 3, 2)) and second.dtype == torch.int64
            assert found['odd'].numpy().tobytes() == np.array([np.nan, -0., np.inf]).tobytes()
            assert found['agree'] == (True, False)
            one, two, none = found['gradients']
            assert (one == 1).all() and (two == n * (n + 1) / 2).all() and none is None
            assert found['same'] == f'config on ranks {list(range(1, n))} is not that of rank 0; start all ranks with the same program and the same arguments'
            assert found['total'].startswith(f'the ranks want to add up {list(range(2, n + 2))} numbers')


def test_the_natural_step_is_that_of_the_whole_batch():
    for new, expected in [natural_step(), *found_by('natural_step', 2), *found_by('natural_step', 3)]: torch.testing.assert_close(new, expected, rtol=1e-10, atol=0)


def test_an_error_on_one_rank_is_known_to_all_and_undone_on_all():
    owner, name = 1, r'rewards of tasks [4] are not finite; look at these tasks, or lower inner_lr'
    found = found_by('failure', 2)
    for i, (error, undone, after) in enumerate(found):
        assert error == (('FloatingPointError', name) if i == owner else ('PeerError', f'rank 1 of 2 failed: FloatingPointError: {name}'))
        assert undone and after == found[0][2]  # and they still understand each other
    assert found_by('late_failure', 2) == [([('PeerError', 'rank 1 of 2 failed: OSError: disk full', True)] * 2, True), ([('OSError', 'disk full', True)] * 2, True)]


def test_validation_is_that_of_one_process():
    "Each rank plays its own share only, and all find the same numbers, to the last bit; one process differs by rounding at most."
    alone = validations()
    for (name, M), found in alone.items():
        learner, config = small(name)
        env = replace(config.env, seed=config.env.seed + 1_000_000)
        params = {k: v.detach() for k, v in learner.params.items()}
        one_by_one = [evaluation_trajectories(learner.policy, params, [task], env, start=i).returns.item() for i, task in enumerate(sample_tasks(env, M, 'validation'))]
        assert found['tasks'] == M and abs(found['pre'] - np.mean(one_by_one)) < 1e-5 and found['pre'] != found['post']  # each task has its own noise
    for n in (2, 3):
        first, *others = found_by('validations', n)
        assert others == [first] * (n - 1) and first.keys() == alone.keys()
        for run, found in first.items(): assert found == {k: v if v is None else pytest.approx(v, rel=1e-5) for k, v in alone[run].items()}, run
    assert found_by('failing_validation', 2) == [(('PeerError', 'rank 1 of 2 failed: OSError: no simulator'), True), (('OSError', 'no simulator'), True)]


def test_ranks_do_not_wait_for_one_that_is_gone():
    ended, _ = launch('dies', 2)
    assert ended[1][0] == 9 and ended[0][0] == 1 and 'rank 0 of 2 cannot reach the others' in ended[0][2], ended
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', __file__, 'interrupted', '.']
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=240)
    assert ended.returncode != 0 and 'KeyboardInterrupt' in ended.stderr


def test_shares_are_neighbours_and_nearly_equal(monkeypatch):
    for n in range(1, 8):
        monkeypatch.setattr(ranks, 'world', lambda n=n: n)
        for M in range(21):
            shares = []
            for i in range(n):
                monkeypatch.setattr(ranks, 'rank', lambda i=i: i)
                shares.append(range(M)[ranks.share(M)])
                assert [m for rows in ranks.task_chunks(M, 3) for m in range(M)[rows]] == list(shares[-1])
            assert [m for some in shares for m in some] == list(range(M))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_exchanged(monkeypatch):
    x, p = torch.ones(3), torch.ones(2, requires_grad=True)
    p.grad = grad = torch.ones(2)
    for environment in ({}, dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='1')):
        for k, v in environment.items(): monkeypatch.setenv(k, v)
        with ranks.joined():
            assert (ranks.rank(), ranks.world(), ranks.share(5)) == (0, 1, slice(0, 5))
            assert ranks.total(x)[0] is x and ranks.gather_tasks(x) is x and ranks.agree(True) and not ranks.agree(False)
            ranks.sum_gradients([p]), ranks.require_same('x', 'y')
            assert p.grad is grad


def test_an_invitation_that_cannot_be_followed(monkeypatch):
    monkeypatch.setenv('RANK', '1')
    with pytest.raises(ValueError, match='has RANK but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start with torchrun'):
        with ranks.joined(): pass
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))  # nobody listens there
        for k, v in dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(probe.getsockname()[1])).items(): monkeypatch.setenv(k, v)
        with pytest.raises(ranks.PeerError, match=r'rank 1 of 2 cannot join the others at 127.0.0.1:\d+ .*check that address') as caught:
            with ranks.joined(timeout_s=1.): pass
        assert '\n' not in str(caught.value)


if __name__ == '__main__':
    job, folder = sys.argv[1:]
    with ranks.joined(timeout_s=200.):
        torch.set_num_threads(1)
        found = globals()[job]()
        (Path(folder) / f'{ranks.rank()}.pickle').write_bytes(pickle.dumps(found))


TRAIN = ['train', '--num-envs', '3', '--time-limit', '8', '--seed', '1', '--meta.tasks-per-batch', '3', '--eval-every', '0']


def torchrun(*words, cwd):
    "`torchrun --nproc-per-node 2 -m ssm_metarl ...`, on a port that is free."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'ssm_metarl', *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS='1'))


def test_training_in_two_processes_is_that_of_one(tmp_path):
    done = torchrun(*TRAIN, '--outer-steps', '11', '--ckpt-dir', 'two', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line)['outer_steps'] for line in done.stdout.splitlines()] == [11]  # one of them speaks
    assert main([*TRAIN, '--outer-steps', '11', '--ckpt-dir', str(tmp_path / 'one')]) == 0
    (a, one), (b, two) = (load_checkpoint(tmp_path / name / 'latest.npz') for name in ('one', 'two'))
    assert a == b and one.keys() == two.keys()
    for name in one: np.testing.assert_allclose(one[name], two[name], atol=1e-4, err_msg=name)
    assert [line['step'] for line in read_log(tmp_path / 'two')] == list(range(11))
    assert main([*TRAIN, '--outer-steps', '12', '--ckpt-dir', str(tmp_path / 'two'), '--resume']) == 0  # with another number of processes
    assert int(load_checkpoint(tmp_path / 'two' / 'latest.npz')[1]['step']) == 12


def test_a_process_that_dies_ends_the_training_and_leaves_a_whole_checkpoint(tmp_path):
    (tmp_path / 'dies.py').write_text("""
import os
from ssm_metarl.maml import MetaMAML
from ssm_metarl.meta_learner import register_learner
from ssm_metarl.ranks import rank

@register_learner('dies')
class Dies(MetaMAML):
    "Its second process is gone in the twelfth step."
    def outer_step(self, tasks):
        if self.step == 11 and rank() == 1: os._exit(7)
        return super().outer_step(tasks)
""")
    done = torchrun(*TRAIN, '--plugin', 'dies.py', '--learner', 'dies', '--outer-steps', '20', '--ckpt-dir', 'run', cwd=tmp_path)
    assert done.returncode != 0 and not done.stdout
    load_plugin(tmp_path / 'dies.py')
    assert int(load_checkpoint(tmp_path / 'run' / 'latest.npz')[1]['step']) in (10, 11)
    assert not list((tmp_path / 'run').glob('*.unfinished'))
