"""Matching: which wrong pairs may be drawn, how readily, and the loss."""

import math

import pytest
import torch

from minivlp.objectives.contrastive import same_group
from minivlp.objectives.matching import (
    Negatives,
    hard_negatives,
    matching_loss,
    negative_weights,
    random_negatives,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_weights_equal_the_naive_loop():
    similarity = torch.randn(4, 4, generator=seeded(0), dtype=torch.float64)
    together = torch.eye(4, dtype=torch.bool)
    together[0, 2] = together[2, 0] = True
    weights = negative_weights(similarity, together, floor=1e-4)
    for i in range(4):
        whole = sum(math.exp(similarity[i, k]) for k in range(4))
        for j in range(4):
            expected = 0 if together[i, j] else math.exp(similarity[i, j]) / whole + 1e-4
            assert weights[i, j].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "draw", [lambda s, t, g: hard_negatives(s, t, generator=g), lambda s, t, g: random_negatives(t, g)]
)
def test_no_row_of_the_same_image_and_no_same_words_are_ever_drawn(draw):
    image_ids = torch.tensor([7, 7, 8, 9, 10])
    ids = torch.tensor([[1, 5, 2], [1, 6, 2], [1, 7, 2], [1, 7, 2], [1, 8, 2]])
    together = same_group(image_ids, ids)
    similarity = 50 * together.double()  # what may not be drawn is what looks best
    generator, seen_image, seen_text = seeded(0), set(), set()
    for _ in range(200):
        image, text = draw(similarity, together, generator)
        seen_image |= {(i, b) for b, i in enumerate(image.tolist())}
        seen_text |= set(enumerate(text.tolist()))
    allowed = {(i, j) for i in range(5) for j in range(5) if not together[i, j]}
    assert seen_image == allowed and seen_text == allowed


def test_hard_negatives_follow_likeness_in_both_directions():
    similarity = torch.full((4, 4), -20.0)
    similarity[0, 3] = 20.0  # image 0 looks like text 3
    for seed in range(20):
        image, text = hard_negatives(similarity, torch.eye(4, dtype=torch.bool), floor=0, generator=seeded(seed))
        assert text[0] == 3 and image[3] == 0


def test_random_negatives_do_not():
    generator = seeded(0)
    together = torch.eye(3, dtype=torch.bool)
    drawn = torch.stack([random_negatives(together, generator).text for _ in range(300)])
    assert 100 < (drawn[:, 0] == 1).sum() < 200
    one_way = torch.tensor([[True, True, False], [False, True, False], [False, False, True]])  # image 0 fits text 1 too
    negatives = random_negatives(one_way)
    assert negatives.text[0] == 2 and negatives.image[1] == 2


def test_rows_without_any_wrong_partner_are_dropped():
    together = torch.tensor([[True, True, False], [True, True, True], [False, True, True]])
    negatives = hard_negatives(torch.zeros(3, 3), together)
    assert negatives.text.tolist() == [2, -1, 0] and negatives.image.tolist() == [2, -1, 0]
    assert [rows.tolist() for rows in negatives.text_pairs()] == [[0, 2], [2, 0]]
    assert [rows.tolist() for rows in negatives.image_pairs()] == [[2, 0], [0, 2]]
    alone = hard_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert matching_loss(torch.zeros(1, 2), torch.zeros(len(alone.text_pairs()[0]), 2)).isfinite()


def test_pairs_name_the_image_first():
    negatives = Negatives(image=torch.tensor([1, 2, 0]), text=torch.tensor([2, 0, 1]))
    assert torch.stack(negatives.image_pairs(), 1).tolist() == [[1, 0], [2, 1], [0, 2]]
    assert torch.stack(negatives.text_pairs(), 1).tolist() == [[0, 2], [1, 0], [2, 1]]


def test_drawing_leaves_the_similarity_without_gradient_and_repeats_by_seed():
    similarity = torch.randn(6, 6, generator=seeded(1)).requires_grad_()
    together = torch.eye(6, dtype=torch.bool)
    assert not negative_weights(similarity, together).requires_grad
    one, two = (hard_negatives(similarity, together, generator=seeded(3)) for _ in range(2))
    assert torch.equal(one.image, two.image) and torch.equal(one.text, two.text)


def test_a_floor_saves_rows_that_the_softmax_has_emptied():
    similarity = torch.zeros(3, 3) + 1000 * torch.eye(3)
    together = torch.eye(3, dtype=torch.bool)
    assert (hard_negatives(similarity, together, floor=0).text == -1).all()
    assert (hard_negatives(similarity, together).text >= 0).all()


def test_loss_equals_the_naive_loop_and_starts_at_ln_2():
    right, wrong = torch.randn(3, 2, generator=seeded(0)), torch.randn(6, 2, generator=seeded(1))
    terms = [-row.log_softmax(0)[1] for row in right] + [-row.log_softmax(0)[0] for row in wrong]
    assert torch.allclose(matching_loss(right, wrong), torch.stack(terms).mean())
    assert matching_loss(0 * right, 0 * wrong).item() == pytest.approx(math.log(2))
    sure = torch.tensor([[-20.0, 20.0]])
    assert matching_loss(sure, -sure).item() == pytest.approx(0, abs=1e-6)
