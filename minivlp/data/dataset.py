"""What a dataset is, and the base class of datasets that change another dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from minivlp.data.batch import Box, Region, Sample

Size = int | tuple[int, int]  # of an image in pixels: the side of a square, or (height, width)
WHOLE_IMAGE: Box = (0.5, 0.5, 1.0, 1.0)


class Dataset(Protocol):
    """A list of images with captions. `Loader`, evaluation and the wrappers use these methods only.

    Some datasets can do more: `scene(row)`, `questions(row)`, `statements(row, rng)` and `negative_caption(row, rng,
    wording)` exist where the truth of an image is known. Callers ask with `hasattr`.
    """

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, row: int) -> Sample:
        """The image at its own size, with everything that is known about it."""

    def captions(self, row: int) -> list[str]:
        """The captions of one image, without decoding it."""

    def regions(self, row: int) -> list[Region]:
        """The phrases with boxes of one image, without decoding it."""

    def image_id(self, row: int) -> int:
        """A number that two rows share if and only if they show the same image."""

    def pixels(self, rows: Sequence[int], size: Size) -> np.ndarray:
        """Images (B, H, W, 3) uint8, resized to `size` without cropping, so that captions and boxes stay true."""


class Wrapper:
    """A dataset that passes everything on to another one, `self.dataset`. Subclasses override what they change.

    Attributes beyond the protocol (`scene`, `language`, ...) are passed on too, so `hasattr` gives the same answer as
    for the wrapped dataset. A subclass lists in `hidden` those that would no longer be true. A subclass whose rows are
    not those of the wrapped dataset lists in `forwarded` the few attributes that it does pass on.
    """

    hidden: tuple[str, ...] = ()
    forwarded: tuple[str, ...] | None = None  # None: all but the hidden ones

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:  # called only for what the class itself lacks
        allowed = self.forwarded is None or name in self.forwarded
        if name == "dataset" or name.startswith("__") or name in self.hidden or not allowed:
            # "dataset" is missing while an object is unpickled; looking it up again would never end
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Sample:
        return self.dataset[row]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dataset!r})"

    def captions(self, row: int) -> list[str]:
        """The captions of one image."""
        return self.dataset.captions(row)

    def regions(self, row: int) -> list[Region]:
        """The phrases with boxes of one image."""
        return self.dataset.regions(row)

    def image_id(self, row: int) -> int:
        """The number of the image."""
        return self.dataset.image_id(row)

    def pixels(self, rows: Sequence[int], size: Size) -> np.ndarray:
        """Images (B, H, W, 3) uint8."""
        return self.dataset.pixels(rows, size)


def height_width(size: Size) -> tuple[int, int]:
    """(height, width) of a size that may be given as one number."""
    return (size, size) if isinstance(size, int | np.integer) else (size[0], size[1])
