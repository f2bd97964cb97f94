"""Checks of lesson 02's exercises. Captions differ in length and in where their words fall to pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minivlp.lessons.check import attempt, demand
from minivlp.objectives.alignment import ipot

# [CLS] a gir ##af ##fe and a cat [SEP] [PAD]; [CLS] two um ##bre ##llas left of ho ##uses [SEP]
WORDS = torch.tensor([[0, 1, 2, 2, 2, 3, 4, 5, 6, 7], [0, 1, 2, 2, 2, 3, 4, 5, 5, 6]])
MAY = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]]).bool()


def _answer(student: Callable, *arguments: object) -> Tensor:
    return torch.as_tensor(attempt(student, *arguments))


def _pieces_apart(chosen: Tensor, words: Tensor) -> bool:
    """Whether two neighbours of one word were treated differently anywhere."""
    return bool(((words[:, 1:] == words[:, :-1]) & (chosen[:, 1:] != chosen[:, :-1])).any())


def check_whole_words(student: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 1: `student(words, may, rate)` -> which tokens to hide, (B, L) bool.

    words (B, L): the number of the word that each token belongs to, from 0. may (B, L) bool: False on [CLS], [SEP] and
    padding. Every word is hidden with probability `rate`, all of its pieces or none.
    """
    words, may, rate = WORDS.repeat(3000, 1), MAY.repeat(3000, 1), 0.15
    got = _answer(student, words, may, rate)
    demand(got.shape == words.shape, f"One answer per token: {tuple(words.shape)}, yours is {tuple(got.shape)}.")
    got = got.bool()
    demand(not (got & ~may).any(), "You hide [CLS], [SEP] or padding: hide only where `may` is True.")
    demand(got.any(), "In 6,000 captions nothing is hidden.")
    demand(
        not _pieces_apart(got, words),
        'Of "gir ##af ##fe" you hide some pieces and leave others, which give the word away: '
        "draw one number per word, not per token, and let every piece look up its word's.",
    )
    share = got[may].float().mean().item()
    demand(abs(share - (1 - rate)) > 0.05, "You keep what should be hidden: a number below the rate hides its word.")
    long, short = got[:, 2].float().mean().item(), got[:, 1].float().mean().item()
    demand(
        abs(long - (1 - (1 - rate) ** 3)) > 0.03,
        f"Words of three pieces are hidden {long:.0%} of the time, short ones {short:.0%}: "
        "one piece that is drawn takes the others along. Draw once per word.",
    )
    demand(not (got[::2] == got[:1]).all(), "All captions hide the same words: draw anew for every row.")
    cat, alone = got[::2, 7], got[::2, 1]
    demand(
        not torch.equal(cat, alone), "A caption loses all of its words or none: draw a number for every word of a row."
    )
    demand(
        abs(share - rate) < 0.02 and abs(long - rate) < 0.03,
        f"A word is to be hidden with probability {rate}; yours are with {share:.2f}.",
    )
    one = _answer(student, words[:1], may[:1], 1.0).bool()
    demand(torch.equal(one, may[:1]), "At rate 1 every token that may be hidden is; yours are not.")
    demand(not _answer(student, words[1:2], may[1:2], 0.0).any(), "At rate 0 nothing is hidden; you hide something.")
    print("ok: words go whole, long ones as often as short ones, and what frames the caption stays.")


def check_plan(student: Callable[[Tensor, float, int], Tensor]) -> None:
    """Exercise 2: `student(cost, beta, outer)` -> the plan of inexact proximal steps, (L, P).

    cost (L, P): of moving word l onto patch p. Every word gives 1 / L, every patch takes 1 / P.
    """
    cost, beta, outer = 2 * torch.rand(4, 6, generator=torch.Generator().manual_seed(0)), 0.5, 200
    wanted = _plan(cost, beta, outer)
    got = _answer(student, cost, beta, outer)
    demand(got.shape == (4, 6), f"A share for every word and patch: (4, 6), yours is {tuple(got.shape)}.")
    got = got.float()
    demand(got.isfinite().all(), "Your plan holds NaN or infinity: is something divided by a sum that is zero?")
    demand((got >= 0).all(), "A plan moves shares; yours has negative ones.")
    for name, axis, marginal in (("words give", 1, 1 / 4), ("patches take", 0, 1 / 6)):
        sums = got.sum(axis)
        demand(
            not torch.allclose(sums, torch.ones_like(sums), atol=1e-2),
            f"Your {name} 1 each; all words together give 1, so each of {len(sums)} gives or takes 1 / {len(sums)}.",
        )
        demand(
            torch.allclose(sums, torch.full_like(sums, marginal), atol=1e-3),
            f"All {name} {marginal:.3f} each; yours {', '.join(f'{s:.3f}' for s in sums.tolist())}.",
        )
    price, best, even = (got * cost).sum(), (wanted * cost).sum(), cost.mean()
    dear = (_plan(-cost, beta, outer) * cost).sum()
    demand(
        not torch.isclose(price, dear, atol=1e-2),
        f"That is the dearest plan ({price:.2f}; the cheapest costs {best:.2f}): the kernel is exp(-cost / beta).",
    )
    demand(
        not torch.isclose(price, even, atol=1e-3),
        "Every word goes to all patches alike: the cost has no say in your plan.",
    )
    soft = (_sinkhorn(cost, beta) * cost).sum()
    demand(
        not torch.isclose(price, soft, atol=1e-3),
        f"That is Sinkhorn's plan ({price:.3f}; the cheapest costs {best:.3f}), which stays soft: "
        "multiply the kernel by the plan so far at every step.",
    )
    demand(torch.isclose(price, best, atol=5e-3), f"The cheapest plan costs {best:.3f}, yours {price:.3f}.")
    few = (_answer(student, cost, beta, 2).float() * cost).sum()
    demand(
        few > best + 1e-3,
        f"After 2 steps the plan is still soft, {(_plan(cost, beta, 2) * cost).sum():.3f}: use `outer`.",
    )
    bold = (_answer(student, cost, 0.05, 2).float() * cost).sum()
    demand(bold < few - 1e-3, "A smaller beta makes bolder steps; yours makes no difference.")
    single = _answer(student, cost[:1], beta, 5).float()
    demand(torch.allclose(single, torch.full((1, 6), 1 / 6), atol=1e-4), "A single word goes to all patches alike.")
    print(
        f"ok: each word gives a quarter, each patch takes a sixth, and the move costs {best:.2f} (blindly {even:.2f})."
    )


def check_sequence(student: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Exercise 3: `student(words, mask, patches, seen, modality)` -> the joint sequence and which keys may be seen.

    words (B, L, D) with mask (B, L), patches (B, 1+P, D) with seen (B, 1+P), True on what is real; modality (2, D), row
    0 for text. Returns (B, N, D) and (B, N) bool, text first.
    """
    draw = torch.Generator().manual_seed(0)
    words, patches, modality = (torch.randn(*shape, generator=draw) for shape in ((2, 3, 4), (2, 5, 4), (2, 4)))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    seen = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    answer = attempt(student, words, mask, patches, seen, modality)
    demand(isinstance(answer, (tuple, list)) and len(answer) == 2, "Return two things: the sequence and its keys.")
    got, keys = map(torch.as_tensor, answer)
    demand(got.shape == (2, 8, 4), f"Three words and five patches are eight tokens: (2, 8, 4), not {tuple(got.shape)}.")
    text, image = words + modality[0], patches + modality[1]
    wanted = torch.cat([text, image], dim=1)

    def is_(*parts: Tensor) -> bool:
        return torch.allclose(got.float(), torch.cat(parts, dim=1), atol=1e-5)

    demand(not is_(image, text), "Text comes first: the pair is read off at position 0, the text's [CLS].")
    demand(not is_(words, patches), "Without its modality nothing says whether a token is a word or a patch: add it.")
    demand(
        not is_(words + modality[1], patches + modality[0]), "Row 0 of the modalities is the text's, row 1 the image's."
    )
    demand(
        not is_(text * mask[..., None], image * seen[..., None]),
        "Padding need not be zero, and zeros are looked at like anything else: hide it through the keys.",
    )
    demand(torch.allclose(got.float(), wanted, atol=1e-5), "Some token is not its word or patch plus its modality.")
    demand(
        keys.shape == (2, 8),
        f"One key per token of the sequence: (2, 8), yours is {tuple(keys.shape)}. Every query sees the same keys.",
    )
    keys, real = keys.bool(), torch.cat([mask, seen], dim=1)
    demand(not torch.equal(keys, ~real), "True means that a token may be looked at; yours are turned round.")
    demand(not keys.all(), "All tokens look at padding: it is not there.")
    demand(not torch.equal(keys, torch.cat([seen, mask], dim=1)), "The keys stand in another order than the tokens.")
    demand(
        torch.equal(keys, real),
        f"Of the second pair's text {int(real[1, :3].sum())} tokens are real, of the first's image "
        f"{int(real[0, 3:].sum())}; you let them see {int(keys[1, :3].sum())} and {int(keys[0, 3:].sum())}.",
    )
    print("ok: words first, each token knows what it is, and nobody looks at padding.")


def _plan(cost: Tensor, beta: float, outer: int) -> Tensor:
    full = [torch.ones(1, count, dtype=torch.bool) for count in cost.shape]
    return ipot(cost[None], *full, beta, outer)[0]


def _sinkhorn(cost: Tensor, beta: float, steps: int = 500) -> Tensor:
    """The softened plan that a proximal step would be, were it the only one: (L, P)."""
    full = [torch.ones(1, count, dtype=torch.bool) for count in cost.shape]
    return ipot(cost[None], *full, beta, outer=1, inner=steps)[0]
