"""The vocabulary of the scene world, the facts that a caption can state, and the combinations held out of training.

`english` and `chinese` turn facts into sentences; `english.parse` turns sentences into facts.
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


@dataclass(frozen=True, slots=True)
class Mention:
    """What a caption says of one object. A `count` above 1 is a group ("two bees"); counts are exact."""

    noun: str
    color: str | None = None
    size: str | None = None
    count: int = 1

    @property
    def without_attributes(self) -> Mention:
        """Noun and count only: "heart" of "small red heart"."""
        return Mention(self.noun, count=self.count)


@dataclass(frozen=True, slots=True)
class Facts:
    """What one caption states. `relations[i]` is the position of `objects[i]` relative to `objects[i + 1]`."""

    objects: tuple[Mention, ...]
    relations: tuple[str, ...] = ()

    def reversed(self) -> Facts:
        """The same facts, starting from the last object."""
        return Facts(self.objects[::-1], tuple(OPPOSITE[relation] for relation in self.relations[::-1]))


# Each color and each shape loses exactly one partner, so every color and every shape still occurs in training.
HELD_OUT_PAIRS = frozenset((color, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, color in enumerate(COLORS))


def held_out(mentions: Iterable[Mention]) -> frozenset[tuple[str, str]]:
    """The combinations among these mentions that only the split `composition` may contain.

    Held out are eight colored shapes (`HELD_OUT_PAIRS`) and one in twenty of the pairs of two different objects.
    """
    mentions = list(mentions)
    colored = {(mention.color, mention.noun) for mention in mentions} & HELD_OUT_PAIRS
    nouns = sorted({mention.noun for mention in mentions if mention.noun in OBJECTS})
    return frozenset(colored | {pair for pair in combinations(nouns, 2) if crc32("+".join(pair).encode()) % 20 == 0})


def split_of(mentions: Iterable[Mention]) -> str:
    """The split that a scene with these objects belongs to.

    It depends on nouns, colors and counts only, in any order. Two captions that differ in wording, size words or
    relations therefore belong to the same split.
    """
    mentions = list(mentions)
    if held_out(mentions):
        return "composition"
    key = "|".join(sorted(f"{mention.count} {mention.color} {mention.noun}" for mention in mentions))
    percentile = crc32(key.encode()) % 100
    return "train" if percentile < 70 else "validation" if percentile < 85 else "test"
