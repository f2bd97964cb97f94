"""Momentum model, queue and soft targets: each equals its naive form, and is saved and loaded whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivlp.data.batch import Text
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits, find_positives
from minivlp.objectives.momentum import (
    MomentumConfig,
    MomentumModel,
    Queue,
    pair_ids,
    queued_contrastive_loss,
    ramp,
    soft_targets,
)


def vectors(rows, width=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=draw, dtype=torch.float64), dim=-1)


class Net(nn.Module):
    """Two layers with one weight under two names, and a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.b.weight = self.a.weight
        self.register_buffer("seen", torch.zeros(2))


def shake(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter)


# -------------------------------------------------------------------------------------------------- the momentum model


def test_the_momentum_model_equals_the_naive_average():
    online = Net().double()
    momentum = MomentumModel(online, 0.9, without=("head",))
    expected = {name: p.detach().clone() for name, p in online.named_parameters() if not name.startswith("head")}
    for _ in range(5):
        shake(online)
        online.seen += 1
        momentum.update(online)
        for name, new in online.named_parameters():
            if name in expected:
                expected[name] = 0.9 * expected[name] + 0.1 * new.detach()
    own = dict(momentum.model.named_parameters())
    assert own.keys() == expected.keys(), "the head is not copied, a tied weight is one weight"
    assert all(torch.allclose(own[name], value, rtol=1e-13) for name, value in expected.items())
    assert not momentum.model.seen.any(), "buffers are not averaged"
    assert momentum.updates == 5 and not any(p.requires_grad for p in momentum.parameters())


@pytest.mark.parametrize("without", [(), ("head",), ("a.bias",)])
def test_tied_weights_of_the_copy_stay_tied_to_each_other_but_not_to_the_online_model(without):
    online = Net()
    momentum = MomentumModel(online, 0.5, without)
    shake(online)
    for step in (momentum.update, momentum.copy_from):
        step(online)
        assert momentum.model.b.weight is momentum.model.a.weight
        assert momentum.model.a.weight is not online.a.weight
    before = online.a.weight.clone()
    shake(momentum.model)
    assert torch.equal(online.a.weight, before)


def test_a_tied_weight_is_averaged_where_the_copy_lacks_its_first_name():
    online = Net()
    momentum = MomentumModel(online, 0.5, without=("a",))
    before = online.b.weight.detach().clone()
    shake(online)
    momentum.update(online)
    assert torch.allclose(momentum.model.b.weight, (before + online.b.weight) / 2)
    momentum.copy_from(online)
    assert torch.equal(momentum.model.b.weight, online.b.weight)


def test_parts_inside_parts_can_be_left_out():
    """As "itc_head.scale": the copy keeps the rest of the part, the online model keeps everything."""
    online = nn.ModuleDict({"inner": nn.ModuleDict({"net": Net(), "scale": nn.Linear(1, 1)}), "head": nn.Linear(2, 2)})
    names = {name for name, _ in online.named_parameters()}
    momentum = MomentumModel(online, 0.5, without=("inner.scale", "inner.net.head", "head", "inner.net.a.bias"))
    left = {name for name, _ in momentum.model.named_parameters()}
    assert left == {"inner.net.a.weight", "inner.net.b.bias"}
    assert {name for name, _ in online.named_parameters()} == names
    before = momentum.model["inner"]["net"].a.weight.clone()
    shake(online)
    momentum.update(online)
    assert torch.allclose(momentum.model["inner"]["net"].a.weight, (before + online["inner"]["net"].a.weight) / 2)
    momentum.copy_from(online)
    assert torch.equal(momentum.model["inner"]["net"].b.bias, online["inner"]["net"].b.bias)
    assert not [name for name in momentum.state_dict() if "scale" in name or "head" in name]


def test_a_misspelled_part_is_refused():
    for name in ("heads", "a.weights", "inner.head"):
        with pytest.raises(AttributeError):
            MomentumModel(Net(), 0.5, without=(name,))


def test_a_copy_is_exact_and_an_equal_momentum_model_does_not_move():
    online = Net()
    momentum = MomentumModel(online, 0.995)
    shake(online)
    momentum.copy_from(online)
    for _ in range(3):
        momentum.update(online)
    assert all(torch.equal(p, q) for p, q in zip(momentum.model.parameters(), online.parameters(), strict=True))


def test_a_momentum_model_may_be_a_part_of_its_online_model():
    online = Net()
    online.momentum_model = MomentumModel(online, 0.5)
    shake(online.a)
    before = online.momentum_model.model.a.bias.clone()
    online.momentum_model.update(online)
    assert torch.allclose(online.momentum_model.model.a.bias, (before + online.a.bias) / 2)
    assert {n for n, _ in online.momentum_model.model.named_parameters()} == {n for n, _ in Net().named_parameters()}


def test_a_momentum_model_is_saved_whole():
    online = Net()
    momentum, again = MomentumModel(online, 0.9), MomentumModel(Net(), 0.9)
    shake(online)
    momentum.update(online)
    again.load_state_dict(momentum.state_dict())
    for model in (momentum, again):
        model.update(online)
    assert again.updates == 2
    assert all(torch.equal(p, q) for p, q in zip(momentum.parameters(), again.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------------- the queue


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (4, 4, 4), (1, 5, 2, 7, 3), (9, 23, 1), (5,), ()])
def test_the_queue_is_a_list_that_drops_its_oldest_pairs(sizes):
    queue, slots, place = Queue(5, 4).double(), {}, 0
    for step, size in enumerate(sizes):
        images, texts = vectors(size, seed=step), vectors(size, seed=step + 50)
        ids = torch.arange(2 * size).view(size, 2) + 100 * step
        queue.put(images, texts, ids)
        for row in range(size):
            slots[place % 5] = images[row], texts[row], ids[row]
            place += 1
    assert len(queue) == min(5, sum(sizes)) == len(slots)
    images, texts = queue.features()
    assert images.shape == texts.shape == (len(slots), 4)
    for slot, (image, text, ids) in slots.items():
        assert torch.equal(images[slot], image) and torch.equal(texts[slot], text)
        assert torch.equal(queue.ids[slot], ids)


def test_a_queue_is_saved_whole():
    queue = Queue(5, 4).double()
    queue.put(vectors(7), vectors(7, seed=1), torch.arange(14).view(7, 2))
    again = Queue(5, 4).double()
    again.load_state_dict(queue.state_dict())
    for one in (queue, again):
        one.put(vectors(2, seed=2), vectors(2, seed=3), torch.full((2, 2), 9))
    assert all(torch.equal(a, b) for a, b in zip(queue.buffers(), again.buffers(), strict=True))


def test_what_is_kept_carries_no_gradient():
    weight = torch.ones(4, requires_grad=True, dtype=torch.float64)
    queue = Queue(5, 4)  # float32, as under autocast
    queue.put(vectors(3) * weight, vectors(3) * weight, torch.zeros(3, 2, dtype=torch.long))
    assert not any(features.requires_grad for features in queue.features())
    assert torch.allclose(queue.features()[0].double(), vectors(3), atol=1e-7)


def test_an_image_or_a_caption_that_comes_again_is_a_positive():
    ids = torch.tensor([[1, 7, 8, 2, 0], [1, 8, 7, 2, 0], [1, 7, 8, 2, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    queue = Queue(8, 4).double()
    first = pair_ids(torch.tensor([30, 31, 32]), Text(ids, mask))
    queue.put(vectors(3), vectors(3), first)
    # the same image in other words; other images with the first, the second, and a new caption, one token narrower
    ids, mask = torch.tensor([[1, 9, 9, 2], [1, 7, 8, 2], [1, 8, 7, 2], [1, 0, 7, 2]]), torch.ones(4, 4).bool()
    now = pair_ids(torch.tensor([32, 40, 41, 0]), Text(ids, mask))
    assert torch.equal(queue.positives(now)[:, :4], torch.eye(4, dtype=torch.bool))
    assert queue.positives(now)[:, 4:].tolist() == [
        [False, False, True],
        [True, False, False],
        [False, True, False],
        [False, False, False],
    ]


def test_positives_of_the_batch_are_those_of_find_positives():
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 3, (60, 4), generator=draw)
    mask = torch.arange(4) < torch.randint(2, 5, (60, 1), generator=draw)
    image_ids = torch.randint(0, 30, (60,), generator=draw)
    positives = Queue(4, 2).positives(pair_ids(image_ids, Text(ids, mask)))
    assert torch.equal(positives, find_positives(image_ids, Text(ids, mask))) and positives.sum() > 200
    long = torch.randint(0, 30_000, (400, 56), generator=draw)
    long[200:] = long[:200]
    long[200:].scatter_(1, torch.randint(0, 56, (200, 1), generator=draw), 30_001)  # one token differs
    keys = pair_ids(torch.zeros(400, dtype=torch.long), Text(long, torch.ones_like(long, dtype=torch.bool)))[:, 1]
    assert len(keys.unique()) == 400


# ------------------------------------------------------------------------------------------------------- the targets


def test_soft_targets_mix_what_is_known_with_what_is_predicted():
    logits = torch.randn(3, 5, dtype=torch.float64)
    positives = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    known = torch.tensor([[1, 0, 0, 0, 0], [0, 1 / 2, 0, 1 / 2, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    for alpha in (0.0, 0.4, 1.0):
        targets = soft_targets(logits, positives, alpha)
        assert torch.allclose(targets.sum(dim=1), torch.ones(3, dtype=torch.float64))
        for row in range(3):
            for column in range(5):
                predicted = logits[row, column].exp() / logits[row].exp().sum()
                expected = alpha * predicted + (1 - alpha) * known[row, column]
                assert targets[row, column].item() == pytest.approx(expected.item(), abs=1e-12)


def test_alpha_rises_with_the_steps():
    assert [ramp(step, 4, 0.4) for step in range(7)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert ramp(torch.tensor(2), 4, 0.4) == pytest.approx(0.2)
    assert ramp(0, 0, 0.4) == 0.4  # no ramp
    assert MomentumConfig().alpha == 0.4 and MomentumConfig().distill == ("itc", "mlm")


def test_without_momentum_model_queue_and_alpha_it_is_the_contrastive_loss():
    images, texts = vectors(6).requires_grad_(), vectors(6, seed=1).requires_grad_()
    scale, positives = torch.tensor(9.0, requires_grad=True), find_positives(torch.tensor([0, 0, 1, 2, 3, 1]))
    leaves = images, texts, scale
    plain = contrastive_loss(cosine_logits(images, texts, scale), positives)
    wanted = torch.autograd.grad(plain, leaves)
    empty = Queue(5, 4).double().features()
    queued = queued_contrastive_loss((images, texts), (images, texts), empty, positives, scale)
    assert queued.item() == pytest.approx(plain.item(), abs=1e-12)
    assert all(torch.allclose(a, b) for a, b in zip(torch.autograd.grad(queued, leaves), wanted, strict=True))


def test_the_queue_is_searched_too_and_its_duplicates_are_positives():
    online, momentum = (vectors(2), vectors(2, seed=1)), (vectors(2, seed=2), vectors(2, seed=3))
    queue, scale, alpha = (vectors(3, seed=4), vectors(3, seed=5)), torch.tensor(7.0), 0.3
    positives = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    total = 0.0
    for way in (0, 1):  # image to text, text to image
        for row in range(2):
            others = [*momentum[1 - way], *queue[1 - way]]
            logits = scale * torch.stack([online[way][row] @ other for other in others])
            predicted = (scale * torch.stack([momentum[way][row] @ other for other in others])).softmax(0)
            target = alpha * predicted + (1 - alpha) * positives[row].double() / positives[row].sum()
            total -= (target * logits.log_softmax(0)).sum().item() / 4
    loss = queued_contrastive_loss(online, momentum, queue, positives, scale, alpha)
    assert loss.item() == pytest.approx(total, abs=1e-12)


def test_the_temperature_learns_from_the_online_model_alone():
    online, momentum = (vectors(3), vectors(3, seed=1)), (vectors(3, seed=2), vectors(3, seed=3))
    queue, positives = (vectors(2, seed=4), vectors(2, seed=5)), torch.eye(3, 5, dtype=torch.bool)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = queued_contrastive_loss(online, momentum, queue, positives, scale, 0.5)
    slope = torch.autograd.grad(loss, scale)[0]
    fixed, step = scale.detach(), 1e-6

    def at(value):
        losses = []
        for way in (0, 1):
            others = torch.cat([momentum[1 - way], queue[1 - way]])
            targets = soft_targets(fixed * momentum[way] @ others.T, positives, 0.5)
            losses.append(-(targets * (value * online[way] @ others.T).log_softmax(1)).sum(1).mean())
        return sum(losses).item() / 2

    assert slope.item() == pytest.approx((at(fixed + step) - at(fixed - step)) / (2 * step), rel=1e-6)


def test_features_of_another_precision_fit_the_queue():
    """Under autocast the queue is in float32; float64 features and a float32 queue agree to float32."""
    online, momentum = (vectors(3), vectors(3, seed=1)), (vectors(3, seed=2), vectors(3, seed=3))
    queue, positives = (vectors(2, seed=4).float(), vectors(2, seed=5).float()), torch.eye(3, 5, dtype=torch.bool)
    exact = queued_contrastive_loss(online, momentum, tuple(q.double() for q in queue), positives, torch.tensor(7.0))
    assert torch.equal(queued_contrastive_loss(online, momentum, queue, positives, torch.tensor(7.0)), exact)
