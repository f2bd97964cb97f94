"""A folder with a CSV or JSONL file: captions, and phrases with boxes as in Flickr30k Entities and RefCOCO."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minivlp.data.batch import Box
from minivlp.data.layouts.entries import SPLIT_NAMES, Entries, Entry, read_lines, require_object
from minivlp.data.validation import (
    DataError,
    EntryError,
    Report,
    clean_caption,
    clean_corners,
    clean_name,
    clean_numbers,
    decode_text,
)

_FILE_KEYS = ("file", "image", "file_name", "filename", "image_name")
_CAPTION_KEYS = ("caption", "captions", "text", "comment")
_PHRASE_KEYS = ("phrase", "phrases", "text", "caption", "label")
_BOX_KEYS = ("box", "xyxy", "xywh")
TABLES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
_Line = tuple[str, bytes, Callable[[str], dict[str, Any]]]  # where, the raw line, how to parse it


def table_file(root: Path) -> Path | None:
    """The CSV or JSONL file of a folder. Raises DataError if there is more than one."""
    found = [root / name for name in TABLES if (root / name).exists()]
    if len(found) > 1:
        raise DataError(f"{root}: both {found[0].name} and {found[1].name} exist. Name one: folder:{found[0]}")
    return found[0] if found else None


def read_table(file: Path, report: Report, language: str) -> list[Entry]:
    """The entries of a CSV or JSONL file in one language. Rows with the same image become one entry."""
    entries, seen = Entries(), set()
    rows = _jsonl_rows if file.suffix == ".jsonl" else _csv_rows
    for where, line, parse in rows(file, report):
        with report.entry(where):
            item = parse(decode_text(line))
            name = clean_name(_first(item, _FILE_KEYS, "file"))
            phrases = _read_regions(item, language, where, report)
            captions = _read_captions(item, language, [phrase for _, phrase, _, _ in phrases])
            key = (name, *captions, *(box[:2] for box in phrases))
            if key in seen:
                raise EntryError("duplicate row", "The same row is above.", harmless=True)
            seen.add(key)
            entry = entries.of(name, where)
            _set_split(entry, item)
            entry.captions += [caption for caption in captions if caption not in entry.captions]
            entry.boxes += phrases
    return list(entries.values())


def _set_split(entry: Entry, item: dict[str, Any]) -> None:
    """Take over the row's `split`, if it has one. All rows of an image must agree."""
    if not item.get("split"):
        return
    split = SPLIT_NAMES.get(str(item["split"]).lower())
    if split is None:
        raise EntryError("unknown split", f"Found {item['split']!r:.60}, known are {', '.join(SPLIT_NAMES)}.")
    if entry.split not in (None, split):
        raise EntryError("image in two splits", f"It is in {entry.split} too: what is tested must be unseen.")
    entry.split = split


def _jsonl_rows(file: Path, report: Report) -> Iterator[_Line]:
    def parse(line: str) -> dict[str, Any]:
        try:
            return require_object(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise EntryError("broken JSON", f"{error}: write one JSON object to a line.") from error

    for where, line in read_lines(file, report):
        yield where, line, parse


def _csv_rows(file: Path, report: Report) -> Iterator[_Line]:
    lines = read_lines(file, report)
    where, head = next(lines)
    try:
        text = decode_text(head)
    except EntryError as error:
        raise DataError(f"{report.root / where}: {error.reason}. {error.remedy}") from error
    # Spreadsheets write ; or tabs in many countries. The right delimiter is one that gives a known column.
    headers = [(d, [name.strip().lower() for name in text.split(d)]) for d in ",;\t|"]
    headers = [(d, [n.strip('"') for n in names]) for d, names in headers]
    fitting = [(d, names) for d, names in headers if set(names) & set(_FILE_KEYS)]
    if not fitting or len(set(fitting[0][1])) < len(fitting[0][1]):
        remedy = f"Start the file with a line such as file,caption (names for images: {', '.join(_FILE_KEYS)})."
        raise DataError(f"{report.root / where}: no column for images, or a name twice: {text!r:.80}. {remedy}")
    delimiter, names = max(fitting, key=lambda pair: len(pair[1]))

    def parse(line: str) -> dict[str, Any]:
        cells = _cells(line, delimiter)
        if len(cells) != len(names):
            remedy = f"Found {len(cells)} of {len(names)}: put a text with {delimiter!r} in double quotes."
            raise EntryError("wrong number of columns", remedy)
        item = dict(zip(names, cells, strict=True))
        for key in ("regions", "boxes", *_BOX_KEYS):
            if item.get(key, "").strip():
                try:
                    item[key] = json.loads(item[key])
                except (ValueError, RecursionError) as error:
                    raise EntryError("broken JSON", f"{error}: boxes are a JSON list in double quotes.") from error
            else:
                item.pop(key, None)
        return item

    for where, line in lines:
        yield where, line, parse


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of one line. A caption cannot continue on the next line: a missing quote would hide the rows below."""
    if len(line) > 100_000:  # the default limit of the csv module is 131,072 per cell
        raise EntryError("row too long", f"It has {len(line):,} characters: is a line break missing?")
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as error:
        remedy = f"({error}) Close each quote on its own line and double the quotes inside a quoted caption."
        raise EntryError("quote not closed", remedy) from error


def _first(item: dict[str, Any], keys: Sequence[str], what: str) -> Any:
    """The value of the first of the keys that exists. Raises EntryError that there is no `what`."""
    for key in keys:
        if key in item:
            return item[key]
    raise EntryError(f"no {what}", f"The row needs one of: {', '.join(keys)}.")


def _language_keys(names: Sequence[str], language: str) -> list[str]:
    """Names with the language, such as `caption_zh`; for English also the plain `caption`."""
    return [f"{name}_{language}" for name in names] + (list(names) if language == "en" else [])


def _read_captions(item: dict[str, Any], language: str, phrases: list[str]) -> list[str]:
    keys = _language_keys(_CAPTION_KEYS, language)
    if phrases and not any(key in item for key in keys):
        return list(dict.fromkeys(phrases))  # RefCOCO has phrases only: use them as captions
    captions = _first(item, keys, "caption")
    captions = captions if isinstance(captions, list) else [captions]
    if not captions:
        raise EntryError("empty caption", "The list is empty: write what the picture shows, or delete the row.")
    return list(dict.fromkeys(clean_caption(caption) for caption in captions))


def _read_regions(item: dict[str, Any], language: str, where: str, report: Report) -> list[tuple[Box, str, str, str]]:
    """The regions listed in a row, or the row itself if it has a box."""
    regions = item.get("regions", item.get("boxes"))
    if regions is None:
        return _read_region(item, language, where) if any(key in item for key in (*_BOX_KEYS, "bbox")) else []
    if not isinstance(regions, list):
        raise EntryError("regions are not a list", 'Write "regions": [{"box": [x0, y0, x1, y1], "phrase": "a cup"}].')
    found = []
    for number, region in enumerate(regions, start=1):
        where_region = f"{where} region {number}"
        with report.entry(where_region):
            found += _read_region(require_object(region), language, where_region)
    return found


def _read_region(region: dict[str, Any], language: str, where: str) -> list[tuple[Box, str, str, str]]:
    corners = _corners(region)
    given = _first(region, _language_keys(_PHRASE_KEYS, language), "phrase")
    phrases = [clean_caption(phrase) for phrase in (given if isinstance(given, list) else [given])]
    return [(corners, phrase, "phrase", where) for phrase in phrases]


def _corners(region: dict[str, Any]) -> Box:
    """Corners in pixels of a box whose key says whether it has corners (`box`, `xyxy`) or corner and size (`xywh`)."""
    if "bbox" in region:
        remedy = "'bbox' means corners in some files, and corner and size in others: call it xyxy or xywh."
        raise EntryError("box of an unknown form", remedy)
    values = _first(region, _BOX_KEYS, "box")
    if not any(key in region for key in ("box", "xyxy")):
        x, y, width, height = clean_numbers(values)
        if width <= 0 or height <= 0:
            raise EntryError("box of no size", f"xywh is [x, y, width, height] in pixels, not {values!r:.60}.")
        values = [x, y, x + width, y + height]
    return clean_corners(values)
