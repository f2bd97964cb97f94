"""The image tower and the text tower: an embedding and a stack of blocks.

Axes: B batch, P patches, L text tokens, M tokens that are read, D width.
"""

from __future__ import annotations

from torch import Tensor

from minivlp.data.batch import Text
from minivlp.layers.attention import KeysValues, KVCache, Rows, attention_mask, causal_mask
from minivlp.layers.embeddings import ImageConfig, ImageEmbedding, TextConfig, TextEmbedding
from minivlp.layers.transformer import Block, Transformer


class ImageEncoder(Transformer):
    """images (B, 3, H, W) -> tokens (B, 1+P, D): the class token, then the patches row by row."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__(config.block, (Block(config.block) for _ in range(config.layers)))
        self.config = config
        self.embed = ImageEmbedding(config)

    def forward(self, images: Tensor, rows: Rows | None = None) -> Tensor:
        """`rows`: which tokens will be read; `slice(0, 1)` is the class token alone."""
        return super().forward(self.embed(images), rows=rows)


class TextEncoder(Transformer):
    """Text (B, L) -> tokens (B, L, D). Outputs at padded positions are undefined.

    With `context_width` each block also has a cross-attention, which is left out where no context is given.
    """

    def __init__(self, config: TextConfig, context_width: int | None = None) -> None:
        super().__init__(config.block, (Block(config.block, context_width) for _ in range(config.layers)))
        self.config = config
        self.embed = TextEmbedding(config, config.block.norm_eps if config.embed_norm else None)

    def forward(
        self,
        text: Text,
        context: Tensor | list[KeysValues] | None = None,
        context_mask: Tensor | None = None,
        cache: list[KVCache] | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """`context`, `context_mask`, `rows` as in `Transformer`.

        `cache`, for a causal text that is generated token by token: one per block; `text` is then the new tokens alone.
        """
        read = len(cache[0]) if cache else 0
        if self.config.causal:
            mask = causal_mask(text.length, read, text.ids.device)  # (1, 1, L, read + L)
        else:
            mask = attention_mask(text.mask)
        return super().forward(self.embed(text.ids, read), mask, context, context_mask, cache, rows)
