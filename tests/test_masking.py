"""Masking: what may be predicted, how much is, what stands in its place, and the loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlp.data.batch import Text
from minivlp.data.text import load_tokenizer, tokenize
from minivlp.objectives.masking import (
    IGNORE,
    SpanMasking,
    TokenMasking,
    WordMasking,
    labeled_places,
    mask_tokens,
    maskable,
    masked_loss,
)

PAD, CLS, SEP, MASK = 0, 1, 2, 3
SPECIAL = (PAD, CLS, SEP)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts(rows: int = 400, words: int = 12) -> Text:
    """[CLS] words [SEP] and padding; every third id continues the word before it."""
    ids = torch.randint(10, 50, (rows, words + 2), generator=seeded(9))
    ids[:, 0], ids[:, 1] = CLS, 10
    lengths = torch.arange(rows) % words + 3
    place = torch.arange(words + 2)
    ids[place[None] == lengths[:, None] - 1] = SEP
    mask = place[None] < lengths[:, None]
    ids[~mask] = PAD
    word = (~((ids >= 10) & (ids % 3 == 0))).long().cumsum(1)
    return Text(ids, mask, word.masked_fill(ids < 10, -1))


def full(rows: int, length: int) -> Text:
    """Texts without padding and special tokens, every token a word of its own."""
    return Text(torch.full((rows, length), 20), torch.ones(rows, length, dtype=torch.bool))


def whole(chosen, candidates, words):
    """Does every word have all or none of its pieces chosen?"""
    for row in range(len(chosen)):
        for number in words[row].unique():
            pieces = chosen[row][(words[row] == number) & candidates[row]]
            if len(pieces) and pieces.any() != pieces.all():
                return False
    return True


# ------------------------------------------------------------------------------------------------- which are chosen


@pytest.mark.parametrize("kind", [TokenMasking, WordMasking, SpanMasking])
def test_tokens_that_are_masked_alone_are_asked_for_without_any_others(kind):
    some = texts()
    asked = torch.isin(some.ids, torch.tensor([11, 14]))
    has = asked.any(dim=1)
    chosen = kind(0.4, MASK, SPECIAL, alone=(11, 14)).choose(some, seeded())
    only_these = (chosen == asked).all(dim=1) & has
    assert 0.35 < only_these[has].float().mean() < 0.65  # half of the texts that have one
    assert not (chosen & asked)[~only_these].any()  # the others never ask for them
    without = chosen[~has].float().sum() / maskable(some, SPECIAL)[~has].sum()
    assert without > 0.2  # texts without such a token are masked as usual


def test_without_tokens_to_be_masked_alone_the_choice_is_as_before():
    some = texts()
    none_of_these = TokenMasking(0.4, MASK, SPECIAL, alone=(999,))
    assert none_of_these.choose(some, seeded()).float().mean() == pytest.approx(
        TokenMasking(0.4, MASK, SPECIAL).choose(some, seeded()).float().mean().item(), abs=0.02
    )


def test_padding_is_never_chosen_and_special_tokens_as_each_paper_says():
    text = texts()
    bert, albef = maskable(text, (CLS, SEP)), maskable(text, (CLS,))
    assert torch.equal(bert, text.ids >= 10)
    assert torch.equal(albef, (text.ids >= 10) | (text.ids == SEP))
    assert torch.equal(maskable(text), text.mask)


@pytest.mark.parametrize("masking", [TokenMasking, WordMasking, SpanMasking])
def test_the_defaults_never_choose_a_special_token_of_our_tokenizer(masking):
    text = texts(60)
    assert (text.ids[masking(rate=0.9).choose(text, seeded())] >= 10).all()
    assert masking().mask_id == 3 and masking().never_mask == tuple(range(7))
    every = masking(rate=1.0, never_mask=(20,)).choose(full(3, 6), seeded())
    assert not every.any()  # the only id is one of `never_mask`


def test_tokens_are_chosen_at_the_rate():
    text = texts(2000)
    candidates = maskable(text, (CLS,))
    chosen = TokenMasking(0.15, never_mask=(PAD, CLS)).choose(text, seeded())
    assert not (chosen & ~candidates).any() and (chosen & (text.ids == SEP)).any()
    assert chosen.sum() / candidates.sum() == pytest.approx(0.15, abs=0.01)


def test_words_are_chosen_whole_and_at_the_rate():
    text = texts()
    candidates = maskable(text, SPECIAL)
    chosen = WordMasking(0.3).choose(text, seeded())
    assert not (chosen & ~candidates).any() and whole(chosen, candidates, text.word)
    assert chosen.sum() / candidates.sum() == pytest.approx(0.3, abs=0.05)
    tokens = TokenMasking(0.3).choose(text, seeded())
    assert not whole(tokens, candidates, text.word)  # the check itself can fail


@pytest.mark.parametrize("masking", [WordMasking, SpanMasking])
def test_the_pieces_of_a_real_text_are_all_masked_or_none(masking):
    """The word index comes from the tokenizer, not from the ids: any vocabulary works."""
    tokenizer = load_tokenizer()
    captions = ["a zebra behind a giraffe", "unbelievable skyscrapers", "a red heart left of a dog", "x"] * 50
    text = tokenize(tokenizer, captions, 24)
    pieces = torch.stack([(text.word == n).sum(1) for n in range(8)])
    assert (pieces > 1).any()  # some words have several pieces
    chosen = masking(rate=0.4).choose(text, seeded())
    candidates = maskable(text, tuple(range(7)))
    assert whole(chosen, candidates, text.word) and chosen.any() and not chosen[candidates].all()
    masked = masking(rate=0.4).apply(text, len(tokenizer), seeded(3))
    assert whole(masked.labels != IGNORE, candidates, text.word)
    assert torch.equal(masked.text.word, text.word) and torch.equal(masked.text.mask, text.mask)


def test_special_tokens_that_may_be_masked_are_words_of_their_own():
    """They all have the word index -1, but must not be masked together."""
    text = texts(300)
    chosen = WordMasking(0.5, never_mask=()).choose(text, seeded())
    first, last = chosen[:, 0], chosen.gather(1, text.mask.sum(1, keepdim=True) - 1)[:, 0]
    assert 100 < (first != last).sum() < 200 and not (chosen & ~text.mask).any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.25, 0.6]), st.integers(1, 9), st.sampled_from([0.0, 0.2, 1.0]))
def test_spans_are_whole_words_within_their_share(seed, rate, at_most, span_rate):
    text = texts(40)
    candidates = maskable(text, SPECIAL)
    chosen = SpanMasking(rate, at_most=at_most, span_rate=span_rate).choose(text, seeded(seed))
    assert not (chosen & ~candidates).any() and whole(chosen, candidates, text.word)
    for row in range(len(text)):
        share = min(at_most, max(1, round(rate * int(candidates[row].sum()))))
        touched = text.word[row][chosen[row]].unique()
        assert chosen[row].sum() <= share or (len(touched) == 1 and chosen[row].sum() <= at_most)


@pytest.mark.parametrize(("at_most", "rate", "span_rate"), [(2, 0.25, 0.2), (8, 0.6, 0.9)])
def test_single_words_fill_the_share_exactly_and_every_text_has_one(at_most, rate, span_rate):
    text = texts()
    text = Text(text.ids, text.mask)  # every token a word of its own
    candidates = maskable(text, SPECIAL)
    chosen = SpanMasking(rate, at_most=at_most, span_rate=span_rate).choose(text, seeded())
    assert torch.equal(chosen.sum(1), (candidates.sum(1) * rate).round().clamp(1, at_most).long())
    assert not SpanMasking(never_mask=tuple(range(50))).choose(text, seeded()).any()


def test_spans_mask_neighbors_more_often_than_chance():
    together = []
    for span_rate in (0.0, 1.0):
        chosen = SpanMasking(span_rate=span_rate).choose(full(500, 20), seeded())
        together.append((chosen[:, 1:] & chosen[:, :-1]).sum().item())
    assert together[1] > 2 * together[0]


def test_every_position_has_the_same_chance():
    chosen = SpanMasking(span_rate=0.0).choose(full(4000, 8), seeded())
    assert (chosen.float().mean(0) - 0.25).abs().max() < 0.03


def test_padding_and_special_tokens_do_not_change_the_chances_of_the_words():
    """A span begins at a word, never at padding or [CLS]: otherwise the first words would be masked more often."""
    bare, framed = full(4000, 8), torch.full((4000, 40), PAD)
    framed[:, :10] = torch.tensor([CLS, *[20] * 8, SEP])
    framed = Text(framed, framed != PAD, torch.tensor([-1, *range(8), -1] + [-1] * 30).expand(4000, -1))
    masking = SpanMasking(span_rate=1.0)
    rates = [masking.choose(text, seeded()).float().mean(0) for text in (bare, framed)]
    assert (rates[0] - rates[1][1:9]).abs().max() < 0.03


def test_a_word_that_may_not_be_masked_starts_no_span():
    text = full(4000, 8)
    text.ids[:, 3] = 4
    chosen = SpanMasking(at_most=1, span_rate=1.0).choose(text, seeded())
    assert not chosen[:, 3].any() and (chosen.sum(1) == 1).all()
    others = [0, 1, 2, 4, 5, 6, 7]
    assert (chosen[:, others].float().mean(0) - 1 / 7).abs().max() < 0.03  # the word after it, too


def test_spans_do_not_mask_special_tokens_together():
    text = texts(300)
    chosen = SpanMasking(0.3, never_mask=(), span_rate=0.0).choose(text, seeded())
    first, last = chosen[:, 0], chosen.gather(1, text.mask.sum(1, keepdim=True) - 1)[:, 0]
    assert (first != last).sum() > 60 and not (chosen & ~text.mask).any()


@pytest.mark.parametrize("masking", [TokenMasking(0.3), WordMasking(0.3), SpanMasking()])
def test_choices_repeat_by_seed(masking):
    text = texts()
    one, two = (masking.apply(text, 50, seeded(4)) for _ in range(2))
    assert torch.equal(one.text.ids, two.text.ids) and torch.equal(one.labels, two.labels)
    assert not torch.equal(one.labels, masking.apply(text, 50, seeded(5)).labels)


@pytest.mark.parametrize("masking", [TokenMasking(), WordMasking(), SpanMasking()])
def test_an_empty_batch_is_masked(masking):
    masked = masking.apply(texts()[:0], 50)
    assert masked.labels.shape == masked.text.ids.shape == (0, 14)


# ------------------------------------------------------------------------------------------- what stands in their place


def test_masking_is_80_10_10_and_labels_are_the_original_ids():
    ids = torch.randint(10, 50, (300, 40), generator=seeded(1))
    text = Text(ids, torch.ones_like(ids, dtype=torch.bool))
    chosen = TokenMasking(0.5).choose(text, seeded(2))
    masked, labels = mask_tokens(text, chosen, MASK, 50, generator=seeded(3))
    new = masked.ids
    assert torch.equal(new[~chosen], ids[~chosen]) and (labels[~chosen] == IGNORE).all()
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(text.ids, ids)  # the text itself is unchanged
    replaced, kept = new[chosen] == MASK, new[chosen] == ids[chosen]
    assert replaced.float().mean().item() == pytest.approx(0.8 + 0.1 / 50, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.1 + 0.1 / 50, abs=0.02)
    assert new.max() < 50 and len(new[chosen][~replaced & ~kept].unique()) > 40  # any id of the vocabulary
    always, _ = mask_tokens(text, chosen, MASK, 50, mask_share=1.0, random_share=0.0)
    assert (always.ids[chosen] == MASK).all()


# ------------------------------------------------------------------------------------------------------ labeled places


def test_labeled_places_are_the_asked_tokens_of_each_row_in_order():
    labels = torch.full((4, 6), IGNORE)
    labels[0, [1, 4]] = torch.tensor([11, 14])
    labels[1, [0, 2, 5]] = torch.tensor([20, 22, 25])
    labels[3, 3] = 0  # the id 0 is a label, too
    places, asked = labeled_places(labels)
    assert places.shape == asked.shape == (4, 3)
    for row, wanted in enumerate(([1, 4], [0, 2, 5], [], [3])):
        real = asked[row] != IGNORE
        assert places[row][real].tolist() == wanted and asked[row][real].tolist() == labels[row, wanted].tolist()
        assert real.sum() == len(wanted) and real[: len(wanted)].all()  # padding stands at the end
        assert len(set(places[row].tolist())) == 3  # and names other places, each once
    x = torch.randn(4, 6, 2)
    chosen = x.gather(1, places[..., None].expand(-1, -1, 2))
    assert torch.equal(chosen[asked != IGNORE], x[labels != IGNORE])  # as a mask would select them


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6), length=st.integers(1, 30), rate=st.sampled_from([0.1, 0.5, 1.0]), seed=st.integers(0, 99)
)
def test_labeled_places_equal_the_naive_loop(rows, length, rate, seed):
    labels = torch.randint(0, 50, (rows, length), generator=seeded(seed))
    labels[torch.rand(rows, length, generator=seeded(seed + 1)) >= rate] = IGNORE
    places, asked = labeled_places(labels)
    wanted = [[t for t in range(length) if labels[row, t] != IGNORE] for row in range(rows)]
    most = max(map(len, wanted))
    assert places.shape == asked.shape == (rows, most)
    for row in range(rows):
        assert places[row, : len(wanted[row])].tolist() == wanted[row]
        expected = [labels[row, t].item() for t in wanted[row]] + [IGNORE] * (most - len(wanted[row]))
        assert asked[row].tolist() == expected


def test_without_any_label_no_place_is_computed():
    places, asked = labeled_places(torch.full((3, 5), IGNORE))
    assert places.shape == asked.shape == (3, 0)
    places, asked = labeled_places(torch.full((0, 5), IGNORE))
    assert places.shape == asked.shape == (0, 0)


# ------------------------------------------------------------------------------------------------------------ the loss


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
    asked = labels != IGNORE
    assert torch.allclose(masked_loss(logits[asked], labels[asked]), masked_loss(logits, labels))  # any shape


def test_no_label_costs_nothing_and_keeps_the_graph():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    loss = masked_loss(logits, torch.full((2, 3), IGNORE))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
    assert masked_loss(torch.randn(0, 7), torch.zeros(0, dtype=torch.long)) == 0


def test_soft_targets_mix_the_label_with_the_momentum_models_prediction():
    logits, momentum = torch.randn(2, 4, 6, generator=seeded(0)), torch.randn(2, 4, 6, generator=seeded(1))
    momentum.requires_grad_()
    labels = torch.tensor([[1, IGNORE, 2, 3], [IGNORE, 5, IGNORE, 0]])
    hard = masked_loss(logits, labels)
    assert torch.equal(masked_loss(logits, labels, momentum, alpha=0.0), hard)
    expected = 0.0
    for b, t in (labels != IGNORE).nonzero().tolist():
        target = 0.4 * momentum[b, t].softmax(0)
        target = target + 0.6 * torch.nn.functional.one_hot(labels[b, t], 6)
        expected = expected - (target * logits[b, t].log_softmax(0)).sum() / 5
    logits.requires_grad_()
    mixed = masked_loss(logits, labels, momentum, alpha=0.4)
    assert torch.allclose(mixed, expected)
    mixed.backward()
    assert momentum.grad is None  # the momentum model gets no gradient
