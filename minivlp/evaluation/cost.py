"""The cost of search: encode each image and text once and compare, run every pair through the model, or re-rank.

Axes: M images, N texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minivlp.data.batch import Text
from minivlp.evaluation.forward import chunks, images_of, need
from minivlp.inference import evaluating, share_image_encoding, tokenize_for


@dataclass(frozen=True)
class Cost:
    """The cost of comparing M images with N texts in three ways: encode each once, run every pair, re-rank the best.

    seconds_once: None for a model that cannot encode images and texts alone. seconds_pairs: every pair on its own.
    seconds_shared: every pair, but each image is encoded once for all texts; None for a model without `match_many`.
    measured: the numbers M and N that were run, if the seconds are extrapolated from these.
    """

    images: int
    texts: int
    seconds_once: float | None
    seconds_pairs: float
    seconds_shared: float | None = None
    measured: tuple[int, int] | None = None

    @property
    def encodings(self) -> int:
        """Encodings that a dual encoder needs."""
        return self.images + self.texts

    @property
    def pairs(self) -> int:
        """Passes of a model that reads image and text together."""
        return self.images * self.texts

    def pairs_of_best(self, k: int) -> int:
        """Pairs that re-ranking needs at most: k texts per image and k images per text, which may coincide."""
        return min(self.images * min(k, self.texts) + self.texts * min(k, self.images), self.pairs)

    def seconds_best(self, k: int) -> float | None:
        """Seconds for encoding each once, then `match` for the k best of each image and each text."""
        if self.seconds_once is None:
            return None
        per_pair = (self.seconds_pairs if self.seconds_shared is None else self.seconds_shared) / self.pairs
        return self.seconds_once + per_pair * self.pairs_of_best(k)

    def scaled(self, images: int, texts: int) -> Cost:
        """The cost for other numbers of images and texts, in proportion."""
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
        """(way, passes, seconds or None) of all ways to search; `k` is that of re-ranking."""
        ways = [("each encoded once", f"{self.encodings:,} encodings", self.seconds_once)]
        ways.append(("every pair", f"{self.pairs:,} passes", self.seconds_pairs))
        if self.seconds_shared is not None:
            ways.append(("every pair, images encoded once", f"{self.pairs:,} fusions", self.seconds_shared))
        if k:
            passes = f"{self.encodings:,} encodings, {self.pairs_of_best(k):,} fusions"
            ways.append((f"encoded once, best {k} re-ranked", passes, self.seconds_best(k)))
        return ways

    def __str__(self) -> str:
        lines = [f"{self.images:,} images x {self.texts:,} texts{self._extrapolated()}"]
        for way, passes, seconds in self.rows():
            lines.append(f"  {way:<32} {'not possible' if seconds is None else f'{passes}, {_short(seconds)} s'}")
        return "\n".join(lines)

    def _repr_markdown_(self) -> str:
        lines = [f"{self.images:,} images x {self.texts:,} texts{self._extrapolated()}", "", "| | passes | seconds |"]
        lines.append("|---|---:|---:|")
        for way, passes, seconds in self.rows():
            lines.append(f"| {way} | {passes} | {'not possible' if seconds is None else _short(seconds)} |")
        return "\n".join(lines)

    def _extrapolated(self) -> str:
        return "" if self.measured is None else " (extrapolated from {} x {})".format(*self.measured)


def cost(model: Any, dataset: Any, tokenizer: Any, *, images: int = 20, texts: int = 20, batch_size: int = 250) -> Cost:
    """Run and time all ways of scoring images x texts. Includes the encoding of texts, but not the decoding of images.

    For a model without `match`, "every pair" encodes image and text of each pair anew, as a model must that reads both
    together. `cost(...).scaled(1000, 1000)` is the table for a thousand of each, extrapolated.
    """
    need(model, "embed_images", "match")
    rows = range(min(images, len(dataset)))
    captions = [dataset.captions(row)[0] for row in range(min(texts, len(dataset)))]
    with evaluating(model):
        pixels, text = images_of(model, dataset, rows), tokenize_for(model, tokenizer, captions)
        pairs = [(i, t) for i in range(len(pixels)) for t in range(len(text))]  # image by image

        def once() -> None:
            features = [model.embed_texts(text[some]) for some in _slices(len(text), batch_size)]
            for part in pixels.split(batch_size):
                encoded = model.embed_images(part)
                for texts_ in features:
                    model.score(encoded, texts_)

        def alone(image_rows: Tensor, texts_: Text) -> None:
            if hasattr(model, "match"):
                model.match(pixels[image_rows], texts_)
            else:  # comparing two features takes no time next to computing them
                model.embed_images(pixels[image_rows]), model.embed_texts(texts_)

        def shared(image_rows: Tensor, texts_: Text) -> None:
            different, which = image_rows.unique(return_inverse=True)
            share_image_encoding(model, "match", pixels[different], which, texts_)

        def all_pairs(way: Callable[[Tensor, Text], None]) -> None:
            for part in chunks(pairs, batch_size):
                image_rows, text_rows = torch.tensor(part, device=pixels.device).T
                way(image_rows, text[text_rows])

        return Cost(
            len(pixels),
            len(text),
            _seconds(once, pixels.device) if hasattr(model, "embed_images") else None,
            _seconds(lambda: all_pairs(alone), pixels.device),
            _seconds(lambda: all_pairs(shared), pixels.device) if hasattr(model, "match_many") else None,
        )


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _short(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:,.0f}"


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    """Wait for a GPU, which computes asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
