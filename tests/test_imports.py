"What an import brings along: libraries that draw, and large parts of others, come when they are used."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in (ROOT / 'ssm_metarl').glob('*.py') if path.stem not in ('__init__', '__main__', '_modidx'))
LATER = 'matplotlib', 'scipy.stats', 'scipy.special', 'PIL.Image', 'tyro', 'torch._dynamo', 'torch._inductor', 'IPython', 'tensorboard'


def fresh(script, *words):
    "What a new process prints."
    done = subprocess.run([sys.executable, '-c', script, *words], cwd=ROOT, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope='module')
def brought():
    "Module -> what of LATER it brings, itself or through others; all in one process, from the cheapest on, so that what one brings hides nothing in those before it."
    return fresh(f'''
import importlib, json, sys
brought = dict()
for module in sys.argv[1:]:
    importlib.import_module(f'ssm_metarl.{{module}}')
    brought[module] = [name for name in {LATER} if name in sys.modules]
print(json.dumps(brought))''', *sorted(MODULES))


@pytest.mark.parametrize('module', MODULES)
def test_a_module_does_not_bring_what_it_may_never_need(module, brought): assert brought[module] == []


def test_the_package_alone_imports_no_torch():
    assert fresh("import json, sys, ssm_metarl; print(json.dumps('torch' in sys.modules))") is False


def test_what_is_imported_late_is_there_when_it_is_used():
    script = '''
import json
import sys
import numpy as np
from ssm_metarl.drawing import Canvas
from ssm_metarl.evaluation import bootstrap_interval
from ssm_metarl.plots import plot_returns_by_step
low, high = bootstrap_interval(np.arange(10.))
bounds = low < 4.5 < high
drawn = 'matplotlib.pyplot' in sys.modules
picture = Canvas(4, 3, 1.).image.size
ax = plot_returns_by_step(np.zeros((3, 1)))
print(json.dumps([bool(bounds), drawn, picture, ax.get_xlabel()]))'''
    assert fresh(script) == [True, False, [12, 9], 'gradient steps']
