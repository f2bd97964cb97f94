"""Does the model answer questions about a picture (VQA), and does it see whether a statement follows from it?

Both are asked twice: with the picture, and with a grey one. What is right without the picture, the question alone gave
away. Source of the doubt: Goyal et al. 2017, "Making the V in VQA matter".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from minivlp.asking import device_of
from minivlp.data.questions import joined, kind_of, one_list
from minivlp.data.scene import LABELS
from minivlp.evaluation.facts import words_of
from minivlp.evaluation.forward import chunks, evaluating, first_rows, images_of, need, once_each, texts_of
from minivlp.evaluation.score import Scores, bootstrap

ARTICLES = {"a", "an", "the"}
NUMBERS = "zero one two three four five six seven eight nine ten".split()
Asked = tuple[int, str, str, str]  # row, question or statement, right answer, kind


def answering(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    answers: Mapping[str, Sequence[str]] | None = None,
    limit: int | None = None,
    batch_size: int = 250,
    **how: Any,
) -> Scores:
    """How many questions of the first `limit` images are answered rightly, by kind of question, and the mean.

    answers: what there is to choose from, by kind of question (`data.questions.answers_of` the training scenes); None
    lets the model write (`generate`, which gets `how`). See `reply`. Answers are compared after `plain`; a right one
    that is not among `answers` cannot be given. `mean` gives every kind the same weight. Chance is the most frequent
    answer of the kind, without looking at question or picture; "grey picture" is what the question alone gives.
    """
    rows = first_rows(dataset, limit)
    asked = [(row, text, answer, kind_of(text)) for row in rows for text, answer in dataset[row].questions]
    if not asked:
        raise ValueError("No image has a question with an answer: ask of scenes.")
    known: dict[str, Counter] = {}
    for _, _, answer, kind in asked:
        known.setdefault(kind, Counter())[plain(answer)] += 1
    chance = {kind: counts.most_common(1)[0][1] / counts.total() for kind, counts in known.items()}
    return _scores(model, dataset, tokenizer, asked, chance, answers, batch_size, how)


def entailment(
    model: Any, dataset: Any, tokenizer: Any, *, seed: int = 0, limit: int | None = None, batch_size: int = 250
) -> Scores:
    """Visual entailment: how many statements of each label (entailed, neutral, contradicted) get it, and the mean.

    The model chooses one of the three labels (see `reply`); it must have been taught them. Two thresholds on `match`
    would not do: nothing has taught it to put what no picture can settle between true and false. Chance is one in
    three; but a neutral statement is known by its words, so see "grey picture". Source: Xie et al. 2019, "Visual
    entailment". Raises ValueError when the dataset does not know the truth of its images.
    """
    need(model, "answer", "caption_logprob")
    rng = np.random.default_rng(seed)
    asked = []
    for row in first_rows(dataset, limit):
        scene = dataset[row].truth
        if scene is None:
            raise ValueError(f"Row {row} has no known truth: statements need scenes, not photos.")
        told = scene.statements(rng, getattr(dataset, "language", "en"))
        asked += [(row, text, label, label) for text, label in told]
    return _scores(model, dataset, tokenizer, asked, dict.fromkeys(LABELS, 1 / 3), {"label": LABELS}, batch_size, {})


def reply(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    rows: Sequence[int],
    texts: Sequence[str],
    answers: Mapping[str, Sequence[str]] | None = None,
    *,
    batch_size: int = 250,
    **how: Any,
) -> list[str]:
    """One answer to each question about the image of its row.

    Without `answers` the model goes on with the question: `generate`, greedily unless `how` says otherwise. With them,
    a classifier (`answer`) chooses from all, which must be the list that it was trained with (`one_list`); any other
    model ranks those of the question's kind (all, for a kind that is not there) by how likely it is to go on with them
    (`caption_logprob`; of the question no token counts). BLIP's paper ranks, too: its 3,128 answers by their first
    words, then the best 128.
    """
    need(model, *(("generate",) if answers is None else ("answer", "caption_logprob")))
    with evaluating(model):
        if answers is None:
            return _written(model, dataset, tokenizer, rows, texts, batch_size, how)
        if hasattr(model, "answer"):
            return _chosen(model, dataset, tokenizer, rows, texts, one_list(answers), batch_size)
        choices = [answers.get(kind_of(text)) or one_list(answers) for text in texts]
        return _ranked(model, dataset, tokenizer, rows, texts, choices, batch_size)


def plain(answer: str) -> str:
    """The answer for comparing: lower case, no punctuation, no articles, numbers in digits ("A cat." is "cat")."""
    kept = (word for word in words_of(answer) if word not in ARTICLES)
    return " ".join(str(NUMBERS.index(word)) if word in NUMBERS else word for word in kept)


class Grey:
    """A dataset's rows with nothing to be seen."""

    def pixels(self, rows: Sequence[int], size: int) -> np.ndarray:
        """Mid-grey pictures (B, size, size, 3)."""
        return np.full((len(rows), size, size, 3), 128, np.uint8)


def _scores(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    asked: Sequence[Asked],
    chance: Mapping[str, float],
    answers: Mapping[str, Sequence[str]] | None,
    batch_size: int,
    how: Mapping[str, Any],
) -> Scores:
    """The share of right answers by kind, and the mean of the kinds, each with the picture and with a grey one."""
    rows, texts, right, kinds = (np.array(column) for column in zip(*asked, strict=True))
    each = Counter(kinds.tolist())
    equal = np.array([1 / each[kind] for kind in kinds.tolist()])
    scores = {}
    for seen, name in ((dataset, ""), (Grey(), ", grey picture")):
        said = reply(model, seen, tokenizer, rows.tolist(), texts.tolist(), answers, batch_size=batch_size, **how)
        hits = np.array([plain(a) == plain(b) for a, b in zip(said, right.tolist(), strict=True)])
        for kind in each:
            some = kinds == kind
            scores[kind + name] = bootstrap(hits[some], chance[kind], images=rows[some])
        blind = float(np.mean([chance[kind] for kind in each]))
        scores["mean" + name] = bootstrap(hits, blind, images=rows, weights=equal)
    return Scores({kind + name: scores[kind + name] for kind in (*each, "mean") for name in ("", ", grey picture")})


def _written(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    rows: Sequence[int],
    texts: Sequence[str],
    batch_size: int,
    how: Mapping[str, Any],
) -> list[str]:
    """What the model writes behind each question; questions of one length go together, so that none needs padding."""
    ids, mask = texts_of(model, tokenizer, texts)
    lengths, said = mask.sum(dim=1).tolist(), [""] * len(texts)
    for length in sorted(set(lengths)):
        for part in chunks([i for i, n in enumerate(lengths) if n == length], batch_size):
            prompt = ids[part, 1 : length - 1]  # (B, n) without [CLS] and [SEP]
            written = model.generate(images_of(model, dataset, [rows[i] for i in part]), prompt, **how)
            new = tokenizer.batch_decode(written[:, length - 2 :].tolist(), skip_special_tokens=True)
            for i, text in zip(part, new, strict=True):
                said[i] = text.strip()
    return said


def _chosen(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    rows: Sequence[int],
    texts: Sequence[str],
    answers: Sequence[str],
    batch_size: int,
) -> list[str]:
    """What a classifier chooses for each question."""
    said = []
    for part in chunks(range(len(texts)), batch_size):
        images = images_of(model, dataset, [rows[i] for i in part])
        logits = model.answer(images, *texts_of(model, tokenizer, [texts[i] for i in part]))  # (B, answers)
        if logits.shape[1] != len(answers):
            raise ValueError(f"the model chooses from {logits.shape[1]} answers, the list has {len(answers)}")
        said += [answers[best] for best in _finite(logits).argmax(dim=1).tolist()]
    return said


def _ranked(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    rows: Sequence[int],
    texts: Sequence[str],
    choices: Sequence[Sequence[str]],
    batch_size: int,
) -> list[str]:
    """The likeliest of each question's choices, the first of equals; each batch encodes each of its images once."""
    device, longest, found = device_of(model), model.config.text.context_length, []
    pairs = [(i, answer) for i, of_question in enumerate(choices) for answer in of_question]
    for part in chunks(pairs, batch_size):
        distinct, where = np.unique([rows[i] for i, _ in part], return_inverse=True)
        images, which = images_of(model, dataset, distinct.tolist()), torch.from_numpy(where.reshape(-1)).to(device)
        together = joined(tokenizer, [texts[i] for i, _ in part], [answer for _, answer in part], longest)
        found.append(once_each(model, "caption_logprob", images, which, *(x.to(device) for x in together)))
    likely = _finite(torch.cat(found).float()).cpu().split([len(of_question) for of_question in choices])
    return [of_question[int(scores.argmax())] for of_question, scores in zip(choices, likely, strict=True)]


def _finite(scores: torch.Tensor) -> torch.Tensor:
    if not scores.isfinite().all():
        raise ValueError("The model's scores hold NaN or infinity: nothing can be compared.")
    return scores
