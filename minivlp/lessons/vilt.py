"""Checks of lesson 02's exercises. Captions differ in length and in which of their words have several pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minivlp.layers.attention import attention_mask
from minivlp.layers.transformer import Block, BlockConfig
from minivlp.layers.weights import copy_parts
from minivlp.lessons.check import attempt, demand, demand_gradients
from minivlp.objectives.alignment import ipot

# [CLS] a gir ##af ##fe and a cat [SEP] [PAD]; [CLS] two um ##bre ##llas left of ho ##uses [SEP]
WORD = torch.tensor([[0, 1, 2, 2, 2, 3, 4, 5, 6, 7], [0, 1, 2, 2, 2, 3, 4, 5, 5, 6]])
MASKABLE = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]]).bool()


def _answer(student: Callable, *arguments: object) -> Tensor:
    return torch.as_tensor(attempt(student, *arguments))


def _splits_words(chosen: Tensor, word: Tensor) -> bool:
    """Whether two neighboring pieces of one word were treated differently anywhere."""
    return bool(((word[:, 1:] == word[:, :-1]) & (chosen[:, 1:] != chosen[:, :-1])).any())


WIDTH, HEADS = 8, 2  # of the block of exercise 2


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
            demand(_same(wrong, wanted) or not _same(got, wrong), message)
    demand(
        got.isfinite().all(),
        "Your output holds NaN or infinity: are all scores of a query -inf? True in the mask means that a token may be "
        "attended to.",
    )
    off = (got - wanted).abs().amax(dim=(0, 2)).argmax()
    demand(
        _same(got, wanted),
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
        demand(_same(attempt(module.forward, *some), right.attend(some[0], attention_mask(some[1]))), message)
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


def check_whole_words(student: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 4: `student(word, maskable, rate)` -> which tokens to mask, (B, L) bool.

    word (B, L): the index of the word that each token belongs to, from 0. maskable (B, L) bool: False on [CLS], [SEP]
    and padding. Every word is masked with probability `rate`, all of its pieces or none.
    """
    word, maskable, rate = WORD.repeat(3000, 1), MASKABLE.repeat(3000, 1), 0.15
    got = _answer(student, word, maskable, rate)
    demand(got.shape == word.shape, f"One answer per token: {tuple(word.shape)}, yours is {tuple(got.shape)}.")
    got = got.bool()
    demand(not (got & ~maskable).any(), "You mask [CLS], [SEP] or padding: mask only where `maskable` is True.")
    demand(got.any(), "In 6,000 captions nothing is masked.")
    demand(
        not _splits_words(got, word),
        'Of "gir ##af ##fe" you mask some pieces and leave others, which reveal the word: '
        "draw one number per word, not per token, and let every piece look up its word's.",
    )
    share = got[maskable].float().mean().item()
    demand(abs(share - (1 - rate)) > 0.05, "You mask what should stay: a number below the rate masks its word.")
    long, short = got[:, 2].float().mean().item(), got[:, 1].float().mean().item()
    demand(
        abs(long - (1 - (1 - rate) ** 3)) > 0.03,
        f"Words of three pieces are masked {long:.0%} of the time, words of one piece {short:.0%}: "
        "you draw per piece, and mask the word if any piece is drawn. Draw once per word.",
    )
    demand(not (got[::2] == got[:1]).all(), "The same words are masked in all captions: draw anew for every row.")
    cat, alone = got[::2, 7], got[::2, 1]
    demand(
        not torch.equal(cat, alone),
        "In each caption all words are masked or none: draw a number for every word of a row.",
    )
    demand(
        abs(share - rate) < 0.02 and abs(long - rate) < 0.03,
        f"A word should be masked with probability {rate}; yours are with {share:.2f}.",
    )
    demand(
        not torch.equal(got, _answer(student, word, maskable, rate).bool()),
        "Two calls mask exactly the same words: do not set a seed inside the function.",
    )
    one = _answer(student, word[:1], maskable[:1], 1.0).bool()
    demand(torch.equal(one, maskable[:1]), "At rate 1 every maskable token is masked; yours are not.")
    demand(
        not _answer(student, word[1:2], maskable[1:2], 0.0).any(), "At rate 0 nothing is masked; you mask something."
    )
    view = _answer(student, word[:6].T.contiguous().T, maskable[:6].T.contiguous().T, 1.0).bool()
    demand(torch.equal(view, maskable[:6]), "The same captions as a transposed view are masked differently at rate 1.")
    print("ok: whole words are masked, long ones as often as short ones, and never [CLS], [SEP] or padding.")


def check_plan(student: Callable[[Tensor, float, int], Tensor]) -> None:
    """Exercise 3: `student(cost, beta, outer)` -> the transport plan after inexact proximal steps, (L, P).

    cost (L, P): of transporting word l to patch p. Every word gives 1 / L, every patch takes 1 / P.
    """
    cost, beta, outer = 2 * torch.rand(4, 6, generator=torch.Generator().manual_seed(0)), 0.5, 200
    wanted = _plan(cost, beta, outer)
    got = _answer(student, cost, beta, outer)
    demand(got.shape == (4, 6), f"A share for every word and patch: (4, 6), yours is {tuple(got.shape)}.")
    got = got.float()
    demand(got.isfinite().all(), "Your plan holds NaN or infinity: is something divided by a sum that is zero?")
    demand((got >= 0).all(), "The entries of a plan are shares; yours has negative ones.")
    for name, axis, marginal in (("words give", 1, 1 / 4), ("patches take", 0, 1 / 6)):
        sums = got.sum(axis)
        demand(
            not torch.allclose(sums, torch.ones_like(sums), atol=1e-2),
            f"Your {name} 1 each. All together give 1, so each of {len(sums)} gives or takes 1 / {len(sums)}.",
        )
        demand(
            torch.allclose(sums, torch.full_like(sums, marginal), atol=1e-3),
            f"All {name} {marginal:.3f} each; yours {', '.join(f'{s:.3f}' for s in sums.tolist())}.",
        )
    price, best, even = (got * cost).sum(), (wanted * cost).sum(), cost.mean()
    highest = (_plan(-cost, beta, outer) * cost).sum()
    demand(
        not torch.isclose(price, highest, atol=1e-2),
        f"That plan has the highest cost ({price:.2f}; the lowest is {best:.2f}): the kernel is exp(-cost / beta).",
    )
    demand(
        not torch.isclose(price, even, atol=1e-3),
        "Every word goes to all patches equally: your plan does not depend on the cost.",
    )
    soft = (_sinkhorn(cost, beta) * cost).sum()
    demand(
        not torch.isclose(price, soft, atol=1e-3),
        f"That is Sinkhorn's plan (cost {price:.3f}; the lowest is {best:.3f}), which stays regularized: "
        "multiply the kernel by the previous plan at every step.",
    )
    demand(torch.isclose(price, best, atol=5e-3), f"The lowest cost is {best:.3f}, yours is {price:.3f}.")
    few = (_answer(student, cost, beta, 2).float() * cost).sum()
    demand(
        few > best + 1e-3,
        f"After 2 steps the cost is still {(_plan(cost, beta, 2) * cost).sum():.3f}: use `outer`.",
    )
    two, library = _answer(student, cost, beta, 2).float(), _plan(cost, beta, 2)
    demand(
        not torch.allclose(two, _plan(cost.T, beta, 2).T, atol=1e-5),
        "You stretch the rows first and the columns last. `move` does the columns first, so that in the end every word "
        "gives exactly its share.",
    )
    demand(
        torch.allclose(two, library, atol=1e-4),
        f"After 2 steps your plan differs from that of `move` by up to {(two - library).abs().max():.3f}: start from a "
        "plan of ones.",
    )
    larger_steps = (_answer(student, cost, 0.05, 2).float() * cost).sum()
    demand(larger_steps < few - 1e-3, "A smaller beta takes larger steps; in yours beta makes no difference.")
    single = _answer(student, cost[:1], beta, 5).float()
    demand(torch.allclose(single, torch.full((1, 6), 1 / 6), atol=1e-4), "A single word goes to all patches equally.")
    print(f"ok: each word gives 1/4, each patch takes 1/6, and the cost is {best:.2f} (evenly spread: {even:.2f}).")


def check_sequence(student: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Exercise 1: `student(text, text_mask, image, image_mask, token_type)` -> the joint sequence and its mask.

    text (B, L, D) with text_mask (B, L), image (B, 1+P, D) with image_mask (B, 1+P), True on real tokens; token_type
    (2, D), row 0 for text. Returns (B, N, D) and (B, N) bool, text first.
    """
    draw = torch.Generator().manual_seed(0)
    text, image, token_type = (torch.randn(*shape, generator=draw) for shape in ((2, 3, 4), (2, 5, 4), (2, 4)))
    text_mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    image_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    answer = attempt(student, text, text_mask, image, image_mask, token_type)
    demand(isinstance(answer, (tuple, list)) and len(answer) == 2, "Return two things: the sequence and its mask.")
    got, mask = map(torch.as_tensor, answer)
    demand(
        got.shape == (2, 8, 4),
        f"Three text tokens and five image tokens are eight: (2, 8, 4), not {tuple(got.shape)}.",
    )
    typed_text, typed_image = text + token_type[0], image + token_type[1]

    def is_(*parts: Tensor) -> bool:
        return torch.allclose(got.float(), torch.cat(parts, dim=1), atol=1e-5)

    demand(
        not is_(typed_image, typed_text), "Text comes first: the pooled vector is read at position 0, the text's [CLS]."
    )
    demand(not is_(text, image), "Nothing says whether a token is a word or a patch: add the token-type embedding.")
    demand(
        not is_(text + token_type[1], image + token_type[0]),
        "Row 0 of the token types is the text's, row 1 the image's.",
    )
    demand(
        not is_(typed_text * text_mask[..., None], typed_image * image_mask[..., None]),
        "Padding need not be zero, and zeros are attended to like anything else: exclude it by the mask.",
    )
    demand(is_(typed_text, typed_image), "Some token is not its embedding plus its token type.")
    demand(
        mask.shape == (2, 8),
        f"One entry per token of the sequence: (2, 8), yours is {tuple(mask.shape)}. All queries share the mask.",
    )
    mask, real = mask.bool(), torch.cat([text_mask, image_mask], dim=1)
    demand(not torch.equal(mask, ~real), "True means that a token may be attended to; yours is inverted.")
    demand(not mask.all(), "Your mask lets all tokens attend to padding.")
    demand(
        not torch.equal(mask, torch.cat([image_mask, text_mask], dim=1)), "The mask has another order than the tokens."
    )
    demand(
        torch.equal(mask, real),
        f"Of the second pair's text {int(real[1, :3].sum())} tokens are real, of the first's image "
        f"{int(real[0, 3:].sum())}; your mask has {int(mask[1, :3].sum())} and {int(mask[0, 3:].sum())}.",
    )
    inputs = {"text": text, "image": image, "token_type": token_type}
    for value in inputs.values():
        value.requires_grad_()
    right = torch.cat([text + token_type[0], image + token_type[1]], dim=1)
    probe = torch.randn(2, 8, 4, generator=draw)
    answer = attempt(student, text, text_mask, image, image_mask, token_type)[0]
    demand_gradients((answer * probe).sum(), (right * probe).sum(), **inputs)
    with torch.no_grad():
        one, its_mask = attempt(student, text[1:, :2], text_mask[1:, :2], image[1:], image_mask[1:], token_type)
    demand(
        _same(one, right[1:, [0, 1, *range(3, 8)]]) and tuple(its_mask.shape) == (1, 7),
        f"A single pair of 2 text and 5 image tokens: (1, 7, 4) with a mask (1, 7), not {tuple(one.shape)} with "
        f"{tuple(its_mask.shape)}; or its tokens are others than in a batch.",
    )
    print("ok: text first, each token has its token type, and padding is masked.")


def _same(got: Tensor, wanted: Tensor) -> bool:
    return got.shape == wanted.shape and torch.allclose(got.float(), wanted.float(), atol=1e-5)


def _plan(cost: Tensor, beta: float, outer: int) -> Tensor:
    full = [torch.ones(1, count, dtype=torch.bool) for count in cost.shape]
    return ipot(cost[None], *full, beta, outer)[0]


def _sinkhorn(cost: Tensor, beta: float, steps: int = 500) -> Tensor:
    """Sinkhorn's plan, which a single proximal step with many rescalings gives: (L, P)."""
    full = [torch.ones(1, count, dtype=torch.bool) for count in cost.shape]
    return ipot(cost[None], *full, beta, outer=1, inner=steps)[0]
