"""The scene world: endless little pictures whose truth is known, drawn from a seed.

A scene holds one to three things: emoji objects and coloured shapes (two in five), each 25 to 42 % of the picture's
side, never overlapping. About a quarter of the things are called small or large, and one scene in eight with one or
two things holds a group ("two bees"). See `scene` for all that is true of one scene.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from minivlp.data.batch import Region, Sample
from minivlp.data.grammar import COLORS, OBJECTS, SHAPES, SIZES, Mention, split_of
from minivlp.data.scene import Corners, Draw, Ground, Scene, Thing, pick, relation
from minivlp.data.sprites import TEXTURES, paste, plain_ground, sprite_size, textured_ground

SPLITS = ("train", "validation", "test", "composition", "all")
_VERSION = 1  # part of a cache file's name: raise it when the same seed gives other pictures
_ID_STEP = 100_000_000  # image ids of two splits never meet


class Scenes:
    """A dataset of scenes (docs/architecture.md says what a dataset is). Row r depends on seed, split and r alone.

    Args:
        split: `train`, `validation` and `test` share no set of things (nouns, colours, counts), hence no caption in
            any wording. `composition` holds scenes with at least one combination that the three others never show:
            eight coloured shapes (`grammar.HELD_OUT_PAIRS`: each colour and each shape misses one partner) and one in
            twenty of the pairs of objects. `all` is drawn from everything, for looking and for zero-shot
            classification over all nouns; never train on it.
        size: side of the pictures in pixels, at least 32. objects: fewest and most things in a scene, 1 to 3.
        language: of captions, phrases and questions, "en" or "zh".
        cache_dir: a folder that keeps the drawn pictures as one uint8 file, so that the next run starts at once.

    Pictures are drawn when they are first asked for, and kept. Raises ValueError for arguments outside these bounds
    and IndexError for a row that is not there.
    """

    def __init__(
        self,
        count: int,
        split: str = "train",
        seed: int = 0,
        size: int = 64,
        objects: tuple[int, int] = (1, 3),
        language: str = "en",
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
        if count < 1 or size < 32 or not 1 <= objects[0] <= objects[1] <= 3:
            raise ValueError(
                f"count {count}, size {size}, objects {objects}: needs count >= 1, size >= 32, 1-3 objects"
            )
        if language not in ("en", "zh"):
            raise ValueError(f"no captions in language {language!r}: choose en or zh")
        self.split, self.seed, self.size, self.objects, self.language = split, seed, size, tuple(objects), language
        self._scenes: list[Scene | None] = [None] * count
        self._pictures = np.empty((count, size, size, 3), np.uint8)
        self._drawn = np.zeros(count, bool)
        if cache_dir is not None:
            self._through_file(Path(cache_dir))

    def __len__(self) -> int:
        return len(self._scenes)

    def __repr__(self) -> str:
        return f"{len(self):,} {self.split} scenes of {self.size} x {self.size} pixels, seed {self.seed}"

    def __getitem__(self, row: int) -> Sample:
        row = self._row(row)
        scene = self.scene(row)
        return Sample(
            image=self._picture(row).copy(),
            image_id=self.image_id(row),
            captions=scene.captions(self.language),
            regions=scene.regions(self.language),
            questions=scene.questions(self.language),
            truth=scene,
            source=f"scenes {self.split}, seed {self.seed}, row {row}",
        )

    def scene(self, row: int) -> Scene:
        """The truth of this row."""
        row = self._row(row)
        if self._scenes[row] is None:
            rng = Random(f"minivlp scenes {self.split} {self.seed} {row}")
            self._scenes[row] = draw_scene(rng, self.split, self.size, self.objects)
        return self._scenes[row]

    def captions(self, row: int) -> list[str]:
        """True captions; the first is the short one."""
        return self.scene(row).captions(self.language)

    def regions(self, row: int) -> list[Region]:
        """Phrases with their boxes."""
        return self.scene(row).regions(self.language)

    def questions(self, row: int) -> list[tuple[str, str]]:
        """Questions with their one right answer."""
        return self.scene(row).questions(self.language)

    def statements(self, row: int, rng: Draw) -> list[tuple[str, str]]:
        """Three statements with their label: entailed, neutral, contradicted."""
        return self.scene(row).statements(rng, self.language)

    def wrong_caption(self, row: int, rng: Draw, wording: int) -> str:
        """A false caption, one fact changed, told like the caption of this number."""
        return self.scene(row).wrong_caption(rng, wording, self.language)

    def image_id(self, row: int) -> int:
        """The row, plus a step that keeps the splits apart."""
        return self._row(row) + _ID_STEP * SPLITS.index(self.split)

    def pixels(self, rows: np.ndarray | list[int], size: int | None = None) -> np.ndarray:
        """Pictures (B, size, size, 3) uint8; drawn in the dataset's own size, resized if another is asked for."""
        rows = [self._row(int(row)) for row in rows]
        for row in rows:
            self._picture(row)
        pictures = self._pictures[rows]
        if size in (None, self.size):
            return pictures
        small = [Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]
        return np.stack([np.asarray(image) for image in small])

    def _row(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"no row {row} in a dataset of {len(self)} scenes")
        return row % len(self)

    def _picture(self, row: int) -> np.ndarray:
        if not self._drawn[row]:
            self._pictures[row] = render(self.scene(row))
            self._drawn[row] = True
        return self._pictures[row]

    def _through_file(self, folder: Path) -> None:
        """Reads all pictures from the cache, or draws and writes them: beside first, so that a kill leaves no half."""
        few, many = self.objects
        name = f"scenes-v{_VERSION}-{self.split}-{self.seed}-{len(self)}x{self.size}-{few}to{many}.npy"
        file = folder / name
        if file.is_file():
            kept = np.load(file)
            if kept.shape != self._pictures.shape or kept.dtype != np.uint8:
                raise ValueError(f"{file} does not hold the pictures its name promises: delete it, it will be remade")
            self._pictures = kept
        else:
            for row in range(len(self)):
                self._picture(row)
            folder.mkdir(parents=True, exist_ok=True)
            beside = file.with_suffix(f".{os.getpid()}.tmp")
            with open(beside, "wb") as stream:
                np.save(stream, self._pictures)
            os.replace(beside, file)
        self._drawn[:] = True


def render(scene: Scene) -> np.ndarray:
    """Draws the scene: (side, side, 3) uint8."""
    ground = scene.ground
    if ground.texture:
        picture = textured_ground(scene.side, ground.texture, ground.crop, ground.colors[0])
    else:
        picture = plain_ground(scene.side, *ground.colors)
    for thing in scene.things:
        for box in thing.boxes:
            paste(picture, thing.noun, thing.color, box)
    return picture


def draw_scene(rng: Random, split: str = "all", size: int = 64, objects: tuple[int, int] = (1, 3)) -> Scene:
    """A scene of this split by chance."""
    while True:
        said = _draw_mentions(rng, pick(rng, range(objects[0], objects[1] + 1)))
        if split != "all" and split_of(said) != split:
            continue
        things = _place(rng, said, size)
        if things is not None:
            return Scene(things, _draw_ground(rng), size)


def _draw_mentions(rng: Random, many: int) -> list[Mention]:
    """What the scene shows: different things, now and then two shapes that differ by colour only, or a group."""
    said: list[Mention] = []
    while len(said) < many:
        shapes = [thing.noun for thing in said if thing.color]
        if rng.random() >= 0.4:
            thing = Mention(pick(rng, OBJECTS))
        elif shapes and rng.random() < 0.3:
            thing = Mention(shapes[0], pick(rng, COLORS))  # its colour is what tells it from the other
        else:
            thing = Mention(pick(rng, SHAPES), pick(rng, COLORS))
        if thing not in said:
            said.append(thing)
    if many < 3 and rng.random() < 0.12:
        i = pick(rng, range(many))
        said[i] = replace(said[i], count=pick(rng, (2, 3)))
    # The word comes first and its size after it: so small and large are said equally often.
    return [replace(t, size=pick(rng, SIZES)) if t.count == 1 and rng.random() < 0.25 else t for t in said]


def _place(rng: Random, said: list[Mention], size: int) -> tuple[Thing, ...] | None:
    """Finds a place for each, or None if chance was against it too often."""
    for _ in range(20):
        placed: list[Thing] = []
        for thing in said:
            for _ in range(40):
                there = _put(rng, thing, size)
                if not any(_touch(a, b) for a in there.boxes for other in placed for b in other.boxes) and (
                    not placed or relation(placed[-1], there)
                ):
                    placed.append(there)
                    break
            else:
                break
        if len(placed) == len(said):
            return tuple(placed)
    return None


def _put(rng: Random, said: Mention, size: int) -> Thing:
    """One thing somewhere: a group stands in a row or a column and is smaller, so that others find room."""
    least, most = (25 * size + 99) // 100, (42 if said.count == 1 else 30) * size // 100
    if said.size == "small":
        most = 29 * size // 100
    elif said.size == "large":
        least = (38 * size + 99) // 100
    side = pick(rng, range(least, most + 1))
    width, height = sprite_size(said.noun, said.color, side)
    gap = min(1 + pick(rng, range(size // 16)), (size - said.count * side) // said.count)  # three of 30 % still fit
    step_x, step_y = (width + gap, 0) if rng.random() < 0.5 else (0, height + gap)
    room_x, room_y = size - width - (said.count - 1) * step_x, size - height - (said.count - 1) * step_y
    x, y = pick(rng, range(room_x + 1)), pick(rng, range(room_y + 1))
    boxes: list[Corners] = []
    for i in range(said.count):
        left, top = x + i * step_x, y + i * step_y
        boxes.append((left, top, left + width, top + height))
    return Thing(said.noun, said.color, said.size, said.count, tuple(boxes))


def _touch(a: Corners, b: Corners) -> bool:
    return not (a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1])


def _draw_ground(rng: Random) -> Ground:
    """Muted colours of middle lightness: black, white and every colour of ours stand out."""
    grey = pick(rng, range(150, 206))
    top = tuple(grey + pick(rng, range(-16, 17)) for _ in range(3))
    bottom = tuple(part + pick(rng, range(-18, 19)) for part in top)
    if rng.random() < 0.5:
        return Ground((top, bottom))
    crop = (pick(rng, range(1000)), pick(rng, range(1000)), pick(rng, range(4, 11)))
    return Ground((top, bottom), pick(rng, TEXTURES), crop)
