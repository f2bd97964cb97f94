"""Scored options, such as captions or next words: a bar for each, its text above the bar. Tables of right and wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minivlp.visualize.drawing.ink import BLUE, SKY, VERMILION, WIDTH, new_figure, printable, show_image, style, wrap

LETTERS = 14  # of the small font that fit in an inch


@dataclass
class Options:
    """One panel of `option_bars`.

    scores: 0 to 1, one of each text. right: the indices of the options that are true; their bars are darker and have a
    tick. image: pixels (H, W, 3) uint8 that are shown above.
    """

    title: str
    texts: Sequence[str]
    scores: Sequence[float]
    right: Collection[int] = ()
    image: np.ndarray | None = None


def option_bars(panels: Sequence[Options], widths: Sequence[float] | None = None) -> Figure:
    """A panel for each of `panels`, side by side; `widths` are their relative widths.

    Raises ValueError where a panel has not one score for each text.
    """
    for panel in panels:
        if len(panel.texts) != len(panel.scores):
            raise ValueError(f"{panel.title!r} has {len(panel.texts)} texts and {len(panel.scores)} scores")
    most = max(len(panel.texts) for panel in panels)
    widths = [1.0] * len(panels) if widths is None else list(widths)
    pictures, bars = any(panel.image is not None for panel in panels), 0.35 + 0.36 * most
    above = min(1.8, WIDTH / len(panels)) if pictures else 0.0
    with style():
        ratios = [above, bars] if pictures else [bars]
        figure, axes = new_figure(
            len(ratios), len(panels), WIDTH, above + bars, width_ratios=widths, height_ratios=ratios
        )
        for column, (panel, width) in enumerate(zip(panels, widths, strict=True)):
            letters = int(LETTERS * (WIDTH * width / sum(widths) - 0.3))
            _bars(axes[-1, column], panel, most, letters)
            if pictures:
                axes[0, column].axis("off")
                if panel.image is not None:
                    show_image(axes[0, column], panel.image)
    return figure


def _bars(ax: Axes, panel: Options, most: int, letters: int) -> None:
    ax.set_title(wrap(panel.title, max(8, letters - 2)), fontsize=9)
    for y, (text, score) in enumerate(zip(panel.texts, panel.scores, strict=True)):
        is_right = y in panel.right
        ax.barh(y, float(score), height=0.32, color=BLUE if is_right else SKY)
        ax.text(0, y - 0.2, printable(("✓ " if is_right else "") + text), va="bottom", fontsize=8)
    ax.set(xlim=(0, 1), ylim=(most - 0.7, -0.85), xticks=[], yticks=[])
    ax.spines[["top", "right", "bottom"]].set_visible(False)


def ticks(rows: Mapping[str, Sequence[bool]], columns: Sequence[str]) -> Figure:
    """A table of right (a tick) and wrong (a cross) answers: rows by their text, one column for each of `columns`.

    Raises ValueError where a row has not one answer for each column.
    """
    with style():
        figure, axes = new_figure(1, 1, WIDTH, 0.5 + 0.24 * len(rows))
        ax = axes[0, 0]
        places = [WIDTH - 0.9 * (len(columns) - n) + 0.3 for n in range(len(columns))]
        for y, (text, answers) in enumerate(rows.items()):
            ax.text(0, y, printable(text), va="center", fontsize=9)
            for x, right in zip(places, answers, strict=True):
                color = BLUE if right else VERMILION
                ax.text(x, y, "✓" if right else "✗", va="center", ha="center", fontsize=12, color=color)
        for x, name in zip(places, columns, strict=True):
            ax.text(x, -1.1, printable(name), ha="center", va="center", fontweight="bold", fontsize=9)
        ax.set(xlim=(0, WIDTH), ylim=(len(rows) - 0.4, -1.7))
        ax.axis("off")
    return figure
