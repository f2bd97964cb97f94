"""Filtering captions: how CapFilt does it, and how well scores separate true from false captions (ROC curves)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from minivlp.visualize.drawing.ink import INK, MARKERS, PALETTE, new_figure, style
from minivlp.visualize.drawing.parts import Arrow, Box, Design
from minivlp.visualize.drawing.structure import draw

AROUND = ((8.85, 0.85), (8.85, 5.75), (4.5, 5.75))  # corners along the right and the upper edge
CAPFILT = Design(
    "CapFilt",
    "A model writes and judges captions of its own training images; a new model is trained on what is kept.",
    6.6,
    (
        Box("web", "web captions\nmany are false", 0.4, 0.6, 1.9, 0.5, "text"),
        Box("clean", "clean captions\nfew", 6.9, 0.6, 1.7, 0.5, "text"),
        Box("first", "BLIP, pre-trained\nITC, ITM, LM", 3.35, 1.5, 2.2, 0.5, "both"),
        Box("captioner", "captioner\nfine-tuned with LM", 2.5, 2.6, 1.9, 0.5, "causal"),
        Box("new", "new captions\none per image", 2.5, 3.7, 1.9, 0.5, "text"),
        Box("filter", "filter\nfine-tuned with ITC, ITM", 5.0, 3.7, 2.3, 0.5, "both"),
        Box("kept", "kept captions\nold and new", 6.9, 5.0, 1.7, 0.5, "text"),
        Box("final", "a new BLIP\ntrained from the same start", 3.3, 5.0, 2.4, 0.5, "both"),
    ),
    (
        Arrow("web right", "first left"),
        Arrow("clean left .25", "first bottom"),
        Arrow("first top", "captioner bottom"),
        Arrow("first top .9", "filter bottom"),
        Arrow("clean left .75", "captioner right", through=((6.2, 0.975), (6.2, 2.85))),
        Arrow("clean top", "filter bottom .9"),
        Arrow("captioner top", "new bottom", label="writes"),
        Arrow("new right", "filter left"),
        Arrow("web top .3", "filter top", label="old captions", through=((0.97, 4.6), (6.15, 4.6)), piece=1),
        Arrow("filter right", "kept bottom", label="they fit"),
        Arrow("kept left", "final right"),
        Arrow("clean right", "final top", label="not filtered", through=AROUND, piece=2),
    ),
)
DASHES = ("-", "-.", ":", "--")


def capfilt() -> Figure:
    """CapFilt from the web captions, below, to the new model, above (Li et al. 2022, figure 3)."""
    return draw(CAPFILT)


def roc_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], marked: Mapping[str, tuple[float, float]] | None = None
) -> Figure:
    """A curve for each score, as `evaluation.filtering.roc` returns it, and the diagonal of a score that is chance.

    marked: single thresholds by name, each (share of the false captions kept, share of the true ones kept).
    """
    with style():
        figure, axes = new_figure(1, 1, 7.6, 3.6)
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
