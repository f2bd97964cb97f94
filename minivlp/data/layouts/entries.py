"""What every reader returns, and how files are read, with errors that name the file and a remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minivlp.data.batch import Box
from minivlp.data.validation import DataError, EntryError, Report, decode_text

SPLIT_NAMES = {"train": "train", "restval": "train", "dev": "validation", "val": "validation",
                "validation": "validation", "test": "test"}  # fmt: skip


class MarkedBox(NamedTuple):
    """A phrase and its box: corners in pixels or, if `fractions`, (cx, cy, w, h) as fractions of the image."""

    box: Box
    phrase: str
    kind: str
    where: str
    fractions: bool = False


@dataclass
class Entry:
    """One image of an annotation file. Its file has not been searched for yet."""

    name: str
    source: str
    image_id: int
    captions: list[str] = field(default_factory=list)
    boxes: list[MarkedBox] = field(default_factory=list)
    split: str | None = None
    size: tuple[int, int] | None = None  # (width, height) according to the annotations


class Entries(dict[str, Entry]):
    """Entries by file name, numbered in order of appearance: an image has the same id in every split and subset."""

    def of(self, name: str, where: str) -> Entry:
        """The entry of this file; a new one if there is none."""
        return self.setdefault(name, Entry(name, where, image_id=len(self)))


def read_bytes(path: Path) -> bytes:
    """The contents of a file. Raises DataError if it cannot be read or is empty."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise DataError(f"{path}: {found} where a file is expected. Put the file there.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Fix its permissions.") from error
    if not raw.strip():
        raise DataError(f"{path}: the file is empty. Download or write it again.")
    return raw


def read_lines(path: Path, report: Report) -> Iterator[tuple[str, bytes]]:
    """(where, line) of the lines that are not blank. The caller decodes them, so a bad line is one invalid row."""
    short = path.relative_to(report.root)
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        if line.strip():
            yield f"{short} row {number}", line


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises DataError."""
    raw = read_bytes(path)
    try:
        return json.loads(decode_text(raw), object_hook=_without_segmentation)
    except EntryError as error:
        raise DataError(f"{path}: {error.reason}. {error.remedy}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error}). Download or write the file again.") from error


def _without_segmentation(item: dict[str, Any]) -> dict[str, Any]:
    """Drop the outlines while reading: they are nine tenths of COCO's instances file and would fill the memory."""
    item.pop("segmentation", None)
    return item


def require_list(data: Any, key: str, path: Path) -> list[Any]:
    """The list `data[key]`. Raises DataError if there is none."""
    items = data.get(key) if isinstance(data, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{path}: no list {key!r} in it. Is it a file of another data set? Download it again.")
    return items


def require_object(item: Any) -> dict[str, Any]:
    """The item, if it is a JSON object. Raises EntryError."""
    if not isinstance(item, dict):
        raise EntryError("not an object", 'Write {"key": value, ...}.')
    return item


def require_integer(item: dict[str, Any], key: str) -> int:
    """The integer `item[key]`, at least 0. Raises EntryError."""
    value = item.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise EntryError(f"no {key}", f"{key!r} is an integer, not {value!r:.60}.")
    return value
