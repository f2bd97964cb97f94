"""A caption, fact by fact: what it states rightly, what wrongly, and what it leaves out.

Needs scenes, whose truth is known. It reads English of our grammar, and whatever a model in training makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

import numpy as np

from minivlp.data.english import COUNTS, plural
from minivlp.data.grammar import COLORS, OBJECTS, SHAPES, SIZES, Facts, Mention
from minivlp.data.scene import Scene, relation, size_word
from minivlp.evaluation.score import Score, Scores, pooled

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
    things, relations = [], []
    count, color, size, where = 0, None, None, ""
    for word in words_of(caption):
        if word in _NOUNS:
            if things:
                relations.append(where)
            if count == 1 and word not in SHAPES + OBJECTS:  # "a bees"
                count = 0
            things.append(Mention(_NOUNS[word], color, size, count))
            count, color, size, where = 0, None, None, ""
        elif word in COLORS:
            color = word
        elif word in SIZES:
            size = word
        elif word in _NUMBERS:
            count = _NUMBERS[word]
        elif word in _OPENINGS:
            count = 0
        elif word in _RELATIONS:
            where = word
    return Facts(tuple(things), tuple(relations))


def check_facts(caption: str, scene: Scene) -> np.ndarray:
    """How many facts of each kind (`FACTS`) are right, wrong, missing (`OUTCOMES`): (5, 3).

    Things are matched by their noun so that as much as possible is right: of "a red heart above a red heart" only one
    can mean the one red heart that is there. All that is said of a thing that is not there is wrong, and of a thing
    that is not mentioned its object, its count and what captions say of it (colour, size, where its neighbour lies) are
    missing.
    """
    said = read_facts(caption)
    same_noun = [[i for i, said_ in enumerate(said.things) if said_.noun == thing.noun] for thing in scene.things]
    best = None
    for choice in product(*([None, *mentions] for mentions in same_noun)):
        named = [mention for mention in choice if mention is not None]
        if len(set(named)) == len(named):  # no mention means two things
            counts = _check(said, scene, choice)
            right, wrong, _ = counts.sum(axis=0)
            if best is None or (right, -wrong) > best[0]:
                best = (right, -wrong), counts
    return best[1]


def _check(said: Facts, scene: Scene, choice: Sequence[int | None]) -> np.ndarray:
    """As `check_facts`, if thing i is what the caption's mention `choice[i]` means."""
    counts = np.zeros((len(FACTS), len(OUTCOMES)), dtype=int)
    meant = {mention: scene.things[i] for i, mention in enumerate(choice) if mention is not None}
    for number, mention in enumerate(said.things):
        thing = meant.get(number)
        counts[0, 0 if thing else 1] += 1
        sizes = {size_word(box, scene.side) for box in thing.boxes} if thing else set()
        claims = (
            (mention.color, thing and thing.color == mention.color),
            (mention.size, sizes == {mention.size}),
            (mention.count, thing and thing.count == mention.count),
        )
        for kind, (claim, holds) in enumerate(claims, start=1):
            if claim:
                counts[kind, 0 if holds else 1] += 1
    for thing, mention in zip(scene.things, choice, strict=True):
        told = None if mention is None else said.things[mention]
        counts[0, 2] += told is None
        for kind, name in enumerate(("color", "size", "count"), start=1):
            counts[kind, 2] += bool(getattr(thing, name)) and not (told and getattr(told, name))
    related = set()
    for number, where in enumerate(said.relations):
        if where:
            one, other = meant.get(number), meant.get(number + 1)
            holds = one is not None and other is not None and relation(one, other) == where
            counts[4, 0 if holds else 1] += 1
            related.add(frozenset((number, number + 1)))
    for pair in zip(choice, choice[1:], strict=False):
        counts[4, 2] += frozenset(pair) not in related
    return counts


def fact_scores(written: Sequence[str], scenes: Sequence[Scene], blind: Sequence[str]) -> Scores:
    """Facts stated rightly, wrongly, and missing, as shares of all three together; then what is right, by kind."""
    counts, blind_counts = (
        np.stack([check_facts(text, scene) for text, scene in zip(texts, scenes, strict=True)])
        for texts in (written, blind)
    )  # (n, 5, 3)

    def share(of: np.ndarray, outcome: int) -> Score:
        def measure(part: np.ndarray) -> float:
            return float(part[..., outcome].sum() / max(1, part.sum()))

        return pooled(counts[:, of], measure, measure(blind_counts[:, of]), n=int(counts[:, of].sum()))

    every = np.arange(len(FACTS))
    scores = {f"facts {name}": share(every, i) for i, name in enumerate(OUTCOMES)}
    kinds = {name: share(every[[i]], 0) for i, name in enumerate(FACTS) if counts[:, i].any()}
    return Scores(scores | {f"{name} right": score for name, score in kinds.items()})
