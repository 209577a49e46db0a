"What the notebooks on widgets and panels promise where a kernel, or a missing package, is needed."
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ssm_metarl.style import COLOURS
from ssm_metarl.widgets import LatestOnly, draw_steps, mimebundle, new_figure

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
knobs(player).children[3].value = 1.5
print(type(player).__name__, player.adapt.max_kl, player._repr_mimebundle_()['image/png'][1:4].decode())'''


def test_without_anywidget_there_are_sliders(): assert in_a_process(SMALL) == ['GoalSliders', '1.5', 'PNG']


def test_the_modules_can_be_imported_without_widgets():
    script = "import sys; sys.modules['ipywidgets'] = sys.modules['anywidget'] = None; import ssm_metarl.widgets, ssm_metarl.panels; print('fine')"
    assert in_a_process(script) == ['fine']


def test_the_last_wish_is_done_and_an_error_reaches_its_receiver():
    came, errors, begun = [], [], threading.Event()
    def work(going_on, wish):
        begun.set()
        while wish == 'old': going_on(), time.sleep(.001)  # until it is outdated
        came.append(wish)
    job = LatestOnly(work)
    old = job.ask('old')
    assert begun.wait(10)
    job.ask('new').join(10)
    old.join(10)
    assert came == ['new'] and not old.is_alive()
    def fail(going_on): raise ValueError('no such goal')
    LatestOnly(fail, errors.append).ask().join(10)
    assert [str(error) for error in errors] == ['no such goal']


def test_a_widget_of_ipywidgets_7_is_shown_by_its_model():
    class Old:  # as in Colab
        model_id = 'abc'
        def __repr__(self): return 'a box'
    view = dict(version_major=2, version_minor=0, model_id='abc')
    assert mimebundle(Old()) == {'application/vnd.jupyter.widget-view+json': view, 'text/plain': 'a box'}


def test_a_widget_of_today_shows_itself():
    widgets = pytest.importorskip('ipywidgets')
    button = widgets.Button()
    assert mimebundle(button)['application/vnd.jupyter.widget-view+json']['model_id'] == button.model_id


def test_a_live_curve_becomes_plain_html_at_the_end(kernel, tmp_path):
    _, client = kernel
    (tmp_path / 'train.jsonl').write_text('{"step": 0, "pre_return": -9.0, "post_return": -5.0, "wall_s": 1.0}\n')
    client.execute(f'from ssm_metarl.panels import LiveCurve\nwith LiveCurve({str(tmp_path)!r}, 1): pass')
    first = last = None
    while last is None:
        message = client.get_iopub_msg(timeout=60)
        assert message['msg_type'] != 'error', message['content']
        if message['msg_type'] == 'display_data': first = message['content']
        if message['msg_type'] == 'update_display_data': last = message['content']
    assert 'application/vnd.jupyter.widget-view+json' in first['data'] and first['transient'] == last['transient']
    assert last['data']['text/html'].startswith('<p>1 of 1 outer steps are done</p><img ')


def test_a_step_that_was_taken_back_is_hollow():
    ax = draw_steps(new_figure().subplots(), [-9., -5., -5., -3.], [True, False, True])
    faces = {int(line.get_xdata()[0]): line.get_markerfacecolor() for line in ax.lines[1:]}
    assert faces == {0: COLOURS['before'], 1: COLOURS['after'], 2: 'white', 3: COLOURS['after']}
