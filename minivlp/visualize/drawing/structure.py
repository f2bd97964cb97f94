"""A model's architecture as a figure, drawn from its description in `designs`.

Boxes are pale with dark text, so that they are readable on any background.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path

from minivlp.data.sprites import paste, plain_background, sprite_size
from minivlp.visualize.drawing.designs import DESIGNS
from minivlp.visualize.drawing.ink import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, WIDTH, new_figure, style
from minivlp.visualize.drawing.parts import LETTER, Arrow, Box, Design, Frame, Note, Part, Picture, Tokens, route

DARK = "#1c1c1c"  # text in boxes
TITLE, SMALL = 9.0, 8.0  # points
LINE = 0.148  # inches from one line of small text to the next
KINDS = {  # kind of a part: fill, edge, what the legend says
    "image": ("#d3e6f3", BLUE, "image"),
    "text": ("#fbe6bf", ORANGE, "text"),
    "both": ("#cdeadf", GREEN, "image and text"),
    "shared": ("#e4e4e4", "#8a8a8a", "shared weights"),
    "causal": ("#e3f2fb", SKY, "causal decoder"),
    "head": ("#f4f4f4", "#8a8a8a", "head"),
    "momentum": ("#f6e3ee", PURPLE, "momentum model: no gradient"),
    "loss": ("#fbdcc9", VERMILION, "loss"),
}
ARROWS = {"data": (INK, "-"), "momentum": (PURPLE, (0, (4, 2))), "negatives": (VERMILION, (0, (1, 1.5)))}
HATCH = "////"  # over frozen parts
SPRITES = (("heart", "red", 0.08, 0.28, 0.42), ("star", "blue", 0.56, 0.4, 0.36))  # of the example picture: left, top
# and longer side as fractions of its width


def structure(title: str) -> Figure:
    """The architecture of a model: inputs below, losses above, shared weights, momentum model and frozen parts.

    title: as in `DESIGNS`. Raises ValueError that lists the titles.
    """
    if title not in DESIGNS:
        raise ValueError(f"no figure of {title!r}; there are: {', '.join(DESIGNS)}")
    return draw(DESIGNS[title])


def draw(design: Design) -> Figure:
    """The figure of a design, WIDTH x (its height + a line for the legend) inches."""
    with style():
        figure, axes = new_figure(1, 1, WIDTH, design.height, layout=None)
        ax = axes[0, 0]
        ax.set_position((0, 0, 1, 1))
        ax.axis("off")
        ax.set(xlim=(0, WIDTH), ylim=(0, design.height))
        by_name = {part.name: part for part in design.parts if not isinstance(part, Note)}
        for part in design.parts:
            DRAW[type(part)](ax, part)
        for arrow in design.arrows:
            _arrow(ax, arrow, by_name)
        ax.text(0.15, design.height - 0.2, design.title, fontsize=12, fontweight="bold", va="center")
        ax.text(0.15, design.height - 0.45, design.idea, fontsize=TITLE, va="center")
        _legend(ax, design)
    return figure


def _box(ax: Axes, box: Box) -> None:
    fill, edge, _ = KINDS[box.kind]
    rounding = box.height / 2 if box.kind == "loss" else 0.06
    shape = FancyBboxPatch((box.left, box.bottom), box.width, box.height, f"round,pad=0,rounding_size={rounding}")
    shape.set(fc=fill, ec=edge, lw=1.2, ls=(0, (4, 2)) if box.kind == "momentum" else "-")
    ax.add_patch(shape)
    if box.frozen:
        hatched = FancyBboxPatch((box.left, box.bottom), box.width, box.height, shape.get_boxstyle())
        ax.add_patch(hatched)
        hatched.set(fc="none", ec="#b9c9d6", lw=0, hatch=HATCH)
    name, *rest = box.text.split("\n")
    center, top = box.left + box.width / 2, box.bottom + box.height / 2 + LINE * len(rest) / 2
    ax.text(center, top, name, fontsize=TITLE, fontweight="bold", color=DARK, ha="center", va="center")
    for line, text in enumerate(rest, 1):
        ax.text(center, top - LINE * line, text, fontsize=SMALL, color=DARK, ha="center", va="center")


def _frame(ax: Axes, frame: Frame) -> None:
    _, edge, _ = KINDS[frame.kind]
    shape = FancyBboxPatch((frame.left, frame.bottom), frame.width, frame.height, "round,pad=0,rounding_size=0.1")
    shape.set(fc="none", ec=edge, lw=1.2, ls=(0, (4, 2)))
    ax.add_patch(shape)
    x, y = frame.left + 0.1, frame.bottom + frame.height - 0.13
    ax.text(x, y, frame.text, fontsize=SMALL, va="center")


def _picture(ax: Axes, picture: Picture) -> None:
    side, (x, y, width) = 128, (picture.left, picture.bottom, picture.width)
    pixels = plain_background(side, (226, 236, 244), (201, 220, 206))
    for noun, color, left, top, longer in SPRITES:
        w, h = sprite_size(noun, color, round(longer * side))
        x0, y0 = round(left * side), round(top * side)
        paste(pixels, noun, color, (x0, y0, x0 + w, y0 + h))
        if picture.boxes:
            inch = width / side
            corner = x + x0 * inch - 0.03, y + width - (y0 + h) * inch - 0.03
            ax.add_patch(Rectangle(corner, w * inch + 0.06, h * inch + 0.06, fc="none", ec=VERMILION, lw=1.5, zorder=3))
    ax.imshow(pixels, extent=(x, x + width, y, y + width), aspect="auto", zorder=1)
    for part in np.linspace(0, width, 5):
        ax.plot([x, x + width], [y + part] * 2, color="white", lw=2, zorder=2)
        ax.plot([x + part] * 2, [y, y + width], color="white", lw=2, zorder=2)


def _tokens(ax: Axes, tokens: Tokens) -> None:
    fill, edge, _ = KINDS["text"]
    x = tokens.left
    for word, width in zip(tokens.words.split(), tokens.widths, strict=True):
        shape = FancyBboxPatch((x, tokens.bottom), width, tokens.height, "round,pad=0,rounding_size=0.04")
        ax.add_patch(shape)
        shape.set(fc=fill, ec=edge, lw=0.8)
        y = tokens.bottom + tokens.height / 2
        ax.text(x + width / 2, y, word, fontsize=SMALL, color=DARK, ha="center", va="center_baseline")
        x += width + 0.04


def _note(ax: Axes, note: Note) -> None:
    ax.text(note.left, note.bottom, note.text, fontsize=SMALL, ha=note.align, va="bottom", linespacing=1.3)


DRAW = {Box: _box, Frame: _frame, Picture: _picture, Tokens: _tokens, Note: _note}


def _arrow(ax: Axes, arrow: Arrow, parts: dict[str, Part]) -> None:
    color, dashes = ARROWS[arrow.kind]
    points = route(arrow, parts)
    path = Path(points)
    head = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0, "joinstyle": "round"}
    ax.add_patch(FancyArrowPatch(path=path, color=color, ls=dashes, lw=1.3, fill=False, zorder=3, **head))
    if not arrow.label:
        return
    pieces = list(pairwise(points))
    longest = max(pieces, key=lambda piece: np.hypot(*np.subtract(*piece)))
    (x0, y0), (x1, y1) = longest if arrow.piece is None else pieces[arrow.piece]
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    beside = arrow.beside or ("above" if abs(x1 - x0) > abs(y1 - y0) else "right")
    dx, dy, ha, va = {
        "above": (0, 0.04, "center", "bottom"),
        "below": (0, -0.04, "center", "top"),
        "left": (-0.07, 0, "right", "center"),
        "right": (0.07, 0, "left", "center"),
    }[beside]
    ink = INK if arrow.kind == "data" else color
    ax.text(x + dx, y + dy, arrow.label, fontsize=SMALL, color=ink, ha=ha, va=va, linespacing=1.2)


def _legend(ax: Axes, design: Design) -> None:
    """The kinds of parts and arrows that occur, in one line at the lower edge."""
    boxes = [part for part in design.parts if type(part) is Box]
    x, y = 0.15, 0.14
    for kind, (fill, edge, meaning) in KINDS.items():
        if any(box.kind == kind for box in boxes):
            ax.add_patch(Rectangle((x, y - 0.06), 0.2, 0.12, fc=fill, ec=edge, lw=1))
            x = _meaning(ax, x, y, meaning)
    if any(box.frozen for box in boxes):
        ax.add_patch(Rectangle((x, y - 0.06), 0.2, 0.12, fc="white", ec="#8fa3b3", lw=0.5, hatch=HATCH))
        _meaning(ax, x, y, "frozen")


def _meaning(ax: Axes, x: float, y: float, text: str) -> float:
    """Write what a color stands for; returns where the next one begins."""
    ax.text(x + 0.27, y, text, fontsize=SMALL, va="center")
    return x + 0.27 + LETTER * len(text) + 0.22
