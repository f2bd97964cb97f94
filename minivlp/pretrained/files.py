"""The files of a released model, on disk or on the model hub, read without running any code in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minivlp.weight_files import (
    EXTENSIONS,
    INDEX,
    CheckpointError,
    near_names,
    read_file,
    read_shards,
    read_weights,
    suggestion,
    unwrapped,
)

SETTINGS = ("config.json", "open_clip_config.json")
OURS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
OPEN_CLIP = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_model.safetensors.index.json", "open_clip_pytorch_model.bin.index.json",
)  # fmt: skip
# the weights that belong to a settings file, in the order in which they are looked for
WEIGHTS = {"config.json": OURS, "open_clip_config.json": (*OPEN_CLIP, *OURS)}


@dataclass(frozen=True)
class Files:
    """A checkpoint as it was read.

    settings: of `settings_file`, both empty where there is none. location: its folder or hub id, None for a single
    file.
    """

    source: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    location: str | None
    settings_file: str = ""


def read(source: str | Path, weight_set: str | None = None) -> Files:
    """A folder, a single file (.safetensors, .pth, .pt, .bin, …), or a model by its id on the hub ("owner/name").

    The hub's files are downloaded once and kept in its cache. A folder's settings are those that stand beside their own
    weights; without settings its weights are read all the same, as a family may need none. weight_set: as in
    `read_weights`. Raises CheckpointError where there is nothing to read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return Files(str(path), read_weights(path, weight_set), {}, None)
    if not path.is_dir() and not is_hub_id(str(source)):
        hint = suggestion(path, ("",))
        raise CheckpointError(f"{source}: there is no such file or folder, and it is no hub id like owner/name{hint}")
    for name in SETTINGS:
        found = find(source, name)
        settings = read_settings(found) if found else {}
        if not settings or (name == "config.json" and not {"model_type", "minivlp"} & settings.keys()):
            continue  # a config.json of something else: timm's, beside open_clip's
        weights = first_of(source, WEIGHTS[name])
        if weights is not None:
            return Files(str(source), read_found(source, weights, weight_set), settings, str(source), name)
    weights = first_of(source, WEIGHTS["open_clip_config.json"])
    if weights is not None:
        return Files(str(source), read_found(source, weights, weight_set), {}, str(source))
    raise CheckpointError(f"{source}: {what_is_there(source)}")


def first_of(source: str | Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files that a folder or a hub id has."""
    return next((file for file in map(lambda name: find(source, name), names) if file), None)


def read_found(source: str | Path, weights: Path, weight_set: str | None) -> dict[str, Tensor]:
    """The tensors of a file of weights, or of the shards that it lists: a hub id's are fetched by name."""
    held = read_shards(weights, lambda name: find(source, name)) if weights.name.endswith(INDEX) else read_file(weights)
    return unwrapped(held, str(weights), weight_set)


def what_is_there(source: str | Path) -> str:
    """What a folder, or a hub id, has instead of settings and weights that we know."""
    folder = Path(source).expanduser()
    here = [name for name in SETTINGS if find(source, name)]
    wanted = [name for key in here or SETTINGS for name in WEIGHTS[key]]
    lacking = f"there is {' and '.join(here)}, but" if here else f"there is no {' and no '.join(SETTINGS)}, and"
    lacking += f" none of {', '.join(dict.fromkeys(wanted))}"
    files = sorted(file.name for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    near = list(dict.fromkeys(name for want in wanted for name in near_names(want, files) if name not in SETTINGS))
    others = [name for name in files if name.endswith(EXTENSIONS) and name not in near]
    if near:
        return f"{lacking}. Is {' or '.join(near)} one of them under another name? Rename it"
    if others:
        return f"{lacking}. Name a file of weights itself: {', '.join(str(folder / name) for name in others[:5])}"
    return f"{lacking}. Copy all files of the model into one folder"


def is_hub_id(source: str) -> bool:
    """Whether this may be the name of a model on the hub: "owner/name", nothing that looks like a path or a file."""
    file = source.endswith((*EXTENSIONS, ".json"))
    return source.count("/") == 1 and not source.startswith((".", "~", "/")) and "\\" not in source and not file


def find(source: str | Path, name: str) -> Path | None:
    """A file of a folder, or of a model on the hub; None if there is none of this name."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name))
    except LocalEntryNotFoundError:  # no connection: the cache is all there is
        if in_cache(str(source)):
            return None
        raise CheckpointError(
            f"{source}: not on this machine, and the model hub cannot be reached (or HF_HUB_OFFLINE forbids it). "
            "Load it once with a connection, and it stays in the cache; or name a folder that holds its files"
        ) from None
    except EntryNotFoundError:
        return None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{source}: the hub has no such public model; is it spelled right?") from None


def in_cache(source: str) -> bool:
    """Whether weights of this model, and their settings, were downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    names = {name for names in (SETTINGS, *WEIGHTS.values()) for name in names}
    cached = {name for name in names if isinstance(try_to_load_from_cache(source, name), str)}
    return any(name in cached and cached & set(WEIGHTS[name]) for name in SETTINGS)


def read_settings(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error}); it may be truncated: copy it again") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: holds no object with settings, but {type(settings).__name__}: copy it again")
    return settings
