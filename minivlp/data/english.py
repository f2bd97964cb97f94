"""The scene world in English: from facts to sentences, and back (`parse`)."""

from __future__ import annotations

import re

from minivlp.data.grammar import COLORS, OBJECTS, SHAPES, SIZES, Facts, Mention

COUNTS = {1: "one", 2: "two", 3: "three"}
RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
RELATION_WORDS = ("left", "right", "above", "below")
YES, NO = "yes", "no"
# Words that grammar requires, or that any caption may contain: the picture does not help to predict them.
FUNCTION_WORDS = frozenset("a an the of to in on at is are and with there it this that picture photo image".split())


def plural(noun: str) -> str:
    """The plural of a noun of the scene world."""
    if noun == "fish":
        return noun
    if noun == "snowman":
        return "snowmen"
    if noun.endswith("fly"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith("s") else "s")


def bare(mention: Mention) -> str:
    """Without an article: "small red heart", "bees"."""
    noun = mention.noun if mention.count == 1 else plural(mention.noun)
    return " ".join(word for word in (mention.size, mention.color, noun) if word)


def name(mention: Mention) -> str:
    """With an article or a number: "a small red heart", "an apple", "two bees"."""
    words = bare(mention)
    article = "an" if words[0] in "aeiou" else "a"
    return f"{COUNTS[mention.count] if mention.count > 1 else article} {words}"


def chain(facts: Facts) -> str:
    """The short caption: "a red heart left of a dog above two bees"."""
    text = name(facts.objects[0])
    for relation, mention in zip(facts.relations, facts.objects[1:], strict=True):
        text += f" {RELATIONS[relation]} {name(mention)}"
    return text


def captions(facts: Facts) -> list[str]:
    """Several wordings; the first is the short one."""
    there = "there is" if facts.objects[0].count == 1 else "there are"
    short = chain(facts)
    if len(facts.objects) == 1:
        return [short, f"{there} {short}", f"a picture of {short}"]
    reverse = chain(facts.reversed())
    long_form = re.sub(r"(left|right) of", r"to the \1 of", reverse)
    return [short, f"{there} {short}", reverse, f"a picture of {long_form}"]


def parse(caption: str) -> Facts | None:
    """The facts of a caption of this grammar, in any wording and with "the" for "a"; None for any other text."""
    text = re.sub(r"[\s.]+", " ", caption.lower()).strip()
    text = re.sub(r"^(there (is|are)|an? (picture|photo|image) of) ", "", text)
    parts = re.split(r" (?:(?:is|are) )?(?:(?:to the )?(left|right) of|(above|below)) ", text)
    mentions = [_parse_name(part) for part in parts[::3]]
    if None in mentions:
        return None
    return Facts(tuple(mentions), tuple(one or other for one, other in zip(parts[1::3], parts[2::3], strict=True)))


_NOUNS = {(noun, 1): noun for noun in SHAPES + OBJECTS}
_NOUNS |= {(plural(noun), count): noun for noun in SHAPES + OBJECTS for count in (2, 3)}
NOUNS = frozenset(word for word, _ in _NOUNS)  # all forms in which captions name an object
_DETERMINERS = {"a": 1, "an": 1, "the": 1} | {word: count for count, word in COUNTS.items()}


def _parse_name(text: str) -> Mention | None:
    first, *words = re.sub("^the (two|three) ", r"\1 ", text).split() or [""]
    size = words.pop(0) if words and words[0] in SIZES else None
    color = words.pop(0) if words and words[0] in COLORS else None
    count = _DETERMINERS.get(first)
    if count is None or len(words) != 1 or (words[0], count) not in _NOUNS:
        return None
    return Mention(_NOUNS[words[0], count], color, size, count)


# Questions and answers. `ask_*` is a question, `say_*` its answer. The questions keep the spelling "colour", because
# that is the word in the vocabulary of our tokenizer and of the bundled checkpoints.


def ask_color(mention: Mention) -> str:
    """For example "what colour is the heart?"."""
    return f"what colour {_is(mention)} the {bare(mention)}?"


def say_color(color: str) -> str:
    """For example "red"."""
    return color


def ask_count(mention: Mention) -> str:
    """For example "how many bees are there?"."""
    return f"how many {plural(mention.noun)} are there?"


def say_count(mention: Mention) -> str:
    """For example "two"."""
    return COUNTS[mention.count]


def ask_what(relation: str, mention: Mention) -> str:
    """For example "what is left of the dog?"."""
    return f"what is {RELATIONS[relation]} the {bare(mention)}?"


def ask_where(mention: Mention) -> str:
    """For example "where is the red heart?"."""
    return f"where {_is(mention)} the {bare(mention)}?"


def say_where(relation: str, mention: Mention) -> str:
    """For example "left of the dog"."""
    return f"{RELATIONS[relation]} the {bare(mention)}"


def ask_there(mention: Mention) -> str:
    """For example "is there a dog?"."""
    return f"{_is(mention)} there {name(mention)}?"


def ask_relation(mention: Mention, relation: str, other: Mention) -> str:
    """For example "is the red heart left of the dog?"."""
    return f"{_is(mention)} the {bare(mention)} {RELATIONS[relation]} the {bare(other)}?"


def neutral(mention: Mention) -> list[str]:
    """Statements that no picture of the scene world can confirm or contradict."""
    words = bare(mention)
    was = "was" if mention.count == 1 else "were"
    return [
        f"a child likes the {words}",
        f"the {words} {was} here yesterday",
        f"tomorrow the {words} will be gone",
        f"somebody made a photo of the {words}",
    ]


def _is(mention: Mention) -> str:
    return "is" if mention.count == 1 else "are"
