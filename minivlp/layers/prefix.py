"""A decoder that reads an image as the beginning of its text: GIT's.

Axes: B batch, P prefix tokens (of an image: patches and class tokens), L text tokens, M tokens that are read, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.layers.attention import KeysValues, KVCache, Rows, attention_mask, causal_mask
from minivlp.layers.embeddings import TextConfig, TextEmbedding
from minivlp.layers.transformer import Block, Transformer


class PrefixDecoder(Transformer):
    """One self-attention for a prefix and the text behind it; there is no cross-attention.

    Prefix tokens attend to the prefix alone, text tokens to the prefix and to the text up to themselves. So the prefix
    does not depend on the text: `keys_values` computes what texts attend to, once for any number of texts.

    Args:
        project: from prefix tokens (B, P, D_prefix) to the decoder's width (B, P, D). The prefix gets no positions.
        embed_eps: epsilon of the LayerNorm behind the text embedding, where `config.embed_norm` asks for it.
    """

    def __init__(self, config: TextConfig, project: nn.Module, embed_eps: float) -> None:
        super().__init__(config.block, (Block(config.block) for _ in range(config.layers)))
        self.config = config
        self.project = project
        self.embed = TextEmbedding(config, embed_eps if config.embed_norm else None)

    def keys_values(self, context: Tensor) -> list[KeysValues]:
        """Each block's keys and values of the prefix tokens (B, P, D_prefix).

        Of the last block nothing else is computed: no output of the prefix is read.
        """
        cache = [KVCache() for _ in self.blocks]
        self.run(self.project(context), range(len(self.blocks)), cache=cache, rows=slice(0, 0))
        return [layer.keys_values for layer in cache]

    def forward(
        self,
        text: Text,
        context: Tensor | list[KeysValues],
        cache: list[KVCache] | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Texts (B, L) behind their prefixes -> text tokens (B, L, D), or the `rows` of them (B, M, D).

        context: prefix tokens (B, P, D_prefix), or their `keys_values`. cache: one per block, empty at first, for a
        text that is generated token by token; it keeps the prefix and the text so far, and `text` is the new tokens
        alone. Padding stands at the end of a text; outputs there are undefined.
        """
        context = context if isinstance(context, list) else self.keys_values(context)
        cache = [KVCache() for _ in self.blocks] if cache is None else cache
        if not len(cache[0]):
            for layer, (keys, values) in zip(cache, context, strict=True):
                layer.add(keys, values)
        read = len(cache[0])  # the prefix, and the text so far
        x = self.embed(text.ids, read - context[0][0].shape[2])  # (B, L, D)
        return super().forward(x, causal_mask(text.length, read, x.device), cache=cache, rows=rows)

    def joint(self, context: Tensor, text: Text) -> Tensor:
        """Prefix tokens (B, P, D_prefix) and texts (B, L) in one pass, with the mask of a prefix language model.

        Returns (B, P + L, D); the text tokens are those of `forward`.
        """
        prefix = self.project(context)  # (B, P, D)
        count = prefix.shape[1]
        real = F.pad(text.mask, (count, 0), value=True)  # (B, P + L)
        x = torch.cat([prefix, self.embed(text.ids)], dim=1)  # (B, P + L, D)
        return super().forward(x, attention_mask(real, causal=True, prefix=count))
