"""Does the model read the words? Captions with one fact changed, and masked words to be predicted.

Axes: B batch, L text tokens.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from minivlp.data.batch import Text
from minivlp.data.english import FUNCTION_WORDS
from minivlp.data.text import group_words
from minivlp.evaluation.forward import PairScore, chunks, first_rows, images_of, need, pair_scores
from minivlp.evaluation.score import Scores, bootstrap
from minivlp.inference import evaluating, tokenize_for


def counterfactual(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 250,
    language: str = "en",
    score: PairScore = pair_scores,
) -> Scores:
    """How often the true caption scores above the same caption with one fact changed, by kind of change, and the mean.

    Kinds: object, color, size, relation, swap (two objects exchanged), count, as far as they apply to a scene.
    `score` judges a pair: `pair_scores` by the model's `match` if it has it, else by `score` of its features;
    `caption_likelihood` by the log-probability of the text as the image's caption. A tie counts half, and chance is one
    half. `mean` gives every kind the same weight, however often it applies. Source of the idea: Yuksekgonul et al.
    2023, "When and why vision-language models behave like bags-of-words".

    Raises ValueError when the dataset does not know the truth of its images (photos, folders).
    """
    rng = np.random.default_rng(seed)
    asked: list[tuple[int, str, str, str]] = []  # (row, kind, true caption, changed caption)
    for row in first_rows(dataset, limit):
        scene = dataset[row].truth
        if scene is None:
            raise ValueError(f"The truth of row {row} is not known: counterfactuals need scenes, not photos.")
        true = scene.captions(language)[0]
        asked.extend((row, kind, true, changed) for kind, changed in scene.counterfactuals(rng, language).items())
    if not asked:
        raise ValueError("No caption of this dataset can be changed: use scenes with more than a bare object.")
    rows, kinds, true_texts, changed_texts = zip(*asked, strict=True)
    with evaluating(model):
        true, changed = (
            score(model, dataset, tokenizer, rows, texts, batch_size).cpu() for texts in (true_texts, changed_texts)
        )
    if not (true.isfinite().all() and changed.isfinite().all()):
        raise ValueError("The model's scores contain NaN or infinity, so they cannot be compared.")
    right = ((true > changed) + 0.5 * (true == changed)).numpy()
    kinds, images = np.array(kinds), np.array(rows)
    each = Counter(kinds.tolist())
    scores = {kind: bootstrap(right[kinds == kind], 0.5, images=images[kinds == kind]) for kind in sorted(each)}
    equal = np.array([1 / each[kind] for kind in kinds.tolist()])
    return Scores({**scores, "mean": bootstrap(right, 0.5, images=images, weights=equal)})


def masked_words(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 250,
) -> Scores:
    """How often a masked content word is predicted: with its image, with the image of another row, and with no image.

    One content word of every image's first caption is masked; all of its pieces must be right. "no image" is a plain
    one in the mean color of the images. What is right without the image follows from the text alone. Chance is the
    share of the most frequent masked word.
    """
    need(model, "mlm_logits")
    rng = np.random.default_rng(seed)
    rows = first_rows(dataset, limit)
    if len(rows) < 2:
        raise ValueError('One image alone has no other image for "wrong image": evaluate at least two.')
    right: dict[str, list[bool]] = {"right image": [], "wrong image": [], "no image": []}
    drawn: list[tuple[int, str]] = []  # (row, masked word)
    with evaluating(model):
        for part in chunks(rows, batch_size):
            text = tokenize_for(model, tokenizer, [dataset.captions(row)[0] for row in part])
            masked, words = mask_one_word(tokenizer, text, rng)
            drawn.extend((part[i], word) for i, word in words)
            others = [rows[(row + len(rows) // 2) % len(rows)] for row in part]
            images, wrong = images_of(model, dataset, part), images_of(model, dataset, others)
            plain = images.mean(dim=(0, 2, 3), keepdim=True).expand_as(images)
            asked = masked.ids != text.ids  # (B, L)
            with_word = torch.tensor([i for i, _ in words], dtype=torch.long, device=asked.device)
            for name, shown in zip(right, (images, wrong, plain), strict=True):
                predicted = model.mlm_logits(shown, masked).argmax(-1)  # (B, L)
                right[name].extend(((predicted == text.ids) | ~asked).all(1)[with_word].tolist())
    if not drawn:
        raise ValueError("No caption has a content word that could be masked.")
    chance = Counter(word for _, word in drawn).most_common(1)[0][1] / len(drawn)
    images_asked = [row for row, _ in drawn]
    return Scores({name: bootstrap(hits, chance, images=images_asked) for name, hits in right.items()})


def mask_one_word(tokenizer: Any, text: Text, rng: np.random.Generator) -> tuple[Text, list[tuple[int, str]]]:
    """The texts (B, L) with a random content word of each masked, and (row, word) for each text that has one."""
    ids, drawn = text.ids.clone(), []
    for i, row in enumerate(text.ids):
        content = [
            (word, places)
            for word, places in group_words(tokenizer, row[text.mask[i]])
            if word.lower() not in FUNCTION_WORDS and any(letter.isalnum() for letter in word)
        ]
        if content:
            word, places = content[rng.integers(len(content))]
            ids[i, places] = tokenizer.mask_token_id
            drawn.append((i, word))
    return text.with_ids(ids), drawn
