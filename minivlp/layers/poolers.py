"""Attentional poolers: learned queries read an image's tokens (Lee et al. 2019, "Set Transformer"; CoCa, section 3.2).

One query makes one vector of the whole image, many make a sequence that a decoder attends to. Axes: B batch, N image
tokens, Q queries, D width of what is pooled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from minivlp.layers.attention import Attention


class AttentionalPooler(nn.Module):
    """Tokens (B, N, D_context) -> (B, Q, D), however many tokens there are.

    The queries are parameters. Queries and tokens pass through a LayerNorm each. There is no residual: the queries are
    the same for every image and say nothing about it.
    """

    def __init__(self, queries: int, width: int, heads: int, context_width: int, norm_eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width))
        self.query_norm = nn.LayerNorm(width, eps=norm_eps)
        self.context_norm = nn.LayerNorm(context_width, eps=norm_eps)
        self.cross_attention = Attention(width, heads, context_width)

    def forward(self, tokens: Tensor) -> Tensor:
        queries = self.query_norm(self.query).expand(len(tokens), -1, -1)  # (B, Q, D)
        return self.cross_attention(queries, self.context_norm(tokens))


class TwoPoolers(nn.Module):
    """Image tokens (B, N, D_image) -> one token that sums the image up (B, 1, D), and tokens for captions (B, Q, D).

    cascaded: the first is read from the second, else both from the image tokens.
    """

    def __init__(self, config: Pooling, image_width: int, width: int, norm_eps: float, cascaded: bool) -> None:
        super().__init__()
        self.cascaded = cascaded
        self.caption = AttentionalPooler(config.queries, width, config.heads, image_width, norm_eps)
        self.contrast = AttentionalPooler(1, width, config.heads, width if cascaded else image_width, norm_eps)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.caption(tokens)
        return self.contrast(pooled if self.cascaded else tokens), pooled


class OnePooler(nn.Module):
    """The same from one pooler and a LayerNorm: its first query sums the image up, the other Q-1 are for captions."""

    def __init__(self, config: Pooling, image_width: int, width: int, norm_eps: float) -> None:
        super().__init__()
        self.caption = AttentionalPooler(config.queries, width, config.heads, image_width, norm_eps)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.norm(self.caption(tokens))
        return pooled[:, :1], pooled[:, 1:]


@dataclass(frozen=True)
class Pooling:
    """How an image's tokens are pooled, and with how many queries and heads. This class is the paper's choice: two
    poolers in a cascade.

    tower_norm: whether the image tower ends with a LayerNorm.
    """

    queries: int
    heads: int

    tower_norm: ClassVar[bool] = True

    def build(self, image_width: int, width: int, norm_eps: float) -> nn.Module:
        """The poolers, with random weights: image tokens of the first width, results of the second."""
        return TwoPoolers(self, image_width, width, norm_eps, cascaded=True)


@dataclass(frozen=True)
class ParallelPooling(Pooling):
    """Two poolers that read the image tokens both (the paper's ablation, table 8f)."""

    def build(self, image_width: int, width: int, norm_eps: float) -> nn.Module:
        return TwoPoolers(self, image_width, width, norm_eps, cascaded=False)


@dataclass(frozen=True)
class SinglePooling(Pooling):
    """open_clip's default, which its own code says is not the paper's: one pooler, one of its queries for the
    contrastive loss. The LayerNorm stands behind it instead of at the end of the image tower."""

    tower_norm: ClassVar[bool] = False

    def build(self, image_width: int, width: int, norm_eps: float) -> nn.Module:
        return OnePooler(self, image_width, width, norm_eps)
