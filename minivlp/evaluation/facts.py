"""A caption, fact by fact: what it states rightly, what wrongly, and what it leaves out.

Needs scenes, whose truth is known. It reads English of our grammar, and whatever a model in training makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from minivlp.data import english
from minivlp.data.english import COUNTS, plural
from minivlp.data.grammar import COLORS, OBJECTS, SHAPES, SIZES, Facts, Mention
from minivlp.data.scene import Scene, relation, size_word
from minivlp.evaluation.score import Score, Scores, bootstrap, pooled

FACTS = ("objects", "colours", "sizes", "counts", "relations")
OUTCOMES = ("right", "wrong", "missing")
_NOUNS = {word: noun for noun in SHAPES + OBJECTS for word in (noun, plural(noun))}
_NUMBERS = {"a": 1, "an": 1, "the": 1} | {word: count for count, word in COUNTS.items()}
_RELATIONS = ("left", "right", "above", "below")
_OPENINGS = ("picture", "photo", "image")  # what is a picture of something is not one of its things


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation; every Chinese character is a word of its own."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:'\w+)?", text.lower())


def read_facts(caption: str) -> Facts:
    """What a caption states, however broken its grammar: the things in its order, with what stands before each.

    A thing without a number that fits it has `count` 0; where no relation stands between two things, it is the empty
    string. Words of other worlds are passed over.
    """
    return _read(caption)[0]


def _read(caption: str) -> tuple[Facts, list[dict[str, int]], list[int]]:
    """The facts; which word says the noun, color, size and count of each thing; and which word each relation."""
    things, relations, places, between = [], [], [], []
    count, color, size, where, at = 0, None, None, "", {}
    for place, word in enumerate(words_of(caption)):
        if word in _NOUNS:
            if things:
                relations.append(where)
                between.append(at.get("where", place))
            if count == 1 and word not in SHAPES + OBJECTS:  # "a bees"
                count = 0
            things.append(Mention(_NOUNS[word], color, size, count))
            places.append({**at, "noun": place})
            count, color, size, where, at = 0, None, None, "", {}
        elif word in COLORS:
            color, at["color"] = word, place
        elif word in SIZES:
            size, at["size"] = word, place
        elif word in _NUMBERS:
            count, at["count"] = _NUMBERS[word], place
        elif word in _OPENINGS:
            count = 0
        elif word in _RELATIONS:
            where, at["where"] = word, place
    return Facts(tuple(things), tuple(relations)), places, between


def check_facts(caption: str, scene: Scene) -> np.ndarray:
    """How many facts of each kind (`FACTS`) are right, wrong, missing (`OUTCOMES`): (5, 3).

    Things are matched by their noun so that as much as possible is right: of "a red heart above a red heart" only one
    can mean the one red heart that is there. All that is said of a thing that is not there is wrong, and of a thing
    that is not mentioned its object, its count and what captions say of it (colour, size, where its neighbour lies) are
    missing.
    """
    return _best_reading(caption, scene).counts


class _Reading(NamedTuple):
    """One way to understand a caption: the facts (5, 3), the places of words that are wrong, what is missing."""

    counts: np.ndarray
    wrong: set[int]
    missing: list[str]


def _best_reading(caption: str, scene: Scene) -> _Reading:
    read = _read(caption)
    same_noun = [[i for i, said in enumerate(read[0].things) if said.noun == thing.noun] for thing in scene.things]
    best = None
    for choice in product(*([None, *mentions] for mentions in same_noun)):
        named = [mention for mention in choice if mention is not None]
        if len(set(named)) == len(named):  # no mention means two things
            reading = _check(*read, scene, choice)
            right, wrong, _ = reading.counts.sum(axis=0)
            if best is None or (right, -wrong) > best[0]:
                best = (right, -wrong), reading
    return best[1]


def _check(
    said: Facts, places: Sequence[dict[str, int]], between: Sequence[int], scene: Scene, choice: Sequence[int | None]
) -> _Reading:
    """As `check_facts`, if thing i is what the caption's mention `choice[i]` means."""
    counts = np.zeros((len(FACTS), len(OUTCOMES)), dtype=int)
    errors: set[int] = set()
    missing: list[str] = []

    def claim(kind: int, holds: bool, place: int) -> None:
        counts[kind, 0 if holds else 1] += 1
        errors.update(() if holds else (place,))

    meant = {mention: scene.things[i] for i, mention in enumerate(choice) if mention is not None}
    for number, (mention, at) in enumerate(zip(said.things, places, strict=True)):
        thing = meant.get(number)
        claim(0, thing is not None, at["noun"])
        sizes = {size_word(box, scene.side) for box in thing.boxes} if thing else set()
        if mention.color:
            claim(1, thing is not None and thing.color == mention.color, at["color"])
        if mention.size:
            claim(2, sizes == {mention.size}, at["size"])
        if mention.count:
            claim(3, thing is not None and thing.count == mention.count, at["count"])
    for thing, mention in zip(scene.facts.things, choice, strict=True):
        told = None if mention is None else said.things[mention]
        counts[0, 2] += told is None
        lacks = {}
        for kind, name in enumerate(("color", "size", "count"), start=1):
            if getattr(thing, name) and not (told and getattr(told, name)):
                counts[kind, 2] += 1
                lacks[name] = getattr(thing, name)
        if told is None:
            missing.append(english.name(thing))
        elif lacks:
            say = english.name if "count" in lacks else english.bare
            missing.append(say(Mention(thing.noun, lacks.get("color"), lacks.get("size"), thing.count)))
    related = set()
    for number, where in enumerate(said.relations):
        if where:
            one, other = meant.get(number), meant.get(number + 1)
            claim(4, one is not None and other is not None and relation(one, other) == where, between[number])
            related.add(frozenset((number, number + 1)))
    for pair, one, where, other in zip(
        zip(choice, choice[1:], strict=False), scene.things, scene.relations, scene.things[1:], strict=False
    ):
        if frozenset(pair) not in related:
            counts[4, 2] += 1
            if None not in pair:  # else the thing itself stands among what is missing
                missing.append(f"{one.noun} {english.RELATIONS[where]} {other.noun}")
    return _Reading(counts, errors, missing)


def proofread(caption: str, scene: Scene) -> tuple[list[tuple[str, bool]], list[str]]:
    """The caption's words, each with whether it states something wrong; and what is missing, in words.

    By the same reading as `check_facts`. Of a thing that is not there all that is said is wrong. For
    `drawing.caption_grid`.
    """
    reading = _best_reading(caption, scene)
    return [(word, place in reading.wrong) for place, word in enumerate(words_of(caption))], reading.missing


def tells_all(caption: str, scene: Scene) -> bool:
    """Whether this is a true caption of the scene: in its grammar, naming every thing, with its colour, and no error.

    A size is told or left out, as in our captions, where chance decides; from whichever thing the caption sets out.
    """
    facts = english.parse(caption)
    if facts is None or len(facts.things) != len(scene.things) or not scene.holds(facts):
        return False
    return not check_facts(caption, scene)[FACTS.index("colours"), OUTCOMES.index("missing")]


def fact_scores(written: Sequence[str], scenes: Sequence[Scene], blind: Sequence[str]) -> Scores:
    """Facts stated rightly, wrongly, and missing, as shares of all three together; then what is right, by kind.

    `objects named`: how many of the things that are there. `a true caption`: how often all is told and all is true
    (`tells_all`).
    """
    counts, blind_counts = (
        np.stack([check_facts(text, scene) for text, scene in zip(texts, scenes, strict=True)])
        for texts in (written, blind)
    )  # (n, 5, 3)

    def share(facts: list[int], outcome: int = 0, among: tuple[int, ...] = (0, 1, 2)) -> Score:
        def measure(part: np.ndarray) -> float:
            return float(part[:, facts, outcome].sum() / max(1, part[:, facts][:, :, among].sum()))

        asked = counts[:, facts][:, :, among]
        return pooled(counts, measure, measure(blind_counts), n=int(asked.sum()))

    every = list(range(len(FACTS)))
    scores = {f"facts {name}": share(every, i) for i, name in enumerate(OUTCOMES)}
    scores |= {f"{name} right": share([i]) for i, name in enumerate(FACTS) if counts[:, i].any()}
    scores["objects named"] = share([0], among=(0, 2))  # right, of those that are there
    told, blind_told = (
        [tells_all(text, scene) for text, scene in zip(texts, scenes, strict=True)] for texts in (written, blind)
    )
    return Scores(scores | {"a true caption": bootstrap(told, float(np.mean(blind_told)))})
