"""What several lessons need beside what they teach: the cost of a piece of code, words and phrases that name objects,
and small tensors printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from minivlp.data.batch import Text, to_tensor
from minivlp.data.text import group_words, tokenize


def milliseconds(run: Callable[[], Any], times: int = 5) -> float:
    """The shortest of several runs: other programs on the machine can only make a run longer."""
    taken = []
    for _ in range(times):
        start = perf_counter()
        run()
        taken.append(1000 * (perf_counter() - start))
    return min(taken)


def multiplications(run: Callable[[], Any]) -> float:
    """How many multiplications the matrix products of a run take; the same number on every machine."""
    from torch.utils.flop_counter import FlopCounterMode  # loads much that only this function needs

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2  # a multiplication and an addition count as two


@dataclass
class ObjectWords:
    """Every object of some scenes once: its picture, its caption, and where the word that names it stands.

    Axes: R objects, L text tokens.
    """

    images: Tensor  # (R, 3, H, W) float, in [-1, 1]
    text: Text  # (R, L)
    places: Tensor  # (R,) long: position of the last token of the noun
    boxes: Tensor  # (R, 4) cx, cy, w, h in 0..1
    rows: list[int]  # the scene of each object

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self, size: int = 32) -> Iterator[ObjectWords]:
        """The same in parts: attention maps of all of them at once, with gradients, would take a gigabyte."""
        for start in range(0, len(self), size):
            some = slice(start, start + size)
            text = self.text[some].padded(self.text.length)
            yield ObjectWords(self.images[some], text, self.places[some], self.boxes[some], self.rows[some])


def object_words(scenes: Any, tokenizer: Any, max_tokens: int = 56) -> ObjectWords:
    """The objects of `Scenes` with the short captions, in English."""
    found = [(row, region) for row in range(len(scenes)) for region in scenes.regions(row) if region.kind == "object"]
    rows, nouns = [row for row, _ in found], [region.phrase.split()[-1] for _, region in found]
    text = tokenize(tokenizer, [scenes.captions(row)[0] for row in rows], max_tokens)
    places = [
        next(pieces[-1] for word, pieces in group_words(tokenizer, ids) if word == noun)
        for ids, noun in zip(text.ids, nouns, strict=True)
    ]
    boxes = torch.tensor([region.box for _, region in found])
    return ObjectWords(to_tensor(scenes.pixels(rows, scenes.size)), text, torch.tensor(places), boxes, rows)


def phrases(scenes: Any, tokenizer: Any, max_tokens: int = 56) -> tuple[list[int], Text, Tensor]:
    """The phrases that name one object, with and without its attributes: the scene, the text and the box of each.

    Returns R rows of `scenes`, texts (R, L) and boxes (R, 4) as cx, cy, w, h in 0..1.
    """
    found = [(row, region) for row in range(len(scenes)) for region in scenes.regions(row)]
    found = [(row, region) for row, region in found if region.kind in ("object", "phrase")]
    texts = tokenize(tokenizer, [region.phrase for _, region in found], max_tokens)
    return [row for row, _ in found], texts, torch.tensor([region.box for _, region in found])


def show(**tensors: Tensor) -> None:
    """Print small tensors of one or two axes: name, shape, then the numbers row by row."""
    for name, tensor in tensors.items():
        print(f"{name} {tuple(tensor.shape)}")
        for row in torch.atleast_2d(tensor.detach().float()).tolist():
            print("   ", " ".join(f"{value:7.2f}" for value in row))
