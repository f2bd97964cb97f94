"""One color for each model of the course, so that a model looks the same in every figure."""

from __future__ import annotations

from minivlp.visualize.drawing.ink import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

MODEL_COLORS = {  # all are visible on white and on black; with its mark, each can be told apart without color vision
    "CLIP": BLUE,
    "ViLT": VERMILION,
    "ALBEF": GREEN,
    "VLMo": PURPLE,
    "BLIP": SKY,
    "X-VLM": ORANGE,
    "NegCLIP": "#7766ee",
    "CoCa": "#a32020",
    "BEiT-3": "#86c166",
    "GIT": "#7d3a78",
    "FLAVA": "#2f4bb0",
    "BridgeTower": "#f48fa0",
    "FILIP": "#6d8f1c",
    "Chinese-CLIP": "#8a8a8a",
}


def color_of(title: str) -> str:
    """The color of a model, "#rrggbb". Raises ValueError that lists the titles."""
    if title not in MODEL_COLORS:
        raise ValueError(f"no color for {title!r}; there are: {', '.join(MODEL_COLORS)}")
    return MODEL_COLORS[title]
