"""The scene world in English: from facts to words, and back (`parse`)."""

from __future__ import annotations

import re

from minivlp.data.grammar import COLORS, OBJECTS, SHAPES, SIZES, Facts, Mention

COUNTS = {1: "one", 2: "two", 3: "three"}
RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
YES, NO = "yes", "no"


def plural(noun: str) -> str:
    """The plural of one of our nouns."""
    if noun == "fish":
        return noun
    if noun == "snowman":
        return "snowmen"
    if noun.endswith("fly"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith("s") else "s")


def bare(thing: Mention) -> str:
    """Without an article: "small red heart", "bees"."""
    noun = thing.noun if thing.count == 1 else plural(thing.noun)
    return " ".join(word for word in (thing.size, thing.color, noun) if word)


def name(thing: Mention) -> str:
    """As it is first spoken of: "a small red heart", "an apple", "two bees"."""
    words = bare(thing)
    return f"{COUNTS[thing.count]} {words}" if thing.count > 1 else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def chain(facts: Facts) -> str:
    """The short caption: "a red heart left of a dog above two bees"."""
    text = name(facts.things[0])
    for relation, thing in zip(facts.relations, facts.things[1:], strict=True):
        text += f" {RELATIONS[relation]} {name(thing)}"
    return text


def captions(facts: Facts) -> list[str]:
    """Several wordings; the first is the short one."""
    there = "there is" if facts.things[0].count == 1 else "there are"
    short = chain(facts)
    if len(facts.things) == 1:
        return [short, f"{there} {short}", f"a picture of {short}"]
    back = chain(facts.reversed())
    at_length = re.sub(r"(left|right) of", r"to the \1 of", back)
    return [short, f"{there} {short}", back, f"a picture of {at_length}"]


def parse(caption: str) -> Facts | None:
    """The facts of a caption in this grammar (any wording, "the" for "a"), None if it is not one."""
    text = re.sub(r"[\s.]+", " ", caption.lower()).strip()
    text = re.sub(r"^(there (is|are)|an? (picture|photo|image) of) ", "", text)
    parts = re.split(r" (?:(?:is|are) )?(?:(?:to the )?(left|right) of|(above|below)) ", text)
    things = [_parse_name(part) for part in parts[::3]]
    if None in things:
        return None
    return Facts(tuple(things), tuple(one or other for one, other in zip(parts[1::3], parts[2::3], strict=True)))


_NOUNS = {(noun, 1): noun for noun in SHAPES + OBJECTS}
_NOUNS |= {(plural(noun), count): noun for noun in SHAPES + OBJECTS for count in (2, 3)}
_DETERMINERS = {"a": 1, "an": 1, "the": 1} | {word: count for count, word in COUNTS.items()}


def _parse_name(text: str) -> Mention | None:
    first, *words = re.sub("^the (two|three) ", r"\1 ", text).split() or [""]
    size = words.pop(0) if words and words[0] in SIZES else None
    color = words.pop(0) if words and words[0] in COLORS else None
    count = _DETERMINERS.get(first)
    if count is None or len(words) != 1 or (words[0], count) not in _NOUNS:
        return None
    return Mention(_NOUNS[words[0], count], color, size, count)


# Questions, answers, and statements that no picture can settle.


def ask_color(thing: Mention) -> str:
    return f"what colour {_is(thing)} the {bare(thing)}?"


def say_color(color: str) -> str:
    return color


def ask_count(thing: Mention) -> str:
    return f"how many {plural(thing.noun)} are there?"


def say_count(thing: Mention) -> str:
    return COUNTS[thing.count]


def ask_what(relation: str, thing: Mention) -> str:
    return f"what is {RELATIONS[relation]} the {bare(thing)}?"


def ask_where(thing: Mention) -> str:
    return f"where {_is(thing)} the {bare(thing)}?"


def say_where(relation: str, thing: Mention) -> str:
    return f"{RELATIONS[relation]} the {bare(thing)}"


def ask_there(thing: Mention) -> str:
    return f"{_is(thing)} there {name(thing)}?"


def ask_relation(thing: Mention, relation: str, other: Mention) -> str:
    return f"{_is(thing)} the {bare(thing)} {RELATIONS[relation]} the {bare(other)}?"


def neutral(thing: Mention) -> list[str]:
    """Statements that may be so or not: no picture of this world can tell."""
    words = bare(thing)
    was = "was" if thing.count == 1 else "were"
    return [
        f"a child likes the {words}",
        f"the {words} {was} here yesterday",
        f"tomorrow the {words} will be gone",
        f"somebody made a photo of the {words}",
    ]


def _is(thing: Mention) -> str:
    return "is" if thing.count == 1 else "are"
