"""Retrieval of regions: each phrase finds its region among those of many images, each region its phrase.

Axes: n pairs of phrase and region, P distinct places, T distinct texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.data.batch import Box
from minivlp.evaluation.forward import check_words, chunks, distinct, embed_texts, first_rows, images_of, need
from minivlp.evaluation.retrieval import rank_rows
from minivlp.evaluation.score import Scores, bootstrap
from minivlp.inference import evaluating

KINDS = ("object", "phrase", "relation", "image")


def region_retrieval(
    model: Any, dataset: Any, tokenizer: Any, *, limit: int | None = 100, batch_size: int = 50
) -> Scores:
    """R@1 and R@5 among all regions of the first `limit` images, text to region and region to text.

    A distinct place (an image and a box; the whole image is one of them) is embedded once by `embed_regions`, a
    distinct text once by `embed_texts`; `score` compares them. By kind of region (`object`, `phrase`, `relation`,
    `image`): a place's texts of other kinds are not counted as wrong answers. Equal texts are right for each other's
    places. Whatever else may be true is not known and counts as wrong ("a heart" for a place that is called "a red
    heart"), so where names repeat, the best possible value is below 1. Chance is that of a random order; `n` counts
    regions.

    Raises ValueError if the dataset has no regions or a score is not finite.
    """
    need(model, "embed_regions")
    rows = first_rows(dataset, limit)
    asked = [(row, region) for row in rows for region in dataset.regions(row)]
    if not asked:
        raise ValueError("The dataset has no regions: this measure needs phrases with boxes.")
    places, place = distinct([(row, region.box) for row, region in asked])
    texts, text = distinct([region.phrase for _, region in asked])
    check_words(model, tokenizer, texts, "phrases")
    with evaluating(model):
        features = embed_texts(model, tokenizer, texts, batch_size)
        table = []
        for part in _by_image(places, batch_size):
            regions = _embed_places(model, dataset, part)
            table.append(torch.cat([model.score(regions, some) for some in features], dim=1).float().cpu())
    scored = torch.cat(table).numpy()  # (P, T)
    if not np.isfinite(scored).all():
        raise ValueError("The model's scores contain NaN or infinity, so they cannot be ranked.")
    place, text = place.numpy(), text.numpy()  # (n,) each
    images, kinds = np.array([row for row, _ in asked]), np.array([region.kind for _, region in asked])
    directions = {"text to region": (scored.T, text, place), "region to text": (scored, place, text)}
    scores = {}
    for direction, (by_query, queries, answers) in directions.items():
        ranks, right, among = _ranks_by_kind(by_query, queries, answers, kinds)
        for kind in ("", *(kind for kind in KINDS if kind in kinds)):
            of = kinds == kind if kind else slice(None)
            for k in (1, 5):
                chance = chance_by_pair(right[of], among[of], k)
                scores[f"{direction} R@{k} {kind}".strip()] = bootstrap(ranks[of] <= k, chance, images=images[of])
    return Scores(scores)


def chance_by_pair(right: np.ndarray, among: np.ndarray, k: int) -> float:
    """Probability that a random order of among[i] answers has one of the right[i] right ones in its first k places.

    right, among: (n,); the mean is over the n questions.
    """
    left = among[:, None] - np.arange(k)  # (n, k) answers not yet drawn
    return 1 - float(np.prod(np.clip(left - right[:, None], 0, None) / np.maximum(left, 1), axis=1).mean())


def _by_image(places: list[tuple[int, Box]], count: int) -> Iterator[list[tuple[int, Box]]]:
    """The places of `count` images at a time."""
    for part in chunks(list(dict.fromkeys(row for row, _ in places)), count):
        yield [place for place in places if part[0] <= place[0] <= part[-1]]  # rows are in ascending order


def _embed_places(model: Any, dataset: Any, places: list[tuple[int, Box]]) -> Tensor:
    """Features of boxes in the images of these rows, (n, ...); each image is encoded once."""
    rows, image_rows = distinct([row for row, _ in places])
    images = images_of(model, dataset, rows)
    boxes = torch.tensor([box for _, box in places], dtype=torch.float32)
    return model.embed_regions(images, boxes.to(images.device), image_rows.to(images.device))


def _ranks_by_kind(
    table: np.ndarray, queries: np.ndarray, answers: np.ndarray, kinds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of n pairs: the rank of the best right answer, the number of right answers, and of all answers, (n,).

    queries: (n,) row of `table`; answers: (n,) column of `table`; both describe each other. kinds: (n,) of the pair.
    Right are the answers of the pair's own kind. Those of other kinds are left out of the ranking.
    """
    ranks, right, among = np.zeros(len(queries)), np.zeros(len(queries), int), np.zeros(len(queries), int)
    true = np.zeros(table.shape, dtype=bool)
    true[queries, answers] = True
    for kind in dict.fromkeys(kinds):
        of = kinds == kind
        own = np.zeros_like(true)
        own[queries[of], answers[of]] = True
        ranked = own | ~true
        ranks[of] = rank_rows(np.where(ranked, table, -np.inf), own)[queries[of]]
        right[of], among[of] = own.sum(1)[queries[of]], ranked.sum(1)[queries[of]]
    return ranks, right, among
