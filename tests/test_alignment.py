"""Word-patch alignment: the plan is a plan, close to the cheapest one, and the loss pulls where it should."""

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


def everything(*shape):
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


def test_each_word_gives_the_same_share_and_each_patch_takes_the_same():
    words, patches, text_mask, image_mask = some_pairs()
    plan = ipot(cosine_cost(words, patches), text_mask, image_mask)
    give, take = (mask / mask.sum(1, keepdim=True) for mask in (text_mask, image_mask))
    assert (plan >= 0).all() and torch.allclose(plan.sum((1, 2)), torch.ones(4))
    assert torch.allclose(plan.sum(2), give)  # exact after any step
    assert torch.allclose(plan.sum(1), take, atol=1e-3)  # in the limit
    longer = ipot(cosine_cost(words, patches), text_mask, image_mask, inner=20)
    assert torch.allclose(longer.sum(1), take, atol=1e-5)


def test_close_to_the_cheapest_plan_after_50_steps_and_there_after_500():
    cost = torch.rand(20, 5, 5)
    exact = torch.tensor([c.numpy()[linear_sum_assignment(c)].sum() / 5 for c in cost])
    mask = everything(20, 5)
    over = {n: (ipot(cost, mask, mask, outer=n) * cost).sum((1, 2)) - exact for n in (50, 500)}
    assert min(over[50].min(), over[500].min()) >= -1e-9  # nothing is cheaper than the cheapest
    assert over[50].max() <= 0.01 and over[500].max() <= 1e-3  # two plans of nearly the same price take longest
    assert over[500].median() < 1e-12


@pytest.mark.parametrize("inner", [1, 3])
def test_equals_the_naive_loop(inner):
    cost = 2 * torch.rand(3, 4, 7)
    plan = ipot(cost, everything(3, 4), everything(3, 7), outer=6, inner=inner)
    for row in range(3):
        assert torch.allclose(plan[row], naive_plan(cost[row].tolist(), 6, inner))


def test_what_is_masked_does_not_exist():
    words, patches, text_mask, image_mask = some_pairs()
    matched = torch.tensor([True, False, True, False])
    whole = word_patch_alignment(words, patches, text_mask, image_mask, matched)
    assert (whole.plan[~text_mask] == 0).all() and (whole.plan.mT[~image_mask] == 0).all()
    other_words = torch.where(text_mask[..., None], words, 100 * torch.randn_like(words))
    other_patches = torch.where(image_mask[..., None], patches, torch.zeros_like(patches))
    other = word_patch_alignment(other_words, other_patches, text_mask, image_mask, matched)
    assert torch.equal(whole.plan, other.plan) and torch.equal(whole.distance, other.distance)
    for row in range(4):  # as if the pair stood alone, cut to what counts
        w, p = words[row, text_mask[row]][None], patches[row, image_mask[row]][None]
        alone = word_patch_alignment(w, p, everything(*w.shape[:2]), everything(*p.shape[:2]), matched[[row]])
        assert torch.allclose(alone.distance[0], whole.distance[row])
        assert torch.allclose(alone.plan[0], naive_plan(cosine_cost(w, p)[0].tolist(), 50))


def test_loss_is_a_tenth_of_matched_minus_mismatched_per_pair():
    words, patches, text_mask, image_mask = some_pairs()
    matched = torch.tensor([True, False, False, True])
    loss, distance, _ = word_patch_alignment(words, patches, text_mask, image_mask, matched)
    d = distance.tolist()
    assert loss.item() == pytest.approx(0.1 * (d[0] - d[1] - d[2] + d[3]) / 4)
    turned = word_patch_alignment(words, patches, text_mask, image_mask, ~matched)
    assert torch.allclose(turned.loss, -loss)


def test_same_words_as_patches_cost_nothing_and_opposite_ones_all():
    tokens, mask = torch.randn(2, 5, 64), everything(2, 5)
    plan = ipot(cosine_cost(tokens, tokens[:, [2, 0, 1, 4, 3]]), mask, mask, outer=200)
    assert plan.argmax(dim=2).tolist() == [[1, 2, 0, 4, 3]] * 2
    same = word_patch_alignment(tokens[:, :1].expand(-1, 5, -1), 3 * tokens[:, :1], mask, mask[:, :1], mask[:, 0])
    assert torch.allclose(same.distance, torch.zeros(2)) and torch.allclose(same.loss, torch.tensor(0.0))
    opposite = word_patch_alignment(tokens[:, :1], -tokens[:, :1], mask[:, :1], mask[:, :1], mask[:, 0])
    assert torch.allclose(opposite.distance, torch.tensor(2.0)) and opposite.loss.item() == pytest.approx(0.2)
    assert torch.allclose(cosine_cost(1e-4 * tokens, tokens), cosine_cost(tokens, tokens))  # length has no say


def test_gradient_flows_through_the_cost_alone():
    words, patches, text_mask, image_mask = some_pairs()
    words.requires_grad_()
    matched = everything(4)
    loss, _, plan = word_patch_alignment(words, patches, text_mask, image_mask, matched)
    assert not plan.requires_grad
    (own,) = torch.autograd.grad(loss, words)
    (expected,) = torch.autograd.grad(0.1 * (plan * cosine_cost(words, patches)).sum() / 4, words)
    assert torch.allclose(own, expected) and own[text_mask].any(dim=-1).all() and not own[~text_mask].any()


def test_a_step_down_the_loss_brings_matched_pairs_nearer_and_others_apart():
    words, patches, text_mask, image_mask = some_pairs()
    words.requires_grad_()
    matched = torch.tensor([True, False, True, False])
    before = word_patch_alignment(words, patches, text_mask, image_mask, matched)
    before.loss.backward()
    after = word_patch_alignment(words - words.grad, patches, text_mask, image_mask, matched)
    assert torch.equal(after.distance < before.distance, matched)


def test_a_row_without_words_or_patches_costs_nothing_and_poisons_nothing():
    words, patches, text_mask, image_mask = some_pairs()
    words.requires_grad_()
    text_mask[1], image_mask[2] = False, False
    loss, distance, plan = word_patch_alignment(words, patches, text_mask, image_mask, everything(4))
    assert distance[1] == 0 and distance[2] == 0 and not plan[[1, 2]].any() and distance[0] > 0
    loss.backward()
    assert loss.isfinite() and words.grad.isfinite().all()


def test_a_feature_of_zero_has_a_clean_gradient():
    words, patches, text_mask, image_mask = some_pairs()
    words = words.mul(0).requires_grad_()
    loss = word_patch_alignment(words, patches, text_mask, image_mask, everything(4)).loss
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
