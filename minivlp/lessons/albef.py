"""Checks of lesson 03's exercises. Weights that carry gradients, images that come twice, teachers that disagree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minivlp.lessons.check import attempt, demand
from minivlp.objectives.matching import negative_weights
from minivlp.objectives.momentum import soft_targets


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _close(got: Tensor, wanted: Tensor) -> bool:
    return got.shape == wanted.shape and torch.allclose(got.float(), wanted.float(), atol=1e-5)


def check_average(student: Callable[[list[Tensor], list[Tensor], float], list[Tensor]]) -> None:
    """Exercise 1: `student(teacher, student, m)`, two lists of weights -> the teacher's new ones, m of them its own."""

    def ask(m: float) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """The student's answer, then the teacher's weights, the student's own, and those after the call."""
        shapes = ((3, 4), (4,), ())
        old = [_random(*shape, seed=i) for i, shape in enumerate(shapes)]
        own = [_random(*shape, seed=i + 9).requires_grad_() for i, shape in enumerate(shapes)]
        before = [weight.detach().clone() for weight in own]
        return list(attempt(student, [weight.clone() for weight in old], own, m)), old, before, own

    m = 0.9
    got, old, before, own = ask(m)
    demand(len(got) == 3, f"Three weights go in, {len(got)} come out.")
    demand(
        [g.shape for g in got] == [o.shape for o in old],
        f"The shapes are {[tuple(o.shape) for o in old]}, yours are {[tuple(g.shape) for g in got]}.",
    )
    demand(
        all(torch.equal(a, b) for a, b in zip(own, before, strict=True)),
        "The student's weights changed. The teacher moves towards the student, never the other way.",
    )

    def mixed(a: float, b: float) -> bool:
        return all(_close(g, a * t + b * s) for g, t, s in zip(got, old, before, strict=True))

    demand(
        not mixed(1 - m, m),
        "The shares are the wrong way round: the teacher keeps m of itself. Yours is the student, one step late.",
    )
    demand(not mixed(m, 1), "The shares must add up to one: m and 1 - m. Yours grows at every step.")
    demand(not mixed(m, m), "Both get the share m; the student's is 1 - m.")
    demand(not mixed(0, 1), "That is the student itself: a teacher without memory.")
    demand(not mixed(1, 0), "The teacher has not moved.")
    demand(mixed(m, 1 - m), f"With m = {m} each weight is {m} x teacher + {1 - m:.1f} x student; yours is not.")
    demand(
        not any(g.requires_grad for g in got),
        "Your teacher hangs on the student's graph: every step would keep all steps before it in memory, and its own "
        "loss would train the student. Use torch.no_grad() or detach().",
    )
    got, old, before, _ = ask(1.0)
    demand(mixed(1, 0), "With m = 1 the teacher stays exactly as it is.")
    got, old, before, _ = ask(0.0)
    demand(mixed(0, 1), "With m = 0 the teacher becomes the student at once.")
    print("ok: m of itself, the rest from the student, and no gradient on the way.")


def check_weights(student: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 2: `student(similarity, image_ids)`, (B, B) images by texts and (B,) -> how readily each text is drawn
    as a wrong one for each image, (B, B): the softmax of its row, 0 for captions of the same image."""
    similarity, image_ids = _random(5, 5, seed=1), torch.tensor([7, 3, 7, 8, 9])
    together = image_ids[:, None] == image_ids[None, :]
    got = torch.as_tensor(attempt(student, similarity, image_ids)).float()
    demand(got.shape == (5, 5), f"One weight for each image and text: (5, 5), yours is {tuple(got.shape)}.")
    demand(
        not (got < 0).any(), "A weight is negative: similarities may be, weights for drawing may not. Softmax first."
    )
    own = torch.eye(5, dtype=torch.bool)
    demand(not got[own].any(), "The pair itself can be drawn as its own wrong partner: the diagonal must be 0.")
    demand(
        not got[together].any(),
        "Images 0 and 2 are the same one, so text 2 is true of image 0, and yet you would draw it as wrong. It is the "
        "likeliest of all, and teaches that a right answer is wrong: 0 wherever the ids are equal.",
    )
    demand(
        not got.masked_fill(together, 1).eq(0).any(),
        "Some texts of other images can never be drawn; only equal ids are 0.",
    )
    share = got / got.sum(dim=1, keepdim=True)  # what is drawn does not depend on a row's sum

    def shares(weights: Tensor) -> Tensor:
        weights = weights.masked_fill(together, 0)
        return weights / weights.sum(dim=1, keepdim=True)

    demand(
        not _close(share, shares(similarity.softmax(dim=0))),
        "Your softmax runs down the columns, over the images; a text is drawn for each image: along the row.",
    )
    demand(
        not _close(share, shares(torch.ones(5, 5))),
        "All wrong texts are as likely; those that look most like the right one should be drawn most often.",
    )
    demand(
        not _close(share, shares((-similarity).softmax(dim=1))),
        "Yours draws what is least alike: easy negatives teach nothing.",
    )
    wanted = negative_weights(similarity, together, floor=0)
    demand(
        torch.allclose(share, shares(wanted), atol=2e-3),
        "Along each row the weights are in the proportion of a softmax of the similarities; yours are not.",
    )
    alone = torch.as_tensor(attempt(student, similarity[:3, :3], torch.tensor([4, 4, 4]))).float()
    demand(
        not alone.isnan().any(),
        "When all images of a batch are the same one, yours is not a number. Softmax first, then write the zeros.",
    )
    demand(not alone.any(), "When all images of a batch are the same one, nothing is wrong: all weights are 0.")
    print("ok: what looks alike is drawn more often, and nothing that is true is ever drawn as wrong.")


def check_soft_targets(student: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 3: `student(teacher_logits, positive, alpha)`, (B, K) and (B, K) bool -> targets (B, K): alpha of what
    the teacher believes, the rest in equal parts on what is known to be right."""
    logits, alpha = 2 * _random(4, 7, seed=2), 0.4
    positive = torch.eye(4, 7, dtype=torch.bool)
    positive[0, 5] = positive[2, 0] = positive[2, 6] = True
    known = positive / positive.sum(dim=1, keepdim=True)
    believed = logits.softmax(dim=1)
    got = torch.as_tensor(attempt(student, logits, positive, alpha)).float()
    demand(got.shape == (4, 7), f"One target for each candidate: (4, 7), yours is {tuple(got.shape)}.")
    demand(
        not _close(got, (1 - alpha) * believed + alpha * known),
        "The shares are the wrong way round: alpha is the teacher's, and most of the target is what is known.",
    )
    demand(
        not _close(got, alpha * believed + (1 - alpha) * positive),
        "Rows with several right answers add up to more than one: each of n gets a part of 1 / n.",
    )
    demand(
        not _close(got, alpha * believed + (1 - alpha) * torch.eye(4, 7)),
        "Only the diagonal counts as right in yours; `positive` says what else is.",
    )
    demand(not _close(got, alpha * logits + (1 - alpha) * known), "The teacher's logits are no shares yet: softmax.")
    demand(
        not _close(got, alpha * logits.softmax(dim=0) + (1 - alpha) * known),
        "Your softmax runs down the columns; the candidates of a row stand in the row.",
    )
    sums = ", ".join(f"{x:.2f}" for x in got.sum(dim=1).tolist())
    demand(
        torch.allclose(got.sum(dim=1), torch.ones(4), atol=1e-5),
        f"A target is a distribution, each row adds up to one; yours add up to {sums}.",
    )
    demand(_close(got, soft_targets(logits, positive, alpha)), "The rows add up to one, but the shares are others.")
    for value, what, wanted in ((0.0, "known", known), (1.0, "believed", believed)):
        got = torch.as_tensor(attempt(student, logits, positive, value)).float()
        demand(_close(got, wanted), f"With alpha = {value:.0f} the targets are exactly what is {what}.")
    print("ok: rows add up to one, alpha = 0 is what we knew before, and two right answers share.")


def check_queue(student: Callable[[Tensor, int, Tensor], tuple[Tensor, int]]) -> None:
    """Exercise 4: `student(queue, pointer, new)`, (Q, E), the next slot, (B, E) -> the queue with `new` in the slots
    from `pointer` on, round the end, and the next pointer."""
    size, width = 7, 3

    def ask(pointer: int, rows: int) -> tuple[Tensor, int, Tensor, Tensor]:
        """The answer, what the queue should hold, and the new vectors."""
        queue, new = _random(size, width, seed=4), _random(rows, width, seed=5).requires_grad_()
        answer = attempt(student, queue.clone(), pointer, new)
        demand(isinstance(answer, tuple) and len(answer) == 2, "Return two things: the queue and the next pointer.")
        wanted = queue.clone()
        wanted[(pointer + torch.arange(rows)) % size] = new.detach()
        return torch.as_tensor(answer[0]), int(answer[1]), wanted, new.detach()

    got, after, wanted, new = ask(2, 3)
    demand(got.shape == (size, width), f"The queue keeps its {size} slots: yours has shape {tuple(got.shape)}.")
    demand(
        not (_close(got[-3:], new) and not _close(got, wanted)),
        "Yours moves all slots up. Write over the slots from the pointer on instead: nothing is copied, and an id that "
        "is kept beside the queue stays at its slot.",
    )
    demand(_close(got, wanted), "Slots 2, 3 and 4 should hold the new vectors, and all others what they held.")
    demand(after == 5, f"After three vectors from slot 2 on the next slot is 5, not {after}.")
    demand(
        not got.requires_grad,
        "What you keep hangs on the graph of its step: the queue would hold the memory of a hundred batches. detach().",
    )
    got, after, wanted, _ = ask(5, 4)
    demand(
        _close(got, wanted),
        "Four vectors from slot 5 of 7 on belong to slots 5, 6, 0 and 1: go round the end (modulo).",
    )
    demand(after == 2, f"Four vectors from slot 5 of 7 on: the next slot is 2, not {after}.")
    got, after, wanted, _ = ask(4, 3)
    demand(after == 0 and _close(got, wanted), f"When the last slot is filled the next one is 0, not {after}.")
    print("ok: the oldest goes, round the end, and no graph is kept.")
