"""Matching: which negatives may be drawn, how likely each is, and the loss."""

import math

import pytest
import torch

from minivlp.data.batch import Text
from minivlp.objectives.contrastive import find_positives
from minivlp.objectives.matching import (
    Negatives,
    hard_negatives,
    matching_loss,
    random_negatives,
    sampling_weights,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_weights_equal_the_naive_loop():
    logits = torch.randn(4, 4, generator=seeded(0), dtype=torch.float64)
    positives = torch.eye(4, dtype=torch.bool)
    positives[0, 2] = positives[2, 0] = True
    for floor in (0.0, 1e-5, 1e-4):
        weights = sampling_weights(logits, positives, floor)
        for i in range(4):
            total = sum(math.exp(logits[i, k]) for k in range(4))
            for j in range(4):
                expected = 0 if positives[i, j] else math.exp(logits[i, j]) / total + floor
                assert weights[i, j].item() == pytest.approx(expected, abs=1e-15)
    assert torch.equal(sampling_weights(logits, positives), sampling_weights(logits, positives, 0.0))


@pytest.mark.parametrize(
    "draw", [lambda s, p, g: hard_negatives(s, p, 1e-5, generator=g), lambda s, p, g: random_negatives(p, g)]
)
def test_no_row_of_the_same_image_and_no_equal_caption_is_ever_drawn(draw):
    image_ids = torch.tensor([7, 7, 8, 9, 10])
    ids = torch.tensor([[1, 5, 2], [1, 6, 2], [1, 7, 2], [1, 7, 2], [1, 8, 2]])
    positives = find_positives(image_ids, Text(ids, ids > 0))
    logits = 10 * positives.double()  # the highest logits belong to what may not be drawn
    generator, seen_image, seen_text = seeded(0), set(), set()
    for _ in range(200):
        image, text = draw(logits, positives, generator)
        seen_image |= {(i, b) for b, i in enumerate(image.tolist())}
        seen_text |= set(enumerate(text.tolist()))
    allowed = {(i, j) for i in range(5) for j in range(5) if not positives[i, j]}
    assert seen_image == allowed and seen_text == allowed


def test_hard_negatives_follow_the_similarity_in_both_directions():
    logits = torch.full((4, 4), -20.0)
    logits[0, 3] = 20.0  # image 0 is similar to text 3
    for seed in range(20):
        image, text = hard_negatives(logits, torch.eye(4, dtype=torch.bool), generator=seeded(seed))
        assert text[0] == 3 and image[3] == 0


def test_hard_negatives_are_drawn_in_proportion_to_their_weights():
    logits = torch.tensor([9.0, 0.6, 0.3, 0.1]).log().expand(4, 4)
    generator, positives = seeded(0), torch.eye(4, dtype=torch.bool)
    drawn = torch.stack([hard_negatives(logits, positives, generator=generator).text for _ in range(2000)])
    shares = torch.bincount(drawn[:, 0], minlength=4) / 2000
    assert (shares - torch.tensor([0, 0.6, 0.3, 0.1])).abs().max() < 0.04


def test_the_way_back_may_have_logits_of_its_own():
    logits, back = torch.full((4, 4), -20.0), torch.full((4, 4), -20.0)
    logits[0, 3] = 20.0  # image 0 is similar to text 3
    back[1, 2] = 20.0  # text 1 is similar to image 2
    one_way = torch.eye(4, dtype=torch.bool)
    one_way[3, 1] = True  # image 3 fits text 1
    back[1, 3] = 30.0  # most similar, but a positive
    for seed in range(20):
        image, text = hard_negatives(logits, one_way, back=back, generator=seeded(seed))
        assert text[0] == 3 and image[1] == 2
    drawn = torch.stack([hard_negatives(logits, one_way, back=back, generator=seeded(s)).image for s in range(60)])
    assert (drawn[:, 3] != 0).any()  # the transpose of `logits` would always give 0


def test_random_negatives_are_drawn_evenly():
    generator = seeded(0)
    drawn = torch.stack([random_negatives(torch.eye(3, dtype=torch.bool), generator).text for _ in range(300)])
    assert 100 < (drawn[:, 0] == 1).sum() < 200
    one_way = torch.tensor([[True, True, False], [False, True, False], [False, False, True]])  # image 0 fits text 1 too
    for _ in range(20):
        negatives = random_negatives(one_way, generator)
        assert negatives.text[0] == 2 and negatives.image[1] == 2


def test_rows_without_a_negative_are_left_out():
    positives = torch.tensor([[True, True, False], [True, True, True], [False, True, True]])
    negatives = hard_negatives(torch.zeros(3, 3), positives)
    assert negatives.text.tolist() == [2, -1, 0] and negatives.image.tolist() == [2, -1, 0]
    assert [rows.tolist() for rows in negatives.pairs()] == [[2, 0, 0, 2], [0, 2, 2, 0]]  # (image, text)
    alone = hard_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert [len(rows) for rows in alone.pairs()] == [0, 0]
    assert matching_loss(torch.zeros(1, 2), torch.zeros(0, 2)).isfinite()


def test_pairs_name_the_image_first_and_drawn_images_before_drawn_texts():
    negatives = Negatives(image=torch.tensor([1, 2, 0]), text=torch.tensor([2, 0, 1]))
    pairs = torch.stack(negatives.pairs(), 1).tolist()
    assert pairs == [[1, 0], [2, 1], [0, 2]] + [[0, 2], [1, 0], [2, 1]]


def test_drawing_gives_no_gradient_and_repeats_by_seed():
    logits = torch.randn(6, 6, generator=seeded(1)).requires_grad_()
    positives = torch.eye(6, dtype=torch.bool)
    assert not sampling_weights(logits, positives).requires_grad
    one, two = (hard_negatives(logits, positives, generator=seeded(3)) for _ in range(2))
    assert torch.equal(one.image, two.image) and torch.equal(one.text, two.text)


def test_a_floor_saves_rows_whose_weights_all_underflow():
    """ALBEF and VLMo have none: such a row has no negative. X-VLM adds 1e-5: it draws evenly."""
    logits, positives = torch.zeros(3, 3) + 1000 * torch.eye(3), torch.eye(3, dtype=torch.bool)
    assert (sampling_weights(logits, positives, 0.0) == 0).all()
    assert torch.equal(sampling_weights(logits, positives, 1e-5), 1e-5 * (~positives).float())
    assert (hard_negatives(logits, positives, floor=0.0).text == -1).all()
    assert (hard_negatives(logits, positives).text == -1).all()  # the default
    generator = seeded(0)
    drawn = torch.stack([hard_negatives(logits, positives, 1e-5, generator=generator).text for _ in range(300)])
    assert (drawn >= 0).all() and 100 < (drawn[:, 0] == 1).sum() < 200


@pytest.mark.parametrize("floor", [0.0, 1e-5])
def test_a_row_of_positives_has_no_negative_whatever_the_floor(floor):
    positives = torch.eye(3, dtype=torch.bool)
    positives[1] = True
    assert not sampling_weights(torch.randn(3, 3), positives, floor)[1].any()
    negatives = hard_negatives(torch.randn(3, 3), positives, floor)
    assert negatives.text[1] == -1 and (negatives.text[[0, 2]] >= 0).all() and (negatives.image >= 0).all()


def test_a_positive_is_not_drawn_where_all_weights_are_near_the_smallest_float():
    logits = torch.full((3, 3), -torch.inf, dtype=torch.float64)
    logits[:, 0], logits[:, 1] = 0.0, -744.0
    positives = torch.zeros(3, 3, dtype=torch.bool)
    positives[:, 0] = True
    assert 0 < sampling_weights(logits, positives).max() < 1e-322
    generator = seeded(0)
    assert all((hard_negatives(logits, positives, generator=generator).text == 1).all() for _ in range(300))


def test_a_floor_hardly_changes_other_rows():
    """A hundred rows of logit -3 beside one of 3: the floor of 1e-5 adds a thousandth."""
    logits, positives = torch.full((1, 101), -3.0), torch.zeros(1, 101, dtype=torch.bool)
    logits[0, 0] = 3.0
    bare, floored = (sampling_weights(logits, positives, floor)[0] for floor in (0.0, 1e-5))
    assert torch.allclose(floored - bare, torch.full((101,), 1e-5), atol=1e-7)
    assert abs(floored[0] / floored.sum() - bare[0] / bare.sum()) < 2e-3


def test_loss_equals_the_naive_loop_and_starts_at_ln_2():
    matched, negatives = torch.randn(3, 2, generator=seeded(0)), torch.randn(6, 2, generator=seeded(1))
    terms = [-row.log_softmax(0)[1] for row in matched] + [-row.log_softmax(0)[0] for row in negatives]
    assert torch.allclose(matching_loss(matched, negatives), torch.stack(terms).mean())
    assert matching_loss(0 * matched, 0 * negatives).item() == pytest.approx(math.log(2))
    sure = torch.tensor([[-20.0, 20.0]])
    assert matching_loss(sure, -sure).item() == pytest.approx(0, abs=1e-6)
