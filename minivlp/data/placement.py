"""Where the objects of a scene are: boxes in pixels, spatial relations and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minivlp.data.grammar import Mention

Corners = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 are exclusive


@dataclass(frozen=True, slots=True)
class SceneObject(Mention):
    """One object, or a group of equal objects, with the box of each member in pixels."""

    boxes: tuple[Corners, ...] = ()

    @property
    def mention(self) -> Mention:
        """Everything that captions say of the object."""
        return Mention(self.noun, self.color, self.size, self.count)

    @property
    def corners(self) -> Corners:
        """The smallest box around all members."""
        x0, y0, x1, y1 = zip(*self.boxes, strict=True)
        return min(x0), min(y0), max(x1), max(y1)


def relation(one: SceneObject, other: SceneObject) -> str | None:
    """Where `one` is relative to `other`: left, right, above, below, or None if it is ambiguous.

    It compares the centers: the distance along one axis must be at least 1.25 times that along the other. For groups
    it must be the same for every pair of members.
    """
    found = {_box_relation(a, b) for a in one.boxes for b in other.boxes}
    return found.pop() if len(found) == 1 else None


def _box_relation(a: Corners, b: Corners) -> str | None:
    right, down = b[0] + b[2] - a[0] - a[2], b[1] + b[3] - a[1] - a[3]  # twice the distance from center a to center b
    if 4 * max(abs(right), abs(down)) < 5 * min(abs(right), abs(down)):
        return None
    if abs(right) > abs(down):
        return "left" if right > 0 else "right"
    return "above" if down > 0 else "below"


def size_word(box: Corners, side: int) -> str | None:
    """small (longer side at most 29 % of the picture's side), large (at least 38 %), or None in between."""
    percent = 100 * max(box[2] - box[0], box[3] - box[1])
    return "small" if percent <= 29 * side else "large" if percent >= 38 * side else None


def neighbors(objects: Sequence[SceneObject]) -> Iterator[tuple[SceneObject, SceneObject]]:
    """Pairs of consecutive objects, each in both orders. Captions state the relations of these pairs."""
    for one, other in zip(objects, objects[1:], strict=False):
        yield one, other
        yield other, one


def noun_is_shared(objects: Sequence[SceneObject], this: SceneObject) -> bool:
    """Whether another of the objects has the same noun, so that the noun alone is ambiguous."""
    return sum(other.noun == this.noun for other in objects) > 1
