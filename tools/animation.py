"""Draw the animation at the top of the README: walks before and after adaptation, on three goals that the policy has never seen.

    python main.py train --config basic --outer-steps 100 --tasks-per-batch 8 --seed 0 --ckpt-dir D
    python tools/animation.py D/latest.npz

Writes nbs/images/adaptation.gif. These are the policy and the goals of the first row of benchmarks/results/basic.json."""
import sys

import matplotlib
import numpy as np

matplotlib.use('agg')
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.animation import FuncAnimation, PillowWriter  # noqa: E402

from ssm_metarl.pipeline import evaluate_with_adaptation  # noqa: E402
from ssm_metarl.style import COLOURS  # noqa: E402

TARGET, EVERY, REST = 'nbs/images/adaptation.gif', 4, 12  # steps of a walk for each frame; frames at the end that stand still


def panel(ax, task, half):
    "One goal in the plane, and the lines and dots that will move: [(line, dot)] for before and after."
    ax.plot(*task['goal'], '*', color=COLOURS['goal'], mec='white', ms=14, zorder=3)
    ax.plot(0, 0, 'o', mfc='white', mec=COLOURS['ink'], ms=5, zorder=3)
    ax.set(xlim=(-half, half), ylim=(-half, half), aspect='equal', xticks=[-.5, 0, .5], yticks=[-.5, 0, .5])
    ax.spines[:].set_color('#cccccc')
    ax.tick_params(color='#cccccc', labelcolor=COLOURS['ink'], labelsize=8)
    return [(ax.plot([], [], color=COLOURS[name], lw=1, alpha=.8)[0], ax.plot([], [], 'o', color=COLOURS[name], ms=7, mec='white', zorder=4)[0]) for name in ('before', 'after')]


def animate(result, count=3):
    "The first walk on each of the first goals, a frame for every few steps."
    walks = [[np.asarray(walks.obs[m, 0][walks.mask[m, 0]]) for walks in (result.before, result.after)] for m in range(count)]  # [goal][before, after] -> [T, 2]
    half = 1.05 * max(np.abs(walk).max() for pair in walks for walk in pair)
    figure, axes = plt.subplots(1, count, figsize=(6, 2.5), layout='constrained', sharey=True)
    moving = [panel(ax, task, half) for ax, task in zip(axes, result.tasks)]
    for ax, m in zip(axes, range(count)): ax.set_title(f'return {result.before.returns[m].mean():.0f} → {result.after.returns[m].mean():.0f}'.replace('-', '−'), fontsize=10, color=COLOURS['ink'])
    figure.legend(moving[0][0][:1] + moving[0][1][:1], ['before adaptation', 'after five gradient steps'], loc='outside lower center', ncols=2, frameon=False, fontsize=9, labelcolor=COLOURS['ink'])
    length = max(len(walk) for pair in walks for walk in pair)

    def draw(i):
        for pair, parts in zip(walks, moving):
            for walk, (line, dot) in zip(pair, parts):
                seen = walk[:i * EVERY + 1]
                line.set_data(*seen.T)
                dot.set_data(*seen[-1:].T)
    return FuncAnimation(figure, draw, frames=length // EVERY + REST, interval=60)


if __name__ == '__main__':
    result = evaluate_with_adaptation(sys.argv[1], episodes=50, steps=5)
    animate(result).save(TARGET, writer=PillowWriter(fps=16), dpi=144)
    print(f'{TARGET}: return {result.summary()["pre_return"]:.1f} before, {result.summary()["post_return"]:.1f} after')
