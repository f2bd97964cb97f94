"""Change one fact of a true caption so that it becomes false.

The functions work on `Facts`; a predicate `holds(facts)` says what is true of the picture. Source of the idea:
Yuksekgonul et al. 2023, "When and why vision-language models behave like bags-of-words" (NegCLIP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from minivlp.data.grammar import COLORS, OBJECTS, OPPOSITE, SHAPES, SIZES, Facts, held_out
from minivlp.data.rng import RandomSource, pick

Change = Callable[[RandomSource, Facts], Facts | None]
Holds = Callable[[Facts], bool]
_TRIES = 50  # a random change can be true of the picture, or equal to the caption


def all_changes(rng: RandomSource, facts: Facts, holds: Holds) -> dict[str, Facts]:
    """The facts with one of them made false, by kind of change (`KINDS`). A kind that does not apply is absent."""
    found = {kind: _falsify(rng, change, facts, holds) for kind, change in KINDS.items()}
    return {kind: changed for kind, changed in found.items() if changed is not None}


def one_change(rng: RandomSource, facts: Facts, holds: Holds) -> Facts:
    """The facts with one of them made false. Every kind of change that applies is equally likely."""
    changes = list(KINDS.values())
    while True:  # it ends, because an object can always be changed
        changed = _falsify(rng, changes.pop(int(rng.random() * len(changes))), facts, holds)
        if changed is not None:
            return changed


def _falsify(rng: RandomSource, change: Change, facts: Facts, holds: Holds) -> Facts | None:
    """Repeat the change until the result is false and adds no held-out combination; None if that does not happen."""
    for _ in range(_TRIES):
        changed = change(rng, facts)
        if changed is None:
            return None
        if not holds(changed) and held_out(changed.objects) <= held_out(facts.objects):
            return changed
    return None


# One function per kind of change. Each returns None if the kind does not apply. The result may still be true.


def _change_object(rng: RandomSource, facts: Facts) -> Facts:
    i = pick(rng, range(len(facts.objects)))
    noun = pick(rng, SHAPES if facts.objects[i].color else OBJECTS)
    return facts if noun in {mention.noun for mention in facts.objects} else _with(facts, i, noun=noun)


def _change_color(rng: RandomSource, facts: Facts) -> Facts | None:
    colored = [i for i, mention in enumerate(facts.objects) if mention.color]
    return _with(facts, pick(rng, colored), color=pick(rng, COLORS)) if colored else None


def _change_size(rng: RandomSource, facts: Facts) -> Facts | None:
    sized = [i for i, mention in enumerate(facts.objects) if mention.size]
    if not sized:
        return None
    i = pick(rng, sized)
    return _with(facts, i, size=SIZES[1 - SIZES.index(facts.objects[i].size)])


def _change_relation(rng: RandomSource, facts: Facts) -> Facts | None:
    if not facts.relations:
        return None
    i = pick(rng, range(len(facts.relations)))
    relations = list(facts.relations)
    relations[i] = OPPOSITE[relations[i]]
    return replace(facts, relations=tuple(relations))


def _swap(rng: RandomSource, facts: Facts) -> Facts | None:
    if not facts.relations:
        return None
    i = pick(rng, range(len(facts.relations)))
    mentions = list(facts.objects)
    mentions[i : i + 2] = mentions[i + 1], mentions[i]
    return replace(facts, objects=tuple(mentions))


def _change_count(rng: RandomSource, facts: Facts) -> Facts | None:
    groups = [i for i, mention in enumerate(facts.objects) if mention.count > 1]
    if not groups:
        return None
    i = pick(rng, groups)
    return _with(facts, i, count=5 - facts.objects[i].count)  # 2 <-> 3: singular against plural would be too easy


def _with(facts: Facts, index: int, **change) -> Facts:
    """The facts with attributes of one mention replaced."""
    mentions = list(facts.objects)
    mentions[index] = replace(mentions[index], **change)
    return replace(facts, objects=tuple(mentions))


KINDS: dict[str, Change] = {
    "object": _change_object,
    "color": _change_color,
    "size": _change_size,
    "relation": _change_relation,
    "swap": _swap,  # two neighboring objects exchanged
    "count": _change_count,
}
