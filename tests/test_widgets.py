"What the notebooks on widgets and panels promise where a kernel, or a missing package, is needed."
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def kernel():
    manager = pytest.importorskip('jupyter_client').manager
    manager, client = manager.start_new_kernel(kernel_name='python3', cwd=str(ROOT))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_an_interrupted_training_is_one_line(kernel, tmp_path):
    manager, client = kernel
    client.execute(f'''
import time
from ssm_metarl.panels import LiveCurve
with LiveCurve({str(tmp_path)!r}, 10):
    print('it begins', flush=True)
    time.sleep(60)''')
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message['content'].get('text') == 'it begins\n': manager.interrupt_kernel()
        if message['msg_type'] == 'error': break
    assert message['content']['traceback'] == ['Stopped after 0 of 10 outer steps. Run this cell again to go on.']


def in_a_process(script):
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


SMALL = '''
import sys
sys.modules['anywidget'] = None  # as if it were not installed
import numpy as np
from ssm_metarl.envs import EnvConfig
from ssm_metarl.meta_learner import MetaConfig
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.policy_adaptation import adapt_policy
from ssm_metarl.policy_steps import AdaptConfig
from ssm_metarl.widgets import PathGrid, goal_player, grid_of_goals, knobs
env = EnvConfig(num_envs=2, time_limit=5)
policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(4, 4))
about = policy, policy.get_params(), env, MetaConfig(), AdaptConfig(steps=1)
grid = PathGrid.of(adapt_policy(*about[:2], grid_of_goals(2), *about[2:], keep_paths=True))
player = goal_player(*about, grid, steps=2)
knobs(player).children[2].value = 1.5
print(type(player).__name__, player.adapt.max_kl, player._repr_mimebundle_()['image/png'][1:4].decode())'''


def test_without_anywidget_there_are_sliders(): assert in_a_process(SMALL) == ['GoalSliders', '1.5', 'PNG']


def test_the_modules_can_be_imported_without_widgets():
    script = "import sys; sys.modules['ipywidgets'] = sys.modules['anywidget'] = None; import ssm_metarl.widgets, ssm_metarl.panels; print('fine')"
    assert in_a_process(script) == ['fine']
