"""What does a word attend to?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import traitlets as T

from minivlp.data.batch import Box, Region, Text
from minivlp.data.pictures import Picture
from minivlp.data.text import group_words
from minivlp.inference import evaluating, tokenize_for
from minivlp.layers.attention import record_attention
from minivlp.visualize.attention import word_patch_attention, word_patch_similarity
from minivlp.visualize.widgets.base import Widget, source
from minivlp.visualize.widgets.pictures import data_url, pixels_of, png, rgb


class AttentionViewer(Widget):
    """Which patches does a word attend to, and which words attend to a patch?

    Point at a word or click it: a heat map is drawn on the image. Click a patch: bars in the words show how much each
    attends to it. Layer, head and temperature are chosen in the widget.

    Args:
        image: any picture: PIL, path, array (see `minivlp.data.pictures.to_rgb`).
        words: L of them, as they are shown.
        attention: (layers, heads, L, P), not negative, patches row by row; a class token must have been left out.
        grid: rows and columns of patches.
        boxes: what is known to be where, as `Region`s or pairs (name, box): drawn with the words that name them.
        names: one for each layer, where the maps are not layers of a model: "attention", "Grad-CAM", ...

    Raises ValueError where the shapes do not fit, and for weights that are negative or not finite.
    """

    _esm = source("attention")
    image = T.Unicode().tag(sync=True)
    words = T.List(T.Unicode()).tag(sync=True)
    attention = T.Bytes().tag(sync=True)
    shape = T.List(T.Int()).tag(sync=True)
    grid = T.List(T.Int()).tag(sync=True)
    boxes = T.List().tag(sync=True)
    names = T.List(T.Unicode()).tag(sync=True)
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
        names: Sequence[str] = (),
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
        if names and len(names) != len(weights):
            raise ValueError(f"{len(names)} names for {len(weights)} layers of attention: give one for each")
        self.weights, self.pixels = weights, rgb(image)
        super().__init__(
            image=data_url(self.pixels),
            words=list(words),
            attention=weights.tobytes(),
            shape=list(weights.shape),
            grid=[rows, columns],
            boxes=[[name, list(map(float, box))] for name, box in map(name_and_box, boxes or ())],
            names=list(names),
            layer=len(weights) - 1,
            word=int(self.shares().max(axis=1).argmax()),  # begin with the word with the sharpest map
        )

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        image: Picture,
        caption: str,
        tokenizer: Any,
        boxes: Iterable[Region | tuple[str, Box]] = (),
        maps: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    ) -> AttentionViewer:
        """Run `model` on an image and a caption, and show the attention of its words to the patches.

        For a model whose text attends to patches (by cross-attention, or in one joint sequence): the attention of all
        layers and heads. For a dual encoder such as CLIP: the cosine of each word with each patch in the joint space
        (`word_patch_similarity`), as a softmax over the patches with temperature 0.07, which is no attention.

        `maps` shows other weights, such as Grad-CAM or a transport plan: (layers, heads, L, P), (heads, L, P) or (L, P)
        for the L tokens of the caption as `tokenize` makes them and the P patches without the class token; or several
        by name, {"Grad-CAM": (L, P), ...}.

        A word of several pieces shows their mean. Raises ValueError for a caption without words and for maps of another
        length, TypeError where the model has nothing to show.
        """
        text = tokenize_for(model, tokenizer, [caption])
        found, names = group_words(tokenizer, text.ids[0]), ()
        if not found:
            raise ValueError(f"the caption {caption!r} has no words")
        if maps is None:
            weights = attention_of(model, pixels_of(model, [image]), text)
        elif isinstance(maps, Mapping):
            names, weights = tuple(maps), stacked(list(maps.values()))
        else:
            weights = torch.as_tensor(maps)[(None,) * (4 - maps.ndim)]
        if weights.shape[2] != text.length:
            raise ValueError(
                f"maps of {weights.shape[2]} tokens, but {caption!r} has {text.length}, including [CLS] and [SEP]"
            )
        weights = torch.stack([weights[:, :, pieces].mean(dim=2) for _, pieces in found], dim=2)
        return cls(image, [word for word, _ in found], weights, model.config.image.grid, boxes, names)

    def shares(self) -> np.ndarray:
        """(L, P): the chosen layer and head (or the mean of the heads), each word's weights summing to one."""
        layer = self.weights[self.layer if self.shape else -1]
        chosen = layer.mean(axis=0) if self.head < 0 else layer[self.head]
        return chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1e-12)

    def __repr__(self) -> str:
        layers, heads, length, _ = self.shape
        rows, columns = self.grid
        return f"AttentionViewer(words={length}, grid={rows}x{columns}, layers={layers}, heads={heads})"

    def to_png(self) -> bytes:
        from minivlp.visualize.drawing import attention_figure

        maps = self.shares().reshape(-1, *self.grid)  # (L, rows, columns)
        return png(attention_figure(np.asarray(self.pixels), self.words, maps))


def name_and_box(what: Region | tuple[str, Box]) -> tuple[str, Box]:
    """A region, or a pair as it is, as (name, box)."""
    return (what.phrase, what.box) if isinstance(what, Region) else what


def attention_of(model: torch.nn.Module, images: torch.Tensor, text: Text) -> torch.Tensor:
    """What the first text attends to in the first image, (layers, H, L, P); cosines for a dual encoder."""
    with evaluating(model), record_attention(model) as maps:
        verb = next((getattr(model, name) for name in ("match", "ground", "mlm_logits") if hasattr(model, name)), None)
        if verb is not None:
            verb(images, text)
        found = word_patch_attention(maps, text.length)
    if found:
        return torch.stack([weights[0] for weights in found.values()])
    return (word_patch_similarity(model, images, text) / 0.07).softmax(dim=-1)[None]  # (1, 1, L, P)


def stacked(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Maps (L, P) or (heads, L, P) as (maps, heads, L, P); the mean of the heads where their numbers differ."""
    maps = [one[None] if one.dim() == 2 else one for one in map(torch.as_tensor, maps)]
    if len({len(one) for one in maps}) > 1:
        maps = [one.mean(dim=0, keepdim=True) for one in maps]
    return torch.stack(maps)
