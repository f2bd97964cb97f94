"""Checks of lesson 03's exercises. Weights that require gradients, repeated images, several positives in a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minivlp.lessons.check import attempt, attempt_with, demand, same
from minivlp.objectives.contrastive import find_positives
from minivlp.objectives.matching import sampling_weights
from minivlp.objectives.momentum import soft_targets


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_average(student: Callable[[list[Tensor], list[Tensor], float], list[Tensor]]) -> None:
    """Exercise 1: `student(momentum, online, m)`, two lists of weights -> the new weights of the momentum model."""

    def call(m: float) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """The answer, the old momentum weights, the online weights before the call, and the same after it."""
        shapes = ((3, 4), (4,), ())
        old = [_random(*shape, seed=i) for i, shape in enumerate(shapes)]
        online = [_random(*shape, seed=i + 9).requires_grad_() for i, shape in enumerate(shapes)]
        before = [weight.detach().clone() for weight in online]
        given = [weight.clone() for weight in old]
        return list(attempt_with(student, given, online, m)), old, before, online

    m = 0.9
    got, old, before, online = call(m)
    demand(all(isinstance(weight, Tensor) for weight in got), "Return a list of tensors, one for each weight.")
    demand(len(got) == 3, f"Three weights go in, {len(got)} come out.")
    demand(
        [g.shape for g in got] == [o.shape for o in old],
        f"The shapes are {[tuple(o.shape) for o in old]}, yours are {[tuple(g.shape) for g in got]}.",
    )
    demand(
        all(torch.equal(a, b) for a, b in zip(online, before, strict=True)),
        "The weights of the online model changed. Only the momentum model is updated.",
    )

    def mixed(a: float, b: float) -> bool:
        return all(same(g, a * o + b * n) for g, o, n in zip(got, old, before, strict=True))

    demand(
        not mixed(1 - m, m),
        "The shares are swapped: the momentum model keeps the share m of itself.",
    )
    demand(not mixed(m, 1), "The shares must add up to one, m and 1 - m: yours grows at every step.")
    demand(not mixed(m, m), "Both have the share m; that of the online model is 1 - m.")
    demand(not mixed(0, 1), "You return the online weights; the momentum model keeps nothing of itself.")
    demand(not mixed(1, 0), "You return the old weights of the momentum model unchanged.")
    demand(mixed(m, 1 - m), f"With m = {m} each weight is {m} x momentum + {1 - m:.1f} x online; yours is not.")
    demand(
        not any(g.requires_grad for g in got),
        "Your weights are part of the autograd graph of the online model: each step would keep all earlier steps in "
        "memory. Use torch.no_grad() or detach().",
    )
    got, old, before, _ = call(1.0)
    demand(mixed(1, 0), "With m = 1 the momentum model stays exactly as it is.")
    got, old, before, _ = call(0.0)
    demand(mixed(0, 1), "With m = 0 the momentum model becomes the online model at once.")
    print("ok: a share m of itself, the rest from the online model, and no gradient.")


def check_weights(student: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 2: `student(similarity, image_ids)`, (B, B) images by texts and (B,) -> the weight with which each text
    is drawn as a negative of each image, (B, B): the softmax of the row, 0 for captions of the same image."""
    similarity, image_ids = _random(5, 5, seed=1), torch.tensor([7, 3, 7, 8, 9])
    positives = find_positives(image_ids)
    got = torch.as_tensor(attempt(student, similarity, image_ids)).float()
    demand(got.shape == (5, 5), f"One weight for each image and text: (5, 5), yours is {tuple(got.shape)}.")
    demand(not (got < 0).any(), "Some weights are negative. Apply the softmax first.")
    own = torch.eye(5, dtype=torch.bool)
    demand(not got[own].any(), "The matching pair itself can be drawn as a negative: the diagonal must be 0.")
    demand(
        not got[positives].any(),
        "Rows 0 and 2 have the same image, so text 2 is a positive of image 0, but you would draw it as a negative: "
        "0 wherever the ids are equal.",
    )
    demand(
        not got.masked_fill(positives, 1).eq(0).any(),
        "Some texts of other images can never be drawn; only equal ids have weight 0.",
    )
    share = got / got.sum(dim=1, keepdim=True)  # what is drawn does not depend on a row's sum

    def shares(weights: Tensor) -> Tensor:
        weights = weights.masked_fill(positives, 0)
        return weights / weights.sum(dim=1, keepdim=True)

    demand(
        not same(share, shares(similarity.softmax(dim=0))),
        "Your softmax goes over the images; a text is drawn for each image: softmax along the row.",
    )
    demand(
        not same(share, shares(torch.ones(5, 5))),
        "All negatives are equally likely; those of high similarity should be drawn most often.",
    )
    demand(
        not same(share, shares((-similarity).softmax(dim=1))),
        "Yours draws the least similar texts, which are easy negatives.",
    )
    wanted = sampling_weights(similarity, positives)
    demand(
        torch.allclose(share, shares(wanted), atol=2e-3),
        "Within each row the weights are proportional to the softmax of the similarities; yours are not.",
    )
    view = torch.as_tensor(attempt(student, similarity.double().T.contiguous().T, image_ids)).float()
    demand(same(view, got), "The same similarities as a transposed view in float64 give other weights.")
    alone = torch.as_tensor(attempt(student, similarity[:3, :3], torch.tensor([4, 4, 4]))).float()
    demand(
        not alone.isnan().any(),
        "When all rows have the same image, yours is NaN. Apply the softmax first, then set the zeros.",
    )
    demand(not alone.any(), "When all rows have the same image, there are no negatives: all weights are 0.")
    alone = torch.as_tensor(attempt(student, similarity[:1, :1], image_ids[:1])).float()
    demand(alone.shape == (1, 1) and not alone.any(), "In a batch of one there is no negative: a single 0, (1, 1).")
    print("ok: similar texts are drawn more often, and captions of the same image never.")


def check_soft_targets(student: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 3: `student(momentum_logits, positives, alpha)`, (B, K) and (B, K) bool -> targets (B, K): a share alpha
    of the momentum model's prediction, the rest spread evenly over the positives."""
    logits, alpha = 2 * _random(4, 7, seed=2), 0.4
    positives = torch.eye(4, 7, dtype=torch.bool)
    positives[0, 5] = positives[2, 0] = positives[2, 6] = True
    known = positives / positives.sum(dim=1, keepdim=True)
    predicted = logits.softmax(dim=1)
    got = torch.as_tensor(attempt(student, logits, positives, alpha)).float()
    demand(got.shape == (4, 7), f"One target for each candidate: (4, 7), yours is {tuple(got.shape)}.")
    demand(
        not same(got, (1 - alpha) * predicted + alpha * known),
        "The shares are swapped: alpha is the share of the momentum model, the rest is that of the positives.",
    )
    demand(
        not same(got, alpha * predicted + (1 - alpha) * positives),
        "Rows with several positives add up to more than one: each of n positives gets 1 / n.",
    )
    demand(
        not same(got, alpha * predicted + (1 - alpha) * torch.eye(4, 7)),
        "Only the diagonal counts as positive in yours; use `positives`.",
    )
    demand(
        not same(got, alpha * logits + (1 - alpha) * known),
        "The momentum model's logits are not probabilities yet: apply the softmax.",
    )
    demand(
        not same(got, alpha * logits.softmax(dim=0) + (1 - alpha) * known),
        "Your softmax goes down the columns; the candidates of a row are in the row.",
    )
    sums = ", ".join(f"{x:.2f}" for x in got.sum(dim=1).tolist())
    demand(
        torch.allclose(got.sum(dim=1), torch.ones(4), atol=1e-5),
        f"A target is a distribution: each row adds up to one; yours add up to {sums}.",
    )
    demand(same(got, soft_targets(logits, positives, alpha)), "The rows add up to one, but the shares are others.")
    for value, what, wanted in (
        (0.0, "the positives in equal shares", known),
        (1.0, "the momentum model's prediction", predicted),
    ):
        got = torch.as_tensor(attempt(student, logits, positives, value)).float()
        demand(same(got, wanted), f"With alpha = {value:.0f} the targets are exactly {what}.")
    got = torch.as_tensor(attempt(student, logits[:1].double(), positives[:1], alpha)).float()
    demand(
        same(got, soft_targets(logits, positives, alpha)[:1]),
        "A batch of one row, in float64, gets other targets than the same row in a larger batch.",
    )
    print("ok: rows add up to one, alpha = 0 is the plain target, and several positives share it.")


def check_queue(student: Callable[[Tensor, int, Tensor], tuple[Tensor, int]]) -> None:
    """Exercise 4: `student(queue, pointer, new)`, (Q, E), the next slot, (B, E) -> the queue with `new` in the slots
    from `pointer` on, continuing at slot 0 after the last one, and the next pointer."""
    size, width = 7, 3

    def call(pointer: int, rows: int) -> tuple[Tensor, int, Tensor, Tensor]:
        """The answer, what the queue should hold, and the new vectors."""
        queue, new = _random(size, width, seed=4), _random(rows, width, seed=5).requires_grad_()
        answer = attempt(student, queue.clone(), pointer, new)
        demand(isinstance(answer, tuple) and len(answer) == 2, "Return two things: the queue and the next pointer.")
        wanted = queue.clone()
        wanted[(pointer + torch.arange(rows)) % size] = new.detach()
        return torch.as_tensor(answer[0]), int(answer[1]), wanted, new.detach()

    got, after, wanted, new = call(2, 3)
    demand(got.shape == (size, width), f"The queue keeps its {size} slots: yours has shape {tuple(got.shape)}.")
    demand(
        not (same(got[-3:], new) and not same(got, wanted)),
        "Yours moves all slots. Overwrite the slots from the pointer on instead: nothing is copied, and an id that is "
        "stored beside the queue keeps its slot.",
    )
    demand(same(got, wanted), "Slots 2, 3 and 4 should hold the new vectors, and all others what they held.")
    demand(after == 5, f"After three vectors from slot 2 on the next slot is 5, not {after}.")
    demand(
        not got.requires_grad,
        "Your queue is part of the autograd graph: it would keep the activations of many batches in memory. detach().",
    )
    got, after, wanted, _ = call(5, 4)
    demand(
        same(got, wanted),
        "Four vectors from slot 5 of 7 on belong to slots 5, 6, 0 and 1: use the modulo.",
    )
    demand(after == 2, f"Four vectors from slot 5 of 7 on: the next slot is 2, not {after}.")
    got, after, wanted, _ = call(4, 3)
    demand(after == 0 and same(got, wanted), f"When the last slot is filled the next one is 0, not {after}.")
    got, after, wanted, _ = call(6, 1)
    demand(after == 0 and same(got, wanted), "A single vector belongs to slot 6, and the next slot is 0.")
    print("ok: the oldest vectors are overwritten, also across the end, and no graph is kept.")
