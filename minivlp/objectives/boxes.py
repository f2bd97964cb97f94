"""Boxes: where they are, how far off a predicted one is, and which patches they cover.

A box is (cx, cy, w, h): its center and its size as fractions of the image's width and height. Axes: R boxes (regions),
P patches. X-VLM (Zeng et al., ICML 2022, section 3.2) trains its box head with L1 + GIoU, as DETR does; GIoU is
Rezatofighi et al., CVPR 2019.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BoxLosses(NamedTuple):
    """Two scalars that are simply added: L1 knows how far, GIoU knows how much of the box is right."""

    l1: Tensor
    giou: Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) boxes (cx, cy, w, h) as (x0, y0, x1, y1), in the same unit."""
    center, size = boxes.split(2, dim=-1)
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def from_corners(corners: Tensor) -> Tensor:
    """(..., 4) corners (x0, y0, x1, y1) as (cx, cy, w, h), in the same unit."""
    low, high = corners.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where there is no whole (a box without area), with a clean gradient in both cases."""
    return part / torch.where(whole > 0, whole, torch.ones_like(whole))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of the boxes of equal rows, (R, 4) and (R, 4) to (R,), in 0..1."""
    return _overlap(a, b)[0]


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU of the boxes of equal rows, (R, 4) and (R, 4) to (R,), in -1..1.

    IoU is 0 for every pair of boxes that do not touch, so it cannot say which way to move. GIoU subtracts the share of
    the smallest box around both that neither fills: the further apart, the more negative. Two boxes without any area
    give 0 (not NaN), and only in their own row.
    """
    overlap, union, hull = _overlap(a, b)
    return overlap - _ratio(hull - union, hull)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, area of the union and area of the box around both, each (R,)."""
    a_low, a_high = to_corners(a).split(2, dim=-1)
    b_low, b_high = to_corners(b).split(2, dim=-1)
    shared = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    union = (a_high - a_low).prod(-1) + (b_high - b_low).prod(-1) - shared
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    return _ratio(shared, union), union, hull


def counted_boxes(target: Tensor, leave_out: Tensor | None = None) -> Tensor:
    """(R,) bool: which rows `box_losses` counts: finite boxes (R, 4) with an area that are not in `leave_out`."""
    keep = target.isfinite().all(-1) & (target[:, 2:] > 0).all(-1)
    return keep if leave_out is None else keep & ~leave_out


def box_losses(predicted: Tensor, target: Tensor, leave_out: Tensor | None = None) -> BoxLosses:
    """How far `predicted` (R, 4) is from `target` (R, 4): both losses summed over the boxes, divided by their number.

    L1 is *summed* over the four coordinates: a mean would weigh it four times too little. Rows that say nothing about
    boxes are left out of the sum and of the number: those in `leave_out` (R,) bool (captions of the whole image), and
    those whose target has no area or is not finite. One bad row costs that row, never the batch. With no row left both
    are 0 and still part of the graph.
    """
    keep = counted_boxes(target, leave_out)
    predicted, target = predicted[keep], target[keep]
    count = max(1, len(target))
    return BoxLosses((predicted - target).abs().sum() / count, (1 - giou(predicted, target)).sum() / count)


def box_to_patches(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patches of a `grid` of (rows, columns) each box touches: (R, 4) to (R, P) bool, patches row by row.

    From the patch that holds the left edge to the one that holds the right edge, rows alike; clipped to the image,
    and always at least one patch, however small the box.
    """
    cells = boxes.new_tensor([grid[1], grid[0]])
    low, high = (to_corners(boxes) * torch.cat([cells, cells])).split(2, dim=-1)  # (R, 2) each, in patches
    # a tolerance of 1e-3 of a patch: an edge on a grid line must not reach the next patch by a rounding error
    first = torch.minimum((low + 1e-3).floor().clamp(min=0), cells - 1)
    last = torch.minimum(torch.maximum((high - 1e-3).ceil(), first + 1), cells)
    inside = []
    for axis, n in ((1, grid[0]), (0, grid[1])):
        steps = torch.arange(n, device=boxes.device)
        inside.append((steps >= first[:, axis, None]) & (steps < last[:, axis, None]))  # (R, rows), (R, columns)
    return (inside[0][:, :, None] & inside[1][:, None, :]).flatten(1)  # (R, P)
