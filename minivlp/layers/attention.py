"""Attention, once: self-, cross-, causal and padded attention in one class, and a way to read its weights.

Axes: B batch, L queries, K keys, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # each (B, H, K, D/H)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2).

    Args:
        width: D of the queries and of the output. heads: H, which must divide the width.
        context_width: width of the tokens that are looked at; None means that the tokens look at each other.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads {heads}")
        self.heads = heads
        if context_width is None:
            self.qkv = nn.Linear(width, 3 * width)  # one matmul instead of three: rows are q, then k, then v
        else:
            self.q = nn.Linear(width, width)
            self.kv = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)
        self.recorder: Callable[[Tensor], None] | None = None  # set by `record_attention` only

    def split(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, D/H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, L, D/H)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of a cross-attention's context (B, K, D_context), to be computed once and used many times."""
        keys, values = self.kv(context).chunk(2, dim=-1)  # each (B, K, D)
        return self.split(keys), self.split(values)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeysValues | None = None,
        mask: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Let `x` (B, L, D) look at itself, or at `context`: tokens (B, K, D_context) or their `keys_values`.

        `mask` broadcasts to (B, H, L, K): boolean, True where a query may look, or a float bias that is added to the
        scores (relative positions). With `past`, a self-attention also looks at what it has read before, and remembers
        `x`. Returns (B, L, D).
        """
        if context is None:
            queries, keys, values = map(self.split, self.qkv(x).chunk(3, dim=-1))
            if past is not None:
                keys, values = past.add(keys, values)
        else:
            queries = self.split(self.q(x))
            keys, values = context if isinstance(context, tuple) else self.keys_values(context)
        if self.recorder is not None:
            weights = attention_weights(queries, keys, mask)  # (B, H, L, K)
            self.recorder(weights)
            mixed = weights @ values
        else:
            mixed = fast_attention(queries, keys, values, mask)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, H, L, D/H) -> (B, L, D)


class Past:
    """What one self-attention has read so far, so that writing a text computes each token's keys and values once."""

    def __init__(self) -> None:
        self.keys_values: KeysValues | None = None

    def __len__(self) -> int:
        """How many tokens were read."""
        return 0 if self.keys_values is None else self.keys_values[0].shape[2]

    def add(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Remember these (B, H, L, D/H), and return them with all that came before."""
        if self.keys_values is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.keys_values, (keys, values), strict=True))
        self.keys_values = keys, values
        return keys, values

    def take(self, rows: Tensor) -> None:
        """Go on with these rows (B_new,) of the batch, which may repeat."""
        self.keys_values = tuple(x.index_select(0, rows) for x in self.keys_values)


def attention_weights(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D/H)): queries (B, H, L, D/H), keys (B, H, K, D/H) -> (B, H, L, K), rows sum to one.

    A query that may look nowhere spreads its weight evenly instead of becoming NaN: such rows are padding, and a NaN
    there would poison the whole gradient. `mask` is boolean or a float bias, see `Attention`.
    """
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)  # (B, H, L, K)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1)


def fast_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The same result without handing out the weights: (B, H, L, D/H).

    By two plain matmuls on a CPU, where the fused kernel was no faster at the sizes of our nano models (measured, see
    docs/recipe.md), and by the fused kernel elsewhere (not measured). A query that may look nowhere means nothing in
    either, and is not the same in both.
    """
    if queries.device.type == "cpu":
        return attention_weights(queries, keys, mask) @ values
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(queries.dtype)  # the kernel wants one dtype
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the attention weights of every forward pass run inside the block.

    Yields a dict that fills up as the model runs: short name -> (B, H, L, K), still attached to the graph (Grad-CAM
    needs the gradient). `fusion.blocks.1.cross_attention` is called `fusion.1.cross`. A second pass through the same
    layer overwrites the first.
    """
    maps: dict[str, Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    for name, layer in layers.items():
        layer.recorder = partial(maps.__setitem__, short_name(name))
    try:
        yield maps
    finally:
        for layer in layers.values():
            layer.recorder = None


def short_name(name: str) -> str:
    """`image.blocks.0.self_attention` -> `image.0.self`."""
    return name.replace("blocks.", "").removesuffix("_attention")


def causal_mask(length: int, device: torch.device | str | None = None) -> Tensor:
    """(L, L) boolean: each token sees itself and what stands before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def padding_mask(mask: Tensor) -> Tensor:
    """Real tokens (B, K) -> which keys may be looked at, (B, 1, 1, K)."""
    return mask[:, None, None, :]
