"""Tensors by name from files that anybody may have written: safetensors, torch's pickles, and both in shards.

    read_weights("model_best.pth.tar")                             the weights, without `module.` and the like
    read_weights("checkpoint.pth", weight_set="model_ema")         one of the sets of weights that a file holds

The first bytes of a file tell what it is, not its extension. Nothing in a file is run. What training leaves around the
weights, dictionaries and prefixes of names, is taken off here (`unwrapped`), for every reader.
"""

from __future__ import annotations

import difflib
import json
import pickle
import re
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minivlp.errors import UserError

INDEX = ".index.json"  # how the name of the list of a model's shards ends
EXTENSIONS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".th", ".tar", INDEX)

# where training scripts keep the weights that they train, and the names under which a module wraps another
PLAIN = ("state_dict", "model", "module", "model_state_dict", "model_state", "net", "network", "weights", "params")
ROLES = ("student", "teacher", "online", "target")  # of self-distillation
# these stand for a wrapper wherever they are in a name
WRAPPERS = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
COUNTERS = ("n_averaged", "initted", "step")  # which moving averages keep beside the wrapped model
NOT_WEIGHTS = ("optim", "sched", "scaler", "rng", "loop")  # how the names of other parts of a training state begin

LFS = b"version https://git-lfs"
FOREIGN = (  # first bytes, and what such a file is
    (LFS, "is a pointer of git-lfs, not the weights: run `git lfs pull` in its folder"),
    (b"<", "is a web page that was saved instead of the weights: download the file itself"),
    (b"PAR1", "is a parquet table, not weights"),
    (b"\x89HDF", "is an HDF5 file (TensorFlow's); convert it to safetensors first"),
    (b"GGUF", "is a GGUF file; convert it to safetensors first"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it first"),
    (b"Rar!", "is a RAR archive: unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it first"),
    (b"\x93NUMPY", "is a NumPy array, not weights by name"),
    (b"\xff\xd8\xff", "is a picture, not weights"),
    (b"\x89PNG", "is a picture, not weights"),
)
SCRIPT = (
    "is a TorchScript model, which holds code. If you trust its origin: torch.save(torch.jit.load(file, "
    'map_location="cpu").state_dict(), "weights.pth")'
)


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be used; the message names the file, what is wrong and what to do."""


class UnsupportedModel(CheckpointError):
    """Our classes cannot express a model; the message says which part of it."""


# ------------------------------------------------------------------------------------------------------------ reading


def read_weights(path: Path | str, weight_set: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file by their names, without wrappers; of all shards, where `path` is their index.

    weight_set: which of several sets of weights, such as "model_ema". Raises CheckpointError for what is no file of
    weights, or damaged, or holds more than tensors, and where the set has to be chosen.
    """
    path = Path(path)
    if path.name.endswith(INDEX):
        return unwrapped(read_shards(path, lambda name: path.parent / name), str(path), weight_set)
    return unwrapped(read_file(path), str(path), weight_set)


def read_file(path: Path) -> Any:
    """What one file holds: a dictionary of tensors, or of whatever a training script saved beside them."""
    if (problem := foreign(path)) is not None:
        raise CheckpointError(f"{path} {problem}")
    try:
        if is_safetensors(path):
            return load_file(path)
        if path.suffix == ".safetensors":  # torch would go by the extension
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        # mapped into memory where the format allows it: the model's own tensors are the only other copy
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (an object of {kind[1]})" if kind else ""
        raise CheckpointError(
            f"{path} holds more than tensors{what}, or is damaged: not read, because unpickling can run code. If you "
            "trust its origin, load it with torch yourself and save its state_dict() alone"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}): it may be truncated; copy it again"
        ) from None
    except Exception as error:  # damaged archives and pickles raise whatever their bytes happen to lead to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} cannot be read as tensors ({reason}): it may be damaged or truncated; copy it again"
        ) from None


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON object, and the object."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**30


def foreign(path: Path) -> str | None:
    """What a file is that holds no weights which we can read, as the end of a sentence; None where it may hold them."""
    if not path.exists():
        return f"does not exist{suggestion(path)}"
    if path.is_dir():
        return "is a folder, not a file"
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "is an empty file: its download or copy did not finish"
    if is_safetensors(path):
        return None
    if head.startswith(b"PK"):
        return foreign_zip(path)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for first, what in FOREIGN:
        if text.startswith(first):
            return what
    if text.startswith((b"{", b"[")):
        return "is a JSON file, not weights (the answer of a server, or settings)"
    if path.suffix == ".safetensors" and not head.startswith(b"\x80"):
        return "is not a safetensors file: damaged, or something else under this name; copy it again"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it first"
    return None


def foreign_zip(path: Path) -> str | None:
    """As `foreign`, for a zip archive: torch writes such files, too."""
    try:
        names = zipfile.ZipFile(path).namelist()
    except zipfile.BadZipFile:
        return "is truncated or damaged: copy it again"
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        return SCRIPT
    return None if any(name.endswith("data.pkl") for name in names) else "is a zip archive without weights: unpack it"


def read_shards(index: Path, locate: Callable[[str], Path | None]) -> dict[str, Tensor]:
    """The tensors of all shards that `index` lists; `locate` finds a shard by its name.

    Raises CheckpointError for a shard that is missing or lacks a tensor of the index.
    """
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({Path(shard).name for shard in shard_of.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is no index of shards: it needs a `weight_map` of names and files") from None
    found = {name: locate(name) for name in names}
    missing = [name for name, path in found.items() if path is None or not path.is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{index} lists {len(names)} shards, of which {', '.join(missing) or 'none'} "
            f"{'is' if len(missing) == 1 else 'are'} missing: put them into the same folder"
        )
    held = {name: read_file(path) for name, path in found.items()}
    tensors = {name: tensor for shard in held.values() for name, tensor in shard.items()}
    absent = [(name, shard) for name, shard in shard_of.items() if name not in held[Path(shard).name]]
    if absent:
        raise CheckpointError(f"{found[Path(absent[0][1]).name]} does not hold {absent[0][0]}, as {index.name} says")
    return tensors


# ------------------------------------------------------------------------------------------------------------ wrappers


def unwrapped(held: Any, source: str, weight_set: str | None = None) -> dict[str, Tensor]:
    """The tensors by name of what a file holds, without the dictionaries and prefixes that training puts around them.

    Of several sets of weights the trained one is taken, with a warning, if the others are moving averages of it;
    `weight_set` chooses another. Raises CheckpointError where there are none, or where it is not clear which to take.
    """
    sets = weight_sets(held)
    if not sets:
        keys = f" Its keys are {', '.join(map(str, held))}" if isinstance(held, Mapping) and held else ""
        raise CheckpointError(f"{source} holds no tensors by name: it is no checkpoint of a model.{keys}")
    return without_prefixes(sets[choose(sets, source, weight_set)], source)


def weight_sets(held: Any, name: str = "") -> dict[str, dict[str, Tensor]]:
    """The dictionaries of tensors inside `held`, by the keys that lead to them, joined by dots."""
    if not isinstance(held, Mapping):
        return {}
    own = {key: value for key, value in held.items() if isinstance(key, str) and isinstance(value, Tensor)}
    inner: dict[str, dict[str, Tensor]] = {}
    for key, value in held.items():
        if isinstance(key, str) and not key.lower().startswith(NOT_WEIGHTS):
            inner |= weight_sets(value, f"{name}.{key}" if name else key)
    if known := {path: tensors for path, tensors in inner.items() if is_known(path.rpartition(".")[2])}:
        return known
    if inner and max(map(len, inner.values())) > len(own):
        return inner
    if not own:
        return {}
    together = split_by_prefix(own)
    return {f"{name}.{key}" if name and key else name or key: tensors for key, tensors in together.items()}


def split_by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Several sets in one dictionary (`student.*` and `teacher.*`) apart; one set as it is, under the name "" ."""
    firsts = dict.fromkeys(name.split(".")[0] for name in tensors if name not in COUNTERS)
    if len(firsts) < 2 or not all(map(is_known, firsts)):
        return {"": tensors}
    return {
        first: {n.removeprefix(f"{first}."): t for n, t in tensors.items() if n.startswith(f"{first}.")}
        for first in firsts
    }


def is_average(name: str) -> bool:
    """Whether weights of this name are a moving average, such as `model_ema` or `state_dict_ema`."""
    return bool({"ema", "swa", "averaged"} & set(re.split(r"[^a-z]+", name.lower())))


def is_known(name: str) -> bool:
    """Whether this is how a set of weights, or a wrapped model, is called."""
    return name in PLAIN or name in ROLES or is_average(name)


def choose(sets: Mapping[str, Any], source: str, wanted: str | None) -> str:
    """The name of the set to take; see `unwrapped`."""
    names = ", ".join(name or "(without a name)" for name in sets)
    if wanted is not None:
        fitting = [name for name in sets if name == wanted or name.endswith(f".{wanted}")]
        if len(fitting) != 1:
            raise CheckpointError(f"{source} holds no single set of weights {wanted!r}; there are: {names}")
        return fitting[0]
    if len(sets) == 1:
        return next(iter(sets))
    averages = [name for name in sets if is_average(name)]
    others = [name for name in sets if name not in averages]
    if len(others) == 1 and others[0].rpartition(".")[2] in PLAIN:
        warnings.warn(
            f"{source} holds several sets of weights, {names}. Taken: {others[0]}. For {averages[0]}, a moving average "
            f'of weights, give weight_set="{averages[0]}", or save it in a file of its own',
            stacklevel=4,
        )
        return others[0]
    example = next(iter(sets))
    raise CheckpointError(
        f"{source} holds several sets of weights: {names}. Save the one that you want in a file of its own.",
        "Or choose it by `{}`.",
        f'weight_set="{example}"',
    )


def without_prefixes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The same tensors without the names of wrappers in theirs: `module._orig_mod.model.norm.bias` -> `norm.bias`.

    DataParallel and DDP put `module.` in front, torch.compile `_orig_mod.`, Lightning `model.`, Fabric
    `_forward_module.`; around one another, and also around parts of a model. Raises CheckpointError where two tensors
    would get one name.
    """
    split = {name: [part for part in name.split(".") if part not in WRAPPERS] for name in tensors}
    split = {name: [p for n, p in enumerate(parts) if (n, p) != (1, "module")] for name, parts in split.items()}
    counters = [name for name in split if name in COUNTERS]
    while True:
        named = {name: parts for name, parts in split.items() if name not in counters}
        firsts = {parts[0] if len(parts) > 1 else "" for parts in named.values()}
        if len(firsts) != 1 or not is_known(next(iter(firsts))):
            break
        split = {name: parts[1:] for name, parts in named.items()}
    found = {".".join(parts): tensors[name] for name, parts in split.items()}
    if len(found) < len(split):
        raise CheckpointError(f"{source}: several of its tensors have one name without `module.` and other wrappers")
    return found


# -------------------------------------------------------------------------------------------------------------- names


def suggestion(path: Path, extensions: Iterable[str] = EXTENSIONS) -> str:
    """`; did you mean …?` with files of the same folder whose names are near, or "" without any."""
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    files = sorted(file.name for file in path.parent.iterdir() if file.name.endswith(tuple(extensions)))
    near = near_names(path.name, files)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""


def near_names(name: str, others: Iterable[str]) -> list[str]:
    """Names that differ from `name` by case, Unicode form or extension, or by a few letters."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    by_form = {plain(other): other for other in others}
    stem = plain(name).rpartition(".")[0] or plain(name)
    same = [other for form, other in by_form.items() if form == plain(name) or form.rpartition(".")[0] == stem]
    close = difflib.get_close_matches(plain(name), by_form, n=3, cutoff=0.8)
    return list(dict.fromkeys([*same, *(by_form[form] for form in close)]))


def grouped(names: Iterable[str]) -> str:
    """`text.blocks.0.a, text.blocks.0.b, scale` -> `text.* (2), scale`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name)
    return ", ".join(group[0] if len(group) == 1 else f"{part}.* ({len(group)})" for part, group in groups.items())
