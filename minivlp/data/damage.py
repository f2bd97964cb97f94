"""What bad input gets: an error that names the file, the row and the remedy, or a place in the count of the left out.

Readers check one entry at a time inside `with report.entry(where)` and raise a `Fault`; the `Report` decides, once for
all readers, whether that stops everything (`on_error="raise"`) or leaves the entry out (`on_error="skip"`).
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

LONGEST_CAPTION = 5_000  # characters; the longest human captions we know (localised narratives) stay below 3,000
MOST_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte once decoded as RGB

# What each EXIF orientation asks for to bring the picture upright (1 is upright already).
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
    """Something is wrong with the reader's data. The message names the file, the row and the remedy."""


class Fault(Exception):
    """What is wrong with one entry: `why` in a few countable words, `remedy` in a sentence.

    A `harmless` fault never stops the opening: the entry is left out and counted even under `on_error="raise"`.
    """

    def __init__(self, why: str, remedy: str, harmless: bool = False) -> None:
        super().__init__(why)
        self.why, self.remedy, self.harmless = why, remedy, harmless


class Report:
    """Counts the entries of a folder and remembers `(where, why)` of those that were left out."""

    def __init__(self, root: Path, on_error: str) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}")
        self.root, self.skip = root, on_error == "skip"
        self.entries = 0
        self.left_out: list[tuple[str, str]] = []

    @contextmanager
    def entry(self, where: str, counted: bool = True) -> Iterator[None]:
        """Check one entry: a `Fault` raised inside becomes a `DataError`, or one more entry left out."""
        self.entries += counted
        try:
            yield
        except Fault as fault:
            if not (self.skip or fault.harmless):
                hint = "Or open the folder with on_error='skip' to leave such rows out."
                raise DataError(f"{self.root / where}: {fault.why}. {fault.remedy} {hint}") from fault
            self.left_out.append((where, fault.why))

    def summary(self) -> str:
        """One line: how many were left out, why, and where the first one stands."""
        whys = Counter(why for _, why in self.left_out).most_common()
        reasons = ", ".join(f"{count} {why}" for why, count in whys)
        return f"skipped {len(self.left_out)} of {self.entries} rows: {reasons} (first: {self.left_out[0][0]})"


def decode_text(raw: bytes) -> str:
    """UTF-8 bytes as text, without the byte-order mark that spreadsheets write. Raises a Fault for another encoding."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise Fault("not UTF-8", f"Byte 0x{byte:02X} suggests latin-1 or UTF-16: save the file as UTF-8.") from error
    if "\0" in text:
        raise Fault("not text", "It holds zero bytes: save the file as UTF-8 text.")
    return text


def clean_name(name: Any) -> str:
    """A file name with forward slashes and no detours. Raises a Fault for what cannot name a file."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise Fault("no file name", f"An image's name is a text such as 'images/cat.jpg', not {reprlib.repr(name)}.")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise Fault("no file name", f"{name!r} holds half of a surrogate pair: write it in UTF-8.") from error
    return os.path.normpath(name.strip().replace("\\", "/")).replace("\\", "/")


def clean_caption(caption: Any) -> str:
    """A caption with single spaces. Raises a Fault for what is not a sentence."""
    if not isinstance(caption, str):
        raise Fault("caption is not text", f"Found {reprlib.repr(caption)}: write the caption as text in quotes.")
    caption = " ".join(caption.split())
    if not caption:
        raise Fault("empty caption", "Write what the picture shows, or delete the row.")
    if len(caption) > LONGEST_CAPTION:
        remedy = f"It has {len(caption):,} characters, more than {LONGEST_CAPTION:,}: is a quote not closed?"
        raise Fault("caption too long", remedy)
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise Fault("not text", "It holds half of a surrogate pair: write the character itself in UTF-8.") from error
    if "\0" in caption:
        raise Fault("not text", "It holds zero bytes: write the caption again.")
    return caption


def clean_numbers(values: Any) -> Box:
    """Four finite numbers, or a Fault."""
    numbers = values if isinstance(values, list | tuple) else ()
    if len(numbers) == 4 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
        try:
            box = tuple(float(v) for v in numbers)
        except OverflowError:  # a whole number of more than 308 digits
            box = (math.inf,) * 4
        if all(math.isfinite(v) for v in box):
            return box  # type: ignore[return-value]
    raise Fault("box is not four numbers", f"Found {reprlib.repr(values)}: write four finite numbers, in pixels.")


def clean_corners(values: Any) -> Box:
    """Corners (x0, y0, x1, y1) in pixels, or a Fault."""
    x0, y0, x1, y1 = clean_numbers(values)
    if x0 >= x1 or y0 >= y1:
        remedy = f"Found {reprlib.repr(values)}: write [x0, y0, x1, y1] with x0 < x1 and y0 < y1, in pixels."
        raise Fault("box of no size or with swapped corners", remedy)
    return x0, y0, x1, y1


def to_fractions(corners: Box, size: tuple[int, int]) -> Box:
    """Pixel corners as (cx, cy, w, h), fractions of an image of `size` (width, height).

    One pixel of overshoot is rounding and is cut off; more is a Fault: the box is of another picture or another size.
    """
    x0, y0, x1, y1 = corners
    width, height = size
    if x0 < -1 or y0 < -1 or x1 > width + 1 or y1 > height + 1 or x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        found = ", ".join(f"{v:g}" for v in corners)
        remedy = f"Corners ({found}) leave the upright image of {width} x {height} pixels: mend or delete the box."
        raise Fault("box outside its image", remedy)
    x0, y0, x1, y1 = max(x0, 0) / width, max(y0, 0) / height, min(x1, width) / width, min(y1, height) / height
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from the file's header alone."""
    try:
        with _opened(path) as image:
            # Pillow already reports the upright size of a TIFF, and only of a TIFF.
            turned = image.format != "TIFF" and _orientation(image) >= 5
            return image.size[::-1] if turned else image.size
    except Fault:
        raise
    except Exception as error:  # decoders raise whatever they like, from struct.error to SyntaxError
        raise _broken(error) from error


def read_image(path: Path, smallest: int | None = None) -> Image.Image:
    """The picture, upright and RGB; what is transparent turns white, 16 bits become 8.

    With `smallest` a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep that many pixels:
    several times faster, and still every byte is read. Raises a Fault for what cannot be decoded.
    """
    try:
        with _opened(path) as image:
            if smallest:
                image.draft(None, (smallest, smallest))
            image.load()
            orientation = _orientation(image)
            rgb = _to_rgb(image)
            return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
    except Fault:
        raise
    except Exception as error:  # as above
        raise _broken(error) from error


def _opened(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise Fault("image too large", f"It claims more than {2 * MOST_PIXELS:,} pixels: make it smaller.") from error
    if image.size[0] * image.size[1] > MOST_PIXELS:
        image.close()
        raise Fault("image too large", f"It claims {image.size[0]} x {image.size[1]} pixels: make it smaller.")
    return image


def _broken(error: Exception) -> Fault:
    if isinstance(error, UnidentifiedImageError):
        return Fault("not an image", "No picture format that Pillow knows: replace the file.")
    if isinstance(error, FileNotFoundError):
        return Fault("missing image", "It was there when the folder was opened: bring it back.")
    return Fault("broken image", f"It cannot be decoded ({error}): fetch or save the file again.")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block says nothing against the pixels; viewers show such pictures as they are
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise Fault("image of floats", "Nobody can tell where its black and white are: save it with 8 bits.")
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey at 255: nearly everything would turn white
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65_535:
            raise Fault("image of 32 bits", "Nobody can tell where its black and white are: save it with 8 bits.")
        image = Image.fromarray((grey.astype(np.uint16) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
