"""Checks of lesson 07's exercises. Boxes are random, of one row, apart from each other, and without area."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minivlp.lessons.check import attempt, demand, demand_gradients
from minivlp.objectives.boxes import box_losses, box_to_patches, giou, iou, to_corners

OVERLAPPING = torch.tensor([[0.40, 0.50, 0.40, 0.20], [0.30, 0.30, 0.20, 0.40], [0.60, 0.40, 0.30, 0.30]])
PARTNERS = torch.tensor([[0.50, 0.55, 0.20, 0.30], [0.35, 0.40, 0.30, 0.20], [0.60, 0.40, 0.30, 0.30]])
CORNER, OPPOSITE = torch.tensor([[0.1, 0.1, 0.2, 0.2]]), torch.tensor([[0.9, 0.9, 0.2, 0.2]])


def _random_boxes(rows: int, seed: int) -> Tensor:
    """(R, 4) boxes inside the picture."""
    low, high = torch.rand(2, rows, 2, generator=torch.Generator().manual_seed(seed)).sort(dim=0).values
    return torch.cat([(low + high) / 2, high - low], dim=1)


def _ask(student: Callable[..., Tensor], *arguments: Tensor | int) -> Tensor:
    """The student's answer as floats: True counts 1."""
    return torch.as_tensor(attempt(student, *arguments)).float()


def _close(got: Tensor, wanted: Tensor) -> bool:
    return got.shape == wanted.shape and torch.allclose(got, wanted.float(), atol=1e-5)


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.2f}" for value in values.flatten().tolist())


def _all_close(got: Tensor, wanted: Tensor, *boxes: Tensor) -> None:
    """Every row right, or a message that shows the first wrong one."""
    demand(got.shape == wanted.shape, f"For {len(wanted)} rows the shape is {tuple(wanted.shape)}: {tuple(got.shape)}.")
    wrong = (got - wanted.float()).abs() > 1e-5
    if wrong.any():
        row = int(wrong.reshape(len(wrong), -1).any(dim=1).nonzero()[0])
        where = " and ".join(f"({_numbers(b[row])})" for b in boxes)
        patches = wanted.ndim > 1
        truth, said = ((x[row].nonzero()[:, 0].tolist() if patches else f"{x[row]:.2f}") for x in (wanted, got))
        demand(False, f"For the box{'es' if len(boxes) > 1 else ''} {where} the answer is {truth}, not {said}.")


def _any_form(student: Callable[..., Tensor], right: Callable[..., Tensor], *boxes: Tensor) -> None:
    """Right for one row, for float64 and for tensors that are not contiguous."""
    for kind, same in (
        ("a single row", [b[:1] for b in boxes]),
        ("boxes of float64", [b.double() for b in boxes]),
        ("boxes that are a transposed tensor", [b.T.contiguous().T for b in boxes]),
    ):
        demand(_close(_ask(student, *same), right(*same)), f"Right so far, but wrong for {kind}.")


def _one_per_row(got: Tensor, rows: int) -> None:
    demand(
        got.shape != (rows, rows),
        f"You compare every box with every other, {rows} x {rows}; compare box i with box i, one number per row.",
    )
    demand(got.shape == (rows,), f"One number per row: shape ({rows},), yours is {tuple(got.shape)}.")


def check_iou(student: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 1: `student(a, b)`, boxes (R, 4) as cx, cy, w, h -> intersection over union of equal rows, (R,)."""
    wanted = iou(OVERLAPPING, PARTNERS)
    got = _ask(student, OVERLAPPING, PARTNERS)
    _one_per_row(got, 3)
    shifted = [boxes + torch.cat([boxes[:, 2:] / 2, 0 * boxes[:, 2:]], 1) for boxes in (OVERLAPPING, PARTNERS)]
    demand(
        not _close(got, iou(*shifted)),
        "You take (cx, cy) for the upper left corner; it is the center: x0 = cx - w / 2, x1 = cx + w / 2.",
    )
    areas = OVERLAPPING[:, 2:].prod(1) + PARTNERS[:, 2:].prod(1)
    shared = wanted * areas / (1 + wanted)  # since wanted = shared / (areas - shared)
    demand(not _close(got, shared), "That is the shared area alone; divide by the area of the union.")
    demand(
        not _close(got, shared / areas),
        "What both boxes share is counted twice in your union: area of a + area of b - shared.",
    )
    demand(_close(got, wanted), f"Three pairs of boxes: {_numbers(wanted)}, not {_numbers(got)}.")
    apart = _ask(student, CORNER, OPPOSITE)
    demand(
        _close(apart, torch.zeros(1)),
        "Two boxes in opposite corners share nothing: 0, not "
        f"{_numbers(apart)}. Both sides of the intersection are negative, and their product is positive: clamp.",
    )
    many = _random_boxes(30, 0), _random_boxes(30, 1)
    _all_close(_ask(student, *many), iou(*many), *many)
    _any_form(student, iou, *many)
    print("ok: from centers to corners, intersection over union, and 0 for boxes that do not touch.")


def check_giou(student: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 2: `student(a, b)`, boxes (R, 4) as cx, cy, w, h -> generalized IoU of equal rows, (R,)."""
    a, b = torch.cat([OVERLAPPING, CORNER]), torch.cat([PARTNERS, OPPOSITE])
    wanted = giou(a, b)
    got = _ask(student, a, b)
    _one_per_row(got, 4)
    demand(not _close(got, iou(a, b)), "That is IoU. Subtract the part of the box around both that neither fills.")
    demand(not _close(got, 1 - wanted), "That is the loss, 1 - GIoU; return GIoU itself, which is 1 for equal boxes.")
    demand(
        not _close(got, 2 * iou(a, b) - wanted),
        "The empty part is subtracted, not added: GIoU is smaller for boxes further apart.",
    )
    corners = to_corners(a), to_corners(b)
    hull = (torch.maximum(*corners)[:, 2:] - torch.minimum(*corners)[:, :2]).prod(1)
    union = hull * (1 - iou(a, b) + wanted)  # since wanted = iou - (hull - union) / hull
    demand(
        not _close(got, iou(a, b) - (hull - union)),
        "The empty part is a share: divide it by the area of the box around both.",
    )
    demand(
        not _close(got, iou(a, b) - (hull - union) / union),
        "Divide the empty part by the area of the box around both, not by the union.",
    )
    demand(_close(got, wanted), f"Four pairs of boxes: {_numbers(wanted)}, not {_numbers(got)}.")
    many = _random_boxes(30, 2), _random_boxes(30, 3)
    _all_close(_ask(student, *many), giou(*many), *many)
    _any_form(student, giou, *many)
    a, b = (boxes.clone().requires_grad_() for boxes in many)
    demand_gradients(_ask(student, a, b).sum(), giou(a, b).sum(), a=a, b=b)
    print("ok: equal boxes have 1, boxes far apart nearly -1, and there is a gradient everywhere.")


def check_patches(student: Callable[[Tensor, int, int], Tensor]) -> None:
    """Exercise 3: `student(boxes, rows, columns)`, (R, 4) -> which patches each box touches, (R, rows * columns)."""
    rows, columns = 4, 8
    box = torch.tensor([[0.3125, 0.4375, 0.375, 0.375]])  # patches: columns 1 to 3, rows 1 to 2, the last ones half
    wanted = box_to_patches(box, (rows, columns))
    got = _ask(student, box, rows, columns)
    demand(
        got.shape == (1, rows * columns),
        f"One row per box and one column per patch: (1, {rows * columns}), yours is {tuple(got.shape)}.",
    )
    got = got.bool()
    by_column = wanted.view(rows, columns).T.flatten()
    demand(
        not torch.equal(got[0], by_column),
        "Patches are numbered row by row: patch = row * columns + column. Yours are numbered column by column.",
    )
    swapped = box_to_patches(box[:, [1, 0, 3, 2]], (rows, columns))
    demand(not torch.equal(got, swapped), "x counts columns and y counts rows; yours are swapped.")
    demand(
        not (got.sum() < wanted.sum() and (got <= wanted).all()),
        f"The box touches {int(wanted.sum())} patches, yours has {int(got.sum())} of them: "
        "a patch that the box covers in part counts, too.",
    )
    exact = torch.tensor([[0.25, 0.5, 0.25, 0.5]])  # its edges lie on grid lines: columns 1 and 2, rows 1 and 2
    got_exact = _ask(student, exact, rows, columns).bool()
    demand(
        torch.equal(got_exact, box_to_patches(exact, (rows, columns))),
        f"A box whose edges lie on the lines of the grid touches 4 patches, not {int(got_exact.sum())}.",
    )
    demand(torch.equal(got, wanted), f"Patches {wanted[0].nonzero()[:, 0].tolist()} are inside, not yours.")
    tiny = torch.tensor([[0.3, 0.4, 0.01, 0.01]])
    got_tiny = _ask(student, tiny, rows, columns).bool()
    demand(
        int(got_tiny.sum()) == 1,
        f"However small a box, it touches at least one patch: yours touches {int(got_tiny.sum())}.",
    )
    without_area = torch.tensor([[0.3, 0.4, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    for point, patch in zip(without_area, box_to_patches(without_area, (rows, columns)), strict=True):
        got_point = _ask(student, point[None], rows, columns)[0].bool()
        there, yours = (x.nonzero().flatten().tolist() for x in (patch, got_point))
        demand(
            yours == there,
            f"The box ({_numbers(point)}) has no area. It has the patch in which it lies, {there}; yours has {yours}. "
            "The first patch must be inside the grid, and the last one at least the first.",
        )
    whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    demand(_ask(student, whole, rows, columns).bool().all(), "The box of the whole picture touches all patches.")
    many = _random_boxes(30, 4)
    _all_close(_ask(student, many, rows, columns), box_to_patches(many, (rows, columns)), many)
    lines = torch.tensor([[(i + j) / 20, 0.5, (j - i) / 10, 1.0] for i in range(10) for j in range(i + 1, 11)])
    got_lines = _ask(student, lines, 10, 10).bool()
    demand(got_lines.shape == (55, 100), f"55 boxes, 10 x 10 patches: (55, 100), yours is {tuple(got_lines.shape)}.")
    off = int((got_lines != box_to_patches(lines, (10, 10))).any(1).sum())
    demand(
        off == 0,
        f"On a grid of 10 x 10, {off} of 55 boxes whose edges lie on lines of the grid get a column too many or too "
        "few: 0.3 * 10 is not exactly 3 in floating point. Move each edge inward by 1e-3 of a patch before you round.",
    )
    _any_form(
        lambda boxes: student(boxes, rows, columns), lambda boxes: box_to_patches(boxes, (rows, columns)).float(), many
    )
    print("ok: every patch that the box touches, row by row, and at least one.")


def check_l1(student: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 4: `student(predicted, target, is_image)`, (R, 4), (R, 4), (R,) bool -> summed L1 per box, a scalar."""
    target, predicted = _random_boxes(5, 5), _random_boxes(5, 6)
    is_image = torch.tensor([False, True, False, True, False])
    wanted = box_losses(predicted, target, is_image).l1
    got = _ask(student, predicted, target, is_image)
    demand(got.ndim == 0, f"The loss must be one number, yours has shape {tuple(got.shape)}.")
    demand(
        not torch.isclose(got, wanted / 4),
        "You average over the four coordinates; sum them. With the mean this loss would weigh four times too little.",
    )
    everything = box_losses(predicted, target).l1
    demand(
        not (torch.isclose(got, everything) or torch.isclose(got, everything / 4)),
        "Whole-image rows count in yours. Leave them out: a caption of the whole image names no place.",
    )
    demand(
        not (torch.isclose(got, wanted * 3 / 5) or torch.isclose(got, wanted * 3 / 20)),
        "You divide by all five rows; divide by the three that have a box.",
    )
    demand(not torch.isclose(got, wanted * 3), "Divide by the number of boxes, or the loss would grow with the batch.")
    demand(
        torch.isclose(got, wanted, atol=1e-5),
        f"For three boxes in five rows the loss is {wanted:.3f}, yours is {got:.3f}.",
    )
    none = _ask(student, predicted, target, torch.ones(5, dtype=torch.bool))
    demand(
        torch.isclose(none, torch.tensor(0.0)),
        f"For a batch without boxes the loss is 0, yours is {none:.3f}: divide by at least one, or it becomes NaN.",
    )
    one = _ask(student, predicted[:1].double(), target[:1].double(), is_image[:1])
    demand(
        torch.isclose(one, box_losses(predicted[:1], target[:1]).l1, atol=1e-5), "Right so far, but wrong for one row."
    )
    learned = predicted.clone().requires_grad_()
    loss = box_losses(learned, target, is_image).l1
    demand_gradients(_ask(student, learned, target, is_image), loss, predicted=learned)
    print("ok: summed over coordinates, averaged over boxes, whole images left out.")
