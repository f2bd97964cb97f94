"""The same images with other captions, for models that improve their own training data (`training.capfilt`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from minivlp.data.batch import Region, Sample
from minivlp.data.dataset import Dataset, Size, Wrapper, height_width


class Recaptioned(Wrapper):
    """The images of `noisy` with other captions, followed by all of `clean`.

    Args:
        noisy: a `Dataset` whose images are used.
        texts: new captions by row of `noisy`; rows without any are left out.
        clean: a `Dataset` that is used as it is.

    The image ids of the two never collide.
    """

    forwarded = ("language",)

    def __init__(self, noisy: Dataset, texts: Mapping[int, Sequence[str]], clean: Dataset) -> None:
        super().__init__(noisy)
        self.parts, self.texts = (noisy, clean), texts
        # Row -> (part, row of the part).
        self.sources = [(0, row) for row in sorted(texts) if texts[row]] + [(1, row) for row in range(len(clean))]

    def __len__(self) -> int:
        return len(self.sources)

    def __repr__(self) -> str:
        return f"{len(self) - len(self.parts[1]):,} images with other captions, and {self.parts[1]!r}"

    def __getitem__(self, row: int) -> Sample:
        part, inner = self.sources[row]
        return replace(self.parts[part][inner], captions=self.captions(row), regions=self.regions(row))

    def captions(self, row: int) -> list[str]:
        """The new captions, or those of `clean`."""
        part, inner = self.sources[row]
        return list(self.texts[inner]) if part == 0 else self.parts[1].captions(inner)

    def regions(self, row: int) -> list[Region]:
        """The phrases with boxes, without that of the whole image: it is one of the old captions."""
        part, inner = self.sources[row]
        return [region for region in self.parts[part].regions(inner) if region.kind != "image"]

    def image_id(self, row: int) -> int:
        """Even numbers for `noisy`, odd ones for `clean`."""
        part, inner = self.sources[row]
        return 2 * self.parts[part].image_id(inner) + part

    def pixels(self, rows: Sequence[int], size: Size) -> np.ndarray:
        """Images (B, H, W, 3) uint8."""
        images = np.empty((len(rows), *height_width(size), 3), np.uint8)
        part, inner = np.array([self.sources[row] for row in rows]).reshape(-1, 2).T
        for which in (0, 1):
            if (part == which).any():
                images[part == which] = self.parts[which].pixels(inner[part == which].tolist(), size)
        return images
