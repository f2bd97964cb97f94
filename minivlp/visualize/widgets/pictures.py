"""Pictures as a browser shows them and as a model reads them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from minivlp.data.batch import to_tensor
from minivlp.inference import device_of

Picture = Image.Image | np.ndarray


def rgb(image: Picture, longest: int = 512) -> Image.Image:
    """Any PIL image, or uint8 pixels (H, W, 3) or (H, W), as RGB of at most `longest` pixels a side."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ValueError(f"an image is uint8 (H, W, 3) or (H, W), not {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"an image is a PIL image or a uint8 array, not {type(image).__name__}")
    image = ImageOps.exif_transpose(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):  # on white, not on whatever lies beneath
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
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
    resized = [np.asarray(rgb(image).resize((width, height), Image.Resampling.BICUBIC)) for image in images]
    return to_tensor(np.stack(resized)).to(device_of(model))
