"""What all figures share: colors, fonts, line wrapping, and an image without ticks."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minivlp.data.pictures import Picture, to_rgb

INK = "#7a7a7a"  # contrast above 4 on white and on near-black
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE)
MARKERS = ("o", "s", "D", "^", "v", "P")
HEAT = "inferno"
WIDTH = 9.0  # inches: the width of a notebook's output
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "SimHei", "Heiti SC", "Songti SC", "Arial Unicode MS",
)  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """The style of all figures here, as a context for your own plotting code. Text in it is never read as a formula."""
    settings = {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "figure.dpi": 110,
        "font.size": 10,
        "font.family": fonts(),
        "axes.prop_cycle": plt.cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.grid": False,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "image.interpolation": "nearest",
        "text.parse_math": False,  # a caption may have two $, which is no formula
        "text.usetex": False,
    }
    ink = "text.color axes.edgecolor axes.labelcolor axes.titlecolor xtick.color ytick.color grid.color".split()
    with plt.rc_context({**settings, **dict.fromkeys(ink, INK)}):
        yield


@cache
def fonts() -> list[str]:
    """DejaVu Sans, and a Chinese font behind it if this machine has one."""
    there = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in CHINESE_FONTS if name in there][:1]]


@cache
def glyphs() -> frozenset[int]:
    """The characters that our fonts have, as code points."""
    files = [font_manager.findfont(name) for name in fonts()]
    return frozenset(code for file in files for code in font_manager.get_font(file).get_charmap())


def printable(text: str) -> str:
    """The text with a hollow square for every character that no installed font has; warns once."""
    if all(ord(letter) in glyphs() or letter.isspace() for letter in text):
        return text
    warn_of_missing_font()
    return "".join(c if ord(c) in glyphs() or c.isspace() else "\N{WHITE SQUARE}" for c in text)


@cache
def warn_of_missing_font() -> None:
    """Warn, the first time only."""
    warnings.warn(
        "No font on this machine can draw some characters (Chinese?); they are shown as squares. "
        "Install one, such as Noto Sans CJK, and start Python anew.",
        stacklevel=4,
    )


def wrap(text: str, width: int) -> str:
    """Lines of about `width` Latin letters; Chinese, written without spaces, is cut at half as many characters."""
    text = printable(text)
    if sum(ord(letter) > 0x2E7F for letter in text) > len(text) / 2:
        return "\n".join(text[i : i + width // 2] for i in range(0, len(text), width // 2))
    return "\n".join(textwrap.wrap(text, width)) or " "


def new_figure(
    rows: int, columns: int, width: float, height: float, **subplot_options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of width x height inches, and its axes (rows, columns); further options as in `plt.subplots`."""
    options = {"squeeze": False, "layout": "constrained"} | subplot_options
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), **options)
    plt.close(figure)  # returned, not shown: a notebook would otherwise show it twice
    return figure, axes


def show_image(ax: Axes, picture: Picture) -> None:
    """The picture without ticks, its axes in fractions of width and height (as boxes are).

    `picture`: pixels (H, W, 3) uint8, as a `Sample` has them, or any other picture that `to_rgb` reads.
    """
    is_pixels = isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2:] == (3,)
    image = picture if is_pixels else np.asarray(to_rgb(picture))
    ax.imshow(image, extent=(0, 1, 1, 0), aspect=image.shape[0] / image.shape[1])
    ax.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    ax.spines[:].set_visible(False)
