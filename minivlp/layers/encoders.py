"""The towers: an image encoder, a text encoder, and layers that fuse the two.

Axes: B batch, P patches, L text tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlp.layers.attention import KeysValues, Past, causal_mask, padding_mask
from minivlp.layers.block import Block, BlockConfig, initialise
from minivlp.layers.embed import PatchEmbed, TwoStepPatchEmbed, WordEmbed, resize_positions, sincos_positions


@dataclass(frozen=True)
class ImageConfig:
    """A vision transformer.

    image_size: side in pixels; other multiples of patch_size are accepted, positions are interpolated.
    two_step_patches and sincos_positions are ours (see `TwoStepPatchEmbed`, `sincos_positions`), the defaults are the
    published choices.
    norm_before: CLIP's extra LayerNorm between embedding and blocks. patch_bias: CLIP has none.
    """

    image_size: int
    patch_size: int
    layers: int
    block: BlockConfig
    two_step_patches: bool = False
    sincos_positions: bool = False
    norm_before: bool = False
    patch_bias: bool = True

    @property
    def grid(self) -> int:
        """Patches along a side at the configured image size."""
        return self.image_size // self.patch_size


class ImageEncoder(nn.Module):
    """images (B, 3, H, W) -> tokens (B, 1+P, D): the class token, then the patches row by row."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        if config.image_size % config.patch_size:
            raise ValueError(f"image size {config.image_size} is not a multiple of the patch size {config.patch_size}")
        self.config = config
        width, eps, grid = config.block.width, config.block.norm_eps, config.grid
        if config.two_step_patches:
            self.patches = TwoStepPatchEmbed(config.patch_size, width)
        else:
            self.patches = PatchEmbed(config.patch_size, width, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.randn(width) * width**-0.5)
        if config.sincos_positions:
            self.register_buffer("positions", sincos_positions(grid, grid, width), persistent=False)
        else:
            self.class_position = nn.Parameter(torch.randn(width) * width**-0.5)
            self.positions = nn.Parameter(torch.randn(grid * grid, width) * width**-0.5)
        self.norm_before = nn.LayerNorm(width, eps=eps) if config.norm_before else nn.Identity()
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=eps)
        initialise(self.blocks)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)  # (B, 1+P, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def embed(self, images: Tensor) -> Tensor:
        """Patches with their positions and the class token in front: what the first block sees, (B, 1+P, D)."""
        (height, width), patch = images.shape[-2:], self.config.patch_size
        if height % patch or width % patch:  # a convolution would silently cut the rest off
            raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {patch}")
        patches = self.patches(images)  # (B, D, rows, columns)
        rows, columns = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2) + self.positions_for(rows, columns)  # (B, P, D)
        first = self.class_token if self.config.sincos_positions else self.class_token + self.class_position
        return self.norm_before(torch.cat([first.expand(len(x), 1, -1), x], dim=1))

    def positions_for(self, rows: int, columns: int) -> Tensor:
        """Patch positions (P, D) for any grid."""
        grid = self.config.grid
        if self.config.sincos_positions and (rows, columns) != (grid, grid):
            return sincos_positions(rows, columns, self.config.block.width).to(self.positions)
        return resize_positions(self.positions, (grid, grid), (rows, columns))


@dataclass(frozen=True)
class TextConfig:
    """A text transformer.

    causal: CLIP's, where each token sees only what stands before it; otherwise BERT's. embed_norm: BERT's LayerNorm
    after the embedding. word_std, position_std: spread of the initial embeddings (CLIP's: .02 and .01).
    """

    vocabulary: int
    context_length: int
    layers: int
    block: BlockConfig
    causal: bool = False
    embed_norm: bool = False
    word_std: float = 0.02
    position_std: float = 0.01


class TextEncoder(nn.Module):
    """ids (B, L), mask (B, L) True on real tokens -> tokens (B, L, D). Outputs at padded positions mean nothing.

    With `context_width` each block can also look at a context, such as image tokens; without one given it does not.
    """

    def __init__(self, config: TextConfig, context_width: int | None = None) -> None:
        super().__init__()
        self.config = config
        width, eps = config.block.width, config.block.norm_eps
        norm_eps = eps if config.embed_norm else None
        self.embed = WordEmbed(
            config.vocabulary, config.context_length, width, config.word_std, config.position_std, norm_eps
        )
        self.blocks = nn.ModuleList(Block(config.block, context_width) for _ in range(config.layers))
        # in BERT's order each block already ends with a LayerNorm
        self.norm = nn.LayerNorm(width, eps=eps) if config.block.norm_first else nn.Identity()
        initialise(self.blocks)

    def keys_values(self, context: Tensor) -> list[KeysValues]:
        """As `FusionEncoder.keys_values`."""
        return [block.cross_attention.keys_values(context) for block in self.blocks]

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        context: Tensor | list[KeysValues] | None = None,
        context_mask: Tensor | None = None,
        past: list[Past] | None = None,
    ) -> Tensor:
        """`context`: tokens (B, K, D_context) to look at, or their `keys_values`; of those only at `context_mask`.

        `past`, for a causal text that is written bit by bit: one `Past` per block; `ids` are then the new tokens alone.
        A causal text needs no `mask`: what follows the last real token cannot be seen from it.
        """
        read = len(past[0]) if past else 0
        x = self.embed(ids, read)
        allowed = causal_mask(read + ids.shape[1], ids.device)[read:] if self.config.causal else padding_mask(mask)
        seen = None if context_mask is None else padding_mask(context_mask)
        for index, block in enumerate(self.blocks):
            look_at = context[index] if isinstance(context, list) else context
            x = block(x, allowed, look_at, seen, past[index] if past else None)
        return self.norm(x)


class FusionEncoder(nn.Module):
    """Text tokens that look at image tokens: x (B, L, D), context (B, K, D_image) -> (B, L, D)."""

    def __init__(self, layers: int, block: BlockConfig, context_width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(block, context_width) for _ in range(layers))
        self.norm = nn.LayerNorm(block.width, eps=block.norm_eps) if block.norm_first else nn.Identity()
        initialise(self.blocks)

    def keys_values(self, context: Tensor) -> list[KeysValues]:
        """Each layer's keys and values of the image tokens, so that many texts can share them."""
        return [block.cross_attention.keys_values(context) for block in self.blocks]

    def forward(
        self, x: Tensor, mask: Tensor, context: Tensor | list[KeysValues], context_mask: Tensor | None = None
    ) -> Tensor:
        """mask (B, L) True on real text tokens; context_mask (B, K) True on image tokens that may be looked at."""
        allowed = padding_mask(mask)
        seen = None if context_mask is None else padding_mask(context_mask)
        for index, block in enumerate(self.blocks):
            x = block(x, allowed, context[index] if isinstance(context, list) else context, seen)
        return self.norm(x)
