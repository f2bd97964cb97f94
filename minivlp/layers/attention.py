"""Attention, once: self-, cross-, causal, prefix and padded attention in one class, and a way to read its weights.

Axes: B batch, L queries, K keys, M queries that are read, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # each (B, H, K, D/H)
Rows = slice | Tensor  # which tokens of a sequence: the same slice of every row, or their indices (B, M)
EXPLICIT_SCORES = 96 * 96  # queries x keys up to which two plain products are faster on a CPU (benchmarks.attention)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2).

    Args:
        width: D of the queries and of the output. heads: H, which must divide the width.
        context_width: width of the tokens that are attended to; None is self-attention.
        sub_norm: a module between the heads and the output projection, a LayerNorm in BEiT-3 ("sub-LN", Wang et al.
            2022, "Foundation Transformers", section 2.1).
    """

    def __init__(
        self, width: int, heads: int, context_width: int | None = None, sub_norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads {heads}")
        self.heads = heads
        if context_width is None:
            self.qkv = nn.Linear(width, 3 * width)  # one product instead of three: its rows are q, then k, then v
        else:
            self.q = nn.Linear(width, width)
            self.kv = nn.Linear(context_width, 2 * width)
        self.sub_norm = nn.Identity() if sub_norm is None else sub_norm
        self.out = nn.Linear(width, width)
        self.recorder: Callable[[Tensor], None] | None = None  # set by `record_attention` only

    def block_matrices(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Each weight matrix and how many projections are stacked in its rows (for the optimizer)."""
        stacked = {"qkv": 3, "q": 1, "kv": 2, "out": 1}
        return ((layer.weight, stacked[name]) for name, layer in self.named_children() if name in stacked)

    def split(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, D/H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, L, D/H)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of a cross-attention's context (B, K, D_context), computed once to be used many times."""
        keys, values = self.kv(context).chunk(2, dim=-1)  # (B, K, D) each
        return self.split(keys), self.split(values)

    def project(self, x: Tensor, rows: Rows | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the tokens `rows` of x (B, L, D), (B, H, M, D/H), and keys and values of all, (B, H, L, D/H)."""
        if rows is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            width, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
            q = F.linear(select(x, rows), weight[:width], bias[:width])
            k, v = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        return self.split(q), self.split(k), self.split(v)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeysValues | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Let x (B, L, D) attend to itself, or to `context`: tokens (B, K, D_context) or their `keys_values`.

        `mask` broadcasts to (B, H, L, K): boolean, True where a query may attend, or a float bias that is added to the
        scores (relative positions). With `cache`, a self-attention also attends to the tokens of earlier calls, and
        adds x to them. `rows`, for self-attention, names the queries that are needed; with `context`, give those
        tokens alone as x. Returns (B, L, D), or (B, M, D) for M rows.
        """
        if context is None:
            queries, keys, values = self.project(x, rows)
            mask = select_queries(mask, rows)
            if cache is not None:
                keys, values = cache.add(keys, values)
        else:
            queries = self.split(self.q(x))
            keys, values = context if isinstance(context, tuple) else self.keys_values(context)
        return self.mix(queries, keys, values, mask)

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The values (B, H, K, D/H) that queries (B, H, L, D/H) attend to, summed and projected: (B, L, D)."""
        if self.recorder is not None:
            weights = attention_weights(queries, keys, mask)  # (B, H, L, K)
            self.recorder(weights)
            mixed = weights @ values
        else:
            mixed = fast_attention(queries, keys, values, mask)
        return self.out(self.sub_norm(mixed.transpose(1, 2).flatten(2)))  # (B, H, L, D/H) -> (B, L, D)


class KVCache:
    """Keys and values of the tokens that one self-attention has read so far, for generation token by token."""

    def __init__(self) -> None:
        self.keys_values: KeysValues | None = None

    def __len__(self) -> int:
        """How many tokens were read."""
        return 0 if self.keys_values is None else self.keys_values[0].shape[2]

    def add(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Append these (B, H, L, D/H), and return all."""
        if self.keys_values is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.keys_values, (keys, values), strict=True))
        self.keys_values = keys, values
        return keys, values

    def gather(self, rows: Tensor) -> None:
        """Go on with these rows (B_new,) of the batch, which may repeat (beam search)."""
        self.keys_values = tuple(x.index_select(0, rows) for x in self.keys_values)


def attention_mask(real: Tensor, causal: bool = False, prefix: int | Tensor = 0) -> Tensor:
    """Which keys each query may attend to, (B, 1, 1 or K, K) bool, the one maker of masks.

    Args:
        real: (B, K) bool, False on padding, which nobody attends to.
        causal: each token attends to itself and to what stands before it. prefix: of a causal sequence, the first
            `prefix` tokens, as many in all rows or (B,) in each, are attended to by all: with the image tokens in front
            this is GIT's prefix language model (Wang et al. 2022, figure 3). Queries of the prefix attend to it alone.
    """
    keys = real[:, None, None, :]  # (B, 1, 1, K)
    if not causal:
        return keys
    place = torch.arange(real.shape[1], device=real.device)
    earlier = place[:, None] >= place  # (K, K) query by key
    in_prefix = place < torch.as_tensor(prefix, device=real.device).reshape(-1, 1)  # (1 or B, K)
    return keys & (earlier | in_prefix[:, None, None, :])


def causal_mask(new: int, read: int, device: torch.device) -> Tensor:
    """For `new` tokens behind `read` earlier ones, whose keys are kept in a `KVCache`: (1, 1, new, read + new).

    Padding needs no mask where it stands at the end: no real token attends to it.
    """
    real = torch.ones(1, read + new, dtype=torch.bool, device=device)
    return attention_mask(real, causal=True)[:, :, read:]


def select(x: Tensor, rows: Rows) -> Tensor:
    """The tokens `rows` of x (B, L, D): (B, M, D)."""
    if isinstance(rows, slice):
        return x[:, rows]
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def select_queries(mask: Tensor | None, rows: Rows | None) -> Tensor | None:
    """The queries `rows` of a mask or bias (1 or B, 1 or H, 1 or L, K); a mask that is the same for all stays."""
    if mask is None or rows is None or mask.shape[-2] == 1:
        return mask
    if isinstance(rows, slice):
        return mask[..., rows, :]
    mask = mask.expand(len(rows), *mask.shape[1:])
    return mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))


def gather_kv(keys_values: list[KeysValues], rows: Tensor | slice) -> list[KeysValues]:
    """Each layer's keys and values for these rows, which may repeat: several texts attend to one image."""
    if isinstance(rows, slice):
        return [(keys[rows], values[rows]) for keys, values in keys_values]
    return [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in keys_values]


def attention_weights(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D/H)): queries (B, H, L, D/H), keys (B, H, K, D/H) -> (B, H, L, K), rows sum to one.

    A query that may attend to nothing spreads its weight evenly instead of becoming NaN: such rows are padding, and a
    NaN there would spread to the whole gradient. `mask` is boolean or a float bias, see `Attention`.
    """
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)  # (B, H, L, K)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1)


def fast_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The same result without the weights: (B, H, L, D/H).

    Two plain products on a CPU for short sequences, where they were faster (`python -m benchmarks.attention`), and
    torch's fused kernel elsewhere. The output for a query that may attend to nothing is undefined.
    """
    if queries.device.type == "cpu" and queries.shape[-2] * keys.shape[-2] <= EXPLICIT_SCORES:
        return attention_weights(queries, keys, mask) @ values
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(queries.dtype)  # the kernel wants one dtype
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the attention weights of every forward pass run inside the block.

    Yields a dict that fills up as the model runs: short name -> (B, H, L, K), still attached to the graph (Grad-CAM
    needs the gradient), always for all queries. `fusion.blocks.1.cross_attention` is called `fusion.1.cross`. A second
    pass through the same layer overwrites the first; a model's losses make several, so record its verbs.
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
