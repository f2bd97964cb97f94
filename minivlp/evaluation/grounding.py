"""Where is it? Boxes predicted from phrases, and whether attention falls on what is named.

Axes: B batch, R regions; a grid has rows x columns patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from minivlp.data.batch import Box, Region
from minivlp.evaluation.forward import chunks, each_text, embed_texts, evaluating, first_rows, images_of, need
from minivlp.evaluation.retrieval import rank_rows
from minivlp.evaluation.score import Score, Scores, bootstrap

WHOLE_IMAGE: Box = (0.5, 0.5, 1.0, 1.0)
SIZES = ("small", "medium", "large")
GRAINS = ("object", "phrase", "relation", "image")


def grounding(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    mean_box: Box | None = None,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 250,
) -> Scores:
    """How well `ground` finds the box of every phrase: Acc@0.5, Acc@0.7, mean IoU, then Acc@0.5 by what makes it hard.

    By size: thirds of the boxes' area. By kind of region: `object` needs the noun, `phrase` its attributes, `relation`
    the other object. Whole-image regions are not asked. Then three baselines that keep one honest: answering with the
    whole image; with `mean_box`, the training set's (see `mean_box_of`); and the model's answer to the phrase of
    *another* object of the same image, scored against this one's box: what is found without reading the words.
    Chance is the better of the answers that look at nothing. A phrase that an image has several times ("person", of
    three people) is asked once, and any of its boxes is right; its size and kind are those of the first. `n` counts
    phrases.
    """
    need(model, "ground")
    asked: dict[tuple[int, str], list[Region]] = {}
    for row in first_rows(dataset, limit):
        for region in _boxed(dataset.regions(row)):
            asked.setdefault((row, region.phrase), []).append(region)
    if not asked:
        raise ValueError("The dataset has no regions: grounding needs phrases with boxes.")
    rows, phrases = np.array([row for row, _ in asked]), [phrase for _, phrase in asked]
    regions, truths = [same[0] for same in asked.values()], list(asked.values())
    truth = torch.tensor([region.box for region in regions], dtype=torch.float32)  # (n, 4)
    with evaluating(model):
        found = predict(model, dataset, tokenizer, rows, phrases, batch_size)
        wrong, others = _other_phrases(rows, truths, np.random.default_rng(seed))
        misled = predict(model, dataset, tokenizer, rows[wrong], others, batch_size) if others else None
    overlap = _best_iou(found, truths)
    blind = {"whole image": _best_iou(torch.tensor([WHOLE_IMAGE]).expand_as(truth), truths)}
    if mean_box is not None:
        blind["mean training box"] = _best_iou(torch.tensor([mean_box]).expand_as(truth), truths)

    def score(values: np.ndarray, guesses: list[np.ndarray], where: np.ndarray | slice = slice(None)) -> Score:
        chance = max(float(guess[where].mean()) for guess in guesses)
        return bootstrap(values[where], chance, images=rows[where])

    half, guessed = overlap >= 0.5, [guess >= 0.5 for guess in blind.values()]
    scores = {
        "Acc@0.5": score(half, guessed),
        "Acc@0.7": score(overlap >= 0.7, [guess >= 0.7 for guess in blind.values()]),
        "mean IoU": score(overlap, list(blind.values())),
    }
    third = np.digitize(_area(truth), np.quantile(_area(truth), [1 / 3, 2 / 3]))  # 0, 1, 2
    kinds = np.array([region.kind for region in regions])
    parts = [(size, third == i) for i, size in enumerate(SIZES)] + [(kind, kinds == kind) for kind in np.unique(kinds)]
    scores.update({f"Acc@0.5 {name}": score(half, guessed, where) for name, where in parts if where.any()})
    scores.update({f"baseline: {name}": score(guess >= 0.5, guessed) for name, guess in blind.items()})
    if misled is not None:
        missed = _best_iou(misled, [truths[i] for i in wrong]) >= 0.5
        chance = max(float(guess[wrong].mean()) for guess in guessed)
        scores["baseline: another object's phrase"] = bootstrap(missed, chance, images=rows[wrong])
    return Scores(scores)


def predict(
    model: Any, dataset: Any, tokenizer: Any, rows: Sequence[int], phrases: Sequence[str], batch_size: int = 250
) -> Tensor:
    """The model's box (R, 4) for phrase i in the image of row i, on the CPU. Phrases of one image encode it once, where
    the model can (`ground_many`) and they stand together."""
    boxes = []
    for part in chunks(range(len(rows)), batch_size):
        asked = [int(rows[i]) for i in part], [phrases[i] for i in part]
        boxes.append(each_text(model, "ground", dataset, tokenizer, *asked).float().cpu())
    found = torch.cat(boxes)
    if not found.isfinite().all():
        bad = int((~found.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"The box for {phrases[bad]!r} is {found[bad].tolist()}: the model's output is not finite.")
    return found


def region_retrieval(
    model: Any, dataset: Any, tokenizer: Any, *, limit: int | None = 100, batch_size: int = 50
) -> Scores:
    """R@1 and R@5 among all regions of the first `limit` images: each phrase finds its region, each region its phrase.

    A distinct place (image and box; the whole image is one like any other) is embedded once by `embed_regions`, a
    distinct text once by `embed_texts`. By grain (`object`, `phrase`, `relation`, `image`): the texts that are asked
    for, or that ask; a place's texts of other grains are no wrong answers. Equal texts are right for each other's
    places. What else may be true is not known and counts as wrong ("a heart" that finds what is called "a red heart"),
    so where names repeat the best value is below 1. Chance is a random order's; `n` counts regions.
    """
    need(model, "embed_regions")
    rows = first_rows(dataset, limit)
    asked = [(row, region) for row in rows for region in dataset.regions(row)]
    if not asked:
        raise ValueError("The dataset has no regions: this measure needs phrases with boxes.")
    places, place = _distinct([(row, region.box) for row, region in asked])
    texts, text = _distinct([region.phrase for _, region in asked])
    with evaluating(model):
        regions = torch.cat([_embed_places(model, dataset, part) for part in _by_image(places, batch_size)])
        table = (regions @ embed_texts(model, tokenizer, texts).T).cpu().numpy()  # (places, texts)
    if not np.isfinite(table).all():
        raise ValueError("The model's vectors hold NaN or infinity: nothing can be compared.")
    images, kinds = np.array([row for row, _ in asked]), np.array([region.kind for _, region in asked])
    scores = {}
    for way, near, asks, answers in (("text to region", table.T, text, place), ("region to text", table, place, text)):
        ranks, right, among = _ranks_by_kind(near, asks, answers, kinds)
        for kind in ("", *(grain for grain in GRAINS if grain in kinds)):
            of = kinds == kind if kind else slice(None)
            for k in (1, 5):
                chance = _blind(right[of], among[of], k)
                name = f"{way} R@{k} {kind}".strip()
                scores[name] = bootstrap(ranks[of] <= k, chance, images=images[of])
    return Scores(scores)


def _distinct(items: list) -> tuple[list, np.ndarray]:
    """The distinct items in order of appearance, and for each item the number of its like among them."""
    number = {item: i for i, item in enumerate(dict.fromkeys(items))}
    return list(number), np.array([number[item] for item in items])


def _by_image(places: list[tuple[int, Box]], many: int) -> Iterator[list[tuple[int, Box]]]:
    """The places of `many` images at a time."""
    for part in chunks(list(dict.fromkeys(row for row, _ in places)), many):
        yield [place for place in places if part[0] <= place[0] <= part[-1]]  # rows go up


def _embed_places(model: Any, dataset: Any, places: list[tuple[int, Box]]) -> Tensor:
    """Unit vectors (n, E) of boxes in the images of these rows, each image encoded once."""
    rows, which = np.unique([row for row, _ in places], return_inverse=True)
    images = images_of(model, dataset, rows.tolist())
    boxes = torch.tensor([box for _, box in places], dtype=torch.float32)
    return model.embed_regions(images, boxes.to(images.device), torch.from_numpy(which).to(images.device)).float()


def _ranks_by_kind(
    near: np.ndarray, asks: np.ndarray, answers: np.ndarray, kinds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of n pairs (asks[i] a row of `near`, answers[i] a column, both true of each other): the rank of the
    row's best answer of the pair's kind, how many such there are, and among how many they stand."""
    ranks, right, among = np.zeros(len(asks)), np.zeros(len(asks), int), np.zeros(len(asks), int)
    true = np.zeros(near.shape, dtype=bool)
    true[asks, answers] = True
    for kind in dict.fromkeys(kinds):
        of = kinds == kind
        mine = np.zeros_like(true)
        mine[asks[of], answers[of]] = True
        there = mine | ~true  # what is true in another way is not asked for, but no wrong answer either
        ranks[of] = rank_rows(np.where(there, near, -np.inf), mine)[asks[of]]
        right[of], among[of] = mine.sum(1)[asks[of]], there.sum(1)[asks[of]]
    return ranks, right, among


def _blind(right: np.ndarray, among: np.ndarray, k: int) -> float:
    """How often a random order of `among` (n,) answers has one of the `right` (n,) ones in its first k places."""
    left = among[:, None] - np.arange(k)  # (n, k) answers not yet drawn
    return 1 - float(np.prod(np.clip(left - right[:, None], 0, None) / np.maximum(left, 1), axis=1).mean())


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of box i with box i: two times (R, 4) as cx, cy, w, h -> (R,). Negative sides are 0."""
    corners = [box_convert(torch.cat([b[:, :2], b[:, 2:].clamp(min=0)], 1), "cxcywh", "xyxy") for b in (first, second)]
    pairs = zip(*(c.split(256) for c in corners), strict=True)  # torchvision compares all with all: keep squares small
    return torch.cat([box_iou(a, b).diagonal() for a, b in pairs]).nan_to_num(0.0)


def mean_box_of(dataset: Any, limit: int | None = None) -> Box:
    """The mean box of a training set's regions, whole images left out: the best answer of one who never looks."""
    boxes = [region.box for row in first_rows(dataset, limit) for region in _boxed(dataset.regions(row))]
    if not boxes:
        raise ValueError("The dataset has no regions, hence no mean box.")
    cx, cy, w, h = np.mean(boxes, axis=0).tolist()
    return cx, cy, w, h


def attention_in_box(attention: Tensor, boxes: Tensor, images: Sequence[int] | None = None) -> Score:
    """The share of the attention that falls inside the box of what is named.

    attention (B, rows, columns), not negative, of any total; boxes (B, 4); `images` (B,) if several maps are of one
    image. A patch that the box cuts counts by the part inside. Chance is what evenly spread attention would give: the
    box's share of the image.
    """
    share = _shares(attention)
    covered, _ = cover(boxes.float().cpu(), *attention.shape[-2:])
    return bootstrap((share * covered).flatten(1).sum(1).numpy(), float(covered.mean()), images=images)


def pointing_game(attention: Tensor, boxes: Tensor, images: Sequence[int] | None = None) -> Score:
    """How often the most attended patch has its centre in the box of what is named; arguments as `attention_in_box`.

    Chance is the share of patches whose centre lies in the box. Source: Zhang et al. 2016, "Top-down neural attention
    by excitation backprop" (section 4.1).
    """
    top = _shares(attention).flatten(1).argmax(1, keepdim=True)  # (B, 1)
    _, centres = cover(boxes.float().cpu(), *attention.shape[-2:])
    hits = centres.flatten(1).gather(1, top)[:, 0]
    return bootstrap(hits.numpy(), float(centres.mean()), images=images)


def _shares(attention: Tensor) -> Tensor:
    """Each map divided by its sum. Raises ValueError if a map is negative somewhere, zero everywhere or not finite."""
    weights = attention.detach().float().cpu()
    total = weights.sum((1, 2), keepdim=True)
    if (weights < 0).any() or (total <= 0).any() or not weights.isfinite().all():
        raise ValueError("Attention must be finite, not negative, and not zero everywhere.")
    return weights / total


def cover(boxes: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """How much of each patch lies in the box (0..1), and whether its centre does (0 or 1): (B, rows, columns) each."""

    def along(centre: Tensor, length: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        low, high = (centre - length / 2)[:, None] * cells, (centre + length / 2)[:, None] * cells  # (B, 1) in cells
        start = torch.arange(cells)  # (cells,)
        overlap = (torch.minimum(high, start + 1) - torch.maximum(low, start)).clamp(min=0)  # (B, cells)
        return overlap, ((low <= start + 0.5) & (start + 0.5 < high)).float()

    across, centre_x = along(boxes[:, 0], boxes[:, 2], columns)
    down, centre_y = along(boxes[:, 1], boxes[:, 3], rows)
    return down[:, :, None] * across[:, None, :], centre_y[:, :, None] * centre_x[:, None, :]


def _boxed(regions: Sequence[Region]) -> list[Region]:
    return [region for region in regions if region.kind != "image"]


def _area(boxes: Tensor) -> np.ndarray:
    return (boxes[:, 2] * boxes[:, 3]).numpy()


def _best_iou(boxes: Tensor, truths: Sequence[Sequence[Region]]) -> np.ndarray:
    """How well box i (n, 4) fits the best of the regions truths[i], (n,)."""
    of = np.repeat(np.arange(len(truths)), [len(same) for same in truths])
    flat = torch.tensor([region.box for same in truths for region in same], dtype=torch.float32)
    best = np.zeros(len(truths), dtype=np.float32)
    np.maximum.at(best, of, iou(boxes[torch.from_numpy(of)], flat).numpy())
    return best


def _other_phrases(
    rows: np.ndarray, truths: Sequence[Sequence[Region]], rng: np.random.Generator
) -> tuple[np.ndarray, list[str]]:
    """For each phrase with another object beside its own: its index, and a phrase of that object, of the same kind."""
    of_row: dict[int, list[int]] = {}
    for i, row in enumerate(rows.tolist()):
        of_row.setdefault(row, []).append(i)
    index, phrases = [], []
    for i, row in enumerate(rows.tolist()):
        others = []
        for j in of_row[row]:
            theirs = torch.tensor([region.box for region in truths[j]], dtype=torch.float32)
            if truths[j][0].kind == truths[i][0].kind and (_best_iou(theirs, [truths[i]] * len(theirs)) < 0.5).all():
                others.append(truths[j][0].phrase)
        if others:
            index.append(i)
            phrases.append(others[rng.integers(len(others))])
    return np.array(index, dtype=int), phrases
