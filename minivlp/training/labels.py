"""Supervised pre-training of an image tower on labels alone, as ViT and DeiT are trained on ImageNet: no text.

Some experiments need an image tower, although no part of the model may have read a clean caption before (CapFilt). The
labels say which object each patch shows and in which color, and which objects are in the image.
Axes: B batch, P patches = rows * columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import moved, to_tensor
from minivlp.data.grammar import COLORS, OBJECTS, SHAPES
from minivlp.data.scene import Scene
from minivlp.layers.embeddings import ImageConfig
from minivlp.layers.towers import ImageEncoder

NOUN_IDS = {noun: number for number, noun in enumerate((*SHAPES, *OBJECTS), start=1)}  # 0 is the background
COLOR_IDS = {color: number for number, color in enumerate(COLORS, start=1)}  # 0: background, and objects of many colors


@dataclass(frozen=True)
class LabeledConfig:
    """The size of the tower."""

    image: ImageConfig


@dataclass
class LabeledImages:
    """Images, and for each patch the label of the object that it shows and of its color."""

    images: Tensor  # (B, 3, H, W) float, in [-1, 1]
    nouns: Tensor  # (B, P) long, of NOUN_IDS
    colors: Tensor  # (B, P) long, of COLOR_IDS

    def to(self, device: torch.device | str) -> LabeledImages:
        """The same batch on another device."""
        return moved(self, device)


class LabeledTower(nn.Module):
    """An `ImageEncoder` as `image`, so that its checkpoint can initialize other models, and a classifier per label."""

    Config = LabeledConfig

    def __init__(self, config: LabeledConfig) -> None:
        super().__init__()
        self.config, width = config, config.image.block.width
        self.image = ImageEncoder(config.image)
        self.noun_head = nn.Linear(width, 1 + len(NOUN_IDS))
        self.color_head = nn.Linear(width, 1 + len(COLOR_IDS))
        self.presence_head = nn.Linear(width, 1 + len(NOUN_IDS))

    def losses(self, batch: LabeledImages) -> dict[str, Tensor]:
        """Cross-entropies of each patch's `noun` and `color`, and `presence`: from the class token, which nouns are in
        the image. The presence term is a mean over all nouns, most of which are absent, hence its weight."""
        tokens = self.image(batch.images)
        whole, patches = tokens[:, 0], tokens[:, 1:]
        present = torch.zeros(len(whole), 1 + len(NOUN_IDS), device=whole.device).scatter_(1, batch.nouns, 1.0)
        presence = F.binary_cross_entropy_with_logits(self.presence_head(whole).float(), present)
        return {
            "noun": F.cross_entropy(self.noun_head(patches).flatten(0, 1).float(), batch.nouns.flatten()),
            "color": F.cross_entropy(self.color_head(patches).flatten(0, 1).float(), batch.colors.flatten()),
            "presence": presence * len(NOUN_IDS) / 4,
        }


def patch_labels(scene: Scene, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels of nouns and of colors by patch, row by row, (P,) each, on a `grid` of (rows, columns).

    A patch has the label of the object in whose box its center lies; boxes of different objects do not overlap.
    """
    nouns, colors = np.zeros((2, *grid), dtype=np.int64)
    y, x = ((np.arange(count) + 0.5) * scene.side / count for count in grid)  # centers of rows and columns
    for shown in scene.objects:
        for left, top, right, bottom in shown.boxes:
            inside = np.ix_((top <= y) & (y < bottom), (left <= x) & (x < right))
            nouns[inside], colors[inside] = NOUN_IDS[shown.noun], COLOR_IDS.get(shown.color, 0)
    return nouns.ravel(), colors.ravel()


def labeled_batches(scenes: Any, config: ImageConfig, batch_size: int, seed: int = 0) -> Callable[[int], LabeledImages]:
    """The batch of a training step, for `fit`; `scenes` are `Scenes`."""

    def batch(step: int) -> LabeledImages:
        rows = np.random.default_rng((seed, step)).integers(len(scenes), size=batch_size)
        found = [patch_labels(scenes.scene(int(row)), config.grid) for row in rows]
        nouns, colors = (torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))
        return LabeledImages(to_tensor(scenes.pixels(rows, config.image_size)), nouns, colors)

    return batch
