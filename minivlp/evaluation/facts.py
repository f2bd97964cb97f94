"""Facts of a caption compared with a scene: which are right, which are wrong, and which are missing.

The truth must be known, so this is for scenes. It reads English captions of our grammar, also broken ones.
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
from minivlp.data.placement import relation, size_word
from minivlp.data.scene import Scene
from minivlp.evaluation.score import Score, Scores, bootstrap, bootstrap_counts

FACTS = ("objects", "colors", "sizes", "counts", "relations")
OUTCOMES = ("right", "wrong", "missing")
_NOUNS = {word: noun for noun in SHAPES + OBJECTS for word in (noun, plural(noun))}
_NUMBERS = {"a": 1, "an": 1, "the": 1} | {word: count for count, word in COUNTS.items()}
_RELATIONS = ("left", "right", "above", "below")
_OPENINGS = ("picture", "photo", "image")  # "a picture of": not an object of the scene


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation; every Chinese character is a word of its own."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:'\w+)?", text.lower())


def read_facts(caption: str) -> Facts:
    """What a caption states, however broken its grammar: its objects in order, each with the words in front of it.

    An object without a number that fits its noun has `count` 0. Where no relation stands between two objects, it is the
    empty string. Unknown words are skipped.
    """
    return _read(caption).facts


class _Reading(NamedTuple):
    """The facts of a caption, and the index of the word that states each."""

    facts: Facts
    mention_words: list[dict[str, int]]  # of each mention: noun, color, size, count, as far as they are stated
    relation_words: list[int]  # of each relation


def _read(caption: str) -> _Reading:
    objects, relations, mention_words, relation_words = [], [], [], []
    count, color, size, where, at = 0, None, None, "", {}
    for index, word in enumerate(words_of(caption)):
        if word in _NOUNS:
            if objects:
                relations.append(where)
                relation_words.append(at.get("where", index))
            if count == 1 and word not in SHAPES + OBJECTS:  # "a bees"
                count = 0
            objects.append(Mention(_NOUNS[word], color, size, count))
            mention_words.append({**at, "noun": index})
            count, color, size, where, at = 0, None, None, "", {}
        elif word in COLORS:
            color, at["color"] = word, index
        elif word in SIZES:
            size, at["size"] = word, index
        elif word in _NUMBERS:
            count, at["count"] = _NUMBERS[word], index
        elif word in _OPENINGS:
            count = 0
        elif word in _RELATIONS:
            where, at["where"] = word, index
    return _Reading(Facts(tuple(objects), tuple(relations)), mention_words, relation_words)


def check_facts(caption: str, scene: Scene) -> np.ndarray:
    """How many facts of each kind (`FACTS`) are right, wrong and missing (`OUTCOMES`): (5, 3).

    Mentions are assigned to objects of the same noun such that as many facts as possible are right: of "a red heart
    above a red heart" only one can mean the one red heart that is there. Everything that is stated of an object that is
    not there is wrong. Of an object that is not mentioned, these are missing: the object, its count, and what captions
    state of it (color, size, the relation to its neighbor).
    """
    return _best_verdict(caption, scene).counts


class _Verdict(NamedTuple):
    """A caption under one assignment of its mentions to objects."""

    counts: np.ndarray  # (5, 3) as in `check_facts`
    wrong: set[int]  # indices of the words that state something wrong
    missing: list[str]  # what is missing, in words


def _best_verdict(caption: str, scene: Scene) -> _Verdict:
    reading = _read(caption)
    mentions = reading.facts.objects
    same_noun = [[i for i, said in enumerate(mentions) if said.noun == one.noun] for one in scene.objects]
    best = None
    for assignment in product(*([None, *indices] for indices in same_noun)):
        assigned = [mention for mention in assignment if mention is not None]
        if len(set(assigned)) == len(assigned):  # no mention means two objects
            verdict = _judge(reading, scene, assignment)
            right, wrong, _ = verdict.counts.sum(axis=0)
            if best is None or (right, -wrong) > best[0]:
                best = (right, -wrong), verdict
    return best[1]


def _judge(reading: _Reading, scene: Scene, assignment: Sequence[int | None]) -> _Verdict:
    """The verdict if mention `assignment[i]` of the caption means object i of the scene; None is no mention."""
    said, mention_words, relation_words = reading
    counts = np.zeros((len(FACTS), len(OUTCOMES)), dtype=int)
    wrong: set[int] = set()
    missing: list[str] = []

    def claim(kind: int, holds: bool, word: int) -> None:
        counts[kind, 0 if holds else 1] += 1
        wrong.update(() if holds else (word,))

    meant = {mention: scene.objects[i] for i, mention in enumerate(assignment) if mention is not None}
    for number, (mention, at) in enumerate(zip(said.objects, mention_words, strict=True)):
        one = meant.get(number)
        claim(0, one is not None, at["noun"])
        sizes = {size_word(box, scene.side) for box in one.boxes} if one else set()
        if mention.color:
            claim(1, one is not None and one.color == mention.color, at["color"])
        if mention.size:
            claim(2, sizes == {mention.size}, at["size"])
        if mention.count:
            claim(3, one is not None and one.count == mention.count, at["count"])
    for one, index in zip(scene.facts.objects, assignment, strict=True):
        mention = None if index is None else said.objects[index]
        counts[0, 2] += mention is None
        absent = {}
        for kind, name in enumerate(("color", "size", "count"), start=1):
            if getattr(one, name) and not (mention and getattr(mention, name)):
                counts[kind, 2] += 1
                absent[name] = getattr(one, name)
        if mention is None:
            missing.append(english.name(one))
        elif absent:
            say = english.name if "count" in absent else english.bare
            missing.append(say(Mention(one.noun, absent.get("color"), absent.get("size"), one.count)))
    related = set()
    for number, where in enumerate(said.relations):
        if where:
            one, other = meant.get(number), meant.get(number + 1)
            holds = one is not None and other is not None and relation(one, other) == where
            claim(4, holds, relation_words[number])
            related.add(frozenset((number, number + 1)))
    for pair, one, where, other in zip(
        zip(assignment, assignment[1:], strict=False), scene.objects, scene.relations, scene.objects[1:], strict=False
    ):
        if frozenset(pair) not in related:
            counts[4, 2] += 1
            if None not in pair:  # otherwise the object itself is listed as missing
                missing.append(f"{one.noun} {english.RELATIONS[where]} {other.noun}")
    return _Verdict(counts, wrong, missing)


def proofread(caption: str, scene: Scene) -> tuple[list[tuple[str, bool]], list[str]]:
    """The words of the caption, each with whether it states something wrong; and what is missing, in words.

    Mentions and objects are assigned as in `check_facts`. For `drawing.caption_grid`.
    """
    verdict = _best_verdict(caption, scene)
    return [(word, index in verdict.wrong) for index, word in enumerate(words_of(caption))], verdict.missing


def is_true(caption: str, scene: Scene) -> bool:
    """Whether this is a sentence of the grammar that states nothing false; it may leave out objects and colors."""
    facts = english.parse(caption)
    return facts is not None and scene.holds(facts)


def tells_all(caption: str, scene: Scene) -> bool:
    """Whether this is a complete and true caption: in the grammar, all objects named with their colors, no error.

    Sizes may be left out. The caption may begin with any object.
    """
    facts = english.parse(caption)
    if facts is None or len(facts.objects) != len(scene.objects) or not scene.holds(facts):
        return False
    return not check_facts(caption, scene)[FACTS.index("colors"), OUTCOMES.index("missing")]


def fact_scores(written: Sequence[str], scenes: Sequence[Scene], blind: Sequence[str]) -> Scores:
    """Facts that are right, wrong and missing, as shares of all three together; then those that are right, by kind.

    `objects named`: the share of the scene's objects that are named. `a true caption`: the share of captions for which
    `tells_all` holds. `blind` are captions that were written without the image: their score is chance.
    """
    counts, blind_counts = (
        np.stack([check_facts(text, scene) for text, scene in zip(texts, scenes, strict=True)])
        for texts in (written, blind)
    )  # (n, 5, 3)

    def share(facts: list[int], outcome: int = 0, among: tuple[int, ...] = (0, 1, 2)) -> Score:
        def measure(part: np.ndarray) -> float:
            return float(part[:, facts, outcome].sum() / max(1, part[:, facts][:, :, among].sum()))

        asked = counts[:, facts][:, :, among]
        return bootstrap_counts(counts, measure, measure(blind_counts), n=int(asked.sum()))

    every = list(range(len(FACTS)))
    scores = {f"facts {name}": share(every, i) for i, name in enumerate(OUTCOMES)}
    scores |= {f"{name} right": share([i]) for i, name in enumerate(FACTS) if counts[:, i].any()}
    scores["objects named"] = share([0], among=(0, 2))  # right, of those that are there
    complete, blind_complete = (
        [tells_all(text, scene) for text, scene in zip(texts, scenes, strict=True)] for texts in (written, blind)
    )
    return Scores(scores | {"a true caption": bootstrap(complete, float(np.mean(blind_complete)))})
