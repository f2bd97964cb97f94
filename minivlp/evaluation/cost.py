"""What search costs: encode everything once and compare, let image and text meet in every pair, or both in turn.

Axes: M images, N texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minivlp.evaluation.forward import chunks, evaluating, images_of, need, once_each, texts_of


@dataclass(frozen=True)
class Cost:
    """What it takes to compare M images with N texts: encode each once, look at every pair, or re-rank the best.

    seconds_once is None for a model that cannot encode apart. seconds_shared: every pair, but the texts of an image
    share its encoding; None for a model that cannot share (`match_many`). `measured`: the M x N that were run, where
    the seconds are extrapolated from fewer.
    """

    images: int
    texts: int
    seconds_once: float | None
    seconds_pairs: float
    seconds_shared: float | None = None
    measured: tuple[int, int] | None = None

    @property
    def encodings(self) -> int:
        """Passes of a dual encoder."""
        return self.images + self.texts

    @property
    def pairs(self) -> int:
        """Passes of a model that reads image and text together."""
        return self.images * self.texts

    def pairs_of_best(self, k: int) -> int:
        """Pairs that re-ranking looks at, at most: k texts per image and k images per text, which may coincide."""
        return min(self.images * min(k, self.texts) + self.texts * min(k, self.images), self.pairs)

    def seconds_best(self, k: int) -> float | None:
        """Encoding each once, then `match` for the k best of each image and each text."""
        if self.seconds_once is None:
            return None
        per_pair = (self.seconds_pairs if self.seconds_shared is None else self.seconds_shared) / self.pairs
        return self.seconds_once + per_pair * self.pairs_of_best(k)

    def scaled(self, images: int, texts: int) -> Cost:
        """What the same model would take for other numbers, by proportion."""
        once, pairs = (images + texts) / self.encodings, images * texts / self.pairs
        return replace(
            self,
            images=images,
            texts=texts,
            seconds_once=None if self.seconds_once is None else self.seconds_once * once,
            seconds_pairs=self.seconds_pairs * pairs,
            seconds_shared=None if self.seconds_shared is None else self.seconds_shared * pairs,
            measured=self.measured or (self.images, self.texts),
        )

    def rows(self, k: int = 16) -> list[tuple[str, str, float | None]]:
        """(way, passes, seconds or None) of all ways to search; `k` is re-ranking's."""
        ways = [("each encoded once", f"{self.encodings:,} encodings", self.seconds_once)]
        ways.append(("every pair", f"{self.pairs:,} passes", self.seconds_pairs))
        if self.seconds_shared is not None:
            ways.append(("every pair, images encoded once", f"{self.pairs:,} fusions", self.seconds_shared))
        if k:
            passes = f"{self.encodings:,} encodings, {self.pairs_of_best(k):,} fusions"
            ways.append((f"encoded once, best {k} re-ranked", passes, self.seconds_best(k)))
        return ways

    def __str__(self) -> str:
        lines = [f"{self.images:,} images x {self.texts:,} texts{self._told()}"]
        for way, passes, seconds in self.rows():
            lines.append(f"  {way:<32} {'not possible' if seconds is None else f'{passes}, {_short(seconds)} s'}")
        return "\n".join(lines)

    def _repr_markdown_(self) -> str:
        lines = [f"{self.images:,} images x {self.texts:,} texts{self._told()}", "", "| | passes | seconds |"]
        lines.append("|---|---:|---:|")
        for way, passes, seconds in self.rows():
            lines.append(f"| {way} | {passes} | {'not possible' if seconds is None else _short(seconds)} |")
        return "\n".join(lines)

    def _told(self) -> str:
        return "" if self.measured is None else " (extrapolated from {} x {})".format(*self.measured)


def cost(model: Any, dataset: Any, tokenizer: Any, *, images: int = 20, texts: int = 20, batch_size: int = 250) -> Cost:
    """All ways of scoring images x texts, run and timed (text encoding included, decoding of pictures not).

    A model without `match` stands in for one that must see each pair: it encodes both sides again for every pair.
    `cost(…).scaled(1000, 1000)` is the table for a thousand of each, extrapolated.
    """
    need(model, "embed_images", "match")
    texts_given = [dataset.captions(row)[0] for row in range(min(texts, len(dataset)))]
    with evaluating(model):
        pictures = images_of(model, dataset, range(min(images, len(dataset))))
        ids, mask = texts_of(model, tokenizer, texts_given)
        pairs = [(i, t) for i in range(len(pictures)) for t in range(len(ids))]  # image by image

        def once() -> None:
            image = [model.embed_images(part) for part in pictures.split(batch_size)]
            parts = zip(ids.split(batch_size), mask.split(batch_size), strict=True)
            torch.cat(image) @ torch.cat([model.embed_texts(*part) for part in parts]).T

        def meet(image: Tensor, text: Tensor) -> None:
            if hasattr(model, "match"):
                model.match(pictures[image], ids[text], mask[text])
            else:
                (model.embed_images(pictures[image]) * model.embed_texts(ids[text], mask[text])).sum(-1)

        def meet_shared(image: Tensor, text: Tensor) -> None:
            distinct, which = image.unique(return_inverse=True)
            once_each(model, "match", pictures[distinct], which, ids[text], mask[text])

        def all_pairs(way: Callable[[Tensor, Tensor], None]) -> None:
            for part in chunks(pairs, batch_size):
                way(*torch.tensor(part, device=pictures.device).T)

        return Cost(
            len(pictures),
            len(ids),
            _seconds(once, pictures) if hasattr(model, "embed_images") else None,
            _seconds(lambda: all_pairs(meet), pictures),
            _seconds(lambda: all_pairs(meet_shared), pictures) if hasattr(model, "match_many") else None,
        )


def _short(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:,.0f}"


def _seconds(run: Callable[[], None], where: Tensor) -> float:
    _wait(where)
    start = time.perf_counter()
    run()
    _wait(where)
    return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    """Let a GPU finish, so that the clock tells the truth."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    elif tensor.device.type == "mps":
        torch.mps.synchronize()
