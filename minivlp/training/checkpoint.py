"""Weights and training states on disk, as safetensors: reading such a file cannot run code.

A file is written under a temporary name and then renamed, so a kill during the write leaves the old file intact.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minivlp.weight_files import CheckpointError, foreign, grouped, without_prefixes

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
Model = TypeVar("Model", bound=nn.Module)


# ------------------------------------------------------------------------------------------------------------- files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` if the block succeeds, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with naming(path):
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask says; safetensors makes files that only the owner can read
            yield temporary
            os.chmod(temporary, mode)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside names `path`: a full disk is otherwise reported without a file, or with a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except SafetensorError as error:  # it says "(os error 28)" where the operating system refused
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def save_text(path: Path | str, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path: Path | str, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Write tensors and notes (values that JSON can hold), whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"minivlp": json.dumps(notes)})


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote. Raises CheckpointError for a missing, truncated or foreign file."""
    with _opened(Path(path)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _notes(file)  # noqa: SIM118


def read_notes(path: Path | str) -> dict[str, Any]:
    """Only the notes of such a file, without its tensors. Raises as `load_tensors` does."""
    with _opened(Path(path)) as file:
        return _notes(file)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; {_what_is_there(path)}")
    try:
        with naming(path), safe_open(str(path), "pt") as file:
            yield file
    except (SafetensorError, ValueError) as error:
        if (what := foreign(path)) is not None:
            raise CheckpointError(f"{path} {what}") from None
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); it may be truncated: copy it again"
        ) from None


def _notes(file: Any) -> dict[str, Any]:
    notes = json.loads((file.metadata() or {}).get("minivlp", "{}"))
    return notes if isinstance(notes, dict) else {}


def _what_is_there(path: Path) -> str:
    """What to do about a path that is no file: the nearest checkpoint there is."""
    inside = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    beside = {file.name: file for file in path.parent.glob("*.safetensors")} if path.parent.is_dir() else {}
    inside = [file for file in inside if file.name != "state.safetensors"]  # of a run that is still trained
    near = inside or [beside[name] for name in difflib.get_close_matches(path.name, beside, n=3)]
    if near:
        return f"did you mean {' or '.join(map(str, near[:3]))}?"
    return "it is a folder without one" if path.is_dir() else "train one first, or check the path"


# ----------------------------------------------------------------------------------------------------------- weights


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers; a tensor with several names appears under the first only."""
    first: dict[int, str] = {}
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if first.setdefault(id(t), n) == n}


def set_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into the model, all of them. Raises CheckpointError that lists what does not fit."""
    own = weights(model)
    faults = []
    if missing := sorted(own.keys() - tensors.keys()):
        faults.append(f"missing: {grouped(missing)}")
    if extra := sorted(tensors.keys() - own.keys()):
        faults.append(f"not in this model: {grouped(extra)}")
    shapes = [
        f"{name} is {tuple(tensors[name].shape)} there and {tuple(own[name].shape)} here"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    faults += shapes if len(shapes) <= 8 else [*shapes[:5], f"and {len(shapes) - 5} more of other shapes"]
    if faults:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}. " + "; ".join(faults))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


class _SkipRandom(TorchDispatchMode):
    """Replaces every operation that draws random numbers, which torch marks by a tag; all others run as usual.

    In-place ones (`normal_`, as in `nn.init`) and the factories `randn` and `rand` give constants. Those that are left
    draw, but the generator is then set back.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if name == "aten::normal_":  # its mean: `nn.init.trunc_normal_` draws again what is out of its range
            return args[0].fill_(args[1] if len(args) > 1 else 0.0)
        if name.endswith("_"):
            return args[0].zero_()
        if name in ("aten::randn", "aten::rand"):
            kwargs.pop("generator", None)
            return torch.zeros(args[0], **kwargs)
        with torch.random.fork_rng(devices=[]):
            return func(*args, **kwargs)


@contextmanager
def without_random_init() -> Iterator[None]:
    """Build a model in this block without initializing it at random, because its weights will be loaded.

    Until then they mean nothing. Buffers that are computed, such as tables of positions, have their real values, tied
    parameters are tied, and no random generator advances.
    """
    with _SkipRandom():
        yield


# ----------------------------------------------------------------------------------------------------------- configs


def config_to_dict(config: Any) -> dict[str, Any]:
    """A (nested) config dataclass as values for JSON, to be read by `build_config`.

    A nested config whose class is not the annotated one also stores `"class"`: its name. So two classes with equal
    fields, such as two kinds of masking, are told apart.
    """
    hints = get_type_hints(type(config))
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            stored = config_to_dict(value)
            if _configs_of(hints[field.name]) != [type(value)]:
                stored["class"] = type(value).__name__
            value = stored
        values[field.name] = value
    return values


def build_config(kind: type, values: dict[str, Any]) -> Any:
    """The config of class `kind` from what `config_to_dict` returned, possibly by way of JSON.

    Raises TypeError where the values do not fit the class.
    """
    hints = get_type_hints(kind)
    built = {}
    for name, value in values.items():
        candidates = _configs_of(hints.get(name))
        if candidates and isinstance(value, dict):
            value = dict(value)
            wanted = value.pop("class", candidates[0].__name__)
            known = {k.__name__: k for candidate in candidates for k in _with_subclasses(candidate)}
            if wanted not in known:
                raise TypeError(f"{kind.__name__}.{name} is a {wanted}, which is none of {', '.join(known)}")
            value = build_config(known[wanted], value)
        built[name] = _as_tuples(value)
    return kind(**built)


def _configs_of(hint: Any) -> list[type]:
    """The dataclasses that an annotation names: `A` -> [A], `A | B | None` -> [A, B], others -> []."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]


def _with_subclasses(kind: type) -> list[type]:
    return [kind, *(deeper for below in kind.__subclasses__() for deeper in _with_subclasses(below))]


def _as_tuples(value: Any) -> Any:
    """JSON has lists only; configs have tuples only."""
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------------------ models


def save_model(model: nn.Module, path: Path | str, *, float16: bool = False, **notes: Any) -> None:
    """Write a model's weights, its config and notes of your own. `float16` stores half precision, half the size."""
    tensors = weights(model)
    if float16:
        tensors = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    save_tensors(path, tensors, {"model": type(model).__name__, "config": config_to_dict(model.config), **notes})


def load_model(kind: type[Model], path: Path | str) -> Model:
    """The model of a file that `save_model` wrote, in evaluation mode. `load_model(CLIP, bundled("clip_nano"))`.

    Raises CheckpointError for a damaged file, another class of model, and weights that do not fit the config.
    """
    tensors, notes = load_tensors(path)
    if notes.get("model") != kind.__name__:
        raise CheckpointError(f"{path} holds {notes.get('model', 'an unknown model')}, not {kind.__name__}")
    try:
        config = build_config(kind.Config, notes["config"])
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: its config does not fit {kind.Config.__name__} ({error})") from None
    with without_random_init():
        model = kind(config)
    tensors = without_prefixes(tensors, str(path))
    set_weights(model, {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, str(path))
    return model.eval()


TOWERS = ("image.", "text.", "fusion.", "itc_head.")


def init_from(model: nn.Module, path: Path | str, parts: tuple[str, ...] = TOWERS) -> list[str]:
    """Initialize parts of a model from another model's checkpoint; its other parameters keep their values.

    `parts` are prefixes of parameter names. A momentum model then becomes a copy of the model. Returns the names that
    were copied. Raises CheckpointError, and changes nothing, for a file without any such parameter, and where a part
    (the name up to the first dot) is incomplete or has another shape.
    """
    tensors = without_prefixes(load_tensors(path)[0], str(path))
    own = {name: tensor for name, tensor in weights(model).items() if name.startswith(parts)}
    there = {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}
    if not there:
        raise CheckpointError(f"{path} holds no parameter whose name begins with {', '.join(parts)}")
    found = {name.split(".")[0] for name in there}
    faults = [name for name in sorted(own) if name.split(".")[0] in found and name not in there]
    faults += [name for name in sorted(there) if name not in own or own[name].shape != there[name].shape]
    if faults:
        raise CheckpointError(f"{path} does not fit {type(model).__name__} in {grouped(faults)}")
    with torch.no_grad():
        for name, tensor in there.items():
            own[name].copy_(tensor)
    momentum_model = getattr(model, "momentum_model", None)
    if momentum_model is not None:
        momentum_model.copy_from(model)
    return sorted(there)


def bundled(name: str) -> Path:
    """The path of a checkpoint that comes with minivlp: `bundled("clip_nano")`."""
    path = CHECKPOINTS / f"{name}.safetensors"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CHECKPOINTS.glob("*.safetensors"))) or "none"
        raise CheckpointError(f"no bundled checkpoint {name!r}; there are: {names}")
    return path
