"""What every reader makes, and how files are read: with an error that says where and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivlp.data.batch import Box
from minivlp.data.damage import DataError, Fault, Report, decode_text

SPLIT_NAMES = {"train": "train", "restval": "train", "dev": "validation", "val": "validation",
                "validation": "validation", "test": "test"}  # fmt: skip


@dataclass
class Entry:
    """One image while it is being read: boxes still in pixels, the file not yet looked for."""

    name: str
    source: str
    image_id: int
    captions: list[str] = field(default_factory=list)
    boxes: list[tuple[Box, str, str, str]] = field(default_factory=list)  # corners in pixels, phrase, kind, where
    split: str | None = None
    size: tuple[int, int] | None = None  # (width, height) as the annotations say it


class Entries(dict[str, Entry]):
    """Entries by file name, numbered in order of appearance: the same image keeps its id in every split and subset."""

    def of(self, name: str, where: str) -> Entry:
        return self.setdefault(name, Entry(name, where, image_id=len(self)))


def read_bytes(path: Path) -> bytes:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise DataError(f"{path}: {found} where a file is expected. Put the file there.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Mend its permissions.") from error
    if not raw.strip():
        raise DataError(f"{path}: the file is empty. Fetch or write it again.")
    return raw


def lines_of(path: Path, report: Report) -> Iterator[tuple[str, bytes]]:
    """(where, line) of the lines that hold something. Decoding is the caller's, so that a bad line is one bad row."""
    short = path.relative_to(report.root)
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        if line.strip():
            yield f"{short} row {number}", line


def read_json(path: Path) -> Any:
    raw = read_bytes(path)
    try:
        return json.loads(decode_text(raw), object_hook=_without_segmentation)
    except Fault as fault:
        raise DataError(f"{path}: {fault.why}. {fault.remedy}") from fault
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error}). Fetch or write the file again.") from error


def _without_segmentation(item: dict[str, Any]) -> dict[str, Any]:
    """Outlines make up nine tenths of COCO's instances file: drop them while reading, before they pile up in memory."""
    item.pop("segmentation", None)
    return item


def list_of(data: Any, key: str, path: Path) -> list[Any]:
    items = data.get(key) if isinstance(data, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{path}: no list {key!r} in it. Is it the file of another data set? Fetch or write it again.")
    return items


def as_object(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise Fault("not an object", 'Write {"key": value, ...}.')
    return item


def whole_number(item: dict[str, Any], key: str) -> int:
    value = item.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise Fault(f"no {key}", f"{key!r} is a whole number, not {value!r:.60}.")
    return value
