"""Noisy captions, as in data from the web: of another image, with the wrong object, or no description at all.

It is recorded which captions are noisy, so the precision and recall of a filter can be measured exactly.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from minivlp.data.batch import Region, Sample
from minivlp.data.dataset import Dataset, Wrapper
from minivlp.data.rng import pick

KINDS = ("swapped", "replaced", "junk")
JUNK = {
    "en": (
        "IMG_{n}.jpg", "DSC_{n}.JPG", "best price free shipping", "buy now and save {n}", "click here to enlarge",
        "page {n} of {n}", "image not available", "stock photo {n}", "copyright all rights reserved",
        "subscribe to our newsletter", "thumbnail {n}", "untitled", "see more photos like this one",
        "official online store", "download free wallpaper {n}", "screenshot {n}.png",
    ),
    "zh": (
        "IMG_{n}.jpg", "DSC_{n}.JPG", "全场包邮特价", "点击查看大图", "版权所有请勿转载", "图片{n}", "暂无图片",
        "立即购买仅需{n}元", "更多精彩请关注我们", "官方旗舰店", "免费下载高清壁纸{n}", "截图{n}.png",
    ),
}  # fmt: skip


class NoisyCaptions(Wrapper):
    """A dataset in which a share of the captions is wrong. Its images are unchanged.

    A noisy row has one caption, which is false of the image. Kinds: swapped, the short caption of another row;
    replaced, with another object or shape; junk, text that web pages put beside images ("IMG_2034.jpg"). Every kind
    gets the same number of rows, up to one.

    Args:
        dataset: any `Dataset`.
        rate: share of noisy rows, 0 to 1, exact to the row.
        seed: of all random choices.
        kinds: which of `KINDS` to use.

    Raises ValueError for a rate outside 0..1, for an unknown kind, for `replaced` without scenes, and if no other row
    has a caption that is false of a row.
    """

    hidden = ("negative_caption",)  # it is made from the true caption, which a model must not see here

    def __init__(self, dataset: Dataset, rate: float, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"noise rate {rate}: give a share between 0 and 1")
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"noise kinds {kinds}: choose from {', '.join(KINDS)}")
        if "replaced" in kinds and not hasattr(dataset, "scene"):
            raise ValueError("only scenes can have an object replaced: leave 'replaced' out of the kinds")
        super().__init__(dataset)
        self._language = getattr(dataset, "language", "en")
        rng = Random(f"minivlp noise {seed}")
        order = sorted(range(len(dataset)), key=[rng.random() for _ in range(len(dataset))].__getitem__)
        self._kinds = {row: kinds[i % len(kinds)] for i, row in enumerate(order[: round(rate * len(dataset))])}
        self._noise = {row: self._noisy_caption(rng, row, kind) for row, kind in sorted(self._kinds.items())}

    def __getitem__(self, row: int) -> Sample:
        return replace(self.dataset[row], captions=self.captions(row), regions=self.regions(row))

    def captions(self, row: int) -> list[str]:
        """The true captions, or a single noisy one."""
        row = self._row(row)
        return self.dataset.captions(row) if self.is_clean(row) else [self._noise[row]]

    def true_captions(self, row: int) -> list[str]:
        """The captions without noise."""
        return self.dataset.captions(row)

    def kind(self, row: int) -> str:
        """clean, swapped, replaced or junk."""
        return self._kinds.get(self._row(row), "clean")

    def is_clean(self, row: int) -> bool:
        """Whether the captions of this row are true."""
        return self.kind(row) == "clean"

    def regions(self, row: int) -> list[Region]:
        """Phrases with boxes stay true, as people annotate them; the phrase of the whole image is the noisy caption."""
        regions = self.dataset.regions(row)
        if self.is_clean(row):
            return regions
        noise = self._noise[self._row(row)]
        return [replace(region, phrase=noise) if region.kind == "image" else region for region in regions]

    def _row(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"no row {row} in a dataset of {len(self)}")
        return row % len(self)

    def _noisy_caption(self, rng: Random, row: int, kind: str) -> str:
        if kind == "junk":
            text = pick(rng, JUNK[self._language])
            return text.replace("{n}", str(pick(rng, range(10, 10_000))))
        if kind == "replaced":
            changed = self.dataset.scene(row).counterfactuals(rng, self._language).get("object")
            if changed is None:
                raise ValueError(f"row {row}: no object of this scene can be replaced")
            return changed
        for _ in range(1000):
            other = pick(rng, range(len(self)))
            if self._is_false(row, other):
                return self.dataset.captions(other)[0]
        raise ValueError(f"row {row}: no other row has a caption that is false of it, so none can be swapped in")

    def _is_false(self, row: int, other: int) -> bool:
        """Whether the other row's caption is false of this image. Scenes know; otherwise it has to be different."""
        if hasattr(self.dataset, "scene"):
            return not self.dataset.scene(row).holds(self.dataset.scene(other).facts)
        different = self.dataset.image_id(row) != self.dataset.image_id(other)
        return different and self.dataset.captions(other)[0] not in self.dataset.captions(row)
