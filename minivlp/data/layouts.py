"""How people's folders are written: COCO, Flickr8k/30k, CSV and JSONL, each read into one `Entry` per image.

Readers look at annotations only, never at images; every entry is checked inside `with report.entry(where)`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivlp.data.batch import Box
from minivlp.data.damage import (
    DataError,
    Fault,
    Report,
    clean_caption,
    clean_corners,
    clean_name,
    clean_numbers,
    decode_text,
)

SPLIT_NAMES = {"train": "train", "restval": "train", "dev": "validation", "val": "validation",
                "validation": "validation", "test": "test"}  # fmt: skip
_FILE_KEYS = ("file", "image", "file_name", "filename", "image_name")
_CAPTION_KEYS = ("caption", "captions", "text", "comment")
_TABLES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")


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


def recognise(spec: str | Path) -> tuple[str, Path, Path | None]:
    """(layout, folder, the captions' file or None for COCO)."""
    layout, colon, rest = str(spec).partition(":")
    if not colon or layout not in ("coco", "flickr", "folder"):
        layout, rest = "", str(spec)
    path = Path(rest).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such folder. Write coco:DIR, flickr:DIR, folder:DIR or just the path.")
    if path.is_file():
        root, table, flickr = path.parent, path, path
        layout = layout or ("folder" if path.suffix in (".csv", ".jsonl") else "flickr")
        if layout == "coco":
            raise DataError(f"{path}: a file where a folder is expected. Write coco:DIR, with DIR/annotations in it.")
        return layout, root, path
    table, flickr = _table_file(path), _flickr_file(path)
    if not layout:
        layout = "coco" if _coco_files(path, "captions") else "folder" if table else "flickr" if flickr else ""
    needs = {"coco": "annotations/*captions*.json", "folder": " or ".join(_TABLES),
             "flickr": "dataset*.json, *.token.txt, captions.txt or results.csv"}  # fmt: skip
    if not layout:
        raise DataError(f"{path}: none of the known layouts; it would need {', or '.join(needs.values())}.")
    file = {"folder": table, "flickr": flickr}.get(layout)
    if not (_coco_files(path, "captions") if layout == "coco" else file):
        raise DataError(f"{path}: no {needs[layout]}, which {layout}:DIR needs. Put it there, or try another layout.")
    return layout, path, file


def _bytes(path: Path) -> bytes:
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


def _lines(path: Path, report: Report) -> Iterator[tuple[str, bytes]]:
    """(where, line) of the lines that hold something. Decoding is the caller's, so that a bad line is one bad row."""
    short = path.relative_to(report.root)
    for number, line in enumerate(_bytes(path).splitlines(), start=1):
        if line.strip():
            yield f"{short} row {number}", line


def _json(path: Path) -> Any:
    raw = _bytes(path)
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


def _list(data: Any, key: str, path: Path) -> list[Any]:
    items = data.get(key) if isinstance(data, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{path}: no list {key!r} in it. Is it the file of another data set? Fetch or write it again.")
    return items


def _object(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise Fault("not an object", 'Write {"key": value, ...}.')
    return item


def _whole(item: dict[str, Any], key: str) -> int:
    value = item.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise Fault(f"no {key}", f"{key!r} is a whole number, not {value!r:.60}.")
    return value


# ---- a folder with CSV or JSONL ----------------------------------------------------------------------------------


_Line = tuple[str, bytes, Callable[[str], dict[str, Any]]]  # where, the raw line, how to parse it


def _table_file(root: Path) -> Path | None:
    found = [root / name for name in _TABLES if (root / name).exists()]
    if len(found) > 1:
        raise DataError(f"{root}: both {found[0].name} and {found[1].name} are there. Name one: folder:{found[0]}")
    return found[0] if found else None


def read_table(file: Path, report: Report, language: str) -> list[Entry]:
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
                raise Fault("duplicate row", "The same row stands above.", harmless=True)
            seen.add(key)
            entry = entries.of(name, where)
            entry.captions += [caption for caption in captions if caption not in entry.captions]
            entry.boxes += phrases
    return list(entries.values())


def _jsonl_rows(file: Path, report: Report) -> Iterator[_Line]:
    def parse(line: str) -> dict[str, Any]:
        try:
            return _object(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise Fault("broken JSON", f"{error}: write one JSON object to a line.") from error

    for where, line in _lines(file, report):
        yield where, line, parse


def _csv_rows(file: Path, report: Report) -> Iterator[_Line]:
    lines = _lines(file, report)
    where, head = next(lines)
    try:
        text = decode_text(head)
    except Fault as fault:
        raise DataError(f"{report.root / where}: {fault.why}. {fault.remedy}") from fault
    # Spreadsheets write ; or tabs in many countries: the delimiter is the one that makes a column we know.
    headers = [(d, [name.strip().lower() for name in text.split(d)]) for d in ",;\t|"]
    headers = [(d, [n.strip('"') for n in names]) for d, names in headers]
    fitting = [(d, names) for d, names in headers if set(names) & set(_FILE_KEYS)]
    if not fitting or len(set(fitting[0][1])) < len(fitting[0][1]):
        remedy = f"Start the file with a line such as file,caption (known for images: {', '.join(_FILE_KEYS)})."
        raise DataError(f"{report.root / where}: no column for images, or a name twice: {text!r:.80}. {remedy}")
    delimiter, names = max(fitting, key=lambda pair: len(pair[1]))

    def parse(line: str) -> dict[str, Any]:
        cells = _cells(line, delimiter)
        if len(cells) != len(names):
            remedy = f"Found {len(cells)} of {len(names)}: put a text that holds {delimiter!r} in double quotes."
            raise Fault("wrong number of columns", remedy)
        item = dict(zip(names, cells, strict=True))
        for key in ("regions", "boxes"):
            if item.get(key, "").strip():
                try:
                    item[key] = json.loads(item[key])
                except (ValueError, RecursionError) as error:
                    raise Fault("broken JSON", f"{error}: regions are a JSON list in double quotes.") from error
            else:
                item.pop(key, None)
        return item

    for where, line in lines:
        yield where, line, parse


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of one line. A caption stays on its line: else one forgotten quote would swallow the rows below it."""
    if len(line) > 100_000:  # beyond what the csv module takes by default
        raise Fault("row too long", f"It has {len(line):,} characters: is a line break missing?")
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as error:
        remedy = f"({error}) Close each quote on its own line and double the quotes inside a quoted caption."
        raise Fault("quote not closed", remedy) from error


def _first(item: dict[str, Any], keys: Sequence[str], what: str) -> Any:
    for key in keys:
        if key in item:
            return item[key]
    raise Fault(f"no {what}", f"The row needs one of: {', '.join(keys)}.")


def _language_keys(names: Sequence[str], language: str) -> list[str]:
    """`caption_zh` and its like; for English also the bare `caption`."""
    return [f"{name}_{language}" for name in names] + (list(names) if language == "en" else [])


def _read_captions(item: dict[str, Any], language: str, phrases: list[str]) -> list[str]:
    keys = _language_keys(_CAPTION_KEYS, language)
    if phrases and not any(key in item for key in keys):
        return list(dict.fromkeys(phrases))  # RefCOCO has phrases only: each is said of the picture, if of a part of it
    captions = _first(item, keys, "caption")
    captions = captions if isinstance(captions, list) else [captions]
    if not captions:
        raise Fault("empty caption", "The list of captions is empty: write what the picture shows, or delete the row.")
    return list(dict.fromkeys(clean_caption(caption) for caption in captions))


def _read_regions(item: dict[str, Any], language: str, where: str, report: Report) -> list[tuple[Box, str, str, str]]:
    regions = item.get("regions", item.get("boxes", []))
    if not isinstance(regions, list):
        raise Fault("regions are not a list", 'Write "regions": [{"box": [x0, y0, x1, y1], "phrase": "a red cup"}].')
    found = []
    for number, region in enumerate(regions, start=1):
        place = f"{where} region {number}"
        with report.entry(place):
            region = _object(region)
            corners = clean_corners(_first(region, ("box", "bbox", "xyxy"), "box"))
            keys = _language_keys(("phrase", "text", "caption", "label"), language)
            found.append((corners, clean_caption(_first(region, keys, "phrase")), "phrase", place))
    return found


# ---- Flickr8k / Flickr30k ----------------------------------------------------------------------------------------


def _flickr_file(root: Path) -> Path | None:
    """The captions' file, here or one folder down (archives unpack so): Karpathy's JSON first, as it has the splits."""
    for pattern in ("dataset*.json", "*.token", "*.token.txt", "captions.txt", "results.csv"):
        found = sorted(root.glob(pattern)) + sorted(root.glob(f"*/{pattern}"))
        found = [path for path in found if path.is_file() and "lemma" not in path.name]
        if len(found) > 1:
            raise DataError(f"{root}: both {found[0]} and {found[1]} hold captions. Name one: flickr:{found[0]}")
        if found:
            return found[0]
    return None


def read_flickr(root: Path, file: Path, report: Report) -> list[Entry]:
    if file.suffix == ".json":
        return list(_read_karpathy(file, report).values())
    entries = _read_caption_lines(file, report)
    _read_split_files(root, file, entries, report)
    return list(entries.values())


def _read_karpathy(file: Path, report: Report) -> Entries:
    entries = Entries()
    short = file.relative_to(report.root)
    for number, item in enumerate(_list(_json(file), "images", file)):
        where = f"{short} images[{number}]"
        with report.entry(where):
            name = clean_name(_object(item).get("filename"))
            folder = item.get("filepath")  # COCO in Karpathy's splits has one
            name = clean_name(f"{folder}/{name}") if isinstance(folder, str) and folder else name
            sentences = item.get("sentences")
            if not isinstance(sentences, list) or not sentences:
                raise Fault("no caption", "'sentences' is a list of at least one {\"raw\": caption}.")
            captions = [clean_caption(_object(sentence).get("raw")) for sentence in sentences]
            split = SPLIT_NAMES.get(str(item.get("split", "")))
            if "split" in item and split is None:
                raise Fault("unknown split", f"Found {item['split']!r:.60}, known are {', '.join(SPLIT_NAMES)}.")
            if name in entries:
                same = (entries[name].captions, entries[name].split) == (captions, split)
                raise Fault("duplicate row", f"{name!r} stands above: keep one of the two.", harmless=same)
            entry = entries.of(name, where)
            entry.captions, entry.split = captions, split
    return entries


def _read_caption_lines(file: Path, report: Report) -> Entries:
    """`name.jpg#0<TAB>caption`, or `image,caption`, or Kaggle's `image_name| number| comment`."""
    entries, seen = Entries(), set()
    split = None
    for where, raw in _lines(file, report):
        if split is None:
            start = raw.decode("utf-8", "replace").lstrip("\ufeff").lower()
            split = _token_line if "\t" in start else _piped_line if start.startswith("image_name|") else _comma_line
            if split is _comma_line and not re.fullmatch(r'"?(image|file)"?\s*,\s*"?caption"?\s*', start):
                remedy = "Start the file with the line image,caption"
                raise DataError(f"{report.root / where}: neither a header nor name.jpg#0<TAB>caption. {remedy}")
            if split is not _token_line:
                continue
        with report.entry(where):
            name, number, caption = split(decode_text(raw))
            name, caption = clean_name(name), clean_caption(caption)
            key = (name, number or caption)
            if key in seen:
                same = not number or caption in entries[name].captions
                raise Fault("duplicate row", "The same row stands above.", harmless=same)
            seen.add(key)
            entries.of(name, where).captions.append(caption)
    return entries


def _token_line(line: str) -> tuple[str, str, str]:
    name, tab, caption = line.partition("\t")
    name, mark, number = name.rpartition("#")
    if not tab or not mark or not number.strip().isdigit():
        raise Fault("not a token line", "Write name.jpg#0, a tab, and the caption.")
    return name, number.strip(), caption


def _comma_line(line: str) -> tuple[str, str, str]:
    """The name ends at the first comma; commas and quotes of a caption need no care, as people's files have none."""
    name, comma, caption = line.partition(",")
    if not comma:
        raise Fault("wrong number of columns", "Write image,caption with a comma between them.")
    caption = caption.strip()
    if caption.startswith('"') and caption.endswith('"') and len(caption) > 1:
        caption = caption[1:-1].replace('""', '"')
    elif caption.count('"') % 2:
        raise Fault("quote not closed", "Close each quote on its own line.")
    return name.strip('"'), "", caption


def _piped_line(line: str) -> tuple[str, str, str]:
    cells = line.split("|", 2)
    if len(cells) != 3 or not cells[1].strip().isdigit():
        raise Fault("wrong number of columns", "Write image_name| number| comment.")
    return cells[0], cells[1].strip(), cells[2]


def _read_split_files(root: Path, file: Path, entries: Entries, report: Report) -> None:
    """Lists of names such as Flickr_8k.trainImages.txt or test.txt; what none of them lists is in no split."""
    stems = {os.path.splitext(name)[0]: name for name in entries}
    for path in sorted({*root.glob("*.txt"), *file.parent.glob("*.txt"), *root.glob("*/*.txt")}):
        match = re.search(r"(?:^|[._])(train|dev|val|validation|test)(?:images)?\.txt$", path.name.lower())
        if not match or path == file:
            continue
        split = SPLIT_NAMES[match[1]]
        for where, raw in _lines(path, report):
            with report.entry(where):
                name = clean_name(decode_text(raw))
                entry = entries.get(name) or entries.get(stems.get(name, ""))
                if entry is None:
                    raise Fault("no caption", f"{name!r} has none in {file.name}: add it there or delete this line.")
                if entry.split not in (None, split):
                    remedy = f"{name!r} is in {entry.split} too: what is tested must be unseen."
                    raise Fault("image in two splits", remedy)
                entry.split = split


# ---- COCO --------------------------------------------------------------------------------------------------------


def _coco_files(root: Path, what: str) -> list[Path]:
    return [path for folder in (root / "annotations", root) for path in sorted(folder.glob(f"*{what}*.json"))]


def _file_split(path: Path) -> str | None:
    match = re.search(r"(train|val|test)", path.name.lower())
    return SPLIT_NAMES[match[1]] if match else None


def read_coco(root: Path, report: Report, split: str | None) -> list[Entry]:
    """Captions, and instances as regions named by their category. Crowds are no single object and are not read."""
    captions, instances = _coco_files(root, "captions"), _coco_files(root, "instances")
    by_file = len({_file_split(path) for path in captions}) > 1  # captions_train2017.json beside captions_val2017.json
    if by_file and split is not None:
        there = ", ".join(path.name for path in captions)
        captions = [path for path in captions if _file_split(path) == split]
        instances = [path for path in instances if _file_split(path) == split]
        if not captions:
            raise DataError(f"{root}: no image in split {split!r}. There are: {there}. Or take all: split=None.")
    images: dict[int, Entry] = {}
    seen: dict[int, tuple[int, str]] = {}  # annotation id -> what it said: other years repeat the same annotations
    for path in captions:
        data = _json(path)
        _read_coco_images(path, data, images, _file_split(path) if by_file else None, report)
        _read_coco_captions(path, data, images, seen, report)
    for entry in images.values():
        if not entry.captions:
            with report.entry(entry.source, counted=False):
                raise Fault("image without caption", f"{entry.name!r} has none: add an annotation or delete the image.")
    for path in instances:
        _read_coco_boxes(path, _json(path), images, report)
    return [entry for entry in images.values() if entry.captions]


def _coco_items(path: Path, data: Any, key: str, report: Report) -> Iterator[tuple[str, Any]]:
    short = path.relative_to(report.root)
    for number, item in enumerate(_list(data, key, path)):
        yield f"{short} {key}[{number}]", item


def _read_coco_images(path: Path, data: Any, images: dict[int, Entry], split: str | None, report: Report) -> None:
    for where, item in _coco_items(path, data, "images", report):
        with report.entry(where):
            key, name = _whole(_object(item), "id"), clean_name(item.get("file_name"))
            size = None
            if "width" in item and "height" in item:
                size = _whole(item, "width"), _whole(item, "height")
                if not all(size):
                    raise Fault("image of no size", "Width and height are positive numbers of pixels.")
            if key in images:
                same = (images[key].name, images[key].size) == (name, size)
                raise Fault("duplicate image id", f"{key} is also {images[key].name!r}: keep one.", harmless=same)
            images[key] = Entry(name, where, key, split=split, size=size)


def _read_coco_captions(
    path: Path, data: Any, images: dict[int, Entry], seen: dict[int, tuple[int, str]], report: Report
) -> None:
    for where, item in _coco_items(path, data, "annotations", report):
        with report.entry(where):
            key, caption = _whole(_object(item), "image_id"), clean_caption(item.get("caption"))
            if key not in images:
                raise Fault("no image of this id", f"image_id {key} is not among the images: add it or delete this.")
            mark = _whole(item, "id")
            if mark in seen:
                remedy = f"{mark} stands above with another caption: number the annotations anew."
                raise Fault("duplicate annotation id", remedy, harmless=seen[mark] == (key, caption))
            seen[mark] = (key, caption)
            images[key].captions.append(caption)


def _read_coco_boxes(path: Path, data: Any, images: dict[int, Entry], report: Report) -> None:
    names: dict[int, str] = {}
    for where, item in _coco_items(path, data, "categories", report):
        with report.entry(where):
            names[_whole(_object(item), "id")] = clean_caption(item.get("name"))
    listed = data.get("images")
    ids = [item.get("id") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    known = {key for key in ids if isinstance(key, int)}
    seen: set[int] = set()
    for where, item in _coco_items(path, data, "annotations", report):
        with report.entry(where):
            if _object(item).get("iscrowd"):
                continue
            key, category = _whole(item, "image_id"), _whole(item, "category_id")
            if key not in images and key not in known:
                raise Fault("no image of this id", f"image_id {key} is not among the images: add it or delete this.")
            if category not in names:
                raise Fault("no category of this id", f"category_id {category} is not among the categories: add it.")
            x, y, width, height = clean_numbers(item.get("bbox"))
            mark = item.get("id")
            if isinstance(mark, int) and mark in seen:
                raise Fault("duplicate annotation id", "It stands above already.", harmless=True)
            if isinstance(mark, int):
                seen.add(mark)
            if width < 0 or height < 0:
                raise Fault("box of negative size", "bbox is [x, y, width, height] in pixels: mend or delete it.")
            if not width or not height:  # the published COCO holds a few such boxes: no reason to stop
                raise Fault("box of no size", "There is nothing in it.", harmless=True)
            if key in images:  # the instances may cover more images than the captions do
                images[key].boxes.append(((x, y, x + width, y + height), names[category], "object", where))
