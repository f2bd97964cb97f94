"""The family of models: where each design spends its computation."""

from __future__ import annotations

import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from minivlp.visualize.drawing.ink import BLUE, GREEN, INK, ORANGE, WIDTH, new_figure, style

# name, year, then how heavy are: image encoder, text encoder, interaction; then what they are made of
FAMILY = (
    ("VSE", "2013-18", 3.0, 1.2, 0.3, ("deep CNN", "GRU", "dot product")),
    ("CLIP", "2021", 3.0, 3.0, 0.3, ("transformer", "transformer", "dot product")),
    ("UNITER", "2019", 3.4, 0.4, 2.4, ("region\ndetector", "embedding", "transformer")),
    ("ViLT", "2021", 0.4, 0.4, 3.2, ("linear layer", "embedding", "transformer")),
    ("ALBEF", "2021", 3.0, 1.6, 1.6, ("transformer", "transformer", "cross-attention")),
)


def taxonomy() -> Figure:
    """Where the computation is: image encoder (VE), text encoder (TE) and modality interaction (MI) in five designs.

    Heights show which part is heavier, not FLOPs. The first four columns are the types of Kim et al. 2021 (ViLT,
    figure 2); the fifth aligns the towers before it fuses them.
    """
    parts = ((BLUE, "VE", "image encoder"), (ORANGE, "TE", "text encoder"), (GREEN, "MI", "interaction of both"))
    step, wide, gap = 2.6, 1.12, 0.08
    with style():
        figure, axes = new_figure(1, 1, WIDTH, 4.3)
        ax = axes[0, 0]
        ax.axis("off")
        for i, (name, year, ve, te, mi, made_of) in enumerate(FAMILY):
            left, roof = i * step, max(ve, te) + 0.55
            right = left + wide + gap
            for x, height, part, what in ((left, ve, 0, "image"), (right, te, 1, "text")):
                _block(ax, x, 0, wide, height, parts[part][0], parts[part][1], made_of[part])
                ax.text(x + wide / 2, -0.3, what, ha="center", va="center", fontsize=9)
                arrow = {"arrowstyle": "-|>", "mutation_scale": 9, "color": INK, "shrinkA": 0, "shrinkB": 0}
                ax.add_patch(FancyArrowPatch((x + wide / 2, height + 0.04), (x + wide / 2, roof - 0.04), **arrow))
            _block(ax, left, roof, 2 * wide + gap, mi, parts[2][0], parts[2][1], made_of[2])
            center = left + wide + gap / 2
            ax.text(center, -0.75, name, ha="center", va="center", fontsize=12, fontweight="bold")
            ax.text(center, -1.12, f"{year}\n{_order(ve, te, mi)}", ha="center", va="top", fontsize=9)
        for i, (color, short, meaning) in enumerate(parts):
            ax.text(0.2 + 4.3 * i, 6.65, f"{short}  {meaning}", color=INK, va="center", fontsize=9.5)
            ax.add_patch(Rectangle((-0.05 + 4.3 * i, 6.56), 0.18, 0.18, fc=color))
        ax.set(xlim=(-0.15, len(FAMILY) * step - 0.1), ylim=(-1.95, 6.9))
    return figure


def _block(ax: Axes, x: float, y: float, width: float, height: float, color: str, name: str, made_of: str) -> None:
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec="none"))
    ink = "white" if color == BLUE else "black"
    if height < 0.6:  # no room inside for two lines
        ax.text(x + width / 2, y + height / 2, made_of, ha="center", va="center", fontsize=7.5, color=ink)
    else:
        label = textwrap.fill(made_of, 11 if width < 1.5 else 30)
        ax.text(x + width / 2, y + height / 2 + 0.2, name, ha="center", va="center", fontweight="bold", color=ink)
        ax.text(x + width / 2, y + height / 2 - 0.05, label, ha="center", va="top", fontsize=7.5, color=ink)


def _order(ve: float, te: float, mi: float) -> str:
    """ "VE > TE > MI" from the three heights."""
    parts = sorted((("VE", ve), ("TE", te), ("MI", mi)), key=lambda part: -part[1])
    text = parts[0][0]
    for (_, before), (name, here) in zip(parts, parts[1:], strict=False):
        text += f" {'=' if before == here else '>'} {name}"
    return text
