"""What a drawn architecture consists of: boxes, frames, the example image and caption, notes, and arrows between them.

All lengths are inches of the figure, from its lower left corner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CAPTION = "[CLS] a red heart [SEP]"  # of the example picture
LETTER = 0.069  # inches: mean width of a letter of small text (8 points)

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A part of the model. Its first line is its name, in bold. `frozen`: hatched."""

    name: str
    text: str
    left: float
    bottom: float
    width: float
    height: float
    kind: str
    frozen: bool = False


@dataclass(frozen=True)
class Frame(Box):
    """A dashed line around parts that belong together; its text stands inside, at its upper edge."""


@dataclass(frozen=True)
class Picture:
    """The example image, cut into 4 x 4 patches; with `boxes`, the boxes of two objects are drawn on it."""

    name: str
    left: float
    bottom: float
    width: float
    boxes: bool = False

    @property
    def height(self) -> float:
        return self.width


@dataclass(frozen=True)
class Tokens:
    """A caption, one small box per token."""

    name: str
    words: str
    left: float
    bottom: float
    height: float = 0.26

    @property
    def widths(self) -> list[float]:
        return [LETTER * len(word) + 0.12 for word in self.words.split()]

    @property
    def width(self) -> float:
        return sum(self.widths) + 0.04 * (len(self.widths) - 1)


@dataclass(frozen=True)
class Note:
    """Text beside the parts, its lower left corner at (left, bottom); `align`: left, center or right."""

    text: str
    left: float
    bottom: float
    align: str = "left"


Part = Box | Picture | Tokens


@dataclass(frozen=True)
class Arrow:
    """From one part to another, drawn in right angles.

    Its ends are written as "name side" or "name side fraction" ("fusion left .3": on the left edge, 30 % from the
    bottom). Without a fraction the arrow is straight where that is possible, else it leaves from the middle. `through`:
    corners, where the way with the fewest would cross something. `label` stands beside the longest piece, or the one
    numbered `piece`, on the side `beside`: above or below, left or right.
    """

    start: str
    end: str
    kind: str = "data"
    label: str = ""
    through: tuple[Point, ...] = ()
    beside: str = ""
    piece: int | None = None


@dataclass(frozen=True)
class Design:
    """What a figure shows: one model."""

    title: str
    idea: str
    height: float
    parts: tuple[Part | Note, ...]
    arrows: tuple[Arrow, ...]


def route(arrow: Arrow, parts: dict[str, Part]) -> list[Point]:
    """The corners of an arrow, its ends included. Raises KeyError for a part that does not exist."""
    (first, out, at_first), (last, into, at_last) = _end(arrow.start, parts), _end(arrow.end, parts)
    upright = out in ("top", "bottom")
    if upright == (into in ("top", "bottom")) and not arrow.through:  # straight, if both edges allow it
        spans = [(p.left, p.width) if upright else (p.bottom, p.height) for p in (first, last)]
        given = [low + at * size for (low, size), at in zip(spans, (at_first, at_last), strict=True) if at is not None]
        narrow = min(spans, key=lambda span: span[1])
        at = given[0] if given else narrow[0] + narrow[1] / 2
        if len(given) < 2 and all(low <= at <= low + size for low, size in spans):
            at_first, at_last = ((at - low) / size for low, size in spans)
    start, end = _point(first, out, at_first), _point(last, into, at_last)
    if arrow.through:
        return [start, *arrow.through, end]
    if upright != (into in ("top", "bottom")):
        return [start, (start[0], end[1]) if upright else (end[0], start[1]), end]
    if upright:
        middle = (start[1] + end[1]) / 2
        corners = [] if np.isclose(start[0], end[0]) else [(start[0], middle), (end[0], middle)]
    else:
        middle = (start[0] + end[0]) / 2
        corners = [] if np.isclose(start[1], end[1]) else [(middle, start[1]), (middle, end[1])]
    return [start, *corners, end]


def _end(place: str, parts: dict[str, Part]) -> tuple[Part, str, float | None]:
    """The part, the side and the fraction that "name side fraction" says."""
    name, side, *fraction = place.split()
    return parts[name], side, float(fraction[0]) if fraction else None


def _point(part: Part, side: str, fraction: float | None) -> Point:
    at, gap = 0.5 if fraction is None else fraction, 0.03
    x, y = part.left + at * part.width, part.bottom + at * part.height
    return {
        "top": (x, part.bottom + part.height + gap),
        "bottom": (x, part.bottom - gap),
        "left": (part.left - gap, y),
        "right": (part.left + part.width + gap, y),
    }[side]
