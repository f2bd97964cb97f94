"""From a dataset to batches. A batch is a pure function of the seed and the step, so resuming needs only the step."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.data.batch import Batch, to_tensor
from minivlp.data.text import encode


class Loader:
    """Shuffled training batches of a dataset (docs/architecture.md says what a dataset is).

    Args:
        tokenizer: ours or any transformers tokenizer. size: side of the images in pixels. seed: of the order and of
            what is drawn. max_tokens: longer captions are cut. regions_per_image: how many phrases with boxes each
            image brings along at most (0: none). kinds: which kinds of region, all if None. wrong_captions: each row
            also brings a false caption, one fact of its own changed (only scenes can make them).

    One of an image's captions is drawn per epoch. Texts are tokenised once, here (the false ones when they are drawn);
    pictures are read when asked for. Raises ValueError when the dataset is smaller than one batch, an image has no
    caption, or false captions are asked of a dataset that cannot make them.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        batch_size: int,
        size: int,
        *,
        seed: int = 0,
        max_tokens: int = 56,
        regions_per_image: int = 0,
        kinds: tuple[str, ...] | None = None,
        wrong_captions: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"a batch of {batch_size}: it needs at least one pair")
        if len(dataset) < batch_size:
            raise ValueError(f"{len(dataset)} samples do not fill one batch of {batch_size}: lower the batch size")
        if wrong_captions and not hasattr(dataset, "wrong_caption"):
            raise ValueError(f"{dataset!r} cannot make false captions: only scenes know what would be false of them")
        self.dataset, self.batch_size, self.size, self.seed = dataset, batch_size, size, seed
        self.tokenizer, self.max_tokens, self.wrong_captions = tokenizer, max_tokens, wrong_captions
        self.regions_per_image = regions_per_image
        self.steps_per_epoch = len(dataset) // batch_size  # the rest of an epoch is dropped: every batch is full
        rows = range(len(dataset))
        self.image_ids = torch.tensor([dataset.image_id(row) for row in rows])
        self.captions = Texts([dataset.captions(row) for row in rows], tokenizer, max_tokens)
        if not self.captions.count.all():
            raise ValueError(f"row {self.captions.count.argmin()} of {dataset!r} has no caption: leave its image out")
        if regions_per_image:
            chosen = [[r for r in dataset.regions(row) if kinds is None or r.kind in kinds] for row in rows]
            self.phrases = Texts([[r.phrase for r in regions] for regions in chosen], tokenizer, max_tokens)
            self.boxes = torch.tensor([r.box for regions in chosen for r in regions]).reshape(-1, 4)  # (all, 4)
            self.is_image = torch.tensor([r.kind == "image" for regions in chosen for r in regions], dtype=torch.bool)

    def batch(self, step: int) -> Batch:
        """The batch of this training step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = shuffled(len(self.dataset), self.seed, epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        return self.rows(rows, np.random.default_rng((self.seed, step)))

    def rows(self, rows: np.ndarray, draw: np.random.Generator) -> Batch:
        """The batch of these rows; `draw` chooses among captions and regions."""
        wordings = [draw.integers(self.captions.count[row]) for row in rows]
        ids, mask = self.captions.take([self.captions.first[row] + n for row, n in zip(rows, wordings, strict=True)])
        images = to_tensor(self.dataset.pixels(rows, self.size))
        batch = Batch(images, ids, mask, self.image_ids[torch.as_tensor(rows)])
        if self.wrong_captions:
            wrong = [self.dataset.wrong_caption(row, draw, n) for row, n in zip(rows, wordings, strict=True)]
            batch.wrong_ids, batch.wrong_mask = encode(self.tokenizer, wrong, self.max_tokens)
        if self.regions_per_image:
            texts, image = [], []
            for index, row in enumerate(rows):
                many = self.phrases.count[row]
                few = draw.permutation(many)[: self.regions_per_image]
                texts.extend(self.phrases.first[row] + few)
                image.extend([index] * len(few))
            batch.region_ids, batch.region_mask = self.phrases.take(texts)
            batch.region_boxes, batch.region_is_image = self.boxes[texts], self.is_image[texts]
            batch.region_image = torch.tensor(image, dtype=torch.long)
        return batch


class Texts:
    """Token ids of a list of texts per row, kept as one table: row `r` owns `count[r]` texts from `first[r]` on."""

    def __init__(self, texts: list[list[str]], tokenizer: Any, max_tokens: int) -> None:
        self.count = np.array([len(of_row) for of_row in texts])
        self.first = np.cumsum(self.count) - self.count
        flat = [text for of_row in texts for text in of_row]
        distinct = {text: index for index, text in enumerate(dict.fromkeys(flat))}  # captions repeat: encode each once
        ids, mask = encode(tokenizer, list(distinct) or [""], max_tokens)
        self.ids, self.mask = ids.to(torch.int32), mask
        self.which = torch.tensor([distinct[text] for text in flat], dtype=torch.long)

    def take(self, texts: list[int]) -> tuple[Tensor, Tensor]:
        """ids and mask (B, L) of these texts, L being the longest among them."""
        which = self.which[torch.as_tensor(np.asarray(texts, dtype=np.int64))]
        mask = self.mask[which]
        longest = int(mask.sum(dim=1).max()) if len(mask) else 1
        return self.ids[which, :longest].long(), mask[:, :longest]


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffled rows of one epoch."""
    return np.random.default_rng((seed, epoch, 1)).permutation(count)
