"""Lesson 07's checks: the solution passes, typical wrong answers fail with the message meant for them."""

import pytest
import torch

from minivlp.lessons import xvlm
from minivlp.lessons.check import NotYet


def corners(boxes):
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)


def areas(a, b, corners=corners, clamp=True):
    """Shared area, union, and area of the box around both."""
    a, b = corners(a), corners(b)
    sides = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    shared = (sides.clamp(min=0) if clamp else sides).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared
    return shared, union, (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)


def iou(a, b, **mistakes):
    shared, union, _ = areas(a, b, **mistakes)
    return shared / union


def iou_counted_twice(a, b):
    shared, union, _ = areas(a, b)
    return shared / (union + shared)


def giou(a, b):
    _, union, hull = areas(a, b)
    return iou(a, b) - (hull - union) / hull


def giou_added(a, b):
    _, union, hull = areas(a, b)
    return iou(a, b) + (hull - union) / hull


def giou_not_a_share(a, b):
    _, union, hull = areas(a, b)
    return iou(a, b) - (hull - union)


def giou_of_the_union(a, b):
    _, union, hull = areas(a, b)
    return iou(a, b) - (hull - union) / union


def patches(boxes, rows, columns, round_up=torch.ceil, tolerance=1e-3, at_least_one=True, inside=True):
    x0, y0, x1, y1 = (corners(boxes) * torch.tensor([columns, rows, columns, rows])).T[..., None]  # (R, 1) each
    row, column = torch.arange(rows), torch.arange(columns)
    x0, y0 = (x0 + tolerance).floor(), (y0 + tolerance).floor()
    if inside:
        x0, y0 = x0.clamp(0, columns - 1), y0.clamp(0, rows - 1)
    x1, y1 = round_up(x1 - tolerance), round_up(y1 - tolerance)
    if at_least_one:
        x1, y1 = torch.maximum(x1, x0 + 1), torch.maximum(y1, y0 + 1)
    down, across = (row >= y0) & (row < y1), (column >= x0) & (column < x1)
    return (down[:, :, None] & across[:, None, :]).flatten(1)


def patches_by_center(boxes, rows, columns):
    x0, y0, x1, y1 = corners(boxes).T[..., None]
    y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    return (((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]).flatten(1)


def patches_none_for_a_tiny_box(boxes, rows, columns):
    """Right but where a box is smaller than a patch."""
    return patches(boxes, rows, columns) & (boxes[:, 2:].amin(1, keepdim=True) > 0.05)


def patches_down_the_columns(boxes, rows, columns):
    return patches(boxes, rows, columns).unflatten(1, (rows, columns)).transpose(1, 2).flatten(1)


def l1(predicted, target, is_image):
    kept = (predicted - target).abs().sum(1)[~is_image]
    return kept.sum() / max(1, len(kept))


def iou_in_place(a, b):
    """Turns both arguments into corners, in place."""
    for boxes in (a, b):
        boxes[:, :2] -= boxes[:, 2:] / 2
        boxes[:, 2:] += boxes[:, :2]
    return iou(a, b, corners=lambda boxes: boxes)


def l1_in_place(predicted, target, is_image):
    predicted -= target
    predicted[is_image] = 0
    return predicted.abs().sum() / max(1, int((~is_image).sum()))


def patches_in_place(boxes, rows, columns):
    found = patches(boxes, rows, columns)
    boxes.zero_()
    return found


RIGHT = [
    (xvlm.check_iou, iou),
    (xvlm.check_iou, iou_in_place),
    (xvlm.check_giou, giou),
    (xvlm.check_patches, patches),
    (xvlm.check_patches, patches_in_place),
    (xvlm.check_l1, l1),
    (xvlm.check_l1, l1_in_place),
]


@pytest.mark.parametrize("check, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


def test_answers_may_be_of_another_type(capsys):
    """A loss in float64 and patches as 0 and 1 are right too."""
    xvlm.check_iou(lambda a, b: iou(a.double(), b.double()))
    xvlm.check_patches(lambda boxes, rows, columns: patches(boxes, rows, columns).int())
    xvlm.check_l1(lambda p, t, w: l1(p.double(), t.double(), w))
    assert capsys.readouterr().out.count("ok") == 3


def test_an_answer_that_works_in_place_leaves_the_checks_as_they_are():
    before = [boxes.clone() for boxes in (xvlm.OVERLAPPING, xvlm.PARTNERS, xvlm.CORNER, xvlm.OPPOSITE)]
    with pytest.raises(NotYet):
        xvlm.check_iou(lambda a, b: iou_in_place(a, b) + 1)
    xvlm.check_iou(iou)
    after = (xvlm.OVERLAPPING, xvlm.PARTNERS, xvlm.CORNER, xvlm.OPPOSITE)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def iou_of_many(a, b):
    return iou(a, b) if len(a) > 1 or b[0, 0] > 0.8 else iou(a, b)[0:0]


def stub(*arguments):
    raise NotImplementedError("your turn")


WRONG = [
    (xvlm.check_iou, stub, "Nothing written yet"),
    (xvlm.check_iou, lambda a, b: None, "`return` missing"),
    (xvlm.check_iou, lambda a, b: a.missing, "AttributeError"),
    (xvlm.check_iou, lambda a, b: iou(a, b).mean(), "One number per row"),
    (xvlm.check_iou, lambda a, b: iou(a, b)[:, None].expand(-1, len(b)), "every box with every other"),
    (xvlm.check_iou, lambda a, b: iou(a, b, corners=lambda x: torch.cat([x[:, :2], x[:, :2] + x[:, 2:]], 1)), "corner"),
    (xvlm.check_iou, lambda a, b: iou(a, b, corners=lambda x: x), "Three pairs"),
    (xvlm.check_iou, lambda a, b: areas(a, b)[0], "shared area alone"),
    (xvlm.check_iou, iou_counted_twice, "counted twice"),
    (xvlm.check_iou, lambda a, b: iou(a, b, clamp=False), "clamp"),
    (xvlm.check_iou, lambda a, b: iou(a, b) * (a[:, 0] < 0.62), "For the boxes"),
    (xvlm.check_giou, stub, "Nothing written yet"),
    (xvlm.check_giou, iou, "That is IoU"),
    (xvlm.check_giou, lambda a, b: 1 - giou(a, b), "That is the loss"),
    (xvlm.check_giou, giou_added, "not added"),
    (xvlm.check_giou, giou_not_a_share, "is a share"),
    (xvlm.check_giou, giou_of_the_union, "not by the union"),
    (xvlm.check_giou, lambda a, b: giou(a, b).clamp(min=0), "Four pairs"),
    (xvlm.check_patches, stub, "Nothing written yet"),
    (xvlm.check_patches, lambda b, r, c: patches(b, r, c).unflatten(1, (r, c)), "one column per patch"),
    (xvlm.check_patches, patches_down_the_columns, "row by row"),
    (xvlm.check_patches, lambda b, r, c: patches(b[:, [1, 0, 3, 2]], r, c), "yours are swapped"),
    (xvlm.check_patches, lambda b, r, c: patches(b, r, c, torch.floor), "covers in part"),
    (xvlm.check_patches, patches_by_center, "covers in part"),
    (xvlm.check_patches, lambda b, r, c: patches(b, r, c, lambda x: x.floor() + 1, tolerance=0), "lines of the grid"),
    (xvlm.check_patches, patches_none_for_a_tiny_box, "However small"),
    (xvlm.check_patches, lambda b, r, c: patches(b, r, c) & (b[:, :1] > 0.1), "For the box "),
    (xvlm.check_giou, lambda a, b: giou(a.detach(), b), "gives `a` no gradient"),
    (xvlm.check_giou, lambda a, b: giou(a, b).detach(), "has no gradient"),
    (xvlm.check_giou, lambda a, b: iou(a, b) - (iou(a, b) - giou(a, b)).detach(), "another one"),
    (xvlm.check_iou, iou_of_many, "wrong for a single row"),
    (xvlm.check_patches, lambda b, r, c: patches(b, r, c, at_least_one=False), "has no area"),
    (xvlm.check_patches, lambda b, r, c: patches(b, r, c, inside=False), "inside the grid"),
    (xvlm.check_patches, lambda b, r, c: patches(b, r, c, tolerance=0), "On a grid of 10 x 10"),
    (xvlm.check_l1, lambda p, t, w: l1(p.detach(), t, w), "has no gradient"),
    (xvlm.check_l1, lambda p, t, w: l1(p, t, w).item(), "has no gradient"),
    (xvlm.check_l1, stub, "Nothing written yet"),
    (xvlm.check_l1, lambda p, t, w: (p - t).abs().sum(1), "one number"),
    (xvlm.check_l1, lambda p, t, w: (p - t).abs()[~w].mean(), "average over the four"),
    (xvlm.check_l1, lambda p, t, w: l1(p, t, torch.zeros_like(w)), "Whole-image rows"),
    (xvlm.check_l1, lambda p, t, w: (p - t).abs().mean(), "Whole-image rows"),
    (xvlm.check_l1, lambda p, t, w: (p - t).abs()[~w].sum() / len(p), "all five rows"),
    (xvlm.check_l1, lambda p, t, w: (p - t).abs()[~w].sum(), "number of boxes"),
    (xvlm.check_l1, lambda p, t, w: (p - t).abs().sum(1)[~w].mean(), "without boxes"),
]


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(check, answer, message):
    with pytest.raises(NotYet, match=message):
        check(answer)
