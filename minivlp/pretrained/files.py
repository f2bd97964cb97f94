"""The files of a released model, on disk or on the model hub, read without running any code in them."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minivlp.training.checkpoint import CheckpointError

SETTINGS = ("config.json", "open_clip_config.json")
WEIGHTS = {  # in the order in which they are looked for
    "config.json": ("model.safetensors", "pytorch_model.bin"),
    "open_clip_config.json": (
        "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    ),
}  # fmt: skip
WRAPPED = ("model", "module", "state_dict")  # where training scripts keep the weights among other things


@dataclass(frozen=True)
class Files:
    """A checkpoint as it was read. location: its folder or hub id, None for a single file, which has no `settings`."""

    source: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    location: str | None


def read(source: str | Path) -> Files:
    """A folder, a single file (.safetensors, .pth, .pt, .bin), or a model by its id on the hub ("owner/name").

    The hub's files are downloaded once and kept in its cache. Raises CheckpointError where there is nothing to read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return Files(str(path), read_tensors(path), {}, None)
    if not path.is_dir() and not is_hub_id(str(source)):
        raise CheckpointError(f"{source}: there is no such file or folder, and it is no hub id like owner/name")
    for name in SETTINGS:
        found = find(source, name)
        settings = read_settings(found) if found else {}
        if not settings or (name == "config.json" and not {"model_type", "minivlp"} & settings.keys()):
            continue  # a config.json of something else: timm's, beside open_clip's
        weights = next((file for file in map(lambda w: find(source, w), WEIGHTS[name]) if file), None)
        if weights is None:
            raise CheckpointError(f"{source}: there is {name}, but none of {', '.join(WEIGHTS[name])}")
        return Files(str(source), read_tensors(weights), settings, str(source))
    raise CheckpointError(f"{source}: there is no {' and no '.join(SETTINGS)} that we can read")


def is_hub_id(source: str) -> bool:
    """Whether this may be the name of a model on the hub: "owner/name", nothing that looks like a path."""
    return source.count("/") == 1 and not source.startswith((".", "~", "/")) and "\\" not in source


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
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error}); it may be truncated: copy it again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by their names. Pickled files are read with `weights_only`: nothing in them runs."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as tensors ({str(error).splitlines()[0]}). It may be truncated, or hold more than "
            "tensors (a training state, a TorchScript model): if you trust its origin, load it with torch yourself and "
            "save its state_dict() alone"
        ) from None
    for name in WRAPPED:
        held = held[name] if isinstance(held, dict) and isinstance(held.get(name), dict) else held
    tensors = {n: t for n, t in held.items() if isinstance(t, Tensor)} if isinstance(held, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name")
    if all(name.startswith("module.") for name in tensors):  # trained on several devices
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors
