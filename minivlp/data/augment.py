"""Flips and crops that keep boxes and words true (X-VLM, Zeng et al. 2022, crops around regions and flips with care).

Both take a `Sample` and return one; `truth` is None afterwards, as the structured scene is no longer what is shown.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

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
