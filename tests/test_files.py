"Files are whole or not there, and whatever stands in one: it reads back as it was, or one line says why not."
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import pytest
import torch
from gymnasium import spaces

from ssm_metarl import files
from ssm_metarl.cores import CORES, GRU, H3, Memoryless, TwoLayers
from ssm_metarl.files import (LayerConfig, append_line, check_members, check_sizes, folder_lock, read_lines, read_npz, read_text, shapes_without_memory,
                              to_json, writable_folder, write_npz, write_text_whole)
from ssm_metarl.memory import SelectiveSSM, SSMStack, SSMStackConfig
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.ssm import SSM, SSMConfig

HEADER = dict(format='example', format_version=1, config=dict(size=3))
rng = np.random.default_rng(0)
ARRAYS = {'params/x': rng.normal(size=(3, 4)).astype(np.float32), 'params/y': rng.normal(size=5), 'step': np.array(7)}
NEEDED = {k: (str(v.dtype), v.shape) for k, v in ARRAYS.items()}
posix = pytest.mark.skipif(os.name != 'posix', reason='needs signals and limits')


def needed(header, stored): check_members(stored, NEEDED)


def npy(array, allow_pickle=False):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=allow_pickle)
    return file.getvalue()


def archive(path, *members, kind=zipfile.ZIP_STORED):
    "A zip file of (name, bytes), as anybody could write it."
    with zipfile.ZipFile(path, 'w', kind) as file:
        for name, content in members: file.writestr(name, content)


def members(header=None, /, **changes):
    "Those of a good file without a digest, but for some changes: dictionary or text of the header, name -> array, bytes, or None to leave it out."
    text = header if isinstance(header, str) else json.dumps(HEADER | (header or {}))
    contents = {'header': np.array(text)} | ARRAYS | changes
    return [(f'{k}.npy', v if isinstance(v, bytes) else npy(v, allow_pickle=True)) for k, v in contents.items() if v is not None]


def same(arrays): return arrays.keys() == ARRAYS.keys() and all(v.dtype == ARRAYS[k].dtype and np.array_equal(v, ARRAYS[k]) for k, v in arrays.items())


def read(path): return read_npz(path, 'example', 1, needed, finite=True)


def refused(path, reader=read):
    with pytest.raises(ValueError) as info: reader(path)
    said = str(info.value)
    assert str(path) in said and '\n' not in said and len(said) < 700, said
    return said


# --- 200 damaged files

def cut(random, path): path.write_bytes(path.read_bytes()[:random.randrange(path.stat().st_size)])


def flip(random, path):
    content = bytearray(path.read_bytes())
    for _ in range(random.choice([1, 1, 2, 5, 50])): content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def flip_around(random, path):
    "In the last 400 bytes, where the archive lists its members."
    content = bytearray(path.read_bytes())
    content[-random.randrange(1, 400)] = random.choice([0, 1, 127, 255])
    path.write_bytes(content)


def surplus(random, path):
    extra = random.choice([np.zeros(2**24, np.uint8), np.ones(3), np.array('text')])
    archive(path, *members(surprise=extra), kind=random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))


def compress(random, path): archive(path, *members(), kind=random.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))


def other_type(random, path):
    kinds = [int, bool, np.float16, complex, object, 'datetime64[s]', str, bytes, '>f4', np.uint64, [('a', float)]]
    name = random.choice(list(ARRAYS))
    with np.errstate(all='ignore'):
        value = np.zeros(ARRAYS[name].shape, random.choice([k for k in kinds if (name, k) != ('step', int)]))
    archive(path, *members(**{name: value}))


def not_finite(random, path):
    name = random.choice(['params/x', 'params/y'])
    value = ARRAYS[name].copy()
    value.flat[random.randrange(value.size)] = random.choice([np.nan, np.inf, -np.inf])
    archive(path, *members(**{name: value}))


def odd_header(random, path):
    versions = ['1', None, 10**30, 10**400, 2.5, True, [], {}, [1], -1, 0, 'nan', float('nan'), float('inf'), 2]
    formats = [None, 3, [], {}, ['example'], 'EXAMPLE', 'x' * 10**5, '\n', 'other']
    text = random.choice(['[' * 10**5 + ']' * 10**5, '{"a":' * 10**5, '[]', '1', '', 'null', '"x"', '{', '{}', '9' * 10**5, '{"format": ' + '9' * 10**4 + '}', '\ud800', '\0'])
    header = random.choice([dict(format_version=random.choice(versions)), dict(format=random.choice(formats)), text])
    archive(path, *members(header))


def header_of_another_kind(random, path):
    value = random.choice([np.zeros(3), np.array(json.dumps(HEADER).encode()), np.array([json.dumps(HEADER)]), np.array(HEADER, object), None, b'', b'\x93NUMPY\1\0', b'junk' * 99])
    archive(path, *members(header=value))


def twice(random, path):
    with pytest.warns(UserWarning, match='Duplicate'): archive(path, *members(), ('step.npy', npy(9)))


def lying_sizes(random, path):
    "More numbers than there are, in the array's own words or in those of the archive."
    name, huge = random.choice(list(ARRAYS)), random.choice([2**20, 2**33, 10**12, 10**18])
    described = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({huge},), }}".ljust(117) + '\n'
    content = b'\x93NUMPY\1\0' + len(described).to_bytes(2, 'little') + described.encode() + bytes(80)
    archive(path, *members(**{name: content}))


def odd_shapes(random, path):
    shape = random.choice(['(-3,)', '(3', '()' * 9999, '(' * 5000, '(0, 99999999999999999999)', '(1.5,)', "(__import__('os').abort(),)", '(3,) * 10**9', '(' + '1, ' * 60 + ')'])
    described = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n"
    archive(path, *members(**{'params/x': b'\x93NUMPY\1\0' + (len(described) % 2**16).to_bytes(2, 'little') + described.encode() + bytes(48)}))


def missing(random, path): archive(path, *members(**{random.choice(list(ARRAYS)): None}))


def odd_name(random, path): archive(path, *members(), (random.choice(['../x.npy', 'x', 'header', 'a\nb.npy', '.npy', 'n' * 5000 + '.npy', 'é.npy']), npy(1)))


def something_else(random, path): path.write_bytes(random.choice([b'', b'PK', b'PK\5\6' + bytes(18), b'hello', npy(ARRAYS['params/x']), random.randbytes(5000), b'\x80\x04N.', bytes(10**6)]))


def before_and_after(random, path):
    content = path.read_bytes()
    path.write_bytes(random.choice([b'x' + content, content + b'x', content + content, content[:-22] + bytes(30) + content[-22:]]))


DAMAGE = [cut, flip, flip_around, surplus, compress, other_type, not_finite, odd_header, header_of_another_kind, twice, lying_sizes, odd_shapes, missing, odd_name, something_else,
          before_and_after]


def test_200_damaged_files(tmp_path):
    chance, kept = random.Random(42), {}
    tracemalloc.start()
    try:
        for i in range(200):
            path, damage = tmp_path / f'{i}.npz', DAMAGE[i % len(DAMAGE)]
            if chance.random() < .5: write_npz(path, HEADER, ARRAYS)
            else: archive(path, *members())
            damage(chance, path)
            before = path.read_bytes()
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            try: header, arrays = read(path)
            except ValueError as error:
                assert str(path) in str(error) and '\n' not in str(error) and len(str(error)) < 700, (damage, str(error))
                kept.setdefault(damage.__name__, []).append(False)
            else:
                assert same(arrays) and header == HEADER, damage
                kept.setdefault(damage.__name__, []).append(True)
            assert tracemalloc.get_traced_memory()[1] - start < 2**27, damage
            assert path.read_bytes() == before
    finally: tracemalloc.stop()
    survivors = {name for name, found in kept.items() if any(found)}
    assert sum(map(len, kept.values())) == 200 and survivors <= {'flip', 'flip_around'}  # bits that say nothing: dates and the like


def test_a_good_file_reads_back(tmp_path):
    write_npz(tmp_path / 'a.npz', HEADER, ARRAYS)
    header, arrays = read(tmp_path / 'a.npz')
    assert same(arrays) and header == HEADER
    archive(tmp_path / 'b.npz', *members())  # an older file, which has no digest
    assert same(read(tmp_path / 'b.npz')[1])
    with np.load(tmp_path / 'a.npz', allow_pickle=False) as file: assert same({k: file[k] for k in ARRAYS})  # NumPy's own reader


@pytest.mark.parametrize('kind', files.KINDS)
@pytest.mark.parametrize('shape', [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_every_kind_of_number(kind, shape, tmp_path):
    value = (rng.normal(size=shape) * 100).astype(kind)
    for i, v in enumerate((value, value.T)):
        write_npz(tmp_path / f'{i}.npz', HEADER, {'a/b c.é': v})
        np.savez(tmp_path / f'np{i}.npz', header=np.array(json.dumps(HEADER)), v=v)
        for path, name in ((tmp_path / f'{i}.npz', 'a/b c.é'), (tmp_path / f'np{i}.npz', 'v')):
            found = read_npz(path, 'example', 1)[1][name]
            assert found.dtype == v.dtype and found.shape == v.shape and np.array_equal(found, v)


def test_a_digest_covers_all(tmp_path):
    write_npz(tmp_path / 'a.npz', HEADER, ARRAYS)
    with np.load(tmp_path / 'a.npz') as file: header = str(file['header'])
    path = tmp_path / 'b.npz'
    archive(path, *members(header))
    assert same(read(path)[1])
    swapped = {'params/x': ARRAYS['params/x'] + 1, 'step': np.array(8)}
    for text, changes in [(header, {k: v}) for k, v in swapped.items()] + [(header.replace('"size": 3', '"size": 4'), {})]:
        archive(path, *members(text, **changes))
        assert 'digest' in refused(path)


def test_a_zip_bomb(tmp_path):
    "200 MB that a compressed member makes of 200 kB; none of them is asked for."
    path, zeros = tmp_path / 'bomb.npz', bytes(2**20)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, content in members(): file.writestr(name, content, zipfile.ZIP_STORED)
        with file.open('surprise.npy', 'w', force_zip64=True) as member:
            member.write(npy(np.empty(0, np.uint8)).replace(b"(0,), }          ", f'({200 * 2**20},), }}'.encode().ljust(16)))
            for _ in range(200): member.write(zeros)
    tracemalloc.start()
    try:
        assert 'surprise is compressed' in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally: tracemalloc.stop()


def any_of(path): return read_npz(path, 'example', 1)


def test_bytes_that_belong_to_nothing(tmp_path):
    path = tmp_path / 'a.npz'
    archive(path, *members())
    content, end = path.read_bytes(), len(path.read_bytes()) - 22
    start = int.from_bytes(content[-6:-2], 'little')
    path.write_bytes(content[:start] + bytes(100) + content[start:end] + content[end:-6] + (start + 100).to_bytes(4, 'little') + content[-2:])
    assert zipfile.ZipFile(path).testzip() is None and 'do not add up' in refused(path, any_of)  # between the arrays and their list
    with zipfile.ZipFile(path, 'w') as file:
        for name, value in members(): file.writestr(name, value)
        file.comment = b'hello'
    assert 'damaged' in refused(path, any_of)
    class Pipe(io.BytesIO):  # sizes then follow the arrays, where nobody can check them before reading
        def seekable(self): return False
        def tell(self): raise OSError
        def seek(self, *_): raise OSError
    with zipfile.ZipFile(pipe := Pipe(), 'w') as file:
        for name, value in members(): file.writestr(name, value)
    path.write_bytes(pipe.getvalue())
    assert 'do not add up' in refused(path, any_of)


@pytest.mark.parametrize('shape', ['(134217728,)', '(4, 4, 4)', '()', '(0,)'])
def test_a_shape_that_lies_costs_nothing(shape, tmp_path):
    path, described = tmp_path / 'a.npz', f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + '\n'
    archive(path, *members(**{'params/y': b'\x93NUMPY\1\0' + len(described).to_bytes(2, 'little') + described.encode() + bytes(80)}))
    tracemalloc.start()
    try:
        assert 'the shape of params/y does not fit its size' in refused(path, any_of)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally: tracemalloc.stop()


def test_what_is_not_expected_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / 'a.npz'
    write_npz(path, HEADER, ARRAYS | dict(surprise=np.ones(3)))
    monkeypatch.setattr(np, 'empty', lambda *_, **__: pytest.fail('memory was asked for'))
    def only_header(*args):
        with monkeypatch.context() as m:
            m.setattr(files._Member, 'read', lambda self, archive, dtype: files_read(self, archive, dtype) if self.name == 'header' else pytest.fail('numbers were read'))
            return read(*args)
    monkeypatch.undo()
    files_read = files._Member.read
    assert 'a.npz does not fit: surprise is not expected' in refused(path, only_header)
    write_npz(path, HEADER, {k: v for k, v in ARRAYS.items() if k != 'step'})
    assert 'step is missing' in refused(path, only_header)
    write_npz(path, HEADER, ARRAYS | dict(step=np.array(7.)))
    assert 'step is float64' in refused(path, only_header) and 'int64' in refused(path, only_header)
    write_npz(path, HEADER, ARRAYS | {'params/x': np.zeros((3, 5), np.float32)})
    assert 'params/x is float32 [3, 5]; it must be float32 [3, 4]' in refused(path, only_header)


def test_not_finite(tmp_path):
    path = tmp_path / 'a.npz'
    write_npz(path, HEADER, ARRAYS | {'params/y': np.full(5, np.inf)})
    assert 'params/y holds numbers that are not finite' in refused(path)
    assert np.isinf(read_npz(path, 'example', 1, needed)[1]['params/y']).all()


def test_interrupts_and_bugs_are_not_swallowed(tmp_path):
    write_npz(tmp_path / 'a.npz', HEADER, ARRAYS)
    def interrupted(*_): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): read_npz(tmp_path / 'a.npz', 'example', 1, interrupted)
    for error in (RecursionError(), MemoryError(), KeyError('x'), OverflowError()):
        def fails(*_): raise error
        assert 'damaged' in refused(tmp_path / 'a.npz', lambda path: read_npz(path, 'example', 1, fails))


@posix
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path, words in ((tmp_path / 'pipe', 'not a regular file'), ('/dev/zero', 'not a regular file'), (tmp_path, 'Is a directory'), (tmp_path / 'none', 'does not exist')):
        assert words in refused(path)
        if words != 'does not exist':
            assert words in refused(path, read_lines) and words in refused(path, read_text)
    for path in ('a\0b', 'x' * 5000): assert 'cannot be read' in pytest.raises(ValueError, read, path).value.args[0]


# --- modules

LAYERS = [SSM(SSMConfig(3, 8, 2)), SSM(SSMConfig(3, 8, 2, init='legs')), SelectiveSSM(SSMConfig(3, 8, 2)), Memoryless(SSMConfig(3, 8, 2)), GRU(LayerConfig(3, 8, 2)), H3(LayerConfig(3, 8, 2)),
          SSMStack(SSMStackConfig(3, 2, 8, 3)), TwoLayers(SSMConfig(3, 8, 2))]


def shapes_of(module): return {k: tuple(p.shape) for k, p in module.named_parameters()}


@pytest.mark.parametrize('layer', LAYERS, ids=lambda layer: type(layer).__name__)
def test_shapes_of_layers(layer):
    state = torch.get_rng_state()
    assert shapes_without_memory(lambda: type(layer)(layer.config)) == shapes_of(layer)
    assert torch.equal(state, torch.get_rng_state())
    with torch.device('meta'): pass
    assert torch.ones(1).device.type == 'cpu'


@pytest.mark.parametrize('core', CORES)
@pytest.mark.parametrize('action', [spaces.Discrete(3), spaces.Box(-1, 1, (2,))])
def test_shapes_of_policies(core, action):
    make = lambda: SSMMetaPolicy(spaces.Box(-1, 1, (4,)), action, PolicyConfig(24, 16, core=core, history=True))
    assert shapes_without_memory(make) == shapes_of(make())


@posix
def test_shapes_need_no_memory():
    "Nine gigabytes of a GRU, and an H3, of which not a megabyte is asked for."
    import resource
    shapes_without_memory(lambda: GRU(LayerConfig(3, 8, 2)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert shapes_without_memory(lambda: GRU(LayerConfig(3, 28_000, 2)))['U'] == (3 * 28_000, 28_000)
    assert shapes_without_memory(lambda: H3(LayerConfig(28_000, 28_000, 28_000)))['K'] == (28_000, 28_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # kilobytes


def test_none_where_a_constructor_needs_numbers():
    def needs():
        layer = torch.nn.Linear(2, 2)
        if layer.weight.sum() > 0: layer.bias.data += 1
        return layer
    assert shapes_without_memory(needs) is None


@pytest.mark.parametrize('layer', LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_layer_with_another_header(layer, tmp_path):
    path, header = tmp_path / 'a.npz', dict(format=layer.format, format_version=1)
    good, values = asdict(layer.config), layer.get_parameters()
    def said(config, values=values):
        write_npz(path, header | dict(config=config), values)
        return refused(path, type(layer).load)
    layer.double().save(path)
    assert all(torch.equal(p, q) and p.dtype == torch.float64 for p, q in zip(type(layer).load(path).parameters(), layer.parameters()))
    for config in ([], {}, None, 'x', 3, dict(good, strange=1), dict(good, input_dim='3'), dict(good, state_dim=None), dict(good, output_dim=[2]), dict(good, state_dim=float('inf'))):
        assert f'describe a {type(layer).__name__}' in said(config)
    for size in (10**6, 10**9, 10**30, 10**400, -1, 5, True):
        tracemalloc.start()
        try:
            assert 'dim' in said(dict(good, state_dim=size)) or size == 5
            assert tracemalloc.get_traced_memory()[1] < 2**26
        finally: tracemalloc.stop()
    name = next(iter(values))
    for kind in (int, bool, np.int64): assert 'describe' in said(good, values | {name: values[name].astype(kind)})
    assert 'describe' in said(good, {k: v.astype(int) for k, v in values.items()})
    assert 'describe' in said(good, values | {name: values[name].astype(np.float16)})
    assert f'{name} holds numbers that are not finite' in said(good, values | {name: values[name] * np.nan})
    assert f'{name} is missing' in said(good, {k: v for k, v in values.items() if k != name})
    assert 'surprise is not expected' in said(good, values | dict(surprise=values[name]))


def test_sizes_that_left_no_trace():
    stored = dict(x=('float32', (5, 3000)))
    check_sizes(dict(state_dim=6000, seed=10**9, width=4096, name='x', nested=dict(layers=1)), stored)
    for bad in (dict(state_dim=6001), dict(nested=dict(hidden_dim=10**6)), dict(layers=10**30)):
        with pytest.raises(ValueError, match='does not fit arrays'): check_sizes(bad, stored)


# --- writing

def program(text, *args, **kwargs): return subprocess.Popen([sys.executable, '-c', text, *map(str, args)], stdout=subprocess.PIPE, text=True, **kwargs)


LIMITED = '''
import resource, sys
import numpy as np
from ssm_metarl.files import append_line, write_npz, write_text_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
work = dict(npz=lambda p: write_npz(p, dict(format='x', format_version=1), dict(x=np.ones(10**6))), txt=lambda p: write_text_whole(p, 10**6 * 'a'),
            jsonl=lambda p: [append_line(p, dict(i=i, text='x' * 1000)) for i in range(200)])
for name in sys.argv[2:]:
    try: work[name](sys.argv[1] + '/a.' + name)
    except OSError as error: print(error)
'''


@posix
def test_full_disk(tmp_path):
    write_npz(tmp_path / 'a.npz', HEADER, ARRAYS), write_text_whole(tmp_path / 'a.txt', 'old\n')
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    said, _ = (process := program(LIMITED, tmp_path, 'npz', 'txt', 'jsonl')).communicate()
    assert process.returncode == 0
    lines = said.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ('a.npz', 'a.txt', 'a.jsonl')):
        assert str(tmp_path / name) in line and 'no space left' in line and 'free some space or name another folder' in line and 'the previous file is untouched' in line
    assert sorted(os.listdir(tmp_path)) == ['a.jsonl', 'a.npz', 'a.txt'] and all((tmp_path / k).read_bytes() == v for k, v in before.items())
    log = (tmp_path / 'a.jsonl').read_bytes()
    assert log.endswith(b'}\n') and [line['i'] for line in read_lines(tmp_path / 'a.jsonl')] == list(range(log.count(b'\n')))


def test_no_folder_to_write_into(tmp_path):
    (tmp_path / 'file').write_text('mine')
    places = [tmp_path / 'file' / 'a.npz', tmp_path / 'file' / 'deeper' / 'a.npz'] + ([os.path.join('/proc', 'a.npz')] if os.path.isdir('/proc/self') else [])
    for place in places:
        for write in (lambda: write_npz(place, HEADER, ARRAYS), lambda: write_text_whole(place, 'x'), lambda: append_line(place, {})):
            with pytest.raises(OSError) as info: write()
            assert str(place) in str(info.value) and 'name another folder' in str(info.value) and '\n' not in str(info.value)
        with pytest.raises(OSError, match='name another one'): writable_folder(os.path.dirname(place))
    for place in ('', 'a\0b'):
        with pytest.raises(OSError, match='name another one'): writable_folder(place)
    assert (tmp_path / 'file').read_text() == 'mine'


WRITER = '''
import sys
import numpy as np
from ssm_metarl.files import write_npz
print('ready', flush=True)
for i in range(10**9): write_npz(sys.argv[1], dict(format='example', format_version=1, i=i), dict(x=np.full(200_000, i)))
'''


@posix
def test_kill_at_any_moment(tmp_path):
    "Of one program and of the copies that it makes of itself: importing torch 20 times would take long."
    path, chance, found = tmp_path / 'a.npz', random.Random(1), 0
    write_npz(path, HEADER | dict(i=-1), dict(x=np.full(200_000, -1)))
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                for i in range(10**9): write_npz(path, HEADER | dict(i=i), dict(x=np.full(200_000, i)))
            finally: os._exit(1)
        time.sleep(.02 + .1 * chance.random())
        os.kill(child, signal.SIGKILL), os.waitpid(child, 0)
        header, arrays = read_npz(path, 'example', 1)
        assert (arrays['x'] == header['i']).all()
        left = [name for name in os.listdir(tmp_path) if name != 'a.npz']
        assert len(left) <= 1
        found += len(left)
    assert found  # some were killed in the middle of writing
    write_text_whole(tmp_path / 'other.txt', 'x')  # by another writer into the same folder
    assert sorted(os.listdir(tmp_path)) == ['a.npz', 'other.txt']


@posix
def test_the_unfinished_file_of_a_living_process_stays(tmp_path):
    process = program(WRITER, tmp_path / 'a.npz')
    try:
        assert process.stdout.readline() == 'ready\n'
        for i in range(300): write_text_whole(tmp_path / 'b.txt', str(i))  # each looks for abandoned files
        assert process.poll() is None
    finally: process.kill(), process.wait()
    assert read_npz(tmp_path / 'a.npz', 'example', 1)[0]['i'] >= 0


def test_only_ones_own_leftovers_are_removed(tmp_path):
    for name in ('.a.npz.0123abcd.unfinished', '.mine.unfinished', 'a.npz.0123abcd.unfinished', '.a.npz.tmp', '.a.npz.0123ABCD.unfinished'): (tmp_path / name).write_text('x')
    write_text_whole(tmp_path / 'b.txt', 'x')
    assert sorted(os.listdir(tmp_path)) == sorted(['.mine.unfinished', 'a.npz.0123abcd.unfinished', '.a.npz.tmp', '.a.npz.0123ABCD.unfinished', 'b.txt'])


@posix
def test_a_file_that_was_removed_before_it_was_locked(tmp_path, monkeypatch):
    "Another writer took it for abandoned in between: a new one is made."
    hold, removed = files._hold, []
    def late(file, wait):
        if not removed: removed.extend(tmp_path.glob('.*.unfinished')), os.unlink(removed[0])
        hold(file, wait)
    monkeypatch.setattr(files, '_hold', late)
    write_text_whole(tmp_path / 'a.txt', 'x')
    assert len(removed) == 1 and (tmp_path / 'a.txt').read_text() == 'x' and os.listdir(tmp_path) == ['a.txt']


def test_many_writers_of_one_file(tmp_path):
    def write(who):
        for i in range(30): write_text_whole(tmp_path / 'a.txt', f'{who}\n' * 1000)
    threads = [threading.Thread(target=write, args=(who,)) for who in 'abcd']
    for t in threads: t.start()
    while any(t.is_alive() for t in threads):
        if (tmp_path / 'a.txt').exists(): assert len(set((tmp_path / 'a.txt').read_text().split())) == 1
    assert os.listdir(tmp_path) == ['a.txt']


@posix
def test_others_may_read_what_is_written(tmp_path):
    old = os.umask(0o022)
    try: write_npz(tmp_path / 'a.npz', HEADER, ARRAYS)
    finally: os.umask(old)
    assert (tmp_path / 'a.npz').stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize('value', [np.array('text'), np.ones(2, complex), np.array([{}]), np.array('2020-01-01', 'datetime64[D]'), np.ones(2, '>f4')])
def test_what_could_not_be_read_is_not_written(value, tmp_path):
    write_npz(tmp_path / 'a.npz', HEADER, ARRAYS)
    before = (tmp_path / 'a.npz').read_bytes()
    with pytest.raises(ValueError, match='x holds'): write_npz(tmp_path / 'a.npz', HEADER, dict(x=value))
    for header, arrays in ((HEADER | dict(digest=1), {}), (HEADER, dict(header=np.ones(1))), (HEADER | dict(long='x' * 10**6), {})):
        with pytest.raises(ValueError): write_npz(tmp_path / 'a.npz', header, arrays)
    assert (tmp_path / 'a.npz').read_bytes() == before and os.listdir(tmp_path) == ['a.npz']


def test_names_that_a_writer_of_archives_uses_itself(tmp_path):
    arrays = {k: np.ones(1) for k in ('file', 'args', 'allow_pickle', 'arr_0', 'path', 'a\nb')}
    write_npz(tmp_path / 'a.npz', HEADER, {k: v for k, v in arrays.items() if '\n' not in k})
    assert read_npz(tmp_path / 'a.npz', 'example', 1)[1].keys() == arrays.keys() - {'a\nb'}


# --- text

def test_json():
    value = dict(a=np.float32(.5), b=[np.nan, (1, np.inf)], c=np.arange(3), d=torch.ones(2), e=np.bool_(True), f=None, g='é')
    assert json.loads(to_json(value), parse_constant=pytest.fail) == dict(a=.5, b=[None, [1, None]], c=[0, 1, 2], d=[1., 1.], e=True, f=None, g='é')
    assert to_json({}, indent=2) == '{}'


def test_text_of_editors_and_systems(tmp_path):
    path = tmp_path / 'a.toml'
    for content in ('x = "é"\r\ny = 1\r\n', '\ufeffx = "é"\ny = 1\n', '\ufeffx = "é"\r\ny = 1\r\n', 'x = "é"\ny = 1\n'):
        path.write_bytes(content.encode())
        assert read_text(path) == 'x = "é"\ny = 1\n'
    for encoding in ('utf-16', 'latin-1', 'cp1252'):
        path.write_bytes('x = "é"\n'.encode(encoding))
        assert 'save it as UTF-8' in refused(path, read_text)
    write_text_whole(path, 'é\nü')
    assert path.read_bytes() == 'é\nü'.encode()


def test_old_locales_write_and_read_the_same(tmp_path):
    text = ("import sys; from pathlib import Path; from ssm_metarl.files import *; p, e = Path(sys.argv[1]), chr(233); write_text_whole(p / 'a', e); append_line(p / 'b', {'x': e});"
            "print(read_text(p / 'a') == e, read_lines(p / 'b') == [{'x': e}], len((p / 'a').read_bytes()))")
    said, _ = program(text, tmp_path, env=os.environ | dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')).communicate()
    assert said == 'True True 2\n'


def test_lines_that_are_torn_blank_or_not_objects(tmp_path):
    path = tmp_path / 'log.jsonl'
    assert read_lines(path) == []
    whole = b'{"i": 0}\n{"i": 1, "x": {"y": [1, 2]}, "z": "\xc3\xa9}"}\n'
    for end in range(len(whole) + 1):  # a power cut at each byte
        path.write_bytes(whole[:end])
        lines = read_lines(path)
        assert [line['i'] for line in lines] == list(range(len(lines))) and len(lines) in (whole[:end].count(b'\n'), whole[:end].count(b'\n') + 1)
        append_line(path, dict(i=len(lines)))
        assert read_lines(path) == lines + [dict(i=len(lines))] and path.read_bytes().endswith(b'}\n')
    path.write_bytes(b'{"i": 0}\n\n \r\n{"i": 1}\r\n' + bytes(4096))  # a tail that the disk had not got yet
    assert read_lines(path) == [dict(i=0), dict(i=1)]
    append_line(path, dict(i=2))
    assert [line['i'] for line in read_lines(path)] == [0, 1, 2]
    for bad in (b'1\n', b'[]\n', b'nonsense\n', b'{"i": \n', b'\xff\xfe\n', b'[' * 10**5 + b'\n', b'"x"\n{"i": 3}\n', b'null\n'):
        path.write_bytes(b'{"i": 0}\n' + bad)
        assert 'line 2 is not a JSON object' in refused(path, read_lines)
    path.write_bytes(b'x' * 200_000)  # longer than what is looked at at once
    append_line(path, dict(i=0))
    assert path.read_bytes() == b'{"i": 0}\n'
    path.write_bytes(b'{"i": 0, "x": "' + b'y' * 200_000 + b'"}')  # whole, but for the end of its line
    append_line(path, dict(i=1))
    assert [line['i'] for line in read_lines(path)] == [0, 1]


# --- the lock

HOLDER = '''
import sys, time
from ssm_metarl.files import folder_lock
with folder_lock(sys.argv[1]):
    print('locked', flush=True)
    sys.stdin.readline()
'''


def test_two_locks(tmp_path):
    folder = tmp_path / 'run'
    with folder_lock(folder):
        with pytest.raises(OSError, match='another training writes into .*run; .*--ckpt-dir') as info:
            with folder_lock(folder): pytest.fail('both got it')
        assert '\n' not in str(info.value)
        with folder_lock(tmp_path / 'other'): pass
        with pytest.raises(OSError, match='another training'):  # the refusal took nothing away
            with folder_lock(folder): pass
    assert os.listdir(folder) == []
    with pytest.raises(KeyError):
        with folder_lock(folder): raise KeyError
    with folder_lock(folder): pass
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='not a folder'):
        with folder_lock(tmp_path / 'file'): pass


def test_a_lock_ends_with_its_process(tmp_path):
    process = program(HOLDER, tmp_path, stdin=subprocess.PIPE)
    try:
        assert process.stdout.readline() == 'locked\n'
        with pytest.raises(OSError, match='another training'):
            with folder_lock(tmp_path): pass
    finally: process.kill(), process.wait()
    assert os.listdir(tmp_path) == ['.lock']  # a crash leaves the file, but not the lock
    with folder_lock(tmp_path): pass
    assert os.listdir(tmp_path) == []


@posix
def test_a_lock_on_a_file_that_was_deleted_meanwhile(tmp_path, monkeypatch):
    "The holder before deleted the file between our open and our lock: such a lock, on a file that nobody else can see, does not count."
    import fcntl
    flock, deleted = fcntl.flock, []
    def late(file, how):
        if not deleted and how & fcntl.LOCK_EX: deleted.append(os.unlink(tmp_path / '.lock'))
        flock(file, how)
    monkeypatch.setattr(fcntl, 'flock', late)
    with suppress(OSError), folder_lock(tmp_path):  # refused at once, or taken anew on a file that others see
        assert os.listdir(tmp_path) == ['.lock']
        with pytest.raises(OSError, match='another training'):
            with folder_lock(tmp_path): pytest.fail('both got it')
    assert len(deleted) == 1
    with folder_lock(tmp_path): assert os.listdir(tmp_path) == ['.lock']
    assert os.listdir(tmp_path) == []
