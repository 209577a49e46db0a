"""The final notebook in a real browser: JupyterLab, Run All, then a hand that drags, slides and presses. Skipped where there is no Chromium.

SSM_METARL_SHOTS=FOLDER keeps screenshots, which people should look at. SSM_METARL_FULL=1 tries the full size, with what nbs/checkpoints holds (for times; run the notebook first).
"""
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
DRIVER = shutil.which('chromedriver')
FLAGS = ('--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync '
         '--window-size=1400,1500').split()
SETTINGS = {'apputils-extension/notification': '{"fetchNews": "false", "checkForUpdates": false}', 'docmanager-extension/plugin': '{"autosave": false}'}

FULL = bool(os.environ.get('SSM_METARL_FULL'))

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason='no chromium and chromedriver on the PATH: the final notebook is not tried in a browser')


def until(ready, what, seconds=120):
    "Wait for something, and give what it returned."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := ready(): return found
        time.sleep(.05)
    raise AssertionError(f'{what}: not within {seconds} s')


@pytest.fixture(scope='module')
def lab():
    "Address of a JupyterLab with copies of what the notebook needs, at the small size."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        shutil.copy(ROOT / 'nbs/09_train_eval_adapt.ipynb', home)
        kept = ROOT / 'nbs/checkpoints'  # of earlier runs; a fresh clone has none
        for name in ('trained', 'images', *(['checkpoints'] if FULL and kept.exists() else [])): shutil.copytree(ROOT / 'nbs' / name, home / name)
        for name, text in SETTINGS.items():
            path = home / 'settings/@jupyterlab' / f'{name}.jupyterlab-settings'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        env = os.environ | ({} if FULL else dict(IN_TEST='1')) | dict(OMP_NUM_THREADS='1', JUPYTERLAB_SETTINGS_DIR=str(home / 'settings'), JUPYTERLAB_WORKSPACES_DIR=str(home / 'workspaces'),
                                PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])))
        env.pop('MPLBACKEND', None)
        with open(home / 'lab.log', 'w') as log:
            server = subprocess.Popen([sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--allow-root', f'--ServerApp.port={port}', '--ServerApp.ip=127.0.0.1',
                                       '--IdentityProvider.token=', f'--ServerApp.root_dir={home}', '--LabApp.expose_app_in_browser=True'], cwd=home, env=env, stdout=log, stderr=log)
        try:
            address = f'http://127.0.0.1:{port}'
            def answers():
                assert server.poll() is None, (home / 'lab.log').read_text()[-2000:]
                try: return urllib.request.urlopen(f'{address}/api/status', timeout=5)
                except OSError: return None
            until(answers, 'JupyterLab answers')
            yield address
        finally:
            server.terminate()
            server.wait(30)


class Hand:
    "What a reader does, in a browser."

    def __init__(self, driver, shots):
        self.driver, self.shots, self.count = driver, shots, 0
        if shots: Path(shots).mkdir(parents=True, exist_ok=True)

    def js(self, script, *args): return self.driver.execute_script(f'const panel = window.jupyterapp && [...jupyterapp.shell.widgets("main")][0]; {script}', *args)
    def find(self, css): return self.driver.find_elements('css selector', css)

    def shot(self, name):
        if self.shots:
            self.count += 1
            self.driver.save_screenshot(str(Path(self.shots) / f'{self.count}_{name}.png'))

    def run_all(self):
        self.js('jupyterapp.shell.activateById(panel.id)')
        return self.driver.execute_async_script('const done = arguments[0]; jupyterapp.commands.execute("notebook:run-all-cells").then(() => done(true), e => done(String(e)))')

    def errors(self):
        "Errors among the outputs, and text of widgets that could not be shown."
        return self.js('''return [...panel.content.model.cells].flatMap(cell => cell.type !== 'code' ? [] :
            Array.from({length: cell.outputs.length}, (_, i) => cell.outputs.get(i)).filter(o => o.type === 'error').map(o => cell.sharedModel.source.slice(0, 80)))
            .concat(document.body.innerText.match(/Error displaying widget.*/g) || [])''')

    def go_to(self, source, css):
        "Scroll to the cell that begins with some source (the notebook keeps only what is near the window), and give its elements."
        index = self.js('return [...panel.content.model.cells].findIndex(cell => cell.type === "code" && cell.sharedModel.source.includes(arguments[0]))', source)
        assert index >= 0, f'no cell contains {source!r}'
        def there():
            self.js('panel.content.scrollToItem(arguments[0], "start")', index)
            return self.js('return [...document.querySelectorAll(".jp-Cell")].filter(c => +c.dataset.windowedListIndex === arguments[0]).flatMap(c => [...c.querySelectorAll(arguments[1])])', index, css)
        return until(there, f'{css} of the cell with {source!r}', 30)

    def data(self, canvas): return self.js('return {...arguments[0].dataset}', canvas)


@pytest.fixture(scope='module')
def hand(lab):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f'--user-data-dir={profile}'): options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            driver.set_script_timeout(300)
            hand = Hand(driver, os.environ.get('SSM_METARL_SHOTS'))
            driver.get(f'{lab}/lab/tree/09_train_eval_adapt.ipynb')
            until(lambda: hand.js('return panel?.sessionContext?.session?.kernel?.status === "idle"'), 'a notebook with a kernel')
            assert hand.run_all() is True
            yield hand
        finally: driver.quit()


def all_widgets_show(hand):
    assert hand.errors() == []
    for source, css in (('player = goal_player', '.goal-canvas'), ('knobs(player)', '.jupyter-widgets'), ('bandit_player = ', '.jupyter-widgets img'), ('BeatThePolicy(', '.jupyter-widgets button'), ('panel = ', '.jupyter-widgets button')):
        assert hand.go_to(source, css)
    assert hand.errors() == []


def watched(hand, canvas):
    "Let the page note when what the canvas shows changes, in milliseconds."
    hand.js('''const c = arguments[0]; window.seen = []; window.watcher?.disconnect();
        window.watcher = new MutationObserver(() => window.seen.push({...c.dataset, at: performance.now()}));
        window.watcher.observe(c, {attributes: true});
        for (const kind of ['pointerup', 'click']) document.addEventListener(kind, () => window.began = performance.now(), true)''', canvas)


def delay(hand, condition):
    "Seconds from the last release of the mouse to the first change of the canvas that fulfils a condition in JavaScript."
    return hand.js(f'const found = window.seen.find(s => s.at >= window.began && ({condition})); return found && (found.at - window.began) / 1000')


def the_goal_is_dragged(hand):
    from selenium.webdriver.common.action_chains import ActionChains
    canvas = hand.go_to('player = goal_player', '.goal-canvas')[0]
    hand.shot('canvas')
    known = int(hand.js('return jupyterapp && arguments[0].querySelector("input[type=range]").max', canvas))
    star = hand.go_to('player = goal_player', '.map')[0]
    watched(hand, canvas)
    before = hand.data(canvas)
    assert before['source'] == 'grid'
    picture = 'return arguments[0].toDataURL()'
    drawn = hand.js(picture, star)
    ActionChains(hand.driver, duration=60).move_to_element_with_offset(star, 60, 60).click_and_hold().move_by_offset(-100, -90).move_by_offset(-30, 20).perform()
    dragged = until(lambda: (d := hand.data(canvas))['goal'] != before['goal'] and d, 'the star follows the mouse', 10)
    assert dragged['source'] == 'grid' and 'nearest' in dragged['text']
    assert hand.js(picture, star) != drawn
    hand.shot('dragged')
    ActionChains(hand.driver).release().perform()
    until(lambda: (d := hand.data(canvas))['source'] == 'live' and int(d['known']) == known and d, 'an adaptation to the new goal', 60)
    hand.shot('adapted')
    assert hand.data(canvas)['text'] == 'adapted to this goal'
    said, step = (delay(hand, condition) for condition in ('s.text.startsWith("adapting")', 's.source === "live" && +s.known >= 1'))
    print(f'\na new goal: it says that it adapts after {said:.2f} s, and shows the first step after {step:.2f} s')
    assert step < 20


def the_slider_asks_nobody(hand):
    canvas = hand.go_to('player = goal_player', '.goal-canvas')[0]
    until(lambda: hand.data(canvas)['source'] == 'live', 'a live result', 60)
    watched(hand, canvas)
    pause, minus, plus = hand.go_to('player = goal_player', '.goal-canvas button')
    first = hand.data(canvas)['step']
    (plus if first == '0' else minus).click()
    until(lambda: hand.data(canvas)['step'] != first, 'another step', 10)
    took = delay(hand, f's.step !== "{first}"')
    print(f'\nanother number of steps is shown after {took:.3f} s')
    assert took < 5
    pause.click()
    assert pause.text == 'Play'


def a_knob_adapts_anew(hand):
    box = hand.go_to('knobs(player)', 'input[type=checkbox]')[0]
    box.click()
    canvas = hand.go_to('knobs(player)', '.goal-canvas')[0]  # the same canvas, once more
    until(lambda: (d := hand.data(canvas))['source'] == 'live' and d['text'] == 'adapted to this goal', 'an adaptation without rollback', 60)
    hand.shot('knobs')
    hand.go_to('knobs(player)', 'input[type=checkbox]')[0].click()


def a_path_belongs_to_the_goal_beside_it(hand):
    "A knob is turned and the goal is dragged while the kernel is busy: both questions arrive at once, and no answer to the first one may be shown for the second."
    from selenium.webdriver.common.action_chains import ActionChains
    canvas = hand.go_to('knobs(player)', '.goal-canvas')[0]
    watched(hand, canvas)
    hand.js('panel.sessionContext.session.kernel.requestExecute({code: "import time; time.sleep(2)"})')
    hand.go_to('knobs(player)', 'input[type=checkbox]')[0].click()
    star = hand.go_to('knobs(player)', '.map')[0]
    ActionChains(hand.driver, duration=50).move_to_element_with_offset(star, 100, 60).click_and_hold().move_by_offset(-60, 50).release().perform()
    until(lambda: (d := hand.data(canvas))['source'] == 'live' and d['text'] == 'adapted to this goal', 'an adaptation', 60)
    near = '(s => { const [a, b] = [s.of, s.goal].map(t => t.split(",").map(Number)); return Math.hypot(a[0] - b[0], a[1] - b[1]) < .002; })(s)'
    assert hand.js('return window.seen.filter(s => s.source === "live").length') > 0
    assert hand.js(f'return window.seen.filter(s => s.source === "live" && !{near})') == []
    hand.go_to('knobs(player)', 'input[type=checkbox]')[0].click()


def a_button_sets_the_knobs_and_the_axis_holds_bad_returns(hand):
    def press(text):
        canvas = hand.go_to('knobs(player)', '.goal-canvas')[0]
        watched(hand, canvas)
        next(b for b in hand.go_to('knobs(player)', 'button.jupyter-button') if b.text == text).click()
        until(lambda: hand.js('return window.seen.some(s => s.text.startsWith("adapting"))') and (d := hand.data(canvas))['source'] == 'live' and d['text'] == 'adapted to this goal', text, 60)
        return hand.data(canvas)
    found = press('Too big a step')
    hand.shot('too_big_a_step')
    assert not hand.go_to('knobs(player)', 'input[type=checkbox]')[0].is_selected()
    assert float(found['floor']) <= min(map(float, found['returns'].split(',')))
    press('Reset')
    assert hand.go_to('knobs(player)', 'input[type=checkbox]')[0].is_selected()


def the_memory_is_cut(hand):
    image = hand.go_to('bandit_player = ', 'img')[0]
    old = image.get_attribute('src')
    hand.shot('bandit')
    hand.go_to('bandit_player = ', 'input[type=checkbox]')[0].click()
    until(lambda: image.get_attribute('src') != old and 'ssm-old' not in image.get_attribute('class'), 'another game', 30)
    hand.shot('bandit_cut')


def a_reader_plays_against_the_policy(hand):
    def arm(): return hand.go_to('BeatThePolicy(', 'button')[0]
    def text(): return '\n'.join(x.text for x in hand.go_to('BeatThePolicy(', '.widget-html'))
    for _ in range(30): arm().click()
    until(lambda: 'the policy' in text() and 'Gittins' in text(), 'what the others win', 30)
    hand.shot('beaten')


def a_training_is_watched_and_stopped(hand):
    def button(name): return next(b for b in hand.go_to('panel = ', 'button') if b.text == name)
    def text(): return '\n'.join(x.text for x in hand.go_to('panel = ', '.widget-html'))
    assert not button('Stop').is_enabled() and not button('Evaluate').is_enabled()
    hand.js('arguments[0].click(); arguments[0].click()', button('Train'))  # the second click arrives before the button is switched off
    until(lambda: 'training: step' in text(), 'a training that is under way', 60)
    curve = until(lambda: [x for x in hand.go_to('panel = ', 'img') if x.get_attribute('src')], 'a curve', 30)[0]
    old = curve.get_attribute('src')
    until(lambda: curve.get_attribute('src') != old, 'a curve that grows', 30)
    assert not button('Train').is_enabled()
    hand.shot('training')
    button('Stop').click()
    until(lambda: 'Stopped after' in text(), 'an end', 60)
    hand.shot('stopped')
    assert button('Train').is_enabled() and button('Evaluate').is_enabled() and not button('Stop').is_enabled()
    button('Evaluate').click()
    until(lambda: 'knows the task' in text(), 'an evaluation', 60)
    hand.shot('evaluated')
    assert hand.errors() == []


def a_narrow_window_holds_all_buttons(hand):
    size = hand.driver.get_window_size()
    hand.driver.set_window_size(700, 1200)
    for source in ('knobs(player)', 'panel = '):
        texts = hand.js('return arguments[0].map(b => [b.textContent, b.scrollWidth <= b.clientWidth + 1])', hand.go_to(source, 'button.jupyter-button'))
        assert len(texts) >= 4 and all(whole for _, whole in texts), texts
        hand.shot('narrow')
    hand.driver.set_window_size(size['width'], size['height'])


def widgets_say_when_their_kernel_is_gone(hand):
    gone = 'The kernel was restarted: run this cell again.'
    def lines(): return [x.text for x in hand.go_to('panel = ', '.ssm-gone')]
    assert lines() == ['']
    hand.driver.execute_async_script('const done = arguments[0], panel = [...jupyterapp.shell.widgets("main")][0]; panel.sessionContext.session.kernel.restart().then(() => done(true), e => done(String(e)))')
    until(lambda: lines() == [gone], 'a note on the panel', 20)
    hand.shot('kernel_gone')
    canvas = hand.go_to('player = goal_player', '.goal-canvas')[0]
    until(lambda: hand.data(canvas)['text'] == gone, 'a note on the canvas', 20)


def test_the_final_notebook_in_a_browser(hand):  # one test: the steps build on each other, and starting a browser for each would take minutes
    for step in (all_widgets_show, the_goal_is_dragged, the_slider_asks_nobody, a_knob_adapts_anew, a_path_belongs_to_the_goal_beside_it,
                 a_button_sets_the_knobs_and_the_axis_holds_bad_returns, the_memory_is_cut, a_reader_plays_against_the_policy, a_training_is_watched_and_stopped, a_narrow_window_holds_all_buttons,
                 widgets_say_when_their_kernel_is_gone): step(hand)
