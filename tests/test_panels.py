"Buttons that are pressed at the wrong moment, and panels whose cell is run again. No process is started here; notebook 07b and test_browser.py do."
import time

import numpy as np
import pytest

pytest.importorskip('ipywidgets')

from ssm_metarl import panels
from ssm_metarl.panels import ControlPanel, Job, LiveCurve, ReadOut


class Command:
    "As a `CommandLine`, but ends when it is told to."
    made = []

    def __init__(self, *words):
        self.words, self.runs, self.stopped, self.seconds, self.asked, self.found = words, True, False, 0., 0, {}
        self.made.append(self)

    def stop(self): self.stopped, self.runs = True, False

    def result(self):
        self.asked += 1
        if isinstance(self.found, Exception): raise self.found
        return self.found


@pytest.fixture
def panel(tmp_path, monkeypatch):
    monkeypatch.setattr(panels, 'CommandLine', Command)
    monkeypatch.setattr(Command, 'made', [])
    yield new_panel(tmp_path)
    for command in Command.made: command.runs = False


def new_panel(folder, steps=3): return ControlPanel({'other': Job('basic', 5), 'one': Job('basic', steps)}, folder)
def on(panel): return [name for name, button in panel.buttons.items() if not button.disabled]


def test_of_two_clicks_the_second_one_does_nothing(panel):
    panel.buttons['Train'].click()
    panel.buttons['Train'].click()
    panel.buttons['Evaluate'].click()
    assert len(Command.made) == 1 and on(panel) == ['Stop']


def test_stop_after_the_end_changes_nothing(panel):
    thread = panel.press('Train')
    Command.made[0].runs = False
    thread.join(10)
    said = panel.curve.note.value
    panel.press('Stop')
    assert panel.curve.note.value == said and on(panel) == ['Train'] and not Command.made[0].stopped


@pytest.mark.parametrize('error', [IndexError('list index out of range'), ValueError('no JSON'), RuntimeError('no such config')])
def test_after_any_error_the_buttons_live(panel, error):
    thread = panel.press('Train')
    Command.made[0].found, Command.made[0].runs = error, False
    thread.join(10)
    assert on(panel) == ['Train'] and panel.curve.note.value == f'It did not work: {error}'
    assert panel.press('Train') is not None  # and work


def test_a_new_panel_goes_on_with_the_command_of_the_old_one(panel, tmp_path):
    panel.choice.value = 'one'
    thread = panel.press('Train')
    again = new_panel(tmp_path)
    thread.join(10)
    assert not thread.is_alive() and Command.made[0].runs and Command.made[0].asked == 0
    assert (on(panel), on(again), again.choice.value) == ([], ['Stop'], 'one') and panel.choice.disabled
    assert again.press('Train') is None and len(Command.made) == 1
    panel.press('Stop')  # of the old panel, which has let go
    assert Command.made[0].runs
    again.press('Stop')
    assert Command.made[0].stopped


def test_a_new_panel_stops_what_it_cannot_follow(panel, tmp_path):
    panel.choice.value = 'one'
    panel.press('Train')
    again = new_panel(tmp_path, steps=4)  # another folder
    assert Command.made[0].stopped and on(again) == ['Train']


def test_without_a_kernel_a_panel_shows_its_state(panel):
    shown = panel._repr_mimebundle_()
    assert '<button disabled>Stop</button>' in shown['text/html'] and '0 of 5 outer steps are done' in shown['text/html']


def test_a_curve_can_be_shown_without_a_kernel(tmp_path):
    (tmp_path / 'train.jsonl').write_text('{"step": 0, "pre_return": -9.0, "post_return": -5.0, "wall_s": 1.0}\n')
    with LiveCurve(tmp_path, 2) as curve: assert curve.still() == '<p>begins …</p>'
    assert curve.still().startswith('<p>1 of 2 outer steps are done</p><img ') and 'data:image/png;base64,iVBOR' in curve.still()


def test_a_reader_plays_against_the_policy():
    from ssm_metarl.config import learn_in_memory
    from ssm_metarl.panels import BeatThePolicy
    from ssm_metarl.policy import SSMMetaPolicy
    config = learn_in_memory('MetaBandit-v0', {'arms': 2}, 5, 1)  # five pulls
    family = config.env.family
    policy = SSMMetaPolicy(family.observation_space, family.action_space, config.policy)
    match = BeatThePolicy(policy, policy.get_params(), config.env, game=1)
    hidden = f'{match.chance[0]:.2f}'
    for pull in range(5):
        assert hidden not in match.note.value and f'{5 - pull} pulls left' in match.note.value
        match.arms[pull % 2].click()
    match.arms[0].click()  # too late
    assert [arm for arm, _ in match.pulls] == [0, 1, 0, 1, 0] and hidden in match.note.value
    assert f'{sum(won for _, won in match.pulls)}.0</td>' in match.note.value
    low, high = 5 * match.chance.min(), 5 * match.chance.max()
    assert all(low <= wins <= high for wins in match.scores(50).values()) and len(match.scores(2)) == 3
    match.again.click()
    assert match.pulls == [] and match.game == 2 and f'{match.chance[0]:.2f}' != hidden


@pytest.fixture(scope='module')
def bandit():
    from ssm_metarl.config import learn_in_memory
    from ssm_metarl.policy import SSMMetaPolicy
    config = learn_in_memory('MetaBandit-v0', {'arms': 2}, 5, 1)
    policy = SSMMetaPolicy(config.env.family.observation_space, config.env.family.action_space, config.policy)
    states = panels.watch_memory(policy, policy.get_params(), [dict(chance=np.float32([.5, .5]))], config.env)[1]
    read = ReadOut(np.zeros((5, states.shape[-1] + 1, 2)), np.ones(states.shape[-1]))
    return policy, policy.get_params(), config.env, read


def test_equal_arms_have_no_better_one(bandit):
    player = panels.BanditPlayer(*bandit, game=7)
    def title(*chances): return player.picture(game=0, cut=False, arm_1=chances[0], arm_2=chances[1]).axes[0].get_title(loc='left')
    assert title(1., 1.) == '5 of 5 pulls paid (filled)' and title(0., 0.) == '0 of 5 pulls paid (filled)'
    assert 'better arm' in title(.2, .8) and player.controls['game'].value == 7


def test_a_walk_that_leaves_the_square_is_drawn_whole():
    from ssm_metarl.widgets import new_figure
    ax = new_figure().subplots()
    panels._draw_walk(ax, np.array([[0., 0.], [-4.7, 1.]]), [.3, .3])
    assert ax.get_xlim()[0] < -4.7 and ax.get_xlim()[1] < 6
    panels._draw_walk(ax, np.array([[0., 0.], [.1, .1]]), [.3, .3])
    assert ax.get_xlim() == (-.8, .8)


def test_a_read_out_worse_than_a_constant_says_so():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(50, 3, 2))
    read = ReadOut.fit(states, states[..., :1])
    assert read.explained(states, states[..., :1]).min() > .999 and read.explained(states, -states[..., :1]).max() < -2


def test_what_is_remembered_depends_on_the_function_that_makes_it(tmp_path):
    def one(): return 1
    def two(): return 2
    assert [panels.remembered(tmp_path / 'number', make, 'same') for make in (one, two, two, one)] == [1, 2, 2, 1]
