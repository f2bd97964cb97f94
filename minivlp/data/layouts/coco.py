"""COCO: captions, and instances as regions whose phrase is their category."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minivlp.data.layouts.columns import HARMLESS, check_columns
from minivlp.data.layouts.entries import (
    SPLIT_NAMES,
    Entry,
    MarkedBox,
    read_json,
    require_integer,
    require_list,
    require_object,
)
from minivlp.data.layouts.published import is_leftover
from minivlp.data.validation import (
    EntryError,
    NoSuchSplit,
    Report,
    clean_caption,
    clean_name,
    clean_numbers,
    in_pixels,
)

_IMAGE_KEYS = HARMLESS | {"file_name", "width", "height", "id"}
_CAPTION_KEYS = HARMLESS | {"image_id", "caption", "id"}
_BOX_KEYS = HARMLESS | {"image_id", "category_id", "bbox", "iscrowd", "id"}
# Annotations that COCO publishes beside captions and instances, which no model here learns from.
_NOT_READ = ("person_keypoints", "panoptic", "stuff", "image_info", "deprecated")


def coco_files(root: Path, what: str) -> list[Path]:
    """The JSON files with `what` in their name: captions, or instances."""
    found = [path for folder in (root / "annotations", root) for path in sorted(folder.glob(f"*{what}*.json"))]
    return [path for path in found if not is_leftover(path)]


def _file_split(path: Path) -> str | None:
    match = re.search(r"(train|val|test)", path.name.lower())
    return SPLIT_NAMES[match[1]] if match else None


def read_coco(root: Path, report: Report, split: str | None) -> list[Entry]:
    """Captions, and instances as regions whose phrase is their category. Crowds are left out."""
    captions, instances = coco_files(root, "captions"), coco_files(root, "instances")
    by_file = len({_file_split(path) for path in captions}) > 1  # captions_train2017.json beside captions_val2017.json
    if by_file and split is not None:
        found = ", ".join(path.name for path in captions)
        captions = [path for path in captions if _file_split(path) == split]
        instances = [path for path in instances if _file_split(path) == split]
        if not captions:
            raise NoSuchSplit(root, split, found)
    images: dict[int, Entry] = {}
    seen: dict[int, tuple[int, str]] = {}  # annotation id -> (image, caption); files of other years repeat annotations
    for path in captions:
        data = read_json(path)
        _read_coco_images(path, data, images, _file_split(path) if by_file else None, report)
        _read_coco_captions(path, data, images, seen, report)
    for entry in images.values():
        if not entry.captions:
            with report.entry(entry.source, counted=False):
                raise EntryError("image without caption", f"{entry.name!r}: add an annotation.", harmless=True)
    _note_files_beside(root, report)
    for path in instances:
        _read_coco_boxes(path, read_json(path), images, report)
    return [entry for entry in images.values() if entry.captions]


def _note_files_beside(root: Path, report: Report) -> None:
    for path in sorted((root / "annotations").glob("*.json")):
        known = any(word in path.name for word in ("captions", "instances")) or path.name.startswith(_NOT_READ)
        if not known and not is_leftover(path):
            report.note(f"{path.relative_to(root)} is not read", "its name says neither captions nor instances")


def _coco_items(path: Path, data: Any, key: str, report: Report) -> Iterator[tuple[str, Any]]:
    short = path.relative_to(report.root)
    for number, item in enumerate(require_list(data, key, path)):
        yield f"{short} {key}[{number}]", item


def _check_keys(item: Any, known: frozenset[str], where: str, report: Report) -> None:
    if not require_object(item).keys() <= known:
        check_columns(item, [(key,) for key in known], where, report)


def _read_coco_images(path: Path, data: Any, images: dict[int, Entry], split: str | None, report: Report) -> None:
    for where, item in _coco_items(path, data, "images", report):
        with report.entry(where):
            _check_keys(item, _IMAGE_KEYS, where, report)
            key, name = require_integer(require_object(item), "id"), clean_name(item.get("file_name"))
            size = None
            if "width" in item and "height" in item:
                size = require_integer(item, "width"), require_integer(item, "height")
                if not all(size):
                    raise EntryError("image of no size", "Width and height are positive numbers of pixels.")
            if key in images:
                same = (images[key].name, images[key].size) == (name, size)
                raise EntryError("duplicate image id", f"{key} is also {images[key].name!r}: keep one.", harmless=same)
            images[key] = Entry(name, where, key, split=split, size=size)


def _read_coco_captions(
    path: Path, data: Any, images: dict[int, Entry], seen: dict[int, tuple[int, str]], report: Report
) -> None:
    for where, item in _coco_items(path, data, "annotations", report):
        with report.entry(where):
            _check_keys(item, _CAPTION_KEYS, where, report)
            key, caption = require_integer(require_object(item), "image_id"), clean_caption(item.get("caption"))
            if key not in images:
                raise EntryError("no image of this id", f"image_id {key} is not in the images: add it or delete this.")
            annotation = require_integer(item, "id")
            if annotation in seen:
                remedy = f"{annotation} has another caption above: give the annotations new ids."
                raise EntryError("duplicate annotation id", remedy, harmless=seen[annotation] == (key, caption))
            seen[annotation] = (key, caption)
            images[key].captions.append(caption)


def _read_coco_boxes(path: Path, data: Any, images: dict[int, Entry], report: Report) -> None:
    names: dict[int, str] = {}
    for where, item in _coco_items(path, data, "categories", report):
        with report.entry(where):
            names[require_integer(require_object(item), "id")] = clean_caption(item.get("name"))
    listed = data.get("images")
    ids = [item.get("id") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    known = {key for key in ids if isinstance(key, int)}
    seen: set[int] = set()
    tiny: list[tuple[str, EntryError]] = []
    in_pixels_found = False
    for where, item in _coco_items(path, data, "annotations", report):
        with report.entry(where):
            _check_keys(item, _BOX_KEYS, where, report)
            if item.get("iscrowd"):
                continue
            key, category = require_integer(item, "image_id"), require_integer(item, "category_id")
            if key not in images and key not in known:
                raise EntryError("no image of this id", f"image_id {key} is not in the images: add it or delete this.")
            if category not in names:
                raise EntryError("no category of this id", f"category_id {category} is not in the categories: add it.")
            x, y, width, height = clean_numbers(item.get("bbox"))
            annotation = item.get("id")
            if isinstance(annotation, int) and annotation in seen:
                raise EntryError("duplicate annotation id", "It is already above.", harmless=True)
            if isinstance(annotation, int):
                seen.add(annotation)
            if width < 0 or height < 0:
                raise EntryError("box of negative size", "bbox is [x, y, width, height] in pixels: fix or delete it.")
            if not width or not height:  # the published COCO has a few such boxes
                raise EntryError("box of no size", "It is empty.", harmless=True)
            try:
                in_pixels((x, y, width, height), "xywh_fraction in a captions.jsonl")
            except EntryError as error:
                tiny.append((where, error))
                continue
            in_pixels_found = True
            if key in images:  # the instances may cover more images than the captions
                corners = x, y, x + width, y + height
                images[key].boxes.append(MarkedBox(corners, names[category], "object", where))
    for where, error in tiny:  # a single one among boxes in pixels is a flaw, all of them are another unit
        with report.entry(where, counted=False):
            if in_pixels_found:
                raise EntryError("box of less than a pixel", error.remedy, harmless=True)
            raise error
