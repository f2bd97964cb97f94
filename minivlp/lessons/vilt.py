"""Checks of lesson 02's exercises; that of the self-attention is in `vilt_attention`.

Captions differ in length and in which of their words have several pieces.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minivlp.lessons.check import attempt, demand, demand_gradients, same
from minivlp.lessons.vilt_attention import check_attention
from minivlp.objectives.alignment import ipot

__all__ = ["check_attention", "check_plan", "check_sequence", "check_whole_words"]

# [CLS] a gir ##af ##fe and a cat [SEP] [PAD]; [CLS] two um ##bre ##llas left of ho ##uses [SEP]
WORD = torch.tensor([[0, 1, 2, 2, 2, 3, 4, 5, 6, 7], [0, 1, 2, 2, 2, 3, 4, 5, 5, 6]])
MASKABLE = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]]).bool()


def _answer(student: Callable, *arguments: object) -> Tensor:
    return torch.as_tensor(attempt(student, *arguments))


def _splits_words(chosen: Tensor, word: Tensor) -> bool:
    """Whether two neighboring pieces of one word were treated differently anywhere."""
    return bool(((word[:, 1:] == word[:, :-1]) & (chosen[:, 1:] != chosen[:, :-1])).any())


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
        same(one, right[1:, [0, 1, *range(3, 8)]]) and tuple(its_mask.shape) == (1, 7),
        f"A single pair of 2 text and 5 image tokens: (1, 7, 4) with a mask (1, 7), not {tuple(one.shape)} with "
        f"{tuple(its_mask.shape)}; or its tokens are others than in a batch.",
    )
    print("ok: text first, each token has its token type, and padding is masked.")


def _plan(cost: Tensor, beta: float, outer: int) -> Tensor:
    full = [torch.ones(1, count, dtype=torch.bool) for count in cost.shape]
    return ipot(cost[None], *full, beta, outer)[0]


def _sinkhorn(cost: Tensor, beta: float, steps: int = 500) -> Tensor:
    """Sinkhorn's plan, which a single proximal step with many rescalings gives: (L, P)."""
    full = [torch.ones(1, count, dtype=torch.bool) for count in cost.shape]
    return ipot(cost[None], *full, beta, outer=1, inner=steps)[0]
