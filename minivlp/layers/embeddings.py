"""From pixels and word pieces to tokens: patches, token ids, and their positions.

Axes: B batch, P patches = rows * columns, L text tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers.transformer import BlockConfig


@dataclass(frozen=True)
class ImageConfig:
    """A vision transformer.

    image_size: pixels of a side, or (height, width). Other multiples of patch_size are accepted as input; positions are
    interpolated. two_step_patches and sincos_positions are ours (see `TwoStepPatchEmbed`, `sincos_positions`); the
    defaults are the published choices. relative_positions: the attention knows them (`layers.relative`), the embedding
    adds none. ln_pre: CLIP's extra LayerNorm between embedding and blocks. patch_bias: CLIP has none. class_token:
    whether one stands in front of the patches; CoCa has none, and what is said of 1+P tokens is then true of P.
    """

    image_size: int | tuple[int, int]
    patch_size: int
    layers: int
    block: BlockConfig
    two_step_patches: bool = False
    sincos_positions: bool = False
    relative_positions: bool = False
    ln_pre: bool = False
    patch_bias: bool = True
    class_token: bool = True

    @classmethod
    def nano(cls, layers: int = 3, ln_pre: bool = False) -> ImageConfig:
        """The image tower of the nano models: 64 patches of 8 x 8 pixels."""
        return cls(64, 8, layers, BlockConfig.nano(), two_step_patches=True, sincos_positions=True, ln_pre=ln_pre)

    @classmethod
    def small(cls, layers: int = 8, ln_pre: bool = False) -> ImageConfig:
        """The image tower of the small models: 256 patches of 8 x 8 pixels."""
        return cls(128, 8, layers, BlockConfig.small(), two_step_patches=True, sincos_positions=True, ln_pre=ln_pre)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the configured image size."""
        height, width = self.size
        return height // self.patch_size, width // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """A text transformer.

    causal: CLIP's, where each token attends only to itself and earlier ones; otherwise BERT's. embed_norm: BERT's
    LayerNorm after the embedding. word_std, position_std: spread of the initial embeddings (CLIP's: .02 and .01);
    position_std None is no positions (the attention knows them).
    """

    vocabulary: int
    context_length: int
    layers: int
    block: BlockConfig
    causal: bool = False
    embed_norm: bool = False
    word_std: float = 0.02
    position_std: float | None = 0.01

    @classmethod
    def nano(cls, vocabulary: int = 1200, layers: int = 2, causal: bool = False) -> TextConfig:
        """The text tower of the nano models. Wider initial embeddings learn faster in minutes (docs/recipe.md)."""
        return cls(vocabulary, 56, layers, BlockConfig.nano(), causal, word_std=0.5, position_std=0.2)

    @classmethod
    def small(cls, vocabulary: int = 30522, layers: int = 4, causal: bool = False) -> TextConfig:
        """The text tower of the small models."""
        return cls(vocabulary, 64, layers, BlockConfig.small(), causal, word_std=0.5, position_std=0.2)


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
    """Quarter patches first, then four of them merged: two layers where the pixels come in, matrix products only.

    Ours, not a paper's: in a prototype, over minutes of training, it learned faster than a single projection.
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


class PixelNormalization(nn.Module):
    """Our pixels, in [-1, 1], as a model expects them that was trained on pixels of 0..1 less `mean` over `std`.

    images (B, 3, H, W) -> the same shape.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        scale, shift = pixel_change(mean, std)
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale.to(images) + self.shift.to(images)


def pixel_change(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """scale and shift (3,) that bring pixels in [-1, 1] to what `mean` and `std` make of pixels in 0..1."""
    mean_, std_ = torch.tensor(mean), torch.tensor(std)
    return 0.5 / std_, (0.5 - mean_) / std_


class ImageEmbedding(nn.Module):
    """images (B, 3, H, W) -> the tokens that the first block gets, (B, 1+P, D): class token, then patches row by row.

    `normalize` is applied to the pixels first: nothing, unless released weights are to take our pixels
    (`PixelNormalization`).
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        width, patch, (rows, columns) = config.block.width, config.patch_size, config.grid
        for side in config.size:
            if side % patch:
                raise ValueError(f"image size {side} is not a multiple of the patch size {patch}")
        self.normalize: nn.Module = nn.Identity()
        self.patches = (
            TwoStepPatchEmbed(patch, width)
            if config.two_step_patches
            else PatchEmbed(patch, width, bias=config.patch_bias)
        )
        if config.class_token:
            self.class_token = nn.Parameter(torch.randn(width) * width**-0.5)
        if config.sincos_positions:
            self.register_buffer("positions", sincos_positions(rows, columns, width), persistent=False)
        elif not config.relative_positions:
            if config.class_token:
                self.class_position = nn.Parameter(torch.randn(width) * width**-0.5)
            self.positions = nn.Parameter(torch.randn(rows * columns, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width, eps=config.block.norm_eps) if config.ln_pre else nn.Identity()

    def forward(self, images: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """`mask_token` (D,) takes the place of the patches `masked` (B, P), before positions are added."""
        patches = self.cut(images)  # (B, D, rows, columns)
        x = patches.flatten(2).transpose(1, 2)  # (B, P, D)
        if masked is not None:
            x = torch.where(masked[..., None], mask_token.to(x.dtype), x)
        positions = self.positions_on(*patches.shape[-2:])
        return self.with_class_token(x if positions is None else x + positions)

    def cut(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> projected patches (B, D, rows, columns)."""
        (height, width), patch = images.shape[-2:], self.config.patch_size
        if height % patch or width % patch:  # a convolution would silently cut the rest off
            raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {patch}")
        return self.patches(self.normalize(images))

    def with_class_token(self, x: Tensor) -> Tensor:
        """Patches with their positions (B, P, D) -> (B, 1+P, D), or (B, P, D) where there is no class token."""
        if not self.config.class_token:
            return self.ln_pre(x)
        learned = hasattr(self, "class_position")
        first = self.class_token + self.class_position if learned else self.class_token
        return self.ln_pre(torch.cat([first.to(x.dtype).expand(len(x), 1, -1), x], dim=1))

    def positions_on(self, rows: int, columns: int) -> Tensor | None:
        """Patch positions (P, D) on any grid; None where the attention knows them, for the configured grid alone."""
        config = self.config
        if config.relative_positions:
            if (rows, columns) != config.grid:
                (height, width), patch = config.size, config.patch_size
                raise ValueError(
                    f"relative positions are learned for images of {height} x {width} pixels, "
                    f"not {rows * patch} x {columns * patch}"
                )
            return None
        if config.sincos_positions and (rows, columns) != config.grid:
            return sincos_positions(rows, columns, config.block.width).to(self.positions)
        return self.resized(rows, columns)

    def resized(self, rows: int, columns: int) -> Tensor:
        """The table of positions on another grid."""
        return resize_positions(self.positions, self.config.grid, (rows, columns))


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of unit scale, (rows * columns, D).

    A quarter of the channels each holds sin and cos of x, sin and cos of y, from two waves over the whole image down
    to about a fiftieth of a wave. They are measured in fractions of the image, so any grid gets the same code for the
    same place. The unit scale matters: with small learned positions the box head of a prototype learned nothing in
    minutes (docs/recipe.md).
    """
    if width % 4:
        raise ValueError(f"2-D positions need a width that is a multiple of 4, not {width}")
    frequencies = 4 * math.pi / 100 ** (torch.arange(width // 4) / (width // 4))  # (D/4,)
    y, x = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]  # (P, D/4) each
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)  # (P, D)


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bicubic", align_corners: bool = False
) -> Tensor:
    """A learned table of patch positions (P_old, D) on another grid, (P_new, D); `mode` as in `F.interpolate`."""
    if tuple(old) == tuple(new):
        return positions
    table = positions.unflatten(0, old).permute(2, 0, 1)[None]  # (1, D, rows, columns)
    table = F.interpolate(table, size=new, mode=mode, align_corners=align_corners)
    return table[0].permute(1, 2, 0).flatten(0, 1)  # (P_new, D)


class TextEmbedding(nn.Module):
    """Token embedding plus learned position, and BERT's LayerNorm where `norm_eps` is given: ids (B, L) -> (B, L, D).

    BERT's token-type embedding is the same vector for every token of a single text; when official weights are loaded it
    is added to the positions.
    """

    def __init__(self, config: TextConfig, norm_eps: float | None = None) -> None:
        super().__init__()
        width, length = config.block.width, config.context_length
        self.token = nn.Embedding(config.vocabulary, width)
        if config.position_std is None:
            self.register_buffer("position", torch.zeros(length, width), persistent=False)
        else:
            self.position = nn.Parameter(torch.empty(length, width).normal_(std=config.position_std))
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)
        nn.init.normal_(self.token.weight, std=config.word_std)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """`start`: the position of the first of these tokens in the text."""
        end = start + ids.shape[1]
        if end > len(self.position):
            raise ValueError(
                f"texts of {end} tokens, but the model has positions for {len(self.position)}: "
                f"tokenize with max_tokens={len(self.position)}"
            )
        return self.norm(self.token(ids) + self.position[start:end])
