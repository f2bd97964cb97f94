"""Small pictures with known attention and boxes, so that the browser tests know what each click must show."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"red": "#d62728", "blue": "#1f5fd6", "green": "#1d9a4b", "yellow": "#f2b705"}
SHAPES = ("square", "disc", "triangle")


def picture(parts, size: int = 64) -> np.ndarray:
    """Shapes on a light ground: parts are (color, shape, (cx, cy, w, h)). Returns uint8 (size, size, 3)."""
    image = Image.new("RGB", (4 * size, 4 * size), "#e9e4d8")
    draw = ImageDraw.Draw(image)
    for color, shape, (cx, cy, w, h) in parts:
        x0, y0, x1, y1 = (4 * size * v for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        if shape == "square":
            draw.rectangle((x0, y0, x1, y1), fill=COLORS[color])
        elif shape == "disc":
            draw.ellipse((x0, y0, x1, y1), fill=COLORS[color])
        else:
            draw.polygon(((x0 + x1) / 2, y0, x1, y1, x0, y1), fill=COLORS[color])
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


RED, BLUE = (0.3125, 0.3125, 0.3, 0.3), (0.6875, 0.6875, 0.36, 0.36)  # around the center of a patch
IMAGE = picture([("red", "disc", RED), ("blue", "square", BLUE)])
WORDS = ["a", "red", "disc", "above", "a", "blue", "square"]


def attention(layers: int = 2, heads: int = 3, side: int = 8) -> np.ndarray:
    """(layers, heads, words, patches): in the last layer words attend to what they name, in the first anywhere."""
    rng = np.random.default_rng(0)
    weights = 0.2 + 0.2 * rng.random((layers, heads, len(WORDS), side * side), dtype=np.float32)
    y, x = (np.divmod(np.arange(side * side), side) + np.array([[0.5], [0.5]])) / side
    for words, (cx, cy, w, h) in (((1, 2), RED), ((5, 6), BLUE)):
        for word in words:
            weights[-1, :, word] += 6 * np.exp(-(((x - cx) / w) ** 2 + ((y - cy) / h) ** 2) * 4)
    weights[-1, 1, 1, side - 1] += 40  # head 2 of the last layer attends to the top right corner instead
    return weights / weights.sum(-1, keepdims=True)


def gallery(count: int = 24):
    """Images, two captions each, and a similarity that is right but for the first caption (its image comes second)."""
    rng = np.random.default_rng(1)
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    pairs = [(kinds[i % 12], kinds[(5 * i + 7 + i // 12) % 12]) for i in range(count)]
    images = [picture([(*a, (0.27, 0.5, 0.4, 0.4)), (*b, (0.75, 0.5, 0.36, 0.36))]) for a, b in pairs]
    captions = [
        [f"a {a[0]} {a[1]} left of a {b[0]} {b[1]}", f"a {b[0]} {b[1]} right of a {a[0]} {a[1]}"] for a, b in pairs
    ]
    similarity = rng.random((count, 2 * count)) * 0.3
    similarity[np.repeat(np.arange(count), 2), np.arange(2 * count)] += 0.5
    similarity[3, 0] = 0.99
    return images, captions, similarity.astype(np.float32)


def ground(phrase: str):
    """A model that knows colors."""
    if "red" in phrase:
        return RED, 0.97
    if "blue" in phrase:
        return BLUE, 0.91
    return (0.5, 0.5, 0.9, 0.9), 0.08


def judged():
    """Four pictures, old and new captions with scores and truth: at .5 two old and one new one are judged wrongly."""
    images = [picture([(color, "disc", (0.5, 0.5, 0.5, 0.5))]) for color in COLORS]
    texts = ["a red disc", "a green disc", "IMG_7.jpg", "a yellow disc"]
    web = [
        {"caption": text, "score": score, "truth": truth}
        for text, score, truth in zip(texts, (0.9, 0.6, 0.1, 0.4), ("clean", "swapped", "junk", "clean"), strict=True)
    ]
    new = [
        {"caption": f"a {color} {shape}", "score": score, "truth": truth}
        for color, shape, score, truth in zip(
            COLORS, ("disc", "disc", "disc", "square"), (0.7, 0.8, 0.95, 0.55), ["true"] * 3 + ["false"], strict=True
        )
    ]
    return images, web, new
