"""The words of the scene world, what a caption can state with them, and which combinations are kept from training.

`english` and `chinese` put these facts into words; `english.parse` reads them back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from zlib import crc32

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
OBJECTS = (
    "dog", "cat", "pig", "frog", "lion", "panda", "penguin", "octopus", "crab", "turtle", "bee", "butterfly", "fish",
    "snail", "rabbit", "apple", "banana", "carrot", "watermelon", "pineapple", "mushroom", "cactus", "sunflower",
    "tree", "cup", "car", "bus", "rocket", "airplane", "sailboat", "house", "umbrella", "key", "bell", "guitar", "gift",
    "balloon", "crown", "football", "basketball", "snowman", "ghost", "robot", "camera",
)  # fmt: skip
SIZES = ("small", "large")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Mention:
    """What is said of one thing. A `count` above one speaks of a group ("two bees"); counts are exact."""

    noun: str
    color: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Facts:
    """What one caption states: `relations[i]` is where `things[i]` lies, seen from `things[i + 1]`."""

    things: tuple[Mention, ...]
    relations: tuple[str, ...] = ()

    def reversed(self) -> Facts:
        """The same facts told from the other end."""
        return Facts(self.things[::-1], tuple(OPPOSITE[relation] for relation in self.relations[::-1]))


# Each colour and each shape loses one partner, so that every one of them is still seen in training.
HELD_OUT_PAIRS = frozenset((color, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, color in enumerate(COLORS))


def held_out(things: Iterable[Mention]) -> frozenset[tuple[str, str]]:
    """The combinations among these things that only the split `composition` may show.

    They are eight coloured shapes (`HELD_OUT_PAIRS`) and one in twenty of the pairs of two different objects.
    """
    things = list(things)
    colored = {(thing.color, thing.noun) for thing in things} & HELD_OUT_PAIRS
    objects = sorted({thing.noun for thing in things if thing.noun in OBJECTS})
    return frozenset(colored | {pair for pair in combinations(objects, 2) if crc32("+".join(pair).encode()) % 20 == 0})


def split_of(things: Iterable[Mention]) -> str:
    """Which split a scene of these things belongs to.

    Only nouns, colours and counts decide, in any order: no wording, no size word and no other relation of the same
    things can bring a caption of one split into another.
    """
    things = list(things)
    if held_out(things):
        return "composition"
    key = "|".join(sorted(f"{thing.count} {thing.color} {thing.noun}" for thing in things))
    place = crc32(key.encode()) % 100
    return "train" if place < 70 else "validation" if place < 85 else "test"
