"""Validation of input files: errors that name the file, the row and a remedy, or invalid entries that are skipped.

Readers check one entry at a time inside `with report.entry(where)` and raise an `EntryError`. The `Report` decides for
all readers whether to stop (`on_error="raise"`) or to leave the entry out (`on_error="skip"`).
"""

from __future__ import annotations

import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from minivlp.data.batch import Box

LONGEST_CAPTION = 5_000  # characters; the longest human captions we know (localized narratives) are below 3,000
MOST_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte once decoded as RGB

# The transpose that brings an image with this EXIF orientation upright (1 is upright already).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DataError(ValueError):
    """The user's data is invalid. The message names the file, the row and a remedy."""


class EntryError(Exception):
    """One entry is invalid. `reason` is a short phrase that can be counted, `remedy` a sentence.

    A `harmless` error never stops the reader: the entry is left out and counted even with `on_error="raise"`.
    """

    def __init__(self, reason: str, remedy: str, harmless: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.remedy, self.harmless = reason, remedy, harmless


class Report:
    """Counts the entries of a folder. `skipped` has the `(where, reason)` of those that were left out."""

    def __init__(self, root: Path, on_error: str) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}")
        self.root, self.skip = root, on_error == "skip"
        self.entries = 0
        self.skipped: list[tuple[str, str]] = []

    @contextmanager
    def entry(self, where: str, counted: bool = True) -> Iterator[None]:
        """Check one entry: an `EntryError` raised inside becomes a `DataError`, or the entry is skipped."""
        self.entries += counted
        try:
            yield
        except EntryError as error:
            if not (self.skip or error.harmless):
                hint = "Or open the folder with on_error='skip' to leave such rows out."
                raise DataError(f"{self.root / where}: {error.reason}. {error.remedy} {hint}") from error
            self.skipped.append((where, error.reason))

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
    return caption


def clean_numbers(values: Any) -> Box:
    """Four finite numbers. Raises EntryError."""
    numbers = values if isinstance(values, list | tuple) else ()
    if len(numbers) == 4 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
        try:
            box = tuple(float(v) for v in numbers)
        except OverflowError:  # an integer of more than 308 digits
            box = (math.inf,) * 4
        if all(math.isfinite(v) for v in box):
            return box  # type: ignore[return-value]
    raise EntryError("box is not four numbers", f"Found {reprlib.repr(values)}: write four finite numbers, in pixels.")


def clean_corners(values: Any) -> Box:
    """Corners (x0, y0, x1, y1) in pixels. Raises EntryError."""
    x0, y0, x1, y1 = clean_numbers(values)
    if x0 >= x1 or y0 >= y1:
        remedy = f"Found {reprlib.repr(values)}: write [x0, y0, x1, y1] with x0 < x1 and y0 < y1, in pixels."
        raise EntryError("box of no size or with swapped corners", remedy)
    return x0, y0, x1, y1


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


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from the header of the file. Raises EntryError."""
    try:
        with _opened(path) as image:
            # Pillow reports the upright size of a TIFF, and the stored size of any other format.
            transposed = image.format != "TIFF" and _orientation(image) >= 5
            return image.size[::-1] if transposed else image.size
    except EntryError:
        raise
    except Exception as error:  # decoders raise anything, from struct.error to SyntaxError
        raise _broken(error) from error


def read_image(path: Path, smallest: int | None = None) -> Image.Image:
    """The image, upright and RGB, with 8 bits per channel and a white background in place of transparency.

    With `smallest` a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as both sides keep that many pixels.
    This is several times faster and still reads every byte. Raises EntryError for an image that cannot be decoded.
    """
    try:
        with _opened(path) as image:
            if smallest:
                image.draft(None, (smallest, smallest))
            image.load()
            orientation = _orientation(image)
            rgb = _to_rgb(image)
            return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
    except EntryError:
        raise
    except Exception as error:  # as in image_size
        raise _broken(error) from error


def _opened(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except Image.DecompressionBombError as error:
        remedy = f"It claims more than {2 * MOST_PIXELS:,} pixels: make it smaller."
        raise EntryError("image too large", remedy) from error
    if image.size[0] * image.size[1] > MOST_PIXELS:
        image.close()
        raise EntryError("image too large", f"It claims {image.size[0]} x {image.size[1]} pixels: make it smaller.")
    return image


def _broken(error: Exception) -> EntryError:
    if isinstance(error, UnidentifiedImageError):
        return EntryError("not an image", "Pillow does not know the format: replace the file.")
    if isinstance(error, FileNotFoundError):
        return EntryError("missing image", "It existed when the folder was opened: restore it.")
    return EntryError("broken image", f"It cannot be decoded ({error}): download or save the file again.")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # the pixels can be valid although the EXIF block is not; viewers ignore such a block
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise EntryError("image of floats", "The values of black and white are unknown: save it with 8 bits.")
    if image.mode.startswith("I"):  # Pillow would clip 16-bit gray values at 255: nearly everything would be white
        gray = np.asarray(image)
        if gray.min() < 0 or gray.max() > 65_535:
            raise EntryError("image of 32 bits", "The values of black and white are unknown: save it with 8 bits.")
        image = Image.fromarray((gray.astype(np.uint16) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
