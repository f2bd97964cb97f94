"""Using a model by its verbs: evaluation mode, the model's device, and texts in the form the model reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.data.text import tokenize


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode and without gradients; afterwards every module has its earlier mode again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in training.items():
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def tokenize_for(model: Any, tokenizer: Any, texts: Sequence[str]) -> Text:
    """The texts as tokens on the model's device, cut to its context length."""
    return tokenize(tokenizer, list(texts), model.config.text.context_length).to(device_of(model))


def share_image_encoding(model: Any, verb: str, images: Tensor, image_rows: Tensor, *inputs: Any) -> Tensor:
    """A verb (match, ground, ...) applied to text r and image `image_rows[r]` of `images` (B, 3, H, W), for R texts.

    `inputs` are the verb's further arguments, R rows each, such as a `Text`. A model with `verb_many` encodes each
    image once, however many texts refer to it; for others each image is repeated.
    """
    many = getattr(model, f"{verb}_many", None)
    return many(images, image_rows, *inputs) if many else getattr(model, verb)(images[image_rows], *inputs)
