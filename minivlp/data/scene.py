"""One scene and everything that is true of it: captions, phrases with boxes, questions, and statements that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Protocol, TypeVar
from zlib import crc32

from minivlp.data import chinese, english
from minivlp.data.batch import Box, Region
from minivlp.data.grammar import COLORS, OBJECTS, OPPOSITE, SHAPES, SIZES, Facts, Mention, held_out

Corners = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 are one past the last
T = TypeVar("T")
LANGUAGES = {"en": english, "zh": chinese}
WHOLE: Box = (0.5, 0.5, 1.0, 1.0)
LABELS = ("entailed", "neutral", "contradicted")


class Draw(Protocol):
    """Where chance comes from: a `random.Random` or a NumPy `Generator` will do."""

    def random(self) -> float: ...


def pick(rng: Draw, options: Sequence[T]) -> T:
    """One of the options. Only `random()` is used: its numbers are the same on every platform and version."""
    return options[int(rng.random() * len(options))]


@dataclass(frozen=True)
class Thing(Mention):
    """A thing, or a group of like things, in its place: a mention with a box in pixels for each member."""

    boxes: tuple[Corners, ...] = ()

    @property
    def corners(self) -> Corners:
        """The box around all members."""
        x0, y0, x1, y1 = zip(*self.boxes, strict=True)
        return min(x0), min(y0), max(x1), max(y1)


@dataclass(frozen=True)
class Ground:
    """What lies behind: a gradient between two colours, or (`texture`) a piece of a photo tinted with the first."""

    colors: tuple[tuple[int, int, int], tuple[int, int, int]]
    texture: str | None = None
    crop: tuple[int, int, int] = (0, 0, 4)  # see `sprites.textured_ground`


def relation(one: Thing, other: Thing) -> str | None:
    """Where `one` lies, seen from `other`: left, right, above, below, or None where one could argue.

    It counts between centres, needs one direction to outweigh the other by 1.25, and must hold for all members.
    """
    found = {_relation(a, b) for a in one.boxes for b in other.boxes}
    return found.pop() if len(found) == 1 else None


def _relation(a: Corners, b: Corners) -> str | None:
    right, down = b[0] + b[2] - a[0] - a[2], b[1] + b[3] - a[1] - a[3]  # twice the way from a to b
    if 4 * max(abs(right), abs(down)) < 5 * min(abs(right), abs(down)):
        return None
    if abs(right) > abs(down):
        return "left" if right > 0 else "right"
    return "above" if down > 0 else "below"


def size_word(box: Corners, side: int) -> str | None:
    """small (at most 29 % of the picture's side), large (at least 38 %), or None in between."""
    percent = 100 * max(box[2] - box[0], box[3] - box[1])
    return "small" if percent <= 29 * side else "large" if percent >= 38 * side else None


@dataclass(frozen=True)
class Scene:
    """Things in the order in which captions name them, on a ground, in a picture of `side` pixels."""

    things: tuple[Thing, ...]
    ground: Ground
    side: int

    @property
    def relations(self) -> tuple[str, ...]:
        """Between each thing and the next."""
        return tuple(relation(one, other) for one, other in zip(self.things, self.things[1:], strict=False))

    @property
    def facts(self) -> Facts:
        """What the captions say."""
        return Facts(tuple(_mention(thing) for thing in self.things), self.relations)

    def holds(self, facts: Facts) -> bool:
        """Whether all of this is true here. Counts are exact; a relation that one could argue about does not hold."""
        return bool(self._referents(facts))

    def captions(self, language: str = "en") -> list[str]:
        """True captions that name every thing, in several wordings; the first is the short one.

        Raises ValueError for a language that is not there.
        """
        return _words(language).captions(self.facts)

    def regions(self, language: str = "en") -> list[Region]:
        """Phrases that mean exactly one place, with its box.

        object: the bare noun ("a heart"), where only one thing bears it; phrase: with colour and size ("a red heart"),
        or a group ("two bees": the box around all of them); relation: a phrase placed by its neighbour's ("a red heart
        left of a dog"), also by the bare noun where two things share it; image: the short caption.
        """
        say = _words(language)
        found: list[tuple[str, Facts]] = []
        for thing in self.things:
            if not self._shared(thing):
                found.append(("object" if thing.count == 1 else "phrase", Facts((_noun(thing),))))
            if thing.color or thing.size:
                found.append(("phrase", Facts((_mention(thing),))))
        for one, other in self._neighbours():
            seen = (relation(one, other),)
            found.append(("relation", Facts((_mention(one), _mention(other)), seen)))
            if self._shared(one):
                found.append(("relation", Facts((_noun(one), _mention(other)), seen)))
        regions = []
        for kind, facts in found:
            meant = self._referents(facts)
            if len(meant) == 1:
                regions.append(Region(_fractions(meant.pop().corners, self.side), say.chain(facts), kind))
        return [*regions, Region(WHOLE, say.chain(self.facts), "image")]

    def counterfactuals(self, rng: Draw, language: str = "en") -> dict[str, str]:
        """The short caption with one fact changed so that it is false, by kind of change.

        Kinds: object, colour, size, relation, swap (two neighbours exchanged), count. A kind that does not apply is
        absent: size needs a size word, count a group (two for three: singular against plural would give the answer
        away). No change makes up a combination that is kept from training.
        """
        say = _words(language)
        changed = {kind: self._falsify(rng, change, self.facts) for kind, change in self._changes().items()}
        return {kind: say.chain(facts) for kind, facts in changed.items() if facts is not None}

    def wrong_caption(self, rng: Draw, wording: int, language: str = "en") -> str:
        """A caption with one fact changed, told in the `wording` (place in the list) of `captions`.

        A negative made by rule, for training; every kind of change that applies is as likely. Source of the idea:
        Yuksekgonul et al. 2023 (NegCLIP). The wording is the true caption's, or it would give the answer away.
        """
        return _words(language).captions(self._changed(rng, self.facts))[wording]

    def _changed(self, rng: Draw, facts: Facts) -> Facts:
        """True facts with one of them made false; every kind of change that applies is as likely."""
        changes = list(self._changes().values())
        while True:  # an object can always be changed
            changed = self._falsify(rng, changes.pop(int(rng.random() * len(changes))), facts)
            if changed is not None:
                return changed

    def _changes(self) -> dict[str, Callable[[Draw, Facts], Facts | None]]:
        """How to change one fact, by kind."""
        return {
            "object": self._change_object,
            "colour": self._change_color,
            "size": self._change_size,
            "relation": self._change_relation,
            "swap": self._swap,
            "count": self._change_count,
        }

    def questions(self, language: str = "en") -> list[tuple[str, str]]:
        """Questions with their one right answer: colour, how many, what is where, where is what, yes or no."""
        say = _words(language)
        asked = []
        for thing in self.things:
            noun = _noun(thing)
            if not self._shared(thing):
                asked.append((say.ask_count(noun), say.say_count(noun)))
                if thing.color:
                    asked.append((say.ask_color(noun), say.say_color(thing.color)))
        for one, other in self._neighbours():
            where = relation(one, other)
            a, b = _mention(one), _mention(other)
            asked.append((say.ask_relation(a, where, b), say.YES))
            asked.append((say.ask_relation(a, OPPOSITE[where], b), say.NO))
            # Everything else must lie clearly elsewhere, or there would be a second answer.
            others = [relation(third, other) for third in self.things if third not in (one, other)]
            if None not in others and where not in others:
                asked.append((say.ask_what(where, b), say.name(a)))
            if len(self.things) == 2:
                asked.append((say.ask_where(a), say.say_where(where, b)))
        there = _mention(self.things[0])
        absent = [noun for noun in OBJECTS if noun not in {thing.noun for thing in self.things}]
        missing = absent[crc32(say.chain(self.facts).encode()) % len(absent)]
        return [*asked, (say.ask_there(there), say.YES), (say.ask_there(Mention(missing)), say.NO)]

    def statements(self, rng: Draw, language: str = "en") -> list[tuple[str, str]]:
        """Three statements with their label: entailed, neutral (the picture cannot tell), contradicted.

        The first and the last say as much, in the same wordings, of one thing or of two neighbours: only the picture
        tells them apart. A neutral one is known by its words.
        """
        say = _words(language)
        facts = self.facts
        parts = [Facts((thing,)) for thing in facts.things]
        parts += [Facts(facts.things[i : i + 2], facts.relations[i : i + 1]) for i in range(len(facts.relations))]
        entailed = pick(rng, say.captions(pick(rng, parts)))
        neutral = pick(rng, say.neutral(pick(rng, facts.things)))
        contradicted = pick(rng, say.captions(self._changed(rng, pick(rng, parts))))
        return list(zip((entailed, neutral, contradicted), LABELS, strict=True))

    def _fits(self, thing: Thing, said: Mention) -> bool:
        return (
            thing.noun == said.noun
            and thing.count == said.count
            and said.color in (None, thing.color)
            and (said.size is None or all(size_word(box, self.side) == said.size for box in thing.boxes))
        )

    def _referents(self, facts: Facts) -> set[Thing]:
        """What the first mention may mean if the facts are to be true."""
        found = set()
        for things in permutations(self.things, len(facts.things)):
            if all(self._fits(thing, said) for thing, said in zip(things, facts.things, strict=True)) and all(
                relation(one, other) == said
                for one, other, said in zip(things, things[1:], facts.relations, strict=False)
            ):
                found.add(things[0])
        return found

    def _neighbours(self) -> Iterator[tuple[Thing, Thing]]:
        """Pairs that captions relate, both ways round."""
        for one, other in zip(self.things, self.things[1:], strict=False):
            yield one, other
            yield other, one

    def _shared(self, thing: Thing) -> bool:
        return sum(other.noun == thing.noun for other in self.things) > 1

    def _falsify(self, rng: Draw, change: Callable[[Draw, Facts], Facts | None], facts: Facts) -> Facts | None:
        """Tries the change until it makes true facts false, and invents no held-out combination."""
        for _ in range(50):
            changed = change(rng, facts)
            if changed is None:
                return None
            if not self.holds(changed) and held_out(changed.things) <= held_out(facts.things):
                return changed
        return None

    def _change_object(self, rng: Draw, facts: Facts) -> Facts:
        i = pick(rng, range(len(facts.things)))
        old = facts.things[i]
        noun = pick(rng, SHAPES if old.color else OBJECTS)
        return facts if noun in {thing.noun for thing in facts.things} else _with(facts, i, noun=noun)

    def _change_color(self, rng: Draw, facts: Facts) -> Facts | None:
        colored = [i for i, thing in enumerate(facts.things) if thing.color]
        return _with(facts, pick(rng, colored), color=pick(rng, COLORS)) if colored else None

    def _change_size(self, rng: Draw, facts: Facts) -> Facts | None:
        sized = [i for i, thing in enumerate(facts.things) if thing.size]
        if not sized:
            return None
        i = pick(rng, sized)
        return _with(facts, i, size=SIZES[1 - SIZES.index(facts.things[i].size)])

    def _change_relation(self, rng: Draw, facts: Facts) -> Facts | None:
        if not facts.relations:
            return None
        i = pick(rng, range(len(facts.relations)))
        relations = list(facts.relations)
        relations[i] = OPPOSITE[relations[i]]
        return replace(facts, relations=tuple(relations))

    def _swap(self, rng: Draw, facts: Facts) -> Facts | None:
        if not facts.relations:
            return None
        i = pick(rng, range(len(facts.relations)))
        things = list(facts.things)
        things[i : i + 2] = things[i + 1], things[i]
        return replace(facts, things=tuple(things))

    def _change_count(self, rng: Draw, facts: Facts) -> Facts | None:
        groups = [i for i, thing in enumerate(facts.things) if thing.count > 1]
        if not groups:
            return None
        i = pick(rng, groups)
        return _with(facts, i, count=5 - facts.things[i].count)  # two for three, three for two


def _words(language: str):  # the module that speaks it
    if language not in LANGUAGES:
        raise ValueError(f"no captions in language {language!r}: choose one of {', '.join(LANGUAGES)}")
    return LANGUAGES[language]


def _mention(thing: Thing) -> Mention:
    return Mention(thing.noun, thing.color, thing.size, thing.count)


def _noun(thing: Mention) -> Mention:
    return Mention(thing.noun, count=thing.count)


def _with(facts: Facts, index: int, **change) -> Facts:
    things = list(facts.things)
    things[index] = replace(things[index], **change)
    return replace(facts, things=tuple(things))


def _fractions(corners: Corners, side: int) -> Box:
    x0, y0, x1, y1 = corners
    return (x0 + x1) / 2 / side, (y0 + y1) / 2 / side, (x1 - x0) / side, (y1 - y0) / side
