"""Visual grounding: how well the predicted box of a phrase fits. Axes: R phrases with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from minivlp.data.batch import Box, Region
from minivlp.data.dataset import WHOLE_IMAGE
from minivlp.evaluation.attention_maps import attention_in_box, box_around, pointing_game
from minivlp.evaluation.forward import check_words, chunks, first_rows, for_each_text, need
from minivlp.evaluation.region_retrieval import region_retrieval
from minivlp.evaluation.score import Score, Scores, bootstrap
from minivlp.inference import evaluating

__all__ = [  # all measures that compare with boxes
    "attention_in_box",
    "box_around",
    "grounding",
    "iou",
    "mean_box_of",
    "pointing_game",
    "predict",
    "region_retrieval",
]
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
    """How well `ground` finds the box of each phrase: Acc@0.5, Acc@0.7 and mean IoU, then Acc@0.5 of subsets.

    The subsets are thirds by area of the box (small, medium, large), and kinds of region: `object` needs the noun,
    `phrase` its attributes, `relation` the other object. Regions of kind `image` are left out. A phrase that an image
    has several times ("person", of three people) is asked once, and any of its boxes is right; its size and kind are
    those of the first. `n` counts phrases.

    Baselines: the whole image as the answer; with `mean_box`, the mean box of the training set (see `mean_box_of`); and
    the model's answer to the phrase of another object of the same image, compared with this object's box: what the
    model finds without reading the words. Chance is the better of the first two.
    """
    need(model, "ground")
    asked: dict[tuple[int, str], list[Region]] = {}
    for row in first_rows(dataset, limit):
        for region in _boxed(dataset.regions(row)):
            asked.setdefault((row, region.phrase), []).append(region)
    if not asked:
        raise ValueError("The dataset has no regions: grounding needs phrases with boxes.")
    rows, phrases = np.array([row for row, _ in asked]), [phrase for _, phrase in asked]
    check_words(model, tokenizer, phrases, "phrases")
    truths = list(asked.values())  # for each phrase the regions that it names
    with evaluating(model):
        found = predict(model, dataset, tokenizer, rows, phrases, batch_size)
        misled, others = _other_phrases(rows, truths, np.random.default_rng(seed))
        found_other = predict(model, dataset, tokenizer, rows[misled], others, batch_size) if others else None
    overlap = _best_iou(found, truths)
    blind = {"whole image": _overlap_of(WHOLE_IMAGE, truths)}
    if mean_box is not None:
        blind["mean training box"] = _overlap_of(mean_box, truths)

    def score(values: np.ndarray, guesses: list[np.ndarray], where: np.ndarray | slice = slice(None)) -> Score:
        chance = max(float(guess[where].mean()) for guess in guesses)
        return bootstrap(values[where], chance, images=rows[where])

    half, guessed = overlap >= 0.5, [guess >= 0.5 for guess in blind.values()]
    scores = {
        "Acc@0.5": score(half, guessed),
        "Acc@0.7": score(overlap >= 0.7, [guess >= 0.7 for guess in blind.values()]),
        "mean IoU": score(overlap, list(blind.values())),
    }
    scores.update({f"Acc@0.5 {name}": score(half, guessed, where) for name, where in _subsets(truths) if where.any()})
    scores.update({f"baseline: {name}": score(guess >= 0.5, guessed) for name, guess in blind.items()})
    if found_other is not None:
        hits = _best_iou(found_other, [truths[i] for i in misled]) >= 0.5
        chance = max(float(guess[misled].mean()) for guess in guessed)
        scores["baseline: another object's phrase"] = bootstrap(hits, chance, images=rows[misled])
    return Scores(scores)


def predict(
    model: Any, dataset: Any, tokenizer: Any, rows: Sequence[int], phrases: Sequence[str], batch_size: int = 250
) -> Tensor:
    """The predicted box (R, 4) of phrase i in the image of row i, on the CPU.

    A model with `ground_many` encodes each image once, if phrases of one image are neighbors. Raises ValueError if a
    box is not finite.
    """
    boxes = []
    for part in chunks(range(len(rows)), batch_size):
        asked = [int(rows[i]) for i in part], [phrases[i] for i in part]
        boxes.append(for_each_text(model, "ground", dataset, tokenizer, *asked).float().cpu())
    found = torch.cat(boxes)
    if not found.isfinite().all():
        bad = int((~found.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"The box for {phrases[bad]!r} is {found[bad].tolist()}: the model's output is not finite.")
    return found


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of the boxes of equal rows, (R, 4) and (R, 4) as cx, cy, w, h -> (R,).

    Negative widths and heights, which a model may predict, count as 0.
    """
    corners = [box_convert(torch.cat([b[:, :2], b[:, 2:].clamp(min=0)], 1), "cxcywh", "xyxy") for b in (first, second)]
    pairs = zip(*(c.split(256) for c in corners), strict=True)  # torchvision compares all with all: keep squares small
    return torch.cat([box_iou(a, b).diagonal() for a, b in pairs]).nan_to_num(0.0)


def mean_box_of(dataset: Any, limit: int | None = None) -> Box:
    """The mean box of a training set's regions, those of kind `image` left out: a baseline for `grounding`.

    Raises ValueError if there are no such regions.
    """
    boxes = [region.box for row in first_rows(dataset, limit) for region in _boxed(dataset.regions(row))]
    if not boxes:
        raise ValueError("The dataset has no regions, hence no mean box.")
    cx, cy, w, h = np.mean(boxes, axis=0).tolist()
    return cx, cy, w, h


def _boxed(regions: Sequence[Region]) -> list[Region]:
    return [region for region in regions if region.kind != "image"]


def _subsets(truths: Sequence[Sequence[Region]]) -> list[tuple[str, np.ndarray]]:
    """Name of each subset of the phrases, and which phrases belong to it, (R,) bool."""
    area = np.array([same[0].box[2] * same[0].box[3] for same in truths], dtype=np.float32)
    third = np.digitize(area, np.quantile(area, [1 / 3, 2 / 3]))  # (R,) 0, 1 or 2
    kinds = np.array([same[0].kind for same in truths])
    return [(size, third == i) for i, size in enumerate(SIZES)] + [(kind, kinds == kind) for kind in np.unique(kinds)]


def _best_iou(boxes: Tensor, truths: Sequence[Sequence[Region]]) -> np.ndarray:
    """The IoU of box i (R, 4) with the best fitting of the regions truths[i], (R,)."""
    of = np.repeat(np.arange(len(truths)), [len(same) for same in truths])
    flat = torch.tensor([region.box for same in truths for region in same], dtype=torch.float32)
    best = np.zeros(len(truths), dtype=np.float32)
    np.maximum.at(best, of, iou(boxes[torch.from_numpy(of)], flat).numpy())
    return best


def _overlap_of(box: Box, truths: Sequence[Sequence[Region]]) -> np.ndarray:
    """The same for one box as the answer to every phrase."""
    return _best_iou(torch.tensor([box], dtype=torch.float32).expand(len(truths), -1), truths)


def _other_phrases(
    rows: np.ndarray, truths: Sequence[Sequence[Region]], rng: np.random.Generator
) -> tuple[np.ndarray, list[str]]:
    """Indices of the phrases whose image has another object, and for each a phrase of that object, of the same kind."""
    of_row: dict[int, list[int]] = {}
    for i, row in enumerate(rows.tolist()):
        of_row.setdefault(row, []).append(i)
    index, phrases = [], []
    for i, row in enumerate(rows.tolist()):
        others = []
        for j in of_row[row]:
            boxes = torch.tensor([region.box for region in truths[j]], dtype=torch.float32)
            if truths[j][0].kind == truths[i][0].kind and (_best_iou(boxes, [truths[i]] * len(boxes)) < 0.5).all():
                others.append(truths[j][0].phrase)
        if others:
            index.append(i)
            phrases.append(others[rng.integers(len(others))])
    return np.array(index, dtype=int), phrases
