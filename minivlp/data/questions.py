"""Questions about a picture as batches: to be answered in words, or by choosing from a list.

    written   [CLS] is there a dog ? yes [SEP]    the model goes on after "?": the question is `given`, never asked
              └────── given ───────┘
    chosen    [CLS] is there a dog ? [SEP]        `answers` says which of the list is right

A statement with its label (entailed, neutral, contradicted: visual entailment) is such a question, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.data.batch import Batch, to_tensor
from minivlp.data.loading import shuffled
from minivlp.data.scene import Draw, pick
from minivlp.data.text import encode

# What a question of the scene world asks for, by how it begins in English, or by what it holds in Chinese.
KINDS = {
    "how many": ("how many ", "几"),
    "colour": ("what colour ", "什么颜色"),
    "what": ("what is ", "是什么"),
    "where": ("where ", "在哪里"),
    "is there": ("is there ", "are there ", "是不是有"),
    "relation": ("is the ", "are the ", "是不是在"),
}
OTHER = "other"


def kind_of(question: str) -> str:
    """What the question asks for: one of `KINDS`, or other."""
    asked = question.lower()
    fits = (k for k, (*starts, held) in KINDS.items() if asked.startswith(tuple(starts)) or held in asked)
    return next(fits, OTHER)


def answers_of(dataset: Any, limit: int | None = None) -> dict[str, list[str]]:
    """By kind of question, the answers that the first `limit` rows (all if None) know, the most frequent first."""
    found: dict[str, Counter] = {}
    for row in range(len(dataset) if limit is None else min(limit, len(dataset))):
        for question, answer in dataset.questions(row):
            found.setdefault(kind_of(question), Counter())[answer] += 1
    return {kind: [answer for answer, _ in counts.most_common()] for kind, counts in found.items()}


def one_list(answers: Mapping[str, Iterable[str]]) -> list[str]:
    """The answers of all kinds as one list, each once: what a classifier chooses from."""
    return list(dict.fromkeys(answer for of_kind in answers.values() for answer in of_kind))


def a_question(dataset: Any, row: int, rng: Draw) -> tuple[str, str]:
    """A question about the picture of this row, with its answer: each kind that can be asked of it is as likely."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for question, answer in dataset.questions(row):
        by_kind.setdefault(kind_of(question), []).append((question, answer))
    return pick(rng, pick(rng, list(by_kind.values())))


def a_statement(dataset: Any, row: int, rng: Draw) -> tuple[str, str]:
    """A statement about the picture of this row, with its label."""
    return pick(rng, dataset.statements(row, rng))


def joined(
    tokenizer: Any, questions: Sequence[str], answers: Sequence[str], max_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each question with its answer behind it: ids and mask (B, L), and how many tokens are the question's, (B,).

    These are all that the question has alone, but for its closing token.
    """
    ids, mask = encode(tokenizer, [f"{q} {a}" for q, a in zip(questions, answers, strict=True)], max_tokens)
    return ids, mask, encode(tokenizer, questions, max_tokens)[1].sum(dim=1) - 1


class QuestionLoader:
    """Shuffled training batches of one question per picture, a pure function of seed and step, as `Loader`'s are.

    Args:
        dataset, tokenizer, batch_size, size, seed, max_tokens: as for `Loader`; the dataset is of scenes.
        answers: the list that a classifier chooses from (`ViLTAnswers`); None is for a model that writes (`BLIP` with
            the losses `("lm",)`), whose texts are question and answer. ask: `a_question` or `a_statement`.

    Raises ValueError when the dataset is smaller than one batch or knows no questions, and when an answer is not in the
    list: make it of all the rows that are trained on.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        batch_size: int,
        size: int,
        *,
        answers: Sequence[str] | None = None,
        ask: Callable[[Any, int, Draw], tuple[str, str]] = a_question,
        seed: int = 0,
        max_tokens: int = 56,
    ) -> None:
        if not 1 <= batch_size <= len(dataset):
            raise ValueError(f"a batch of {batch_size} of {len(dataset)} pictures: it needs one at least, all at most")
        if not hasattr(dataset, "questions"):
            raise ValueError(f"{dataset!r} knows no questions with answers: only scenes do")
        self.dataset, self.tokenizer, self.batch_size, self.size = dataset, tokenizer, batch_size, size
        self.place = None if answers is None else {answer: place for place, answer in enumerate(answers)}
        self.ask, self.seed, self.max_tokens = ask, seed, max_tokens
        self.steps_per_epoch = len(dataset) // batch_size

    def batch(self, step: int) -> Batch:
        """The batch of this training step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = shuffled(len(self.dataset), self.seed, epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        rng = np.random.default_rng((self.seed, step))
        questions, answers = zip(*(self.ask(self.dataset, int(row), rng) for row in rows), strict=True)
        images = to_tensor(self.dataset.pixels(rows, self.size))
        image_ids = torch.tensor([self.dataset.image_id(int(row)) for row in rows])
        if self.place is None:
            ids, mask, given = joined(self.tokenizer, questions, answers, self.max_tokens)
            return Batch(images, ids, mask, image_ids, given=given)
        if unknown := set(answers) - self.place.keys():
            raise ValueError(f"{unknown.pop()!r} is not in the list of {len(self.place)} answers")
        right = torch.tensor([self.place[answer] for answer in answers])
        return Batch(images, *encode(self.tokenizer, questions, self.max_tokens), image_ids, answers=right)
