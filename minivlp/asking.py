"""Asking a model by its verbs, whoever asks: in evaluation mode, on its device, with texts as it reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minivlp.data.text import encode


@contextmanager
def evaluating(model: Any) -> Iterator[Any]:
    """The model without dropout and without gradients; every part is put back as it was."""
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for part, was in training.items():
            part.training = was


def device_of(model: Any) -> torch.device:
    """Where the model's weights lie."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def texts_of(model: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) and mask (B, L) of these texts, on the model's device."""
    ids, mask = encode(tokenizer, list(texts), model.config.text.context_length)
    return ids.to(device_of(model)), mask.to(device_of(model))


def once_each(model: Any, verb: str, images: Tensor, rows: Tensor, *texts: Tensor) -> Tensor:
    """What `verb` (match, ground) says of text r (ids, mask (R, L), what else it reads) and image rows[r] (B, 3, H, W).

    A model that has `verb_many` encodes each image once, however many texts speak of it.
    """
    many = getattr(model, f"{verb}_many", None)
    return many(images, rows, *texts) if many else getattr(model, verb)(images[rows], *texts)
