"""The transformer, once: image and text towers, fusion layers, decoders and single streams are this stack.

Axes: B batch, L tokens, M tokens that are read, K context tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers.attention import Attention, KeysValues, KVCache, Rows, select

Parts = tuple[tuple[str, int], ...]  # consecutive runs of tokens by modality: (("text", 9), ("image", 65))


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP weights were trained with."""
    return x * torch.sigmoid(1.702 * x)


# in place: the largest tensor of a layer is not written twice (the product before it does not need its own output)
ACTIVATIONS = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # of some released models
    "relu": F.relu_,
}


@dataclass(frozen=True)
class BlockConfig:
    """What all blocks of one stack have in common.

    norm_first: the order of modern ViTs and CLIP, x + f(LN(x)); False is BERT's, LN(x + f(x)).
    layer_scale: initial size of a learned factor on each residual branch (LayerScale, Touvron et al. 2021); None leaves
    it out. sub_norm: further LayerNorms in front of the last projection of attention and feed-forward layer (BEiT-3).
    """

    width: int
    heads: int
    hidden: int
    activation: str = "gelu"
    norm_eps: float = 1e-5
    norm_first: bool = True
    layer_scale: float | None = None
    sub_norm: bool = False

    @classmethod
    def nano(cls) -> BlockConfig:
        """The blocks of all nano models. ReLU is cheaper than GELU on a CPU (docs/recipe.md)."""
        return cls(width=128, heads=4, hidden=512, activation="relu")

    @classmethod
    def small(cls) -> BlockConfig:
        """The blocks of all small models."""
        return cls(width=384, heads=6, hidden=1536)


class FeedForward(nn.Module):
    """D -> hidden -> D, each token by itself. `sub_norm`: a module in front of the second projection."""

    def __init__(self, width: int, hidden: int, activation: str, sub_norm: nn.Module | None = None) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(width, hidden)
        self.sub_norm = nn.Identity() if sub_norm is None else sub_norm
        self.down = nn.Linear(hidden, width)

    def block_matrices(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Each weight matrix and how many projections are stacked in its rows (for the optimizer)."""
        return ((layer.weight, 1) for layer in (self.up, self.down))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.sub_norm(self.activation(self.up(x))))


class LayerScale(nn.Module):
    """A learned factor per channel on what a residual branch adds (Touvron et al. 2021, section 2)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((width,), initial))  # (D,)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def layer_scale(config: BlockConfig) -> nn.Module:
    """The factor of one residual branch: `LayerScale`, or nothing."""
    return nn.Identity() if config.layer_scale is None else LayerScale(config.width, config.layer_scale)


def sub_norm(config: BlockConfig, width: int) -> nn.Module | None:
    """The LayerNorm in front of a last projection, where the config has it."""
    return nn.LayerNorm(width, eps=config.norm_eps) if config.sub_norm else None


class Block(nn.Module):
    """Self-attention, then cross-attention where `context_width` is given, then feed-forward; each with a residual."""

    def __init__(self, config: BlockConfig, context_width: int | None = None) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.norm_first = config.norm_first
        self.self_attention = Attention(width, config.heads, sub_norm=sub_norm(config, width))
        self.self_norm = nn.LayerNorm(width, eps=eps)
        if context_width is not None:
            self.cross_attention = Attention(width, config.heads, context_width)
            self.cross_norm = nn.LayerNorm(width, eps=eps)
        self.add_feed_forward(config)
        self.attention_scale, self.feed_scale = (layer_scale(config) for _ in range(2))

    def add_feed_forward(self, config: BlockConfig) -> None:
        """Make the parts that `feed` uses. Blocks with other feed-forward layers override both."""
        inner = sub_norm(config, config.hidden)
        self.feed_forward = FeedForward(config.width, config.hidden, config.activation, inner)
        self.feed_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | KeysValues | None = None,
        context_mask: Tensor | None = None,
        cache: KVCache | None = None,
        rows: Rows | None = None,
        parts: Parts | None = None,
    ) -> Tensor:
        """x (B, L, D) -> (B, L, D), or (B, M, D) where only the tokens `rows` are needed.

        `mask`, `context_mask` and `cache` as in `Attention`; the cross-attention attends to `context`, and is left out
        without one. `parts`: for blocks with experts.
        """
        recorded = self.self_attention.recorder is not None  # maps are recorded for all queries
        if rows is not None and (recorded or len(parts or ()) > 1):
            return select(self(x, mask, context, context_mask, cache, None, parts), rows)
        x = self.attend(x, mask, cache, rows)
        if context is not None:
            x = self.cross_attend(x, context, context_mask)
        return self.feed(x, parts)

    def attend(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, rows: Rows | None = None
    ) -> Tensor:
        """The self-attention with its residual."""
        if rows is not None and self.self_attention.recorder is not None:  # maps are recorded for all queries
            return select(self.attend(x, mask, cache), rows)
        read = x if rows is None else select(x, rows)
        if self.norm_first:
            return read + self.attention_scale(self.self_attention(self.self_norm(x), None, mask, cache, rows))
        return self.self_norm(read + self.attention_scale(self.self_attention(x, None, mask, cache, rows)))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of context tokens (B, K, D_context) for the cross-attention."""
        return self.cross_attention.keys_values(context)

    def cross_attend(self, x: Tensor, context: Tensor | KeysValues, mask: Tensor | None) -> Tensor:
        """The cross-attention with its residual."""
        if self.norm_first:
            return x + self.cross_attention(self.cross_norm(x), context, mask)
        return self.cross_norm(x + self.cross_attention(x, context, mask))

    def feed(self, x: Tensor, parts: Parts | None = None) -> Tensor:
        """The feed-forward layer with its residual."""
        if self.norm_first:
            return x + self.feed_scale(self.feed_forward(self.feed_norm(x)))
        return self.feed_norm(x + self.feed_scale(self.feed_forward(x)))


class TwoFeedsBlock(Block):
    """A block with a feed-forward layer behind each of its attentions, and a LayerNorm on the context (open_clip)."""

    def __init__(self, config: BlockConfig, context_width: int) -> None:
        super().__init__(config, context_width)
        self.context_norm = nn.LayerNorm(context_width, eps=config.norm_eps)
        self.inner_feed = FeedForward(config.width, config.hidden, config.activation)
        self.inner_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def keys_values(self, context: Tensor) -> KeysValues:
        return self.cross_attention.keys_values(self.context_norm(context))

    def cross_attend(self, x: Tensor, context: Tensor | KeysValues, mask: Tensor | None) -> Tensor:
        """The self-attention's feed-forward layer, then the cross-attention; each with its residual."""
        x = x + self.inner_feed(self.inner_norm(x))
        return super().cross_attend(x, context if isinstance(context, tuple) else self.keys_values(context), mask)


class Transformer(nn.Module):
    """A stack of blocks, and a LayerNorm behind the last one where the blocks do not end with one.

    `blocks` may be of any class that is called as `Block` is; their order of LayerNorm is that of `config`.
    """

    def __init__(self, config: BlockConfig, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.norm_first else nn.Identity()
        initialize(self.blocks)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Sequence[Tensor] | None = None,
        context: Tensor | list[KeysValues] | None = None,
        context_mask: Tensor | None = None,
        cache: list[KVCache] | None = None,
        rows: Rows | None = None,
        parts: Sequence[Parts] | None = None,
    ) -> Tensor:
        """x (B, L, D) -> tokens after the last LayerNorm, (B, L, D).

        Args:
            mask, context_mask: from `attention_mask`; `mask` may also be a list with one mask or bias per block.
            context: tokens (B, K, D_context), or their `keys_values`. cache: one `KVCache` per block.
            rows: which outputs will be read, a slice or indices (B, M): the last block computes only these, and the
                result is (B, M, D). Exact: keys and values are still those of all tokens.
            parts: for blocks with experts, one entry per block.
        """
        return self.norm(self.run(x, range(len(self.blocks)), mask, context, context_mask, cache, rows, parts))

    def run(
        self,
        x: Tensor,
        layers: range,
        mask: Tensor | Sequence[Tensor] | None = None,
        context: Tensor | list[KeysValues] | None = None,
        context_mask: Tensor | None = None,
        cache: list[KVCache] | None = None,
        rows: Rows | None = None,
        parts: Sequence[Parts] | None = None,
    ) -> Tensor:
        """Some of the blocks, without the LayerNorm behind them; arguments as in `forward`."""
        if rows is not None and not layers:
            return select(x, rows)
        for n in layers:
            x = self.blocks[n](
                x,
                mask[n] if isinstance(mask, Sequence) else mask,
                context[n] if isinstance(context, list) else context,
                context_mask,
                cache[n] if cache else None,
                rows if n == layers[-1] else None,
                parts[n] if parts else None,
            )
        return x

    def keys_values(self, context: Tensor) -> list[KeysValues]:
        """Each block's cross-attention keys and values of context tokens (B, K, D_context), for many texts to share."""
        return [block.keys_values(context) for block in self.blocks]


def fusion_layers(layers: int, config: BlockConfig, context_width: int) -> Transformer:
    """Layers in which tokens of one modality (B, L, D) attend to those of the other, a context (B, K, D_context)."""
    return Transformer(config, (Block(config, context_width) for _ in range(layers)))


def initialize(blocks: nn.ModuleList) -> None:
    """As CLIP's released code starts its text tower: scaled by width, residual branches also by depth; zero biases."""
    for block in blocks:
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):
                scale = (2 * len(blocks)) ** -0.5 if name.endswith(("out", "down")) else 1.0
                fan = linear.in_features if not name.endswith("up") else 2 * linear.in_features
                fan = linear.out_features if name.endswith("down") else fan
                nn.init.normal_(linear.weight, std=scale * fan**-0.5)
                nn.init.zeros_(linear.bias)
