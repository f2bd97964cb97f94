"""Word-patch alignment: the transport plan is valid and close to optimal, and the loss has the right direction."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from minivlp.objectives.alignment import cosine_cost, inner_words, ipot, word_patch_alignment


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def some_pairs(count=4, length=6, patches=9, width=8):
    """Features and masks of texts and images of different sizes."""
    text_mask = torch.arange(length) < torch.randint(2, length + 1, (count, 1))
    image_mask = torch.rand(count, patches) < 0.7
    image_mask[:, 3] = True
    return torch.randn(count, length, width), torch.randn(count, patches, width), text_mask, image_mask


def all_true(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def naive_plan(cost, outer, inner=1, beta=0.5):
    """The published steps for one pair without padding, number by number."""
    n, m = len(cost), len(cost[0])  # words, patches
    sigma = [1 / n] * n
    plan = [[1.0] * m for _ in range(n)]
    for _ in range(outer):
        q = [[math.exp(-cost[i][j] / beta) * plan[i][j] for j in range(m)] for i in range(n)]
        for _ in range(inner):
            delta = [1 / (m * sum(q[i][j] * sigma[i] for i in range(n))) for j in range(m)]
            sigma = [1 / (n * sum(q[i][j] * delta[j] for j in range(m))) for i in range(n)]
        plan = [[sigma[i] * q[i][j] * delta[j] for j in range(m)] for i in range(n)]
    return torch.tensor(plan)


def test_each_word_has_the_same_mass_and_each_patch_the_same_capacity():
    words, patches, text_mask, image_mask = some_pairs()
    plan = ipot(cosine_cost(words, patches), text_mask, image_mask)
    mass, capacity = (mask / mask.sum(1, keepdim=True) for mask in (text_mask, image_mask))
    assert (plan >= 0).all() and torch.allclose(plan.sum((1, 2)), torch.ones(4))
    assert torch.allclose(plan.sum(2), mass)  # exact after any step
    assert torch.allclose(plan.sum(1), capacity, atol=1e-3)  # in the limit
    longer = ipot(cosine_cost(words, patches), text_mask, image_mask, inner=20)
    assert torch.allclose(longer.sum(1), capacity, atol=1e-5)


def test_the_plan_is_close_to_the_optimum_after_50_steps_and_reaches_it_after_500():
    cost = torch.rand(20, 5, 5)
    exact = torch.tensor([c.numpy()[linear_sum_assignment(c)].sum() / 5 for c in cost])
    mask = all_true(20, 5)
    over = {n: (ipot(cost, mask, mask, outer=n) * cost).sum((1, 2)) - exact for n in (50, 500)}
    assert min(over[50].min(), over[500].min()) >= -1e-9  # no plan costs less than the optimum
    assert over[50].max() <= 0.01 and over[500].max() <= 1e-3  # slow where two plans cost nearly the same
    assert over[500].median() < 1e-12


@pytest.mark.parametrize("inner", [1, 3])
def test_equals_the_naive_loop(inner):
    cost = 2 * torch.rand(3, 4, 7)
    plan = ipot(cost, all_true(3, 4), all_true(3, 7), outer=6, inner=inner)
    for row in range(3):
        assert torch.allclose(plan[row], naive_plan(cost[row].tolist(), 6, inner))


def test_masked_tokens_have_no_influence():
    words, patches, text_mask, image_mask = some_pairs()
    matched = torch.tensor([True, False, True, False])
    whole = word_patch_alignment(words, patches, text_mask, image_mask, matched)
    assert (whole.plan[~text_mask] == 0).all() and (whole.plan.mT[~image_mask] == 0).all()
    other_words = torch.where(text_mask[..., None], words, 100 * torch.randn_like(words))
    other_patches = torch.where(image_mask[..., None], patches, torch.zeros_like(patches))
    other = word_patch_alignment(other_words, other_patches, text_mask, image_mask, matched)
    assert torch.equal(whole.plan, other.plan) and torch.equal(whole.distance, other.distance)
    for row in range(4):  # the same as this pair alone, without its masked tokens
        w, p = words[row, text_mask[row]][None], patches[row, image_mask[row]][None]
        alone = word_patch_alignment(w, p, all_true(*w.shape[:2]), all_true(*p.shape[:2]), matched[[row]])
        assert torch.allclose(alone.distance[0], whole.distance[row])
        assert torch.allclose(alone.plan[0], naive_plan(cosine_cost(w, p)[0].tolist(), 50))


def test_the_loss_is_a_tenth_of_matched_minus_mismatched_distances_per_pair():
    words, patches, text_mask, image_mask = some_pairs()
    matched = torch.tensor([True, False, False, True])
    loss, distance, _ = word_patch_alignment(words, patches, text_mask, image_mask, matched)
    d = distance.tolist()
    assert loss.item() == pytest.approx(0.1 * (d[0] - d[1] - d[2] + d[3]) / 4)
    turned = word_patch_alignment(words, patches, text_mask, image_mask, ~matched)
    assert torch.allclose(turned.loss, -loss)


def test_equal_features_cost_nothing_and_opposite_ones_the_maximum():
    tokens, mask = torch.randn(2, 5, 64), all_true(2, 5)
    plan = ipot(cosine_cost(tokens, tokens[:, [2, 0, 1, 4, 3]]), mask, mask, outer=200)
    assert plan.argmax(dim=2).tolist() == [[1, 2, 0, 4, 3]] * 2
    same = word_patch_alignment(tokens[:, :1].expand(-1, 5, -1), 3 * tokens[:, :1], mask, mask[:, :1], mask[:, 0])
    assert torch.allclose(same.distance, torch.zeros(2)) and torch.allclose(same.loss, torch.tensor(0.0))
    opposite = word_patch_alignment(tokens[:, :1], -tokens[:, :1], mask[:, :1], mask[:, :1], mask[:, 0])
    assert torch.allclose(opposite.distance, torch.tensor(2.0)) and opposite.loss.item() == pytest.approx(0.2)
    assert torch.allclose(cosine_cost(1e-4 * tokens, tokens), cosine_cost(tokens, tokens))  # length has no effect


def test_the_gradient_flows_through_the_cost_alone():
    words, patches, text_mask, image_mask = some_pairs()
    words.requires_grad_()
    matched = all_true(4)
    loss, _, plan = word_patch_alignment(words, patches, text_mask, image_mask, matched)
    assert not plan.requires_grad
    (own,) = torch.autograd.grad(loss, words)
    (expected,) = torch.autograd.grad(0.1 * (plan * cosine_cost(words, patches)).sum() / 4, words)
    assert torch.allclose(own, expected) and own[text_mask].any(dim=-1).all() and not own[~text_mask].any()


def test_a_gradient_step_lowers_the_distance_of_matched_pairs_and_raises_the_others():
    words, patches, text_mask, image_mask = some_pairs()
    words.requires_grad_()
    matched = torch.tensor([True, False, True, False])
    before = word_patch_alignment(words, patches, text_mask, image_mask, matched)
    before.loss.backward()
    after = word_patch_alignment(words - words.grad, patches, text_mask, image_mask, matched)
    assert torch.equal(after.distance < before.distance, matched)


def test_a_row_without_words_or_patches_costs_nothing_and_has_finite_gradients():
    words, patches, text_mask, image_mask = some_pairs()
    words.requires_grad_()
    text_mask[1], image_mask[2] = False, False
    loss, distance, plan = word_patch_alignment(words, patches, text_mask, image_mask, all_true(4))
    assert distance[1] == 0 and distance[2] == 0 and not plan[[1, 2]].any() and distance[0] > 0
    loss.backward()
    assert loss.isfinite() and words.grad.isfinite().all()


def test_a_feature_of_zero_has_a_finite_gradient():
    words, patches, text_mask, image_mask = some_pairs()
    words = words.mul(0).requires_grad_()
    loss = word_patch_alignment(words, patches, text_mask, image_mask, all_true(4)).loss
    loss.backward()
    assert words.grad.isfinite().all()


def test_float32_and_autocast_give_the_same_plan():
    words, patches, text_mask, image_mask = some_pairs()
    exact = ipot(cosine_cost(words, patches), text_mask, image_mask, outer=300)
    with torch.autocast("cpu", torch.bfloat16):
        cost = cosine_cost(words.float(), patches.float())
        plan = ipot(cost, text_mask, image_mask, outer=300)
    assert cost.dtype == plan.dtype == torch.float32
    assert plan.isfinite().all() and torch.allclose(plan.double(), exact, atol=1e-4)


def test_inner_words_are_neither_first_nor_last_nor_padding():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    expected = [[0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert inner_words(mask).int().tolist() == expected
    assert inner_words(mask[:1, :1]).tolist() == [[False]]
