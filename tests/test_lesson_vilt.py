"""Lesson 02's checks: the solution passes, typical wrong answers fail with the message meant for them."""

import pytest
import torch

from minivlp.lessons import vilt
from minivlp.lessons.check import NotYet


def hide(words, may, rate):
    return (torch.rand(words.shape).gather(1, words) < rate) & may


def hide_tokens(words, may, rate):
    return (torch.rand(words.shape) < rate) & may


def hide_words_of_hidden_pieces(words, may, rate):
    chosen = hide_tokens(words, may, rate)
    same = words[:, :, None] == words[:, None, :]
    return (same & chosen[:, None, :]).any(2) & may


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


def plan_patches_first(cost, beta, outer):
    """Rescales in the other order; as right."""
    return plan(cost.T, beta, outer).T


def sequence(words, mask, patches, seen, modality):
    return torch.cat([words + modality[0], patches + modality[1]], 1), torch.cat([mask, seen], 1)


def with_keys(change):
    """The right sequence with other keys."""

    def answer(words, mask, patches, seen, modality):
        tokens, _ = sequence(words, mask, patches, seen, modality)
        return tokens, change(mask, seen)

    return answer


def zeroed(words, mask, patches, seen, modality):
    return torch.cat([(words + modality[0]) * mask[..., None], (patches + modality[1]) * seen[..., None]], 1), mask


RIGHT = [
    (vilt.check_whole_words, hide),
    (vilt.check_plan, plan),
    (vilt.check_plan, plan_patches_first),
    (vilt.check_sequence, sequence),
]


@pytest.mark.parametrize("check, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


def test_answers_may_be_of_another_type(capsys):
    """A plan in float64, and choices as 0 and 1, are right too."""
    vilt.check_whole_words(lambda *a: hide(*a).int())
    vilt.check_plan(lambda cost, beta, outer: plan(cost.double(), beta, outer))
    vilt.check_sequence(lambda *a: [x.int() if x.dtype == torch.bool else x.double() for x in sequence(*a)])
    assert capsys.readouterr().out.count("ok:") == 3


@pytest.mark.parametrize("seed", range(5))
def test_luck_does_not_decide(seed, capsys):
    torch.manual_seed(seed)
    vilt.check_whole_words(hide)


def stub(*arguments):
    raise NotImplementedError("your turn")


WRONG = [
    (vilt.check_whole_words, stub, "Nothing written yet"),
    (vilt.check_whole_words, lambda w, m, r: None, "`return` missing"),
    (vilt.check_whole_words, lambda w, m, r: hide(w, m, r)[:, 0], "One answer per token"),
    (vilt.check_whole_words, lambda w, m, r: hide(w, torch.ones_like(m), r), "only where `may`"),
    (vilt.check_whole_words, lambda w, m, r: m & False, "nothing is hidden"),
    (vilt.check_whole_words, hide_tokens, "one number per word"),
    (vilt.check_whole_words, hide_words_of_hidden_pieces, "Draw once per word"),
    (vilt.check_whole_words, lambda w, m, r: hide(w, m, 1 - r), "below the rate"),
    (vilt.check_whole_words, lambda w, m, r: (torch.rand(1, 10).expand_as(w).gather(1, w) < max(r, 0.5)) & m, "anew"),
    (vilt.check_whole_words, lambda w, m, r: (torch.rand(len(w), 1) < r) & m, "all of its words or none"),
    (vilt.check_whole_words, lambda w, m, r: hide(w, m, r / 2), "with probability 0.15"),
    (vilt.check_whole_words, lambda w, m, r: hide(w, m, min(r, 0.15)), "At rate 1"),
    (vilt.check_plan, stub, "Nothing written yet"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o).T, "(4, 6)"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o) / 0 * 0, "NaN or infinity"),
    (vilt.check_plan, lambda c, b, o: -plan(c, b, o), "negative"),
    (vilt.check_plan, lambda c, b, o: 4 * plan(c, b, o), "words give 1 each"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o, shares=False), "1 each"),
    (vilt.check_plan, lambda c, b, o: (-c / b).softmax(1) / 4, "All patches take"),
    (vilt.check_plan, lambda c, b, o: (-c / b).softmax(0) / 6, "All words give"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o, sign=1), "dearest plan"),
    (vilt.check_plan, lambda c, b, o: torch.full_like(c, 1 / c.numel()), "the cost has no say"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o, keep=False), "Sinkhorn"),
    (vilt.check_plan, lambda c, b, o: 0.9 * plan(c, b, o) + 0.1 / 24, "The cheapest plan costs"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, 200), "use `outer`"),
    (vilt.check_plan, lambda c, b, o: plan(c, 0.5, o), "beta"),
    (vilt.check_sequence, stub, "Nothing written yet"),
    (vilt.check_sequence, lambda *a: sequence(*a)[0], "two things"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p[:, 1:], s[:, 1:], t), "eight tokens"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(p, s, w, m, t.flip(0)), "Text comes first"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p, s, 0 * t), "Without its modality"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p, s, t.flip(0)), "Row 0"),
    (vilt.check_sequence, zeroed, "Padding need not be zero"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p, s, 2 * t), "plus its modality"),
    (vilt.check_sequence, with_keys(lambda m, s: m), "One key per token"),
    (vilt.check_sequence, with_keys(lambda m, s: ~torch.cat([m, s], 1)), "turned round"),
    (vilt.check_sequence, with_keys(lambda m, s: torch.ones(2, 8)), "All tokens look at padding"),
    (vilt.check_sequence, with_keys(lambda m, s: torch.cat([s, m], 1)), "another order"),
    (vilt.check_sequence, with_keys(lambda m, s: torch.cat([m, torch.ones_like(s)], 1)), "of the first's image"),
]


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(check, answer, message):
    with pytest.raises(NotYet, match=message):
        check(answer)
