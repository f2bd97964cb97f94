"""One scene and what is true of it: captions, and phrases with boxes.

The texts that are derived from the truth have modules of their own: false captions (`counterfactuals`), questions and
statements (`scene_questions`). `Scene` has a method for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from types import ModuleType

from minivlp.data import chinese, counterfactuals, english, scene_questions
from minivlp.data.batch import Box, Region
from minivlp.data.dataset import WHOLE_IMAGE
from minivlp.data.grammar import Facts, Mention
from minivlp.data.placement import Corners, SceneObject, neighbors, noun_is_shared, relation, size_word
from minivlp.data.rng import RandomSource

LANGUAGES = {"en": english, "zh": chinese}


@dataclass(frozen=True, slots=True)
class Background:
    """A gradient between two colors, or a crop of a photo (`texture`) tinted with the first color."""

    colors: tuple[tuple[int, int, int], tuple[int, int, int]]
    texture: str | None = None
    crop: tuple[int, int, int] = (0, 0, 4)  # see `sprites.textured_background`


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects, in the order in which captions name them, on a background, in a picture of `side` x `side` pixels."""

    objects: tuple[SceneObject, ...]
    background: Background
    side: int

    @property
    def relations(self) -> tuple[str, ...]:
        """The relation of each object to the next."""
        return tuple(relation(one, other) for one, other in zip(self.objects, self.objects[1:], strict=False))

    @property
    def facts(self) -> Facts:
        """What the captions state."""
        return Facts(tuple(one.mention for one in self.objects), self.relations)

    def holds(self, facts: Facts) -> bool:
        """Whether all of these facts are true here. Counts are exact; an ambiguous relation does not hold."""
        return bool(self._referents(facts))

    def captions(self, language: str = "en") -> list[str]:
        """True captions that name every object, in several wordings; the first is the short one.

        Raises ValueError for an unknown language.
        """
        return _language(language).captions(self.facts)

    def regions(self, language: str = "en") -> list[Region]:
        """Phrases that refer to exactly one place, with its box.

        object: the bare noun ("a heart"), if no other object has it. phrase: with color and size ("a red heart"), or a
        group ("two bees": the box around all of them). relation: a phrase with its neighbor ("a red heart left of a
        dog"), also with the bare noun if two objects share it. image: the short caption, with the whole picture.
        """
        say = _language(language)
        found: list[tuple[str, Facts]] = []
        for one in self.objects:
            if not noun_is_shared(self.objects, one):
                found.append(("object" if one.count == 1 else "phrase", Facts((one.without_attributes,))))
            if one.color or one.size:
                found.append(("phrase", Facts((one.mention,))))
        for one, other in neighbors(self.objects):
            relations = (relation(one, other),)
            found.append(("relation", Facts((one.mention, other.mention), relations)))
            if noun_is_shared(self.objects, one):
                found.append(("relation", Facts((one.without_attributes, other.mention), relations)))
        regions = []
        for kind, facts in found:
            referents = self._referents(facts)
            if len(referents) == 1:
                regions.append(Region(_fractions(referents.pop().corners, self.side), say.chain(facts), kind))
        return [*regions, Region(WHOLE_IMAGE, say.chain(self.facts), "image")]

    def counterfactuals(self, rng: RandomSource, language: str = "en") -> dict[str, str]:
        """The short caption with one fact changed so that it is false, by kind of change.

        Kinds: object, color, size, relation, swap (two neighbors exchanged), count. A kind that does not apply is
        absent: size needs a size word, count needs a group. No change adds a combination that is held out of training.
        """
        say = _language(language)
        changed = counterfactuals.all_changes(rng, self.facts, self.holds)
        return {kind: say.chain(facts) for kind, facts in changed.items()}

    def negative_caption(self, rng: RandomSource, wording: int, language: str = "en") -> str:
        """A false caption for training: one fact changed, in the wording number `wording` of `captions`.

        It has the wording of the true caption, because a different wording would tell the two apart. Every kind of
        change that applies is equally likely.
        """
        return _language(language).captions(counterfactuals.one_change(rng, self.facts, self.holds))[wording]

    def questions(self, language: str = "en") -> list[tuple[str, str]]:
        """(question, answer) pairs, see `scene_questions.questions`."""
        return scene_questions.questions(self.objects, self.facts, _language(language))

    def statements(self, rng: RandomSource, language: str = "en") -> list[tuple[str, str]]:
        """(statement, label) pairs, one per label, see `scene_questions.statements`."""
        return scene_questions.statements(rng, self.facts, self.holds, _language(language))

    def _referents(self, facts: Facts) -> set[SceneObject]:
        """The objects that the first mention can refer to if all the facts are to be true."""
        found = set()
        for objects in permutations(self.objects, len(facts.objects)):
            if all(self._fits(one, mention) for one, mention in zip(objects, facts.objects, strict=True)) and all(
                relation(one, other) == stated
                for one, other, stated in zip(objects, objects[1:], facts.relations, strict=False)
            ):
                found.add(objects[0])
        return found

    def _fits(self, one: SceneObject, mention: Mention) -> bool:
        return (
            one.noun == mention.noun
            and one.count == mention.count
            and mention.color in (None, one.color)
            and (mention.size is None or all(size_word(box, self.side) == mention.size for box in one.boxes))
        )


def _language(name: str) -> ModuleType:
    if name not in LANGUAGES:
        raise ValueError(f"no captions in language {name!r}: choose one of {', '.join(LANGUAGES)}")
    return LANGUAGES[name]


def _fractions(corners: Corners, side: int) -> Box:
    x0, y0, x1, y1 = corners
    return (x0 + x1) / 2 / side, (y0 + y1) / 2 / side, (x1 - x0) / side, (y1 - y0) / side
