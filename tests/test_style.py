"The look of the course outside of a notebook, and what is stored inside of one."
import base64
import io
import os
import subprocess
import sys

import IPython
import matplotlib as mpl
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from ssm_metarl import style


@pytest.fixture(autouse=True)
def kept():
    with mpl.rc_context(): yield
    plt.close('all')


def test_in_a_script_only_the_settings_change():
    style.use_style()
    assert mpl.rcParams['axes.prop_cycle'].by_key()['color'] == list(style.SERIES)
    assert plt.subplots()[0].get_size_inches().tolist() == list(style.SIZE)


def test_a_figure_has_twice_the_pixels_that_it_is_shown_with_and_its_own_colours():
    ax = Figure((6, 3), layout='constrained').subplots()
    for i, colour in enumerate(style.COLOURS.values()): ax.axhline(i, color=colour, lw=9)
    data, shown = style._picture(ax.figure)
    picture = Image.open(io.BytesIO(data))
    assert picture.mode == 'P' and all(abs(2 * shown[side] - getattr(picture, side)) <= 1 for side in ('width', 'height'))
    assert abs(shown['width'] - 6 * 96) <= 6 and abs(shown['height'] - 3 * 96) <= 6
    colours = {colour for _, colour in picture.convert('RGB').getcolors()}
    for colour in style.COLOURS.values():
        wanted = [round(255 * x) for x in mpl.colors.to_rgb(colour)]
        assert min(max(abs(a - b) for a, b in zip(wanted, found)) for found in colours) <= 2


def test_a_notebook_shows_figures_so(monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr(IPython, 'get_ipython', lambda: shell)
    style.use_style()
    data, metadata = shell.display_formatter.format(plt.subplots()[0])
    picture = Image.open(io.BytesIO(base64.b64decode(data['image/png']) if isinstance(data['image/png'], str) else data['image/png']))
    assert picture.mode == 'P' and picture.width >= 2 * metadata['image/png']['width'] > 900


def test_a_script_needs_no_ipython():
    script = 'import sys; sys.modules["IPython"] = None; from ssm_metarl.style import use_style; use_style(); import matplotlib; print(matplotlib.rcParams["figure.dpi"])'
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=os.environ | dict(MPLBACKEND='agg'))
    assert done.stdout.strip() == '96.0', done.stderr


def test_a_legend_stands_between_title_and_panel():
    ax = style.draw_on(None)
    ax.plot([0, 1], label='line')
    style.legend_above(ax)
    style.dress(ax, 'noun', 'x (m)', 'y (m)')
    ax.figure.canvas.draw()
    title, legend, panel = ax._left_title.get_window_extent(), ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert title.y0 >= legend.y1 - 1 and legend.y0 >= panel.y1 - 1


@pytest.mark.parametrize('cells, right', [(['1', '−2.5'], True), (['1', ''], True), (['**3**', '4 [3, 5]'], True), (['', ''], False), (['1', 'x'], False), (['.5', '+1'], True)])
def test_columns_of_numbers_stand_on_the_right(cells, right):
    rule = style.markdown_table(['head'], [[cell] for cell in cells]).splitlines()[1]
    assert rule == ('| --: |' if right else '| --- |')
