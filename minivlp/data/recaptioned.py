"""The same pictures with other captions: what a model that mends its own data learns from (`training.capfilt`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minivlp.data.batch import Region, Sample


class Recaptioned:
    """A dataset: the images of `noisy` with other captions, then all of `clean`.

    `texts`: captions by row of `noisy`; rows without any are left out. Image ids of the two never meet.
    """

    def __init__(self, noisy: Any, texts: Mapping[int, Sequence[str]], clean: Any) -> None:
        self.parts, self.texts = (noisy, clean), texts
        self.places = [(0, row) for row in sorted(texts) if texts[row]] + [(1, row) for row in range(len(clean))]

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        return f"{len(self) - len(self.parts[1]):,} images with other captions, and {self.parts[1]!r}"

    def __getitem__(self, row: int) -> Sample:
        part, old = self.places[row]
        return replace(self.parts[part][old], captions=self.captions(row), regions=self.regions(row))

    def captions(self, row: int) -> list[str]:
        part, old = self.places[row]
        return list(self.texts[old]) if part == 0 else self.parts[1].captions(old)

    def regions(self, row: int) -> list[Region]:
        """Those with a place; what the whole image is called, its captions say."""
        part, old = self.places[row]
        return [region for region in self.parts[part].regions(old) if region.kind != "image"]

    def image_id(self, row: int) -> int:
        part, old = self.places[row]
        return 2 * self.parts[part].image_id(old) + part

    def pixels(self, rows: Sequence[int], size: int) -> np.ndarray:
        images = np.empty((len(rows), size, size, 3), np.uint8)
        part, old = np.array([self.places[row] for row in rows]).reshape(-1, 2).T
        for which in (0, 1):
            if (part == which).any():
                images[part == which] = self.parts[which].pixels(old[part == which].tolist(), size)
        return images
