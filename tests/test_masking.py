"""Masking: what may be asked, how much is, what stands in its place, and the loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlp.objectives.masking import (
    IGNORE,
    choose_spans,
    choose_tokens,
    choose_words,
    hide,
    maskable,
    masked_loss,
    word_groups,
)

PAD, CLS, SEP, MASK = 0, 1, 2, 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts(rows: int = 400, words: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask and word numbers: [CLS] words [SEP] and padding; every third id goes on with the word before."""
    ids = torch.randint(10, 50, (rows, words + 2), generator=seeded(9))
    ids[:, 0], ids[:, 1] = CLS, 10
    lengths = torch.arange(rows) % words + 3
    place = torch.arange(words + 2)
    ids[place[None] == lengths[:, None] - 1] = SEP
    mask = place[None] < lengths[:, None]
    ids[~mask] = PAD
    return ids, mask, word_groups((ids >= 10) & (ids % 3 == 0))


def test_padding_is_never_asked_and_special_tokens_as_each_paper_says():
    ids, mask, _ = texts()
    bert, albef = maskable(ids, mask, (CLS, SEP)), maskable(ids, mask, (CLS,))
    assert torch.equal(bert, ids >= 10)
    assert torch.equal(albef, (ids >= 10) | (ids == SEP))
    assert torch.equal(maskable(ids, mask), mask)


def test_word_groups():
    continues = torch.tensor([[False, False, True, True, False]])
    assert word_groups(continues).tolist() == [[1, 2, 2, 2, 3]]


def test_tokens_are_chosen_at_the_rate():
    ids, mask, _ = texts(2000)
    candidates = maskable(ids, mask, (CLS,))
    chosen = choose_tokens(candidates, 0.15, seeded())
    assert not (chosen & ~candidates).any()
    assert chosen.sum() / candidates.sum() == pytest.approx(0.15, abs=0.01)


def whole(chosen, candidates, words):
    """Does every word have all or none of its pieces chosen?"""
    for row in range(len(chosen)):
        for number in words[row].unique():
            pieces = chosen[row][(words[row] == number) & candidates[row]]
            if len(pieces) and pieces.any() != pieces.all():
                return False
    return True


def test_words_are_chosen_whole_and_at_the_rate():
    ids, mask, words = texts()
    candidates = maskable(ids, mask, (CLS, SEP))
    chosen = choose_words(candidates, words, 0.3, seeded())
    assert not (chosen & ~candidates).any() and whole(chosen, candidates, words)
    assert chosen.sum() / candidates.sum() == pytest.approx(0.3, abs=0.05)
    assert not whole(choose_tokens(candidates, 0.3, seeded()), candidates, words)  # the check itself can fail


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.25, 0.6]), st.integers(1, 9), st.sampled_from([0.0, 0.2, 1.0]))
def test_spans_are_whole_words_within_their_share(seed, rate, at_most, span_rate):
    ids, mask, words = texts(40)
    candidates = maskable(ids, mask, (CLS, SEP))
    chosen = choose_spans(candidates, words, rate, at_most, span_rate, seeded(seed))
    assert not (chosen & ~candidates).any() and whole(chosen, candidates, words)
    for row in range(len(ids)):
        share = min(at_most, max(1, round(rate * int(candidates[row].sum()))))
        touched = words[row][chosen[row]].unique()
        assert chosen[row].sum() <= share or (len(touched) == 1 and chosen[row].sum() <= at_most)


@pytest.mark.parametrize(("at_most", "rate", "span_rate"), [(2, 0.25, 0.2), (8, 0.6, 0.9)])
def test_single_words_fill_the_share_exactly_and_never_leave_a_text_unasked(at_most, rate, span_rate):
    ids, mask, _ = texts()
    each_its_own = word_groups(torch.zeros_like(mask))
    candidates = maskable(ids, mask, (CLS, SEP))
    chosen = choose_spans(candidates, each_its_own, rate, at_most, span_rate, seeded())
    assert torch.equal(chosen.sum(1), (candidates.sum(1) * rate).round().clamp(1, at_most).long())
    nothing = choose_spans(torch.zeros_like(mask), each_its_own, generator=seeded())
    assert not nothing.any()


def test_spans_hide_neighbours_more_often_than_chance():
    mask = torch.ones(500, 20, dtype=torch.bool)
    words = word_groups(~mask)
    together = []
    for span_rate in (0.0, 1.0):
        chosen = choose_spans(mask, words, 0.25, 8, span_rate, seeded())
        together.append((chosen[:, 1:] & chosen[:, :-1]).sum().item())
    assert together[1] > 2 * together[0]


def test_every_position_has_the_same_chance():
    mask = torch.ones(4000, 8, dtype=torch.bool)
    chosen = choose_spans(mask, word_groups(~mask), 0.25, 8, 0.0, seeded())
    assert (chosen.float().mean(0) - 0.25).abs().max() < 0.03


def test_hiding_is_80_10_10_and_labels_are_the_truth():
    ids = torch.randint(10, 50, (300, 40), generator=seeded(1))
    chosen = choose_tokens(torch.ones_like(ids, dtype=torch.bool), 0.5, seeded(2))
    hidden, labels = hide(ids, chosen, MASK, 50, generator=seeded(3))
    assert torch.equal(hidden[~chosen], ids[~chosen]) and (labels[~chosen] == IGNORE).all()
    assert torch.equal(labels[chosen], ids[chosen])
    masked, kept = hidden[chosen] == MASK, hidden[chosen] == ids[chosen]
    assert masked.float().mean().item() == pytest.approx(0.8 + 0.1 / 50, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.1 + 0.1 / 50, abs=0.02)
    assert hidden.max() < 50 and len(hidden[chosen][~masked & ~kept].unique()) > 40  # any word of the vocabulary
    always, _ = hide(ids, chosen, MASK, 50, mask_share=1.0, random_share=0.0)
    assert (always[chosen] == MASK).all()


def test_choices_repeat_by_seed():
    ids, mask, words = texts()
    one, two = (choose_spans(mask, words, generator=seeded(4)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, choose_spans(mask, words, generator=seeded(5)))


def test_loss_equals_the_naive_loop_and_starts_at_ln_v():
    logits = torch.randn(3, 5, 11, generator=seeded(0), dtype=torch.float64)
    labels = torch.full((3, 5), IGNORE)
    labels[0, 1], labels[2, 2], labels[2, 4] = 4, 0, 10
    terms = [-logits[b, t].log_softmax(0)[labels[b, t]] for b, t in ((0, 1), (2, 2), (2, 4))]
    assert torch.allclose(masked_loss(logits, labels), torch.stack(terms).mean())
    assert masked_loss(0 * logits, labels).item() == pytest.approx(math.log(11))
    changed = logits.clone()
    changed[labels == IGNORE] += 100  # what is not asked does not count
    assert torch.equal(masked_loss(changed, labels), masked_loss(logits, labels))


def test_no_question_costs_nothing_and_keeps_the_graph():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    loss = masked_loss(logits, torch.full((2, 3), IGNORE))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_soft_targets_mix_truth_and_teacher():
    logits, teacher = torch.randn(2, 4, 6, generator=seeded(0)), torch.randn(2, 4, 6, generator=seeded(1))
    teacher.requires_grad_()
    labels = torch.tensor([[1, IGNORE, 2, 3], [IGNORE, 5, IGNORE, 0]])
    hard = masked_loss(logits, labels)
    assert torch.equal(masked_loss(logits, labels, teacher, alpha=0.0), hard)
    expected = 0.0
    for b, t in (labels != IGNORE).nonzero().tolist():
        target = 0.4 * teacher[b, t].softmax(0)
        target = target + 0.6 * torch.nn.functional.one_hot(labels[b, t], 6)
        expected = expected - (target * logits[b, t].log_softmax(0)).sum() / 5
    logits.requires_grad_()
    mixed = masked_loss(logits, labels, teacher, alpha=0.4)
    assert torch.allclose(mixed, expected)
    mixed.backward()
    assert teacher.grad is None  # the teacher is not taught
