"""Draw a random scene of a split: what it shows, where the objects are, and the background.

A scene has one to three objects: emoji objects, and colored shapes (two in five). The longer side of an object is 25 to
42 % of the picture's side, and objects never overlap. About a quarter of the objects are called small or large. One in
eight scenes with one or two objects contains a group ("two bees").
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from minivlp.data.grammar import COLORS, OBJECTS, SHAPES, SIZES, Mention, split_of
from minivlp.data.placement import Corners, SceneObject, relation
from minivlp.data.rng import pick
from minivlp.data.scene import Background, Scene
from minivlp.data.sprites import TEXTURES, sprite_size


def draw_scene(rng: Random, split: str = "all", size: int = 64, objects: tuple[int, int] = (1, 3)) -> Scene:
    """A random scene of this split, `size` pixels wide and high, with a number of objects in the range `objects`."""
    while True:
        mentions = _draw_mentions(rng, pick(rng, range(objects[0], objects[1] + 1)))
        if split != "all" and split_of(mentions) != split:
            continue
        placed = _place_all(rng, mentions, size)
        if placed is not None:
            return Scene(placed, _draw_background(rng), size)


def _draw_mentions(rng: Random, count: int) -> list[Mention]:
    """Different objects; sometimes two shapes that differ in color only, or a group."""
    mentions: list[Mention] = []
    while len(mentions) < count:
        shapes = [mention.noun for mention in mentions if mention.color]
        if rng.random() >= 0.4:
            new = Mention(pick(rng, OBJECTS))
        elif shapes and rng.random() < 0.3:
            new = Mention(shapes[0], pick(rng, COLORS))  # only the color distinguishes it from the other shape
        else:
            new = Mention(pick(rng, SHAPES), pick(rng, COLORS))
        if new not in mentions:
            mentions.append(new)
    if count < 3 and rng.random() < 0.12:
        i = pick(rng, range(count))
        mentions[i] = replace(mentions[i], count=pick(rng, (2, 3)))
    # The size word is drawn first and the size in pixels after it, so small and large are equally frequent.
    return [replace(m, size=pick(rng, SIZES)) if m.count == 1 and rng.random() < 0.25 else m for m in mentions]


def _place_all(rng: Random, mentions: list[Mention], size: int) -> tuple[SceneObject, ...] | None:
    """Places without overlap and with an unambiguous relation to the object before; None after too many attempts."""
    for _ in range(20):
        placed: list[SceneObject] = []
        for mention in mentions:
            for _ in range(40):
                new = _place(rng, mention, size)
                if not any(_touch(a, b) for a in new.boxes for other in placed for b in other.boxes) and (
                    not placed or relation(placed[-1], new)
                ):
                    placed.append(new)
                    break
            else:
                break
        if len(placed) == len(mentions):
            return tuple(placed)
    return None


def _place(rng: Random, mention: Mention, size: int) -> SceneObject:
    """One object at a random place. A group stands in a row or a column; its members are smaller to leave room."""
    smallest, largest = (25 * size + 99) // 100, (42 if mention.count == 1 else 30) * size // 100
    if mention.size == "small":
        largest = 29 * size // 100
    elif mention.size == "large":
        smallest = (38 * size + 99) // 100
    side = pick(rng, range(smallest, largest + 1))
    width, height = sprite_size(mention.noun, mention.color, side)
    gap = min(1 + pick(rng, range(size // 16)), (size - mention.count * side) // mention.count)  # 3 x 30 % must fit
    step_x, step_y = (width + gap, 0) if rng.random() < 0.5 else (0, height + gap)
    room_x, room_y = size - width - (mention.count - 1) * step_x, size - height - (mention.count - 1) * step_y
    x, y = pick(rng, range(room_x + 1)), pick(rng, range(room_y + 1))
    boxes: list[Corners] = []
    for i in range(mention.count):
        left, top = x + i * step_x, y + i * step_y
        boxes.append((left, top, left + width, top + height))
    return SceneObject(mention.noun, mention.color, mention.size, mention.count, tuple(boxes))


def _touch(a: Corners, b: Corners) -> bool:
    return not (a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1])


def _draw_background(rng: Random) -> Background:
    """Muted colors of medium lightness, so that black, white and all the colors of shapes stand out."""
    gray = pick(rng, range(150, 206))
    top = tuple(gray + pick(rng, range(-16, 17)) for _ in range(3))
    bottom = tuple(part + pick(rng, range(-18, 19)) for part in top)
    if rng.random() < 0.5:
        return Background((top, bottom))
    crop = (pick(rng, range(1000)), pick(rng, range(1000)), pick(rng, range(4, 11)))
    return Background((top, bottom), pick(rng, TEXTURES), crop)
