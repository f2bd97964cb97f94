"""Check of lesson 03's exercise on cross-attention, beside the library's.

Axes: B batch, L text tokens, K tokens that are attended to, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minivlp.layers.attention import Attention
from minivlp.lessons.check import attempt, demand, demand_gradients, same


def check_cross_attention(student: Callable[[int, int, int], nn.Module]) -> None:
    """`student(width, heads, context_width)` -> a module with the layers `q`, `kv` and `out`, called with x (B, L, D),
    context (B, K, D_context) and a mask (B, 1, 1, K) bool or None. Compared with `layers.attention.Attention`."""
    generator = torch.Generator().manual_seed(0)
    library, mine = Attention(12, 3, 8), attempt(student, 12, 3, 8)
    names = sorted(library.state_dict())
    demand(isinstance(mine, nn.Module), "Your class must be an nn.Module.")
    demand(
        {name: w.shape for name, w in library.state_dict().items()}
        == {name: w.shape for name, w in mine.state_dict().items()},
        f"Keep the three linear layers of the given __init__: their weights are {', '.join(names)}.",
    )
    mine.load_state_dict(library.state_dict())
    x, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 12), (2, 5, 8)))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()[:, None, None]  # (B, 1, 1, K)
    _explain_attention(attempt(mine, x, context, None), library, x, context)
    got, wanted = attempt(mine, x, context, mask), library(x, context, mask)
    demand(not torch.isnan(got).any(), "With a mask yours gives NaN: mask the scores, before the softmax.")
    demand(not same(got, library(x, context)), "Your mask has no effect: masked tokens must get the weight 0.")
    demand(
        not same(got, library(x, context, ~mask)),
        "Your mask is the wrong way round: True marks tokens that may be read.",
    )
    demand(same(got, wanted), "Right without a mask, wrong with one: set masked scores to -inf before the softmax.")
    for what, inputs in {
        "a batch of one": (x[:1], context[:1], None),
        "a single query": (x[:, :1], context, mask),
        "transposed views": (x.transpose(0, 1).contiguous().transpose(0, 1), context.mT.contiguous().mT, mask),
    }.items():
        demand(same(attempt(mine, *inputs), library(*inputs)), f"Right so far, but wrong for {what}.")
    x, context = x.requires_grad_(), context.requires_grad_()
    demand_gradients(mine(x, context, mask).sum(), library(x, context, mask).sum(), x=x, context=context)
    print("ok: queries from the words, keys and values from the patches, one softmax per head and word.")


def _explain_attention(got: Tensor, library: Attention, x: Tensor, context: Tensor) -> None:
    """Demand the library's answer without a mask; name the mistake where it is a usual one."""
    heads, wanted = library.heads, library(x, context)
    demand(got.shape == wanted.shape, f"The shape is that of x, {tuple(wanted.shape)}; yours is {tuple(got.shape)}.")
    q, (k, v) = library.split(library.q(x)), library.keys_values(context)
    scores, per_head = q @ k.mT, q.shape[-1]

    def mixed(weights: Tensor, values: Tensor = v) -> Tensor:
        return (weights @ values).transpose(1, 2).flatten(2)

    weights = (scores / per_head**0.5).softmax(dim=-1)
    one = (library.q(x) @ library.kv(context).chunk(2, dim=-1)[0].mT / per_head**0.5).softmax(dim=-1)
    wrong = {
        "The last linear layer, `out`, is missing.": mixed(weights),
        "The scores are not scaled: divide by the square root of the width of a head.": library.out(
            mixed(scores.softmax(dim=-1))
        ),
        f"Divide by the square root of the width of one head, {per_head}, not of the whole width, "
        f"{per_head * heads}.": library.out(mixed((scores / (per_head * heads) ** 0.5).softmax(dim=-1))),
        "Your softmax goes over the queries; the weights of one query over all keys sum to one.": library.out(
            mixed((scores / per_head**0.5).softmax(dim=-2))
        ),
        "Keys and values are swapped: the first half of `kv` is the keys.": library.out(
            mixed((q @ v.mT / per_head**0.5).softmax(dim=-1), k)
        ),
        "The heads are not separated: each has its own softmax over its part of the width.": library.out(
            one @ library.kv(context).chunk(2, dim=-1)[1]
        ),
        "You add the residual connection; here the module returns the attention alone.": x + wanted,
        "You join the heads without bringing them beside the tokens first: .transpose(1, 2), then .flatten(2).": (
            library.out((weights @ v).reshape(x.shape))
        ),
    }
    for message, answer in wrong.items():
        demand(not same(got, answer), message)
    demand(
        same(got, wanted),
        "The values differ from the library's. Split q, k and v into heads as (B, L, H, D/H), bring the heads to the "
        "front with .transpose(1, 2), and join them in the reverse order.",
    )
