"""Boxes: corners, GIoU against torchvision, losses against a naive loop, patches against counting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou, generalized_box_iou

from minivlp.evaluation.attention_maps import box_around
from minivlp.objectives.boxes import box_losses, box_to_patches, from_corners, giou, iou, to_corners


def some_boxes(count: int, seed: int = 0) -> torch.Tensor:
    """Boxes of every size that lie inside the image."""
    draw = torch.Generator().manual_seed(seed)
    ends = torch.rand(count, 2, 2, generator=draw, dtype=torch.float64).sort(dim=1).values
    return from_corners(ends.flatten(1))


def test_corners_there_and_back():
    box = torch.tensor([[0.5, 0.4, 0.2, 0.6]])
    assert torch.allclose(to_corners(box), torch.tensor([[0.4, 0.1, 0.6, 0.7]]))
    boxes = some_boxes(50)
    assert torch.allclose(from_corners(to_corners(boxes)), boxes)


def test_giou_and_iou_equal_torchvision():
    a, b = some_boxes(200), some_boxes(200, seed=1)
    assert torch.allclose(giou(a, b), generalized_box_iou(to_corners(a), to_corners(b)).diagonal(), atol=1e-12)
    assert torch.allclose(iou(a, b), box_iou(to_corners(a), to_corners(b)).diagonal(), atol=1e-12)


def test_giou_by_hand():
    left, right = torch.tensor([[0.25, 0.5, 0.5, 1.0]]), torch.tensor([[0.75, 0.5, 0.5, 1.0]])
    assert giou(left, right).item() == pytest.approx(0)  # they touch: no overlap, and no part of the hull is empty
    near, far = torch.tensor([[0.1, 0.1, 0.2, 0.2]]), torch.tensor([[0.9, 0.9, 0.2, 0.2]])
    assert giou(near, far).item() == pytest.approx(0 - (1 - 0.08))
    assert giou(near, near).item() == pytest.approx(1)


def test_giou_is_symmetric_and_bounded():
    a, b = some_boxes(200), some_boxes(200, seed=1)
    assert torch.allclose(giou(a, b), giou(b, a))
    assert ((giou(a, b) <= iou(a, b) + 1e-12) & (giou(a, b) >= -1)).all()


def test_a_box_without_area_changes_only_its_own_row():
    a, b = some_boxes(4).float(), some_boxes(4, seed=1).float()
    expected = giou(a, b)
    a[1], b[1] = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.5, 0.5, 0.0, 0.0])
    a.requires_grad_()
    value = giou(a, b)
    assert value[1] == 0 and torch.equal(value[[0, 2, 3]], expected[[0, 2, 3]])
    value.sum().backward()
    assert a.grad.isfinite().all()


def naive(predicted, target, leave_out):
    """The two losses, box by box."""
    l1, giou_loss, count = 0.0, 0.0, 0
    for p, t, skip in zip(predicted, target, leave_out, strict=True):
        if skip or not (math.isfinite(sum(t.tolist())) and t[2] > 0 and t[3] > 0):
            continue
        l1 += sum(abs(x - y) for x, y in zip(p.tolist(), t.tolist(), strict=True))
        giou_loss += 1 - generalized_box_iou(to_corners(p[None]), to_corners(t[None])).item()
        count += 1
    return l1 / count, giou_loss / count


def test_losses_equal_the_naive_loop_and_leave_out_rows_without_a_valid_target():
    predicted, target = some_boxes(9), some_boxes(9, seed=1)
    leave_out = torch.tensor([True] + [False] * 8)
    target[3] = torch.tensor([0.5, 0.5, 0.0, 0.3])
    target[5, 1] = float("nan")
    predicted.requires_grad_()
    losses = box_losses(predicted, target, leave_out)
    expected = naive(predicted, target, leave_out)
    assert [loss.item() for loss in losses] == pytest.approx(expected)
    sum(losses).backward()
    assert predicted.grad.isfinite().all()
    assert (predicted.grad.abs().sum(dim=1) == 0).tolist() == [i in (0, 3, 5) for i in range(9)]


def test_l1_is_summed_over_the_coordinates():
    target = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    assert box_losses(target + 0.1, target).l1.item() == pytest.approx(0.4)


def test_an_exact_box_costs_nothing_and_without_boxes_the_loss_is_zero_with_a_graph():
    boxes = some_boxes(5).requires_grad_()
    assert sum(box_losses(boxes, boxes.detach())).item() == pytest.approx(0, abs=1e-12)
    nothing = sum(box_losses(boxes, boxes.detach(), torch.ones(5, dtype=torch.bool)))
    nothing.backward()
    assert nothing == 0 and (boxes.grad == 0).all()


def test_patches_by_hand():
    left_half = box_to_patches(torch.tensor([[0.25, 0.5, 0.5, 1.0]]), (2, 4)).view(2, 4)
    assert left_half.tolist() == [[True, True, False, False]] * 2
    low_right = box_to_patches(torch.tensor([[0.9, 0.8, 0.1, 0.1]]), (2, 4)).view(2, 4)
    assert low_right.tolist() == [[False] * 4, [False, False, False, True]]
    assert box_to_patches(torch.tensor([[0.5, 0.5, 1.0, 1.0]]), (3, 5)).all()


def test_a_box_on_the_grid_lines_does_not_touch_the_next_patches():
    grid = 7  # sevenths are not exact in binary
    for first in range(grid):
        for last in range(first + 1, grid + 1):
            box = torch.tensor([[(first + last) / 2 / grid, 0.5, (last - first) / grid, 1.0]])
            assert box_to_patches(box, (1, grid)).nonzero()[:, 1].tolist() == list(range(first, last))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.floats(-0.2, 1.2)] * 2, *[st.floats(0, 1.5)] * 2),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_every_box_has_patches_in_one_rectangle_that_covers_it(box, grid):
    inside = box_to_patches(torch.tensor([box]), grid).view(grid)
    rows, columns = inside.any(dim=1), inside.any(dim=0)
    assert inside.any() and torch.equal(inside, rows[:, None] & columns[None, :])
    for flags, center, size, n in ((columns, box[0], box[2], grid[1]), (rows, box[1], box[3], grid[0])):
        for index in range(n):
            middle = (index + 0.5) / n  # a patch whose middle is well inside the box is never missing
            if abs(middle - center) < size / 2 - 1e-3:
                assert flags[index]
            if abs(middle - center) > size / 2 + 0.51 / n and 0 < center < 1:
                assert not flags[index]


def test_the_box_around_a_map_holds_all_strong_patches_and_no_more():
    heat = torch.zeros(2, 4, 8)  # rows, columns
    heat[0, 1, 2], heat[0, 2, 5], heat[0, 0, 0] = 1.0, 0.5, 0.1
    heat[1, 3, 7] = 0.2
    wanted = from_corners(torch.tensor([[2 / 8, 1 / 4, 6 / 8, 3 / 4], [7 / 8, 3 / 4, 1, 1]]))
    assert torch.allclose(box_around(heat, share=0.4), wanted)
    assert torch.allclose(box_around(heat, share=0.8)[0], from_corners(torch.tensor([2 / 8, 1 / 4, 3 / 8, 2 / 4])))
