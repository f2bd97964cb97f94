"""Validation of input files: errors that name the file, the row and a remedy, or invalid entries that are skipped.

Readers check one entry at a time inside `with report.entry(where)` and raise an `EntryError`. The `Report` decides for
all readers whether to stop (`on_error="raise"`) or to leave the entry out (`on_error="skip"`).
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from minivlp.data import pictures
from minivlp.data.batch import Box
from minivlp.data.pictures import PictureError
from minivlp.errors import UserError

SKIP = "on_error='skip'"  # the argument of `open_folder`, as messages name it
LONGEST_CAPTION = 5_000  # characters; the longest human captions we know (localized narratives) are below 3,000
# What tables hold where a caption is missing: pandas, Python, JavaScript and spreadsheets write these.
NO_CAPTION = frozenset({"nan", "none", "null", "undefined", "n/a", "#n/a", "<na>", "nat", "-nan"})


class StoredFile(Protocol):
    """A file inside another one, such as a member of a tar file. `str()` of it names both."""

    def read(self) -> bytes:
        """Its bytes. Raises OSError if the file around it has gone."""


PictureFile = Path | StoredFile


class DataError(UserError):
    """The user's data is invalid. The message names the file, the row and a remedy."""


class NoSuchSplit(DataError):
    """The data are valid, but have no image in the split that was asked for. `found` says which splits there are."""

    def __init__(self, root: Path | str, split: str, found: str) -> None:
        message = f"{root}: no image in split {split!r}. There are: {found or 'none'}."
        super().__init__(message, "Or take all: {}.", "split=None")


class EntryError(Exception):
    """One entry is invalid. `reason` is a short phrase that can be counted, `remedy` a sentence.

    A `harmless` error never stops the reader: the entry is left out and counted even with `on_error="raise"`.
    """

    def __init__(self, reason: str, remedy: str, harmless: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.remedy, self.harmless = reason, remedy, harmless


class Report:
    """Counts the entries of a folder. `skipped` has the `(where, reason)` of those that were left out.

    `notes` are facts that the user should know although nothing is left out: what, and where it was found.
    """

    def __init__(self, root: Path, on_error: str) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}")
        self.root, self.skip = root, on_error == "skip"
        self.entries = 0
        self.skipped: list[tuple[str, str]] = []
        self.notes: dict[str, list[str]] = {}

    def note(self, what: str, where: str) -> None:
        """Remember a fact. Equal facts are printed as one line with their number."""
        self.notes.setdefault(what, []).append(where)

    @contextmanager
    def entry(self, where: str, counted: bool = True) -> Iterator[None]:
        """Check one entry: an `EntryError` raised inside becomes a `DataError`, or the entry is skipped."""
        self.entries += counted
        try:
            yield
        except EntryError as error:
            if not (self.skip or error.harmless):
                stop = "" if error.reason.endswith("?") else "."
                message = f"{self.root / where}: {error.reason}{stop} {error.remedy}"
                raise DataError(message, "Or open the folder with {} to leave such rows out.", SKIP) from error
            self.skipped.append((where, error.reason))

    def lines(self) -> list[str]:
        """What to print when the folder is open: the notes, each once with its number, and the summary."""
        lines = []
        for what, places in self.notes.items():
            count = f" ({len(places):,} rows, first: {places[0]})" if len(places) > 1 else f" ({places[0]})"
            lines.append(what + count)
        return [*lines, self.summary()] if self.skipped else lines

    def summary(self) -> str:
        """One line: how many were left out, the reasons, and where the first one is."""
        reasons = Counter(why for _, why in self.skipped).most_common()
        reasons = ", ".join(f"{count} {why}" for why, count in reasons)
        return f"skipped {len(self.skipped)} of {self.entries} rows: {reasons} (first: {self.skipped[0][0]})"


def decode_text(raw: bytes) -> str:
    """UTF-8 bytes as text, without the byte-order mark that spreadsheets write. Raises EntryError for other bytes."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        remedy = f"Byte 0x{byte:02X} suggests latin-1 or UTF-16: save the file as UTF-8."
        raise EntryError("not UTF-8", remedy) from error
    if "\0" in text:
        raise EntryError("not text", "It has zero bytes: save the file as UTF-8 text.")
    return text


def clean_name(name: Any) -> str:
    """A normalized file name with forward slashes. Raises EntryError for anything that cannot be a file name."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise EntryError("no file name", f"Write a text such as 'images/cat.jpg', not {reprlib.repr(name)}.")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise EntryError("no file name", f"{name!r} has half of a surrogate pair: write it in UTF-8.") from error
    return os.path.normpath(name.strip().replace("\\", "/")).replace("\\", "/")


def clean_caption(caption: Any) -> str:
    """A caption with single spaces. Raises EntryError for anything that cannot be a caption."""
    if not isinstance(caption, str):
        raise EntryError("caption is not text", f"Found {reprlib.repr(caption)}: write the caption as text in quotes.")
    caption = " ".join(caption.split())
    if not caption:
        raise EntryError("empty caption", "Write what the picture shows, or delete the row.")
    if len(caption) > LONGEST_CAPTION:
        remedy = f"It has {len(caption):,} characters, more than {LONGEST_CAPTION:,}: is a quote not closed?"
        raise EntryError("caption too long", remedy)
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise EntryError("not text", "It has half of a surrogate pair: write the character in UTF-8.") from error
    if "\0" in caption:
        raise EntryError("not text", "It has zero bytes: write the caption again.")
    if _is_list_in_disguise(caption):
        remedy = (
            f"Found {reprlib.repr(caption)}: write one caption per row, or a list without the outer quotes in a JSONL."
        )
        raise EntryError("a list written as one caption", remedy)
    return caption


def _is_list_in_disguise(caption: str) -> bool:
    """Whether the text is a list, tuple or dictionary of texts, printed by Python, NumPy or as JSON."""
    if caption[-1] not in "])}":
        return False
    inner = re.sub(r"^array\((.*?)(, dtype=\w+)?\)$", r"\1", caption)
    if inner[:1] + inner[-1:] not in ("[]", "()", "{}"):
        return False
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(inner)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        items = list(value.values()) if isinstance(value, dict) else value
        return isinstance(items, list | tuple | set) and (not items or any(isinstance(item, str) for item in items))
    return False


def clean_numbers(values: Any, unit: str = "in pixels") -> Box:
    """Four finite numbers. Raises EntryError, which names the `unit`."""
    numbers = values if isinstance(values, list | tuple) else ()
    if len(numbers) == 4 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
        try:
            box = tuple(float(v) for v in numbers)
        except OverflowError:  # an integer of more than 308 digits
            box = (math.inf,) * 4
        if all(math.isfinite(v) for v in box):
            return box  # type: ignore[return-value]
    raise EntryError("box is not four numbers", f"Found {reprlib.repr(values)}: write four finite numbers, {unit}.")


def clean_corners(values: Any) -> Box:
    """Corners (x0, y0, x1, y1) in pixels. Raises EntryError."""
    x0, y0, x1, y1 = in_pixels(clean_numbers(values), "xyxy_fraction")
    if x0 >= x1 or y0 >= y1:
        remedy = f"Found {reprlib.repr(values)}: write [x0, y0, x1, y1] with x0 < x1 and y0 < y1, in pixels."
        raise EntryError("box of no size or with swapped corners", remedy)
    return x0, y0, x1, y1


def in_pixels(box: Box, key: str) -> Box:
    """The same box. Raises EntryError if it could be in fractions: then nothing in it is larger than 1.

    `key` is the name for such a box in fractions, such as "xyxy_fraction".
    """
    if any(box) and max(map(abs, box)) <= 1:
        numbers = ", ".join(f"{value:g}" for value in box)
        remedy = f"Found [{numbers}], less than a pixel. If it is in fractions of width and height, call it {key}."
        raise EntryError("box in fractions?", remedy)
    return box


def fractions_of(values: Any, form: str) -> Box:
    """Four fractions of the image as (cx, cy, w, h). Raises EntryError.

    form: what the numbers are: "xyxy" (corners), "xywh" (upper left corner and size) or "cxcywh" (center and size, as
    YOLO writes them). A box may exceed the image by a hundredth, which is rounding and is cut off.
    """
    a, b, c, d = clean_numbers(values, "as fractions of width and height")
    if max(abs(a), abs(b), abs(c), abs(d)) > 1.01:
        raise EntryError(
            "box not in fractions", f"Found {reprlib.repr(values)}: if it is in pixels, call it xyxy or xywh."
        )
    if form == "xywh":
        c, d = a + c, b + d
    elif form == "cxcywh":
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    if a >= c or b >= d:
        raise EntryError(
            "box of no size or with swapped corners", f"Found {reprlib.repr(values)} under {form}_fraction."
        )
    if min(a, b) < -0.01 or max(c, d) > 1.01:
        remedy = f"Found {reprlib.repr(values)} under {form}_fraction: fix or delete the box."
        raise EntryError("box outside its image", remedy)
    a, b, c, d = max(a, 0.0), max(b, 0.0), min(c, 1.0), min(d, 1.0)
    return (a + c) / 2, (b + d) / 2, c - a, d - b


def to_fractions(corners: Box, size: tuple[int, int]) -> Box:
    """Pixel corners as (cx, cy, w, h), fractions of an image of `size` (width, height).

    A box may exceed the image by one pixel, which is rounding and is cut off. Raises EntryError for more: the box
    belongs to another image or another size.
    """
    x0, y0, x1, y1 = corners
    width, height = size
    if x0 < -1 or y0 < -1 or x1 > width + 1 or y1 > height + 1 or x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        found = ", ".join(f"{v:g}" for v in corners)
        remedy = f"Corners ({found}) leave the upright image of {width} x {height} pixels: fix or delete the box."
        raise EntryError("box outside its image", remedy)
    x0, y0, x1, y1 = max(x0, 0) / width, max(y0, 0) / height, min(x1, width) / width, min(y1, height) / height
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


def image_size(file: PictureFile) -> tuple[int, int]:
    """(width, height) of the upright image, from the header of the file. Raises EntryError."""
    with _as_entry_error():
        return pictures.image_size(_content(file))


def read_image(file: PictureFile, smallest: int | None = None) -> Image.Image:
    """The image of a file as upright RGB (`pictures.to_rgb`). Raises EntryError if it cannot be decoded."""
    with _as_entry_error():
        return pictures.to_rgb(_content(file), smallest)


def _content(file: PictureFile) -> Path | bytes:
    try:
        return file.read() if hasattr(file, "read") else file
    except OSError as error:
        reason = f"It was there when the data was opened ({error.strerror or error}): restore it."
        raise EntryError("missing image", reason) from error


@contextmanager
def _as_entry_error() -> Iterator[None]:
    try:
        yield
    except PictureError as error:
        raise EntryError(error.reason, error.remedy) from error
