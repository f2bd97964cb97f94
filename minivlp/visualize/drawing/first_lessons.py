"""Figures of lessons 00 and 01: an image cut into patches, differences as histograms, curves side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from minivlp.visualize.drawing.ink import BLUE, INK, MARKERS, PALETTE, WIDTH, new_figure, show_image, style


def cut_into_patches(image: np.ndarray, patch: int) -> Figure:
    """An image (H, W, 3) uint8, and its patches of `patch` x `patch` pixels, apart from each other."""
    height, width = image.shape[:2]
    rows, columns = height // patch, width // patch
    with style():
        figure, axes = new_figure(1, 2, 0.7 * WIDTH, 0.36 * WIDTH)
        left, right = axes[0]
        show_image(left, image)
        left.set_title(f"{height} x {width} pixels")
        right.axis("off")
        for row in range(rows):
            for column in range(columns):
                pixels = image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                right.imshow(pixels, extent=(column + 0.06, column + 0.94, row + 0.94, row + 0.06))
        right.set(xlim=(0, columns), ylim=(rows, 0), title=f"{rows * columns} patches of {patch} x {patch} pixels")
    return figure


def differences(values: Mapping[str, Sequence[float]], label: str, image: np.ndarray | None = None) -> Figure:
    """A histogram for each title, all on one axis from left to right, with a dashed line at 0.

    label: what the values are. image: an example to show on the left.
    """
    everything = np.concatenate([np.asarray(x, dtype=float) for x in values.values()])
    span = float(everything.min()), float(everything.max())
    with style():
        extra = 0 if image is None else 1
        figure, axes = new_figure(1, len(values) + extra, WIDTH, 2.7)
        if image is not None:
            show_image(axes[0, 0], image)
        for ax, (title, numbers) in zip(axes[0, extra:], values.items(), strict=True):
            ax.hist(numbers, bins=24, range=span, color=BLUE)
            ax.axvline(0, color=INK, ls=(0, (3, 2)))
            ax.set(title=title, xlabel=label)
        axes[0, extra].set_ylabel("pictures")
    return figure


def curves(panels: Mapping[str, Mapping[str, Sequence[float]]], lines: Mapping[str, float] | None = None) -> Figure:
    """Runs compared step by step: one panel for each measure, `panels[measure][run]` lists a value per step.

    lines: measure -> a value to mark with a dashed line, such as chance.
    """
    with style():
        figure, axes = new_figure(1, len(panels), WIDTH, 2.8)
        for ax, (measure, runs) in zip(axes[0], panels.items(), strict=True):
            for n, (run, values) in enumerate(runs.items()):
                every = max(1, len(values) // 8)
                look = {"color": PALETTE[n], "marker": MARKERS[n], "markevery": every, "ms": 5, "label": run}
                ax.plot(range(1, len(values) + 1), values, **look)
            if measure in (lines or {}):
                ax.axhline(lines[measure], color=INK, ls=(0, (3, 2)), label="chance")
            ax.set(title=measure, xlabel="step")
            ax.grid(axis="y")
        axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
