"""One color and one mark for each model of the course, so that a model looks the same in every figure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from minivlp.visualize.drawing.ink import BLUE, GREEN, MARKERS, ORANGE, PALETTE, PURPLE, SKY, VERMILION

MODELS = {  # title: color, mark. Visible on white and black; color-blind readers can tell the colors apart
    "CLIP": (BLUE, "o"),
    "ViLT": (VERMILION, "s"),
    "ALBEF": (GREEN, "D"),
    "VLMo": (PURPLE, "^"),
    "BLIP": (SKY, "v"),
    "X-VLM": (ORANGE, "P"),
    "NegCLIP": ("#7766ee", "X"),
    "CoCa": ("#a32020", "<"),
    "BEiT-3": ("#86c166", ">"),
    "GIT": ("#7d3a78", "p"),
    "FLAVA": ("#2f4bb0", "h"),
    "BridgeTower": ("#f48fa0", "d"),
    "FILIP": ("#5f2ce6", "*"),
    "Chinese-CLIP": ("#00695a", "8"),
}
HATCHES = ("", "////", "....", "xxxx")  # of variants of one model


@dataclass(frozen=True)
class Look:
    """How bars and marks of one label are drawn. `full`: marks are filled."""

    color: str
    marker: str
    hatch: str = ""
    full: bool = True


def color_of(title: str) -> str:
    """The color of a model, "#rrggbb". Raises ValueError that lists the titles."""
    if title not in MODELS:
        raise ValueError(f"no color for {title!r}; there are: {', '.join(MODELS)}")
    return MODELS[title][0]


def model_of(label: str) -> str | None:
    """The model whose title a label begins with ("ALBEF, grounded"), or None."""
    return next((title for title in MODELS if re.match(rf"{re.escape(title)}(?![\w-])", label)), None)


def looks(labels: Sequence[str]) -> list[Look]:
    """One look per label.

    If all labels begin with the title of a model, each has its model's color, and further labels of the same model are
    hatched, with hollow marks. Other labels, and variants of one model alone, which a color could not tell apart, have
    the colors of the palette in their order.
    """
    models = [model_of(label) for label in labels]
    if None in models or (len(labels) > 1 and len(set(models)) == 1):
        return [Look(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i in range(len(labels))]
    return [Look(*MODELS[model], HATCHES[n % len(HATCHES)], n == 0) for model, n in occurrences(models)]


def occurrences(items: Iterable[str]) -> list[tuple[str, int]]:
    """Each item, and how many equal ones stand before it."""
    counts: dict[str, count] = {}
    return [(item, next(counts.setdefault(item, count()))) for item in items]
