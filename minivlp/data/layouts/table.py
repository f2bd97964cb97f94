"""A folder with a CSV, JSONL or JSON file: captions, and phrases with boxes as in Flickr30k Entities and RefCOCO."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minivlp.data.batch import Box
from minivlp.data.layouts.columns import (
    BOX,
    CAPTION,
    CATEGORY,
    CROWD,
    FILE,
    FRACTION_FORMS,
    OBJECTS,
    PHRASE,
    REGIONS,
    check_columns,
    first_of,
    in_language,
    value_of,
)
from minivlp.data.layouts.entries import (
    SPLIT_NAMES,
    Entries,
    Entry,
    MarkedBox,
    read_bytes,
    read_json,
    read_lines,
    require_object,
)
from minivlp.data.validation import (
    DataError,
    EntryError,
    Report,
    clean_caption,
    clean_corners,
    clean_name,
    clean_numbers,
    decode_text,
    fractions_of,
    in_pixels,
)

TABLES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
_WHOLE_IMAGE_KEYS = (("split",), ("width",), ("height",))
_Row = tuple[str, Callable[[], dict[str, Any]]]  # where, and how to parse the row


def table_file(root: Path) -> Path | None:
    """The CSV or JSONL file of a folder. Raises DataError if there is more than one."""
    found = [root / name for name in TABLES if (root / name).exists()]
    if len(found) > 1:
        raise DataError(f"{root}: both {found[0].name} and {found[1].name} exist. Name one: folder:{found[0]}")
    return found[0] if found else None


def read_table(file: Path, report: Report, language: str) -> list[Entry]:
    """The entries of a CSV, TSV, JSONL or JSON file in one language. Rows with the same image become one entry."""
    entries, seen = Entries(), set()
    rows = {".jsonl": _jsonl_rows, ".json": _json_rows}.get(file.suffix.lower(), _csv_rows)
    for where, parse in rows(file, report):
        with report.entry(where):
            item = parse()
            with report.entry(where, counted=False):
                check_columns(item, _groups(item, language), where, report, language)
            name = clean_name(value_of(item, FILE, "file"))
            boxes = _read_regions(item, language, where, report)
            captions = _read_captions(item, language, boxes)
            key = (name, *captions, *(box[:2] for box in boxes))
            if key in seen:
                raise EntryError("duplicate row", "The same row is above.", harmless=True)
            seen.add(key)
            entry = entries.of(name, where)
            _set_split(entry, item)
            if boxes:
                _set_size(entry, item)
            entry.captions += [caption for caption in captions if caption not in entry.captions]
            entry.boxes += boxes
    return list(entries.values())


def _groups(item: dict[str, Any], language: str) -> list[tuple[str, ...] | list[str]]:
    """The names that are read of a row. Of each group it is the first that the row has."""
    groups = [FILE, in_language(CAPTION, language), (*REGIONS, *BOX, "bbox"), (OBJECTS,), *_WHOLE_IMAGE_KEYS]
    return [*groups, in_language(PHRASE, language)] if _is_region(item) else groups


def _is_region(item: dict[str, Any]) -> bool:
    """Whether a row is itself one region: it has a box of its own and no list of regions."""
    return first_of(item, REGIONS) is None and first_of(item, (*BOX, "bbox")) is not None


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


def _set_size(entry: Entry, item: dict[str, Any]) -> None:
    """Take over the row's `width` and `height`, if it has both: the size in pixels that its boxes were written for."""
    given = [item.get("width"), item.get("height")]
    if any(value in (None, "") for value in given):
        return
    try:
        size = tuple(int(value) for value in given)
    except (TypeError, ValueError, OverflowError):
        size = (0, 0)
    if min(size) < 1:
        remedy = f"Found {given[0]!r:.40} and {given[1]!r:.40}: write the picture's width and height in whole pixels."
        raise EntryError("image of no size", remedy)
    if entry.size not in (None, size):
        raise EntryError("image of two sizes", f"It is {entry.size[0]} x {entry.size[1]} in a row above: mend one.")
    entry.size = size


def _jsonl_rows(file: Path, report: Report) -> Iterator[_Row]:
    def parser(line: bytes) -> Callable[[], dict[str, Any]]:
        def parse() -> dict[str, Any]:
            try:
                return require_object(json.loads(decode_text(line)))
            except (ValueError, RecursionError) as error:
                raise EntryError("broken JSON", f"{error}: write one JSON object to a line.") from error

        return parse

    for where, line in read_lines(file, report):
        yield where, parser(line)


def _json_rows(file: Path, report: Report) -> Iterator[_Row]:
    """The rows of a JSON list, as ALBEF and BLIP have them. A file with one object per line is read as a JSONL."""
    lines = read_bytes(file).splitlines()
    if len(lines) > 1 and _is_object(lines[0]):
        yield from _jsonl_rows(file, report)
        return
    data, short = read_json(file), file.relative_to(report.root)
    if not isinstance(data, list):
        raise DataError(f"{file}: {_other_json(data, file)}")
    for number, item in enumerate(data):
        yield f"{short} [{number}]", lambda item=item: _plain(require_object(item))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _plain(item: dict[str, Any]) -> dict[str, Any]:
    """The item, unless it is a conversation."""
    if "conversations" in item or "messages" in item:
        remedy = 'Questions and answers (as in LLaVA) are not read: write {"image": "a.jpg", "caption": "a cat"}.'
        raise EntryError("a conversation, not a caption", remedy)
    return item


def _other_json(data: Any, file: Path) -> str:
    """What a JSON file without a list of rows is, and how to open it."""
    folder = file.parent.parent if file.parent.name == "annotations" else file.parent
    if isinstance(data, dict) and isinstance(data.get("images"), list):
        karpathy = any(isinstance(item, dict) and "sentences" in item for item in data["images"][:1])
        return f"annotations of {'Karpathy' if karpathy else 'COCO'}: write " + (
            f"flickr:{file}" if karpathy else f"coco:{folder}, with the file in {folder / 'annotations'}."
        )
    return 'not a list of rows. Write [{"image": "a.jpg", "caption": "a cat"}, ...].'


def _csv_rows(file: Path, report: Report) -> Iterator[_Row]:
    lines = read_lines(file, report)
    where, head = next(lines)
    try:
        text = decode_text(head)
    except EntryError as error:
        raise DataError(f"{report.root / where}: {error.reason}. {error.remedy}") from error
    # Spreadsheets write ; or tabs in many countries. The right delimiter is one that gives a known column.
    headers = [(d, [name.strip().lower() for name in text.split(d)]) for d in ",;\t|"]
    headers = [(d, [n.strip('"') for n in names]) for d, names in headers]
    fitting = [(d, names) for d, names in headers if set(names) & set(FILE)]
    if not fitting or len(set(fitting[0][1])) < len(fitting[0][1]):
        remedy = f"Start the file with a line such as file,caption (names for images: {', '.join(FILE)})."
        raise DataError(f"{report.root / where}: no column for images, or a name twice: {text!r:.80}. {remedy}")
    delimiter, names = max(fitting, key=lambda pair: len(pair[1]))

    def parse(line: bytes) -> dict[str, Any]:
        cells = _cells(decode_text(line), delimiter)
        if len(cells) != len(names):
            remedy = f"Found {len(cells)} of {len(names)}: put a text with {delimiter!r} in double quotes."
            raise EntryError("wrong number of columns", remedy)
        item = dict(zip(names, cells, strict=True))
        for key in (*REGIONS, *BOX, OBJECTS):
            if item.get(key, "").strip():
                try:
                    item[key] = json.loads(item[key])
                except (ValueError, RecursionError) as error:
                    raise EntryError("broken JSON", f"{error}: boxes are a JSON list in double quotes.") from error
            else:
                item.pop(key, None)
        return item

    for where, line in lines:
        yield where, lambda line=line: parse(line)


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of one line. A caption cannot continue on the next line: a missing quote would hide the rows below."""
    if len(line) > 100_000:  # the default limit of the csv module is 131,072 per cell
        raise EntryError("row too long", f"It has {len(line):,} characters: is a line break missing?")
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as error:
        remedy = f"({error}) Close each quote on its own line and double the quotes inside a quoted caption."
        raise EntryError("quote not closed", remedy) from error


def _read_captions(item: dict[str, Any], language: str, boxes: list[MarkedBox]) -> list[str]:
    keys = in_language(CAPTION, language)
    if boxes and first_of(item, keys) is None:
        return list(dict.fromkeys(box.phrase for box in boxes))  # RefCOCO has phrases only: use them as captions
    captions = value_of(item, keys, "caption")
    captions = captions if isinstance(captions, list) else [captions]
    if not captions:
        raise EntryError("empty caption", "The list is empty: write what the picture shows, or delete the row.")
    return list(dict.fromkeys(clean_caption(caption) for caption in captions))


def _read_regions(item: dict[str, Any], language: str, where: str, report: Report) -> list[MarkedBox]:
    """The regions and objects listed in a row, or the row itself if it has a box."""
    found = []
    if _is_region(item):
        found += _read_region(item, language, where)
    elif (regions := item.get(first_of(item, REGIONS) or "")) is not None:
        if not isinstance(regions, list):
            remedy = 'Write "regions": [{"box": [x0, y0, x1, y1], "phrase": "a cup"}].'
            raise EntryError("regions are not a list", remedy)
        for number, region in enumerate(regions, start=1):
            where_region = f"{where} region {number}"
            with report.entry(where_region):
                groups = [(*BOX, "bbox"), in_language(PHRASE, language)]
                check_columns(require_object(region), groups, where_region, report, language, inside="regions")
                found += _read_region(region, language, where_region)
    if item.get(OBJECTS):
        found += _read_objects(item[OBJECTS], where, report)
    return found


def _read_region(region: dict[str, Any], language: str, where: str) -> list[MarkedBox]:
    if first_of(region, BOX) is None and "bbox" in region:
        remedy = "'bbox' means corners in some files, and corner and size in others: call it xyxy or xywh."
        raise EntryError("box of an unknown form", remedy)
    box, fractions = _box(region)
    given = value_of(region, in_language(PHRASE, language), "phrase")
    phrases = [clean_caption(phrase) for phrase in (given if isinstance(given, list) else [given])]
    return [MarkedBox(box, phrase, "phrase", where, fractions) for phrase in phrases]


def _box(region: dict[str, Any]) -> tuple[Box, bool]:
    """The box as its key says it, and whether it is in fractions: corners in pixels, or (cx, cy, w, h) in fractions."""
    values = value_of(region, BOX, "box")
    key = first_of(region, BOX)
    if key in FRACTION_FORMS:
        return fractions_of(values, FRACTION_FORMS[key]), True
    return (_corners_of_xywh(values) if key == "xywh" else clean_corners(values)), False


def _corners_of_xywh(values: Any) -> Box:
    """Corners in pixels of a box given by its upper left corner, width and height."""
    x, y, width, height = in_pixels(clean_numbers(values), "xywh_fraction")
    if width <= 0 or height <= 0:
        raise EntryError("box of no size", f"xywh is [x, y, width, height] in pixels, not {values!r:.60}.")
    return clean_corners([x, y, x + width, y + height])


def _read_objects(objects: Any, where: str, report: Report) -> list[MarkedBox]:
    """The column `objects` of Hugging Face: a dictionary of lists, or a list of dictionaries, one per object.

    `bbox` is COCO's [x, y, width, height] in pixels. Crowds are no single object and are left out.
    """
    found = []
    for number, item in enumerate(_one_by_one(objects), start=1):
        where_object = f"{where} object {number}"
        with report.entry(where_object):
            check_columns(require_object(item), [("bbox", *BOX), CATEGORY], where_object, report, inside=OBJECTS)
            if item.get(first_of(item, CROWD) or ""):
                continue
            box, fractions = (_corners_of_xywh(item["bbox"]), False) if "bbox" in item else _box(item)
            found.append(MarkedBox(box, _category(item), "object", where_object, fractions))
    return found


def _one_by_one(objects: Any) -> list[Any]:
    """Objects as a list of dictionaries. Raises EntryError for lists of different lengths."""
    if isinstance(objects, list):
        return objects
    columns = dict(require_object(objects))
    key = first_of(columns, ("bbox", *BOX))
    if key is None:
        raise EntryError(
            "objects without boxes", 'Write "objects": {"bbox": [[x, y, width, height]], "categories": ["dog"]}.'
        )
    boxes = columns[key]
    if not isinstance(boxes, list):
        raise EntryError(
            "objects are not a list", f"Found {boxes!r:.60}: {key!r} is a list with a box for each object."
        )
    if boxes and not isinstance(boxes[0], list):  # a single object, not in lists
        return [columns]
    lists = {name: values for name, values in columns.items() if isinstance(values, list)}
    if wrong := [name for name, values in lists.items() if len(values) != len(boxes)]:
        remedy = f"There are {len(boxes)} in {key!r} and {len(lists[wrong[0]])} in {wrong[0]!r}: one for each object."
        raise EntryError("objects of different lengths", remedy)
    return [{name: values[i] for name, values in lists.items()} for i in range(len(boxes))]


def _category(item: dict[str, Any]) -> str:
    """The name of an object's category. Raises EntryError for a number, whose name the file does not say."""
    category = value_of(item, CATEGORY, "category")
    if isinstance(category, int | float) or (isinstance(category, str) and category.strip().isdigit()):
        remedy = f"Found {category!r:.40}: write the name, such as 'dog'. A data set's card lists the names by number."
        raise EntryError("category is a number", remedy)
    return clean_caption(category)
