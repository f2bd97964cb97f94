"""Check of lesson 02's exercise on self-attention: a block with heads, mask and residual, beside the library's.

Axes: B batch, N tokens, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minivlp.layers.attention import attention_mask
from minivlp.layers.transformer import Block, BlockConfig
from minivlp.layers.weights import copy_parts
from minivlp.lessons.check import attempt, demand, demand_gradients, same

WIDTH, HEADS = 8, 2  # of the block that is checked


def check_attention(student: Callable[[int, int], nn.Module]) -> None:
    """Exercise 2: `student(width, heads)` -> a module that is called with x (B, N, D) and mask (B, N), True on tokens
    that may be attended to, and returns x + attention(LayerNorm(x)), (B, N, D).

    Its parts are `norm`, a LayerNorm, `qkv`, a linear layer whose outputs are queries, keys and values in this order,
    and `out`, a linear layer.
    """
    module = attempt(student, WIDTH, HEADS)
    _demand_parts(module)
    draw = torch.Generator().manual_seed(0)
    right = Block(BlockConfig(width=WIDTH, heads=HEADS, hidden=16))
    for weights in right.parameters():  # unlike fresh ones, these also show a LayerNorm or a bias that is left out
        weights.data = torch.randn(weights.shape, generator=draw) * (0.5 if weights.dim() > 1 else 1.0)
    theirs = {"norm": right.self_norm, "qkv": right.self_attention.qkv, "out": right.self_attention.out}
    copy_parts(dict(theirs), module)
    x = torch.randn(3, 5, WIDTH, generator=draw)
    mask = torch.arange(5) < torch.tensor([5, 3, 2])[:, None]  # (3, 5)

    got = attempt(module.forward, x, mask)
    demand(
        isinstance(got, Tensor) and got.shape == x.shape,
        f"As many tokens come out as go in: {tuple(x.shape)}, yours is {tuple(getattr(got, 'shape', ()))}.",
    )
    with torch.no_grad():
        wanted = right.attend(x, attention_mask(mask))
        for message, mistake in MISTAKES.items():
            wrong = _attend(right, x, mask, **mistake)
            demand(same(wrong, wanted) or not same(got, wrong), message)
    demand(
        got.isfinite().all(),
        "Your output holds NaN or infinity: are all scores of a query -inf? True in the mask means that a token may be "
        "attended to.",
    )
    off = (got - wanted).abs().amax(dim=(0, 2)).argmax()
    demand(
        same(got, wanted),
        f"With the same weights the library's block gives other numbers; the largest difference is at token {off}. "
        "Compare the shapes of each step with those in the text.",
    )
    for message, some in (
        ("Right for a batch of three, wrong for a batch of one.", (x[:1, :4], mask[:1, :4])),
        (
            "Right for contiguous tensors, wrong for a transposed view of the same numbers.",
            (x.mT.contiguous().mT, mask),
        ),
    ):
        demand(same(attempt(module.forward, *some), right.attend(some[0], attention_mask(some[1]))), message)
    x.requires_grad_()
    probe = torch.randn(x.shape, generator=draw)
    losses = [(out * probe).sum() for out in (attempt(module.forward, x, mask), right.attend(x, attention_mask(mask)))]
    demand_gradients(*losses, x=x)
    _demand_trained(module, theirs, *losses)
    print("ok: the same as the library's block: LayerNorm, heads, mask, softmax, projection, residual.")


def _demand_parts(module: nn.Module) -> None:
    """Demand the parts that the weights are copied to."""
    sizes = {"norm": (WIDTH,), "qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH)}
    demand(isinstance(module, nn.Module), "Return a module: a class derived from nn.Module.")
    for name, size in sizes.items():
        part = getattr(module, name, None)
        shape = tuple(getattr(getattr(part, "weight", None), "shape", ()))
        kind = "nn.LayerNorm" if name == "norm" else "nn.Linear"
        demand(shape == size, f"`self.{name}` is an {kind} with weights {size}; yours has {shape or 'none'}.")
        demand(part.bias is not None, f"`self.{name}` has a bias.")


def _demand_trained(module: nn.Module, theirs: dict[str, nn.Module], loss: Tensor, wanted: Tensor) -> None:
    """Demand the right gradient of all weights of the student's module."""
    loss.backward(retain_graph=True)
    wanted.backward(retain_graph=True)
    for name, part in theirs.items():
        for (kind, mine), other in zip(getattr(module, name).named_parameters(), part.parameters(), strict=True):
            gradient = torch.zeros_like(mine) if mine.grad is None else mine.grad
            demand(
                torch.allclose(gradient, other.grad, rtol=1e-3, atol=1e-4),
                f"The output is right, but `{name}.{kind}` does not get its gradient: compute with tensors all the "
                "way, without .detach(), .data or torch.no_grad().",
            )


# What a student's block does instead, and what a student reads; each is how `_attend` differs from the right one.
MISTAKES: dict[str, dict[str, object]] = {
    "The residual connection is missing: add x to what the attention returns.": {"residual": 0.0},
    "The residual connection adds LayerNorm(x); it adds x itself.": {"residual_of_normed": True},
    "LayerNorm is missing: the attention reads LayerNorm(x).": {"norm": "none"},
    "LayerNorm stands behind the residual connection, as in BERT. Here it stands before the attention.": {
        "norm": "last"
    },
    "The scores are not scaled: divide them by the square root of a head's width.": {"scale": 1.0},
    "The scores are divided by the square root of the whole width; each head has D / H channels.": {
        "scale": WIDTH**-0.5
    },
    "The scores are divided by a head's width; divide by its square root.": {"scale": HEADS / WIDTH},
    "All tokens attend to padding: use the mask.": {"hide": "nothing"},
    "Tokens attend to padding only: True in the mask means that a token may be attended to.": {"hide": "real"},
    "Scores of padding are set to 0, and exp(0) is 1: set them to -inf, so that the softmax gives 0.": {"hide": "zero"},
    "Weights of padding are set to 0 after the softmax, so the others no longer sum to 1: mask the scores.": {
        "hide": "after"
    },
    "Padded queries are masked instead of padded keys: the mask belongs to the last axis of the scores.": {
        "hide": "queries"
    },
    "The softmax runs over the queries; for each query it runs over the keys, the last axis.": {"axis": -2},
    "There is only one head: split the width into heads before the scores.": {"heads": 1},
    "The heads are cut wrongly: split the last axis into (H, D/H) first, then move H forward with transpose.": {
        "cut": "view"
    },
    "The heads are put together in the wrong order: move H behind N with transpose, then flatten.": {"joined": False},
    "The rows of `qkv` are queries, keys, values; yours are taken in another order.": {"order": (1, 0, 2)},
    "The rows of `qkv` are queries, keys, values; yours are values, keys, queries.": {"order": (2, 1, 0)},
    "The last projection `out` is missing.": {"project": False},
}


def _attend(
    block: Block,
    x: Tensor,
    mask: Tensor,
    norm: str = "first",
    scale: float = (WIDTH / HEADS) ** -0.5,
    hide: str = "padding",
    axis: int = -1,
    heads: int = HEADS,
    cut: str = "split",
    joined: bool = True,
    order: tuple[int, int, int] = (0, 1, 2),
    project: bool = True,
    residual: float = 1.0,
    residual_of_normed: bool = False,
) -> Tensor:
    """The block's attention with one typical mistake; without arguments it is right."""
    read = block.self_norm(x) if norm == "first" else x
    scale = scale if heads > 1 else WIDTH**-0.5
    parts = block.self_attention.qkv(read).chunk(3, dim=-1)  # (B, N, D) each
    if cut == "split":
        parts = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts]  # (B, H, N, D/H)
    else:
        parts = [part.reshape(len(x), heads, x.shape[1], -1) for part in parts]
    queries, keys, values = (parts[i] for i in order)
    scores, keep = scale * queries @ keys.mT, mask[:, None, None, :]  # (B, H, N, N), (B, 1, 1, N)
    lowest = torch.finfo(scores.dtype).min
    fill = {"padding": (~keep, lowest), "real": (keep, lowest), "zero": (~keep, 0.0), "queries": (~keep.mT, lowest)}
    scores = scores.masked_fill(*fill[hide]) if hide in fill else scores
    weights = scores.softmax(dim=axis)
    mixed = (weights * keep if hide == "after" else weights) @ values  # (B, H, N, D/H)
    mixed = mixed.transpose(1, 2).flatten(2) if joined else mixed.reshape(x.shape)
    mixed = block.self_attention.out(mixed) if project else mixed
    done = residual * (read if residual_of_normed else x) + mixed
    return block.self_norm(done) if norm == "last" else done
