"""Lesson 02's checks: the solution passes, typical wrong answers fail with the message meant for them."""

import pytest
import torch

from minivlp.lessons import vilt
from minivlp.lessons.check import NotYet


def mask_words(word, maskable, rate):
    return (torch.rand(word.shape).gather(1, word) < rate) & maskable


def mask_pieces(word, maskable, rate):
    return (torch.rand(word.shape) < rate) & maskable


def mask_words_of_masked_pieces(word, maskable, rate):
    chosen = mask_pieces(word, maskable, rate)
    same = word[:, :, None] == word[:, None, :]
    return (same & chosen[:, None, :]).any(2) & maskable


def plan(cost, beta, outer, sign=-1, keep=True, shares=True):
    words, patches = cost.shape if shares else (1, 1)
    kernel, moved = (sign * cost / beta).exp(), torch.ones_like(cost)
    rows = torch.full((len(cost), 1), 1 / len(cost))
    for _ in range(outer):
        step = kernel * moved if keep else kernel
        columns = 1 / patches / (step * rows).sum(0, keepdim=True)
        rows = 1 / words / (step * columns).sum(1, keepdim=True)
        moved = rows * step * columns
    return moved


def plan_rows_first(cost, beta, outer):
    """Rescales in the other order, so that the patches' shares are exact, not the words'."""
    return plan(cost.T, beta, outer).T


def sequence(text, text_mask, image, image_mask, token_type):
    return torch.cat([text + token_type[0], image + token_type[1]], 1), torch.cat([text_mask, image_mask], 1)


def with_mask(change):
    """The right sequence with another mask."""

    def answer(text, text_mask, image, image_mask, token_type):
        tokens, _ = sequence(text, text_mask, image, image_mask, token_type)
        return tokens, change(text_mask, image_mask)

    return answer


def zeroed(text, text_mask, image, image_mask, token_type):
    tokens, mask = sequence(text, text_mask, image, image_mask, token_type)
    return tokens * mask[..., None], mask


def plan_that_forgets(cost, beta, outer):
    """Starts from equal row factors again in every step."""
    moved = torch.ones_like(cost)
    for _ in range(outer):
        step = moved * (-cost / beta).exp()
        columns = 1 / cost.shape[1] / step.mean(0, keepdim=True)
        moved = step * columns / (step * columns).sum(1, keepdim=True) / cost.shape[0]
    return moved


def mask_with_seed(word, maskable, rate):
    torch.manual_seed(1)
    return mask_words(word, maskable, rate)


def mask_in_place(word, maskable, rate):
    maskable &= torch.rand(word.shape).gather(1, word) < rate
    return maskable


def plan_in_place(cost, beta, outer):
    return plan(cost.div_(beta), 1.0, outer)


def sequence_in_place(text, text_mask, image, image_mask, token_type):
    text += token_type[0]
    image += token_type[1]
    return torch.cat([text, image], 1), torch.cat([text_mask, image_mask], 1)


RIGHT = [
    (vilt.check_whole_words, mask_in_place),
    (vilt.check_plan, plan_in_place),
    (vilt.check_sequence, sequence_in_place),
    (vilt.check_whole_words, mask_words),
    (vilt.check_plan, plan),
    (vilt.check_sequence, sequence),
]


@pytest.mark.parametrize("check, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


def test_answers_may_be_of_another_type(capsys):
    """A plan in float64, and choices as 0 and 1, are right too."""
    vilt.check_whole_words(lambda *a: mask_words(*a).int())
    vilt.check_plan(lambda cost, beta, outer: plan(cost.double(), beta, outer))
    vilt.check_sequence(lambda *a: [x.int() if x.dtype == torch.bool else x.double() for x in sequence(*a)])
    assert capsys.readouterr().out.count("ok:") == 3


@pytest.mark.parametrize("seed", range(5))
def test_luck_does_not_decide(seed, capsys):
    torch.manual_seed(seed)
    vilt.check_whole_words(mask_words)


def stub(*arguments):
    raise NotImplementedError("your turn")


WRONG = [
    (vilt.check_whole_words, stub, "Nothing written yet"),
    (vilt.check_whole_words, lambda w, m, r: None, "`return` missing"),
    (vilt.check_whole_words, lambda w, m, r: mask_words(w, m, r)[:, 0], "One answer per token"),
    (vilt.check_whole_words, lambda w, m, r: mask_words(w, torch.ones_like(m), r), "only where `maskable`"),
    (vilt.check_whole_words, lambda w, m, r: m & False, "nothing is masked"),
    (vilt.check_whole_words, mask_pieces, "one number per word"),
    (vilt.check_whole_words, mask_words_of_masked_pieces, "Draw once per word"),
    (vilt.check_whole_words, lambda w, m, r: mask_words(w, m, 1 - r), "below the rate"),
    (vilt.check_whole_words, lambda w, m, r: (torch.rand(1, 10).expand_as(w).gather(1, w) < max(r, 0.5)) & m, "anew"),
    (vilt.check_whole_words, lambda w, m, r: (torch.rand(len(w), 1) < r) & m, "all words are masked or none"),
    (vilt.check_whole_words, lambda w, m, r: mask_words(w, m, r / 2), "with probability 0.15"),
    (vilt.check_whole_words, lambda w, m, r: mask_words(w, m, min(r, 0.15)), "At rate 1"),
    (vilt.check_whole_words, mask_with_seed, "do not set a seed"),
    (vilt.check_plan, plan_rows_first, "rows first"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o if o > 9 else o + 1), "of ones"),
    (vilt.check_plan, plan_that_forgets, "All patches take"),
    (vilt.check_plan, stub, "Nothing written yet"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o).T, "(4, 6)"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o) / 0 * 0, "NaN or infinity"),
    (vilt.check_plan, lambda c, b, o: -plan(c, b, o), "negative"),
    (vilt.check_plan, lambda c, b, o: 4 * plan(c, b, o), "words give 1 each"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o, shares=False), "1 each"),
    (vilt.check_plan, lambda c, b, o: (-c / b).softmax(1) / 4, "All patches take"),
    (vilt.check_plan, lambda c, b, o: (-c / b).softmax(0) / 6, "All words give"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o, sign=1), "highest cost"),
    (vilt.check_plan, lambda c, b, o: torch.full_like(c, 1 / c.numel()), "does not depend on the cost"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o, keep=False), "Sinkhorn"),
    (vilt.check_plan, lambda c, b, o: 0.9 * plan(c, b, o) + 0.1 / 24, "The lowest cost"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, 200), "use `outer`"),
    (vilt.check_plan, lambda c, b, o: plan(c, 0.5, o), "beta"),
    (vilt.check_sequence, stub, "Nothing written yet"),
    (vilt.check_sequence, lambda *a: sequence(*a)[0], "two things"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p[:, 1:], s[:, 1:], t), "are eight"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(p, s, w, m, t.flip(0)), "Text comes first"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p, s, 0 * t), "add the token-type embedding"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p, s, t.flip(0)), "Row 0"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p, s, t.detach()), "`token_type` no gradient"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w.detach(), m, p, s, t), "`text` no gradient"),
    (vilt.check_sequence, lambda *a: [x.squeeze(0) for x in sequence(*a)], "A single pair"),
    (vilt.check_sequence, zeroed, "Padding need not be zero"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p, s, 2 * t), "plus its token type"),
    (vilt.check_sequence, with_mask(lambda m, s: m), "One entry per token"),
    (vilt.check_sequence, with_mask(lambda m, s: ~torch.cat([m, s], 1)), "inverted"),
    (vilt.check_sequence, with_mask(lambda m, s: torch.ones(2, 8)), "all tokens attend to padding"),
    (vilt.check_sequence, with_mask(lambda m, s: torch.cat([s, m], 1)), "another order"),
    (vilt.check_sequence, with_mask(lambda m, s: torch.cat([m, torch.ones_like(s)], 1)), "of the first's image"),
]


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(check, answer, message):
    with pytest.raises(NotYet, match=message):
        check(answer)
