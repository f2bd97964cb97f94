"""One reading of pictures: whatever a picture is given as, an upright RGB image with 8 bits per channel.

Folders, shards, widgets, figures and `minivlp.pretrained.load(...)(pictures)` read pictures by `to_rgb` alone, so the
same picture has the same pixels everywhere.

Axes: H height, W width, B pictures.
"""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

ROUNDING = 1e-4  # how far floats may lie outside 0..1
MOST_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte once decoded as RGB
CHANNELS = (1, 3, 4)  # gray, RGB, RGBA
SHAPES = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or with the channels first"
VALUES = "uint8 (0..255), uint16 (0..65535) or floats (0..1)"
FILE_NEEDS = "save it with 8 bits"
ARRAY_NEEDS = f"a picture has {VALUES}"

Picture = Image.Image | str | Path | bytes | np.ndarray | torch.Tensor

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


class PictureError(ValueError):
    """A picture cannot be read. `reason` is a short phrase that can be counted, `remedy` a sentence."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason, self.remedy = reason, remedy


def to_rgb(picture: Picture, smallest: int | None = None) -> Image.Image:
    """The picture as a new RGB image: upright, 8 bits per channel, white in place of transparency.

    Args:
        picture: a PIL image of any mode; a path; the bytes of an image file; or an array or tensor, gray (H, W) or with
            1 (gray), 3 (RGB) or 4 (RGBA) channels, last as in NumPy or first as in torch. Values are uint8 (0..255),
            uint16 (0..65535) or floats (0..1).
        smallest: a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size, as long as both sides keep that many
            pixels. This is several times faster and still reads every byte.

    Raises PictureError, a ValueError, for what cannot be decoded, and for shapes and values that could mean two things
    (3 x 3 x 3, floats above 1 or below 0, other integers, booleans). Raises TypeError for an object that is no picture.
    """
    if isinstance(picture, Image.Image):
        return _read(picture, None)
    if isinstance(picture, np.ndarray | torch.Tensor):
        return _from_array(picture)
    if isinstance(picture, str | Path | bytes):
        with _opened(picture) as image:
            return _read(image, smallest)
    raise TypeError(f"a picture is a PIL image, a path, a NumPy array or a tensor, not {_named(picture)}")


def to_rgbs(pictures: Any) -> list[Image.Image]:
    """One picture, several in a list or tuple, or an array (B, ...) of them, as RGB images. Errors name the picture."""
    stacked = isinstance(pictures, np.ndarray | torch.Tensor) and pictures.ndim == 4
    if not stacked and not isinstance(pictures, list | tuple):
        return [to_rgb(pictures)]
    if not len(pictures):
        raise PictureError("no pictures", "Give at least one.")
    found = []
    for number, picture in enumerate(pictures):
        try:
            found.append(to_rgb(picture))
        except PictureError as error:
            raise PictureError(f"picture {number}: {error.reason}", error.remedy) from error
        except TypeError as error:
            raise TypeError(f"picture {number}: {error}") from None
    return found


def resized(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The pixels (height, width, 3) of an RGB image, squashed to that size. Nothing is cropped."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0))


def image_size(picture: str | Path | bytes) -> tuple[int, int]:
    """(width, height) of the upright image, from the header of the file. Raises PictureError."""
    with _opened(picture) as image:
        try:
            # Pillow reports the upright size of a TIFF, and the stored size of any other format.
            transposed = image.format != "TIFF" and _orientation(image) >= 5
            return image.size[::-1] if transposed else image.size
        except Exception as error:  # decoders raise anything, from struct.error to SyntaxError
            raise _broken(error) from error


def _opened(picture: str | Path | bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
    except Image.DecompressionBombError as error:
        remedy = f"It claims more than {2 * MOST_PIXELS:,} pixels: make it smaller."
        raise PictureError("image too large", remedy) from error
    except Exception as error:
        raise _broken(error, picture) from error
    if image.size[0] * image.size[1] > MOST_PIXELS:
        size = image.size
        image.close()
        raise PictureError("image too large", f"It claims {size[0]} x {size[1]} pixels: make it smaller.")
    return image


def _read(image: Image.Image, smallest: int | None) -> Image.Image:
    """The upright RGB copy of a PIL image."""
    try:
        if smallest:
            image.draft(None, (smallest, smallest))
        image.load()
        orientation = _orientation(image)
        rgb = _on_white(_eight_bits(image)).convert("RGB")
        rgb = rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
    except PictureError:
        raise
    except Exception as error:  # as in image_size
        raise _broken(error) from error
    rgb.info = {}  # else the EXIF orientation would be applied again when this image is read
    return rgb


def _broken(error: Exception, picture: Any = None) -> PictureError:
    """What is wrong with the picture. Raises the error again where the machine lacks something: nothing to skip."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return PictureError("not an image", "Pillow does not know the format: replace the file.")
    if isinstance(error, FileNotFoundError):
        if str(picture).startswith(("http:", "https:")):
            return PictureError("an address, not a file", f"Download {picture} first.")
        return PictureError("missing image", f"There is no file {picture}: restore it or fix the path.")
    if isinstance(error, OSError) and error.strerror:  # a folder, or no permission
        return PictureError("image cannot be read", f"{picture}: {error.strerror}.")
    return PictureError("broken image", f"It cannot be decoded ({error}): download or save the file again.")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # the pixels can be valid although the EXIF block is not; viewers ignore such a block
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Images of 16-bit integers and of floats as 8-bit gray. Pillow would clip them at 255: nearly all would be white.

    One gray value may be declared transparent, which is kept: such an image becomes gray with alpha.
    """
    if image.mode == "F":
        return Image.fromarray(_bytes_of_floats(np.asarray(image), FILE_NEEDS))
    if not image.mode.startswith("I"):
        return image
    gray = np.asarray(image)
    low, high = (int(gray.min()), int(gray.max())) if gray.size else (0, 0)
    if low < 0 or high > 65_535:
        raise PictureError("image of 32 bits", f"The values of black and white are unknown: {FILE_NEEDS}.")
    if image.mode == "I" and image.format != "PNG" and 0 < high <= 255:  # `convert("I")` leaves 0..255
        raise PictureError("8 or 16 bits?", f"An image of mode I has no value above {high}: convert it to mode L.")
    found = Image.fromarray((gray.astype(np.uint16) >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        found.putalpha(Image.fromarray(np.where(gray == transparent, 0, 255).astype(np.uint8)))
    return found


def _on_white(image: Image.Image) -> Image.Image:
    """The image without transparency: what lies behind it is white."""
    if not image.has_transparency_data:
        return image
    if image.mode == "La":  # Pillow converts premultiplied gray to LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """The RGB image of an array or tensor of one picture."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # NumPy has no bfloat16
    values = _bytes_of_values(_channels_last(array))
    return _on_white(Image.fromarray(values)).convert("RGB")


def _channels_last(array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 3) or (H, W, 4), whichever axis has the channels. Raises PictureError."""
    shape = tuple(array.shape)
    if array.ndim == 4:
        raise PictureError(f"an array {shape}", f"It holds several pictures; one picture is {SHAPES}.")
    if array.ndim not in (2, 3) or 0 in shape:
        raise PictureError(f"an array {shape}", f"A picture is {SHAPES}, with at least one pixel.")
    if array.ndim == 3:
        last, first = shape[2] in CHANNELS, shape[0] in CHANNELS
        if last and first:
            problem = "Its channels may be the first or the last axis. Pass a PIL image, or make the picture larger."
            raise PictureError(f"an array {shape}", problem)
        if not last and not first:
            raise PictureError(f"an array {shape}", f"No axis has 1, 3 or 4 channels: a picture is {SHAPES}.")
        array = array if last else np.moveaxis(array, 0, 2)
        array = array[..., 0] if array.shape[2] == 1 else array
    if array.shape[0] * array.shape[1] > MOST_PIXELS:
        raise PictureError("image too large", f"It has {array.shape[1]} x {array.shape[0]} pixels: make it smaller.")
    return np.ascontiguousarray(array)


def _bytes_of_values(array: np.ndarray) -> np.ndarray:
    """The same array as uint8. Raises PictureError where black and white are not known."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if (kind, size) == ("u", 1):
        return array
    if kind == "f":
        return _bytes_of_floats(array, ARRAY_NEEDS)
    if (kind, size) == ("u", 2):
        high = int(array.max())
        if 0 < high <= 255:
            problem = f"The largest value of a uint16 array is {high}. With 0..255, use .astype(np.uint8)."
            raise PictureError("8 or 16 bits?", problem)
        return (array >> 8).astype(np.uint8)
    if kind == "b":
        raise PictureError("an array of booleans", "For black and white, multiply by 255 and use .astype(np.uint8).")
    raise PictureError(f"an array of {array.dtype}", f"{ARRAY_NEEDS}: with 0..255, use .astype(np.uint8).")


def _bytes_of_floats(values: np.ndarray, needs: str) -> np.ndarray:
    """Floats of 0..1 as uint8, to the nearest; a half is rounded down. Raises PictureError for other floats."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise PictureError("floats that are not finite", f"There are NaN or infinite values; {needs}.")
    if low < -ROUNDING or high > 1 + ROUNDING:
        hint = "normalized pixels?" if low < 0 else "0..255? Then use .astype(np.uint8)."
        raise PictureError("floats outside 0..1", f"They go from {low:g} to {high:g} ({hint}); {needs}.")
    return np.ceil(values.astype(np.float64) * 255 - 0.5).clip(0, 255).astype(np.uint8)


def _named(value: Any) -> str:
    """The type of an object, with its module where that is not Python's own."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
