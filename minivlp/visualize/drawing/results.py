"""Results: training curves over the steps, scores over the seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from minivlp.visualize.drawing.ink import INK, PALETTE, WIDTH, new_figure, printable, style
from minivlp.visualize.drawing.model_colors import looks

LEGEND_LETTERS = 84  # that fit in one row of a legend
CHANCE = (0, (3, 2))  # dashes
NOTES = (  # what is said below the name of a measure; the first that fits
    ("wrong image", "lower if the image is used"),
    ("(no|gray) image", "guessed from the text"),
    (r"(median rank|wrong|missing|false|error|loss(es)?|perplexity|seconds)\b", "lower is better"),
)


def training_curves(history: Any, keys: Sequence[str] | None = None) -> Figure:
    """One panel per quantity against the step: raw values faint, the running mean on top, its last value in the title.

    `history` has `steps` and `validation`, lists of rows (dicts with `step`), or is one such list, as read from a log.
    `keys`: which quantities; by default the losses and all validation measures, but none that repeats another (a sum
    of one term). Validation measures are drawn with dots and without a mean. A legend says so. Raises ValueError
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
        figure, axes = new_figure(lines, columns, WIDTH, 0.25 + 2.3 * lines)
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
        _explain_curves(figure, checked & set(names), set(names) - checked)
    return figure


def _explain_curves(figure: Figure, checked: set[str], trained: set[str]) -> None:
    """The legend of what lines and dots mean, of those that occur."""
    handles = []
    if trained:
        handles.append(Line2D([], [], color=INK, alpha=0.4, lw=1, label="each step"))
        handles.append(Line2D([], [], color=INK, lw=2, label="running mean"))
    if checked:
        handles.append(Line2D([], [], color=INK, marker="o", lw=2, ms=4, label="validation"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centered mean over about a twentieth of the run; at the ends over what there is."""
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def bars_with_spread(runs: Mapping[str, Sequence[Mapping[str, Any]]], measures: Sequence[str] | None = None) -> Figure:
    """Methods compared over seeds: `runs[method]` lists one dict of scores per seed, as evaluation returns them.

    For each measure and method: a bar to the mean of the seeds, one mark per seed, a line for the widest 95 % interval
    among them; a dashed line marks chance. A legend below says so. Methods differ in color and in mark; methods that
    begin with the titles of models have the models' colors (`looks`). Measures of which less is better say so.
    """
    if not runs or any(not seeds for seeds in runs.values()):
        raise ValueError("Give at least one run for every method.")
    measures = list(next(iter(runs.values()))[0]) if measures is None else list(measures)
    everything = [seed[measure] for seeds in runs.values() for seed in seeds for measure in measures]
    room, reach = 0.8 / len(runs), max(max(score.high, score.chance) for score in everything)
    longest = max(len(printable(method)) for method in runs)
    columns = max(1, min(len(runs), LEGEND_LETTERS // (longest + 6)))  # the legend must not be wider than the axes
    rows = -(-len(runs) // columns)
    with style():
        figure, axes = new_figure(1, 1, WIDTH, 0.75 + 0.2 * rows + len(measures) * (0.28 + 0.24 * len(runs)))
        ax = axes[0, 0]
        for m, ((method, seeds), look) in enumerate(zip(runs.items(), looks(list(runs)), strict=True)):
            ink = {"color": look.color, "mfc": look.color if look.full else "white"}
            edge = {"mec": "white", "mew": 0.6} if look.full else {"mec": look.color, "mew": 1.2}
            for j, measure in enumerate(measures):
                scores = [seed[measure] for seed in seeds]
                y, values = j - 0.4 + room * (m + 0.5), [score.value for score in scores]
                ax.barh(
                    y, np.mean(values), room * 0.8, alpha=0.35, fc=look.color, ec=look.color, lw=0, hatch=look.hatch
                )
                low, high = min(score.low for score in scores), max(score.high for score in scores)
                ax.plot([low, high], [y, y], color=look.color, lw=1.5)
                label = printable(method) if j == 0 else None
                ax.plot(values, [y] * len(values), look.marker, ms=5, ls="", label=label, **ink, **edge)
                ax.text(high + 0.012 * reach, y, f"{np.mean(values):.2f}", va="center", fontsize=8)
        for j, measure in enumerate(measures):
            chance = next(iter(runs.values()))[0][measure].chance
            ax.plot([chance, chance], [j - 0.45, j + 0.45], color=INK, ls=CHANCE, lw=1.5)
        ax.set_yticks(range(len(measures)), [wrap_measure(measure) for measure in measures])
        ax.set_ylim(len(measures) - 0.5, -0.5)
        ax.set_xlim(0, 1.1 * reach)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
        ax.set_axisbelow(True)
        ax.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        _explain_bars(figure, several=any(len(seeds) > 1 for seeds in runs.values()))
    return figure


def wrap_measure(measure: str) -> str:
    """The measure's name for an axis, with a second line where less of it is better, or where it is a control."""
    notes = (note for pattern, note in NOTES if re.search(pattern, measure) and "better" not in measure)
    return "\n".join([printable(measure), *[f"({note})" for note in notes][:1]])


def _explain_bars(figure: Figure, several: bool) -> None:
    """The legend of what bars, marks and lines mean. `several`: some method has more than one seed."""
    mark = {"marker": "o", "mec": "white", "mew": 0.6, "ms": 6, "ls": ""}
    handles = [
        Patch(color=INK, alpha=0.35, label="mean of the seeds" if several else "value"),
        Line2D(
            [], [], color=INK, lw=1.5, label="95 % interval (the widest of the seeds)" if several else "95 % interval"
        ),
        Line2D([], [], color=INK, lw=1.5, ls=CHANCE, label="chance"),
    ]
    if several:
        handles.insert(1, Line2D([], [], color=INK, label="one seed", **mark))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8)
