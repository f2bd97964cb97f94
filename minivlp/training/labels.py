"""An image tower that has learnt from labels alone, as those of the papers have from ImageNet: no sentence, no phrase.

What ViT and DeiT are to BLIP and ALBEF, this tower is to experiments in which no part of a model may have read a clean
caption before. A label says which thing a patch shows and in which colour, and which things are in the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import to_tensor
from minivlp.data.grammar import COLORS, OBJECTS, SHAPES
from minivlp.data.scene import Scene
from minivlp.layers.encoders import ImageConfig, ImageEncoder

NOUNS = {noun: number for number, noun in enumerate((*SHAPES, *OBJECTS), start=1)}  # 0: the ground
PAINTS = {color: number for number, color in enumerate(COLORS, start=1)}  # 0: the ground, and things with many colours


@dataclass(frozen=True)
class LabelledConfig:
    """The tower's size."""

    image: ImageConfig


@dataclass
class Labelled:
    """Pictures, and the number of the noun and of the colour that each patch shows."""

    images: Tensor  # (B, 3, H, W) float, in [-1, 1]
    nouns: Tensor  # (B, P) long
    colors: Tensor  # (B, P) long

    def to(self, device: torch.device | str) -> Labelled:
        return Labelled(*(x.to(device) for x in (self.images, self.nouns, self.colors)))


class LabelledTower(nn.Module):
    """An `ImageEncoder` as `image`, so that its checkpoint can start other models, and what it is asked."""

    Config = LabelledConfig

    def __init__(self, config: LabelledConfig) -> None:
        super().__init__()
        self.config, width = config, config.image.block.width
        self.image = ImageEncoder(config.image)
        self.noun_head, self.color_head = nn.Linear(width, 1 + len(NOUNS)), nn.Linear(width, 1 + len(PAINTS))
        self.there_head = nn.Linear(width, 1 + len(NOUNS))

    def losses(self, batch: Labelled) -> dict[str, Tensor]:
        """Of each patch: which noun, which colour? Of the whole picture, by the class token: which nouns are there?"""
        tokens = self.image(batch.images)
        whole, patches = tokens[:, 0], tokens[:, 1:]
        there = torch.zeros(len(whole), 1 + len(NOUNS), device=whole.device).scatter_(1, batch.nouns, 1.0)
        return {
            "noun": F.cross_entropy(self.noun_head(patches).flatten(0, 1).float(), batch.nouns.flatten()),
            "colour": F.cross_entropy(self.color_head(patches).flatten(0, 1).float(), batch.colors.flatten()),
            "there": F.binary_cross_entropy_with_logits(self.there_head(whole).float(), there) * len(NOUNS) / 4,
        }


def labels_of(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of nouns and of colours by patch, row by row, (P,) each: a patch is the thing's whose box has its middle.

    Boxes of different things never meet.
    """
    nouns, colors = np.zeros((2, grid, grid), dtype=np.int64)
    middle = (np.arange(grid) + 0.5) * scene.side / grid
    for thing in scene.things:
        for left, top, right, bottom in thing.boxes:
            inside = np.ix_((top <= middle) & (middle < bottom), (left <= middle) & (middle < right))
            nouns[inside], colors[inside] = NOUNS[thing.noun], PAINTS.get(thing.color, 0)
    return nouns.ravel(), colors.ravel()


def labelled_batches(scenes: Any, config: ImageConfig, batch_size: int, seed: int = 0) -> Callable[[int], Labelled]:
    """The batch of a training step, for `fit`; `scenes` are `Scenes`."""

    def batch(step: int) -> Labelled:
        rows = np.random.default_rng((seed, step)).integers(len(scenes), size=batch_size)
        found = [labels_of(scenes.scene(int(row)), config.grid) for row in rows]
        nouns, colors = (torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))
        return Labelled(to_tensor(scenes.pixels(rows, config.image_size)), nouns, colors)

    return batch
