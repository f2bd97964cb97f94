"""Lesson 03's checks: the solution passes, typical wrong answers fail with the message meant for them."""

import pytest
import torch

from minivlp.lessons import albef
from minivlp.lessons.check import NotYet


@torch.no_grad()
def average(momentum, online, m):
    return [m * old + (1 - m) * new for old, new in zip(momentum, online, strict=True)]


def average_in_place(momentum, online, m):
    for old, new in zip(momentum, online, strict=True):
        old.data.lerp_(new.data, 1 - m)
    return momentum


def average_with_graph(momentum, online, m):
    return [m * old + (1 - m) * new for old, new in zip(momentum, online, strict=True)]


@torch.no_grad()
def average_into_the_online_model(momentum, online, m):
    for old, new in zip(momentum, online, strict=True):
        new.lerp_(old, m)
    return online


def shares(a, b):
    """The mistake of giving the momentum model a(m) and the online model b(m)."""

    @torch.no_grad()
    def wrong(momentum, online, m):
        return [a(m) * old + b(m) * new for old, new in zip(momentum, online, strict=True)]

    return wrong


def weights(similarity, image_ids):
    return similarity.softmax(dim=1).masked_fill(image_ids[:, None] == image_ids[None, :], 0)


def weights_with_floor(similarity, image_ids):
    return (similarity.softmax(dim=1) + 1e-4).masked_fill(image_ids[:, None] == image_ids[None, :], 0)


def weights_masked_first(similarity, image_ids):
    """Right except where no negative is left."""
    return similarity.masked_fill(image_ids[:, None] == image_ids[None, :], -torch.inf).softmax(dim=1)


def weights_of_the_diagonal(similarity, image_ids):
    return similarity.softmax(dim=1) * (1 - torch.eye(len(similarity)))


def weights_zeroed_before(similarity, image_ids):
    return similarity.masked_fill(image_ids[:, None] == image_ids[None, :], 0).softmax(dim=1)


def targets(logits, positives, alpha):
    known = positives.float()
    return alpha * logits.softmax(dim=1) + (1 - alpha) * known / known.sum(dim=1, keepdim=True)


def targets_in_batch(logits, positives, alpha):
    """The momentum model's prediction for the batch alone, not for the queue."""
    known = positives.float() / positives.sum(dim=1, keepdim=True)
    predicted = torch.zeros_like(logits)
    predicted[:, :4] = logits[:, :4].softmax(dim=1)
    return alpha * predicted + (1 - alpha) * known


def queue(kept, pointer, new):
    slots = (pointer + torch.arange(len(new))) % len(kept)
    kept = kept.clone()
    kept[slots] = new.detach()
    return kept, (pointer + len(new)) % len(kept)


def queue_that_moves(kept, pointer, new):
    return torch.cat([kept, new.detach()])[-len(kept) :], pointer


def queue_with_graph(kept, pointer, new):
    slots = (pointer + torch.arange(len(new))) % len(kept)
    return kept.index_copy(0, slots, new), (pointer + len(new)) % len(kept)


def queue_up_to_the_end(kept, pointer, new):
    end = min(pointer + len(new), len(kept))
    kept[pointer:end] = new[: end - pointer].detach()
    return kept, end % len(kept)


def queue_by_slice(kept, pointer, new):
    kept[pointer : pointer + len(new)] = new.detach()
    return kept, pointer + len(new)


def pointer_past_the_end(kept, pointer, new):
    return queue(kept, pointer, new)[0], pointer + len(new)


def weights_in_place(similarity, image_ids):
    similarity.copy_(similarity.softmax(dim=1))
    similarity[image_ids[:, None] == image_ids[None, :]] = 0
    return similarity


def targets_in_place(logits, positives, alpha):
    logits.copy_(logits.softmax(dim=1)).mul_(alpha)
    return logits.add_((1 - alpha) * positives / positives.sum(dim=1, keepdim=True))


def queue_in_place(kept, pointer, new):
    kept[(pointer + torch.arange(len(new))) % len(kept)] = new.detach()
    return kept, (pointer + len(new)) % len(kept)


RIGHT = [
    (albef.check_weights, weights_in_place),
    (albef.check_soft_targets, targets_in_place),
    (albef.check_queue, queue_in_place),
    (albef.check_average, average),
    (albef.check_average, average_in_place),
    (albef.check_weights, weights),
    (albef.check_weights, weights_with_floor),
    (albef.check_soft_targets, targets),
    (albef.check_queue, queue),
]


@pytest.mark.parametrize("check, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


def test_answers_may_be_of_another_type(capsys):
    """Float64, a tuple of weights, and a pointer that is a tensor are right too."""
    albef.check_average(lambda t, s, m: tuple(w.double() for w in average(t, s, m)))
    albef.check_weights(lambda s, i: weights(s.double(), i))
    albef.check_soft_targets(lambda x, p, a: targets(x.double(), p, a))
    albef.check_queue(lambda q, p, new: (queue(q, p, new)[0], torch.tensor(queue(q, p, new)[1])))
    assert capsys.readouterr().out.count("ok:") == 4


def stub(*arguments):
    raise NotImplementedError("your turn")


CHECKS = (albef.check_average, albef.check_weights, albef.check_soft_targets, albef.check_queue)
WRONG = [
    *[(check, stub, "Nothing written yet") for check in CHECKS],
    *[(check, lambda *arguments: None, "`return` missing") for check in CHECKS],
    (albef.check_average, lambda t, s, m: average(t, s, 1 - m), "shares are swapped"),
    (albef.check_average, shares(lambda m: m, lambda m: 1), "add up to one"),
    (albef.check_average, shares(lambda m: m, lambda m: m), "Both have the share"),
    (albef.check_average, shares(lambda m: 0, lambda m: 1), "keeps nothing of itself"),
    (albef.check_average, lambda t, s, m: t, "unchanged"),
    (albef.check_average, shares(lambda m: 0.5, lambda m: 0.5), "With m = 0.9 each weight"),
    (albef.check_average, average_with_graph, "graph"),
    (albef.check_average, average_into_the_online_model, "Only the momentum model is updated"),
    (albef.check_average, lambda t, s, m: average(t, s, m)[:2], "2 come out"),
    (albef.check_average, lambda t, s, m: [1.0] * 3, "a list of tensors"),
    (albef.check_average, lambda t, s, m: m * t, r"called with \[\(3, 4\), \(4,\), \(\)\]"),
    (albef.check_average, lambda t, s, m: [w.sum() for w in average(t, s, m)], "The shapes are"),
    (albef.check_average, shares(lambda m: 0.9, lambda m: 0.1), "With m = 1"),
    (albef.check_weights, lambda s, i: weights(s, i).argmax(1), r"\(5, 5\)"),
    (albef.check_weights, lambda s, i: s.masked_fill(i[:, None] == i, 0), "Apply the softmax first"),
    (albef.check_weights, lambda s, i: s.softmax(dim=1), "pair itself can be drawn"),
    (albef.check_weights, weights_of_the_diagonal, "Rows 0 and 2 have the same image"),
    (albef.check_weights, weights_zeroed_before, "pair itself can be drawn"),
    (albef.check_weights, lambda s, i: weights(s.T, i).T, "goes over the images"),
    (albef.check_weights, lambda s, i: weights(0 * s, i), "equally likely"),
    (albef.check_weights, lambda s, i: weights(-s, i), "least similar"),
    (albef.check_weights, lambda s, i: weights(2 * s, i), "proportional"),
    (albef.check_weights, lambda s, i: weights(s, i) * (s > s.median()), "can never be drawn"),
    (albef.check_weights, weights_masked_first, "NaN"),
    (albef.check_soft_targets, lambda x, p, a: targets(x, p, a)[0], r"\(4, 7\)"),
    (albef.check_soft_targets, lambda x, p, a: targets(x, p, 1 - a), "shares are swapped"),
    (albef.check_soft_targets, lambda x, p, a: a * x.softmax(1) + (1 - a) * p.float(), "more than one"),
    (albef.check_soft_targets, lambda x, p, a: targets(x, torch.eye(4, 7).bool(), a), "Only the diagonal"),
    (albef.check_soft_targets, lambda x, p, a: a * x + targets(x, p, a) - a * x.softmax(1), "not probabilities yet"),
    (albef.check_soft_targets, lambda x, p, a: targets(x, p, a) + a * (x.softmax(0) - x.softmax(1)), "the columns"),
    (albef.check_soft_targets, lambda x, p, a: a * x.softmax(1) + p / p.sum(1, keepdim=True), "each row adds up"),
    (albef.check_soft_targets, targets_in_batch, "the shares are others"),
    (albef.check_soft_targets, lambda x, p, a: targets(x, p, 0.4), "alpha = 0"),
    (albef.check_queue, lambda q, p, new: queue(q, p, new)[0], "two things"),
    (albef.check_queue, lambda q, p, new: (torch.cat([q, new.detach()]), p + len(new)), "its 7 slots"),
    (albef.check_queue, queue_that_moves, "moves all slots"),
    (albef.check_queue, lambda q, p, new: queue(q, 0, new), "Slots 2, 3 and 4"),
    (albef.check_queue, lambda q, p, new: (queue(q, p, new)[0], p), "next slot is 5"),
    (albef.check_queue, queue_with_graph, r"detach\(\)"),
    (albef.check_queue, queue_up_to_the_end, "modulo"),
    (albef.check_queue, queue_by_slice, "stopped with RuntimeError"),
    (albef.check_queue, pointer_past_the_end, "next slot is 2"),
    (albef.check_queue, lambda q, p, n: (queue(q, p, n)[0], (p + len(n)) % 7 or 7), "the next one is 0"),
]


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(check, answer, message):
    with pytest.raises(NotYet, match=message):
        check(answer)
