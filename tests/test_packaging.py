"What is built from this repository can be installed and used: the source distribution, the wheel, and the tools for bounds and notebooks."
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / 'ssm_metarl'
pytestmark = pytest.mark.skipif(not (ROOT / 'setup.py').exists(), reason='not in a clone')


def run(*command, cwd, **env):
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'IN_TEST')} | env
    done = subprocess.run([str(x) for x in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def tool(name):
    "A module of tools/, which is no package."
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A source distribution, and the wheel that is built from it, without a network; the repository itself is left alone."
    folder = tmp_path_factory.mktemp('built')
    leave = shutil.ignore_patterns('.*', '_*[!_].*', 'nbs', 'build', 'dist', 'checkpoints', '*.egg-info', '__pycache__', 'benchmarks', 'tests')
    shutil.copytree(ROOT, folder / 'clone', ignore=lambda path, names: leave(path, names) if Path(path) == ROOT else {'__pycache__'} & set(names))
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder / 'dist', cwd=folder / 'clone')
    (sdist,), (wheel,) = ((folder / 'dist').glob(pattern) for pattern in ('*.tar.gz', '*.whl'))
    return sdist, wheel


def files_of(library): return {f'ssm_metarl/{path.name}' for path in library.iterdir() if path.suffix == '.py'} | {'ssm_metarl/py.typed'}


def test_both_distributions_hold_what_they_need(built):
    with tarfile.open(built[0]) as file: inside = {name.partition('/')[2] for name in file.getnames()}
    assert inside >= files_of(LIBRARY) | {'setup.py', 'settings.ini', 'README.md', 'LICENSE'}
    with zipfile.ZipFile(built[1]) as file: inside = set(file.namelist())
    assert inside >= files_of(LIBRARY)
    assert not [name for name in inside if not name.startswith(('ssm_metarl/', 'ssm_metarl-'))]


@pytest.mark.parametrize('kind', ['sdist', 'wheel'])
def test_what_was_built_is_installed_and_runs(kind, built, tmp_path):
    source, target = built[kind == 'wheel'], tmp_path / 'target'
    run(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--no-build-isolation', '--target', target, source, cwd=tmp_path)
    where = run(sys.executable, '-c', 'import ssm_metarl.ssm as m; print(m.__file__)', cwd=tmp_path, PYTHONPATH=str(target))
    assert Path(where.strip()) == target / 'ssm_metarl' / 'ssm.py'
    said = run(sys.executable, '-m', 'ssm_metarl', '--help', cwd=tmp_path, PYTHONPATH=str(target))
    assert 'train' in said and 'adapt' in said


def settings():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def test_every_requirement_has_a_lower_bound_and_torch_no_upper_one():
    requirements = settings()['requirements'].split()
    assert all('>=' in requirement for requirement in requirements)
    assert not [requirement for requirement in requirements if '<' in requirement]


def test_lowest_means_the_lower_bounds():
    pinned = dict(line.split('==') for line in tool('start').lowest())
    bounds = dict(requirement.split('>=') for requirement in settings()['requirements'].split())
    assert pinned == bounds and {'torch', 'numpy', 'scipy', 'tyro', 'pillow'} <= pinned.keys()


def test_the_workflow_runs_both_ends():
    text = (ROOT / '.github/workflows/test.yaml').read_text()
    assert '--lowest' in text and '--newest' in text


# --- tools/twice.py

def notebook(folder, *sources):
    cells = [dict(cell_type='code', source=source, metadata={}, outputs=[], execution_count=None, id=f'{i:08}') for i, source in enumerate(sources)]
    path = folder / 'a.ipynb'
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


@pytest.mark.parametrize('sources, when', [
    (('x = 1', 'assert x == 1'), None),
    (('x = 1', 'x += 1\nassert x == 2'), 'code cell 1, run twice'),
    (("assert 'late' not in globals()", 'late = 1'), 'code cell 0, Run All again'),
    (('1 / 0', 'x = 1'), 'code cell 0, at first'),
    (('#| eval: false\n1 / 0', '#| slow\n1 / 0', 'x = 1'), None),
    (("import os\nassert 'IN_TEST' in os.environ",), None)])
def test_a_cell_that_fails_the_second_time_is_found(sources, when, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / 'tools/twice.py'), str(notebook(tmp_path, *sources))], capture_output=True, text=True)
    assert done.returncode == (when is not None), done.stderr
    assert when is None or when in done.stdout
    if when: assert len(re.findall(r'code cell', done.stdout)) <= 3


def test_long_cells_in_full_if_wanted(tmp_path):
    path = notebook(tmp_path, "import os\nassert 'IN_TEST' not in os.environ")
    assert subprocess.run([sys.executable, str(ROOT / 'tools/twice.py'), '--full', str(path)], env=os.environ | {'IN_TEST': '1'}).returncode == 0
    assert subprocess.run([sys.executable, str(ROOT / 'tools/twice.py'), str(path)], capture_output=True).returncode == 1
