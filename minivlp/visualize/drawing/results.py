"""Results: training curves over the steps, scores over the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from minivlp.visualize.drawing.ink import INK, MARKERS, PALETTE, WIDTH, new_figure, printable, style

LEGEND_LETTERS = 84  # that fit in one row of a legend


def training_curves(history: Any, keys: Sequence[str] | None = None) -> Figure:
    """One panel per quantity against the step: raw values faint, the running mean on top, its last value in the title.

    `history` has `steps` and `validation`, lists of rows (dicts with `step`), or is one such list, as read from a log.
    `keys`: which quantities; by default the losses and all validation measures, but none that repeats another (a sum
    of one term). Validation measures are drawn with dots and without a mean. Raises ValueError
    for an empty history and for a quantity that it does not have.
    """
    steps, checks = (history, []) if isinstance(history, Sequence) else (history.steps, history.validation)
    if not steps:
        raise ValueError("The history is empty: train at least one step.")
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # name -> steps, values
    for rows in (steps, checks):
        for name in dict.fromkeys(key for row in rows for key in row if key != "step"):
            found[name] = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=float).T
    if missing := [name for name in keys or () if name not in found]:
        raise ValueError(f"The history has no {', '.join(missing)}; it has {', '.join(found)}.")
    repeated = {b for a, b in combinations(found, 2) if np.array_equal(found[a], found[b])}
    names = keys or [name for name in found if name not in {"seconds", "gradient", "lr"} | repeated]
    checked = {key for row in checks for key in row}
    lines = -(-len(names) // 3)
    columns = -(-len(names) // lines)
    with style():
        figure, axes = new_figure(lines, columns, WIDTH, 2.3 * lines)
        for ax in axes.flat[len(names) :]:
            ax.axis("off")
        for i, (ax, name) in enumerate(zip(axes.flat, names, strict=False)):
            (x, y), color = found[name], PALETTE[i % len(PALETTE)]
            mean = y if name in checked else _running_mean(y)
            if name not in checked:
                ax.plot(x, y, color=color, alpha=0.3, lw=1)
            ax.plot(x, mean, "o-" if name in checked else "-", color=color, lw=2, ms=4)
            ax.set_title(f"{printable(name)}: {mean[-1]:.2f}", loc="left", fontweight="bold")
            ax.set_xlabel("step" if i >= len(names) - columns else "")
            ax.grid(axis="y")
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centered mean over about a twentieth of the run; at the ends over what there is."""
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def bars_with_spread(runs: Mapping[str, Sequence[Mapping[str, Any]]], measures: Sequence[str] | None = None) -> Figure:
    """Methods compared over seeds: `runs[method]` lists one dict of scores per seed, as evaluation returns them.

    For each measure and method: a bar to the mean of the seeds, one mark per seed, a line for the widest 95 % interval
    among them; a dashed line marks chance. Methods differ in color and in mark.
    """
    if not runs or any(not seeds for seeds in runs.values()):
        raise ValueError("Give at least one run for every method.")
    measures = list(next(iter(runs.values()))[0]) if measures is None else list(measures)
    everything = [seed[measure] for seeds in runs.values() for seed in seeds for measure in measures]
    room, reach = 0.8 / len(runs), max(max(score.high, score.chance) for score in everything)
    longest = max(len(printable(method)) for method in runs)
    columns = max(1, min(len(runs) + 1, LEGEND_LETTERS // (longest + 6)))  # the legend must not be wider than the axes
    rows = -(-(len(runs) + 1) // columns)
    with style():
        figure, axes = new_figure(1, 1, WIDTH, 0.5 + 0.2 * rows + len(measures) * (0.28 + 0.24 * len(runs)))
        ax = axes[0, 0]
        for m, (method, seeds) in enumerate(runs.items()):
            color, marker = PALETTE[m % len(PALETTE)], MARKERS[m % len(MARKERS)]
            for j, measure in enumerate(measures):
                scores = [seed[measure] for seed in seeds]
                y, values = j - 0.4 + room * (m + 0.5), [score.value for score in scores]
                ax.barh(y, np.mean(values), room * 0.8, color=color, alpha=0.35)
                low, high = min(score.low for score in scores), max(score.high for score in scores)
                ax.plot([low, high], [y, y], color=color, lw=1.5)
                label = printable(method) if j == 0 else None
                ax.plot(values, [y] * len(values), marker, color=color, ms=5, mec="white", mew=0.6, ls="", label=label)
                ax.text(high + 0.012 * reach, y, f"{np.mean(values):.2f}", va="center", fontsize=8)
        for j, measure in enumerate(measures):
            chance = next(iter(runs.values()))[0][measure].chance
            label = "chance" if j == 0 else None
            ax.plot([chance, chance], [j - 0.45, j + 0.45], color=INK, ls=(0, (3, 2)), lw=1.5, label=label)
        ax.set_yticks(range(len(measures)), [printable(measure) for measure in measures])
        ax.set_ylim(len(measures) - 0.5, -0.5)
        ax.set_xlim(0, 1.1 * reach)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
        ax.set_axisbelow(True)
        ax.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure
