"""One transformer layer, in both published orders of LayerNorm, with or without cross-attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers.attention import Attention, KeysValues, Past


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the cheap GELU that OpenAI's CLIP weights were trained with."""
    return x * torch.sigmoid(1.702 * x)


# in place: the largest tensor of a layer is not written twice (the product before it does not need its own output)
ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu, "relu": F.relu_}


@dataclass(frozen=True)
class BlockConfig:
    """What all layers of one encoder have in common.

    `norm_first` is the order of modern ViTs and CLIP (x + f(LN(x))); False is BERT's (LN(x + f(x))).
    """

    width: int
    heads: int
    hidden: int
    activation: str = "gelu"
    norm_eps: float = 1e-5
    norm_first: bool = True


class FeedForward(nn.Module):
    """D -> hidden -> D, token by token."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Self-attention, then cross-attention where `context_width` is given, then feed-forward; each residual."""

    def __init__(self, config: BlockConfig, context_width: int | None = None) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.norm_first = config.norm_first
        self.self_attention = Attention(width, config.heads)
        self.self_norm = nn.LayerNorm(width, eps=eps)
        if context_width is not None:
            self.cross_attention = Attention(width, config.heads, context_width)
            self.cross_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = FeedForward(width, config.hidden, config.activation)
        self.feed_norm = nn.LayerNorm(width, eps=eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | KeysValues | None = None,
        context_mask: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """x (B, L, D) -> (B, L, D); masks and `past` as in `Attention`. The cross-attention looks at `context`."""
        if self.norm_first:
            x = x + self.self_attention(self.self_norm(x), mask=mask, past=past)
            if context is not None:
                x = x + self.cross_attention(self.cross_norm(x), context, context_mask)
            return x + self.feed_forward(self.feed_norm(x))
        x = self.self_norm(x + self.self_attention(x, mask=mask, past=past))
        if context is not None:
            x = self.cross_norm(x + self.cross_attention(x, context, context_mask))
        return self.feed_norm(x + self.feed_forward(x))


def initialise(blocks: nn.ModuleList) -> None:
    """As CLIP's released code starts its text tower: scaled by width, residual branches also by depth; zero biases."""
    for block in blocks:
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):
                scale = (2 * len(blocks)) ** -0.5 if name.endswith(("out", "down")) else 1.0
                fan = linear.in_features if not name.endswith("up") else 2 * linear.in_features
                fan = linear.out_features if name.endswith("down") else fan
                nn.init.normal_(linear.weight, std=scale * fan**-0.5)
                nn.init.zeros_(linear.bias)
