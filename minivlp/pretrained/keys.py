"""From the parameter names of a released model to ours, by a table.

A row of a table is a pair, their name and ours:

    ("vision_model.encoder.layers.{n}.layer_norm1", "image.blocks.{n}.self_norm")

A row that names a module covers what is in it (`.weight`, `.bias`). `{n}` is any number; on their side `{n-1}` and
`{n+text}` are that number minus one, or plus our number of text layers. Where a tensor of ours is computed from one or
several of theirs, the left side says how: `stack`, `first`, `rest`, … below. Where several rows give one tensor, the
first one counts whose names are in the file. Names that a file may have and that we do not need are listed, too, so
that every other name is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.training.checkpoint import weights
from minivlp.weight_files import CheckpointError, grouped

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class From:
    """A tensor of ours, computed by `make` from their tensors `names`."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


Row = tuple["str | From", str]


def stack(*names: str) -> From:
    """Their matrices one below the other: ours hold queries, keys and values in one."""
    return From(names, lambda *parts: torch.cat(parts))


def flat(name: str) -> From:
    """Their (1, 1, D) as (D,)."""
    return From((name,), Tensor.flatten)


def first(name: str) -> From:
    """The first row of their table (N, D) or (1, N, D): the class token's position."""
    return From((name,), lambda table: table.flatten(0, -2)[0])


def rest(name: str) -> From:
    """All other rows: the patches' positions."""
    return From((name,), lambda table: table.flatten(0, -2)[1:])


def transposed(name: str) -> From:
    """Their matrix (in, out) as `nn.Linear` stores it, (out, in)."""
    return From((name,), lambda matrix: matrix.T)


def scalar(name: str) -> From:
    """Their single number, which some files hold as (1,)."""
    return From((name,), lambda number: number.reshape(()) if number.numel() == 1 else number)


def plus_first(name: str, types: str) -> From:
    """Their table plus the first row of another: BERT adds the same token type to every token of a single text."""
    return From((name, types), lambda table, other: table + other[0])


def with_prefix(theirs: str, ours: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of a part with a prefix before their names and one before ours."""
    prefixed = []
    for left, right in rows:
        if isinstance(left, From):
            left = From(tuple(theirs + name for name in left.names), left.make)
        else:
            left = theirs + left
        prefixed.append((left, ours + right))
    return tuple(prefixed)


@dataclass(frozen=True)
class Inputs:
    """What a release's settings say of its texts and pictures, where they say it.

    tokenizer: its hub id. end_id: the id that has to end each text. preprocess: what turns pictures into tensors.
    """

    tokenizer: str | None = None
    end_id: int | None = None
    preprocess: Any = None


@dataclass(frozen=True)
class Release:
    """One published form of a paper's weights.

    key_prefix: how names begin that only this form has. table: its names and ours. ignored: patterns of its names that
    we do not need. optional: prefixes of our names; a checkpoint may lack all parameters of such a part (a captioner
    has no matching head), never only some. config: our config, from a config.json or, where the authors have none, from
    the tensors. processor: transformers' class that turns pictures into tensors; processor_settings: its arguments for
    an image size. tokenizer: where the tokenizer is, if the checkpoint brings none. settings_file: the file without
    which `config` cannot work; "" where the tensors tell all. inputs: what these settings say of texts and pictures.
    interpolation: how `F.interpolate` resizes positions, mode and align_corners.
    """

    key_prefix: str
    table: tuple[Row, ...]
    config: Callable[[dict[str, Tensor], dict[str, Any]], Any]
    processor: str
    processor_settings: Callable[[Size], dict[str, Any]]
    tokenizer: str
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    settings_file: str = ""
    inputs: Callable[[dict[str, Any], Size], Inputs] | None = None
    interpolation: tuple[str, bool] = ("bicubic", False)


def translate(
    release: Release, tensors: Mapping[str, Tensor], model: nn.Module, source: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Their tensors under our names, and the parts of the model that the file does not have.

    Raises CheckpointError that lists what is missing and what is unknown, grouped: a wrong name is in both lists.
    """
    everything = model.state_dict(keep_vars=True)
    stored = {id(everything[name]): name for name in weights(model)}  # shared tensors once, by their first name
    text_layers = getattr(getattr(getattr(model, "config", None), "text", None), "layers", 0)
    rows = [(pattern_of(ours), left if isinstance(left, From) else From((left,), same)) for left, ours in release.table]

    found: dict[str, Tensor] = {}
    lacking: dict[str, str] = {}  # our name -> what it would be called in the file
    used: set[str] = set()
    for ours, tensor in everything.items():
        matches = [(pattern.fullmatch(ours), left) for pattern, left in rows]
        choices = [
            ([fill_in(name, match, text_layers) for name in left.names], left) for match, left in matches if match
        ]
        used.update(name for names, _ in choices for name in names)
        present = [(names, left) for names, left in choices if all(name in tensors for name in names)]
        if not present:
            lacking[ours] = next((n for names, _ in choices for n in names if n not in tensors), ours)
            continue
        names, left = present[0]
        made, name = left.make(*(tensors[n] for n in names)), stored[id(tensor)]
        if name in found and not torch.equal(found[name], made):
            raise CheckpointError(
                f"{source}: {ours} and {name} are one tensor in {type(model).__name__} and two different ones in the "
                "file; give a `config=` that keeps them apart"
            )
        found[name] = made

    parts = {part: {name for name in everything if name.startswith(part)} for part in release.optional}
    absent = tuple(part for part, names in parts.items() if names and names <= lacking.keys())
    missing = {
        theirs
        for ours, theirs in lacking.items()
        if stored[id(everything[ours])] not in found and not ours.startswith(absent)
    }
    unknown = [n for n in tensors if n not in used and not any(fnmatchcase(n, p) for p in release.ignored)]
    faults = [f"missing: {grouped(sorted(missing))}"] if missing else []
    faults += [f"unknown: {grouped(sorted(unknown))}"] if unknown else []
    if faults:
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}. {'; '.join(faults)}. Is the file complete, and a "
            "checkpoint of this family with heads that we have? If only its sizes differ from those that we derived, "
            "give `config=`"
        )
    largest = [part for part in absent if not any(part != other and part.startswith(other) for other in absent)]
    return found, tuple(part.rstrip(".") for part in largest)


def same(tensor: Tensor) -> Tensor:
    """Their tensor as it is."""
    return tensor


def pattern_of(ours: str) -> re.Pattern[str]:
    """`image.blocks.{n}.self_norm` as a pattern of the weights of that module, with any number for n."""
    return re.compile(re.escape(ours).replace(r"\{n\}", r"(?P<n>\d+)") + r"(?P<end>(\..+)?)")


def fill_in(theirs: str, match: re.Match[str], text_layers: int) -> str:
    """`layer.{n+text}.output` with the number that matched, and the end of the name."""
    numbers = {}
    if "n" in match.groupdict():
        n = int(match["n"])
        numbers = {"n": n, "n-1": n - 1, "n+text": n + text_layers}
    return theirs.format_map(numbers) + match["end"]
