"""Figures of lessons 02 and 04: tokens of both modalities in one row, tables, stacked bars, rows of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minivlp.visualize.drawing.ink import BLUE, INK, ORANGE, WIDTH, new_figure, show_image, style

LINE = 1.45  # from one sequence to the next, in widths of a token
TALL = 1.1  # a token's height


def token_strip(
    texts: Sequence[Sequence[str | None]], images: Sequence[np.ndarray], patches: Sequence[int], patch: int = 8
) -> Figure:
    """One sequence per line, as a single stream reads it: text, padding (hatched), class token, patches.

    texts: the tokens of each text, None for padding; all of the same length. images: (H, W, 3) uint8 each. patches:
    which patches to draw, numbered row by row. patch: their side in pixels.
    """
    length, first = len(texts[0]), len(texts[0]) + 1.6  # room for dots in front of the first patch that is drawn
    end = first + len(patches)
    with style():
        figure, axes = new_figure(1, 1, WIDTH, 0.8 + 1.05 * len(texts))
        ax = axes[0, 0]
        for line, (text, image) in enumerate(zip(texts, images, strict=True)):
            y = -LINE * line
            for place, token in enumerate(text):
                _token(ax, place, y, token, ORANGE)
            _token(ax, length, y, "class", BLUE)
            columns = image.shape[1] // patch
            for place, number in enumerate(patches):
                top, left = (patch * index for index in divmod(number, columns))
                pixels = image[top : top + patch, left : left + patch]
                at = first + place
                ax.imshow(pixels, extent=(at + 0.04, at + 0.96, y + 0.09, y + 1.01), aspect="auto")
            for at in (length + 1.3, end + 0.3):
                ax.text(at, y + TALL / 2, "…", ha="center", va="center")
        for start, stop, name, color in ((0, length, "text", ORANGE), (length, end, "image", BLUE)):
            ax.plot([start, stop - 0.1], [1.3, 1.3], color=color, lw=2)
            ax.text((start + stop) / 2, 1.4, f"+ token type: {name}", ha="center", va="bottom", fontsize=10)
        ax.set(xlim=(-0.2, end + 0.7), ylim=(-LINE * (len(texts) - 1) - 0.2, 1.8), aspect="auto")
        ax.axis("off")
    return figure


def _token(ax: Axes, place: int, y: float, token: str | None, color: str) -> None:
    """A box with the token written upward, or a hatched one for padding."""
    look: dict[str, Any] = {"fc": color, "alpha": 0.55, "ec": "none"}
    if token is None:
        look = {"fc": "none", "ec": INK, "hatch": "////"}
    ax.add_patch(Rectangle((place + 0.04, y), 0.92, TALL, lw=0.4, **look))
    ax.text(place + 0.5, y + TALL / 2, token or "", rotation=90, ha="center", va="center", fontsize=9, color="black")


def number_tables(
    tables: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], percent: Sequence[str] = ()
) -> Figure:
    """Matrices side by side, by title, with their numbers; the titles in `percent` hold shares, written in percent.

    Brighter is larger. Plain tables and those in percent have a color scale each.
    """
    top = {kind: max((t.max() for n, t in tables.items() if (n in percent) == kind), default=1.0) for kind in (0, 1)}
    with style():
        figure, axes = new_figure(1, len(tables), WIDTH, 2.5, sharey=True)
        for ax, (title, table) in zip(axes[0], tables.items(), strict=True):
            highest = top[title in percent]
            ax.imshow(table, cmap="cividis", vmin=0, vmax=highest)
            for (row, column), value in np.ndenumerate(table):
                label = f"{100 * value:.0f} %" if title in percent else f"{value:.1f}"
                ink = "black" if value > highest / 2 else "white"
                ax.text(column, row, label, ha="center", va="center", color=ink, fontsize=8)
            ax.set(title=title, xticks=range(len(columns)), yticks=range(len(rows)), yticklabels=rows)
            ax.set_xticklabels(columns, rotation=40, ha="right")
            ax.spines[:].set_visible(False)
            ax.tick_params(length=0)
    return figure


def stacked_bars(panels: Mapping[str, Mapping[str, Sequence[float]]], parts: Mapping[str, str]) -> Figure:
    """One panel per measure and one bar per row, cut into parts; `parts` gives the name and color of each part.

    panels: by the measure's name, the values of each row's parts.
    """
    with style():
        figure, axes = new_figure(1, len(panels), WIDTH, 2.6, sharey=True)
        for ax, (measure, bars) in zip(axes[0], panels.items(), strict=True):
            longest = max(map(sum, bars.values()))
            for y, values in enumerate(bars.values()):
                starts = np.cumsum([0, *values])
                for start, value, (name, color) in zip(starts[:-1], values, parts.items(), strict=True):
                    ax.barh(y, value, left=start, color=color, height=0.6, label=name if y == 0 else None)
                    if value > 0.08 * longest:  # else there is no room for the name
                        ink = "white" if color == BLUE else "black"
                        ax.text(start + value / 2, y, name, ha="center", va="center", color=ink, fontsize=9)
            ax.set(title=measure, yticks=range(len(bars)), yticklabels=list(bars), ylim=(len(bars) - 0.5, -0.5))
        ax.legend(ncols=len(parts), loc="lower right", bbox_to_anchor=(1, 1.12), borderaxespad=0)
    return figure


def picture_rows(rows: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """The same pictures in several states, one row for each, by its name: (H, W, 3) uint8."""
    columns = len(next(iter(rows.values())))
    with style():
        figure, axes = new_figure(len(rows), columns, 1.9 * columns, 1.95 * len(rows))
        for line, (name, pictures) in zip(axes, rows.items(), strict=True):
            for ax, picture in zip(line, pictures, strict=True):
                show_image(ax, picture)
            line[0].set_ylabel(name)
    return figure
