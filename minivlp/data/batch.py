"""What travels: Region, Sample and Batch. Axes: B batch, L text tokens, R regions."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Region:
    """A phrase and where it is.

    `box` is (cx, cy, w, h) as fractions of the image's width and height. `kind` says how much of the phrase one must
    understand: `object` ("a heart"), `phrase` ("a red heart"), `relation` ("a red heart left of a dog"; the box is the
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


@dataclass
class Batch:
    """What a model's `losses` reads. Rows with equal `image_ids` belong together, as do equal captions."""

    images: Tensor  # (B, 3, H, W) float, in [-1, 1]
    ids: Tensor  # (B, L) long
    mask: Tensor  # (B, L) bool, True on real tokens
    image_ids: Tensor  # (B,) long
    region_boxes: Tensor | None = None  # (R, 4) cx, cy, w, h in 0..1
    region_ids: Tensor | None = None  # (R, L) long
    region_mask: Tensor | None = None  # (R, L) bool
    region_image: Tensor | None = None  # (R,) long, row of `images`
    region_is_image: Tensor | None = None  # (R,) bool, True where the region is the whole image
    wrong_ids: Tensor | None = None  # (B, L) long, of each row a caption with one fact changed: false of its image
    wrong_mask: Tensor | None = None  # (B, L) bool
    given: Tensor | None = None  # (B,) long, how many tokens at the start of each text are a question: read, not asked
    answers: Tensor | None = None  # (B,) long, place of the right answer in the list that is chosen from

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: value if value is None else value.to(device) for name, value in moved.items()})

    def __len__(self) -> int:
        return len(self.image_ids)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 pixels (B, H, W, 3) as float images (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
