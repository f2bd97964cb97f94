"""A released model by its name: its weights in our class, its pictures and texts as tensors."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.asking import texts_of
from minivlp.data.text import load_tokenizer
from minivlp.layers.embed import resize_positions
from minivlp.layers.encoders import ImageConfig
from minivlp.models import MODELS
from minivlp.models.vilt import ViLTAnswers
from minivlp.pretrained import albef, blip, clip, vilt, vlmo, xvlm
from minivlp.pretrained.files import Files, find, read
from minivlp.pretrained.keys import Release, translated
from minivlp.training.checkpoint import CheckpointError, build_config, save_model, set_weights, weights

RELEASES = {
    "clip": clip.RELEASES,
    "vilt": vilt.RELEASES,
    "albef": albef.RELEASES,
    "vlmo": vlmo.RELEASES,
    "blip": blip.RELEASES,
    "xvlm": xvlm.RELEASES,
}
KINDS = (*MODELS.values(), ViLTAnswers)
OURS = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}  # our own models see pixels in [-1, 1]
POSITIONS = ("image.positions", "joint.positions")


@dataclass(frozen=True)
class Pretrained:
    """A loaded model with what it needs to see pictures and read texts.

    missing: parts of our class that the checkpoint does not have, such as the matching head of a captioner. They are as
    `model` was made, so the verbs that use them mean nothing before they are trained.
    """

    model: nn.Module
    source: str
    missing: tuple[str, ...] = ()
    place: str | None = None  # of the tokenizer and of the image processor's settings: a folder, or a hub id
    release: Release | None = None  # None: a folder of our own
    resized: bool = False

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of this model. Raises CheckpointError where it cannot be had."""
        files = ("tokenizer.json", "vocab.txt", "vocab.json")
        own = self.place is not None and any(find(self.place, file) for file in files)
        if not own and self.release is None:
            raise CheckpointError(f"{self.source} holds no tokenizer: give one to `save_pretrained`")
        try:
            return load_tokenizer(self.place if own else self.release.tokenizer)
        except OSError as error:
            raise CheckpointError(f"no tokenizer for {self.source}: {error}") from None

    @cached_property
    def processor(self) -> Any:
        """transformers' image processor: size, crop and colours as the model was trained."""
        import transformers

        size = self.model.config.image.image_size
        stored = self.place is not None and find(self.place, "preprocessor_config.json") is not None
        if self.release is None:
            if stored:
                return transformers.AutoImageProcessor.from_pretrained(self.place)
            return transformers.BlipImageProcessor(size={"height": size, "width": size}, **OURS)
        kind, asked = getattr(transformers, self.release.processor), self.release.pixels(size)
        if not stored:
            return kind(**asked)
        sizes = {name: value for name, value in asked.items() if self.resized and "size" in name}
        return kind.from_pretrained(self.place, **sizes)

    def __call__(self, images: Any = None, texts: Sequence[str] | str | None = None) -> dict[str, Tensor]:
        """What the model's verbs take, on its device: `model.match(**loaded(pictures, texts))`.

        images: one PIL image or several, also uint8 arrays (H, W, 3); texts: one or several. Returns `images`
        (B, 3, H, W), with `pixel_mask` (B, H, W) where pictures keep their shapes (ViLT), and `ids`, `mask` (B, L).
        """
        given: dict[str, Tensor] = {}
        if images is not None:
            weight = next(self.model.parameters())
            several = isinstance(images, list | tuple) or getattr(images, "ndim", 3) == 4
            seen = self.processor(list(images) if several else [images], return_tensors="pt")
            given["images"] = seen["pixel_values"].to(weight.device, weight.dtype)
            if "pixel_mask" in seen:
                given["pixel_mask"] = seen["pixel_mask"].to(weight.device).bool()
        if texts is not None:
            texts = [texts] if isinstance(texts, str) else texts
            given["ids"], given["mask"] = texts_of(self.model, self.tokenizer, texts)
        return given

    def on_our_pixels(self) -> Any:
        """`with loaded.on_our_pixels():` the model takes pixels in [-1, 1], as our batches and `evaluation` give them.

        Released CLIP and BLIP were trained on pixels scaled otherwise, and would be silently off.
        """
        mean, std = (
            torch.tensor(value)[:, None, None] for value in (self.processor.image_mean, self.processor.image_std)
        )  # (3, 1, 1) each
        tower = self.model.joint if hasattr(self.model, "joint") else self.model.image

        def rescale(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            return ((given[0] / 2 + 0.5 - mean.to(given[0])) / std.to(given[0]),)

        return tower.patches.register_forward_pre_hook(rescale)

    def save(self, folder: Path | str) -> None:
        """`save_pretrained` of the model with its tokenizer and image processor."""
        save_pretrained(self.model, folder, self.tokenizer, self.processor, self.missing)


def load(family: str, source: str | Path, *, image_size: int | None = None, config: Any = None) -> Pretrained:
    """A released model in our class, in evaluation mode, with its tokenizer and image processing.

    Args:
        family: a name of `models.MODELS`, such as "clip".
        source: a model's id on the hub, which is downloaded unless it is in the cache; a folder of transformers, of
            open_clip or of `save_pretrained`; or the authors' .pth.
        image_size: another side in pixels than the model's own; its patch positions are interpolated.
        config: sizes, where they cannot be told from the checkpoint.
    Raises CheckpointError that says what is missing or unknown in the checkpoint; ValueError for an unknown family, and
    for an `image_size` where positions are relative (VLMo, X-VLM's Swin).
    """
    if family not in MODELS:
        raise ValueError(f"no family {family!r}; there are {', '.join(MODELS)}")
    files = read(source)
    release, missing = None, tuple(files.settings.get("missing", ()))
    if "minivlp" in files.settings:  # `save_pretrained` wrote it
        model, found = _ours(family, files, config, image_size)
    else:
        release = _release(family, files)
        model, found, missing = _theirs(family, files, release, config, image_size)
    set_weights(model, found, files.source)
    return Pretrained(model.eval(), files.source, missing, files.place, release, image_size is not None)


def _release(family: str, files: Files) -> Release:
    for release in RELEASES[family]:
        if any(name.startswith(release.mark) for name in files.tensors):
            return release
    marks = " or ".join(f"{release.mark}*" for release in RELEASES[family])
    raise CheckpointError(f"{files.source} is no {MODELS[family].__name__} that we know: it has no {marks}")


def _theirs(
    family: str, files: Files, release: Release, config: Any, image_size: int | None
) -> tuple[nn.Module, dict[str, Tensor], tuple[str, ...]]:
    """The model of a released checkpoint, all of its weights, and which parts of them are not from there."""
    try:
        config = config or release.config(files.tensors, files.settings)
    except KeyError as unknown:
        raise CheckpointError(
            f"{files.source}: its sizes cannot be told without {unknown.args[0]!r}. Name a folder with its config "
            f"file, or give `config=`, such as {MODELS[family].Config.__name__}.paper()"
        ) from None
    model = next(kind for kind in KINDS if kind.Config is type(config))(_sized(config, image_size))
    found, missing = translated(release, files.tensors, model, files.source)
    if missing:
        warnings.warn(
            f"{files.source} has no {', '.join(missing)}: what needs them means nothing before it is trained",
            stacklevel=4,
        )
    _fit_positions(found, config.image, model.config.image, release.resize)
    return model, weights(model) | found, missing


def _ours(family: str, files: Files, config: Any, image_size: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model that `save_pretrained` wrote, and its weights."""
    name = files.settings["minivlp"]
    kind = next((k for k in KINDS if k.__name__ == name and k.__module__ == MODELS[family].__module__), None)
    if kind is None:
        raise CheckpointError(f"{files.source} holds {name}, not {MODELS[family].__name__}")
    config = config or build_config(kind.Config, files.settings["config"])
    model, found = kind(_sized(config, image_size)), files.tensors
    _fit_positions(found, config.image, model.config.image)
    return model, found


def _sized(config: Any, image_size: int | None) -> Any:
    return config if image_size is None else replace(config, image=replace(config.image, image_size=image_size))


def _fit_positions(
    found: dict[str, Tensor], old: ImageConfig, new: ImageConfig, resize: tuple[str, bool] = ("bicubic", False)
) -> None:
    """Interpolate the learned patch positions where the image size has changed."""
    if old.image_size == new.image_size or old.sincos_positions:
        return
    place = next((name for name in POSITIONS if name in found), None)
    if place is None:
        raise ValueError(f"positions are relative here: this model keeps its {old.image_size} pixels")
    found[place] = resize_positions(found[place], (old.grid, old.grid), (new.grid, new.grid), *resize)


def save_pretrained(
    model: nn.Module,
    folder: Path | str,
    tokenizer: Any = None,
    processor: Any = None,
    missing: Sequence[str] = (),
) -> None:
    """Write a folder that `load` reads: config.json, model.safetensors, and the files of tokenizer and processor.

    Without a processor pictures are squashed to a square and scaled to [-1, 1], as all our own models see them.
    """
    folder = Path(folder)
    save_model(model, folder / "model.safetensors")
    settings = {"minivlp": type(model).__name__, "config": dataclasses.asdict(model.config), "missing": list(missing)}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for part in (tokenizer, processor):
        if part is not None:
            part.save_pretrained(folder)
