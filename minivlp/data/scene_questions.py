"""Questions about a scene with their answers, and statements with their labels (visual entailment)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from zlib import crc32

from minivlp.data.counterfactuals import one_change
from minivlp.data.grammar import OBJECTS, OPPOSITE, Facts, Mention
from minivlp.data.placement import SceneObject, neighbors, noun_is_shared, relation
from minivlp.data.rng import RandomSource, pick

LABELS = ("entailed", "neutral", "contradicted")


def questions(objects: Sequence[SceneObject], facts: Facts, say: ModuleType) -> list[tuple[str, str]]:
    """(question, answer) pairs: color, count, what is where, where something is, yes or no.

    Each question has exactly one right answer. `facts` is what the captions of these objects state; `say` is the
    module of the language (`english`, `chinese`).
    """
    asked = []
    for one in objects:
        noun = one.without_attributes
        if not noun_is_shared(objects, one):
            asked.append((say.ask_count(noun), say.say_count(noun)))
            if one.color:
                asked.append((say.ask_color(noun), say.say_color(one.color)))
    for one, other in neighbors(objects):
        direction = relation(one, other)
        a, b = one.mention, other.mention
        asked.append((say.ask_relation(a, direction, b), say.YES))
        asked.append((say.ask_relation(a, OPPOSITE[direction], b), say.NO))
        # "what is left of b?" has a single answer only if every other object is clearly in another direction.
        others = [relation(third, other) for third in objects if third not in (one, other)]
        if None not in others and direction not in others:
            asked.append((say.ask_what(direction, b), say.name(a)))
        if len(objects) == 2:
            asked.append((say.ask_where(a), say.say_where(direction, b)))
    present = objects[0].mention
    absent = [noun for noun in OBJECTS if noun not in {one.noun for one in objects}]
    missing = absent[crc32(say.chain(facts).encode()) % len(absent)]
    return [*asked, (say.ask_there(present), say.YES), (say.ask_there(Mention(missing)), say.NO)]


def statements(
    rng: RandomSource, facts: Facts, holds: Callable[[Facts], bool], say: ModuleType
) -> list[tuple[str, str]]:
    """One statement per label of `LABELS`: entailed, neutral (the picture cannot decide it), contradicted.

    Entailed and contradicted statements have the same form: one object or two neighbors, in the same wordings. Only
    the picture tells them apart. Neutral statements can be recognized by their words alone.
    """
    mentions, relations = facts.objects, facts.relations
    parts = [Facts((mention,)) for mention in mentions]
    parts += [Facts(mentions[i : i + 2], relations[i : i + 1]) for i in range(len(relations))]
    entailed = pick(rng, say.captions(pick(rng, parts)))
    neutral = pick(rng, say.neutral(pick(rng, mentions)))
    contradicted = pick(rng, say.captions(one_change(rng, pick(rng, parts), holds)))
    return list(zip((entailed, neutral, contradicted), LABELS, strict=True))
