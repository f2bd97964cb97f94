"""Questions about images as batches: the model writes the answer, or chooses it from a list.

    written   [CLS] is there a dog ? yes [SEP]    `prefix_length` counts the tokens of the question, which are given:
              └─ prefix_length = 6 ─┘             the loss predicts only the tokens after them
    chosen    [CLS] is there a dog ? [SEP]        `answers` is the index of the right answer in the list

A statement with its label (entailed, neutral, contradicted: visual entailment) is treated as a question, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.data.batch import Batch, Text, to_tensor
from minivlp.data.dataset import Dataset, Size
from minivlp.data.loading import rows_of_step
from minivlp.data.rng import RandomSource, pick
from minivlp.data.text import tokenize

# Kinds of question in the scene world. The last text of each is a part of the Chinese question, the others are
# beginnings of the English one.
KINDS = {
    "how many": ("how many ", "几"),
    "color": ("what colour ", "什么颜色"),
    "what": ("what is ", "是什么"),
    "where": ("where ", "在哪里"),
    "is there": ("is there ", "are there ", "是不是有"),
    "relation": ("is the ", "are the ", "是不是在"),
}
OTHER = "other"


def kind_of(question: str) -> str:
    """The kind of question: a key of `KINDS`, or `OTHER`."""
    text = question.lower()
    fitting = (kind for kind, (*starts, part) in KINDS.items() if text.startswith(tuple(starts)) or part in text)
    return next(fitting, OTHER)


def answers_of(dataset: Any, limit: int | None = None) -> dict[str, list[str]]:
    """All answers in the first `limit` rows (None: in all), by kind of question, the most frequent first."""
    found: dict[str, Counter] = {}
    for row in range(len(dataset) if limit is None else min(limit, len(dataset))):
        for question, answer in dataset.questions(row):
            found.setdefault(kind_of(question), Counter())[answer] += 1
    return {kind: [answer for answer, _ in counts.most_common()] for kind, counts in found.items()}


def answer_list(answers: Mapping[str, Iterable[str]]) -> list[str]:
    """The distinct answers of all kinds in one list, which a classifier chooses from."""
    return list(dict.fromkeys(answer for of_kind in answers.values() for answer in of_kind))


def draw_question(dataset: Any, row: int, rng: RandomSource) -> tuple[str, str]:
    """A random question about this row, with its answer. Every kind that applies is equally likely."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for question, answer in dataset.questions(row):
        by_kind.setdefault(kind_of(question), []).append((question, answer))
    return pick(rng, pick(rng, list(by_kind.values())))


def draw_statement(dataset: Any, row: int, rng: RandomSource) -> tuple[str, str]:
    """A random statement about this row, with its label."""
    return pick(rng, dataset.statements(row, rng))


def tokenize_questions(
    tokenizer: Any, questions: Sequence[str], answers: Sequence[str], max_tokens: int
) -> tuple[Text, Tensor]:
    """Each question followed by its answer (B, L), and the number of tokens of the question, (B,).

    These are the tokens that the question has alone, without the closing one.
    """
    pairs = [f"{question} {answer}" for question, answer in zip(questions, answers, strict=True)]
    prefix_length = tokenize(tokenizer, questions, max_tokens).mask.sum(dim=1) - 1
    return tokenize(tokenizer, pairs, max_tokens), prefix_length


class QuestionLoader:
    """Shuffled training batches with one question per image, a pure function of seed and step like those of `Loader`.

    Args:
        dataset: scenes, which know questions and statements.
        tokenizer, batch_size, size, seed, max_tokens: see `Loader`.
        answers: the list that a classifier chooses from (`ViLTAnswers`). None is for a model that writes the answer
            (`BLIP` with the losses `("lm",)`): its texts are question and answer.
        ask: `draw_question` or `draw_statement`.

    Raises ValueError if the dataset is smaller than one batch or has no questions, and if an answer is not in the list
    (make the list from all training rows).
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any,
        batch_size: int,
        size: Size,
        *,
        answers: Sequence[str] | None = None,
        ask: Callable[[Any, int, RandomSource], tuple[str, str]] = draw_question,
        seed: int = 0,
        max_tokens: int = 56,
    ) -> None:
        if not 1 <= batch_size <= len(dataset):
            raise ValueError(f"a batch of {batch_size} of {len(dataset)} images: choose a size between 1 and that")
        if not hasattr(dataset, "questions"):
            raise ValueError(f"{dataset!r} has no questions with answers: only scenes do")
        self.dataset, self.tokenizer, self.batch_size, self.size = dataset, tokenizer, batch_size, size
        self.index = None if answers is None else {answer: index for index, answer in enumerate(answers)}
        self.ask, self.seed, self.max_tokens = ask, seed, max_tokens
        self.steps_per_epoch = len(dataset) // batch_size

    def batch(self, step: int) -> Batch:
        """The batch of this training step."""
        rows = rows_of_step(len(self.dataset), self.batch_size, self.seed, step)
        rng = np.random.default_rng((self.seed, step))
        questions, answers = zip(*(self.ask(self.dataset, int(row), rng) for row in rows), strict=True)
        images = to_tensor(self.dataset.pixels(rows, self.size))
        image_ids = torch.tensor([self.dataset.image_id(int(row)) for row in rows])
        if self.index is None:
            text, prefix_length = tokenize_questions(self.tokenizer, questions, answers, self.max_tokens)
            return Batch(images, text, image_ids, prefix_length=prefix_length)
        if unknown := set(answers) - self.index.keys():
            raise ValueError(f"{unknown.pop()!r} is not in the list of {len(self.index)} answers")
        right = torch.tensor([self.index[answer] for answer in answers])
        return Batch(images, tokenize(self.tokenizer, questions, self.max_tokens), image_ids, answers=right)
