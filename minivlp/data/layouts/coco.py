"""COCO: captions, and instances as regions named by their category."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minivlp.data.damage import DataError, Fault, Report, clean_caption, clean_name, clean_numbers
from minivlp.data.layouts.entries import SPLIT_NAMES, Entry, as_object, list_of, read_json, whole_number


def coco_files(root: Path, what: str) -> list[Path]:
    return [path for folder in (root / "annotations", root) for path in sorted(folder.glob(f"*{what}*.json"))]


def _file_split(path: Path) -> str | None:
    match = re.search(r"(train|val|test)", path.name.lower())
    return SPLIT_NAMES[match[1]] if match else None


def read_coco(root: Path, report: Report, split: str | None) -> list[Entry]:
    """Captions, and instances as regions named by their category. Crowds are no single object and are not read."""
    captions, instances = coco_files(root, "captions"), coco_files(root, "instances")
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
        data = read_json(path)
        _read_coco_images(path, data, images, _file_split(path) if by_file else None, report)
        _read_coco_captions(path, data, images, seen, report)
    for entry in images.values():
        if not entry.captions:
            with report.entry(entry.source, counted=False):
                raise Fault("image without caption", f"{entry.name!r} has none: add an annotation or delete the image.")
    for path in instances:
        _read_coco_boxes(path, read_json(path), images, report)
    return [entry for entry in images.values() if entry.captions]


def _coco_items(path: Path, data: Any, key: str, report: Report) -> Iterator[tuple[str, Any]]:
    short = path.relative_to(report.root)
    for number, item in enumerate(list_of(data, key, path)):
        yield f"{short} {key}[{number}]", item


def _read_coco_images(path: Path, data: Any, images: dict[int, Entry], split: str | None, report: Report) -> None:
    for where, item in _coco_items(path, data, "images", report):
        with report.entry(where):
            key, name = whole_number(as_object(item), "id"), clean_name(item.get("file_name"))
            size = None
            if "width" in item and "height" in item:
                size = whole_number(item, "width"), whole_number(item, "height")
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
            key, caption = whole_number(as_object(item), "image_id"), clean_caption(item.get("caption"))
            if key not in images:
                raise Fault("no image of this id", f"image_id {key} is not among the images: add it or delete this.")
            mark = whole_number(item, "id")
            if mark in seen:
                remedy = f"{mark} stands above with another caption: number the annotations anew."
                raise Fault("duplicate annotation id", remedy, harmless=seen[mark] == (key, caption))
            seen[mark] = (key, caption)
            images[key].captions.append(caption)


def _read_coco_boxes(path: Path, data: Any, images: dict[int, Entry], report: Report) -> None:
    names: dict[int, str] = {}
    for where, item in _coco_items(path, data, "categories", report):
        with report.entry(where):
            names[whole_number(as_object(item), "id")] = clean_caption(item.get("name"))
    listed = data.get("images")
    ids = [item.get("id") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    known = {key for key in ids if isinstance(key, int)}
    seen: set[int] = set()
    for where, item in _coco_items(path, data, "annotations", report):
        with report.entry(where):
            if as_object(item).get("iscrowd"):
                continue
            key, category = whole_number(item, "image_id"), whole_number(item, "category_id")
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
