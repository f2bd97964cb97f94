"""The contrastive loss: value at a blind guess, symmetry, a naive loop, and duplicates of an image."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlp.objectives.contrastive import contrastive_loss, same_group, soft_cross_entropy


def vectors(rows, width=8, seed=0):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


def naive(images, texts, scale, positive):
    """For each picture: minus the mean log-probability of its captions; then the same for each caption."""
    total, n = 0.0, len(images)
    for i in range(n):
        for mine, theirs, right in ((images, texts, positive[i]), (texts, images, positive[:, i])):
            scores = [float(scale * (mine[i] @ other)) for other in theirs]
            norm = math.log(sum(math.exp(s) for s in scores))
            hits = [norm - s for s, r in zip(scores, right.tolist(), strict=True) if r]
            total += sum(hits) / len(hits)
    return total / (2 * n)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 7), seed=st.integers(0, 99), groups=st.integers(1, 7), scale=st.floats(0.1, 30))
def test_equals_the_naive_loop_with_any_duplicates(rows, seed, groups, scale):
    image_ids = torch.randint(groups, (rows,), generator=torch.Generator().manual_seed(seed))
    images, texts, positive = vectors(rows, seed=seed), vectors(rows, seed=seed + 1000), same_group(image_ids)
    loss = contrastive_loss(images, texts, torch.tensor(scale), positive)
    assert loss.item() == pytest.approx(naive(images, texts, scale, positive), rel=1e-6)


def test_a_blind_model_pays_log_batch():
    same = vectors(1).expand(16, -1)
    assert contrastive_loss(same, same, torch.tensor(14.0)).item() == pytest.approx(math.log(16))


def test_symmetric_in_image_and_text():
    a, b, positive = vectors(6), vectors(6, seed=1), same_group(torch.tensor([0, 1, 1, 2, 3, 3]))
    s = torch.tensor(5.0)
    assert torch.isclose(contrastive_loss(a, b, s, positive), contrastive_loss(b, a, s, positive))


def test_order_of_the_batch_does_not_matter():
    a, b, ids = vectors(6), vectors(6, seed=1), torch.tensor([0, 1, 1, 2, 3, 3])
    p = torch.randperm(6)
    s = torch.tensor(5.0)
    one, two = contrastive_loss(a, b, s, same_group(ids)), contrastive_loss(a[p], b[p], s, same_group(ids[p]))
    assert torch.isclose(one, two)


def test_a_duplicate_image_is_not_pushed_away():
    """Two rows of one picture: each is drawn to both captions, not away from the other's."""
    image = torch.eye(8).double()[[0, 0, 1, 2]]
    groups = same_group(torch.tensor([5, 5, 6, 7]))
    scale = torch.tensor(1000.0)
    loss = contrastive_loss(image, image, scale, groups)
    assert loss.item() == pytest.approx(math.log(2) / 2, abs=1e-6)  # the entropy of its own even targets: the floor
    images = image.clone().requires_grad_()
    contrastive_loss(images, image, torch.tensor(5.0), groups).backward()
    diagonal = image.clone().requires_grad_()
    contrastive_loss(diagonal, image, torch.tensor(5.0)).backward()
    assert images.grad[0, 0] < 0 and abs(images.grad[0, 0]) > abs(diagonal.grad[0, 0])


@pytest.mark.parametrize("twins", ["image", "caption"])
def test_equal_vectors_make_the_diagonal_and_equal_shares_one_loss(twins):
    a, b, scale = vectors(6), vectors(6, seed=1), torch.tensor(7.0)
    groups = same_group(torch.tensor([0, 1, 1, 2, 1, 3]))
    one = (a if twins == "image" else b)[[0, 1, 1, 3, 1, 5]]
    images, texts = (one, b) if twins == "image" else (a, one)
    assert torch.isclose(contrastive_loss(images, texts, scale), contrastive_loss(images, texts, scale, groups))
    assert not torch.isclose(contrastive_loss(a, b, scale), contrastive_loss(a, b, scale, groups))  # two crops


def test_equal_captions_are_positives_whatever_the_padding():
    ids = torch.tensor([[1, 7, 2, 0], [1, 7, 2, 9], [1, 8, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]).bool()
    same = same_group(torch.tensor([0, 1, 2]), ids, mask)
    assert same.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_soft_targets_replace_the_hard_ones():
    a, b, s = vectors(4), vectors(4, seed=1), torch.tensor(5.0)
    eye = torch.eye(4).double()
    assert torch.isclose(contrastive_loss(a, b, s, soft=(eye, eye)), contrastive_loss(a, b, s))
    even = torch.full((4, 4), 0.25).double()
    logits = s * a @ b.T
    wanted = (soft_cross_entropy(logits, even) + soft_cross_entropy(logits.T, even)) / 2
    assert torch.isclose(contrastive_loss(a, b, s, soft=(even, even)), wanted)


def test_the_scale_gets_a_gradient_of_the_right_sign():
    a, scale = vectors(6), torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    contrastive_loss(a, a, scale).backward()
    assert scale.grad < 0, "when pairs agree, a sharper scale lowers the loss"


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        contrastive_loss(vectors(4), vectors(5), torch.tensor(1.0))
