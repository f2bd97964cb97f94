"""How pictures become the pixels of a released model: open_clip's `preprocess_cfg`, and transformers' settings.

`Preprocess` computes what `open_clip.image_transform_v2` does in evaluation, pixel by pixel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from minivlp.pretrained.keys import Size
from minivlp.pretrained.parts import CLIP_MEAN_STD
from minivlp.pretrained.settings import HARMLESS, Section, shown
from minivlp.weight_files import CheckpointError

FILE = "preprocess_cfg.json"  # where `save_pretrained` writes it
INTERPOLATION = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "random": Image.Resampling.BICUBIC,  # of training; in evaluation open_clip takes bicubic
}
RESIZE_MODES = ("shortest", "longest", "squash")


@dataclass(frozen=True)
class Preprocess:
    """open_clip's way from a picture to pixels. size: height and width.

    resize_mode: "shortest" brings the short side to the model's size and cuts the middle out; "longest" the long side,
    and fills the rest with `fill_color` (0..255); "squash" changes the picture's shape. Pixels of 0..1 are then
    normalized by mean and std.
    """

    size: Size
    image_mean: tuple[float, ...] = CLIP_MEAN_STD["image_mean"]
    image_std: tuple[float, ...] = CLIP_MEAN_STD["image_std"]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __call__(self, images: Sequence[Image.Image | np.ndarray], return_tensors: str = "pt") -> dict[str, Tensor]:
        """RGB pictures -> `pixel_values` (B, 3, H, W)."""
        return {"pixel_values": torch.stack([self.pixels(image) for image in images])}

    def pixels(self, image: Image.Image | np.ndarray) -> Tensor:
        """One RGB picture -> (3, H, W)."""
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image = crop_or_pad(self.resized(image.convert("RGB")), self.size, self.fill_color)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.get_default_dtype()) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return (pixels - mean) / std

    def resized(self, image: Image.Image) -> Image.Image:
        (height, width), filter = self.size, INTERPOLATION[self.interpolation]
        if self.resize_mode == "squash":
            return image.resize((width, height), filter)
        down, across = image.height / height, image.width / width
        if self.resize_mode == "longest":
            ratio = max(down, across)
            return image.resize((round(image.width / ratio), round(image.height / ratio)), filter)
        if height != width:  # open_clip does not pass the interpolation on here
            ratio = min(down, across)
            return image.resize((round(image.width / ratio), round(image.height / ratio)), Image.Resampling.BICUBIC)
        short = min(image.size)
        return image.resize(tuple(int(height * side / short) for side in image.size), filter)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the file that `load` reads."""
        (Path(folder) / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def crop_or_pad(image: Image.Image, size: Size, fill: int) -> Image.Image:
    """The middle of a picture, filled up where it is smaller than `size`."""
    height, width = size
    more = max(0, width - image.width), max(0, height - image.height)
    if any(more):
        left, top = more[0] // 2, more[1] // 2
        image = ImageOps.expand(image, (left, top, more[0] - left, more[1] - top), (fill,) * 3)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def from_open_clip(given: Any, size: Size, where: str = "open_clip_config.json, preprocess_cfg") -> Preprocess:
    """What `preprocess_cfg` says. Raises CheckpointError for unknown keys and values, and a size that is not `size`."""
    section = Section(where, {} if given is None else given, asdict(Preprocess(size)))
    section.only("mode", "RGB")
    for key, choices in (("interpolation", tuple(INTERPOLATION)), ("resize_mode", RESIZE_MODES)):
        if section(key) not in choices:
            raise section.wrong(key, " or ".join(choices))
    fill = section("fill_color")
    if isinstance(fill, bool) or not isinstance(fill, int) or not 0 <= fill <= 255:
        raise section.wrong("fill_color", "a whole number of 0..255")
    found = section.size("size")
    if found != size:
        raise section.wrong("size", f"the model's {list(size)} pixels (vision_cfg, 'image_size')")
    defaults = Preprocess(size)
    mean, std = (three(section, key) for key in ("mean", "std"))
    section.finish(())
    return Preprocess(
        size,
        mean or defaults.image_mean,
        std or defaults.image_std,
        section("interpolation"),
        section("resize_mode"),
        fill,
    )


def three(section: Section, key: str) -> tuple[float, ...] | None:
    """One value per color, from a list of three or a single number; None where the file says nothing."""
    value = section(key)
    if value is None:
        return None
    values = list(value) if isinstance(value, list | tuple) else [value] * 3
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if len(values) != 3 or not numbers or (key == "std" and min(values) <= 0):
        raise section.wrong(key, "three numbers" + (" above 0" if key == "std" else ""))
    return tuple(float(value) for value in values)


def read_saved(path: Path, settings: dict[str, Any]) -> Preprocess:
    """What `Preprocess.save_pretrained` wrote."""
    try:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        return Preprocess(**values)
    except TypeError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from None


def check_preprocessor(where: str, settings: Any, kind: str | None) -> None:
    """Raises CheckpointError where preprocessor_config.json has keys that are unknown, or is for another `kind`."""
    section = Section(where, settings)
    section.finish(HARMLESS["preprocessor"])
    for key in ("image_processor_type", "feature_extractor_type"):
        told = section(key)
        stem = str(told).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
        if told is not None and kind is not None and stem != kind:
            raise CheckpointError(
                f"{where}: {key!r} is {shown(told)}; pictures of this family are prepared by {kind}. Correct the file, "
                "or prepare the pictures yourself"
            )


def pixel_statistics(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """mean and std (3,) by which an image processor normalizes pixels of 0..1; its own rescaling is included."""

    def per_color(values: Any) -> list[float]:
        return list(values) if isinstance(values, list | tuple) else [values] * 3

    normalizes = getattr(processor, "do_normalize", True)
    mean = per_color(processor.image_mean) if normalizes else [0.0] * 3
    std = per_color(processor.image_std) if normalizes else [1.0] * 3
    rescales = getattr(processor, "do_rescale", True)
    largest = 255 * (getattr(processor, "rescale_factor", 1 / 255) if rescales else 1)  # of a white pixel
    return tuple(value / largest for value in mean), tuple(value / largest for value in std)


def output_size(processor: Any) -> Size | None:
    """Height and width that an image processor of transformers makes of any picture; None where shapes are kept."""
    crops = getattr(processor, "do_center_crop", False)
    size = getattr(processor, "crop_size", None) if crops else getattr(processor, "size", None)
    if not crops and not getattr(processor, "do_resize", True):
        return None
    if not hasattr(size, "get"):
        return None
    height, width = size.get("height"), size.get("width")
    return (height, width) if height and width else None
