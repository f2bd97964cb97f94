"""Visual question answering (VQA), and visual entailment: does a statement follow from an image?

Both are measured twice: with the image, and with a gray one. What is right without the image follows from the text
alone. On the need for this: Goyal et al. 2017, "Making the V in VQA matter".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minivlp.data.dataset import Size, height_width
from minivlp.data.questions import answer_list, kind_of, tokenize_questions
from minivlp.data.scene_questions import LABELS
from minivlp.evaluation.facts import words_of
from minivlp.evaluation.forward import chunks, distinct, first_rows, images_of, need
from minivlp.evaluation.score import Scores, bootstrap
from minivlp.inference import device_of, evaluating, share_image_encoding, tokenize_for

ARTICLES = {"a", "an", "the"}
NUMBERS = "zero one two three four five six seven eight nine ten".split()
GRAY = ", gray image"  # end of the names of scores that were measured without the image


class Question(NamedTuple):
    """What is asked about the image of a row."""

    row: int
    text: str
    answer: str  # the right one
    kind: str


def answering(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    answers: Mapping[str, Sequence[str]] | None = None,
    decoding: Any = None,
    limit: int | None = None,
    batch_size: int = 250,
) -> Scores:
    """The share of questions about the first `limit` images that get the right answer, by kind of question.

    answers: the answers to choose from, by kind of question (`data.questions.answers_of` the training scenes); None
    lets the model write the answer, with `decoding` as in `reply`. Answers are compared after `normalize_answer`. A
    right answer that is not among `answers` cannot be given.

    `mean` gives every kind the same weight. Chance is the share of the most frequent answer of the kind. "gray image"
    is measured without the image. Raises ValueError if no image has a question.
    """
    rows = first_rows(dataset, limit)
    asked = [Question(row, text, answer, kind_of(text)) for row in rows for text, answer in dataset[row].questions]
    if not asked:
        raise ValueError("No image has a question with an answer: use scenes.")
    known: dict[str, Counter] = {}
    for question in asked:
        known.setdefault(question.kind, Counter())[normalize_answer(question.answer)] += 1
    chance = {kind: counts.most_common(1)[0][1] / counts.total() for kind, counts in known.items()}
    return _scores(model, dataset, tokenizer, asked, chance, answers, decoding, batch_size)


def entailment(
    model: Any, dataset: Any, tokenizer: Any, *, seed: int = 0, limit: int | None = None, batch_size: int = 250
) -> Scores:
    """Visual entailment: the share of statements of each label (entailed, neutral, contradicted) that get it.

    The model chooses one of the three labels (see `reply`), for which it must have been trained. Two thresholds on
    `match` would not do, because nothing trains a model to place statements that no image can decide between true and
    false. `mean` gives every label the same weight. Chance is one third, but a neutral statement can be recognized by
    its words alone, as "gray image" shows. Source: Xie et al. 2019, "Visual entailment".

    Raises ValueError when the dataset does not know the truth of its images.
    """
    need(model, "answer", "caption_logprob")
    rng = np.random.default_rng(seed)
    asked = []
    for row in first_rows(dataset, limit):
        scene = dataset[row].truth
        if scene is None:
            raise ValueError(f"The truth of row {row} is not known: statements need scenes, not photos.")
        statements = scene.statements(rng, getattr(dataset, "language", "en"))
        asked += [Question(row, text, label, label) for text, label in statements]
    return _scores(model, dataset, tokenizer, asked, dict.fromkeys(LABELS, 1 / 3), {"label": LABELS}, None, batch_size)


def reply(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    rows: Sequence[int],
    texts: Sequence[str],
    answers: Mapping[str, Sequence[str]] | None = None,
    *,
    decoding: Any = None,
    batch_size: int = 250,
) -> list[str]:
    """One answer to each question about the image of its row.

    Without `answers` the model continues the question (`generate`); `decoding` is a `layers.generation.DecodingConfig`,
    greedy if None. With `answers`, a classifier (`answer`) chooses among all of them, in the order of `answer_list`
    with which it was trained. Any other model ranks the answers of the question's kind (all answers, for a kind that is
    not there) by their log-probability as the continuation of the question (`caption_logprob`). BLIP's paper ranks,
    too: its 3,128 answers by their first tokens, then the best 128 of these.
    """
    need(model, *(("generate",) if answers is None else ("answer", "caption_logprob")))
    with evaluating(model):
        if answers is None:
            return _generate(model, dataset, tokenizer, rows, texts, decoding, batch_size)
        if hasattr(model, "answer"):
            return _classify(model, dataset, tokenizer, rows, texts, answer_list(answers), batch_size)
        choices = [answers.get(kind_of(text)) or answer_list(answers) for text in texts]
        return _rank(model, dataset, tokenizer, rows, texts, choices, batch_size)


def normalize_answer(answer: str) -> str:
    """The answer in lower case without punctuation and articles, numbers in digits ("A cat." is "cat")."""
    kept = (word for word in words_of(answer) if word not in ARTICLES)
    return " ".join(str(NUMBERS.index(word)) if word in NUMBERS else word for word in kept)


class GrayImages:
    """Stands in for a dataset; all of its images are gray."""

    def pixels(self, rows: Sequence[int], size: Size) -> np.ndarray:
        """Mid-gray images (B, H, W, 3) uint8."""
        return np.full((len(rows), *height_width(size), 3), 128, np.uint8)


def _scores(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    chance: Mapping[str, float],
    answers: Mapping[str, Sequence[str]] | None,
    decoding: Any,
    batch_size: int,
) -> Scores:
    """The share of right answers by kind, and the mean of the kinds, each with the image and with a gray one."""
    rows, texts, right, kinds = (np.array(column) for column in zip(*asked, strict=True))
    each = Counter(kinds.tolist())
    equal = np.array([1 / each[kind] for kind in kinds.tolist()])
    scores = {}
    for images, name in ((dataset, ""), (GrayImages(), GRAY)):
        replies = reply(
            model, images, tokenizer, rows.tolist(), texts.tolist(), answers, decoding=decoding, batch_size=batch_size
        )
        hits = np.array([normalize_answer(a) == normalize_answer(b) for a, b in zip(replies, right, strict=True)])
        for kind in each:
            some = kinds == kind
            scores[kind + name] = bootstrap(hits[some], chance[kind], images=rows[some])
        of_kinds = float(np.mean([chance[kind] for kind in each]))
        scores["mean" + name] = bootstrap(hits, of_kinds, images=rows, weights=equal)
    return Scores({kind + name: scores[kind + name] for kind in (*each, "mean") for name in ("", GRAY)})


def _generate(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    rows: Sequence[int],
    texts: Sequence[str],
    decoding: Any,
    batch_size: int,
) -> list[str]:
    """What the model writes after each question. Questions of equal length form batches, so that none is padded."""
    questions, replies = tokenize_for(model, tokenizer, texts), [""] * len(texts)
    lengths = questions.mask.sum(dim=1).tolist()
    for length in sorted(set(lengths)):
        for part in chunks([i for i, n in enumerate(lengths) if n == length], batch_size):
            prompt = questions.ids[part, 1 : length - 1]  # (B, n) without [CLS] and [SEP]
            ids = model.generate(images_of(model, dataset, [rows[i] for i in part]), prompt, decoding)
            new = tokenizer.batch_decode(ids[:, length - 2 :].tolist(), skip_special_tokens=True)
            for i, text in zip(part, new, strict=True):
                replies[i] = text.strip()
    return replies


def _classify(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    rows: Sequence[int],
    texts: Sequence[str],
    answers: Sequence[str],
    batch_size: int,
) -> list[str]:
    """The answer that a classifier chooses for each question."""
    replies = []
    for part in chunks(range(len(texts)), batch_size):
        images = images_of(model, dataset, [rows[i] for i in part])
        logits = model.answer(images, tokenize_for(model, tokenizer, [texts[i] for i in part]))  # (B, answers)
        if logits.shape[1] != len(answers):
            raise ValueError(f"the model chooses from {logits.shape[1]} answers, the list has {len(answers)}")
        replies += [answers[best] for best in _finite(logits).argmax(dim=1).tolist()]
    return replies


def _rank(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    rows: Sequence[int],
    texts: Sequence[str],
    choices: Sequence[Sequence[str]],
    batch_size: int,
) -> list[str]:
    """The most likely of each question's choices, the first of equals; a batch encodes each of its images once."""
    device, longest, found = device_of(model), model.config.text.context_length, []
    pairs = [(i, answer) for i, of_question in enumerate(choices) for answer in of_question]
    for part in chunks(pairs, batch_size):
        different, image_rows = distinct([rows[i] for i, _ in part])
        text, prefix_length = tokenize_questions(
            tokenizer, [texts[i] for i, _ in part], [answer for _, answer in part], longest
        )
        found.append(
            share_image_encoding(
                model,
                "caption_logprob",
                images_of(model, dataset, different),
                image_rows.to(device),
                text.to(device),
                prefix_length.to(device),
            )
        )
    scores = _finite(torch.cat(found).float()).cpu().split([len(of_question) for of_question in choices])
    return [of_question[int(likely.argmax())] for of_question, likely in zip(choices, scores, strict=True)]


def _finite(scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise ValueError("The model's scores contain NaN or infinity, so they cannot be compared.")
    return scores
