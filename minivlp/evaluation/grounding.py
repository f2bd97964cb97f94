"""Where is it? Boxes predicted from phrases, and whether attention falls on what is named.

Axes: B batch, R regions; a grid has rows x columns patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from minivlp.data.batch import Box, Region
from minivlp.evaluation.forward import chunks, evaluating, first_rows, images_of, need, texts_of
from minivlp.evaluation.score import Score, Scores, bootstrap

WHOLE_IMAGE: Box = (0.5, 0.5, 1.0, 1.0)
SIZES = ("small", "medium", "large")


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
    Chance is the better of the answers that look at nothing. `n` counts phrases.
    """
    need(model, "ground")
    asked = [(row, region) for row in first_rows(dataset, limit) for region in _boxed(dataset.regions(row))]
    if not asked:
        raise ValueError("The dataset has no regions: grounding needs phrases with boxes.")
    rows, regions = np.array([row for row, _ in asked]), [region for _, region in asked]
    truth = torch.tensor([region.box for region in regions], dtype=torch.float32)  # (R, 4)
    with evaluating(model):
        found = predict(model, dataset, tokenizer, rows, [region.phrase for region in regions], batch_size)
        wrong, phrases = _other_phrases(rows, regions, np.random.default_rng(seed))
        misled = predict(model, dataset, tokenizer, rows[wrong], phrases, batch_size) if phrases else None
    overlap = iou(found, truth).numpy()
    blind = {"whole image": iou(torch.tensor([WHOLE_IMAGE]).expand_as(truth), truth).numpy()}
    if mean_box is not None:
        blind["mean training box"] = iou(torch.tensor([mean_box]).expand_as(truth), truth).numpy()

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
        missed = iou(misled, truth[wrong]).numpy() >= 0.5
        chance = max(float(guess[wrong].mean()) for guess in guessed)
        scores["baseline: another object's phrase"] = bootstrap(missed, chance, images=rows[wrong])
    return Scores(scores)


def predict(
    model: Any, dataset: Any, tokenizer: Any, rows: Sequence[int], phrases: Sequence[str], batch_size: int = 250
) -> Tensor:
    """The model's box (R, 4) for phrase i in the image of row i, on the CPU."""
    boxes = []
    for part in chunks(range(len(rows)), batch_size):
        images = images_of(model, dataset, [int(rows[i]) for i in part])
        boxes.append(model.ground(images, *texts_of(model, tokenizer, [phrases[i] for i in part])).float().cpu())
    found = torch.cat(boxes)
    if not found.isfinite().all():
        bad = int((~found.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"The box for {phrases[bad]!r} is {found[bad].tolist()}: the model's output is not finite.")
    return found


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


def _other_phrases(
    rows: np.ndarray, regions: Sequence[Region], rng: np.random.Generator
) -> tuple[np.ndarray, list[str]]:
    """For each region with another object beside it: its index, and a phrase of that other object, of the same kind."""
    of_row: dict[int, list[int]] = {}
    for i, row in enumerate(rows.tolist()):
        of_row.setdefault(row, []).append(i)
    index, phrases = [], []
    for i, row in enumerate(rows.tolist()):
        mine = torch.tensor([regions[i].box])
        others = [
            regions[j].phrase
            for j in of_row[row]
            if regions[j].kind == regions[i].kind and float(iou(mine, torch.tensor([regions[j].box]))) < 0.5
        ]
        if others:
            index.append(i)
            phrases.append(others[rng.integers(len(others))])
    return np.array(index, dtype=int), phrases
