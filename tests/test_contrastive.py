"""The contrastive loss: its value at chance, symmetry, a naive loop, duplicates, and logits of any origin."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlp.data.batch import Text
from minivlp.objectives.contrastive import (
    contrastive_loss,
    cosine_logits,
    equal_shares,
    find_positives,
    soft_cross_entropy,
)


def vectors(rows, width=8, seed=0):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


def loss_of(images, texts, scale, positives=None, **options):
    return contrastive_loss(cosine_logits(images, texts, scale), positives, **options)


def naive(logits, back, positives):
    """For each image: minus the mean log-probability of its captions; then the same for each caption."""
    total, n = 0.0, len(logits)
    for i in range(n):
        for scores, right in ((logits[i], positives[i]), (back[i], positives[:, i])):
            norm = math.log(sum(math.exp(s) for s in scores.tolist()))
            hits = [norm - s for s, r in zip(scores.tolist(), right.tolist(), strict=True) if r]
            total += sum(hits) / len(hits)
    return total / (2 * n)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 7), seed=st.integers(0, 99), groups=st.integers(1, 7), scale=st.floats(0.1, 30))
def test_equals_the_naive_loop_with_any_duplicates(rows, seed, groups, scale):
    image_ids = torch.randint(groups, (rows,), generator=torch.Generator().manual_seed(seed))
    logits = scale * vectors(rows, seed=seed) @ vectors(rows, seed=seed + 1000).T
    positives = find_positives(image_ids)
    assert contrastive_loss(logits, positives).item() == pytest.approx(naive(logits, logits.T, positives), rel=1e-6)


def test_uniform_logits_cost_log_of_the_batch():
    same = vectors(1).expand(16, -1)
    assert loss_of(same, same, 14.0).item() == pytest.approx(math.log(16))


def test_symmetric_in_image_and_text():
    a, b, positives = vectors(6), vectors(6, seed=1), find_positives(torch.tensor([0, 1, 1, 2, 3, 3]))
    assert torch.isclose(loss_of(a, b, 5.0, positives), loss_of(b, a, 5.0, positives))


def test_order_of_the_batch_does_not_matter():
    a, b, ids = vectors(6), vectors(6, seed=1), torch.tensor([0, 1, 1, 2, 3, 3])
    p = torch.randperm(6)
    assert torch.isclose(loss_of(a, b, 5.0, find_positives(ids)), loss_of(a[p], b[p], 5.0, find_positives(ids[p])))


def test_a_duplicate_image_is_not_pushed_away():
    """Two rows of one image: each is pulled to both captions, not away from the other's."""
    image = torch.eye(8).double()[[0, 0, 1, 2]]
    groups = find_positives(torch.tensor([5, 5, 6, 7]))
    loss = loss_of(image, image, 1000.0, groups)
    assert loss.item() == pytest.approx(math.log(2) / 2, abs=1e-6)  # the entropy of its own targets: the minimum
    images = image.clone().requires_grad_()
    loss_of(images, image, 5.0, groups).backward()
    diagonal = image.clone().requires_grad_()
    loss_of(diagonal, image, 5.0).backward()
    assert images.grad[0, 0] < 0 and abs(images.grad[0, 0]) > abs(diagonal.grad[0, 0])


@pytest.mark.parametrize("twins", ["image", "caption"])
def test_equal_vectors_make_the_diagonal_and_equal_shares_one_loss(twins):
    a, b = vectors(6), vectors(6, seed=1)
    groups = find_positives(torch.tensor([0, 1, 1, 2, 1, 3]))
    one = (a if twins == "image" else b)[[0, 1, 1, 3, 1, 5]].requires_grad_()
    images, texts = (one, b) if twins == "image" else (a, one)
    diagonal, shares = loss_of(images, texts, 7.0), loss_of(images, texts, 7.0, groups)
    assert torch.isclose(diagonal, shares)
    other = b if twins == "image" else a
    other.requires_grad_()
    diagonal, shares = loss_of(images, texts, 7.0), loss_of(images, texts, 7.0, groups)
    slopes = [torch.autograd.grad(loss, (one, other)) for loss in (diagonal, shares)]
    assert torch.allclose(slopes[0][1].sum(), slopes[1][1].sum())
    groups_of = [slope[0][[1, 2, 4]].sum(0) for slope in slopes]  # the rows share one vector: their sum is its gradient
    assert torch.allclose(*groups_of)
    assert not torch.isclose(loss_of(a, b, 7.0), loss_of(a, b, 7.0, groups))  # two crops


def test_equal_captions_are_positives_whatever_the_padding():
    ids = torch.tensor([[1, 7, 2, 0], [1, 7, 2, 9], [1, 8, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]).bool()
    same = find_positives(torch.tensor([0, 1, 2]), Text(ids, mask))
    assert same.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    longer = Text(torch.tensor([[1, 7, 0], [1, 7, 0]]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    assert find_positives(torch.tensor([0, 1]), longer).tolist() == [[True, False], [False, True]]
    assert find_positives(torch.tensor([3, 4, 3])).tolist() == [[True, False, True], [False, True, False]] + [
        [True, False, True]
    ]


def test_soft_targets_replace_the_hard_ones():
    logits, eye = 5.0 * vectors(4) @ vectors(4, seed=1).T, torch.eye(4).double()
    assert torch.isclose(contrastive_loss(logits, soft=(eye, eye)), contrastive_loss(logits))
    even = torch.full((4, 4), 0.25).double()
    wanted = (soft_cross_entropy(logits, even) + soft_cross_entropy(logits.T, even)) / 2
    assert torch.isclose(contrastive_loss(logits, soft=(even, even)), wanted)


def test_the_scale_gets_a_gradient_of_the_right_sign():
    a, scale = vectors(6), torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    loss_of(a, a, scale).backward()
    assert scale.grad < 0, "when pairs agree, a sharper scale lowers the loss"


# ------------------------------------------------------------------------------------------------- logits of any origin


def test_logits_of_the_way_back_need_not_be_the_transpose():
    """Late interaction is not symmetric: the best patch of each token, and the best token of each patch."""
    patches, tokens = (F.normalize(torch.randn(5, n, 8).double(), dim=-1) for n in (6, 3))
    cosines = torch.einsum("bpe,kte->bkpt", patches, tokens)
    logits, back = 4 * cosines.amax(3).mean(2), 4 * cosines.amax(2).mean(2).T  # (B, K) images, (B, K) texts
    assert not torch.allclose(logits, back.T)
    positives = find_positives(torch.tensor([0, 1, 0, 2, 3]))
    positives[3, 4] = True  # image 3 also fits text 4, but not the reverse
    loss = contrastive_loss(logits, positives, back)
    assert loss.item() == pytest.approx(naive(logits, back, positives))
    assert not torch.isclose(loss, contrastive_loss(logits, positives))
    assert torch.isclose(contrastive_loss(logits, positives, logits.T), contrastive_loss(logits, positives))


def test_more_candidates_than_rows():
    """As with a queue: the same further candidates for images and for texts."""
    logits, back = torch.randn(3, 7).double(), torch.randn(3, 7).double()
    positives = torch.zeros(3, 7, dtype=torch.bool)
    positives[[0, 1, 2, 0, 2], [0, 1, 2, 5, 6]] = True
    wanted = 0.0
    for scores in (logits, back):
        for i in range(3):
            right = positives[i].nonzero()[:, 0].tolist()
            wanted -= sum(scores[i].log_softmax(0)[j].item() for j in right) / len(right) / 6
    assert contrastive_loss(logits, positives, back).item() == pytest.approx(wanted)
    diagonal = -(logits.log_softmax(1).diagonal().mean() + back.log_softmax(1).diagonal().mean()) / 2
    assert torch.isclose(contrastive_loss(logits, back=back), diagonal)
    uniform = torch.zeros(3, 7)
    assert contrastive_loss(uniform, back=uniform).item() == pytest.approx(math.log(7))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="back"):
        contrastive_loss(torch.zeros(4, 5))
    with pytest.raises(ValueError, match="back"):
        contrastive_loss(torch.zeros(4, 5), back=torch.zeros(5, 4))
    with pytest.raises(ValueError, match="positives"):
        contrastive_loss(torch.zeros(4, 4), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError):
        cosine_logits(vectors(4), vectors(4, width=9), 1.0)


def test_cosines_keep_float32_under_autocast_and_float64():
    images, texts = vectors(6, width=64).float(), vectors(9, width=64, seed=1).float()
    exact = 20 * (images @ texts.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert (images @ texts.T).dtype == torch.bfloat16  # what a plain product would be
        logits = cosine_logits(images, texts, 20.0)
        half = cosine_logits(images.bfloat16(), texts.bfloat16(), torch.tensor(20.0))
    assert logits.dtype == half.dtype == torch.float32 and logits.shape == (6, 9)
    assert torch.equal(logits, exact) and torch.allclose(half, exact, atol=0.2)
    assert cosine_logits(images.double(), texts.double(), 20.0).dtype == torch.float64


def test_equal_shares():
    positives = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)
    shares = equal_shares(positives, torch.float64)
    assert shares.dtype == torch.float64 and torch.allclose(
        shares, torch.tensor([[1 / 3, 0, 1 / 3, 1 / 3], [0, 1, 0, 0]]).double()
    )
