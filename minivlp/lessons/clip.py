"""Checks of lesson 01's exercises; those that build the model are in `clip_parts`.

Inputs are hand-made, random, strided, of one row, or far from unit scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.lessons.check import attempt, demand, demand_gradients
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits, find_positives


def _vectors(rows: int, width: int = 6, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def check_loss(student: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 1: `student(images, texts, temperature)`, unit vectors (B, E) -> the symmetric contrastive loss."""
    images, texts = _vectors(5), _vectors(5, seed=1)
    wanted = contrastive_loss(cosine_logits(images, texts, 1 / 0.2))
    got = torch.as_tensor(attempt(student, images, texts, 0.2)).float()
    demand(got.ndim == 0, f"The loss must be one number, yours has shape {tuple(got.shape)}: average over the pairs.")
    logits = cosine_logits(images, texts, 1 / 0.2)
    rows = F.cross_entropy(logits, torch.arange(5))
    columns = F.cross_entropy(logits.T, torch.arange(5))
    demand(
        not (torch.isclose(got, rows) or torch.isclose(got, columns)),
        "That is one direction only. A text must also find its image: average over rows and columns.",
    )
    demand(not torch.isclose(got, rows + columns), "That is the sum of both directions; take their mean.")
    wrong = contrastive_loss(cosine_logits(images, texts, 0.2))
    demand(not torch.isclose(got, wrong), "Divide the cosines by the temperature; yours are multiplied by it.")
    flat = contrastive_loss(cosine_logits(images, texts, 1.0))
    demand(not torch.isclose(got, flat), "The temperature is not used.")
    demand(torch.isclose(got, wanted, atol=1e-5), f"On five random pairs the loss is {wanted:.4f}, yours is {got:.4f}.")
    inputs = {"images": images.clone().requires_grad_(), "texts": texts.clone().requires_grad_()}
    right = contrastive_loss(cosine_logits(*inputs.values(), 1 / 0.2))
    demand_gradients(attempt(student, *inputs.values(), 0.2), right, **inputs)
    alone = torch.as_tensor(attempt(student, images[:1], texts[:1], 0.2)).float()
    demand(
        torch.isclose(alone, torch.tensor(0.0), atol=1e-6),
        "With a single pair the only candidate is the right one: the loss is 0.",
    )
    strided = torch.stack([images, images], 1)[:, 0]
    got = torch.as_tensor(attempt(student, strided, texts, 0.2)).float()
    demand(
        torch.isclose(got, wanted, atol=1e-5),
        "The same vectors as a view of a larger tensor give another loss: do not rely on the memory layout.",
    )
    got = torch.as_tensor(attempt(student, images.double(), texts.double(), 0.2)).float()
    demand(torch.isclose(got, wanted, atol=1e-5), "Vectors in float64 give another loss than the same in float32.")
    print(f"ok: the loss of five random pairs is {wanted:.2f}, that of one pair is 0, and both directions count.")


def check_recall(student: Callable[[Tensor, int], float]) -> None:
    """Exercise 4: `student(similarity, k)`, (N, N) with rows images and columns texts -> share of images whose own text
    is among the k nearest."""
    table = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.5], [0.1, 0.2, 0.7]])
    one = float(attempt(student, table, 1))
    demand(abs(one - 1.0) > 1e-6, "You search down the columns, which is text to image. Rows are images here.")
    demand(
        abs(one - 2 / 3) < 1e-6, f"In the three-by-three table two of three images find their text: .67, not {one:.2f}."
    )
    two = float(attempt(student, table, 2))
    demand(abs(two - 2 / 3) < 1e-6, f"With k = 2 the middle image's own text is still only third: .67, not {two:.2f}.")
    three = float(attempt(student, table, 3))
    demand(abs(three - 1.0) < 1e-6, f"Among all three texts the right one is always there: 1, not {three:.2f}.")
    draw = torch.Generator().manual_seed(0)
    big = torch.randn(40, 40, generator=draw) * 100
    wanted = (big.argsort(dim=1, descending=True)[:, :7] == torch.arange(40)[:, None]).any(1).float().mean().item()
    got = float(attempt(student, big, 7))
    demand(abs(got - wanted) < 1e-6, f"On a random table of 40, R@7 is {wanted:.3f}, yours {got:.3f}.")
    got = float(attempt(student, big.double().T.contiguous().T, 7))
    demand(abs(got - wanted) < 1e-6, "The same table as a transposed view in float64 gives another share.")
    single = float(attempt(student, big[:1, :1], 1))
    demand(abs(single - 1.0) < 1e-6, f"In a table of one, the only text is the right one: 1, not {single:.2f}.")
    print("ok: R@k grows with k, reaches 1, and goes along the rows.")


def check_zero_shot(student: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 5: `student(images, prompts)`, unit vectors (N, E) and (C, K, E), K prompts for each of C classes -> the
    class (N,) of each image, by the mean of its prompts, brought back to length one."""
    truth = torch.tensor([0, 1, 2, 2, 1])
    centers = torch.eye(3, 6)
    images = F.normalize(centers[truth] + 0.1 * _vectors(5), dim=-1)
    prompts = F.normalize(centers[:, None] + 0.2 * _vectors(12, seed=3).unflatten(0, (3, 4)), dim=-1)  # (C, K, E)
    got = torch.as_tensor(attempt(student, images, prompts))
    demand(got.shape == (5,), f"One class per image: shape (5,), yours is {tuple(got.shape)}.")
    demand(torch.equal(got.long(), truth), f"Five easy images belong to {truth.tolist()}, you say {got.tolist()}.")
    images, prompts = _vectors(80, seed=5), _vectors(20, seed=6).unflatten(0, (5, 4))
    wanted = _nearest(images, F.normalize(prompts.mean(dim=1), dim=-1))
    got = torch.as_tensor(attempt(student, images, prompts)).long()
    for classes, message in (
        (
            prompts.mean(dim=1),
            "Prompts that disagree have a short mean. Bring the mean back to length one before comparing.",
        ),
        (prompts[:, 0], "Only the first prompt of each class counts in yours: average all K of them."),
        (
            F.normalize(prompts.mean(dim=1), dim=0),
            "Each class is a vector of E numbers: normalize along the last axis.",
        ),
    ):
        demand(not torch.equal(got, _nearest(images, classes)) or torch.equal(got, wanted), message)
    each = torch.einsum("ne,cke->nck", images, prompts)
    demand(
        not torch.equal(got, each.amax(dim=2).argmax(dim=1)),
        "You take the class of the nearest single prompt. Average the K vectors of a class first.",
    )
    demand(
        not torch.equal(got, each.argmax(dim=1).mode(dim=1).values),
        "You let the prompts vote. Average the K vectors of a class first, then compare once.",
    )
    demand(
        torch.equal(got, wanted),
        f"Of 80 random images {int((got == wanted).sum())} get the class whose mean vector, of length one, is nearest.",
    )
    one = torch.as_tensor(attempt(student, images[:1].double(), prompts[:, :1].double()))
    demand(
        one.shape == (1,) and int(one) == int(_nearest(images[:1], prompts[:, 0])),
        "One image and one prompt for each class: the nearest prompt, as shape (1,).",
    )
    print("ok: every image finds its class, whether the prompts of a class agree or not.")


def _nearest(images: Tensor, classes: Tensor) -> Tensor:
    """For each image (N, E) the row of the class (C, E) with the largest dot product, (N,)."""
    return (images @ classes.T).argmax(dim=1)


def check_targets(student: Callable[[Tensor], Tensor]) -> None:
    """Exercise 6: `student(image_ids)` (B,) -> targets (B, B), rows that sum to one, shared among captions of the same
    image."""
    for ids in ([7, 8, 9], [3, 3, 5, 3], [1], [2, 2], [10**9, 4, 10**9]):
        image_ids = torch.tensor(ids)
        share = find_positives(image_ids).float()
        wanted = share / share.sum(1, keepdim=True)
        got = torch.as_tensor(attempt(student, image_ids)).float()
        demand(got.shape == wanted.shape, f"For {len(ids)} pairs the table is {len(ids)} x {len(ids)}.")
        demand(
            not (len(set(ids)) < len(ids) and torch.allclose(got, torch.eye(len(ids)))),
            "Your targets are the diagonal alone; the other captions of the same image are positives too.",
        )
        demand(
            torch.allclose(got.sum(1), torch.ones(len(ids))),
            f"Rows must sum to one; for ids {ids} yours sum to {[round(v, 2) for v in got.sum(1).tolist()]}.",
        )
        demand(torch.allclose(got, wanted), f"For ids {ids} the targets are {wanted.tolist()}, not {got.tolist()}.")
    print("ok: captions of the same image share the target, all others are 0.")


def same_objects_elsewhere(scenes: Any, batch_size: int, batches: int = 100) -> tuple[int, int]:
    """In how many random batches do two pictures show the same objects and colors with different captions?

    Returns that number and the number of batches. Only pictures with several objects count.
    """
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0))
    drawn = order[: len(order) // batch_size * batch_size].view(-1, batch_size)[:batches]
    found = 0
    for rows in drawn.tolist():
        captions: dict[tuple, set[str]] = {}
        for scene in map(scenes.scene, rows):
            if len(scene.objects) > 1:
                objects = tuple(sorted((item.noun, str(item.color)) for item in scene.objects))
                captions.setdefault(objects, set()).add(scene.captions()[0])
        found += any(len(some) > 1 for some in captions.values())
    return found, len(drawn)
