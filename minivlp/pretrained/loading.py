"""From a name to a released model: which release a checkpoint is, its config, and its weights in our class."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minivlp.layers.embeddings import ImageConfig, resize_positions
from minivlp.papers import PAPERS, Paper
from minivlp.pretrained.files import Files, find, read, read_settings
from minivlp.pretrained.keys import Inputs, Release, Size, translate
from minivlp.pretrained.loaded import Pretrained
from minivlp.pretrained.preprocess import (
    FILE,
    read_saved,
)
from minivlp.training.checkpoint import (
    build_config,
    set_weights,
    weights,
    without_random_init,
)
from minivlp.weight_files import CheckpointError, grouped

POSITIONS = ("image.embed.positions", "joint.image_embed.positions")


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
