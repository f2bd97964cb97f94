"""A loaded release: its model, its tokenizer and its image processor, and the folder that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.data.lost_text import check_text
from minivlp.data.pictures import to_rgbs
from minivlp.data.text import load_tokenizer
from minivlp.inference import tokenize_for
from minivlp.layers.embeddings import PixelNormalization
from minivlp.pretrained.files import find, read_settings
from minivlp.pretrained.keys import Inputs, Release, Size
from minivlp.pretrained.parts import crop, squash
from minivlp.pretrained.preprocess import (
    check_preprocessor,
    output_size,
    pixel_statistics,
)
from minivlp.training.checkpoint import (
    config_to_dict,
    save_model,
)
from minivlp.weight_files import CheckpointError

OUR_PIXELS = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}  # our own models take pixels in [-1, 1]


@dataclass(frozen=True)
class Pretrained:
    """A loaded model, its tokenizer and its image processor.

    missing: parts of our class that the checkpoint does not have, such as the matching head of a captioner. Their
    weights are random, so the verbs that use them mean nothing before they are trained. location: the folder or hub id
    that may hold the tokenizer and the settings of the image processor. release: None for a folder that
    `save_pretrained` wrote. resized: whether another image size than the checkpoint's was asked for. inputs: what the
    settings of the release say of texts and pictures.
    """

    model: nn.Module
    source: str
    missing: tuple[str, ...] = ()
    location: str | None = None
    release: Release | None = None
    resized: bool = False
    inputs: Inputs = Inputs()

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of this model. Raises CheckpointError where there is none that fits."""
        files = ("tokenizer.json", "vocab.txt", "vocab.json")
        own = self.location is not None and any(find(self.location, file) for file in files)
        if not own and self.release is None:
            raise CheckpointError(f"{self.source} holds no tokenizer: give one to `save_pretrained`")
        name = self.location if own else self.inputs.tokenizer or self.release.tokenizer
        try:
            tokenizer = load_tokenizer(name)
        except OSError as error:
            raise CheckpointError(f"no tokenizer for {self.source}: {error}") from None
        vocabulary, end = self.model.config.text.vocabulary, self.inputs.end_id
        if len(tokenizer) > vocabulary:
            raise CheckpointError(
                f"the tokenizer {name} has {len(tokenizer)} entries, the model {vocabulary}: it is another model's"
            )
        if end is not None and tokenizer("a")["input_ids"][-1] != end:
            raise CheckpointError(
                f"the tokenizer {name} does not end texts by the id {end}, as open_clip's 'eos_id' says"
            )
        return tokenizer

    @cached_property
    def processor(self) -> Any:
        """The image processor, with size, crop and colors as the model was trained: transformers', or a `Preprocess`.

        Raises CheckpointError where its settings have unknown keys, or make pictures of another size than the model's.
        """
        import transformers

        if self.inputs.preprocess is not None:
            return self.inputs.preprocess
        size = self.model.config.image.size
        name = "AutoImageProcessor" if self.release is None else self.release.processor
        kind, file = getattr(transformers, name), self.processor_file()
        if file is None:
            settings = {**squash(size), **OUR_PIXELS} if self.release is None else self.release.processor_settings(size)
            return (transformers.BlipImageProcessor if self.release is None else kind)(**settings)
        settings = read_settings(file)
        settings = settings.get("image_processor", settings)
        check_preprocessor(str(file), settings, None if self.release is None else name)
        stored = kind.from_pretrained(self.location)
        if self.resized:
            return kind.from_pretrained(self.location, **size_settings(stored, size))
        made = output_size(stored)
        if made is not None and made != size:
            raise CheckpointError(
                f"{file} makes pictures of {made[0]} x {made[1]} pixels, and the model takes {size[0]} x {size[1]}: "
                "correct the file, or load with image_size=" + (str(made[0]) if made[0] == made[1] else str(made))
            )
        return stored

    def processor_file(self) -> Path | None:
        """The settings of transformers' image processor; since version 5 they may be inside a processor's."""
        if self.location is None:
            return None
        whole = find(self.location, "processor_config.json")  # which transformers prefers
        if whole is not None and "image_processor" in read_settings(whole):
            return whole
        return find(self.location, "preprocessor_config.json")

    def __call__(self, images: Any = None, texts: Sequence[str] | str | None = None) -> dict[str, Tensor | Text]:
        """What the model's verbs take, on its device: `model.match(**loaded(pictures, texts))`.

        images: one picture or several: PIL images, paths, arrays or tensors, as `data.pictures.to_rgb` reads them, so
        they are upright RGB before the model's own processing. texts: one or several. Returns `images` (B, 3, H, W),
        with `pixel_mask` (B, H, W) where pictures keep their shapes (ViLT), and `text`, a `Text` (B, L). Raises
        ValueError for a picture that cannot be read, or whose shape or values could mean two things, and for a text of
        which only unknown or special tokens are left. Warns if texts are cut, or are no longer different.
        """
        inputs: dict[str, Tensor | Text] = {}
        if images is not None:
            weight = next(self.model.parameters())
            processed = self.processor(to_rgbs(images), return_tensors="pt")
            inputs["images"] = processed["pixel_values"].to(weight.device, weight.dtype)
            if "pixel_mask" in processed:
                inputs["pixel_mask"] = processed["pixel_mask"].to(weight.device).bool()
        if texts is not None:
            texts = [texts] if isinstance(texts, str) else list(texts)
            inputs["text"] = tokenize_for(self.model, self.tokenizer, texts)
            check_text(self.tokenizer, texts, inputs["text"], self.model.config.text.context_length)
        return inputs

    def on_our_pixels(self) -> OurPixels:
        """`with loaded.on_our_pixels():` the model takes pixels in [-1, 1], as our batches and `evaluation` give them.

        Most releases were trained on pixels normalized in another way, and their outputs would be slightly wrong
        without an error. Without `with`, call `remove()` on what this returns.
        """
        return OurPixels(self.model, *pixel_statistics(self.processor))

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
