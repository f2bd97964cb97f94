"""The family of models: where each design spends its computation, and when each paper appeared."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from minivlp.visualize.drawing.ink import BLUE, GREEN, INK, ORANGE, WIDTH, new_figure, style
from minivlp.visualize.drawing.model_colors import color_of

# name, year, then how heavy are: image encoder, text encoder, interaction; then what they are made of
FAMILY = (
    ("VSE", "2013-18", 3.0, 1.2, 0.3, ("deep CNN", "GRU", "dot product")),
    ("CLIP", "2021", 3.0, 3.0, 0.3, ("transformer", "transformer", "dot product")),
    ("UNITER", "2019", 3.4, 0.4, 2.4, ("region\ndetector", "embedding", "transformer")),
    ("ViLT", "2021", 0.4, 0.4, 3.2, ("linear layer", "embedding", "transformer")),
    ("ALBEF", "2021", 3.0, 1.6, 1.6, ("transformer", "transformer", "cross-attention")),
)

# where image and text meet: the papers of that kind, with the year and month in their numbers on arXiv
# (of CoCa and GIT, both in May, also the part of the month)
PAPERS = {
    "only as vectors": (("CLIP", 2021, 3), ("FILIP", 2021, 11), ("Chinese-CLIP", 2022, 11)),
    "in one transformer": (("ViLT", 2021, 2), ("VLMo", 2021, 11), ("BEiT-3", 2022, 8)),
    "in fusion layers": (("ALBEF", 2021, 7), ("X-VLM", 2021, 11), ("FLAVA", 2021, 12), ("BridgeTower", 2022, 6)),
    "in a text decoder": (("BLIP", 2022, 1), ("CoCa", 2022, 4.6), ("GIT", 2022, 5.4)),
}


def timeline(lessons: Mapping[str, str]) -> Figure:
    """When the papers of the course appeared, one row for each place where image and text meet.

    lessons: title -> number of the lesson that builds the model; these are drawn filled, the others hollow, also those
    with "". The color is the model's own (`color_of`).
    """
    with style():
        figure, axes = new_figure(1, 1, WIDTH, 4.2)
        ax = axes[0, 0]
        lessons = {name: lesson for name, lesson in lessons.items() if lesson}
        for row, papers in enumerate(PAPERS.values()):
            ax.axhline(row, color=INK, lw=0.6, alpha=0.4, zorder=0)
            for name, year, month in papers:
                x, color = year + (month - 0.5) / 12, color_of(name)
                ax.scatter(x, row, s=120, color=color if name in lessons else "white", edgecolors=color, lw=2, zorder=3)
                below = name in ("GIT", "FLAVA")  # close to the paper before
                label = f"{name}\nlesson {lessons[name]}" if name in lessons else name
                place = {"xytext": (0, -9 if below else 9), "va": "top" if below else "bottom"}
                ax.annotate(label, (x, row), textcoords="offset points", ha="center", fontsize=9, **place)
        ax.set_xlim(2020.95, 2023.05)
        ax.set_xticks([2021 + quarter / 4 for quarter in range(9)])
        ax.set_xticklabels([f"{m} {y}" for y in (2021, 2022) for m in ("Jan", "Apr", "Jul", "Oct")] + ["Jan 2023"])
        ax.set_ylim(len(PAPERS) - 0.4, -0.75)
        ax.set_yticks(range(len(PAPERS)), list(PAPERS))
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.text(0, 1.0, "where image and text meet", fontweight="bold", ha="right", va="top", transform=ax.transAxes)
        for kind, look in (("a lesson builds it", INK), ("named in the course", "white")):
            ax.scatter([], [], s=60, color=look, edgecolors=INK, lw=1.5, label=kind)
        ax.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    return figure


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
