"""From pixels and word pieces to tokens: patches, words, and where they are.

Axes: B batch, P patches = rows * columns, L text tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each (Dosovitskiy et al. 2021, section 3.1).

    images (B, 3, H, W) -> (B, D, rows, columns).
    """

    def __init__(self, patch_size: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(images)


class TwoStepPatchEmbed(nn.Module):
    """Quarter patches first, then four of them merged: a little depth where the pixels come in, matmuls only.

    Ours, not a paper's: in a prototype, over minutes of training, it learnt faster than a single projection.
    images (B, 3, H, W) -> (B, D, rows, columns).
    """

    def __init__(self, patch_size: int, width: int, inner: int = 64) -> None:
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"two-step patches need an even patch size, not {patch_size}")
        self.half = patch_size // 2
        self.project = nn.Linear(3 * self.half**2, inner)
        self.norm = nn.LayerNorm(inner)
        self.merge = nn.Linear(4 * inner, width)

    def forward(self, images: Tensor) -> Tensor:
        quarters = F.pixel_unshuffle(images, self.half).permute(0, 2, 3, 1)  # (B, 2 rows, 2 columns, 3 half^2)
        quarters = F.relu_(self.norm(self.project(quarters)))  # (B, 2 rows, 2 columns, inner)
        merged = quarters.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, rows, 2, columns, 2, inner)
        merged = merged.transpose(2, 3).flatten(3)  # (B, rows, columns, 4 inner)
        return self.merge(merged).permute(0, 3, 1, 2)  # (B, D, rows, columns)


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of unit scale, (rows * columns, D).

    A quarter of the channels each holds sin and cos of x, sin and cos of y, from two waves over the whole image down
    to about a fiftieth of a wave. They are measured in fractions of the image, so any grid gets the same code for the
    same place. Unit scale matters more than it looks: with small learned positions our prototype's box head learnt
    nothing in minutes (docs/recipe.md).
    """
    if width % 4:
        raise ValueError(f"2-D positions need a width that is a multiple of 4, not {width}")
    frequencies = 4 * math.pi / 100 ** (torch.arange(width // 4) / (width // 4))  # (D/4,)
    y, x = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]  # each (P, D/4)
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)  # (P, D)


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bicubic", align_corners: bool = False
) -> Tensor:
    """A learned table of patch positions (P_old, D) on another grid, (P_new, D); `mode` as in `F.interpolate`."""
    if old == new:
        return positions
    table = positions.unflatten(0, old).permute(2, 0, 1)[None]  # (1, D, rows, columns)
    table = F.interpolate(table, size=new, mode=mode, align_corners=align_corners)
    return table[0].permute(1, 2, 0).flatten(0, 1)  # (P_new, D)


class WordEmbed(nn.Module):
    """Word piece plus learned position, and BERT's LayerNorm where `norm_eps` is given: ids (B, L) -> (B, L, D).

    BERT's token-type embedding is the same vector for every token of a single text; when official weights are loaded it
    is added to the positions. `position_std` None is no positions: the attention knows them (`layers.relative`).
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        word_std: float,
        position_std: float | None,
        norm_eps: float | None,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        if position_std is None:
            self.register_buffer("positions", torch.zeros(length, width), persistent=False)
        else:
            self.positions = nn.Parameter(torch.empty(length, width).normal_(std=position_std))
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)
        nn.init.normal_(self.words.weight, std=word_std)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """`start`: the place of the first of these tokens in the text."""
        end = start + ids.shape[1]
        if end > len(self.positions):
            raise ValueError(
                f"texts of {end} tokens, but the model has positions for {len(self.positions)}: "
                f"encode with max_tokens={len(self.positions)}"
            )
        return self.norm(self.words(ids) + self.positions[start:end])
