"Figures outside of a notebook: on figures that pyplot does not know, in files, and from results in the repository."
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.plots import (Animation, LinePanel, PathPanel, Stage, StatePanel, animate, memory_states, paths_of, plot_experiment, plot_runs, plot_seeds,
                              plot_state, plot_training, results_table, running_mean)
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.rollout import collect
from ssm_metarl.style import COLOURS, REFERENCES, SERIES, colour_map

RESULTS = Path(__file__).parent.parent / 'benchmarks' / 'results'
ENV = EnvConfig('MetaGymToy-v0', num_envs=2, time_limit=6)
TASKS = sample_tasks(ENV, 3)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def policy(**config): return SSMMetaPolicy(ENV.family.observation_space, ENV.family.action_space, PolicyConfig(8, 4, **config))


def played(policy, env=ENV, tasks=TASKS): return collect(policy, policy.get_params(), tasks, env)


def history(n, start=-20.): return [dict(step=i, pre_return=start, post_return=start + i) for i in range(n)]


# a figure of nobody's

def test_panels_play_on_a_figure_that_pyplot_does_not_know():
    figure = Figure((4, 2), dpi=100, layout='constrained')
    left, right = figure.subplots(1, 2)
    walk, curve = PathPanel(left), LinePanel(right, {'a': SERIES[0], 'b': SERIES[1]}, (0, 9), (-1, 1), 'x', 'y')
    stage, paths, frames = Stage(walk, curve), paths_of(played(policy()), 0), []
    for t in (1, 4):
        walk.show(dict(after=paths), TASKS[0]['goal'], until=t, title=f'step {t}')
        curve.show({'a': ([1, 2], [0, t / 5])})
        frames.append(stage.frame())
    assert frames[0].shape == (200, 400, 3) and frames[0].dtype == np.uint8
    assert (frames[0] != frames[1]).any() and not plt.get_fignums()
    assert [text.get_text() for text in right.get_legend().get_texts()] == ['a', 'b']
    assert (np.array(Image.open(io.BytesIO(stage.png()))) == frames[1]).all()


def test_a_frame_is_what_a_saved_figure_shows():
    "What is drawn piece by piece looks like the whole, but for what lies on the edges of the panel."
    figure = Figure((2, 2), dpi=100, layout='constrained')
    panel = LinePanel(figure.subplots(), {'a': COLOURS['after']}, (0, 4), (0, 4), 'x', 'y', marker='o')
    panel.show({'a': ([1, 2, 3], [1, 3, 2])}, 'Title')
    frame, file = Stage(panel).frame(), io.BytesIO()
    figure.savefig(file, format='png')
    assert (np.array(Image.open(file).convert('RGB')) == frame).all()


def test_a_training_is_drawn_on_given_axes_alone():
    ax = Figure().subplots()
    assert plot_training(history(5), dict(nothing=[-19.]), ax=ax) is ax and not plt.get_fignums()
    assert ax.lines[-1].get_linestyle() == REFERENCES['nothing'] and ax.lines[-1].get_color() == COLOURS['reference']


# curves

def test_seeds_of_different_length_are_cut_to_the_shortest():
    ax = plot_seeds([history(8), history(5, -10.)], window=2)
    assert len(ax.lines[-1].get_xdata()) == 5
    first, second = (running_mean([h['post_return'] for h in h_], 2)[:5] for h_ in (history(8), history(5, -10.)))
    assert np.allclose(ax.lines[-1].get_ydata(), (first + second) / 2)


def test_many_runs_differ_in_colour_or_style():
    figure = plot_runs({str(i): history(4) for i in range(7)})
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 7


# the memory

@pytest.mark.parametrize('core', ['ssm', 'stack', 'gru', 'h3', 'none'])
def test_the_last_state_is_that_of_the_policy(core):
    net = policy(core=core)
    traj = played(net)
    expected = net.functional(net.get_params(), traj.obs, reset=traj.memory_reset)['state']
    state = memory_states(net, net.get_params(), traj)
    assert np.allclose(state[:, :, -1], expected.flatten(2).detach().numpy(), atol=1e-5)


def test_stacked_parameters_and_history():
    net = policy(history=True)
    traj = played(net, replace(ENV, episodes_per_trial=2))
    one, params = net.get_params(), {k: torch.stack([v] * 3) for k, v in net.get_params().items()}
    assert np.allclose(memory_states(net, params, traj), memory_states(net, one, traj), atol=1e-6, equal_nan=True)
    path, panel = plot_state(net, params, traj, TASKS, m=2)
    assert isinstance(panel, StatePanel) and panel.ax.figure is path.ax.figure


def test_a_state_of_zeros_is_white():
    panel = StatePanel(Figure().subplots(), 3, 2, np.zeros(2))
    panel.show(np.zeros((3, 2)), until=1)
    shown = panel.image.get_array()
    assert (shown[:, :2] == 0).all() and np.isnan(np.array(shown[:, 2], float)).all()
    assert colour_map(signed=True)(.5)[:3] == pytest.approx((1, 1, 1), abs=.02)


# files

@pytest.mark.parametrize('kind', ['gif', 'png'])
def test_films_can_be_read_again(kind, tmp_path):
    panel = LinePanel(Figure((1, 1), dpi=50).subplots(), {'a': SERIES[0]}, (0, 4), (0, 4), '', '')
    film = animate(Stage(panel), lambda t: panel.show({'a': ([1, 3], [1, t])}), range(3), fps=10)
    film.save(tmp_path / f'film.{kind}')
    with Image.open(tmp_path / f'film.{kind}') as read:
        still = kind == 'png'  # one more for those who know no animation: it is not played
        assert read.n_frames == 3 + still and read.info['loop'] == 0
        if still: assert (np.array(read.convert('RGB')) == np.array(film.images[-1].convert('RGB'))).all()
        read.seek(still)
        assert read.info['duration'] == 100 and (np.array(read.convert('RGB')) == np.array(film.images[0].convert('RGB'))).all()
    assert film._repr_png_()[0][:8] == b'\x89PNG\r\n\x1a\n'


def test_paper_stays_white():
    frame = np.full((8, 8, 3), 255, np.uint8)
    frame[2] = 200
    assert np.array(Animation([frame, frame]).images[0].convert('RGB'))[0].min() == 255


# results of the repository

@pytest.mark.parametrize('name', ['nav2d', 'nav2d-relatives', 'nav2d-rotated'])
def test_results_of_the_repository_are_drawn_and_tabulated(name):
    results = json.loads((RESULTS / f'{name}.json').read_text())
    ax, lines = plot_experiment(results), results_table(results).splitlines()
    labels = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert labels[:len(results['table'])] == [row['variant'] for row in results['table']]
    first = results['table'][0]
    assert f'{first["iqm"][-1]:.2f}'.replace('-', '−') in lines[2] and f'{len(first["seeds"])} × {first["tasks"]}' in lines[2]
    assert len({line.count('|') for line in lines}) == 1
