"""Are the captions good? By overlap with what people wrote: BLEU-4, ROUGE-L and CIDEr-D, as the papers report them.

A fluent caption of the wrong picture can score high here. Where the truth is known, `facts` asks what is true of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minivlp.evaluation.facts import fact_scores, words_of
from minivlp.evaluation.forward import chunks, evaluating, first_rows, images_of, need
from minivlp.evaluation.score import Scores, bootstrap, pooled


def captions(
    model: Any, dataset: Any, tokenizer: Any, *, limit: int | None = None, batch_size: int = 250, **how: Any
) -> Scores:
    """Write one caption per image and judge it: BLEU-4, ROUGE-L and CIDEr-D against the dataset's own captions.

    `exact` is how often it is one of these, word for word. Of scenes also, over all facts that an image holds or its
    caption states, how many are stated rightly, stated wrongly, and missing, and `right` by kind of fact; `n` then
    counts facts. `how` goes to `generate` (beams, top_p, max_length …). Chance is the score of another image's first
    caption: good English, wrong picture. METEOR and SPICE are not here; they need Java.
    """
    rows = list(first_rows(dataset, limit))
    if len(rows) < 2:
        raise ValueError("One image alone has no other image's caption to compare with: evaluate at least two.")
    written = write(model, dataset, tokenizer, rows, batch_size, **how)
    references = [dataset.captions(row) for row in rows]
    blind = [references[(i + len(rows) // 2) % len(rows)][0] for i in range(len(rows))]
    scores = caption_scores(written, references, blind)
    if hasattr(dataset, "scene") and getattr(dataset, "language", "en") == "en":
        scores.update(fact_scores(written, [dataset.scene(row) for row in rows], blind))
    return scores


def write(
    model: Any, dataset: Any, tokenizer: Any, rows: Sequence[int], batch_size: int = 250, **how: Any
) -> list[str]:
    """One caption for the image of each row, by the model's `generate`; `how` goes there."""
    need(model, "generate")
    texts: list[str] = []
    with evaluating(model):
        for part in chunks(rows, batch_size):
            ids = model.generate(images_of(model, dataset, part), **how)
            texts += [text.strip() for text in tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)]
    return texts


def caption_scores(written: Sequence[str], references: Sequence[Sequence[str]], blind: Sequence[str]) -> Scores:
    """BLEU-4, ROUGE-L, CIDEr-D and `exact` of one text per image; `blind` are texts that never looked, for chance."""
    counts, blind_counts = (_bleu_counts(texts, references) for texts in (written, blind))
    by_image: dict[str, Callable[[Sequence[str]], Sequence[float]]] = {
        "ROUGE-L": lambda texts: [rouge_l(text, refs) for text, refs in zip(texts, references, strict=True)],
        "CIDEr-D": lambda texts: cider_d(texts, references),
        "exact": lambda texts: [_plain(t) in map(_plain, refs) for t, refs in zip(texts, references, strict=True)],
    }
    scores = {"BLEU-4": pooled(counts, _bleu_of, _bleu_of(blind_counts))}
    scores |= {name: bootstrap(measure(written), np.mean(measure(blind))) for name, measure in by_image.items()}
    return Scores(scores)


def bleu_4(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of runs of one to four words that a reference also has, over the whole set (Papineni et al. 2002).

    The geometric mean of the four shares; a word counts no more often than in one reference, and texts that are shorter
    than their closest references are punished. One text, and one list of references, per image.
    """
    return _bleu_of(_bleu_counts(written, references))


def rouge_l(text: str, references: Sequence[str]) -> float:
    """How much of a reference's words the text has in the same order, gaps allowed (Lin 2004), in 0..1.

    Recall counts a little more than precision (beta 1.2); each is that of its best reference, as COCO does it.
    """
    words, others = words_of(text), [words_of(reference) for reference in references]
    common = [_longest_common(words, other) for other in others]
    precision = max(c / max(1, len(words)) for c in common)
    recall = max(c / max(1, len(other)) for c, other in zip(common, others, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision * recall else 0.0


def cider_d(written: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Likeness to the references where rare runs of words count more, 0 to 10, (n,) (Vedantam et al. 2015).

    One to four words at a time: the cosine of TF-IDF vectors, where the text's counts are clipped to the reference's
    and another length is punished (sigma 6). How rare a run is, is counted over the images of this very set: the score
    depends on which images are asked, and of one image alone it is 0. COCO tables print it times 10.
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
        likeness = 0.0
        for reference in refs:
            other, other_norm = vector(reference)
            dot = np.zeros(4)
            for gram in own.keys() & other.keys():
                dot[len(gram) - 1] += min(own[gram], other[gram]) * other[gram]
            norm = own_norm * other_norm
            longer = _pairs(grams) - _pairs(reference)  # COCO's code measures length in pairs of words
            likeness += np.mean(dot / np.where(norm > 0, norm, 1.0)) * np.exp(-(longer**2) / (2 * 6**2))
        found.append(10 * likeness / len(refs))
    return np.array(found)


def _plain(text: str) -> str:
    return " ".join(words_of(text))


def _ngrams(words: Sequence[str]) -> Counter:
    """How often each run of one to four words occurs."""
    return Counter(tuple(words[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1))


def _pairs(grams: Counter) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _bleu_counts(written: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Per image, (n, 10): runs of 1 to 4 words that a reference has too, all such runs, own and closest length."""
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
    """Length of the longest sequence of words that both have in this order."""
    best = [0] * (len(b) + 1)
    for word in a:
        before = 0  # best[j] of the row above, one to the left
        for j, other in enumerate(b, start=1):
            before, best[j] = best[j], before + 1 if word == other else max(best[j], best[j - 1])
    return best[-1]
