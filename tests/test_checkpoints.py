"Damaged checkpoints, and checkpoints from strangers: read as they were written, or refused in one line, at no cost."
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import sys
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_metarl import cli
from ssm_metarl.checkpoints import FORMAT, CheckpointError, load_checkpoint, load_policy, make_learner, save_checkpoint
from ssm_metarl.config import CONFIGS
from ssm_metarl.envs import sample_tasks
from ssm_metarl.files import shapes_without_memory, write_npz
from ssm_metarl.policy import PolicyConfig
from ssm_metarl.ssm import DISCRETISATIONS, FEEDTHROUGHS, INITS, SSM, SSMConfig

BASIC = CONFIGS['basic']
GIGABYTE = 2**30
LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='forks, and reads /proc')


def tiny(learner='maml', **policy):
    meta = replace(BASIC.meta, tasks_per_batch=2, outer_steps=4, inner_steps=1 + (learner == 'reptile'))
    sizes = dict(hidden_dim=4, state_dim=4, history=learner == 'rl2')
    return replace(BASIC, learner=learner, num_envs=3, time_limit=10, meta=meta, policy=PolicyConfig(**sizes | policy))


@pytest.fixture(scope='module')
def trained():  # config, state after a step
    config = tiny()
    learner = make_learner(config)
    learner.outer_step(sample_tasks(config.env, 2))
    return config, learner.state_dict()


def header(config): return dict(format=FORMAT, format_version=1, plugins=[], config=asdict(config))


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def archive(path, members, kind=zipfile.ZIP_STORED):  # without the checks of `write_npz`, and without a digest
    with zipfile.ZipFile(path, 'w', kind) as file:
        for name, value in members.items(): file.writestr(f'{name}.npy', value if isinstance(value, bytes) else npy(value))


class Damage:
    "One damaged file at a time, made from a good one. Each kind returns True if the content is still what it was."
    def __init__(self, config, state, draw):
        self.config, self.state, self.draw, self.marker = config, state, draw, None
        self.kinds = [getattr(self, k) for k in dir(self) if not k.startswith('_') and k not in ('config', 'state', 'draw', 'marker', 'path')]

    def _write(self, head=None, arrays=None, **options):
        "As an archive, with or without a digest that fits."
        head, arrays = head or header(self.config), self.state if arrays is None else arrays
        if not options and self.draw.random() < .5:
            try: return write_npz(self.path, head, arrays)
            except (ValueError, TypeError): pass  # it would not write this itself
        archive(self.path, dict(header=np.array(json.dumps(head, default=str))) | arrays, **options)

    def _bytes(self):
        save_checkpoint(self.path, self.config, self.state)
        return bytearray(self.path.read_bytes())

    def _array(self, *starts): return self.draw.choice([k for k in self.state if k.startswith(starts)])

    def _odd(self): return self.draw.choice(['1', '', None, [], {}, [1], {'a': 1}, 1.5, float('nan'), float('inf'), -float('inf'), True, -1, 10**30, -10**30, 'x' * 10**5, '\x00', '\ud800', [[[]]] * 99, 2**63, 1e308])

    def cut(self):
        data = self._bytes()
        self.path.write_bytes(data[:self.draw.randrange(len(data))])

    def flip(self):
        data = self._bytes()
        for _ in range(self.draw.choice([1, 1, 5])): data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        self.path.write_bytes(data)
        return None  # a bit of a date may not matter

    def header_field(self):
        name = self.draw.choice(['format', 'format_version', 'config', 'plugins'])
        value = self.draw.choice([0, '1', None, [], {}, [1], 1.5, float('nan'), float('inf'), -1, 10**30, 'x' * 10**5, '\x00', [[[]]] * 99, 2**63, 1e308])
        if name == 'plugins' and value == []: value = 'x'
        self._write(header(self.config) | {name: value})

    def header_kind(self):
        text = self.draw.choice(['[]', '1', 'null', '"x"', '', '{', '[' * 10**5, '{"format":' * 10**4, '9' * 5000, 'NaN', "{'format': 1}"])
        archive(self.path, dict(header=np.array(text)) | self.state)

    def header_array(self):
        value = self.draw.choice([np.array([json.dumps(header(self.config))]), np.array(json.dumps(header(self.config)).encode()), np.array(1.), np.array(1j), np.zeros(0), np.array('2020-01-01', 'datetime64[D]'), np.array({}, object), np.array(None)])
        archive(self.path, dict(header=value) | self.state)

    def config_value(self):
        "Any field of the config, or of the configs inside it, with a value of another type."
        config = asdict(self.config)
        inside = self.draw.choice([config, config['meta'], config['adapt'], config['policy']])
        name = self.draw.choice(sorted(inside))
        old = inside[name]
        while (value := self._odd()) == old or isinstance(old, float) and type(value) in (int, float) and abs(value) < 2 or type(old) is type(value) is int and 0 < value < 10**6: pass
        if isinstance(old, dict) and isinstance(value, dict) and name == 'env_options': value = []
        inside[name] = value
        self._write(header(self.config) | dict(config=config))
        return None if name in ('seed', 'time_limit', 'num_envs') or type(value) is type(old) else False

    def config_missing(self):
        config = asdict(self.config)
        inside = self.draw.choice([config, config['meta'], config['adapt'], config['policy']])
        for name in self.draw.sample(sorted(inside), self.draw.choice([1, 1, 3])): del inside[name]
        self._write(header(self.config) | dict(config=config))

    def config_unknown(self):
        config = asdict(self.config)
        self.draw.choice([config, config['meta'], config['adapt'], config['policy'], config['env_options']])[self.draw.choice(['extra', '', '__class__', '__init__', 'é', 'outer_steps '])] = self._odd()
        self._write(header(self.config) | dict(config=config))

    def huge_size(self):
        "A size for which there is no memory, in the network or in the environment."
        config = asdict(self.config)
        size = self.draw.choice([4_000, 10**6, 2 * 10**6, 10**9, 2**31, 2**63, 10**30])
        place = self.draw.choice(['state_dim', 'hidden_dim', 'both', 'arms', 'states', 'actions'])
        if place in ('arms', 'states', 'actions'): config |= dict(env_name='MetaBandit-v0' if place == 'arms' else 'MetaTabularMDP-v0', env_options={place: size})
        else: config['policy'] |= {k: size for k in ('state_dim', 'hidden_dim') if place in (k, 'both')}
        config['policy'] |= dict(core=self.draw.choice(['ssm', 'ssm', 'stack', 'h3', 'gru', 'none']))
        if config['policy']['core'] == 'none' and place == 'state_dim': config['policy']['core'] = 'h3'  # it would ignore it
        self._write(header(self.config) | dict(config=config))

    def parameter_type(self):
        name = self._array('params/', 'optimizer/')
        kind = self.draw.choice(['int32', 'int64', 'uint8', 'bool', 'float16', 'float64', 'complex64', 'complex128', '>f4', 'S4', 'U4', 'datetime64[s]'])
        self._write(arrays=self.state | {name: self.state[name].astype(kind)})

    def all_parameters_of_a_type(self):
        kind = self.draw.choice(['int32', 'bool', 'float16', 'float64', 'complex64'])
        self._write(arrays={k: v.astype(kind) if k.startswith('params/') else v for k, v in self.state.items()})

    def objects(self):
        class Bomb:
            def __reduce__(bomb): return os.system, (f'touch {self.marker}',)
        value = np.empty((), object)
        value[()] = Bomb()
        name = self.draw.choice(['header', 'step', self._array('params/')])
        if self.draw.random() < .2: return self.path.write_bytes(pickle.dumps(Bomb())) and False
        archive(self.path, dict(header=np.array(json.dumps(header(self.config)))) | self.state | {name: value})

    def parameter_shape(self):
        name = self._array('params/', 'optimizer/')
        v = self.state[name]
        self._write(arrays=self.state | {name: self.draw.choice([v[None], np.concatenate([v.ravel(), v.ravel()]), np.zeros((0, *v.shape), v.dtype), np.broadcast_to(v, (3, *v.shape))])})

    def not_finite(self):
        name = self._array('params/', 'optimizer/')
        v = self.state[name].copy().reshape(-1)
        v[self.draw.randrange(len(v))] = self.draw.choice([np.nan, np.inf, -np.inf])
        self._write(arrays=self.state | {name: v.reshape(self.state[name].shape)})

    def no_averages(self):
        "Adam's state is missing: all of it, or for some parameters in a file that was written whole."
        if self.draw.random() < .5: return self._write(arrays={k: v for k, v in self.state.items() if not k.startswith('optimizer/')})
        one = self._array('optimizer/')
        save_checkpoint(self.path, self.config, self.state)
        with zipfile.ZipFile(self.path) as file: members = {n.removesuffix('.npy'): file.read(n) for n in file.namelist()}
        archive(self.path, {k: v for k, v in members.items() if not k.startswith(one.rpartition('/')[0])})

    def odd_averages(self):
        name = self._array('optimizer/')
        v = self.state[name]
        if name.endswith('/step'): value = self.draw.choice([-1, .5, -np.inf, np.nan])
        elif name.endswith('_sq'): value = -1
        else: value = np.nan
        self._write(arrays=self.state | {name: np.full_like(v, value)})

    def step(self):
        self._write(arrays=self.state | dict(step=self.draw.choice([np.array(np.inf), np.array(np.nan), np.array(1.), np.array(-1), np.array(-2**63), np.array(2**63 - 1), np.array(10**15), np.array([1]),
            np.array(True), np.array(1, 'int32'), np.array('1'), np.array(1j), np.zeros(0, 'int64'), np.array(0)])))

    def missing(self):
        name = self._array('step', 'params/')
        self._write(arrays={k: v for k, v in self.state.items() if k != name})

    def extra(self):
        value = self.draw.choice([np.zeros(3, 'float32'), np.zeros(3 * 10**7, 'float32'), np.array('x'), np.zeros((0, 5))])
        self._write(arrays=self.state | {self.draw.choice(['extra', 'params/extra', 'optimizer/extra/step', 'optimizer/log_std/extra', '../params/log_std', 'a\nb']): value})

    def bomb(self): self._write(arrays=self.state | dict(extra=np.zeros(3 * 10**7)), kind=self.draw.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))

    def lying_shape(self):
        name = self._array('params/')
        data = npy(self.state[name]).replace(str(self.state[name].shape).encode(), self.draw.choice([b'(10000000000,)', b'(-1,)', b'(99999999999999999999999999999999,)', b'(1000000, 1000000)']), 1)
        archive(self.path, dict(header=np.array(json.dumps(header(self.config)))) | self.state | {name: data})

    def something_else(self): self.path.write_bytes(self.draw.choice([b'', b'PK', b'PK\5\6' + bytes(18), npy(np.ones(3)), self.draw.randbytes(5000), b'\x80\x04N.', json.dumps(header(self.config)).encode(), bytes(10**6)]))

    def special(self):
        self.draw.choice([lambda: os.mkfifo(self.path), lambda: self.path.mkdir(), lambda: self.path.symlink_to('/dev/zero'), lambda: self.path.symlink_to('/dev/tty'), lambda: self.path.symlink_to(self.path), lambda: None])()


def memory():  # bytes of address space now, and of memory at most so far
    size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    return size, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def attack(config, state, folder, queue):
    try: queue.put(attacked(config, state, folder))
    except BaseException as error:  # in a kind of damage itself
        queue.put(([repr(error)], [], 0, [], 0))
        raise


def attacked(config, state, folder):
    "200 files, each of them read with a limit on memory. -> what went wrong, kinds that were read as they were"
    load_checkpoint(folder / 'good.npz'), make_learner(*load_checkpoint(folder / 'good.npz'))  # all imports are done
    damage, watched, watching, wrong, read, refused = Damage(config, state, random.Random(16)), [], False, [], [], []
    damage.marker = folder / 'executed'
    sys.addaudithook(lambda event, args: watched.append(event) if watching and event in ('os.system', 'os.exec', 'subprocess.Popen', 'pickle.find_class', 'marshal.loads') else None)
    size, begin = memory()
    resource.setrlimit(resource.RLIMIT_AS, (size + GIGABYTE,) * 2)
    stderr, sys.stderr = sys.stderr, io.StringIO()
    for i in range(200):
        kind = damage.kinds[i % len(damage.kinds)]
        damage.path = folder / f'{i}.npz'
        unchanged = kind()
        watching, start, said = True, time.monotonic(), None
        try:
            found, arrays = load_checkpoint(damage.path)
            learner = make_learner(found, arrays)
            read.append(kind.__name__)
            same = arrays.keys() == state.keys() and all(np.array_equal(v, state[k]) and v.dtype == state[k].dtype for k, v in arrays.items())
            if unchanged is False or not same: wrong.append((i, kind.__name__, 'was read'))
        except CheckpointError as error: said = str(error)
        except BaseException as error: wrong.append((i, kind.__name__, repr(error)))
        watching = False
        if said is not None:
            refused.append(i)
            if '\n' in said or len(said) > 700 or 'Memory' in said or 'Recursion' in said and kind.__name__ != 'header_kind': wrong.append((i, kind.__name__, said))
            sys.stderr.seek(0), sys.stderr.truncate()
            status, words = cli.main(['eval', '--checkpoint', str(damage.path), '--episodes', '2']), sys.stderr.getvalue()
            if status != 1 or words.count('\n') != 1 or not words.startswith('ssm-metarl: checkpoint'): wrong.append((i, kind.__name__, status, words))
        if time.monotonic() - start > 5: wrong.append((i, kind.__name__, 'took', time.monotonic() - start))
        if damage.path.is_file() and not damage.path.is_symlink(): damage.path.unlink()
    sys.stderr = stderr
    return wrong, read, len(refused), watched, memory()[1] - begin


@LINUX
def test_200_damaged_checkpoints(trained, tmp_path):
    config, state = trained
    save_checkpoint(tmp_path / 'good.npz', config, state)
    context = multiprocessing.get_context('fork')
    queue = context.SimpleQueue()
    child = context.Process(target=attack, args=(config, state, tmp_path, queue))
    child.start()
    wrong, read, refused, watched, grown = queue.get()
    child.join()
    assert wrong == [] and not (tmp_path / 'executed').exists()
    assert refused > 180 and set(read) <= {'flip', 'config_value'}
    assert watched == [] and grown < GIGABYTE / 2


@LINUX
def test_a_size_costs_nothing_before_it_is_believed(trained, tmp_path):
    "Dimensions that agree with each other, in a file that holds next to nothing: 5 GB if the initial numbers were drawn."
    config, state = trained
    wide = asdict(config) | dict(policy=asdict(replace(config.policy, hidden_dim=20_000, state_dim=4_000)))
    rows = {'optimizer/value.bias/exp_avg': np.zeros((20_000,), 'float32')}
    write_npz(tmp_path / 'a.npz', header(config) | dict(config=wide), state | rows)
    before, begin = memory()[1], time.monotonic()
    with pytest.raises(CheckpointError, match='it must be float32'): load_checkpoint(tmp_path / 'a.npz')
    assert memory()[1] - before < 2**27 and time.monotonic() - begin < 20


@pytest.mark.parametrize('init', INITS)
@pytest.mark.parametrize('feedthrough', FEEDTHROUGHS)
@pytest.mark.parametrize('discretisation', DISCRETISATIONS)
def test_the_shapes_of_a_layer_are_those_of_its_numbers(init, feedthrough, discretisation):
    config = SSMConfig(6, 8, 6, init, discretisation=discretisation, feedthrough=feedthrough)
    real = SSM(config)
    assert list(shapes_without_memory(lambda: SSM(config)).items()) == [(k, tuple(v.shape)) for k, v in real.named_parameters()]
    assert all(v.device.type == 'cpu' and torch.equal(v, SSM(config).get_parameter(k)) for k, v in real.named_parameters())


@pytest.mark.parametrize('shape', ['9' * 200, '1, ' * 40, '1' * 18 + ', ' * 3, ' ' * 300, '1 ' * 60, ',' * 60])
def test_odd_shapes_take_no_time(shape, trained, tmp_path):
    config, state = trained
    data = bytearray(npy(np.ones(3, 'float32')))
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}".ljust(500) + '\n'
    data = data[:8] + len(text).to_bytes(2, 'little') + text.encode() + data[-12:]
    archive(tmp_path / 'a.npz', dict(header=np.array(json.dumps(header(config)))) | state | {'params/log_std': bytes(data)})
    begin = time.process_time()
    with pytest.raises(CheckpointError, match='params/log_std'): load_checkpoint(tmp_path / 'a.npz')
    assert time.process_time() - begin < 5  # it was exponential in the number of digits


@pytest.mark.parametrize('learner', ['maml', 'reptile', 'anil', 'meta-sgd', 'joint', 'rl2'])
def test_a_good_checkpoint_is_read_as_it_was_written(learner, tmp_path):
    config = tiny(learner)
    trained = make_learner(config)
    for steps in range(3):
        state = trained.state_dict()
        save_checkpoint(tmp_path / 'a.npz', config, state)
        found, arrays = load_checkpoint(tmp_path / 'a.npz')
        assert found == config and arrays.keys() == state.keys() and all(np.array_equal(v, state[k]) and v.dtype == state[k].dtype for k, v in arrays.items())
        _, params, _ = load_policy(tmp_path / 'a.npz')
        assert all(torch.equal(v, trained.params[k]) for k, v in params.items()) and params.keys() == trained.params.keys()
        trained.outer_step(sample_tasks(config.env, 2, step=steps))
