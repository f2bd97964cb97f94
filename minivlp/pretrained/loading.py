"""A released model by its name: its weights in our class, its tokenizer and its image processor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.data.text import load_tokenizer
from minivlp.inference import tokenize_for
from minivlp.layers.embeddings import ImageConfig, PixelNormalization, resize_positions
from minivlp.papers import PAPERS, Paper
from minivlp.pretrained.files import Files, find, read
from minivlp.pretrained.keys import Release, Size, translate
from minivlp.pretrained.parts import crop, squash
from minivlp.training.checkpoint import (
    CheckpointError,
    build_config,
    config_to_dict,
    save_model,
    set_weights,
    weights,
    without_random_init,
)

OUR_PIXELS = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}  # our own models take pixels in [-1, 1]
POSITIONS = ("image.embed.positions", "joint.image_embed.positions")


@dataclass(frozen=True)
class Pretrained:
    """A loaded model, its tokenizer and its image processor.

    missing: parts of our class that the checkpoint does not have, such as the matching head of a captioner. Their
    weights are random, so the verbs that use them mean nothing before they are trained. location: the folder or hub id
    that may hold the tokenizer and the settings of the image processor. release: None for a folder that
    `save_pretrained` wrote. resized: whether another image size than the checkpoint's was asked for.
    """

    model: nn.Module
    source: str
    missing: tuple[str, ...] = ()
    location: str | None = None
    release: Release | None = None
    resized: bool = False

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of this model. Raises CheckpointError where there is none."""
        files = ("tokenizer.json", "vocab.txt", "vocab.json")
        own = self.location is not None and any(find(self.location, file) for file in files)
        if not own and self.release is None:
            raise CheckpointError(f"{self.source} holds no tokenizer: give one to `save_pretrained`")
        try:
            return load_tokenizer(self.location if own else self.release.tokenizer)
        except OSError as error:
            raise CheckpointError(f"no tokenizer for {self.source}: {error}") from None

    @cached_property
    def processor(self) -> Any:
        """transformers' image processor: size, crop and colors as the model was trained."""
        import transformers

        size = self.model.config.image.size
        kind = transformers.AutoImageProcessor
        if self.release is not None:
            kind = getattr(transformers, self.release.processor)
        if self.location is not None and find(self.location, "preprocessor_config.json") is not None:
            stored = kind.from_pretrained(self.location)
            return kind.from_pretrained(self.location, **size_settings(stored, size)) if self.resized else stored
        if self.release is not None:
            return kind(**self.release.processor_settings(size))
        return transformers.BlipImageProcessor(**{**squash(size), **OUR_PIXELS})

    def __call__(self, images: Any = None, texts: Sequence[str] | str | None = None) -> dict[str, Tensor | Text]:
        """What the model's verbs take, on its device: `model.match(**loaded(pictures, texts))`.

        images: one PIL image or several, also uint8 arrays (H, W, 3); texts: one or several. Returns `images`
        (B, 3, H, W), with `pixel_mask` (B, H, W) where pictures keep their shapes (ViLT), and `text`, a `Text` (B, L).
        """
        inputs: dict[str, Tensor | Text] = {}
        if images is not None:
            weight = next(self.model.parameters())
            several = isinstance(images, list | tuple) or getattr(images, "ndim", 3) == 4
            processed = self.processor(list(images) if several else [images], return_tensors="pt")
            inputs["images"] = processed["pixel_values"].to(weight.device, weight.dtype)
            if "pixel_mask" in processed:
                inputs["pixel_mask"] = processed["pixel_mask"].to(weight.device).bool()
        if texts is not None:
            inputs["text"] = tokenize_for(self.model, self.tokenizer, [texts] if isinstance(texts, str) else texts)
        return inputs

    def on_our_pixels(self) -> OurPixels:
        """`with loaded.on_our_pixels():` the model takes pixels in [-1, 1], as our batches and `evaluation` give them.

        Most releases were trained on pixels normalized in another way, and their outputs would be slightly wrong
        without an error. Without `with`, call `remove()` on what this returns.
        """
        return OurPixels(self.model, self.processor.image_mean, self.processor.image_std)

    def save(self, folder: Path | str) -> None:
        """`save_pretrained` of the model with its tokenizer and image processor."""
        save_pretrained(self.model, folder, self.tokenizer, self.processor, self.missing)


def size_settings(processor: Any, size: Size) -> dict[str, Any]:
    """What to change of an image processor for another image size: it squashes, crops or keeps shapes as before."""
    if processor.size.get("shortest_edge") is None:
        return {"size": {"height": size[0], "width": size[1]}}
    return crop(size) if getattr(processor, "do_center_crop", False) else {"size": {"shortest_edge": min(size)}}


class OurPixels:
    """Makes a model take pixels in [-1, 1] until `remove` is called, or the `with` block ends.

    mean, std: how the model wants pixels of 0..1 to be normalized. Every part of the model that takes images has a
    module `normalize`, which is extended.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        self.before = {
            part: part.normalize for part in model.modules() if isinstance(getattr(part, "normalize", None), nn.Module)
        }
        for part, normalize in self.before.items():
            part.normalize = nn.Sequential(PixelNormalization(tuple(mean), tuple(std)), normalize)

    def remove(self) -> None:
        """The model takes the pixels of its own image processor again."""
        for part, normalize in self.before.items():
            part.normalize = normalize

    def __enter__(self) -> OurPixels:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def load(family: str, source: str | Path, *, image_size: int | Size | None = None, config: Any = None) -> Pretrained:
    """A released model in our class, in evaluation mode, with its tokenizer and image processing.

    Args:
        family: a name of `papers.PAPERS`, such as "clip".
        source: a model's id on the hub, which is downloaded unless it is in the cache; a folder of transformers, of
            open_clip or of `save_pretrained`; or the authors' .pth.
        image_size: pixels of a side, or (height, width), where they differ from the model's own; its patch positions
            are interpolated.
        config: our config, where the checkpoint does not tell its sizes.
    Raises CheckpointError that says what is missing or unknown in the checkpoint, or which sizes it does not tell;
    ValueError for an unknown family, and for an `image_size` where positions are relative (VLMo, X-VLM's Swin).
    """
    if family not in PAPERS:
        raise ValueError(f"no family {family!r}; there are {', '.join(PAPERS)}")
    paper, files = PAPERS[family], read(source)
    release, missing = None, tuple(files.settings.get("missing", ()))
    if "minivlp" in files.settings:  # `save_pretrained` wrote it
        model, found = from_ours(paper, files, config, image_size)
    else:
        release = release_of(paper, files)
        model, found, missing = from_release(paper, files, release, config, image_size)
    set_weights(model, found, files.source)
    if missing and release is not None:
        warnings.warn(
            f"{files.source} has no {', '.join(missing)}: what needs them means nothing before it is trained",
            stacklevel=2,
        )
    return Pretrained(model.eval(), files.source, missing, files.location, release, image_size is not None)


def release_of(paper: Paper, files: Files) -> Release:
    """Which of the paper's releases this checkpoint is. Raises CheckpointError."""
    releases = paper.release_list()
    for release in releases:
        if any(name.startswith(release.key_prefix) for name in files.tensors):
            return release
    prefixes = " or ".join(f"{release.key_prefix}*" for release in releases)
    raise CheckpointError(f"{files.source} is no {paper.model_class().__name__} that we know: it has no {prefixes}")


def from_release(
    paper: Paper, files: Files, release: Release, config: Any, image_size: int | Size | None
) -> tuple[nn.Module, dict[str, Tensor], tuple[str, ...]]:
    """The model of a released checkpoint, all of its weights, and its parts that are not in the checkpoint."""
    try:
        config = config or release.config(files.tensors, files.settings)
    except KeyError as unknown:
        raise CheckpointError(
            f"{files.source}: its sizes cannot be derived without {unknown.args[0]!r}. Name a folder with its config "
            f"file, or give `config=`, such as {paper.model_class().Config.__name__}.paper()"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{files.source}: {error}") from None
    kind = next((kind for kind in paper.related_classes() if kind.Config is type(config)), None)
    if kind is None:
        known = " or ".join(kind.Config.__name__ for kind in paper.related_classes())
        raise ValueError(f"`config=` is a {type(config).__name__}; {paper.name} takes {known}")
    if getattr(config, "momentum", None) is not None:
        config = replace(config, momentum=None)  # released momentum models are not read: only training needs them
    resized = with_image_size(config, image_size)
    with without_random_init():
        model = kind(resized)
    found, missing = translate(release, files.tensors, model, files.source)
    fit_positions(found, config.image, resized.image, release.interpolation)
    if missing:  # these parts keep a fresh model's weights, which have to be random
        model = kind(resized)
    return model, weights(model) | found, missing


def from_ours(
    paper: Paper, files: Files, config: Any, image_size: int | Size | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model that `save_pretrained` wrote, and its weights."""
    name = files.settings["minivlp"]
    kind = next((kind for kind in paper.related_classes() if kind.__name__ == name), None)
    if kind is None:
        raise CheckpointError(f"{files.source} holds {name}, not {paper.model_class().__name__}")
    try:
        config = config or build_config(kind.Config, files.settings["config"])
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{files.source}: its config does not fit {kind.Config.__name__} ({error})") from None
    resized = with_image_size(config, image_size)
    with without_random_init():
        model = kind(resized)
    fit_positions(files.tensors, config.image, resized.image)
    return model, files.tensors


def with_image_size(config: Any, image_size: int | Size | None) -> Any:
    """The same config for another image size, if one is given."""
    return config if image_size is None else replace(config, image=replace(config.image, image_size=image_size))


def fit_positions(
    found: dict[str, Tensor], old: ImageConfig, new: ImageConfig, interpolation: tuple[str, bool] = ("bicubic", False)
) -> None:
    """Interpolate the learned patch positions among the tensors `found` if the image size has changed, in place.

    Raises ValueError where there is no table of them.
    """
    if old.size == new.size or old.sincos_positions:
        return
    name = next((name for name in POSITIONS if name in found), None)
    if name is None:
        height, width = old.size
        raise ValueError(
            "there are no patch positions to interpolate (they are relative, or inside a timm model): this model keeps "
            f"its {height} x {width} pixels"
        )
    found[name] = resize_positions(found[name], old.grid, new.grid, *interpolation)


def save_pretrained(
    model: nn.Module,
    folder: Path | str,
    tokenizer: Any = None,
    processor: Any = None,
    missing: Sequence[str] = (),
) -> None:
    """Write a folder that `load` reads: config.json, model.safetensors, and the files of tokenizer and processor.

    Without a processor, pictures are resized to the model's height and width and scaled to [-1, 1], as our own models
    take them.
    """
    folder = Path(folder)
    save_model(model, folder / "model.safetensors")
    settings = {"minivlp": type(model).__name__, "config": config_to_dict(model.config), "missing": list(missing)}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for part in (tokenizer, processor):
        if part is not None:
            part.save_pretrained(folder)
