"""From the names of a released model's weights to ours, by a table that can be read.

A row of a table is a pair, what they call it and what we call it:

    ("vision_model.encoder.layers.{n}.layer_norm1", "image.blocks.{n}.self_norm")

A row that names a module covers what is in it (`.weight`, `.bias`). `{n}` and `{m}` are numbers; on their side `{n-1}`
and `{n+text}` count from elsewhere (`text`: our number of text layers). Where a tensor of ours is made of one or
several of theirs, the left side says how: `stack`, `first`, `rest`, … below. Of several rows for one tensor the first
is taken whose names are there. What a file may hold and we do not need is listed, too: nothing is passed over in
silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.training.checkpoint import CheckpointError, grouped, weights


@dataclass(frozen=True)
class From:
    """A tensor of ours, made of tensors of theirs."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


Row = tuple["str | From", str]


def stack(*names: str) -> From:
    """Their matrices one below the other: we keep queries, keys and values in one."""
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


def turned(name: str) -> From:
    """Their matrix, which stands to the right of the vector, as `nn.Linear` keeps it."""
    return From((name,), lambda matrix: matrix.T)


def plus_first(name: str, types: str) -> From:
    """Their table plus the first row of another: BERT adds the same token type to every word of a single text."""
    return From((name, types), lambda table, other: table + other[0])


def under(theirs: str, ours: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of a part, where it stands in the whole: `under("blocks.{n}.", "image.blocks.{n}.", VIT_LAYER)`."""
    moved = []
    for left, right in rows:
        if isinstance(left, From):
            left = From(tuple(theirs + name for name in left.names), left.make)
        else:
            left = theirs + left
        moved.append((left, ours + right))
    return tuple(moved)


@dataclass(frozen=True)
class Release:
    """One release of a paper's model: how to know it, its names, its sizes, what it does with pictures and texts.

    mark: how names begin that only this release has. table: its names beside ours. ignored: patterns of names that we
    do without. optional: beginnings of our names; a checkpoint may lack all of such a part (a captioner has no matching
    head), never some of it. config: sizes, from a config.json or, where the authors have none, from the tensors.
    processor: the class of transformers that makes tensors of pictures; pixels: what it is told for an image size.
    tokenizer: where the texts' tokenizer is, if the checkpoint brings none. Positions are resized as `resize` says.
    """

    mark: str
    table: tuple[Row, ...]
    config: Callable[[dict[str, Tensor], dict[str, Any]], Any]
    processor: str
    pixels: Callable[[int], dict[str, Any]]
    tokenizer: str
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    resize: tuple[str, bool] = ("bicubic", False)


def translated(
    release: Release, tensors: Mapping[str, Tensor], model: nn.Module, source: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Their tensors under our names, and the parts of the model that the file does not have.

    Raises CheckpointError that lists what is missing and what is unknown, grouped: a name that is wrong is both.
    """
    everything = model.state_dict(keep_vars=True)
    stored = {id(everything[name]): name for name in weights(model)}  # shared tensors once, by their first name
    text = getattr(model.config.text, "layers", 0)
    rows = [(_pattern(ours), left if isinstance(left, From) else From((left,), _same)) for left, ours in release.table]

    found: dict[str, Tensor] = {}
    lacking: dict[str, str] = {}  # ours -> what they would call it
    used: set[str] = set()
    for ours, tensor in everything.items():
        fits = [(pattern.fullmatch(ours), left) for pattern, left in rows]
        choices = [([_filled(name, match, text) for name in left.names], left) for match, left in fits if match]
        used.update(name for names, _ in choices for name in names)
        there = [(names, left) for names, left in choices if all(name in tensors for name in names)]
        if not there:
            lacking[ours] = next((n for names, _ in choices for n in names if n not in tensors), ours)
            continue
        names, left = there[0]
        made, name = left.make(*(tensors[n] for n in names)), stored[id(tensor)]
        if name in found and not torch.equal(found[name], made):
            raise CheckpointError(
                f"{source}: {ours} and {name} are one tensor in {type(model).__name__} and two different ones there; "
                "give a `config=` that keeps them apart"
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
            f"{source} does not fit {type(model).__name__}. {'; '.join(faults)}. Is it whole, and a checkpoint of this "
            "family with heads that we have? If only its sizes are others than we took them for, give `config=`"
        )
    return found, tuple(part.rstrip(".") for part in absent)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _pattern(ours: str) -> re.Pattern[str]:
    """`image.blocks.{n}.self_norm` as what matches the weights of that module, whichever n it is."""
    escaped = re.escape(ours).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{m\}", r"(?P<m>\d+)")
    return re.compile(escaped + r"(?P<end>(\..+)?)")


def _filled(theirs: str, match: re.Match[str], text: int) -> str:
    """`layer.{n+text}.output` with the number of this match, and the name's end."""
    numbers = {place: int(value) for place, value in match.groupdict().items() if place != "end"}
    if "n" in numbers:
        numbers |= {"n-1": numbers["n"] - 1, "n+text": numbers["n"] + text}
    return theirs.format_map(numbers) + match["end"]
