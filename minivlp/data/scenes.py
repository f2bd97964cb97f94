"""The scene world as a dataset: any number of small pictures, drawn from a seed, whose content is known exactly.

`scene_sampling` says what scenes look like; `scene` says what is known about each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from minivlp.data.batch import Region, Sample
from minivlp.data.dataset import Size, height_width
from minivlp.data.rng import RandomSource
from minivlp.data.scene import LANGUAGES, Scene
from minivlp.data.scene_sampling import draw_scene
from minivlp.data.sprites import paste, plain_background, textured_background

SPLITS = ("train", "validation", "test", "composition", "all")
_VERSION = 1  # part of a cache file's name: increase it when the same seed gives other pictures
_ID_STEP = 100_000_000  # keeps the image ids of two splits apart


class Scenes:
    """A `Dataset` of scenes. Row r depends on split, seed and r only, not on the number of rows.

    Args:
        count: number of scenes.
        split: `train`, `validation` and `test` have no set of objects (nouns, colors, counts) in common, hence no
            caption in any wording. `composition` has scenes with at least one combination that the other three never
            show: eight colored shapes (`grammar.HELD_OUT_PAIRS`) or one in twenty of the pairs of objects. `all` is
            drawn from everything, for zero-shot classification over all nouns; never train on it.
        size: side of the pictures in pixels, at least 32.
        objects: smallest and largest number of objects in a scene, 1 to 3.
        language: of captions, phrases and questions, "en" or "zh".
        cache_dir: a folder for a file with all the pictures, so that the next run need not draw them.
        memory: bytes of pictures to keep. Every picture is drawn when it is first needed and kept until the limit is
            reached; the default holds 24,000 pictures of 64 x 64 or 6,000 of 128 x 128 pixels. The others are drawn
            again each time (about 1 ms), or read from the file if there is a `cache_dir`.

    Raises ValueError for arguments outside these bounds and IndexError for a row that does not exist.
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
        memory: int = 300_000_000,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
        if count < 1 or size < 32 or not 1 <= objects[0] <= objects[1] <= 3:
            raise ValueError(
                f"count {count}, size {size}, objects {objects}: needs count >= 1, size >= 32, 1-3 objects"
            )
        if language not in LANGUAGES:
            raise ValueError(f"no captions in language {language!r}: choose {' or '.join(LANGUAGES)}")
        self.split, self.seed, self.size, self.objects, self.language = split, seed, size, tuple(objects), language
        self._scenes: list[Scene | None] = [None] * count
        bytes_each = 3 * size * size
        self._kept = np.empty((min(count, memory // bytes_each), size, size, 3), np.uint8)
        self._slots = np.full(count, -1, np.int32)  # row -> index into _kept, -1 if it is not there
        self._used = 0  # slots of _kept that are filled
        self._file: Path | None = None  # pictures on disk, where not all of them are kept
        if cache_dir is not None:
            self._use_cache_file(Path(cache_dir))

    def __len__(self) -> int:
        return len(self._scenes)

    def __repr__(self) -> str:
        return f"{len(self):,} {self.split} scenes of {self.size} x {self.size} pixels, seed {self.seed}"

    def __getitem__(self, row: int) -> Sample:
        row = self._row(row)
        scene = self.scene(row)
        return Sample(
            image=self.pixels([row])[0],
            image_id=self.image_id(row),
            captions=scene.captions(self.language),
            regions=scene.regions(self.language),
            questions=scene.questions(self.language),
            truth=scene,
            source=f"scenes {self.split}, seed {self.seed}, row {row}",
        )

    def scene(self, row: int) -> Scene:
        """The true content of the picture."""
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
        """(question, answer) pairs."""
        return self.scene(row).questions(self.language)

    def statements(self, row: int, rng: RandomSource) -> list[tuple[str, str]]:
        """Three (statement, label) pairs: entailed, neutral, contradicted."""
        return self.scene(row).statements(rng, self.language)

    def negative_caption(self, row: int, rng: RandomSource, wording: int) -> str:
        """A false caption: one fact changed, in the wording of caption number `wording`."""
        return self.scene(row).negative_caption(rng, wording, self.language)

    def image_id(self, row: int) -> int:
        """The row, plus an offset that differs between the splits."""
        return self._row(row) + _ID_STEP * SPLITS.index(self.split)

    def pixels(self, rows: Sequence[int] | np.ndarray, size: Size | None = None) -> np.ndarray:
        """Pictures (B, H, W, 3) uint8, drawn at the dataset's own size and resized if `size` is another."""
        rows = np.array([self._row(int(row)) for row in rows], dtype=np.int64)
        pictures = self._pictures(rows)
        height, width = height_width(self.size if size is None else size)
        if (height, width) == (self.size, self.size):
            return pictures
        resized = np.empty((len(rows), height, width, 3), np.uint8)
        for i, picture in enumerate(pictures):
            resized[i] = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        return resized

    def _row(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"no row {row} in a dataset of {len(self)} scenes")
        return row % len(self)

    def _pictures(self, rows: np.ndarray) -> np.ndarray:
        """A copy of these pictures (B, side, side, 3)."""
        if self._file is not None:
            # Mapped anew each time: the pages that were read do not stay in memory.
            return np.load(self._file, mmap_mode="r")[rows]
        if (self._slots[rows] >= 0).all():
            return self._kept[self._slots[rows]]
        return np.stack([self._picture(int(row)) for row in rows])

    def _picture(self, row: int) -> np.ndarray:
        if self._slots[row] >= 0:
            return self._kept[self._slots[row]]
        picture = render(self.scene(row))
        if self._used < len(self._kept):
            self._kept[self._used], self._slots[row] = picture, self._used
            self._used += 1
        return picture

    def _use_cache_file(self, folder: Path) -> None:
        """Write the file if it does not exist; load it if it fits into the memory, else read from it when needed."""
        low, high = self.objects
        name = f"scenes-v{_VERSION}-{self.split}-{self.seed}-{len(self)}x{self.size}-{low}to{high}.npy"
        shape = (len(self), self.size, self.size, 3)
        file = folder / name
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}.tmp")  # a run that is killed must not leave half a file
            with open(unfinished, "wb") as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for row in range(len(self)):
                    stream.write(self._picture(row).tobytes())
            os.replace(unfinished, file)
        pictures = np.load(file, mmap_mode="r")
        if pictures.shape != shape or pictures.dtype != np.uint8:
            raise ValueError(f"{file} does not contain the pictures its name says: delete it, and it is written again")
        if len(self._kept) == len(self):
            self._kept, self._slots, self._used = np.load(file), np.arange(len(self)), len(self)
        else:
            self._file, self._kept = file, self._kept[:0]


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (side, side, 3) uint8."""
    background = scene.background
    if background.texture:
        picture = textured_background(scene.side, background.texture, background.crop, background.colors[0])
    else:
        picture = plain_background(scene.side, *background.colors)
    for one in scene.objects:
        for box in one.boxes:
            paste(picture, one.noun, one.color, box)
    return picture
