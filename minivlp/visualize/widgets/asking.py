"""Asking a model by its verbs: pixels and words as it reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from minivlp.data.batch import to_tensor
from minivlp.data.text import encode
from minivlp.visualize.widgets.pictures import Picture, rgb


@contextmanager
def looking(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every part is as it was."""
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, was in training.items():
            part.training = was


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's weights lie."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def pixels_of(model: torch.nn.Module, images: Sequence[Picture]) -> torch.Tensor:
    """Images as the model reads them, squashed to its square: (B, 3, size, size)."""
    size = (model.config.image.image_size,) * 2
    squashed = [np.asarray(rgb(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
    return to_tensor(np.stack(squashed)).to(device_of(model))


def texts_of(model: torch.nn.Module, tokenizer: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, (B, L) each, on the model's device."""
    ids, mask = encode(tokenizer, list(texts), model.config.text.context_length)
    return ids.to(device_of(model)), mask.to(device_of(model))
