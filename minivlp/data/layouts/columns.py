"""What the columns of a table or the keys of an object are called: those that are read, and those that say nothing.

What is in neither list is counted in one printed line, or is an error where it can only be boxes or captions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from minivlp.data.validation import EntryError, Report

FILE = ("file", "image", "file_name", "filename", "image_name")
CAPTION = ("caption", "captions", "text", "comment")
PHRASE = ("phrase", "phrases", "text", "caption", "label")
CATEGORY = ("categories", "category", "label", "labels", "name", "names")
FRACTION_FORMS = {"xyxy_fraction": "xyxy", "xywh_fraction": "xywh", "cxcywh_fraction": "cxcywh"}
BOX = ("box", "xyxy", "xywh", *FRACTION_FORMS)
REGIONS = ("regions", "boxes")
OBJECTS = "objects"  # boxes as `datasets` of Hugging Face stores them
CROWD = ("iscrowd", "is_crowd")

# Numbers, addresses and measurements: no word of a caption and no place of a box is in them.
HARMLESS = frozenset(
    """
    id image_id img_id imgid caption_id sentence_id sentid sentids ann_id annotation_id ref_id sent_id bbox_id object_id
    comment_number number index key unnamed:_0 area iscrowd is_crowd segmentation tokens cocoid dataset
    url image_url coco_url flickr_url license license_url author artist credit source date date_captured md5 sha256
    status error_message exif original_width original_height similarity aesthetic punsafe pwatermark nsfw
    """.split()
)
# Names under which other formats keep boxes.
_BOXES = frozenset(
    """
    bbox bboxes bounding_box bounding_boxes boundingbox boundingboxes bndbox boxes_xyxy boxes_xywh gt_boxes gt_bboxes
    xmin ymin xmax ymax x_min y_min x_max y_max x0 y0 x1 y1 x2 y2 cx cy x_center y_center
    """.split()
)
_WRITE_BOXES = 'Write "regions": [{"xyxy": [x0, y0, x1, y1], "phrase": "a cup"}], or xywh, or rename the column.'
_MEANT = (*FILE, *CAPTION, "phrase", "phrases", *BOX, *REGIONS, OBJECTS, "split")


def in_language(names: Sequence[str], language: str) -> list[str]:
    """Names with the language, such as `caption_zh`; for English also the plain `caption`."""
    return [f"{name}_{language}" for name in names] + (list(names) if language == "en" else [])


def first_of(item: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """The first of the keys that the item has."""
    return next((key for key in keys if key in item), None)


def value_of(item: Mapping[str, Any], keys: Sequence[str], what: str) -> Any:
    """The value of the first of the keys that exists. Raises EntryError that there is no `what`."""
    key = first_of(item, keys)
    if key is None:
        raise EntryError(f"no {what}", f"The row needs one of: {', '.join(keys)}.")
    return item[key]


def check_columns(
    item: Mapping[str, Any],
    groups: Iterable[Sequence[str]],
    where: str,
    report: Report,
    language: str = "en",
    inside: str = "",
) -> None:
    """Count what the item says in columns that are not read, as notes of the report.

    Args:
        groups: names of which the first that exists is read.
        language: the one that is read. The others are harmless, and so is English without `_en` if it is another one.
        inside: the column that the item stands in, such as "regions".

    Raises EntryError for a column that can only mean boxes or captions.
    """
    groups = list(groups)
    read = {key for group in groups if (key := first_of(item, group)) is not None}
    for key, value in item.items():
        if key in read or _says_nothing(value) or _is_harmless(key):
            continue
        full = f"{inside}.{key}" if inside else key
        instead = next((name for group in groups if key in group and (name := first_of(item, group)) != key), None)
        if instead is not None:
            if value != item[instead]:
                report.note(f"{_file_of(where)}: column {full!r} is not read where there is {instead!r}", where)
            continue
        if language != "en" and key in (*CAPTION, *PHRASE):
            continue
        if key.lower() in _BOXES or _holds_boxes(value):
            raise EntryError("boxes in an unknown column", f"Column {full!r} is not known{_meant(key)} {_WRITE_BOXES}")
        if (near := _nearest(key)) and near != key:
            several = " Several captions of a picture are a list in `captions`, or one to a row."
            remedy = f"Column {full!r} is not known: did you mean {near!r}? Rename it, or delete it."
            raise EntryError("unknown column", remedy + (several if near in CAPTION else ""))
        report.note(f"{_file_of(where)}: column {full!r} is not read", where)


def _file_of(where: str) -> str:
    """The file of a place such as "captions.csv row 3" or "captions.json images[2]"."""
    return re.sub(r" (row \d|\w*\[\d).*", "", where)


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


@lru_cache(maxsize=1000)
def _is_harmless(key: str) -> bool:
    """Whether a column is known to say nothing here: by its name, or because it is in another language."""
    name = key.strip().lower().replace(" ", "_")
    another = rf"({'|'.join({*CAPTION, *PHRASE})})_[a-z]{{2}}(_[a-z]{{2}})?"
    return not name or name in HARMLESS or re.fullmatch(another, name) is not None


@lru_cache(maxsize=1000)
def _nearest(key: str) -> str | None:
    """The name that is read and that a mistyped column probably means."""
    close = difflib.get_close_matches(key.strip().lower(), _MEANT, n=1, cutoff=0.8)
    return close[0] if close else None


def _meant(key: str) -> str:
    near = _nearest(key)
    return f": did you mean {near!r}?" if near else ", and it seems to hold boxes."


def _holds_boxes(value: Any) -> bool:
    """Whether a value is a list of four numbers each, or objects with boxes."""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        return any(key in _BOXES or key in BOX for key in first)
    numbers = first if isinstance(value, list) and isinstance(first, list) else ()
    return len(numbers) == 4 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers)
