"""From a dataset and a tokenizer to a model's verbs, in batches: what every measure needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.asking import device_of, evaluating, once_each, texts_of
from minivlp.data.batch import to_tensor

__all__ = ["evaluating", "once_each", "texts_of"]  # measures ask by these


def need(model: Any, *verbs: str) -> None:
    """Raise TypeError unless the model has one of these verbs."""
    if not any(hasattr(model, verb) for verb in verbs):
        raise TypeError(f"{type(model).__name__} has no {' or '.join(verbs)}: this measure cannot be taken of it.")


def first_rows(dataset: Any, limit: int | None) -> range:
    """The first `limit` rows (all if None). Raises ValueError if there are none."""
    rows = range(len(dataset) if limit is None else min(limit, len(dataset)))
    if not rows:
        raise ValueError("Nothing to evaluate: the dataset is empty or limit is 0.")
    return rows


def images_of(model: Any, dataset: Any, rows: Sequence[int]) -> Tensor:
    """Images (B, 3, H, W) of these rows, on the model's device. A row asked twice is decoded once."""
    distinct, where = np.unique(np.asarray(rows), return_inverse=True)
    pixels = dataset.pixels(distinct.tolist(), model.config.image.image_size)
    return to_tensor(pixels)[torch.from_numpy(where.reshape(-1))].to(device_of(model))


def embed_images(model: Any, dataset: Any, rows: Sequence[int], batch_size: int = 250) -> Tensor:
    """Unit vectors (n, E) of the images of these rows: each image is encoded once."""
    return torch.cat([model.embed_images(images_of(model, dataset, part)) for part in chunks(rows, batch_size)]).float()


def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 250) -> Tensor:
    """Unit vectors (n, E) of these texts: each text is encoded once, however often it stands in the list."""
    distinct = list(dict.fromkeys(texts))
    parts = [model.embed_texts(*texts_of(model, tokenizer, part)) for part in chunks(distinct, batch_size)]
    row = {text: i for i, text in enumerate(distinct)}
    return torch.cat(parts).float()[[row[text] for text in texts]]


def pair_scores(
    model: Any, dataset: Any, tokenizer: Any, rows: Sequence[int], texts: Sequence[str], batch_size: int = 250
) -> Tensor:
    """How well row i and text i fit, (n,): by `match` if the model has it, else by the cosine of the two embeddings."""
    need(model, "match", "embed_images")
    if not hasattr(model, "match"):
        distinct, where = np.unique(np.asarray(rows), return_inverse=True)
        image = embed_images(model, dataset, distinct.tolist(), batch_size)[torch.from_numpy(where.reshape(-1))]
        return (image * embed_texts(model, tokenizer, texts, batch_size)).sum(-1)
    parts = [
        each_text(model, "match", dataset, tokenizer, [rows[i] for i in some], [texts[i] for i in some])
        for some in chunks(range(len(rows)), batch_size)
    ]
    return torch.cat(parts).float()


def each_text(model: Any, verb: str, dataset: Any, tokenizer: Any, rows: Sequence[int], texts: Sequence[str]) -> Tensor:
    """What `verb` (match, ground) says of text i and the image of row i: (B, ...), in one pass.

    Texts of one image should stand together: with the verb's `_many` form the model encodes their image once.
    """
    distinct, where = np.unique(np.asarray(rows), return_inverse=True)
    images, which = images_of(model, dataset, distinct.tolist()), torch.from_numpy(where.reshape(-1))
    return once_each(model, verb, images, which.to(images.device), *texts_of(model, tokenizer, texts))


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """The items in runs of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
