"""Generated captions below their pictures, wrong words marked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker
from matplotlib.path import Path

from minivlp.visualize.drawing.ink import INK, VERMILION, WIDTH, new_figure, printable, show_image, style, wrap

Marked = Sequence[tuple[str, bool]]  # the words of a caption, each with whether it is wrong


def caption_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[Marked],
    missing: Sequence[Sequence[str]] | None = None,
    columns: int = 4,
) -> Figure:
    """Pictures with a caption below each: wrong words are red, bold and underlined with a wavy line.

    captions: for each picture the words, each with whether it is wrong, as `evaluation.facts.proofread` returns them.
    missing: for each picture the facts that the caption leaves out; where it is given, a caption without errors and
    without omissions gets a tick. Raises ValueError where the numbers differ.
    """
    if len(captions) != len(images) or (missing is not None and len(missing) != len(images)):
        raise ValueError(f"{len(images)} pictures need as many captions, and as many lists of what is missing")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    with style():
        figure, axes = new_figure(rows, columns, WIDTH, rows * (WIDTH / columns + 0.75))
        for ax in axes.flat:
            ax.axis("off")
        for i, (ax, image, words) in enumerate(zip(axes.flat, images, captions, strict=False)):
            show_image(ax, image)
            lines = [
                HPacker(children=[_word(*word) for word in line], pad=0, sep=4, align="baseline")
                for line in _lines(words, 104 // columns)
            ]
            if missing is not None:
                left_out = wrap("missing: " + ", ".join(missing[i]), 104 // columns) if missing[i] else ""
                right = not left_out and not any(wrong for _, wrong in words)
                lines += [TextArea("✓" if right else left_out, textprops={"color": INK, "style": "italic", "size": 9})]
            text = VPacker(children=lines, pad=0, sep=3, align="left")
            below = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": ax.transAxes}
            ax.add_artist(AnchoredOffsetbox(child=text, pad=0.2, borderpad=0, frameon=False, **below))
    return figure


def _lines(words: Marked, width: int) -> list[list[tuple[str, bool]]]:
    """The words on lines of about `width` letters."""
    lines: list[list[tuple[str, bool]]] = [[]]
    for word, wrong in words:
        if lines[-1] and sum(len(other) + 1 for other, _ in lines[-1]) + len(word) > width:
            lines.append([])
        lines[-1].append((word, wrong))
    return lines if words else [[("(nothing)", False)]]


def _word(word: str, wrong: bool) -> TextArea:
    text_style = {"color": INK, "size": 9}
    if wrong:
        wave = {"boxstyle": _wave, "fc": "none", "ec": VERMILION, "lw": 1.2}
        text_style |= {"color": VERMILION, "weight": "bold", "bbox": wave}
    return TextArea(printable(word), textprops=text_style)


def _wave(x: float, y: float, width: float, height: float, size: float) -> Path:
    """A wavy line below a text of this size, as spelling checkers draw it."""
    steps = 2 * max(1, round(width / (0.6 * size)))
    across = np.linspace(x, x + width, steps + 1)
    down = y - 0.12 * size - 0.12 * size * (np.arange(steps + 1) % 2)
    return Path(np.stack([across, down], axis=1))
