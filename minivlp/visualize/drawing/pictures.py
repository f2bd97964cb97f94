"""Pictures with their boxes, and heat maps of what a word attends to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from minivlp.data.batch import Box, Region
from minivlp.visualize.drawing.ink import HEAT, PALETTE, WIDTH, new_figure, printable, show_image, style, wrap


def show_scenes(samples: Sequence[Any], columns: int = 4, boxes: bool = False) -> Figure:
    """Samples in a grid, each with its first caption below; `boxes` draws the boxes of its phrases, each once."""
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    with style():
        figure, axes = new_figure(rows, columns, WIDTH, rows * (WIDTH / columns + 0.45))
        for ax in axes.flat:
            ax.axis("off")
        for ax, sample in zip(axes.flat, samples, strict=False):
            if boxes:
                draw_boxes(ax, sample.image, _one_per_place(sample.regions))
            else:
                show_image(ax, sample.image)
            ax.set_title(wrap(sample.captions[0], 100 // columns), y=-0.04, va="top")
    return figure


def _one_per_place(regions: Sequence[Region]) -> list[Region]:
    """The shortest phrase of each box; relations and whole images left out."""
    named = [region for region in regions if region.kind in ("object", "phrase")]
    shortest: dict[Box, Region] = {}
    for region in sorted(named, key=lambda region: len(region.phrase)):
        shortest.setdefault(region.box, region)
    return list(shortest.values())


def draw_boxes(ax: Axes, image: np.ndarray, regions: Sequence[Region], predicted: Sequence[Box] | None = None) -> None:
    """The image with a solid box and its phrase per region; `predicted[i]`, dashed, is a model's box for region i."""
    show_image(ax, image)
    halo = [withStroke(linewidth=4, foreground="white")]
    for i, region in enumerate(regions):
        color = PALETTE[i % len(PALETTE)]
        x, y = _corner(region.box)
        ax.add_patch(Rectangle((x, y), *region.box[2:], fill=False, ec=color, lw=2, path_effects=halo))
        if predicted is not None:
            box = predicted[i]
            dashes = {"ls": (0, (3, 2)), "path_effects": halo}
            ax.add_patch(Rectangle(_corner(box), *box[2:], fill=False, ec=color, lw=2, **dashes))
        above, left = y > 0.08, x < 0.6  # keep the tag inside the picture
        tag = ax.annotate(
            wrap(region.phrase, 28),
            (x if left else x + region.box[2], max(y, 0.0)),
            (0, 3 if above else -3),
            textcoords="offset points",
            ha="left" if left else "right",
            va="bottom" if above else "top",
            fontsize=8,
            color="white",
            bbox={"boxstyle": "round,pad=0.2", "fc": color, "ec": "none"},
            parse_math=False,  # the axes may have been made outside of `style()`
            usetex=False,
        )
        tag.set_in_layout(False)


def _corner(box: Box) -> tuple[float, float]:
    return box[0] - box[2] / 2, box[1] - box[3] / 2


def heat(ax: Axes, image: np.ndarray, weights: np.ndarray, top: float | None = None) -> Any:
    """A map (rows, columns) over the gray image, brighter where the weight is larger.

    `top` is the weight of the brightest color, by default the map's maximum; give the same to maps that are compared.
    Returns the drawn map, for a color bar.
    """
    weights = np.asarray(weights, dtype=np.float32)
    top = float(weights.max()) if top is None else top
    side = tuple(max(256, n) for n in image.shape[1::-1])
    smooth = np.asarray(Image.fromarray(weights).resize(side, Image.Resampling.BICUBIC)).clip(0, None)
    gray = 0.25 * 255 + 0.55 * np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32)  # (H, W)
    show_image(ax, np.repeat(gray.round().astype(np.uint8)[..., None], 3, axis=-1))
    share = (smooth / (top or 1)).clip(0, 1)
    whole = {"extent": (0, 1, 1, 0), "aspect": image.shape[0] / image.shape[1]}
    return ax.imshow(smooth, cmap=HEAT, vmin=0, vmax=top or 1, alpha=0.8 * share**0.7, **whole)


def attention_figure(
    image: np.ndarray, words: Sequence[str], maps: np.ndarray, boxes: Sequence[Box] | None = None, columns: int = 6
) -> Figure:
    """The image, then one heat map per word on a common scale. maps (words, rows, columns); `boxes` are outlined."""
    maps = np.asarray(maps, dtype=np.float32)
    if len(maps) != len(words):
        raise ValueError(f"{len(words)} words but {len(maps)} maps: give one map per word.")
    columns = min(columns, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    side = WIDTH / max(columns, 4)
    top = float(maps.max())
    with style():
        figure, axes = new_figure(rows, columns, side * columns + 0.5, rows * (side + 0.25))
        for ax in axes.flat:
            ax.axis("off")
        show_image(axes.flat[0], image)
        axes.flat[0].set_title("image")
        for ax, word, weights in zip(axes.flat[1:], words, maps, strict=False):
            drawn = heat(ax, image, weights, top)
            ax.set_title(printable(word), fontsize=11, fontweight="bold")
        for ax in axes.flat[1 : len(words) + 1]:
            for box in boxes or ():
                ax.add_patch(Rectangle(_corner(box), *box[2:], fill=False, ec="white", lw=1.2, ls=(0, (3, 2))))
        scale = mpl.cm.ScalarMappable(drawn.norm, drawn.cmap)  # `drawn` itself is half transparent
        bar = figure.colorbar(scale, ax=axes, fraction=0.03, pad=0.01, aspect=12)
        bar.set_ticks([0, top], labels=["0", f"{top:.2g}"])
        bar.outline.set_visible(False)
    return figure


def attention_grid(samples: Sequence[Any], maps: Mapping[str, np.ndarray]) -> Figure:
    """One row of pictures, and below it one row of heat maps per method, each on its own scale; boxes are outlined.

    maps: method -> (samples, rows, columns).
    """
    columns, side = len(samples), WIDTH / max(len(samples) + 0.5, 4)
    with style():
        figure, axes = new_figure(len(maps) + 1, columns, side * columns + 0.4, side * (len(maps) + 1) + 0.3)
        for j, sample in enumerate(samples):
            show_image(axes[0, j], sample.image)
            axes[0, j].set_title(wrap(sample.captions[0], 100 // columns), fontsize=9)
            for i, weights in enumerate(maps.values(), start=1):
                heat(axes[i, j], sample.image, np.asarray(weights[j], dtype=np.float32))
                for region in _one_per_place(sample.regions):
                    outline = {"fill": False, "ec": "white", "lw": 1.2, "ls": (0, (3, 2))}
                    axes[i, j].add_patch(Rectangle(_corner(region.box), *region.box[2:], **outline))
        for ax, name in zip(axes[:, 0], ["picture", *maps], strict=True):
            ax.set_ylabel(printable(name))
    return figure
