"""Lesson 00's checks: the solution passes, typical wrong answers fail with the message meant for them."""

import pytest

from minivlp.data.scenes import Scenes
from minivlp.lessons import world
from minivlp.lessons.check import NotYet


def box(x0, y0, x1, y1, width, height):
    return (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height


def relation(one, other, ratio=1.25):
    dx, dy = other[0] - one[0], other[1] - one[1]
    if abs(dx) >= ratio * abs(dy):
        return "left" if dx > 0 else "right"
    if abs(dy) >= ratio * abs(dx):
        return "above" if dy > 0 else "below"
    return None


def flipped(one, other):
    return relation((one[0], -one[1]), (other[0], -other[1]))


def with_half(share):
    """Takes the center for a corner, and adds part of the size."""

    def wrong(one, other):
        one, other = ((x + share * w, y + share * h) for x, y, w, h in (one, other))
        return relation(one, other)

    return wrong


@pytest.mark.parametrize(
    "check, answer",
    [(world.check_box, box), (world.check_relation, relation), (world.check_cost, lambda m, n: (m + n, m * n))],
)
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


WRONG = [
    (world.check_box, lambda a, b, c, d, w, h: ((a + c) / 2, (b + d) / 2, c - a, d - b), "Fractions, not pixels"),
    (world.check_box, lambda a, b, c, d, w, h: (a / w, b / h, (c - a) / w, (d - b) / h), "center of the box"),
    (world.check_box, lambda a, b, c, d, w, h: ((a + c) / 2 / w, (b + d) / 2 / h, c / w, d / h), "two corners"),
    (world.check_box, lambda *corners: corners[:3], "four numbers"),
    (world.check_box, lambda a, b, c, d, w, h: ((a + c) // 2 / w, (b + d) // 2 / h, (c - a) / w, (d - b) / h), "`//`"),
    (world.check_box, lambda a, b, c, d, w, h: 0.5, "four numbers"),
    (world.check_relation, with_half(0.5), "center already"),
    (world.check_relation, with_half(-0.5), "center already"),
    (world.check_relation, lambda one, other: relation(other, one), "The other way round"),
    (world.check_relation, flipped, "y grows downward"),
    (world.check_relation, lambda one, other: relation(one, other, 1.0), "neither clearly left"),
    (world.check_relation, lambda one, other: relation(one, other, 2.0), "1.5 times"),
    (world.check_cost, lambda m, n: (m * n, m * n), "only dot products"),
    (world.check_cost, lambda m, n: (m + n, m + n), "every pair"),
    (world.check_cost, lambda m, n: (6000, 5_000_000), "Use `m` and `n`"),
]


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(check, answer, message):
    with pytest.raises(NotYet, match=message):
        check(answer)


def test_examples_of_tasks_say_the_truth_about_the_scene():
    scenes = Scenes(2000)
    found = world.task_examples(scenes, 0, 1)
    assert len(found) == 9 and all(" -> " in line for line in found.values())
    assert found["NLVR2"].endswith("false") and world.task_examples(scenes, 0, 0)["NLVR2"].endswith("true")
    question, answer = found["VQA, closed"].split(" yes or no? -> ")
    assert (question, answer) in scenes.questions(0)
    caption, changed = found["counterfactual"].split('"')[1:4:2]
    assert caption in scenes.captions(0) and changed not in scenes.captions(0)
