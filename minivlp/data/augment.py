"""Flips and crops that keep boxes and texts true, as in X-VLM (Zeng et al. 2022).

`hflip` and `crop` take a `Sample` and return one. Its `truth` is None, because the structured scene does not describe
the new image. `Augmented` is a dataset of such samples for training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from minivlp.data.batch import Box, Region, Sample
from minivlp.data.dataset import WHOLE_IMAGE, Dataset, Size, Wrapper, height_width

_SIDE = r"(?P<side>left|right)"
_BODY = "side|hand|half|edge|corner|arm|leg|foot|ear|eye|paw|wing|wheel|shoulder|knee"
# "left" and "right" are exchanged only in forms that always mean a side. "she left", "right behind" and "the right
# answer" are no such forms; a sample with one of them is not flipped.
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
# "What is left of the cake" is not a position, except in a question: "what is left of the dog?"
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
    """The text with left and right exchanged, in English and Chinese; None if the meaning of a word is uncertain.

    `"a dog left of a cup"` → `"a dog right of a cup"`; `"a man left the room"` → None. A text without sides is returned
    unchanged.
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
    # A side that was not exchanged has an unknown form. Counting finds it; positions would not, because an exchange of
    # left and right shifts the letters after it.
    return text if len(_SAYS_SIDE.findall(text)) == len(found) else None


def hflip(sample: Sample) -> Sample:
    """The sample mirrored horizontally: pixels, boxes, and left and right in every text.

    If one of the texts is uncertain ("a man left the room", "clockwise"), the sample itself is returned. Letters inside
    the image are mirrored too.
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
    """The part of the image inside `box` (cx, cy, w, h as fractions), with the texts that are still true.

    * A region stays if more than the share `keep` of its area is inside; its box is cut (X-VLM: one half).
    * Captions and questions describe the whole image. They stay if the share of the image that is inside, and that of
      every region, is above `keep`.
    * A phrase with a position ("left of a dog", "in the middle") or of kind `relation` may mention something that is
      cut off. It stays under the same condition.

    So there may be no caption left. Raises ValueError for a box that is empty or not inside the image.
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
    """The part of the box inside the window (cx, cy, w, h as fractions of the window), and its share of the area."""
    cx, cy, w, h = box
    x0, y0, x1, y1 = window
    left, right = max(cx - w / 2, x0), min(cx + w / 2, x1)
    top, bottom = max(cy - h / 2, y0), min(cy + h / 2, y1)
    if right <= left or bottom <= top:
        return box, 0.0
    width, height = x1 - x0, y1 - y0
    w_in, h_in = right - left, bottom - top
    inner = ((left - x0 + w_in / 2) / width, (top - y0 + h_in / 2) / height, w_in / width, h_in / height)
    return inner, w_in * h_in / (w * h)


_GRID = 32  # the windows of `Augmented` start and end at multiples of 1/32 of a side


class Augmented(Wrapper):
    """A dataset with every image in `copies` versions: unchanged, and flipped, cropped, or both.

        loader = Loader(Augmented(train), tokenizer, 64, 64, regions_per_image=3)

    Row r is version r % copies of row r // copies. It depends on `seed` and r only, so batches stay a pure function of
    seed and step. One epoch contains every version once. Versions have the same `image_id`, so they are never negatives
    of each other. A crop contains at least one region completely; an image without regions keeps more than half of its
    area. If no caption is still true of the crop, the phrases of its regions replace the captions. If there are none
    either, the image is not cropped.
    """

    forwarded = ("language",)  # scenes, questions and statements describe the image before it was flipped and cropped

    def __init__(self, dataset: Dataset, copies: int = 4, seed: int = 0) -> None:
        if copies < 1:
            raise ValueError(f"copies is a number of versions from 1 on, not {copies}")
        super().__init__(dataset)
        self.copies, self.seed = copies, seed

    def __len__(self) -> int:
        return self.copies * len(self.dataset)

    def __getitem__(self, row: int) -> Sample:
        """The version of the image, at the resolution of the file, with the texts that are still true."""
        texts, window, flipped = self._version(row)
        sample = self.dataset[row // self.copies]
        height, width = sample.image.shape[:2]
        size = (max(1, round(window[3] * height)), max(1, round(window[2] * width)))
        return replace(texts, image=_cut(sample.image, window, flipped, size), source=sample.source)

    def captions(self, row: int) -> list[str]:
        """The captions that are true of this version."""
        return self._version(row)[0].captions

    def regions(self, row: int) -> list[Region]:
        """The regions of this version, with boxes relative to it."""
        return self._version(row)[0].regions

    def image_id(self, row: int) -> int:
        """The id of the image, the same for all its versions."""
        return self.dataset.image_id(row // self.copies)

    def pixels(self, rows: Sequence[int], size: Size) -> np.ndarray:
        """Images (B, H, W, 3) uint8. Windows are cut from images of twice this size and resized without cropping."""
        height, width = height_width(size)
        out = np.zeros((len(rows), height, width, 3), np.uint8)
        versions = [self._version(int(row)) for row in rows]
        for scale, cropped in ((1, False), (2, True)):
            here = [i for i, (_, window, _) in enumerate(versions) if (window != WHOLE_IMAGE) == cropped]
            inner = [int(rows[i]) // self.copies for i in here]
            larger = scale * size if isinstance(size, int) else (scale * height, scale * width)
            images = self.dataset.pixels(inner, larger) if here else []
            for i, image in zip(here, images, strict=True):
                out[i] = _cut(image, *versions[i][1:], (height, width))
        return out

    def _version(self, row: int) -> tuple[Sample, Box, bool]:
        """Texts and boxes of this row (with a blank image), the window that is cut out, and whether it is flipped."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        inner, copy = divmod(row, self.copies)
        blank = np.broadcast_to(np.uint8(0), (_GRID, _GRID, 3))  # texts and boxes need no pixels
        captions, regions = self.dataset.captions(inner), self.dataset.regions(inner)
        sample, window = Sample(blank, self.dataset.image_id(inner), captions, regions), WHOLE_IMAGE
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
        flipped = hflip(sample) if flip else sample
        return flipped, window, flipped is not sample

    def __repr__(self) -> str:
        return f"Augmented({self.dataset!r}, copies={self.copies})"


def _window(regions: Sequence[Region], rng: np.random.Generator) -> Box:
    """A random window on the grid around one of the boxes: at least half of each side, without boxes three quarters."""
    boxes = [region.box for region in regions if region.kind != "image"]
    cx, cy, w, h = boxes[rng.integers(len(boxes))] if boxes else (0.5, 0.5, 0, 0)
    shortest = _GRID // 2 if boxes else 3 * _GRID // 4
    window = []
    for low, high in ((cx - w / 2, cx + w / 2), (cy - h / 2, cy + h / 2)):
        low, high = max(0, int(np.floor(low * _GRID))), min(_GRID, int(np.ceil(high * _GRID)))
        length = int(rng.integers(max(shortest, high - low), _GRID + 1))
        start = int(rng.integers(max(0, high - length), min(low, _GRID - length) + 1))
        window.append(((start + length / 2) / _GRID, length / _GRID))
    (cx, w), (cy, h) = window
    return cx, cy, w, h


def _cut(image: np.ndarray, window: Box, flip: bool, size: tuple[int, int]) -> np.ndarray:
    """The window of an image (H, W, 3), resized to `size` (height, width), and mirrored if `flip`."""
    if window != WHOLE_IMAGE or image.shape[:2] != size:
        cx, cy, w, h = window
        height, width = image.shape[:2]
        corners = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
        resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC, box=corners, reducing_gap=3.0)
        image = np.asarray(resized)
    return np.ascontiguousarray(image[:, :: -1 if flip else 1])
