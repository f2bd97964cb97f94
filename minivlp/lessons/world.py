"""What lesson 00 shows, and the checks of its exercises."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from minivlp.lessons.check import attempt, demand


def task_examples(scenes: Any, row: int, other: int) -> dict[str, str]:
    """One line for each task of the course: what is given -> the right answer, for two scenes of two objects each.

    `row` is the scene that all tasks are about; NLVR2's statement is about both.
    """
    scene, second = scenes.scene(row), scenes.scene(other)
    asked = dict(scene.questions())
    open_question = next(question for question in asked if question.startswith("what"))
    closed_question = next(question for question in asked if question.startswith("is the"))
    noun = scene.objects[0].noun
    both = any(item.noun == noun for item in second.objects)
    region = next(region for region in scene.regions() if region.kind == "phrase")
    caption, changed = scene.captions()[0], scene.counterfactuals(random.Random(0))["relation"]
    judged = "; ".join(f'"{text}" -> {label}' for text, label in scene.statements(random.Random(0)))
    return {
        "retrieval": f'"{caption}", {len(scenes):,} pictures -> this picture on rank 1',
        "classification": f'this picture, "{noun}" or "{second.objects[0].noun}"? -> {noun}',
        "VQA, open": f"{open_question} -> {asked[open_question]}",
        "VQA, closed": f"{closed_question} yes or no? -> {asked[closed_question]}",
        "entailment": judged,
        "NLVR2": f'this picture and "{second.captions()[0]}": "both show a {noun}" -> {"true" if both else "false"}',
        "grounding": f'"{region.phrase}" -> ({", ".join(f"{value:.2f}" for value in region.box)})',
        "captioning": f"this picture -> {caption}",
        "counterfactual": f'"{caption}" or "{changed}"? -> the first',
    }


def _close(got, wanted) -> bool:
    return len(got) == len(wanted) and all(abs(float(a) - b) < 1e-6 for a, b in zip(got, wanted, strict=True))


def check_box(student: Callable[..., tuple]) -> None:
    """Exercise 1: pixel corners and the picture's size -> (cx, cy, w, h) as fractions."""
    got = _box(student, 0, 0, 200, 100, 200, 100)
    demand(
        max(abs(float(v)) for v in got) <= 1.5, f"Fractions, not pixels: divide by width and height (you gave {got})."
    )
    demand(not _close(got, (0, 0, 1, 1)), "(cx, cy) is the center of the box, not its upper left corner.")
    demand(_close(got, (0.5, 0.5, 1, 1)), f"The box of the whole picture is (.5, .5, 1, 1), not {got}.")
    got = _box(student, 20, 10, 60, 40, 200, 100)
    demand(not _close(got, (0.2, 0.25, 0.3, 0.4)), "These are two corners; w and h are the box's width and height.")
    demand(
        _close(got, (0.2, 0.25, 0.2, 0.3)), f"Corners (20, 10, 60, 40) in 200 x 100 are (.2, .25, .2, .3), not {got}."
    )
    got = _box(student, 21, 10, 60, 41, 200, 100)
    demand(
        _close(got, (0.2025, 0.255, 0.195, 0.31)),
        f"Corners (21, 10, 60, 41) in 200 x 100 are (.2025, .255, .195, .31), not {got}: `//` drops what is left over; "
        "divide by `/`.",
    )
    print("ok: centers and sizes, as fractions of the picture.")


def _box(student: Callable[..., tuple], *numbers: int) -> tuple[float, ...]:
    """The student's box, four numbers."""
    got = attempt(student, *numbers)
    demand(hasattr(got, "__len__") and len(got) == 4, f"A box has four numbers; yours is {got!r}.")
    return tuple(map(float, got))


def check_relation(student: Callable[..., str | None]) -> None:
    """Exercise 2: where one box lies, seen from another."""
    middle = (0.5, 0.5, 0.2, 0.2)
    places = {"left": (0.1, 0.5), "right": (0.9, 0.55), "above": (0.45, 0.1), "below": (0.5, 0.9)}
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for wanted, (x, y) in places.items():
        got = attempt(student, (x, y, 0.2, 0.2), middle, none_counts=True)
        demand(
            got != opposite[wanted] or wanted in ("left", "right"),
            f"y grows downward: a box at y = {y} is {wanted} one at y = .5.",
        )
        demand(got != opposite[wanted], f"The other way round: a box at x = {x} is {wanted} of one at x = .5.")
        demand(got == wanted, f"A box at ({x}, {y}) is {wanted} seen from (.5, .5); you say {got}.")
    for one, other, wanted in (
        ((0.42, 0.5, 0.4, 0.1), (0.5, 0.5, 0.1, 0.1), "left"),
        ((0.42, 0.5, 0.1, 0.1), (0.5, 0.5, 0.4, 0.1), "left"),
        ((0.5, 0.42, 0.1, 0.4), (0.5, 0.5, 0.1, 0.1), "above"),
        ((0.5, 0.42, 0.1, 0.1), (0.5, 0.5, 0.1, 0.4), "above"),
    ):
        got = attempt(student, one, other, none_counts=True)
        demand(
            got == wanted,
            f"{one} is {wanted} of {other}: (cx, cy) is the center already, so the sizes do not matter. You say {got}.",
        )
    got = attempt(student, (0.2, 0.25, 0.1, 0.1), middle, none_counts=True)
    demand(got is None, f"A box at (.2, .25) is neither clearly left nor clearly above: None. You say {got}.")
    got = attempt(student, (0.2, 0.3, 0.1, 0.1), middle, none_counts=True)
    demand(got == "left", f"At (.2, .3) the centers differ .3 across and .2 down, 1.5 times: left. You say {got}.")
    print("ok: four directions, and None where the direction is unclear.")


def check_cost(student: Callable[[int, int], tuple[int, int]]) -> None:
    """Exercise 3: runs of a dual encoder and of a fusion model."""
    answer = attempt(student, 1000, 5000)
    demand(isinstance(answer, (tuple, list)) and len(answer) == 2, f"Return two numbers, not {answer!r}.")
    dual, fusion = answer
    demand(dual != 5_000_000, "A dual encoder runs once per picture and once per caption; pairs are only dot products.")
    demand(dual == 6000, f"1,000 pictures and 5,000 captions are 6,000 encodings, not {dual}.")
    demand(fusion == 5_000_000, f"A fusion model runs once for every pair: 5,000,000 runs, not {fusion}.")
    few = attempt(student, 3, 7)
    demand(tuple(few) == (10, 21), f"For 3 pictures and 7 captions: 10 and 21 runs, not {few}. Use `m` and `n`.")
    print("ok: 6,000 runs against 5,000,000 for a thousand pictures and five thousand captions.")
