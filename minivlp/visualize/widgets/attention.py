"""Where does a word look?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import traitlets as T

from minivlp.data.batch import Box, Region
from minivlp.data.text import words
from minivlp.layers.attention import record_attention
from minivlp.visualize.attention import word_patch_similarity
from minivlp.visualize.widgets.asking import looking, pixels_of, texts_of
from minivlp.visualize.widgets.base import Widget, source
from minivlp.visualize.widgets.pictures import Picture, data_url, png, rgb


class AttentionViewer(Widget):
    """Which patches does a word look at, and which words look at a patch?

    Point at a word or click it: a heat-map falls on the image. Click a patch: bars fill the words that look there.
    Layer, head and temperature are chosen in the widget.

    Args:
        image: any PIL image, or uint8 pixels (H, W, 3) or (H, W).
        words: L of them, as they are to be shown.
        attention: (layers, heads, L, P), not negative, patches row by row; a class token must have been left out.
        grid: rows and columns of patches.
        boxes: what is known to be where, as `Region`s or pairs (name, box): drawn with the words that name them.

    Raises ValueError when the numbers do not fit each other, or are negative or not finite.
    """

    _esm = source("attention")
    image = T.Unicode().tag(sync=True)
    words = T.List(T.Unicode()).tag(sync=True)
    attention = T.Bytes().tag(sync=True)
    shape = T.List(T.Int()).tag(sync=True)
    grid = T.List(T.Int()).tag(sync=True)
    boxes = T.List().tag(sync=True)
    layer = T.Int().tag(sync=True)
    head = T.Int(-1, help="-1 is the mean of all heads").tag(sync=True)
    temperature = T.Float(1.0).tag(sync=True)
    word = T.Int(-1).tag(sync=True)
    patch = T.Int(-1).tag(sync=True)

    def __init__(
        self,
        image: Picture,
        words: Sequence[str],
        attention: np.ndarray | torch.Tensor,
        grid: tuple[int, int],
        boxes: Iterable[Region | tuple[str, Box]] = (),
    ) -> None:
        if isinstance(attention, torch.Tensor):
            attention = attention.detach().float().cpu().numpy()
        weights = np.ascontiguousarray(attention, dtype=np.float32)  # (layers, heads, L, P)
        rows, columns = grid
        if weights.ndim != 4 or weights.shape[2:] != (len(words), rows * columns):
            raise ValueError(
                f"attention has shape {weights.shape}; {len(words)} words and a grid of {rows} x {columns} ask for "
                f"(layers, heads, {len(words)}, {rows * columns}). Leave the class token out."
            )
        if weights.size == 0 or not np.isfinite(weights).all() or weights.min() < 0:
            raise ValueError("attention must hold finite numbers that are not negative, and at least one of them")
        self.weights, self.pixels = weights, rgb(image)
        super().__init__(
            image=data_url(self.pixels),
            words=list(words),
            attention=weights.tobytes(),
            shape=list(weights.shape),
            grid=[rows, columns],
            boxes=[[name, list(map(float, box))] for name, box in map(name_and_box, boxes or ())],
            layer=len(weights) - 1,
            word=int(self.shares().max(axis=1).argmax()),  # begin with the word that looks at one place most
        )

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        image: Picture,
        caption: str,
        tokenizer: Any,
        boxes: Iterable[Region | tuple[str, Box]] = (),
    ) -> AttentionViewer:
        """Run `model` on an image and a caption and show how its words look at the patches.

        Models with cross-attention show that of all layers and heads. A model whose words and patches never meet (CLIP)
        shows the cosine of each word's vector with each patch's in the joint space, as a softmax over the patches with
        temperature 0.07: no attention, but the nearest thing to it. Words of several pieces show the mean of their
        pieces. Raises TypeError when the model has neither.
        """
        images, (ids, mask) = pixels_of(model, [image]), texts_of(model, tokenizer, [caption])
        with looking(model), record_attention(model) as maps:
            verb = next((getattr(model, name) for name in ("match", "ground", "fill") if hasattr(model, name)), None)
            if verb is not None:
                verb(images, ids, mask)
            names = sorted((n for n in maps if n.endswith(".cross")), key=lambda n: int(n.split(".")[1]))
            if names:
                weights = torch.stack([maps[name][0] for name in names])[..., 1:]  # (layers, H, L, P): no class token
            else:
                near = word_patch_similarity(model, images, ids, mask)  # (1, L, P)
                weights = (near / 0.07).softmax(dim=-1)[None]  # (1, 1, L, P)
        found = words(tokenizer, ids[0])
        if not found:
            raise ValueError(f"the caption {caption!r} has no words")
        weights = torch.stack([weights[:, :, pieces].mean(dim=2) for _, pieces in found], dim=2)
        side = math.isqrt(weights.shape[-1])
        return cls(image, [word for word, _ in found], weights, (side, side), boxes)

    def shares(self) -> np.ndarray:
        """(L, P): the chosen layer and head (or the mean of the heads), each word's weights summing to one."""
        layer = self.weights[self.layer if self.shape else -1]
        chosen = layer.mean(axis=0) if self.head < 0 else layer[self.head]
        return chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1e-12)

    def __repr__(self) -> str:
        layers, heads, words, _ = self.shape
        rows, columns = self.grid
        return f"AttentionViewer(words={words}, grid={rows}x{columns}, layers={layers}, heads={heads})"

    def to_png(self) -> bytes:
        from minivlp.visualize.drawing import attention_figure

        maps = self.shares().reshape(-1, *self.grid)  # (L, rows, columns)
        return png(attention_figure(np.asarray(self.pixels), self.words, maps))


def name_and_box(what: Region | tuple[str, Box]) -> tuple[str, Box]:
    return (what.phrase, what.box) if isinstance(what, Region) else what
