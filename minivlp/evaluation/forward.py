"""From rows of a dataset and strings to a model's verbs, in batches: what every measure needs.

Axes: B batch, M images, N texts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from minivlp.data.batch import to_tensor
from minivlp.data.lost_text import check_texts
from minivlp.inference import device_of, share_image_encoding, tokenize_for

Item = TypeVar("Item", bound=Hashable)
PairScore = Callable[..., Tensor]  # as `pair_scores`: (model, dataset, tokenizer, rows, texts, batch_size) -> (n,)


def need(model: Any, *verbs: str) -> None:
    """Raise TypeError unless the model has one of these verbs."""
    if not any(hasattr(model, verb) for verb in verbs):
        raise TypeError(f"{type(model).__name__} has no {' or '.join(verbs)}: it cannot be measured in this way.")


def first_rows(dataset: Any, limit: int | None) -> range:
    """The first `limit` rows (all if None). Raises ValueError if there are none."""
    rows = range(len(dataset) if limit is None else min(limit, len(dataset)))
    if not rows:
        raise ValueError("Nothing to evaluate: the dataset is empty or limit is 0.")
    return rows


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """The items in runs of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def distinct(items: Sequence[Item]) -> tuple[list[Item], Tensor]:
    """The distinct items in order of first appearance, and for each item its index among them, (n,) long."""
    number = {item: i for i, item in enumerate(dict.fromkeys(items))}
    return list(number), torch.tensor([number[item] for item in items], dtype=torch.long)


def check_words(model: Any, tokenizer: Any, texts: Sequence[str], what: str) -> None:
    """Warn if the model does not get all of these texts, which are called `what`; see `data.lost_text.check_text`."""
    check_texts(tokenizer, texts, model.config.text.context_length, what)


def images_of(model: Any, dataset: Any, rows: Sequence[int]) -> Tensor:
    """Images (B, 3, H, W) of these rows, on the model's device. A row that is asked for twice is decoded once."""
    different, image_rows = distinct([int(row) for row in rows])
    pixels = dataset.pixels(different, model.config.image.image_size)
    return to_tensor(pixels)[image_rows].to(device_of(model))


def for_each_text(
    model: Any, verb: str, dataset: Any, tokenizer: Any, rows: Sequence[int], texts: Sequence[str]
) -> Tensor:
    """The result of `verb` (match, caption_logprob, ground) for text i and the image of row i, (B, ...), in one pass.

    A model that has the verb's `_many` form encodes each image once, so texts of one image should be neighbors.
    """
    different, image_rows = distinct([int(row) for row in rows])
    images = images_of(model, dataset, different)
    return share_image_encoding(
        model, verb, images, image_rows.to(images.device), tokenize_for(model, tokenizer, texts)
    )


def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 250) -> list[Tensor]:
    """Features of the texts, one tensor per batch.

    They stay apart, because features of any shape are allowed: those of late interaction, one vector per token, are as
    long as the longest text of their batch.
    """
    return [model.embed_texts(tokenize_for(model, tokenizer, part)) for part in chunks(texts, batch_size)]


def score_all(
    model: Any, dataset: Any, rows: Sequence[int], text_features: Sequence[Tensor], batch_size: int = 250
) -> Tensor:
    """`score` of every image of these rows with every text, (M, N); each image is encoded once.

    text_features: a tensor per batch of texts, as from `embed_texts`. Images and texts are scored one batch by one
    batch, so that a model with many vectors per image and text needs memory for one such block only.
    """
    table = []
    for part in chunks(rows, batch_size):
        images = model.embed_images(images_of(model, dataset, part))
        table.append(torch.cat([model.score(images, texts) for texts in text_features], dim=1).float())
    return torch.cat(table)


def pair_scores(
    model: Any, dataset: Any, tokenizer: Any, rows: Sequence[int], texts: Sequence[str], batch_size: int = 250
) -> Tensor:
    """How well text i fits the image of row i, (n,): by `match` if the model has it, else by `score` of the features.

    Texts of one image should be neighbors: then the image is encoded once.
    """
    need(model, "match", "embed_images")
    parts = []
    for some in chunks(range(len(rows)), batch_size):
        asked = [int(rows[i]) for i in some], [texts[i] for i in some]
        if hasattr(model, "match"):
            parts.append(for_each_text(model, "match", dataset, tokenizer, *asked))
        else:
            (images, image_rows), (different, text_rows) = (distinct(items) for items in asked)
            features = embed_texts(model, tokenizer, different, batch_size)
            parts.append(score_all(model, dataset, images, features, batch_size)[image_rows, text_rows])
    return torch.cat(parts).float()


def caption_likelihood(
    model: Any, dataset: Any, tokenizer: Any, rows: Sequence[int], texts: Sequence[str], batch_size: int = 250
) -> Tensor:
    """Log-probability of text i as the caption of the image of row i, (n,): the sum over its tokens, [SEP] included.

    It judges a pair by the captioner, whose own loss has never seen a false caption (BLIP's captioner shares its
    cross-attention and feed-forward layers with matching, whose loss has). Longer texts are less likely,
    and a sentence that training captions rarely contain is unlikely for every image: compare with the same texts on
    other images to see what the image adds. Texts of one image should be neighbors.
    """
    need(model, "caption_logprob")
    parts = []
    for some in chunks(range(len(rows)), batch_size):
        asked = [int(rows[i]) for i in some], [texts[i] for i in some]
        parts.append(for_each_text(model, "caption_logprob", dataset, tokenizer, *asked))
    return torch.cat(parts).float()
