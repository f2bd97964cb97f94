"""Drawing: emoji sprites, colored shapes, and the backgrounds behind them. Resized sprites and textures are cached."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from minivlp.data import samples_dir

# The colors also differ in lightness, so that color-blind readers can tell them apart.
RGB = {
    "red": (206, 30, 46),
    "green": (22, 150, 90),
    "blue": (18, 72, 190),
    "yellow": (250, 222, 40),
    "purple": (176, 92, 206),
    "orange": (246, 138, 22),
    "black": (28, 28, 34),
    "white": (252, 252, 252),
}
TEXTURES = ("grass", "gravel", "hubble")  # photos without any object of the scene world
_CANVAS = 288  # pixels: shapes are drawn large and then reduced, which smooths their edges


@lru_cache(maxsize=256)
def sprite_size(noun: str, color: str | None, side: int) -> tuple[int, int]:
    """Width and height in pixels of a sprite whose longer side is `side`."""
    width, height = _source(noun, color).size
    longer = max(width, height)
    return max(2, (2 * width * side + longer) // (2 * longer)), max(2, (2 * height * side + longer) // (2 * longer))


@lru_cache(maxsize=8192)
def sprite(noun: str, color: str | None, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Color times opacity (h, w, 3), and the transparency (h, w, 1) in 0..255; both uint16."""
    image = _source(noun, color).resize(sprite_size(noun, color, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).astype(np.uint16)  # (h, w, 4)
    return pixels[..., :3] * pixels[..., 3:], 255 - pixels[..., 3:]


def paste(picture: np.ndarray, noun: str, color: str | None, box: tuple[int, int, int, int]) -> None:
    """Draw one sprite into `picture` (H, W, 3) uint8, filling `box` (corners in pixels)."""
    x0, y0, x1, y1 = box
    premultiplied, transparency = sprite(noun, color, max(x1 - x0, y1 - y0))
    below = picture[y0:y1, x0:x1]
    picture[y0:y1, x0:x1] = (premultiplied + transparency * below + 127) // 255


def plain_background(size: int, top: tuple[int, int, int], bottom: tuple[int, int, int]) -> np.ndarray:
    """A vertical gradient from one color to another, (size, size, 3) uint8."""
    down = np.linspace(0, 1, size, dtype=np.float32)[:, None]  # (size, 1)
    rows = np.float32(top) * (1 - down) + np.float32(bottom) * down  # (size, 3)
    return np.repeat(rows.astype(np.uint8)[:, None], size, axis=1)


def textured_background(size: int, texture: str, crop: tuple[int, int, int], tint: tuple[int, int, int]) -> np.ndarray:
    """A crop of a photo, mixed with `tint` so that sprites stand out, (size, size, 3) uint8.

    crop: x and y of the crop, from 0 (left, top) to 999 (right, bottom), and the width of the photo in quarters of
    `size`.
    """
    photo = _texture(texture, size * crop[2] // 4)
    x, y = ((photo.shape[0] - size) * part // 999 for part in crop[:2])
    return ((photo[y : y + size, x : x + size] * 3 + np.uint16(tint) * 5) // 8).astype(np.uint8)


@lru_cache(maxsize=64)
def _texture(name: str, side: int) -> np.ndarray:
    """The largest square of a photo, (side, side, 3) uint16."""
    photo = Image.open(samples_dir() / "photos" / f"{name}.jpg").convert("RGB")
    least = min(photo.size)
    return np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC, (0, 0, least, least))).astype(np.uint16)


@lru_cache(maxsize=256)
def _source(noun: str, color: str | None) -> Image.Image:
    """The sprite at full size, cropped tightly so that its box is exact. Raises FileNotFoundError."""
    if color is None:
        file = samples_dir() / "sprites" / f"{noun}.png"
        if not file.is_file():
            raise FileNotFoundError(f"no sprite {file}: check out data_samples again, or run make_samples.py")
        return Image.open(file).convert("RGBA")
    mask = Image.new("L", (_CANVAS, _CANVAS), 0)
    _draw_shape(ImageDraw.Draw(mask), noun, _CANVAS - 1)
    image = Image.new("RGBA", mask.size, RGB[color])
    image.putalpha(mask)
    return image.crop(mask.getbbox())


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, side: int) -> None:
    """Draw one of SHAPES in white so that it fills a square of this side."""
    half, third = side / 2, side / 3
    if shape == "circle":
        draw.ellipse((0, 0, side, side), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, side, side), fill=255)
    elif shape == "triangle":
        draw.polygon([(half, 0), (side, 0.87 * side), (0, 0.87 * side)], fill=255)
    elif shape == "diamond":
        draw.polygon([(half, 0), (0.86 * side, half), (half, side), (0.14 * side, half)], fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, side, side), outline=255, width=round(side / 4.6))
    elif shape == "cross":
        draw.rectangle((third, 0, 2 * third, side), fill=255)
        draw.rectangle((0, third, side, 2 * third), fill=255)
    elif shape == "star":
        turns = [(math.pi * i / 5, half if i % 2 == 0 else 0.44 * half) for i in range(10)]
        draw.polygon([(half + far * math.sin(turn), half - far * math.cos(turn)) for turn, far in turns], fill=255)
    elif shape == "heart":
        steps = [2 * math.pi * i / 120 for i in range(120)]
        x = [16 * math.sin(t) ** 3 for t in steps]
        y = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in steps]
        draw.polygon([(half + a / 34 * side, 0.42 * side - b / 34 * side) for a, b in zip(x, y, strict=True)], fill=255)
