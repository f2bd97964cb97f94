"""Does attention fall on what is named? Maps over the patches of an image are compared with a box.

Axes: B maps, each of rows x columns patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert, masks_to_boxes

from minivlp.evaluation.score import Score, bootstrap


def attention_in_box(attention: Tensor, boxes: Tensor, images: Sequence[int] | None = None) -> Score:
    """The share of the attention that falls inside the box.

    attention: (B, rows, columns), not negative; each map is divided by its sum. boxes: (B, 4). images: (B,) numbers,
    equal for maps of the same image. A patch that is partly inside the box counts by that part. Chance is the value of
    evenly spread attention: the box's share of the image.
    """
    share = _shares(attention)
    covered, _ = cover(boxes.float().cpu(), *attention.shape[-2:])
    return bootstrap((share * covered).flatten(1).sum(1).numpy(), float(covered.mean()), images=images)


def pointing_game(attention: Tensor, boxes: Tensor, images: Sequence[int] | None = None) -> Score:
    """How often the center of the most attended patch lies in the box; arguments as in `attention_in_box`.

    Chance is the share of patches whose center lies in the box. Source: Zhang et al. 2016, "Top-down neural attention
    by excitation backprop" (section 4.1).
    """
    top = _shares(attention).flatten(1).argmax(1, keepdim=True)  # (B, 1)
    _, centers = cover(boxes.float().cpu(), *attention.shape[-2:])
    hits = centers.flatten(1).gather(1, top)[:, 0]
    return bootstrap(hits.numpy(), float(centers.mean()), images=images)


def box_around(attention: Tensor, share: float) -> Tensor:
    """The smallest box (R, 4) around all patches that reach a `share` of the strongest patch of their map.

    attention: maps (R, rows, columns), not negative. Boxes are cx, cy, w, h in 0..1. ALBEF finds the box of a phrase in
    a similar way (Li et al. 2021, section 5.4).
    """
    hot = attention >= share * attention.amax(dim=(1, 2), keepdim=True)
    rows, columns = hot.shape[1:]
    ends = masks_to_boxes(hot)  # (R, 4): from the first patch to the last
    ends = ends + ends.new_tensor([0, 0, 1, 1])  # to behind the last
    return box_convert(ends / ends.new_tensor([columns, rows, columns, rows]), "xyxy", "cxcywh")


def cover(boxes: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """How much of each patch lies in the box (0..1), and whether its center does (0 or 1): (B, rows, columns) each."""

    def along(center: Tensor, length: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        low, high = (center - length / 2)[:, None] * cells, (center + length / 2)[:, None] * cells  # (B, 1) in cells
        start = torch.arange(cells)  # (cells,)
        overlap = (torch.minimum(high, start + 1) - torch.maximum(low, start)).clamp(min=0)  # (B, cells)
        return overlap, ((low <= start + 0.5) & (start + 0.5 < high)).float()

    across, center_x = along(boxes[:, 0], boxes[:, 2], columns)
    down, center_y = along(boxes[:, 1], boxes[:, 3], rows)
    return down[:, :, None] * across[:, None, :], center_y[:, :, None] * center_x[:, None, :]


def _shares(attention: Tensor) -> Tensor:
    """Each map divided by its sum. Raises ValueError if a map is negative somewhere, zero everywhere or not finite."""
    weights = attention.detach().float().cpu()
    total = weights.sum((1, 2), keepdim=True)
    if (weights < 0).any() or (total <= 0).any() or not weights.isfinite().all():
        raise ValueError("Attention must be finite, not negative, and not zero everywhere.")
    return weights / total
