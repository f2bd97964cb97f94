"""Retrieval: which images a caption finds, and the similarity of every image with every caption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from minivlp.visualize.drawing.ink import GREEN, WIDTH, new_figure, show_image, style, wrap


def retrieval_grid(
    captions: Sequence[str], images: Sequence[np.ndarray], similarity: np.ndarray, right: Sequence[int], top: int = 5
) -> Figure:
    """For each caption (a row) its `top` nearest images, best first; the right one has a thick frame and a tick.

    similarity (images, captions); `right[i]` is the index of caption i's image. The rank of the right image stands
    under the caption, also where that image is not among the nearest.
    """
    similarity = np.asarray(similarity)
    top = min(top, len(images))
    cell = 0.72 * WIDTH / max(top, 4)
    with style():
        ratios = [max(0.25 * WIDTH / cell, 1), *[1] * top]
        figure, axes = new_figure(len(captions), top + 1, cell * sum(ratios), len(captions) * cell, width_ratios=ratios)
        for i, caption in enumerate(captions):
            order = np.argsort(-similarity[:, i], kind="stable")
            place = int(np.flatnonzero(order == right[i])[0]) + 1
            label = axes[i, 0]
            label.axis("off")
            label.text(1, 0.45, wrap(caption, 24), ha="right", va="bottom")
            label.text(1, 0.4, f"right image: rank {place}", ha="right", va="top", fontsize=8)
            for ax, image in zip(axes[i, 1:], order[:top], strict=True):
                show_image(ax, images[image])
                if image == right[i]:
                    ax.spines[:].set(visible=True, color=GREEN, linewidth=4)
                    tag = {"boxstyle": "square,pad=0.2", "fc": GREEN, "ec": "none"}
                    ax.text(0.97, 0.04, "✓", color="white", ha="right", va="top", fontweight="bold", bbox=tag)
                ax.set_xlabel(f"{similarity[image, i]:.2f}", fontsize=8, labelpad=2)
    return figure


def similarity_matrix(similarity: np.ndarray, captions: Sequence[str], images: Sequence[np.ndarray] = ()) -> Figure:
    """Every image (row) against every caption (column), with numbers where they fit; rows show the images if given.

    The colors span at least .5, so that a small difference looks small.
    """
    similarity = np.asarray(similarity, dtype=float)
    rows, columns = similarity.shape
    cell = min(0.9, 0.62 * WIDTH / max(columns, 1))
    with style():
        figure, axes = new_figure(1, 1, WIDTH * 0.97, rows * cell + 1.9)
        ax = axes[0, 0]
        drawn = _table(ax, similarity, _span([similarity]), images, numbers=cell > 0.42)
        ax.set_xticks(range(columns), [wrap(c, 24) for c in captions], rotation=35, ha="left", rotation_mode="anchor")
        _color_bar(figure, drawn, [ax])
    return figure


def similarity_matrices(tables: Mapping[str, np.ndarray], images: Sequence[np.ndarray]) -> Figure:
    """The same images and captions under several models: one square table for each, by title, on one scale of colors.

    Row i shows image i; column i belongs to its caption. The colors span at least .5.
    """
    found = {title: np.asarray(table, dtype=float) for title, table in tables.items()}
    count = len(images)
    cell = min(0.75, 0.75 * WIDTH / (len(found) * (count + 1.5)))
    with style():
        figure, axes = new_figure(1, len(found), WIDTH, (count + 1) * cell + 0.5)
        for ax, (title, table) in zip(axes[0], found.items(), strict=True):
            drawn = _table(ax, table, _span(found.values()), images, numbers=cell > 0.42)
            ax.set_xticks(range(count), [f"caption {i + 1}" for i in range(count)], fontsize=8)
            ax.set_title(title, fontweight="bold")
        _color_bar(figure, drawn, axes[0])
    return figure


def _span(tables: Iterable[np.ndarray]) -> tuple[float, float]:
    """The lowest and the highest color: a range of at least .5."""
    high = max(table.max() for table in tables)
    return min(min(table.min() for table in tables), high - 0.5), high


def _table(
    ax: Axes, table: np.ndarray, span: tuple[float, float], images: Sequence[np.ndarray], numbers: bool
) -> AxesImage:
    """One table of similarities, with the images to the left of their rows."""
    drawn = ax.imshow(table, cmap="cividis", aspect="equal", vmin=span[0], vmax=span[1])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(table)), [f"image {i + 1}" for i in range(len(table))] if len(images) == 0 else [])
    for i, image in enumerate(images):
        inset = ax.inset_axes((-1.5, i - 0.46, 0.92, 0.92), transform=ax.transData)
        show_image(inset, image)
    for (i, j), value in np.ndenumerate(table) if numbers else ():
        light = np.dot(drawn.cmap(drawn.norm(value))[:3], (0.3, 0.6, 0.1)) > 0.5
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="black" if light else "white")
    return drawn


def _color_bar(figure: Figure, drawn: AxesImage, axes: Sequence[Axes]) -> None:
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.6, pad=0.02)
    bar.set_label("similarity")
    bar.outline.set_visible(False)
