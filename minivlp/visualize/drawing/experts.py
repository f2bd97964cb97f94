"""A transformer with experts: which expert handled which token, what is trained in which stage, which word attends to
which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from minivlp.visualize.drawing.ink import BLUE, GREEN, INK, ORANGE, PURPLE, WIDTH, new_figure, printable, style

EXPERTS = {  # name in the model: letter, color, what the legend says
    "text": ("T", ORANGE, "text expert"),
    "image": ("I", BLUE, "image expert"),
    "vl": ("V", GREEN, "vision-language expert"),
    "shared": ("S", PURPLE, "one expert for all"),
}
ATTENTION = 0.16  # height of the attention's band, where a layer is 1 high

Run = tuple[int, int, str]  # equal neighbors: from, to (not included), what they are


def expert_figure(routes: Mapping[str, Sequence[Sequence[str]]], tokens: Mapping[str, Sequence[str]]) -> Figure:
    """Which expert handled which token: a panel for each route, layers from below, tokens from left to right.

    routes[name][layer][token] is the expert's name, as `visualize.attention.expert_map` records it; tokens[name] has a
    label for each token. Equal labels side by side (64 patches) share one label and are drawn narrower. Letter
    and color say the same. The gray band below each layer is attention, whose weights all tokens share.

    Raises ValueError where a layer does not have one expert for each token.
    """
    edges = {name: _edges(tokens[name]) for name in routes}  # (N + 1,) each: where each token begins and ends
    for name, layers in routes.items():
        for layer, row in enumerate(layers):
            if len(row) != len(tokens[name]):
                raise ValueError(f"{name}: layer {layer} has experts for {len(row)} of {len(tokens[name])} tokens.")
    height = max(len(layers) for layers in routes.values())
    with style():
        ratios = [edge[-1] for edge in edges.values()]
        figure, axes = new_figure(1, len(routes), WIDTH, 1.6 + 0.45 * height, width_ratios=ratios)
        for ax, (name, layers) in zip(axes[0], routes.items(), strict=True):
            _route(ax, layers, tokens[name], edges[name])
            ax.set(xlim=(0, edges[name][-1]), ylim=(-0.05, height), title=printable(name))
        for ax in axes[0, 1:]:
            ax.set_yticks([])
        used = {expert for layers in routes.values() for row in layers for expert in row}
        keys = [Patch(color=EXPERTS[name][1], label=_meaning(name)) for name in EXPERTS if name in used]
        keys.append(Patch(color=INK, alpha=0.5, label="attention, shared by all tokens"))
        figure.legend(handles=keys, loc="outside upper left", ncols=len(keys), fontsize=9)
    return figure


def _edges(labels: Sequence[str]) -> np.ndarray:
    """Where the tokens begin and end, (N + 1,): a token alone is 1 wide, n equal ones together the root of n."""
    width = [((end - start) ** 0.5 / (end - start)) for start, end, _ in runs(labels) for _ in range(end - start)]
    return np.concatenate([[0], np.cumsum(width)])


def _route(ax: Axes, layers: Sequence[Sequence[str]], labels: Sequence[str], edges: np.ndarray) -> None:
    groups = list(runs(labels))
    for y, row in enumerate(layers):
        ax.add_patch(Rectangle((0, y), edges[-1], ATTENTION, fc=INK, alpha=0.5))
        for start, end, _ in groups:
            for first, last, name in runs(row[start:end]):
                letter, color, _ = EXPERTS[name]
                left, right = edges[start + first], edges[start + last]
                box = (left + 0.05, y + ATTENTION + 0.04), right - left - 0.1, 1 - ATTENTION - 0.12
                ax.add_patch(Rectangle(*box, fc=color, ec="none"))
                ink, y_letter = "white" if color == BLUE else "black", y + (1 + ATTENTION) / 2
                where = {"ha": "center", "va": "center_baseline"}
                ax.text((left + right) / 2, y_letter, letter, color=ink, fontsize=8, fontweight="bold", **where)
    for start, end, label in groups:
        alone = end - start == 1
        text = printable(label if alone else f"{end - start} x {label}")
        ax.text((edges[start] + edges[end]) / 2, -0.15, text, rotation=90 * alone, ha="center", va="top", fontsize=8)
    ax.set_xticks([])
    ax.set_yticks([y + 0.5 for y in range(len(layers))], [f"layer {y}" for y in range(len(layers))])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def runs(items: Sequence[str]) -> Iterator[Run]:
    """Equal neighbors: where they begin, where they end (not included), and what they are."""
    end = 0
    for item, same in groupby(items):
        start, end = end, end + len(list(same))
        yield start, end, item


def _meaning(name: str) -> str:
    letter, _, meaning = EXPERTS[name]
    return f"{letter}  {meaning}"


def frozen_table(stages: Mapping[str, Mapping[str, tuple[int, int]]]) -> Figure:
    """What is trained in which stage: a row for each component, a column for each stage.

    stages[stage][component] is (trainable parameters, all parameters), as `training.stages.trainable` counts them; a
    component that takes no part in a stage is left out of it. A full dot: trained. An empty dot: used, but frozen. A
    half dot: partly trained, with the number of trained parameters. A dash: not used. The last row has the sums.
    """
    sizes = {component: have for counts in stages.values() for component, (_, have) in counts.items()}
    rows, columns = list(sizes), list(stages)
    with style():
        figure, axes = new_figure(1, 1, min(WIDTH, 2.8 + 1.6 * len(columns)), 1.3 + 0.27 * len(rows))
        ax = axes[0, 0]
        for y, component in enumerate(rows):
            ax.text(-0.62, y, thousands(sizes[component]), ha="right", va="center", fontsize=9)
            for x, stage in enumerate(columns):
                if component not in stages[stage]:
                    ax.text(x, y, "–", ha="center", va="center")
                    continue
                learn, have = stages[stage][component]
                fill = "full" if learn == have else "left" if learn else "none"
                ax.plot(x, y, "o", color=GREEN, fillstyle=fill, ms=9, mew=1.4, markerfacecoloralt="none")
                if fill == "left":
                    ax.text(x + 0.1, y, thousands(learn), va="center", fontsize=9)
        sums = [sum(learn for learn, _ in stages[stage].values()) for stage in columns]
        for x, count in ((-0.62, sum(sizes.values())), *enumerate(sums)):
            ax.text(x, len(rows), thousands(count), ha="right" if x < 0 else "center", va="center", fontsize=9)
        for y in range(len(rows) + 1):
            ax.axhline(y - 0.5, color=INK, alpha=0.3 if y < len(rows) else 1, lw=0.6)
        ax.set_yticks(range(len(rows) + 1), [*(printable(component) for component in rows), "trained in all"])
        ax.set_xticks(range(len(columns)), [printable(stage) for stage in columns], fontweight="bold")
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.set(xlim=(-1, len(columns) - 0.5), ylim=(len(rows) + 0.5, -0.6))
        ax.spines[:].set_visible(False)
        marks = (("full", "trained"), ("none", "used, but frozen"))
        keys = [Line2D([], [], marker="o", color=GREEN, fillstyle=fill, ls="", ms=9, mew=1.4, label=label)
                for fill, label in marks]  # fmt: skip
        keys.append(Line2D([], [], marker="_", color=INK, ls="", ms=8, label="not used"))
        figure.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def thousands(count: int) -> str:
    """A rounded count: 3 M, 1.3 M, 132 k, 256."""
    if count < 1000:
        return str(count)
    return f"{count / 1e3:.0f} k" if count < 999_500 else f"{count / 1e6:.1f} M"


def word_attention(words: Sequence[str], maps: Mapping[str, np.ndarray]) -> Figure:
    """Which word (row) attends to which (column): a square for each of `maps` (L, L), all on the same scale from zero.

    A row that sums to less than one gives the rest to tokens that are not shown. Raises ValueError where a map has
    another size than the words.
    """
    found = {name: np.asarray(weights, dtype=np.float32) for name, weights in maps.items()}
    for name, weights in found.items():
        if weights.shape != (len(words),) * 2:
            raise ValueError(f"{name} is {weights.shape}; {len(words)} words need ({len(words)}, {len(words)}).")
    top = max(float(weights.max()) for weights in found.values())
    labels, columns = [printable(word) for word in words], min(len(found), 4)
    rows = -(-len(found) // columns)
    with style():
        figure, axes = new_figure(rows, columns, WIDTH, 0.6 + rows * (WIDTH / max(columns, 3) + 0.1), sharey=True)
        for ax in axes.flat[len(found) :]:
            ax.axis("off")
        for ax, (name, weights) in zip(axes.flat, found.items(), strict=False):
            drawn = ax.imshow(weights, cmap="cividis", vmin=0, vmax=top)
            ax.set_title(printable(name))
            ax.set_xticks(range(len(words)), labels, rotation=90, fontsize=8)
            ax.set_yticks(range(len(words)), labels, fontsize=8)
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.8, fraction=0.03, pad=0.01)
        bar.set_label("share of a row's attention")
        bar.outline.set_visible(False)
    return figure
