"""The Swin transformer (Liu et al., ICCV 2021) as an image tower, taken from timm.

Axes: B batch, P patches = rows * columns of the last stage, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlp.layers.attention import Rows, select
from minivlp.layers.embeddings import ImageConfig


@dataclass(frozen=True)
class SwinConfig(ImageConfig):
    """X-VLM's image tower. `patch_size` and `block` are those of the last stage."""

    first_patch: int = 4
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 7


class SwinEncoder(nn.Module):
    """timm's Swin transformer as an image tower: images (B, 3, H, W) -> tokens (B, 1+P, D), their mean first.

    `normalize` as in `ImageEmbedding`.
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformer  # only the paper's size needs it

        self.normalize: nn.Module = nn.Identity()
        self.swin = SwinTransformer(
            img_size=config.size,
            patch_size=config.first_patch,
            embed_dim=config.block.width // 2 ** (len(config.depths) - 1),
            depths=config.depths,
            num_heads=config.heads,
            window_size=config.window,
            num_classes=0,
            drop_path_rate=0.0,  # as everywhere here: a forward pass draws nothing at random
        )
        for block in (block for stage in self.swin.layers for block in stage.blocks):
            if min(block.input_resolution) <= config.window:  # one window high or wide: as released, no shift at all;
                block.shift_size = (0, 0)  # timm would shift along the other side
                block.register_buffer("attn_mask", None, persistent=False)

    def block_matrices(self) -> Iterator[tuple[nn.Parameter, int]]:
        """The matrices of its blocks (for the optimizer); relative-position tables are none."""
        for name, layer in self.swin.layers.named_modules():
            if isinstance(layer, nn.Linear):
                yield layer.weight, 3 if name.endswith("qkv") else 1

    def forward(self, images: Tensor, rows: Rows | None = None) -> Tensor:
        patches = self.swin.forward_features(self.normalize(images)).flatten(1, 2)  # (B, rows, columns, D) -> (B, P, D)
        tokens = torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)  # (B, 1+P, D)
        return tokens if rows is None else select(tokens, rows)
