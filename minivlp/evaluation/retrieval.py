"""Finding the image of a caption, the captions of an image, and the name of what is shown.

Axes: M images, N captions, E joint-embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.evaluation.forward import (
    chunks,
    embed_images,
    embed_texts,
    evaluating,
    first_rows,
    images_of,
    need,
    pair_scores,
    texts_of,
)
from minivlp.evaluation.score import Score, Scores, bootstrap, median

ARTICLE = re.compile(r"^(an?|the)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """Where the right answer stood, 1 being first, and how many answers were right for each question.

    `of_images` (M,): rank of each image's best caption; `of_captions` (N,): rank of each caption's best image.
    """

    of_images: np.ndarray
    of_captions: np.ndarray
    right_captions: np.ndarray  # (M,) how many captions are right for each image
    right_images: np.ndarray  # (N,) how many images are right for each caption


def rank(similarity: Tensor, image_of_caption: Sequence[int], captions: Sequence[str] | None = None) -> Ranks:
    """Ranks from a table of similarities (M, N), higher meaning closer, and the row of each caption's image (N,).

    An image may have several captions: the first one of them to turn up counts. Where the caption strings are given, a
    caption that also belongs to another image is right for both. A tie with a wrong answer costs half a rank, so a
    model that finds everything equal ends up in the middle, not on top. Source: Karpathy and Fei-Fei 2015 (sec. 4.2).

    Raises ValueError if the table is not finite, its shape does not fit, or an image has no caption.
    """
    table = np.asarray(similarity.detach().cpu().float() if isinstance(similarity, Tensor) else similarity)
    owner = np.asarray(image_of_caption)
    if table.shape[1:] != owner.shape:
        raise ValueError(f"{table.shape[-1]} columns of similarity for {len(owner)} captions: they must be as many.")
    if not np.isfinite(table).all():
        raise ValueError("The similarity holds NaN or infinity: the model's output is broken, ranks mean nothing.")
    missing = np.setdiff1d(np.arange(len(table)), owner)
    if len(missing):
        raise ValueError(f"Image {missing[0]} has no caption: leave it out, it cannot be ranked.")
    text = np.arange(len(owner)) if captions is None else np.unique(np.asarray(captions), return_inverse=True)[1]
    said_of = np.zeros((len(table), text.max() + 1), dtype=bool)  # (M, distinct captions)
    said_of[owner, text] = True
    right = said_of[:, text]  # (M, N)
    return Ranks(rank_rows(table, right), rank_rows(table.T, right.T), right.sum(1), right.sum(0))


def rank_rows(table: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The rank of each row's best right column; a tie with a wrong one costs half a rank."""
    best = np.where(right, table, -np.inf).max(axis=1, keepdims=True)
    above, level = ((~right) & (table > best)).sum(1), ((~right) & (table == best)).sum(1)
    return 1 + above + level / 2


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

    `unique`: the first so many images whose first caption has not occurred before, with that caption alone (the
    protocol for scenes, where short captions repeat). None: every caption of the first `limit` images, the protocol for
    COCO and Flickr. A dual encoder encodes each image and text once; a model that only has `match` is run on all M x N
    pairs: 500 images and captions are 250,000 passes (see `cost`), so keep `unique` small for it.
    """
    chosen, owner, texts = candidates(dataset, unique, limit)
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
    """`retrieval` in two rounds: the towers choose each question's `k` nearest answers, `match` puts these in order.

    What the towers left out stays behind the k, in their order; so R@k and beyond do not change, and k = 0 is
    `retrieval`. Costs (M + N) k fusions at most instead of M N. Source: Li et al. 2021 (ALBEF, section 5), with k = 256
    of COCO's 5,000 images; 128 in Flickr30k's 1,000.
    """
    need(model, "embed_images")
    need(model, "match")
    chosen, owner, texts = candidates(dataset, unique, limit)
    with evaluating(model):
        near = similarities(model, dataset, tokenizer, chosen, texts, batch_size).double().cpu()  # (M, N)
        by_image, by_text = best_of(near, k), best_of(near.T, k).T  # (M, N) bool each
        image, text = (by_image | by_text).nonzero().T.tolist()  # image by image: its texts share one encoding
        fits = torch.zeros_like(near)
        if image:
            rows, said = [chosen[i] for i in image], [texts[j] for j in text]
            fits[image, text] = pair_scores(model, dataset, tokenizer, rows, said, batch_size).double().cpu()
    below = near - near.max() - 1  # at most -1, and `match` is at least 0
    ranks = rank(torch.where(by_image, fits, below).numpy(), owner, texts)
    other_way = rank(torch.where(by_text, fits, below).numpy(), owner, texts)
    return _scores(replace(ranks, of_captions=other_way.of_captions), owner)


def best_of(table: Tensor, k: int) -> Tensor:
    """Where each row's k largest are: bool, of the table's shape."""
    top = table.topk(min(k, table.shape[1]), dim=1).indices
    return torch.zeros_like(table, dtype=torch.bool).scatter_(1, top, True)


def candidates(dataset: Any, unique: int | None, limit: int | None) -> tuple[list[int], list[int], list[str]]:
    """(rows of the M images, which of them each caption belongs to (N,), the N captions), as `retrieval` explains."""
    rows = first_rows(dataset, limit)
    if unique is None:
        said = [(i, text) for i, row in enumerate(rows) for text in dataset.captions(row)]
        return list(rows), [i for i, _ in said], [text for _, text in said]
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


def _recalls(way: str, ranks: np.ndarray, right: np.ndarray, among: int, images: np.ndarray) -> dict[str, Score]:
    blind = chance_of_reaching(right, among)  # (among,)
    scores = {f"{way} R@{k}": bootstrap(ranks <= k, blind[min(k, among) - 1], images=images) for k in (1, 5, 10)}
    middle = int(np.argmax(blind >= 0.5)) + 1
    return {**scores, f"{way} median rank": bootstrap(ranks, middle, images=images, statistic=median)}


def chance_of_reaching(right: np.ndarray, among: int) -> np.ndarray:
    """How often a random order of `among` answers has a right one in its first 1, 2, … places, (among,).

    `right`: how many answers are right for each question; the mean is over the questions.
    """
    counts, questions = np.unique(right, return_counts=True)
    reached = np.zeros(among)
    for count, many in zip(counts, questions, strict=True):
        left = among - np.arange(among)  # answers not yet drawn
        all_wrong = np.cumprod(np.clip(left - count, 0, None) / left)
        reached += many * (1 - all_wrong)
    return reached / questions.sum()


def similarities(
    model: Any, dataset: Any, tokenizer: Any, rows: Sequence[int], texts: Sequence[str], batch_size: int = 250
) -> Tensor:
    """Every image of these rows with every text, (M, N), in the cheapest way that the model offers.

    `embed_images`: M + N encodings and one matmul. Else `similarity` on blocks. Else `match` on all M x N pairs.
    """
    need(model, "embed_images", "similarity", "match")
    if hasattr(model, "embed_images"):
        return embed_images(model, dataset, rows, batch_size) @ embed_texts(model, tokenizer, texts, batch_size).T
    ids, mask = texts_of(model, tokenizer, texts)
    table = []
    for part in chunks(rows, batch_size):
        images = images_of(model, dataset, part)
        if hasattr(model, "similarity"):
            blocks = [model.similarity(images, *part) for part in _split(ids, mask, batch_size)]
            table.append(torch.cat(blocks, dim=1).float())
        else:
            table.append(torch.stack([_match_all(model, image, ids, mask, batch_size) for image in images]))
    return torch.cat(table)


def _match_all(model: Any, image: Tensor, ids: Tensor, mask: Tensor, batch_size: int) -> Tensor:
    """One image (3, H, W) with all texts, (N,)."""
    parts = _split(ids, mask, batch_size)
    return torch.cat([model.match(image.expand(len(i), -1, -1, -1), i, m) for i, m in parts]).float()


def _split(ids: Tensor, mask: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(ids.split(size), mask.split(size), strict=True)


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
    """How often the nearest label is the right one, no classifier having been trained (Radford et al. 2021, 3.1.4).

    `prompts` hold `{}` where the label goes; "a {}" becomes "an {}" before a vowel. The embeddings of one label under
    all prompts are averaged and made unit again; a model that only matches has its probabilities averaged. `answers` is
    the right label of each row; without it, images with exactly one region of kind `object` are asked, its phrase less
    the article being the answer, and images whose answer is not among the labels are left out.
    """
    if not all("{}" in prompt for prompt in prompts) or not prompts or not labels:
        raise ValueError("Give at least one label and one prompt, each prompt with {} where the label goes.")
    number = {label: i for i, label in enumerate(labels)}
    truth = {row: _only_object(dataset, row) if answers is None else answers[row] for row in first_rows(dataset, limit)}
    truth = {row: number[name] for row, name in truth.items() if name in number}
    if not truth:
        raise ValueError("No image shows exactly one object that is among the labels: use single-object scenes.")
    rows, right = list(truth), torch.tensor(list(truth.values()))
    texts = [fill_prompt(prompt, label) for label in labels for prompt in prompts]
    with evaluating(model):
        if hasattr(model, "embed_images"):
            per_label = embed_texts(model, tokenizer, texts, batch_size).unflatten(0, (len(labels), len(prompts)))
            prototypes = torch.nn.functional.normalize(per_label.mean(1), dim=-1)  # (labels, E)
            table = embed_images(model, dataset, rows, batch_size) @ prototypes.T
        else:
            table = similarities(model, dataset, tokenizer, rows, texts, batch_size)  # (M, labels x prompts)
            table = table.unflatten(1, (len(labels), len(prompts))).mean(-1)
    one_hot = torch.zeros_like(table, dtype=torch.bool).cpu()
    one_hot[torch.arange(len(rows)), right] = True
    ranks = rank_rows(table.cpu().numpy(), one_hot.numpy())
    tops = [k for k in (1, 5) if k < len(labels)]
    return Scores({f"top-{k}": bootstrap(ranks <= k, k / len(labels)) for k in tops})


def fill_prompt(prompt: str, label: str) -> str:
    """The prompt with the label in it: ("a picture of a {}", "apple") -> "a picture of an apple"."""
    if label[:1].lower() in "aeiou":
        prompt = re.sub(r"\b([Aa]) \{\}", r"\1n {}", prompt)
    return prompt.replace("{}", label)


def _only_object(dataset: Any, row: int) -> str | None:
    objects = [region.phrase for region in dataset.regions(row) if region.kind == "object"]
    return ARTICLE.sub("", objects[0]) if len(objects) == 1 else None
