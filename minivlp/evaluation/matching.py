"""Does the model read the words? Captions with one fact changed, and words to be filled in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.data.text import words
from minivlp.evaluation.forward import chunks, evaluating, first_rows, images_of, need, pair_scores, texts_of
from minivlp.evaluation.score import Scores, bootstrap

# words that the sentence asks for, not the picture
FUNCTION_WORDS = frozenset("a an the of to in on at is are and with there it this that picture photo image".split())


def counterfactual(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 250,
    language: str = "en",
) -> Scores:
    """How often the true caption scores above the same caption with one fact changed, by kind of change, and the mean.

    Kinds: object, colour, size, relation, swap (the two things exchanged), count, as far as the scenes allow them. The
    pair is scored by `match` if the model has it, else by the cosine of its two embeddings; a tie counts half; chance
    is one half. `mean` gives every kind the same weight, however often it applies. Source of the idea: Yuksekgonul et
    al. 2023, "When and why vision-language models behave like bags-of-words".

    Raises ValueError when the dataset does not know the truth of its images (photos, folders).
    """
    need(model, "match", "embed_images")
    rng = np.random.default_rng(seed)
    asked: list[tuple[int, str, str, str]] = []  # (row, kind, true caption, changed caption)
    for row in first_rows(dataset, limit):
        scene = dataset[row].truth
        if scene is None:
            raise ValueError(f"Row {row} has no known truth to change: counterfactuals need scenes, not photos.")
        true = scene.captions(language)[0]
        asked.extend((row, kind, true, changed) for kind, changed in scene.counterfactuals(rng, language).items())
    if not asked:
        raise ValueError("No caption of this dataset can be changed: use scenes with more than a bare object.")
    rows = [row for row, *_ in asked]
    with evaluating(model):
        true, changed = (
            pair_scores(model, dataset, tokenizer, rows, [a[side] for a in asked], batch_size).cpu() for side in (2, 3)
        )
    if not (true.isfinite().all() and changed.isfinite().all()):
        raise ValueError("The model's scores hold NaN or infinity: nothing can be compared.")
    right = ((true > changed) + 0.5 * (true == changed)).numpy()
    kinds, images = np.array([kind for _, kind, *_ in asked]), np.array(rows)
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
    """How often a masked content word is filled in rightly: with its image, with another's, and with no image at all.

    One content word of every image's first caption is masked (all its pieces must be right). The wrong image is another
    row's; no image is the mean colour of the images, everywhere. What is right without the image was guessed from the
    text alone. Chance is the share of the most frequent masked word.
    """
    need(model, "fill")
    rng = np.random.default_rng(seed)
    rows = first_rows(dataset, limit)
    if len(rows) < 2:
        raise ValueError("One image alone has no wrong image beside it: evaluate at least two.")
    right: dict[str, list[bool]] = {"right image": [], "wrong image": [], "no image": []}
    hidden: list[tuple[int, str]] = []  # (row, masked word)
    with evaluating(model):
        for part in chunks(rows, batch_size):
            ids, mask = texts_of(model, tokenizer, [dataset.captions(row)[0] for row in part])
            masked, drawn = _mask_one_word(tokenizer, ids, mask, rng)
            hidden.extend((part[i], word) for i, word in drawn)
            others = [rows[(row + len(rows) // 2) % len(rows)] for row in part]
            images, wrong = images_of(model, dataset, part), images_of(model, dataset, others)
            plain = images.mean(dim=(0, 2, 3), keepdim=True).expand_as(images)
            asked = masked != ids  # (B, L)
            few = torch.tensor([i for i, _ in drawn], dtype=torch.long, device=ids.device)
            for name, seen in zip(right, (images, wrong, plain), strict=True):
                filled = model.fill(seen, masked, mask).argmax(-1)  # (B, L)
                right[name].extend(((filled == ids) | ~asked).all(1)[few].tolist())
    if not hidden:
        raise ValueError("No caption holds a content word that could be masked.")
    blind = Counter(word for _, word in hidden).most_common(1)[0][1] / len(hidden)
    images_asked = [row for row, _ in hidden]
    return Scores({name: bootstrap(hits, blind, images=images_asked) for name, hits in right.items()})


def _mask_one_word(
    tokenizer: Any, ids: Tensor, mask: Tensor, rng: np.random.Generator
) -> tuple[Tensor, list[tuple[int, str]]]:
    """The ids (B, L) with one content word of each row masked, and (row, word) for each; a row without one stays."""
    masked, drawn = ids.clone(), []
    for i, row in enumerate(ids):
        content = [
            (word, places)
            for word, places in words(tokenizer, row[mask[i]])
            if word.lower() not in FUNCTION_WORDS and any(letter.isalnum() for letter in word)
        ]
        if content:
            word, places = content[rng.integers(len(content))]
            masked[i, places] = tokenizer.mask_token_id
            drawn.append((i, word))
    return masked, drawn
