"""How well scores separate true from false captions: ROC curves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from minivlp.visualize.drawing.ink import INK, MARKERS, PALETTE, new_figure, style

DASHES = ("-", "-.", ":", "--")


def roc_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], marked: Mapping[str, tuple[float, float]] | None = None
) -> Figure:
    """A curve for each score, as `evaluation.filtering.roc` returns it, and the diagonal of a score that is chance.

    marked: single thresholds by name, each (share of the false captions kept, share of the true ones kept).
    """
    with style():
        figure, axes = new_figure(1, 1, 6.2, 3.6)
        ax = axes[0, 0]
        ax.plot([0, 1], [0, 1], color=INK, ls=(0, (3, 2)), label="chance")
        for n, (name, (false_kept, true_kept)) in enumerate(curves.items()):
            ax.plot(false_kept, true_kept, DASHES[n % len(DASHES)], color=PALETTE[n % len(PALETTE)], label=name)
        for n, (name, (x, y)) in enumerate((marked or {}).items()):
            ax.plot(x, y, MARKERS[n % len(MARKERS)], color=PALETTE[n % len(PALETTE)], ms=8, mec="white", label=name)
        ax.set(xlabel="share of the false captions kept", ylabel="share of the true captions kept")
        ax.set(xlim=(-0.02, 1.02), ylim=(0, 1.03), aspect="equal")
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
