"""Teacher, queue and soft targets: each equals its naive form, and survives a kill."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivlp.objectives.contrastive import contrastive_loss, same_group
from minivlp.objectives.momentum import Queue, Teacher, pair_ids, queued_contrastive_loss, ramp, soft_targets


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


# ------------------------------------------------------------------------------------------------------- the teacher


def test_the_teacher_equals_the_naive_average():
    student = Net().double()
    teacher = Teacher(student, 0.9, without=("head",))
    expected = {name: p.detach().clone() for name, p in student.named_parameters() if not name.startswith("head")}
    for _ in range(5):
        shake(student)
        student.seen += 1
        teacher.update(student)
        for name, new in student.named_parameters():
            if name in expected:
                expected[name] = 0.9 * expected[name] + 0.1 * new.detach()
    own = dict(teacher.model.named_parameters())
    assert own.keys() == expected.keys(), "the head is not copied, a tied weight is one weight"
    assert all(torch.allclose(own[name], value, rtol=1e-13) for name, value in expected.items())
    assert not teacher.model.seen.any(), "buffers are not averaged"
    assert teacher.updates == 5 and not any(p.requires_grad for p in teacher.parameters())


def test_ties_inside_the_copy_hold_and_none_leads_out_of_it():
    student = Net()
    teacher = Teacher(student, 0.5)
    assert teacher.model.b.weight is teacher.model.a.weight
    assert teacher.model.a.weight is not student.a.weight
    before = student.a.weight.clone()
    shake(teacher.model)
    assert torch.equal(student.a.weight, before)


def test_a_copy_is_exact_and_an_equal_teacher_does_not_move():
    student = Net()
    teacher = Teacher(student, 0.995)
    shake(student)
    teacher.copy_from(student)
    for _ in range(3):
        teacher.update(student)
    assert all(torch.equal(p, q) for p, q in zip(teacher.model.parameters(), student.parameters(), strict=True))


def test_a_teacher_may_live_inside_its_student():
    student = Net()
    student.teacher = Teacher(student, 0.5)
    shake(student.a)
    before = student.teacher.model.a.bias.clone()
    student.teacher.update(student)
    assert torch.allclose(student.teacher.model.a.bias, (before + student.a.bias) / 2)
    assert {n for n, _ in student.teacher.model.named_parameters()} == {n for n, _ in Net().named_parameters()}


# --------------------------------------------------------------------------------------------------------- the queue


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (4, 4, 4), (1, 5, 2, 7, 3), (9, 23, 1), (5,), ()])
def test_the_queue_is_a_list_that_forgets_its_oldest(sizes):
    queue, slots, place = Queue(5, 4).double(), {}, 0
    for step, size in enumerate(sizes):
        images, texts = vectors(size, seed=step), vectors(size, seed=step + 50)
        ids = torch.arange(2 * size).view(size, 2) + 100 * step
        queue.put(images, texts, ids)
        for row in range(size):
            slots[place % 5] = images[row], texts[row], ids[row]
            place += 1
    assert len(queue) == min(5, sum(sizes)) == len(slots)
    images, texts = queue.past()
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
    assert not any(past.requires_grad for past in queue.past())
    assert torch.allclose(queue.past()[0].double(), vectors(3), atol=1e-7)


def test_an_image_or_a_caption_that_comes_again_is_known():
    ids = torch.tensor([[1, 7, 8, 2, 0], [1, 8, 7, 2, 0], [1, 7, 8, 2, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    queue = Queue(8, 4).double()
    first = pair_ids(torch.tensor([30, 31, 32]), ids, mask)
    queue.put(vectors(3), vectors(3), first)
    # the same image in other words; other images with the first, the second, and a new caption, one token narrower
    ids, mask = torch.tensor([[1, 9, 9, 2], [1, 7, 8, 2], [1, 8, 7, 2], [1, 0, 7, 2]]), torch.ones(4, 4).bool()
    now = pair_ids(torch.tensor([32, 40, 41, 0]), ids, mask)
    assert torch.equal(queue.together(now)[:, :4], torch.eye(4, dtype=torch.bool))
    assert queue.together(now)[:, 4:].tolist() == [
        [False, False, True],
        [True, False, False],
        [False, True, False],
        [False, False, False],
    ]


def test_pairs_are_the_same_as_same_group_says():
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 3, (60, 4), generator=draw)
    mask = torch.arange(4) < torch.randint(2, 5, (60, 1), generator=draw)
    image_ids = torch.randint(0, 30, (60,), generator=draw)
    together = Queue(4, 2).together(pair_ids(image_ids, ids, mask))
    assert torch.equal(together, same_group(image_ids, ids, mask)) and together.sum() > 200
    long = torch.randint(0, 30_000, (400, 56), generator=draw)
    long[200:] = long[:200]
    long[200:].scatter_(1, torch.randint(0, 56, (200, 1), generator=draw), 30_001)  # one token differs
    keys = pair_ids(torch.zeros(400, dtype=torch.long), long, torch.ones_like(long, dtype=torch.bool))[:, 1]
    assert len(keys.unique()) == 400


# ------------------------------------------------------------------------------------------------------- the targets


def test_soft_targets_mix_what_is_known_with_what_is_believed():
    logits = torch.randn(3, 5, dtype=torch.float64)
    positive = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    known = torch.tensor([[1, 0, 0, 0, 0], [0, 1 / 2, 0, 1 / 2, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    for alpha in (0.0, 0.4, 1.0):
        targets = soft_targets(logits, positive, alpha)
        assert torch.allclose(targets.sum(dim=1), torch.ones(3, dtype=torch.float64))
        for row in range(3):
            for column in range(5):
                believed = logits[row, column].exp() / logits[row].exp().sum()
                expected = alpha * believed + (1 - alpha) * known[row, column]
                assert targets[row, column].item() == pytest.approx(expected.item(), abs=1e-12)


def test_the_ramp_rises_by_the_step():
    assert [ramp(step, 4, 0.4) for step in range(7)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert ramp(torch.tensor(2), 4, 0.4) == pytest.approx(0.2)
    assert ramp(0, 0, 0.4) == 0.4  # no ramp


def test_without_teacher_past_and_share_it_is_the_contrastive_loss():
    images, texts = vectors(6).requires_grad_(), vectors(6, seed=1).requires_grad_()
    scale, positive = torch.tensor(9.0, requires_grad=True), same_group(torch.tensor([0, 0, 1, 2, 3, 1]))
    leaves = images, texts, scale
    plain = contrastive_loss(images, texts, scale, positive)
    wanted = torch.autograd.grad(plain, leaves)
    empty = Queue(5, 4).double().past()
    queued = queued_contrastive_loss((images, texts), (images, texts), empty, positive, scale)
    assert queued.item() == pytest.approx(plain.item(), abs=1e-12)
    assert all(torch.allclose(a, b) for a, b in zip(torch.autograd.grad(queued, leaves), wanted, strict=True))


def test_the_past_is_searched_too_and_its_duplicates_are_right():
    student, teacher = (vectors(2), vectors(2, seed=1)), (vectors(2, seed=2), vectors(2, seed=3))
    past, scale, alpha = (vectors(3, seed=4), vectors(3, seed=5)), torch.tensor(7.0), 0.3
    positive = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    total = 0.0
    for way in (0, 1):  # image to text, text to image
        for row in range(2):
            others = [*teacher[1 - way], *past[1 - way]]
            logits = scale * torch.stack([student[way][row] @ other for other in others])
            believed = (scale * torch.stack([teacher[way][row] @ other for other in others])).softmax(0)
            target = alpha * believed + (1 - alpha) * positive[row].double() / positive[row].sum()
            total -= (target * logits.log_softmax(0)).sum().item() / 4
    loss = queued_contrastive_loss(student, teacher, past, positive, scale, alpha)
    assert loss.item() == pytest.approx(total, abs=1e-12)


def test_the_temperature_learns_from_the_student_alone():
    student, teacher = (vectors(3), vectors(3, seed=1)), (vectors(3, seed=2), vectors(3, seed=3))
    past, positive = (vectors(2, seed=4), vectors(2, seed=5)), torch.eye(3, 5, dtype=torch.bool)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = queued_contrastive_loss(student, teacher, past, positive, scale, 0.5)
    slope = torch.autograd.grad(loss, scale)[0]
    fixed, step = scale.detach(), 1e-6

    def at(value):
        losses = []
        for way in (0, 1):
            others = torch.cat([teacher[1 - way], past[1 - way]])
            targets = soft_targets(fixed * teacher[way] @ others.T, positive, 0.5)
            losses.append(-(targets * (value * student[way] @ others.T).log_softmax(1)).sum(1).mean())
        return sum(losses).item() / 2

    assert slope.item() == pytest.approx((at(fixed + step) - at(fixed - step)) / (2 * step), rel=1e-6)
