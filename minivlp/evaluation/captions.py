"""The quality of captions by overlap with reference captions: BLEU-4, ROUGE-L and CIDEr-D, as the papers report them.

A fluent caption of another image can get a high score. Where the truth is known, `facts` checks what is true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from minivlp.evaluation.facts import fact_scores, words_of
from minivlp.evaluation.forward import chunks, first_rows, images_of, need
from minivlp.evaluation.score import Scores, bootstrap, bootstrap_counts
from minivlp.inference import evaluating


def captions(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    decoding: Any = None,
    generator: torch.Generator | None = None,
    limit: int | None = None,
    batch_size: int = 250,
) -> Scores:
    """Generate one caption per image and compare it with the dataset's captions: BLEU-4, ROUGE-L and CIDEr-D.

    `exact` is how often it equals one of these, word for word. Scenes also have scores by facts (`fact_scores`), whose
    `n` counts facts. `decoding` and `generator` are those of `write`. Chance is the score of the first caption of
    another image: good English, wrong image. METEOR and SPICE are left out, because they need Java.
    """
    rows = list(first_rows(dataset, limit))
    if len(rows) < 2:
        raise ValueError("One image alone has no other image's caption to compare with: evaluate at least two.")
    written = write(model, dataset, tokenizer, rows, batch_size, decoding=decoding, generator=generator)
    references = [dataset.captions(row) for row in rows]
    blind = [references[(i + len(rows) // 2) % len(rows)][0] for i in range(len(rows))]
    scores = caption_scores(written, references, blind)
    if hasattr(dataset, "scene") and getattr(dataset, "language", "en") == "en":
        scores.update(fact_scores(written, [dataset.scene(row) for row in rows], blind))
    return scores


def write(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    rows: Sequence[int],
    batch_size: int = 250,
    *,
    decoding: Any = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """One caption for the image of each row, by the model's `generate`.

    decoding: a `layers.generation.DecodingConfig`, greedy if None. generator: draws the tokens when sampling.
    """
    need(model, "generate")
    texts: list[str] = []
    with evaluating(model):
        for part in chunks(rows, batch_size):
            ids = model.generate(images_of(model, dataset, part), decoding=decoding, generator=generator)
            texts += [text.strip() for text in tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)]
    return texts


def caption_scores(written: Sequence[str], references: Sequence[Sequence[str]], blind: Sequence[str]) -> Scores:
    """BLEU-4, ROUGE-L, CIDEr-D and `exact` of one text per image; the scores of the texts `blind` are chance."""
    counts, blind_counts = (_bleu_counts(texts, references) for texts in (written, blind))
    by_image: dict[str, Callable[[Sequence[str]], Sequence[float]]] = {
        "ROUGE-L": lambda texts: [rouge_l(text, refs) for text, refs in zip(texts, references, strict=True)],
        "CIDEr-D": lambda texts: cider_d(texts, references),
        "exact": lambda texts: [_is_one_of(text, refs) for text, refs in zip(texts, references, strict=True)],
    }
    scores = {"BLEU-4": bootstrap_counts(counts, _bleu_of, _bleu_of(blind_counts))}
    scores |= {name: bootstrap(measure(written), np.mean(measure(blind))) for name, measure in by_image.items()}
    return Scores(scores)


def bleu_4(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of n-grams of one to four words that a reference also has, over the whole set (Papineni et al. 2002).

    It is the geometric mean of the four shares. An n-gram counts at most as often as it occurs in one reference, and
    texts shorter than their closest references are penalized. One text and one list of references per image.
    """
    return _bleu_of(_bleu_counts(written, references))


def rouge_l(text: str, references: Sequence[str]) -> float:
    """The longest common subsequence of words with a reference as an F-score (Lin 2004), in 0..1.

    Recall has a slightly larger weight than precision (beta 1.2). Each is that of its best reference, as COCO does it.
    """
    words, others = words_of(text), [words_of(reference) for reference in references]
    common = [_longest_common(words, other) for other in others]
    precision = max(c / max(1, len(words)) for c in common)
    recall = max(c / max(1, len(other)) for c, other in zip(common, others, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision * recall else 0.0


def cider_d(written: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Similarity to the references in which rare n-grams count more, 0 to 10, (n,) (Vedantam et al. 2015).

    For n-grams of one to four words: the cosine of TF-IDF vectors, where the text's counts are clipped to those of the
    reference and a different length is penalized (sigma 6). Document frequencies are counted over the images of this
    set, so the score depends on which images are evaluated, and of one image alone it is 0. COCO tables print it times
    100.
    """
    counts = [[_ngrams(words_of(reference)) for reference in refs] for refs in references]
    images_with = Counter(gram for refs in counts for gram in set().union(*refs))
    rare = {gram: np.log(len(references) / images) for gram, images in images_with.items()}

    def vector(grams: Counter) -> tuple[dict, np.ndarray]:
        weights = {gram: count * rare.get(gram, np.log(len(references))) for gram, count in grams.items()}
        square = np.zeros(4)
        for gram, weight in weights.items():
            square[len(gram) - 1] += weight**2
        return weights, np.sqrt(square)

    found = []
    for text, refs in zip(written, counts, strict=True):
        grams = _ngrams(words_of(text))
        own, own_norm = vector(grams)
        similarity = 0.0
        for reference in refs:
            other, other_norm = vector(reference)
            dot = np.zeros(4)
            for gram in own.keys() & other.keys():
                dot[len(gram) - 1] += min(own[gram], other[gram]) * other[gram]
            norm = own_norm * other_norm
            longer = _bigrams(grams) - _bigrams(reference)  # COCO's code measures length in bigrams
            similarity += np.mean(dot / np.where(norm > 0, norm, 1.0)) * np.exp(-(longer**2) / (2 * 6**2))
        found.append(10 * similarity / len(refs))
    return np.array(found)


def _is_one_of(text: str, references: Sequence[str]) -> bool:
    """Whether a reference has the same words."""
    return words_of(text) in map(words_of, references)


def _ngrams(words: Sequence[str]) -> Counter:
    """How often each n-gram of one to four words occurs."""
    return Counter(tuple(words[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1))


def _bigrams(grams: Counter) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _bleu_counts(written: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Per image, (n, 10): n-grams of 1 to 4 words that a reference has, all n-grams, own length, closest length."""
    rows = []
    for text, refs in zip(written, references, strict=True):
        words, others = words_of(text), [words_of(reference) for reference in refs]
        most: Counter = Counter()
        for other in others:
            most |= _ngrams(other)
        found = np.zeros(4)
        for gram, count in (_ngrams(words) & most).items():
            found[len(gram) - 1] += count
        asked = [max(0, len(words) - n) for n in range(4)]
        closest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        rows.append([*found, *asked, len(words), closest])
    return np.array(rows)


def _bleu_of(counts: np.ndarray) -> float:
    total = counts.sum(axis=0)
    found, asked, length, closest = total[:4], total[4:8], total[8], total[9]
    if not found.all():
        return 0.0
    return float(np.exp(np.log(found / asked).mean() + min(0.0, 1 - closest / length)))


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(b) + 1)
    for word in a:
        before = 0  # best[j] of the row above, one to the left
        for j, other in enumerate(b, start=1):
            before, best[j] = best[j], before + 1 if word == other else max(best[j], best[j - 1])
    return best[-1]
