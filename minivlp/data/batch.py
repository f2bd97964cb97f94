"""What travels from a dataset to a model: Region, Sample, Text, Regions and Batch.

Axes: B batch, L text tokens, R regions, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[float, float, float, float]
Moved = TypeVar("Moved")


@dataclass(frozen=True)
class Region:
    """A phrase and where it is.

    `box` is (cx, cy, w, h) as fractions of the image's width and height. `kind` says how much of the phrase has to be
    understood: `object` ("a heart"), `phrase` ("a red heart"), `relation` ("a red heart left of a dog"; the box is the
    heart's) or `image` (the whole image).
    """

    box: Box
    phrase: str
    kind: str = "object"


@dataclass
class Sample:
    """One picture and what is said of it. `truth` is the structured scene, or None for a photo."""

    image: np.ndarray  # (H, W, 3) uint8
    image_id: int
    captions: list[str]
    regions: list[Region] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)  # (question, answer)
    truth: Any = None
    source: str = ""  # file and row, for messages


def moved(value: Moved, device: torch.device | str) -> Moved:
    """A copy of a dataclass whose tensors, and those of the dataclasses inside it, are on `device`."""
    parts = {f.name: getattr(value, f.name) for f in fields(value)}
    return type(value)(**{name: part.to(device) if hasattr(part, "to") else part for name, part in parts.items()})


@dataclass
class Text:
    """Texts as a model reads them. Padding stands at the end of a row.

    `word` says which word each piece belongs to ("butter ##fly" is one word): equal numbers in a row are one word, -1
    is no word (special tokens, padding). Where it is not given, every real token is a word of its own.
    """

    ids: Tensor  # (B, L) long
    mask: Tensor  # (B, L) bool, True on real tokens
    word: Tensor | None = None  # (B, L) long

    def __post_init__(self) -> None:
        if self.word is None:
            places = torch.arange(self.ids.shape[1], device=self.ids.device)
            self.word = torch.where(self.mask, places, -1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> Text:
        """The texts of these rows: an index tensor, a mask or a slice."""
        return Text(self.ids[rows], self.mask[rows], self.word[rows])

    @property
    def length(self) -> int:
        """Tokens in a row, padding included."""
        return self.ids.shape[1]

    def to(self, device: torch.device | str) -> Text:
        """The same texts on another device."""
        return moved(self, device)

    def first(self, length: int) -> Text:
        """The first `length` tokens of each row."""
        return Text(self.ids[:, :length], self.mask[:, :length], self.word[:, :length])

    def trimmed(self) -> Text:
        """Without the columns in which every row is padding."""
        return self.first(int(self.mask.sum(dim=1).max()) if len(self) else 0)

    def padded(self, length: int) -> Text:
        """Rows of `length` tokens; what is added is padding."""
        extra = (0, length - self.length)
        return Text(F.pad(self.ids, extra), F.pad(self.mask, extra), F.pad(self.word, extra, value=-1))

    def with_ids(self, ids: Tensor) -> Text:
        """The same places with other ids (B, L)."""
        return Text(ids, self.mask, self.word)

    def with_first(self, token: int) -> Text:
        """With another first token, which tells the model what the text is for: [DEC] or [ENC] in place of [CLS]."""
        return self.with_ids(torch.cat([torch.full_like(self.ids[:, :1], token), self.ids[:, 1:]], dim=1))

    @staticmethod
    def cat(texts: Sequence[Text]) -> Text:
        """The rows of several texts below each other, padded to the longest."""
        longest = max(text.length for text in texts)
        rows = [text.padded(longest) for text in texts]
        return Text(*(torch.cat([getattr(text, name) for text in rows]) for name in ("ids", "mask", "word")))


@dataclass
class Regions:
    """Phrases and their boxes in the images of a batch."""

    boxes: Tensor  # (R, 4) cx, cy, w, h in 0..1
    text: Text  # R rows
    image_rows: Tensor  # (R,) long, row of the batch's images
    is_image: Tensor  # (R,) bool, True where the region is the whole image

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device | str) -> Regions:
        """The same regions on another device."""
        return moved(self, device)

    def of_images(self, rows: Tensor, count: int) -> Regions:
        """The regions of these images (b,), distinct rows of a batch of `count`; image `rows[i]` becomes image i."""
        becomes = rows.new_full((count,), -1)
        becomes[rows] = torch.arange(len(rows), device=rows.device)
        image_rows = becomes[self.image_rows]
        kept = image_rows >= 0
        return Regions(self.boxes[kept], self.text[kept], image_rows[kept], self.is_image[kept])


@dataclass
class Batch:
    """What a model's `losses` reads. Rows with equal `image_ids` are positives of each other, as are equal captions.

    A frozen image tower need see each picture only once: then `image_tokens`, its output, stands in place of `images`.
    """

    images: Tensor | None  # (B, 3, H, W) float, in [-1, 1]
    text: Text  # B captions
    image_ids: Tensor  # (B,) long
    negatives: Text | None = None  # B captions, each with one fact changed: false of the image of its row
    regions: Regions | None = None
    prefix_length: Tensor | None = None  # (B,) long: given tokens at the start of each text, such as a question
    answers: Tensor | None = None  # (B,) long: index of the right answer in the list that is chosen from
    image_tokens: Tensor | None = None  # (B, 1+P, D)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return moved(self, device)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, rows: Any) -> Batch:
        """The pairs of these rows, each at most once: an index tensor, a mask or a slice. Regions follow their images.

        Texts keep their length, though the longest may be left out.
        """
        kept = torch.arange(len(self), device=self.image_ids.device)[rows]
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        regions = parts.pop("regions")
        parts = {name: None if part is None else part[kept] for name, part in parts.items()}
        return type(self)(**parts, regions=None if regions is None else regions.of_images(kept, len(self)))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 pixels (B, H, W, 3) as contiguous float images (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)
