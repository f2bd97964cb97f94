"""Image-text retrieval in both directions, with and without re-ranking, and zero-shot classification.

Axes: M images, N captions, E joint-embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.data.batch import Text
from minivlp.evaluation.forward import (
    check_words,
    chunks,
    distinct,
    embed_texts,
    first_rows,
    images_of,
    need,
    pair_scores,
    score_all,
)
from minivlp.evaluation.score import Score, Scores, bootstrap, median
from minivlp.inference import evaluating, share_image_encoding, tokenize_for

ARTICLE = re.compile(r"^(an?|the)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """The rank of the right answer, 1 being first, and how many answers were right for each question.

    `of_images` (M,): rank of each image's best caption; `of_captions` (N,): rank of each caption's best image.
    """

    of_images: np.ndarray
    of_captions: np.ndarray
    right_captions: np.ndarray  # (M,) how many captions are right for each image
    right_images: np.ndarray  # (N,) how many images are right for each caption


def rank(similarity: Tensor, image_of_caption: Sequence[int], captions: Sequence[str] | None = None) -> Ranks:
    """Ranks from a table of similarities (M, N), higher meaning closer, and the row of each caption's image (N,).

    Of several captions of one image, the one ranked first counts. Where the caption strings are given, a caption that
    also belongs to another image is right for both. A tie with a wrong answer costs half a rank, so a model that gives
    all pairs the same similarity gets the middle rank. Source: Karpathy and Fei-Fei 2015 (sec. 4.2).

    Raises ValueError if the table is not finite, its shape does not fit, or an image has no caption.
    """
    table = np.asarray(similarity.detach().cpu().float() if isinstance(similarity, Tensor) else similarity)
    owner = np.asarray(image_of_caption)
    if table.shape[1:] != owner.shape:
        raise ValueError(
            f"The similarity needs one column per caption: {table.shape[-1]} columns, {len(owner)} captions."
        )
    if not np.isfinite(table).all():
        raise ValueError("The similarity contains NaN or infinity, so it cannot be ranked.")
    missing = np.setdiff1d(np.arange(len(table)), owner)
    if len(missing):
        raise ValueError(f"Image {missing[0]} has no caption, so it cannot be ranked: leave it out.")
    text = np.arange(len(owner)) if captions is None else np.unique(np.asarray(captions), return_inverse=True)[1]
    belongs = np.zeros((len(table), text.max() + 1), dtype=bool)  # (M, distinct captions)
    belongs[owner, text] = True
    right = belongs[:, text]  # (M, N)
    return Ranks(rank_rows(table, right), rank_rows(table.T, right.T), right.sum(1), right.sum(0))


def rank_rows(table: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The rank of each row's best right column; a tie with a wrong one costs half a rank."""
    best = np.where(right, table, -np.inf).max(axis=1, keepdims=True)
    above, tied = ((~right) & (table > best)).sum(1), ((~right) & (table == best)).sum(1)
    return 1 + above + tied / 2


def retrieval(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    unique: int | None = 500,
    limit: int | None = None,
    batch_size: int = 250,
) -> Scores:
    """R@1, R@5, R@10 and median rank, image to text and text to image.

    `unique`: the first `unique` images whose first caption has not occurred before, each with that caption alone (the
    protocol for scenes, where short captions repeat). None: every caption of the first `limit` images, the protocol for
    COCO and Flickr. A dual encoder encodes each image and text once. A model that only has `match` is run on all M x N
    pairs: 500 images and captions are 250,000 passes (see `cost`), so choose a small `unique` for it.
    """
    chosen, owner, texts = candidates(dataset, unique, limit)
    check_words(model, tokenizer, texts, "captions")
    with evaluating(model):
        ranks = rank(similarities(model, dataset, tokenizer, chosen, texts, batch_size), owner, texts)
    return _scores(ranks, owner)


def reranked(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    k: int = 16,
    unique: int | None = 500,
    limit: int | None = None,
    batch_size: int = 250,
) -> Scores:
    """`retrieval` in two rounds: the towers choose the `k` nearest answers of each question, `match` orders these.

    All other answers follow in the order of the towers, so R@k and beyond do not change, and k = 0 is `retrieval`. It
    takes at most (M + N) k passes of `match` instead of M N. Source: Li et al. 2021 (ALBEF, section 5), with k = 256 of
    COCO's 5,000 images and 128 of Flickr30k's 1,000.
    """
    need(model, "embed_images")
    need(model, "match")
    chosen, owner, texts = candidates(dataset, unique, limit)
    check_words(model, tokenizer, texts, "captions")
    with evaluating(model):
        # to the CPU first: MPS has no float64
        near = similarities(model, dataset, tokenizer, chosen, texts, batch_size).cpu().double()  # (M, N)
        by_image, by_text = best_of(near, k), best_of(near.T, k).T  # (M, N) bool each
        image, text = (by_image | by_text).nonzero().T.tolist()  # image by image: its texts share one encoding
        matched = torch.zeros_like(near)
        if image:
            rows, asked = [chosen[i] for i in image], [texts[j] for j in text]
            matched[image, text] = pair_scores(model, dataset, tokenizer, rows, asked, batch_size).cpu().double()
    below = near - near.max() - 1  # at most -1, and `match` is at least 0
    ranks = rank(torch.where(by_image, matched, below).numpy(), owner, texts)
    other_way = rank(torch.where(by_text, matched, below).numpy(), owner, texts)
    return _scores(replace(ranks, of_captions=other_way.of_captions), owner)


def best_of(table: Tensor, k: int) -> Tensor:
    """Mark the k largest entries of each row: bool, of the table's shape."""
    top = table.topk(min(k, table.shape[1]), dim=1).indices
    return torch.zeros_like(table, dtype=torch.bool).scatter_(1, top, True)


def candidates(dataset: Any, unique: int | None, limit: int | None) -> tuple[list[int], list[int], list[str]]:
    """Rows of the M images, the index among these of each caption's image (N,), and the N captions; see `retrieval`."""
    rows = first_rows(dataset, limit)
    if unique is None:
        pairs = [(i, text) for i, row in enumerate(rows) for text in dataset.captions(row)]
        return list(rows), [i for i, _ in pairs], [text for _, text in pairs]
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(dataset.captions(row)[0], row)
        if len(first) == unique:
            break
    return list(first.values()), list(range(len(first))), list(first)


def _scores(ranks: Ranks, owner: Sequence[int]) -> Scores:
    images, texts = len(ranks.of_images), len(ranks.of_captions)
    return Scores(
        {
            **_recalls("image to text", ranks.of_images, ranks.right_captions, texts, np.arange(images)),
            **_recalls("text to image", ranks.of_captions, ranks.right_images, images, np.asarray(owner)),
        }
    )


def _recalls(direction: str, ranks: np.ndarray, right: np.ndarray, among: int, images: np.ndarray) -> dict[str, Score]:
    chance = chance_of_reaching(right, among)  # (among,)
    scores = {f"{direction} R@{k}": bootstrap(ranks <= k, chance[min(k, among) - 1], images=images) for k in (1, 5, 10)}
    middle = int(np.argmax(chance >= 0.5)) + 1
    return {**scores, f"{direction} median rank": bootstrap(ranks, middle, images=images, statistic=median)}


def chance_of_reaching(right: np.ndarray, among: int) -> np.ndarray:
    """Probability that a random order of `among` answers has a right one in its first 1, 2, ... places, (among,).

    right: how many answers are right for each question. The mean is over the questions.
    """
    counts, questions = np.unique(right, return_counts=True)
    reached = np.zeros(among)
    for count, asked in zip(counts, questions, strict=True):
        left = among - np.arange(among)  # answers not yet drawn
        all_wrong = np.cumprod(np.clip(left - count, 0, None) / left)
        reached += asked * (1 - all_wrong)
    return reached / questions.sum()


def similarities(
    model: Any, dataset: Any, tokenizer: Any, rows: Sequence[int], texts: Sequence[str], batch_size: int = 250
) -> Tensor:
    """Similarity of every image of these rows with every text, (M, N), in the cheapest way that the model offers.

    `embed_images`, `embed_texts` and `score`: M + N encodings. Else `similarity` on blocks. Else `match` on all M x N
    pairs. Equal texts are asked for once.
    """
    need(model, "embed_images", "similarity", "match")
    different, text_rows = distinct(texts)
    if hasattr(model, "embed_images"):
        features = embed_texts(model, tokenizer, different, batch_size)
        return score_all(model, dataset, rows, features, batch_size)[:, text_rows]
    parts = [tokenize_for(model, tokenizer, part) for part in chunks(different, batch_size)]
    compare = model.similarity if hasattr(model, "similarity") else lambda images, text: _match_all(model, images, text)
    table = []
    for part in chunks(rows, batch_size):
        images = images_of(model, dataset, part)
        table.append(torch.cat([compare(images, text) for text in parts], dim=1).float())
    return torch.cat(table)[:, text_rows]


def _match_all(model: Any, images: Tensor, text: Text) -> Tensor:
    """`match` of every image (M, 3, H, W) with every text, (M, N), one image at a time."""
    first = torch.zeros(len(text), dtype=torch.long, device=images.device)
    return torch.stack([share_image_encoding(model, "match", image[None], first, text) for image in images])


def zero_shot(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    labels: Sequence[str],
    prompts: Sequence[str],
    *,
    answers: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 250,
) -> Scores:
    """Zero-shot classification: how often the nearest label is the right one (CLIP, Radford et al. 2021, 3.1.4).

    Args:
        prompts: texts with `{}` where the label goes; "a {}" becomes "an {}" before a vowel. The vectors of one label
            under all prompts are averaged and scaled to unit length, as CLIP does it. Features that are no single
            vector, and a model that only matches, have their scores averaged (FILIP, Yao et al., ICLR 2022).
        answers: the right label of each row. Without it, the images with exactly one region of kind `object` are asked,
            and the right label is its phrase without the article; images whose label is not among `labels` are skipped.
    """
    if not all("{}" in prompt for prompt in prompts) or not prompts or not labels:
        raise ValueError("Give at least one label and one prompt, each prompt with {} where the label goes.")
    number = {label: i for i, label in enumerate(labels)}
    rows = first_rows(dataset, limit)
    named = {row: _only_object(dataset, row) if answers is None else answers[row] for row in rows}
    truth = {row: number[name] for row, name in named.items() if name in number}
    if not truth:
        raise ValueError("No image shows exactly one object that is among the labels: use single-object scenes.")
    rows, right = list(truth), torch.tensor(list(truth.values()))
    texts = [fill_prompt(prompt, label) for label in labels for prompt in prompts]
    with evaluating(model):
        table = _label_scores(model, dataset, tokenizer, rows, texts, len(prompts), batch_size)
    one_hot = torch.zeros_like(table, dtype=torch.bool).cpu()
    one_hot[torch.arange(len(rows)), right] = True
    ranks = rank_rows(table.cpu().numpy(), one_hot.numpy())
    tops = [k for k in (1, 5) if k < len(labels)]
    return Scores({f"top-{k}": bootstrap(ranks <= k, k / len(labels)) for k in tops})


def _label_scores(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    rows: Sequence[int],
    texts: Sequence[str],
    prompts: int,
    batch_size: int,
) -> Tensor:
    """Score of every image of these rows with every label, (M, labels); `texts` are each label in all its prompts."""
    if hasattr(model, "embed_images"):
        features = embed_texts(model, tokenizer, texts, batch_size)
        if features[0].dim() == 2:  # one vector per text
            vectors = torch.cat(features).unflatten(0, (-1, prompts)).mean(dim=1)  # (labels, E)
            return score_all(model, dataset, rows, [F.normalize(vectors, dim=-1)], batch_size)
        table = score_all(model, dataset, rows, features, batch_size)
    else:
        table = similarities(model, dataset, tokenizer, rows, texts, batch_size)
    return table.unflatten(1, (-1, prompts)).mean(dim=-1)  # (M, labels x prompts) -> (M, labels)


def fill_prompt(prompt: str, label: str) -> str:
    """The prompt with the label in it: ("a picture of a {}", "apple") -> "a picture of an apple"."""
    if label[:1].lower() in "aeiou":
        prompt = re.sub(r"\b([Aa]) \{\}", r"\1n {}", prompt)
    return prompt.replace("{}", label)


def _only_object(dataset: Any, row: int) -> str | None:
    objects = [region.phrase for region in dataset.regions(row) if region.kind == "object"]
    return ARTICLE.sub("", objects[0]) if len(objects) == 1 else None
