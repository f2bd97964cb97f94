"""Pictures as a browser shows them and as a model reads them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from minivlp.data.batch import to_tensor
from minivlp.data.pictures import Picture, resized, to_rgb, to_rgbs
from minivlp.inference import device_of


def rgb(image: Picture, longest: int = 512) -> Image.Image:
    """Any picture that `data.pictures.to_rgb` reads, as RGB of at most `longest` pixels a side."""
    image = to_rgb(image)
    image.thumbnail((longest, longest))
    return image


def thumbnail(image: Picture) -> Image.Image:
    """The picture as RGB of at most 96 pixels a side."""
    return rgb(image, longest=96)


def data_url(image: Image.Image, kind: str | None = None) -> str:
    """The picture as what a browser's <img> takes without a request; by default small ones are PNG, photos JPEG."""
    kind = kind or ("PNG" if max(image.size) <= 160 else "JPEG")
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 88, "subsampling": 0} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def png(figure: Any) -> bytes:
    """A matplotlib figure as a small PNG: 256 colors, less than half of the bytes."""
    file, small = io.BytesIO(), io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    Image.open(file).quantize(256, method=Image.Quantize.FASTOCTREE).save(small, "PNG", optimize=True)
    return small.getvalue()


def pixels_of(model: torch.nn.Module, images: Sequence[Picture]) -> torch.Tensor:
    """Images as the model reads them, resized to its height and width: (B, 3, H, W). Proportions are not kept."""
    height, width = model.config.image.size
    pixels = np.stack([resized(image, height, width) for image in to_rgbs(list(images))])  # (B, H, W, 3)
    return to_tensor(pixels).to(device_of(model))
