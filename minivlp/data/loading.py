"""From a dataset to batches. A batch is a pure function of the seed and the step, so resuming needs only the step.

Axes: B batch, L text tokens, R regions, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.data.batch import Batch, Regions, Text, to_tensor
from minivlp.data.dataset import Dataset, Size
from minivlp.data.lost_text import check_text
from minivlp.data.processes import ALONE, Processes
from minivlp.data.text import pad_id, pad_rows, tokenize

MAX_TOKENS = 56  # the context length of the nano models


class Loader:
    """Shuffled training batches of a `Dataset`. One of an image's captions is drawn per epoch.

    Args:
        dataset: a `Dataset` in which every image has a caption.
        tokenizer: ours or any tokenizer of transformers.
        batch_size: images in a batch. An epoch ends when fewer images are left, so every batch is full.
        size: of the images in pixels, a number or (height, width).
        seed: of the order of the images and of all random choices.
        max_tokens: longer texts are cut.
        regions_per_image: largest number of phrases with boxes per image; 0 leaves them out.
        kinds: kinds of region to draw from; None means all.
        negative_captions: add to each row a false caption, its own with one fact changed (scenes only).
        image_tokens: a function that maps rows of the dataset (B,) to the output of a frozen image tower (B, 1+P, D).
            With it no image is decoded: `batch.images` is None and `batch.image_tokens` is set.
        processes: the processes that train together. Each gets its rows of the same batches, and decodes no others.

    Captions and phrases are tokenized once, here, with a warning if a part of them is lost (`lost_text.check_text`).
    Raises ValueError if the dataset is smaller than one batch, if an image has no caption, if negative captions are
    asked for and the dataset cannot make them, and DataError, which is one, for a text of which no token is left.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any,
        batch_size: int,
        size: Size,
        *,
        seed: int = 0,
        max_tokens: int = MAX_TOKENS,
        regions_per_image: int = 0,
        kinds: tuple[str, ...] | None = None,
        negative_captions: bool = False,
        image_tokens: Callable[[np.ndarray], Tensor] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"a batch of {batch_size}: it needs at least one pair")
        if batch_size < processes.size:
            raise ValueError(f"a batch of {batch_size} for {processes.size} processes: each needs at least one pair")
        if len(dataset) < batch_size:
            raise ValueError(f"{len(dataset)} samples do not fill one batch of {batch_size}: lower the batch size")
        if negative_captions and not hasattr(dataset, "negative_caption"):
            raise ValueError(f"{dataset!r} cannot make negative captions: that needs scenes, whose content is known")
        self.dataset, self.batch_size, self.size, self.seed = dataset, batch_size, size, seed
        self.negative_captions, self.regions_per_image = negative_captions, regions_per_image
        self.image_tokens, self.processes = image_tokens, processes
        self.steps_per_epoch = len(dataset) // batch_size
        rows = range(len(dataset))
        self.image_ids = torch.tensor([dataset.image_id(row) for row in rows])
        captions = [dataset.captions(row) for row in rows]
        self.captions = TextTable(captions, tokenizer, max_tokens, "captions", partial(_place, dataset, captions))
        if not self.captions.count.all():
            raise ValueError(f"row {self.captions.count.argmin()} of {dataset!r} has no caption: leave its image out")
        if negative_captions:
            self.tokenize = CachedTokenizer(tokenizer, max_tokens)
        if regions_per_image:
            chosen = [[r for r in dataset.regions(row) if kinds is None or r.kind in kinds] for row in rows]
            phrases = [[r.phrase for r in regions] for regions in chosen]
            self.phrases = TextTable(phrases, tokenizer, max_tokens, "phrases", partial(_place, dataset, phrases))
            self.boxes = torch.tensor([r.box for regions in chosen for r in regions]).reshape(-1, 4)  # (all regions, 4)
            self.is_image = torch.tensor([r.kind == "image" for regions in chosen for r in regions], dtype=torch.bool)

    def batch(self, step: int) -> Batch:
        """The batch of this training step."""
        rows = rows_of_step(len(self.dataset), self.batch_size, self.seed, step)
        return self.batch_of(rows, np.random.default_rng((self.seed, step)))

    def batch_of(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """The batch of these rows (B,), or this process's part of it. `rng` draws a caption, a negative caption and
        regions for each, the same in all processes."""
        wordings = [rng.integers(self.captions.count[row]) for row in rows]
        batch = Batch(
            images=None,
            text=self.captions.take([self.captions.first[row] + n for row, n in zip(rows, wordings, strict=True)]),
            image_ids=self.image_ids[torch.as_tensor(rows)],
        )
        if self.negative_captions:
            pairs = zip(rows, wordings, strict=True)
            batch.negatives = self.tokenize([self.dataset.negative_caption(row, rng, n) for row, n in pairs])
        if self.regions_per_image:
            batch.regions = self._regions(rows, rng)
        if self.processes.size > 1:
            part = self.processes.part(len(rows))
            batch, rows = batch[part], rows[part]
        if self.image_tokens is None:
            batch.images = to_tensor(self.dataset.pixels(rows, self.size))
        else:
            batch.image_tokens = self.image_tokens(rows)
        return batch

    def _regions(self, rows: np.ndarray, rng: np.random.Generator) -> Regions:
        """At most `regions_per_image` random regions of each row."""
        drawn: list[int] = []  # indices into the table of phrases
        image_rows: list[int] = []
        for index, row in enumerate(rows):
            chosen = rng.permutation(self.phrases.count[row])[: self.regions_per_image]
            drawn.extend(self.phrases.first[row] + chosen)
            image_rows.extend([index] * len(chosen))
        return Regions(
            boxes=self.boxes[drawn],
            text=self.phrases.take(drawn),
            image_rows=torch.tensor(image_rows, dtype=torch.long),
            is_image=self.is_image[drawn],
        )


class TextTable:
    """The tokenized texts of all rows of a dataset. Row r has `count[r]` texts, which start at index `first[r]`.

    Warns if a part of them is lost, and raises DataError for a text of which nothing is left (`lost_text.check_text`).
    """

    def __init__(
        self,
        texts: list[list[str]],
        tokenizer: Any,
        max_tokens: int,
        what: str = "texts",
        place: Callable[[str], str] | None = None,
    ) -> None:
        self.count = np.array([len(of_row) for of_row in texts])
        self.first = np.cumsum(self.count) - self.count
        flat = [text for of_row in texts for text in of_row]
        distinct = {text: index for index, text in enumerate(dict.fromkeys(flat))}  # captions repeat: store each once
        found = tokenize(tokenizer, list(distinct) or [""], max_tokens)
        if distinct:
            check_text(tokenizer, list(distinct), found, max_tokens, what, place)
        self.ids, self.mask, self.word = found.ids.to(torch.int32), found.mask, found.word.to(torch.int16)
        self.which = torch.tensor([distinct[text] for text in flat], dtype=torch.long)  # index -> distinct text

    def take(self, indices: Sequence[int]) -> Text:
        """The texts with these indices, as long as the longest of them."""
        which = self.which[torch.as_tensor(np.asarray(indices, dtype=np.int64))]
        mask = self.mask[which]
        longest = int(mask.sum(dim=1).max()) if len(mask) else 1
        return Text(self.ids[which, :longest].long(), mask[:, :longest], self.word[which, :longest].long())


def _place(dataset: Dataset, texts: list[list[str]], text: str) -> str:
    """The file and row of the first image that has this text."""
    row = next(row for row, of_row in enumerate(texts) if text in of_row)
    return dataset[row].source or f"row {row}"


class CachedTokenizer:
    """`tokenize` with a memory: the last `limit` distinct texts that were asked for are not tokenized again."""

    def __init__(self, tokenizer: Any, max_tokens: int, limit: int = 50_000) -> None:
        self.tokenizer, self.max_tokens, self.limit = tokenizer, max_tokens, limit
        self.known: dict[str, tuple[list[int], list[int]]] = {}  # text -> token ids and word indices, oldest first

    def __call__(self, texts: Sequence[str]) -> Text:
        """The texts (B, L)."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        found = tokenize(self.tokenizer, new, self.max_tokens)
        lengths = found.mask.sum(dim=1).tolist()
        for text, ids, word, length in zip(new, found.ids.tolist(), found.word.tolist(), lengths, strict=True):
            self.known[text] = ids[:length], word[:length]
        for text in dict.fromkeys(texts):
            self.known[text] = self.known.pop(text)  # now the newest
        rows = [self.known[text] for text in texts]
        while len(self.known) > self.limit:
            del self.known[next(iter(self.known))]
        return pad_rows([ids for ids, _ in rows], [word for _, word in rows], pad_id(self.tokenizer))


def rows_of_step(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows (B,) of a dataset of `count` images that make up the batch of a training step."""
    epoch, index = divmod(step, count // batch_size)
    return shuffled_rows(count, seed, epoch)[index * batch_size : (index + 1) * batch_size]


@lru_cache(maxsize=4)
def shuffled_rows(count: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of a dataset in the order of one epoch."""
    return np.random.default_rng((seed, epoch, 1)).permutation(count)
