"""Figures: scenes and boxes, heat maps, retrieval, training curves, scores over seeds, and the map of the family.

Every function returns a matplotlib Figure and shows nothing by itself: as the last line of a cell it is displayed
once, `figure.savefig("x.png")` keeps it; `draw_boxes` and `heat` draw into axes of yours. Backgrounds are
transparent, and the ink is a grey that can be read on white and on black, so a figure suits a light and a dark
notebook. Colours are Okabe and Ito's, which colour-blind readers tell apart; nothing is said by colour alone.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import combinations
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from minivlp.data.batch import Box, Region

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
    """The look of all figures here; wrap your own plotting code in it."""
    look = {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "figure.dpi": 110,
        "font.size": 10,
        "font.family": _fonts(),
        "axes.prop_cycle": plt.cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.grid": False,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "image.interpolation": "nearest",
    }
    ink = "text.color axes.edgecolor axes.labelcolor axes.titlecolor xtick.color ytick.color grid.color".split()
    with plt.rc_context({**look, **dict.fromkeys(ink, INK)}):
        yield


@cache
def _fonts() -> list[str]:
    """DejaVu Sans, and a Chinese font behind it if this machine has one."""
    there = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in CHINESE_FONTS if name in there][:1]]


@cache
def _glyphs() -> frozenset[int]:
    files = [font_manager.findfont(name) for name in _fonts()]
    return frozenset(code for file in files for code in font_manager.get_font(file).get_charmap())


def _printable(text: str) -> str:
    """The text with a hollow square for every character that no font here can draw; says so once."""
    if all(ord(letter) in _glyphs() or letter.isspace() for letter in text):
        return text
    _warn_of_missing_font()
    return "".join(c if ord(c) in _glyphs() or c.isspace() else "\N{WHITE SQUARE}" for c in text)


@cache
def _warn_of_missing_font() -> None:
    warnings.warn(
        "No font on this machine can draw some characters (Chinese?); they are shown as squares. "
        "Install one, such as Noto Sans CJK, and start Python anew.",
        stacklevel=4,
    )


def _wrap(text: str, width: int) -> str:
    """Lines of about `width` Latin letters; Chinese, written without spaces, is cut at half as many characters."""
    text = _printable(text)
    if sum(ord(letter) > 0x2E7F for letter in text) > len(text) / 2:
        return "\n".join(text[i : i + width // 2] for i in range(0, len(text), width // 2))
    return "\n".join(textwrap.wrap(text, width)) or " "


def _figure(rows: int, columns: int, width: float, height: float, **more: Any) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **more)
    plt.close(figure)  # returned, not shown: a notebook would otherwise show it twice
    return figure, axes


def _picture(ax: Axes, image: np.ndarray) -> None:
    """The image without ticks, its axes in fractions of width and height (as boxes are)."""
    ax.imshow(image, extent=(0, 1, 1, 0), aspect=image.shape[0] / image.shape[1])
    ax.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    ax.spines[:].set_visible(False)


# ------------------------------------------------------------------------------------------------- pictures and boxes


def show_scenes(samples: Sequence[Any], columns: int = 4, boxes: bool = False) -> Figure:
    """Samples in a grid, each with its first caption below; `boxes` frames what is named, each place once."""
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    with style():
        figure, axes = _figure(rows, columns, WIDTH, rows * (WIDTH / columns + 0.45))
        for ax in axes.flat:
            ax.axis("off")
        for ax, sample in zip(axes.flat, samples, strict=False):
            if boxes:
                draw_boxes(ax, sample.image, _one_per_place(sample.regions))
            else:
                _picture(ax, sample.image)
            ax.set_title(_wrap(sample.captions[0], 100 // columns), y=-0.04, va="top")
    return figure


def _one_per_place(regions: Sequence[Region]) -> list[Region]:
    """The shortest phrase of each box; relations and whole images left out."""
    named = [region for region in regions if region.kind in ("object", "phrase")]
    shortest: dict[Box, Region] = {}
    for region in sorted(named, key=lambda region: len(region.phrase)):
        shortest.setdefault(region.box, region)
    return list(shortest.values())


def draw_boxes(ax: Axes, image: np.ndarray, regions: Sequence[Region], predicted: Sequence[Box] | None = None) -> None:
    """The image with a solid box and its phrase per region; `predicted[i]`, dashed, is what a model said for it."""
    _picture(ax, image)
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
            _wrap(region.phrase, 28),
            (x if left else x + region.box[2], max(y, 0.0)),
            (0, 3 if above else -3),
            textcoords="offset points",
            ha="left" if left else "right",
            va="bottom" if above else "top",
            fontsize=8,
            color="white",
            bbox={"boxstyle": "round,pad=0.2", "fc": color, "ec": "none"},
        )
        tag.set_in_layout(False)


def _corner(box: Box) -> tuple[float, float]:
    return box[0] - box[2] / 2, box[1] - box[3] / 2


def heat(ax: Axes, image: np.ndarray, weights: np.ndarray, top: float | None = None) -> Any:
    """A map (rows, columns) over the image: grey where nothing is, glowing where the weight is.

    `top` is the weight that glows fully, by default the map's own maximum; give the same to maps that are compared.
    Returns the drawn map, for a colour bar.
    """
    weights = np.asarray(weights, dtype=np.float32)
    top = float(weights.max()) if top is None else top
    side = tuple(max(256, n) for n in image.shape[1::-1])
    smooth = np.asarray(Image.fromarray(weights).resize(side, Image.Resampling.BICUBIC)).clip(0, None)
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32) / 255
    _picture(ax, np.repeat((0.25 + 0.55 * grey)[..., None], 3, axis=-1))
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
        figure, axes = _figure(rows, columns, side * columns + 0.5, rows * (side + 0.25))
        for ax in axes.flat:
            ax.axis("off")
        _picture(axes.flat[0], image)
        axes.flat[0].set_title("image")
        for ax, word, weights in zip(axes.flat[1:], words, maps, strict=False):
            drawn = heat(ax, image, weights, top)
            ax.set_title(_printable(word), fontsize=11, fontweight="bold")
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
        figure, axes = _figure(len(maps) + 1, columns, side * columns + 0.4, side * (len(maps) + 1) + 0.3)
        for j, sample in enumerate(samples):
            _picture(axes[0, j], sample.image)
            axes[0, j].set_title(_wrap(sample.captions[0], 100 // columns), fontsize=9)
            for i, weights in enumerate(maps.values(), start=1):
                heat(axes[i, j], sample.image, np.asarray(weights[j], dtype=np.float32))
                for region in _one_per_place(sample.regions):
                    outline = {"fill": False, "ec": "white", "lw": 1.2, "ls": (0, (3, 2))}
                    axes[i, j].add_patch(Rectangle(_corner(region.box), *region.box[2:], **outline))
        for ax, name in zip(axes[:, 0], ["picture", *maps], strict=True):
            ax.set_ylabel(name)
    return figure


# ---------------------------------------------------------------------------------------------------------- retrieval


def retrieval_grid(
    captions: Sequence[str], images: Sequence[np.ndarray], similarity: np.ndarray, right: Sequence[int], top: int = 5
) -> Figure:
    """For each caption (a row) its `top` nearest images, best first; the right one has a thick frame and a tick.

    similarity (images, captions); `right[i]` is the index of caption i's image. The rank of the right image stands
    under the caption, so a row without a frame still says where it was.
    """
    similarity = np.asarray(similarity)
    top = min(top, len(images))
    cell = 0.72 * WIDTH / max(top, 4)
    with style():
        ratios = [max(0.25 * WIDTH / cell, 1), *[1] * top]
        figure, axes = _figure(len(captions), top + 1, cell * sum(ratios), len(captions) * cell, width_ratios=ratios)
        for i, caption in enumerate(captions):
            order = np.argsort(-similarity[:, i], kind="stable")
            place = int(np.flatnonzero(order == right[i])[0]) + 1
            label = axes[i, 0]
            label.axis("off")
            label.text(1, 0.45, _wrap(caption, 24), ha="right", va="bottom")
            label.text(1, 0.4, f"right image: rank {place}", ha="right", va="top", fontsize=8)
            for ax, image in zip(axes[i, 1:], order[:top], strict=True):
                _picture(ax, images[image])
                if image == right[i]:
                    ax.spines[:].set(visible=True, color=GREEN, linewidth=4)
                    tag = {"boxstyle": "square,pad=0.2", "fc": GREEN, "ec": "none"}
                    ax.text(0.97, 0.04, "✓", color="white", ha="right", va="top", fontweight="bold", bbox=tag)
                ax.set_xlabel(f"{similarity[image, i]:.2f}", fontsize=8, labelpad=2)
    return figure


def similarity_matrix(similarity: np.ndarray, captions: Sequence[str], images: Sequence[np.ndarray] = ()) -> Figure:
    """Every image (row) against every caption (column), with numbers where they fit; rows show the images if given.

    The colours span at least .5, so that a small difference looks small.
    """
    similarity = np.asarray(similarity, dtype=float)
    rows, columns = similarity.shape
    cell = min(0.9, 0.62 * WIDTH / max(columns, 1))
    with style():
        figure, axes = _figure(1, 1, WIDTH * 0.97, rows * cell + 1.9)
        ax = axes[0, 0]
        low, high = similarity.min(), similarity.max()
        drawn = ax.imshow(similarity, cmap="cividis", aspect="equal", vmin=min(low, high - 0.5), vmax=high)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.xaxis.tick_top()
        ax.set_xticks(range(columns), [_wrap(c, 24) for c in captions], rotation=35, ha="left", rotation_mode="anchor")
        ax.set_yticks(range(rows), [f"image {i + 1}" for i in range(rows)] if len(images) == 0 else [""] * rows)
        for i, image in enumerate(images):
            inset = ax.inset_axes((-1.5, i - 0.46, 0.92, 0.92), transform=ax.transData)
            _picture(inset, image)
        if cell > 0.42:
            for (i, j), value in np.ndenumerate(similarity):
                light = np.dot(drawn.cmap(drawn.norm(value))[:3], (0.3, 0.6, 0.1)) > 0.5
                ink = "black" if light else "white"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
        bar = figure.colorbar(drawn, ax=ax, shrink=0.6, pad=0.02)
        bar.set_label("similarity")
        bar.outline.set_visible(False)
    return figure


# --------------------------------------------------------------------------------------------- curves and comparisons


def training_curves(history: Any, keys: Sequence[str] | None = None) -> Figure:
    """One panel per quantity against the step: raw values faint, their running mean on top, its last value written out.

    `history` has `steps` and `validation`, lists of rows (dicts with `step`), or is one such list, as read from a log.
    `keys`: which quantities; by default the losses and all validation measures, but none that repeats another (a sum
    of one term). Those of validation get dots and no mean.
    """
    steps, checks = (history, []) if isinstance(history, Sequence) else (history.steps, history.validation)
    if not steps:
        raise ValueError("The history is empty: train at least one step.")
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # name -> steps, values
    for rows in (steps, checks):
        for name in dict.fromkeys(key for row in rows for key in row if key != "step"):
            found[name] = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=float).T
    if missing := [name for name in keys or () if name not in found]:
        raise ValueError(f"The history has no {', '.join(missing)}; it has {', '.join(found)}.")
    repeated = {b for a, b in combinations(found, 2) if np.array_equal(found[a], found[b])}
    names = keys or [name for name in found if name not in {"seconds", "gradient", "lr"} | repeated]
    checked = {key for row in checks for key in row}
    lines = -(-len(names) // 3)
    columns = -(-len(names) // lines)
    with style():
        figure, axes = _figure(lines, columns, WIDTH, 2.3 * lines)
        for ax in axes.flat[len(names) :]:
            ax.axis("off")
        for i, (ax, name) in enumerate(zip(axes.flat, names, strict=False)):
            (x, y), color = found[name], PALETTE[i % len(PALETTE)]
            mean = y if name in checked else _running_mean(y)
            if name not in checked:
                ax.plot(x, y, color=color, alpha=0.3, lw=1)
            ax.plot(x, mean, "o-" if name in checked else "-", color=color, lw=2, ms=4)
            ax.set_title(f"{name}: {mean[-1]:.2f}", loc="left", fontweight="bold")
            ax.set_xlabel("step" if i >= len(names) - columns else "")
            ax.grid(axis="y")
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a twentieth of the run; at the ends over what there is."""
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def bars_with_spread(runs: Mapping[str, Sequence[Mapping[str, Any]]], measures: Sequence[str] | None = None) -> Figure:
    """Methods compared over seeds: `runs[method]` lists one dict of scores per seed, as evaluation returns them.

    For each measure and method: a bar to the mean of the seeds, one mark per seed, a line for the widest 95 % interval
    among them; a dashed line marks chance. Methods differ in colour and in mark.
    """
    if not runs or any(not seeds for seeds in runs.values()):
        raise ValueError("Give at least one run for every method.")
    measures = list(next(iter(runs.values()))[0]) if measures is None else list(measures)
    everything = [seed[measure] for seeds in runs.values() for seed in seeds for measure in measures]
    room, reach = 0.8 / len(runs), max(max(score.high, score.chance) for score in everything)
    with style():
        figure, axes = _figure(1, 1, WIDTH, 0.7 + len(measures) * (0.28 + 0.24 * len(runs)))
        ax = axes[0, 0]
        for m, (method, seeds) in enumerate(runs.items()):
            color, marker = PALETTE[m % len(PALETTE)], MARKERS[m % len(MARKERS)]
            for j, measure in enumerate(measures):
                scores = [seed[measure] for seed in seeds]
                y, values = j - 0.4 + room * (m + 0.5), [score.value for score in scores]
                ax.barh(y, np.mean(values), room * 0.8, color=color, alpha=0.35)
                low, high = min(score.low for score in scores), max(score.high for score in scores)
                ax.plot([low, high], [y, y], color=color, lw=1.5)
                label = _printable(method) if j == 0 else None
                ax.plot(values, [y] * len(values), marker, color=color, ms=5, mec="white", mew=0.6, ls="", label=label)
                ax.text(high + 0.012 * reach, y, f"{np.mean(values):.2f}", va="center", fontsize=8)
        for j, measure in enumerate(measures):
            chance = next(iter(runs.values()))[0][measure].chance
            label = "chance" if j == 0 else None
            ax.plot([chance, chance], [j - 0.45, j + 0.45], color=INK, ls=(0, (3, 2)), lw=1.5, label=label)
        ax.set_yticks(range(len(measures)), [_printable(measure) for measure in measures])
        ax.set_ylim(len(measures) - 0.5, -0.5)
        ax.set_xlim(0, 1.1 * reach)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
        ax.set_axisbelow(True)
        ax.legend(ncols=len(runs) + 1, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


# ------------------------------------------------------------------------------------------------- the family's map

# name, year, then how heavy are: image encoder, text encoder, interaction; then what they are made of
FAMILY = (
    ("VSE", "2013-18", 3.0, 1.2, 0.3, ("deep CNN", "GRU", "dot product")),
    ("CLIP", "2021", 3.0, 3.0, 0.3, ("transformer", "transformer", "dot product")),
    ("UNITER", "2019", 3.4, 0.4, 2.4, ("region\ndetector", "word table", "transformer")),
    ("ViLT", "2021", 0.4, 0.4, 3.2, ("linear layer", "word table", "transformer")),
    ("ALBEF", "2021", 3.0, 1.6, 1.6, ("transformer", "transformer", "cross-attention")),
)


def taxonomy() -> Figure:
    """Where the work is done: image encoder (VE), text encoder (TE) and modality interaction (MI) in five designs.

    Heights show which part is heavier, not FLOPs. The first four columns are the types of Kim et al. 2021 (ViLT,
    figure 2); the fifth aligns first and fuses then.
    """
    parts = ((BLUE, "VE", "image encoder"), (ORANGE, "TE", "text encoder"), (GREEN, "MI", "where the two meet"))
    step, wide, gap = 2.6, 1.12, 0.08
    with style():
        figure, axes = _figure(1, 1, WIDTH, 4.3)
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
            centre = left + wide + gap / 2
            ax.text(centre, -0.75, name, ha="center", va="center", fontsize=12, fontweight="bold")
            ax.text(centre, -1.12, f"{year}\n{_order(ve, te, mi)}", ha="center", va="top", fontsize=9)
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
