"""Weights and training states on disk, as safetensors: nothing in them can run code.

A file is written beside its place and then renamed, so a kill in the middle leaves the old one whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
Model = TypeVar("Model", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and what to do."""


def save_tensors(path: Path | str, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Write tensors and JSON-able notes, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            beside,
            metadata={"minivlp": json.dumps(notes)},
        )
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote. Raises CheckpointError for a missing, cut-off or foreign file."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint; train one first, or check the path")
    try:
        with safe_open(str(path), "pt") as file:
            notes = json.loads((file.metadata() or {}).get("minivlp", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); it may be cut off: copy it again"
        ) from None


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers, a tensor that is shared under two names only once."""
    seen: dict[int, str] = {}
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if seen.setdefault(id(t), n) == n}


def set_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into the model, all of them. Raises CheckpointError that lists all that does not fit."""
    own = weights(model)
    faults = []
    if missing := sorted(own.keys() - tensors.keys()):
        faults.append(f"missing: {grouped(missing)}")
    if extra := sorted(tensors.keys() - own.keys()):
        faults.append(f"not in this model: {grouped(extra)}")
    for name in sorted(own.keys() & tensors.keys()):
        if own[name].shape != tensors[name].shape:
            faults.append(f"{name} is {tuple(tensors[name].shape)} there and {tuple(own[name].shape)} here")
    if faults:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}. " + "; ".join(faults))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def grouped(names: list[str]) -> str:
    """`text.blocks.0.a, text.blocks.0.b, scale` -> `text.* (2), scale`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name)
    return ", ".join(group[0] if len(group) == 1 else f"{part}.* ({len(group)})" for part, group in groups.items())


def save_model(model: nn.Module, path: Path | str, *, half: bool = False, **notes: Any) -> None:
    """Write a model's weights with its config (and notes of your own); `half` stores float16, half the size."""
    tensors = weights(model)
    if half:
        tensors = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    save_tensors(path, tensors, {"model": type(model).__name__, "config": dataclasses.asdict(model.config), **notes})


def load_model(kind: type[Model], path: Path | str) -> Model:
    """A model as `save_model` wrote it, in evaluation mode. `load_model(CLIP, shipped("clip_nano"))`."""
    tensors, notes = load_tensors(path)
    if notes.get("model") != kind.__name__:
        raise CheckpointError(f"{path} holds {notes.get('model', 'something unknown')}, not {kind.__name__}")
    try:
        config = build_config(kind.Config, notes["config"])
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: its config does not fit {kind.Config.__name__} ({error})") from None
    model = kind(config)
    set_weights(model, {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, str(path))
    return model.eval()


TOWERS = ("image.", "text.", "fusion.", "project_image.", "project_text.", "temperature")


def start_from(model: nn.Module, path: Path | str, parts: tuple[str, ...] = TOWERS) -> list[str]:
    """Give the model the towers of another one's checkpoint; what it has besides them stays fresh.

    `parts` are beginnings of parameter names. Returns the names that were copied. Raises CheckpointError for a file
    without any of them, and for a tower that fits only in part: half a tower is no start.
    """
    tensors, _ = load_tensors(path)
    own = {name: tensor for name, tensor in weights(model).items() if name.startswith(parts)}
    there = {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}
    if not there:
        raise CheckpointError(f"{path} holds no towers ({', '.join(parts)})")
    begun = {name.split(".")[0] for name in there}
    faults = [name for name in sorted(own) if name.split(".")[0] in begun and name not in there]
    faults += [name for name in sorted(there) if name not in own or own[name].shape != there[name].shape]
    if faults:
        raise CheckpointError(f"the towers of {path} do not fit {type(model).__name__}: {grouped(faults)}")
    with torch.no_grad():
        for name, tensor in there.items():
            own[name].copy_(tensor)
    if getattr(model, "teacher", None) is not None:  # a momentum teacher begins as its student
        model.teacher.copy_from(model)
    return sorted(there)


def build_config(kind: type, values: dict[str, Any]) -> Any:
    """A (nested) config dataclass from the dict that `dataclasses.asdict` made of it, by way of JSON.

    Where the values name fields that `kind` lacks, it is the subclass that has them: X-VLM's image tower may be a Swin.
    """
    kind = next((k for k in _with_subclasses(kind) if values.keys() <= {f.name for f in dataclasses.fields(k)}), kind)
    hints = get_type_hints(kind)
    built = {}
    for name, value in values.items():
        hint = hints.get(name)
        if dataclasses.is_dataclass(hint):
            value = build_config(hint, value)
        elif isinstance(value, list):
            value = tuple(value)  # JSON has no tuples
        built[name] = value
    return kind(**built)


def _with_subclasses(kind: type) -> list[type]:
    return [kind, *(deeper for below in kind.__subclasses__() for deeper in _with_subclasses(below))]


def shipped(name: str) -> Path:
    """Path of a checkpoint that comes with minivlp: `shipped("clip_nano")`."""
    path = CHECKPOINTS / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in CHECKPOINTS.glob("*.safetensors"))) or "none"
        raise CheckpointError(f"no shipped checkpoint {name!r}; there are: {there}")
    return path
