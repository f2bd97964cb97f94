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
from minivlp.data.lost_text import check_text
from minivlp.data.pictures import to_rgbs
from minivlp.data.text import load_tokenizer
from minivlp.inference import tokenize_for
from minivlp.layers.embeddings import ImageConfig, PixelNormalization, resize_positions
from minivlp.papers import PAPERS, Paper
from minivlp.pretrained.files import Files, find, read, read_settings
from minivlp.pretrained.keys import Inputs, Release, Size, translate
from minivlp.pretrained.parts import crop, squash
from minivlp.pretrained.preprocess import (
    FILE,
    check_preprocessor,
    output_size,
    pixel_statistics,
    read_saved,
)
from minivlp.training.checkpoint import (
    build_config,
    config_to_dict,
    save_model,
    set_weights,
    weights,
    without_random_init,
)
from minivlp.weight_files import CheckpointError, grouped

OUR_PIXELS = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}  # our own models take pixels in [-1, 1]
POSITIONS = ("image.embed.positions", "joint.image_embed.positions")


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


def load(
    family: str,
    source: str | Path,
    *,
    image_size: int | Size | None = None,
    config: Any = None,
    weight_set: str | None = None,
) -> Pretrained:
    """A released model in our class, in evaluation mode, with its tokenizer and image processing.

    Args:
        family: a name of `papers.PAPERS`, such as "clip".
        source: a model's id on the hub, which is downloaded unless it is in the cache; a folder of transformers, of
            open_clip or of `save_pretrained`; or the authors' .pth.
        image_size: pixels of a side, or (height, width), where they differ from the model's own; its patch positions
            are interpolated.
        config: our config, where the checkpoint does not tell its sizes and activation; it takes the place of the
            checkpoint's settings.
        weight_set: which weights of a file that holds several, such as "model_ema" (`weight_files`).
    Raises CheckpointError that says what is missing or unknown in the checkpoint or its settings, or which sizes it
    does not tell, and UnsupportedModel, which is one, for what our classes cannot express;
    ValueError for an unknown family, and for an `image_size` where positions are relative (VLMo, X-VLM's Swin).
    """
    if family not in PAPERS:
        raise ValueError(f"no family {family!r}; there are {', '.join(PAPERS)}")
    paper, files = PAPERS[family], read(source, weight_set)
    release, missing = None, tuple(files.settings.get("missing", ()))
    if "minivlp" in files.settings:  # `save_pretrained` wrote it
        model, found = from_ours(paper, files, config, image_size)
        inputs = saved_inputs(files)
    else:
        release = release_of(paper, files)
        model, found, missing, inputs = from_release(paper, files, release, config, image_size)
    if inputs.preprocess is not None:
        inputs = replace(inputs, preprocess=replace(inputs.preprocess, size=model.config.image.size))
    set_weights(model, found, files.source)
    if missing and release is not None:
        warnings.warn(
            f"{files.source} has no {', '.join(missing)}: what needs them means nothing before it is trained",
            stacklevel=2,
        )
    return Pretrained(model.eval(), files.source, missing, files.location, release, image_size is not None, inputs)


def saved_inputs(files: Files) -> Inputs:
    """What `Pretrained.save` kept of an open_clip release's way to prepare pictures."""
    path = find(files.location, FILE)
    return Inputs() if path is None else Inputs(preprocess=read_saved(path, read_settings(path)))


def release_of(paper: Paper, files: Files) -> Release:
    """Which of the paper's releases this checkpoint is. Raises CheckpointError."""
    releases = paper.release_list()
    for release in releases:
        if any(name.startswith(release.key_prefix) for name in files.tensors):
            return release
    prefixes = " or ".join(f"{release.key_prefix}*" for release in releases)
    raise CheckpointError(
        f"{files.source} is no {paper.model_class().__name__} that we know: "
        f"it has no {prefixes}, but {some_names(files)}"
    )


def some_names(files: Files) -> str:
    """How the names of a checkpoint's tensors begin."""
    listed = grouped(sorted(files.tensors))
    return listed if len(listed) <= 200 else listed[:197] + "..."


def settings_needed(paper: Paper, files: Files, release: Release) -> CheckpointError:
    """The error that weights came without the settings that tell their sizes and activation."""
    kind, wanted = paper.model_class().__name__, release.settings_file
    beside = Path(files.source).parent / wanted
    if files.location is None and beside.is_file():
        advice = f"{wanted} lies beside it: name the folder {beside.parent}"
    elif files.settings_file:
        advice = f"these names belong to a {wanted}, and there is only {files.settings_file}: add it"
    else:
        advice = f"name a folder that also holds its {wanted}"
    return CheckpointError(
        f"{files.source}: its sizes cannot be derived from weights alone, nor the activation of a {kind}; {advice}. "
        f"Or give `config=`, such as {paper.model_class().Config.__name__}.paper() or a `replace` of it"
    )


def from_release(
    paper: Paper, files: Files, release: Release, config: Any, image_size: int | Size | None
) -> tuple[nn.Module, dict[str, Tensor], tuple[str, ...], Inputs]:
    """The model of a released checkpoint, all of its weights, its parts that are not in the file, and its inputs."""
    told = release.settings_file and files.settings_file == release.settings_file
    if config is None and release.settings_file and not told:
        raise settings_needed(paper, files, release)
    try:
        config = config or release.config(files.tensors, files.settings)
        inputs = release.inputs(files.settings, config.image.size) if told and release.inputs else Inputs()
    except KeyError as unknown:
        raise CheckpointError(
            f"{files.source}: its sizes cannot be derived without {unknown.args[0]!r}. Name a folder with its config "
            f"file, or give `config=`, such as {paper.model_class().Config.__name__}.paper()"
        ) from None
    except CheckpointError as error:
        raise type(error)(f"{files.source}: {error}") from None
    kind = next((kind for kind in paper.related_classes() if kind.Config is type(config)), None)
    if kind is None:
        known = " or ".join(kind.Config.__name__ for kind in paper.related_classes())
        raise ValueError(f"`config=` is a {type(config).__name__}; {paper.name} takes {known}")
    if getattr(config, "momentum", None) is not None:
        config = replace(config, momentum=None)  # released momentum models are not read: only training needs them
    resized = with_image_size(config, image_size)
    with without_random_init():
        model = built(kind, resized, files.source)
    found, missing = translate(release, files.tensors, model, files.source)
    fit_positions(found, config.image, resized.image, release.interpolation)
    if missing:  # these parts keep a fresh model's weights, which have to be random
        model = built(kind, resized, files.source)
    return model, weights(model) | found, missing, inputs


def from_ours(
    paper: Paper, files: Files, config: Any, image_size: int | Size | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model that `save_pretrained` wrote, and its weights."""
    name = files.settings["minivlp"]
    kind = next((kind for kind in paper.related_classes() if kind.__name__ == name), None)
    if kind is None:
        raise CheckpointError(f"{files.source} holds {name}, not {paper.model_class().__name__}")
    if unknown := files.settings.keys() - {"minivlp", "config", "missing"}:
        raise CheckpointError(
            f"{files.source}: its config.json has settings that we do not know: {', '.join(sorted(unknown))}. Was it "
            "written by a later version of minivlp? Update, or remove them"
        )
    try:
        config = config or build_config(kind.Config, files.settings["config"])
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{files.source}: its config does not fit {kind.Config.__name__} ({error})") from None
    resized = with_image_size(config, image_size)
    with without_random_init():
        model = built(kind, resized, files.source)
    fit_positions(files.tensors, config.image, resized.image)
    return model, files.tensors


def built(kind: type[nn.Module], config: Any, source: str) -> nn.Module:
    """The model of a config. Raises CheckpointError, naming the checkpoint, for sizes that do not go together."""
    try:
        return kind(config)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: its settings make no {kind.__name__}: {error}") from None


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
