"""Flips and crops that keep boxes and words true (X-VLM, Zeng et al. 2022, crops around regions and flips with care).

`hflip` and `crop` take a `Sample` and return one; `truth` is None afterwards, as the structured scene is no longer what
is shown. `Augmented` makes a dataset of them to train on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from minivlp.data.batch import Box, Region, Sample

_SIDE = r"(?P<side>left|right)"
_BODY = "side|hand|half|edge|corner|arm|leg|foot|ear|eye|paw|wing|wheel|shoulder|knee"
# "left" and "right" are exchanged only where they can mean nothing but a side; "she left", "right behind", "the right
# answer" are not of these forms, and a sample with any such word is not flipped at all.
_ENGLISH = [
    rf"\b{_SIDE}(?= of\b)",
    rf"\b(?:on|to|at|in|from|toward|towards) (?:the|its|his|her|their|my|your) (?:[a-z]+[- ])?{_SIDE}"
    r"(?=\s*(?:$|[.,;:!?)]|(?:and|is|are|of|side|hand|half|edge|corner)\b))",
    rf"\b{_SIDE}(?=[- ](?:{_BODY})s?\b)",
    rf"\b{_SIDE}(?=most\b|ward\b|wards\b)",
    rf"\b(?:upper|lower|top|bottom)[- ]{_SIDE}\b",
    rf"^\s*{_SIDE}\s*[.?!]?\s*$",
]
_CHINESE = [
    r"(?P<side>[左右])(?=[边侧面方上下半角手脚臂腿耳眼])",
    r"(?<=[向往朝靠偏最在])(?P<side>[左右])(?!右)",
    r"^\s*(?P<side>[左右])\s*$",
]
# "What is left of the cake" is no place, unless it is asked: "what is left of the dog?"
_REMAINS = re.compile(
    r"\b(?:what|what's|all|nothing|little|much|none)(?: (?:is|was|that|remains))* left of\b(?!.*\?)", re.IGNORECASE
)
_SAYS_SIDE = re.compile(r"\b(?:left|right)|clockwise|[左右]|[顺逆]时针", re.IGNORECASE)
_SWAP = {"left": "right", "right": "left", "左": "右", "右": "左"}
_SAYS_WHERE = re.compile(
    r"\b(?:left|right|top|bottom|middle|cent(?:er|re)|above|below|under|over|behind|between|beside|next|near|upper|lower"
    r"|corner|background|foreground)|[左右上下中前后间旁角]",
    re.IGNORECASE,
)


def mirror_words(text: str) -> str | None:
    """The text with left and right exchanged, in English and Chinese; None where that cannot be done for certain.

    `"a dog left of a cup"` → `"a dog right of a cup"`; `"a man left the room"` → None. A text without sides is its own.
    """
    if _REMAINS.search(text):
        return None
    found: dict[int, re.Match[str]] = {}
    for pattern in (*_ENGLISH, *_CHINESE):
        for match in re.finditer(pattern, text, re.IGNORECASE):
            found[match.start("side")] = match
    for match in reversed([found[start] for start in sorted(found)]):
        start, end = match.span("side")
        side = _SWAP[match["side"].lower()]
        side = side.upper() if len(side) > 1 and match["side"].isupper() else side
        side = side.capitalize() if match["side"].istitle() else side
        text = text[:start] + side + text[end:]
    # What still names a side at a place that was not exchanged is of no form that we know. An exchange between left
    # and right moves the letters behind it by one, so count instead of comparing places.
    return text if len(_SAYS_SIDE.findall(text)) == len(found) else None


def hflip(sample: Sample) -> Sample:
    """The sample seen in a mirror: pixels and boxes mirrored, left and right exchanged in every text.

    Where any text cannot be exchanged for certain ("a man left the room", "clockwise"), the sample is returned as it
    is. Letters inside the picture are mirrored too; who needs them readable should not flip.
    """
    captions = [mirror_words(caption) for caption in sample.captions]
    phrases = [mirror_words(region.phrase) for region in sample.regions]
    questions = [(mirror_words(asked), mirror_words(answer)) for asked, answer in sample.questions]
    if None in captions or None in phrases or any(None in pair for pair in questions):
        return sample
    regions = [
        Region((1 - region.box[0], *region.box[1:]), phrase, region.kind)
        for region, phrase in zip(sample.regions, phrases, strict=True)
    ]
    image = np.ascontiguousarray(sample.image[:, ::-1])  # (H, W, 3)
    return replace(sample, image=image, captions=captions, regions=regions, questions=questions, truth=None)


def crop(sample: Sample, box: Box, keep: float = 0.5) -> Sample:
    """The part of the picture inside `box` (cx, cy, w, h as fractions), with what is still true of it.

    * A region stays if more than `keep` of its area does, its box cut to the crop (X-VLM keeps above one half).
    * Captions and questions speak of the whole picture: they stay if more than `keep` of it does and every region.
    * A phrase that says where ("left of a dog", "in the middle") or of kind `relation` may name what is cut off: it
      stays under the same condition.

    So captions may come back empty. Raises ValueError for a box that is empty or leaves the picture.
    """
    height, width = sample.image.shape[:2]
    cx, cy, w, h = box
    corners = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    if not (np.isfinite(corners).all() and w > 0 and h > 0 and corners.min() > -1e-6 and corners.max() < 1 + 1e-6):
        raise ValueError(f"the box of a crop is (cx, cy, w, h) inside 0..1 with w, h > 0, not {box}")
    x0, x1 = _whole_pixels(corners[0], corners[2], width)
    y0, y1 = _whole_pixels(corners[1], corners[3], height)
    window = (x0 / width, y0 / height, x1 / width, y1 / height)
    cut = [(region, *_inside(region.box, window)) for region in sample.regions]
    whole = (x1 - x0) * (y1 - y0) > keep * width * height and all(share > keep for *_, share in cut)
    regions = [
        Region(inner, region.phrase, region.kind)
        for region, inner, share in cut
        if share > keep and (whole or not (region.kind in ("relation", "image") or _SAYS_WHERE.search(region.phrase)))
    ]
    image = np.ascontiguousarray(sample.image[y0:y1, x0:x1])  # (H', W', 3)
    captions, questions = (list(sample.captions), list(sample.questions)) if whole else ([], [])
    return replace(sample, image=image, captions=captions, regions=regions, questions=questions, truth=None)


def _whole_pixels(start: float, end: float, side: int) -> tuple[int, int]:
    first = min(max(round(start * side), 0), side - 1)
    return first, min(max(round(end * side), first + 1), side)


def _inside(box: Box, window: Box) -> tuple[Box, float]:
    """The box as the window sees it (cx, cy, w, h in fractions of the window), and the share of its area inside."""
    cx, cy, w, h = box
    x0, y0, x1, y1 = window
    left, right = max(cx - w / 2, x0), min(cx + w / 2, x1)
    top, bottom = max(cy - h / 2, y0), min(cy + h / 2, y1)
    if right <= left or bottom <= top:
        return box, 0.0
    wide, high = x1 - x0, y1 - y0
    w_in, h_in = right - left, bottom - top
    inner = ((left - x0 + w_in / 2) / wide, (top - y0 + h_in / 2) / high, w_in / wide, h_in / high)
    return inner, w_in * h_in / (w * h)


WHOLE: Box = (0.5, 0.5, 1.0, 1.0)
GRID = 32  # windows of `Augmented` begin and end at thirty-seconds of a side


class Augmented:
    """A dataset with every picture in `copies` versions: as it is, and flipped, cropped, or both.

        loader = Loader(Augmented(train), tokenizer, 64, 64, regions_per_image=3)

    Row r is version r % copies of row r // copies; what it looks like follows from `seed` and r alone, so batches stay
    a pure function of the seed and the step. One epoch shows every version once. Versions share their `image_id`: they
    are never each other's wrong answers. A crop holds at least one region whole (without regions: more than half of
    the picture); where no word about the whole is left, the phrases of what is seen stand in for captions, and where
    nothing at all is left, the picture stays whole.
    """

    def __init__(self, dataset: Any, copies: int = 4, seed: int = 0) -> None:
        if copies < 1:
            raise ValueError(f"copies is a number of versions from 1 on, not {copies}")
        self.dataset, self.copies, self.seed = dataset, copies, seed

    def __len__(self) -> int:
        return self.copies * len(self.dataset)

    def __getitem__(self, row: int) -> Sample:
        """The picture at its own size, cut out and turned, with the words that are still true."""
        words, window, flipped = self._version(row)
        sample = self.dataset[row // self.copies]
        height, width = sample.image.shape[:2]
        size = (max(1, round(window[2] * width)), max(1, round(window[3] * height)))
        return replace(words, image=_cut(sample.image, window, flipped, size), source=sample.source)

    def captions(self, row: int) -> list[str]:
        return self._version(row)[0].captions

    def regions(self, row: int) -> list[Region]:
        return self._version(row)[0].regions

    def image_id(self, row: int) -> int:
        return self.dataset.image_id(row // self.copies)

    def pixels(self, rows: Sequence[int], size: int) -> np.ndarray:
        """uint8 pixels (B, size, size, 3): each window squashed to a square, cut from a picture of twice the size."""
        out = np.zeros((len(rows), size, size, 3), np.uint8)
        versions = [self._version(int(row)) for row in rows]
        for scale, which in ((1, False), (2, True)):
            here = [i for i, (_, window, _) in enumerate(versions) if (window != WHOLE) == which]
            whole = self.dataset.pixels([int(rows[i]) // self.copies for i in here], scale * size) if here else []
            for i, image in zip(here, whole, strict=True):
                out[i] = _cut(image, *versions[i][1:], (size, size))
        return out

    def _version(self, row: int) -> tuple[Sample, Box, bool]:
        """Words and boxes of this row (its image is a stand-in), the window that is cut out, whether it is turned."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        under, copy = divmod(row, self.copies)
        blank = np.broadcast_to(np.uint8(0), (GRID, GRID, 3))  # words and boxes need no pixels
        image_id, captions = self.dataset.image_id(under), self.dataset.captions(under)
        sample, window = Sample(blank, image_id, captions, self.dataset.regions(under)), WHOLE
        if copy == 0:
            return sample, window, False
        rng = np.random.default_rng((self.seed, row))
        flip, cut = ((True, False), (False, True), (True, True))[rng.integers(3)]
        if cut:
            chosen = _window(sample.regions, rng)
            part = crop(sample, chosen)
            part.captions = part.captions or list(dict.fromkeys(region.phrase for region in part.regions))
            if part.captions:
                sample, window = part, chosen
        turned = hflip(sample) if flip else sample
        return turned, window, turned is not sample

    def __repr__(self) -> str:
        return f"Augmented({self.dataset!r}, copies={self.copies})"


def _window(regions: Sequence[Region], rng: np.random.Generator) -> Box:
    """A random window on the grid, half of each side or more, around one of the boxes; three quarters if none is."""
    boxes = [region.box for region in regions if region.kind != "image"]
    cx, cy, w, h = boxes[rng.integers(len(boxes))] if boxes else (0.5, 0.5, 0, 0)
    shortest = GRID // 2 if boxes else 3 * GRID // 4
    window = []
    for low, high in ((cx - w / 2, cx + w / 2), (cy - h / 2, cy + h / 2)):
        low, high = max(0, int(np.floor(low * GRID))), min(GRID, int(np.ceil(high * GRID)))
        length = int(rng.integers(max(shortest, high - low), GRID + 1))
        start = int(rng.integers(max(0, high - length), min(low, GRID - length) + 1))
        window.append(((start + length / 2) / GRID, length / GRID))
    (cx, w), (cy, h) = window
    return cx, cy, w, h


def _cut(image: np.ndarray, window: Box, flip: bool, size: tuple[int, int]) -> np.ndarray:
    """The window of a picture (H, W, 3) at a size (width, height), seen in a mirror if `flip`."""
    if window != WHOLE or image.shape[1::-1] != size:
        cx, cy, w, h = window
        height, width = image.shape[:2]
        corners = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, box=corners, reducing_gap=3.0))
    return np.ascontiguousarray(image[:, :: -1 if flip else 1])
