"""Real pictures: COCO, Flickr8k/30k, or any folder with a CSV or JSONL, read as they lie and decoded when asked.

    open_folder("coco:~/coco", split="train", subset=5000)
    open_folder("flickr:~/flickr8k", split="validation")
    open_folder("folder:~/holidays", language="zh", on_error="skip")

Whatever the layout, a reader (layouts/) yields one `Entry` per image; what follows is the same for all: the split,
the subset, finding the file, turning pixel boxes into fractions. What each layout looks like: docs/your_own_data.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from minivlp.data.batch import Region, Sample
from minivlp.data.damage import DataError, Fault, Report, image_size, read_image, to_fractions
from minivlp.data.layouts import Entry, read_coco, read_flickr, read_table, recognise

SPLITS = ("train", "validation", "test")
_WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Row:
    """One image of a folder: where it lies, what is said of it, and where that was written (`source`).

    `size` is the (width, height) that its boxes were written for, or None where there are none.
    """

    file: Path
    captions: tuple[str, ...]
    regions: tuple[Region, ...]
    image_id: int
    source: str
    size: tuple[int, int] | None = None


class Folder:
    """A dataset of real pictures: an index in memory; images are decoded when asked for, never kept.

    `rows_skipped` lists `(where, why)` of everything that was left out when the folder was opened.
    """

    def __init__(self, rows: Sequence[Row], rows_skipped: Sequence[tuple[str, str]] = ()) -> None:
        self.rows = tuple(rows)
        self.rows_skipped = list(rows_skipped)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        """The picture at its own size, upright, with all that is said of it. Raises DataError if it cannot be read."""
        known = self.rows[row]
        image = np.array(_decode(known))  # (H, W, 3)
        return Sample(image, known.image_id, list(known.captions), list(known.regions), source=known.source)

    def captions(self, row: int) -> list[str]:
        return list(self.rows[row].captions)

    def regions(self, row: int) -> list[Region]:
        return list(self.rows[row].regions)

    def image_id(self, row: int) -> int:
        return self.rows[row].image_id

    def pixels(self, rows: Sequence[int], size: int) -> np.ndarray:
        """uint8 pixels (B, size, size, 3): each picture squashed to a square, never cropped, decoded in threads.

        Raises DataError naming the file if one cannot be decoded.
        """

        def square(row: int) -> np.ndarray:
            image = _decode(self.rows[row], smallest=2 * size)  # twice: a JPEG's own halving must not blur the result
            return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))

        with ThreadPoolExecutor(_WORKERS) as pool:
            squares = list(pool.map(square, rows))
        return np.stack(squares) if squares else np.zeros((0, size, size, 3), np.uint8)  # (B, size, size, 3)

    def __repr__(self) -> str:
        captions = sum(len(row.captions) for row in self.rows)
        regions = sum(len(row.regions) for row in self.rows)
        return f"{type(self).__name__}({len(self):,} images, {captions:,} captions, {regions:,} regions)"


class Photos(Folder):
    """The open photos that come with minivlp, with captions and boxes in English ("en") or Chinese ("zh")."""

    def __init__(self, language: str = "en") -> None:
        from minivlp.data import samples_dir

        opened = open_folder(f"folder:{samples_dir() / 'photos'}", language=language)
        super().__init__(opened.rows, opened.rows_skipped)


def open_folder(
    spec: str | Path,
    split: str | None = None,
    subset: int | None = None,
    seed: int = 0,
    language: str = "en",
    on_error: str = "raise",
) -> Folder:
    """Open `coco:DIR`, `flickr:DIR` or `folder:DIR`; with a bare path the layout is recognised.

    split     "train", "validation" or "test" as the files say it, else 80/10/10 by a hash of the file name; None: all
    subset    at most so many images, drawn by `seed`
    language  "en", or another ("zh") where the rows of a CSV or JSONL have such a column
    on_error  "raise": the first bad row raises DataError with file, row and remedy. Images are looked for but not
              decoded: a broken one raises when it is used.
              "skip": bad rows are left out and counted in one printed line, and every chosen image is decoded once
              (a JPEG at an eighth of its size: 2.5 ms for 640 x 480 on one core; Pillow's quicker `verify` does not
              notice a truncated JPEG at all), so that nothing breaks later.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)} or None, not {split!r}")
    if subset is not None and subset < 1:
        raise ValueError(f"subset is a positive number of images or None, not {subset}")
    layout, root, file = recognise(spec)
    if layout != "folder" and language != "en":
        raise DataError(f"{root}: {layout} files do not say their language. Leave `language` out, or write a JSONL.")
    report = Report(root, on_error)
    if layout == "coco":
        entries = read_coco(root, report, split)
    elif layout == "flickr":
        entries = read_flickr(root, file, report)
    else:
        entries = read_table(file, report, language)
    _split_by_hash(entries)
    chosen = [entry for entry in entries if split is None or entry.split == split]
    if entries and not chosen:
        there = ", ".join(name for name in SPLITS if any(entry.split == name for entry in entries))
        raise DataError(f"{root}: no image in split {split!r}. There are: {there or 'none'}. Or take all: split=None.")
    rows = _settle(chosen, root, report, subset, seed)
    if report.left_out:
        print(report.summary())
    if not rows:
        raise DataError(f"{file or root}: nothing to read is left. Are there rows, and do their images lie in {root}?")
    return Folder(rows, report.left_out)


# ---- what all layouts share --------------------------------------------------------------------------------------


class _Finder:
    """Finds images by name: below the folder as written, else anywhere up to three levels down."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.places: dict[str, list[str]] | None = None  # base name -> paths; filled when first needed

    def find(self, name: str) -> Path:
        direct = os.path.join(self.root, name)
        if os.path.isfile(direct):
            return Path(direct)
        if self.places is None:
            self.places = {}
            self._walk(str(self.root), depth=3)
        ending = "/" + name
        found = [p for p in self.places.get(os.path.basename(name), ()) if p.replace("\\", "/").endswith(ending)]
        found = list({os.path.realpath(path): path for path in found}.values())
        if len(found) > 1:
            remedy = f"{found[0]} and {found[1]}: write the folder into the name, or remove one."
            raise Fault("image in two places", remedy)
        if not found:
            kind = "a folder, not a file" if os.path.isdir(direct) else "not a file in or below the folder"
            raise Fault("missing image", f"{name!r} is {kind}: put it there, mend the name or delete the row.")
        return Path(found[0])

    def _walk(self, folder: str, depth: int) -> None:
        try:
            items = list(os.scandir(folder))
        except PermissionError:  # what may not be read is not there
            return
        for item in items:
            if item.is_file():
                self.places.setdefault(item.name, []).append(item.path)
            elif depth and item.is_dir() and not item.name.startswith("."):
                self._walk(item.path, depth - 1)


def _split_by_hash(entries: list[Entry]) -> None:
    """80/10/10 by the file's own name: the same on every machine, whatever else lies in the folder."""
    if any(entry.split for entry in entries):
        return
    for entry in entries:
        digest = hashlib.sha256(os.path.basename(entry.name).encode()).digest()
        tenth = int.from_bytes(digest[:4], "big") % 10
        entry.split = "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def _settle(entries: list[Entry], root: Path, report: Report, subset: int | None, seed: int) -> list[Row]:
    """Rows of the first `subset` good entries, in the order of the files. Images are looked at in threads."""
    order = list(range(len(entries)))
    if subset is not None:
        order = np.random.default_rng(seed).permutation(len(entries)).tolist()
    wanted = len(entries) if subset is None else min(subset, len(entries))
    finder = _Finder(root)
    owners: dict[str, Entry] = {}
    good: dict[int, Row] = {}

    def look(entry: Entry, path: Path | None) -> tuple[int, int] | Fault | None:
        try:
            return path and _look(entry, path, decode=report.skip)
        except Fault as fault:
            return Fault(fault.why, f"{path}: {fault.remedy}")  # the row alone would not tell which picture

    with ThreadPoolExecutor(_WORKERS) as pool:
        while order and len(good) < wanted:
            count = min(256, wanted - len(good))
            now, order = order[:count], order[count:]
            files: dict[int, Path] = {}
            for index in now:
                with report.entry(entries[index].source, counted=False):
                    files[index] = _own_file(entries[index], finder, owners)
            now = list(files)
            for index, seen in zip(now, pool.map(look, [entries[i] for i in now], files.values()), strict=True):
                entry = entries[index]
                with report.entry(entry.source, counted=False):
                    if isinstance(seen, Fault):
                        raise seen
                    regions = _regions(entry, seen, report)
                    good[index] = Row(files[index], tuple(entry.captions), regions, entry.image_id, entry.source, seen)
    return [good[index] for index in sorted(good)]


def _own_file(entry: Entry, finder: _Finder, owners: dict[str, Entry]) -> Path:
    """The entry's file, which no other entry may share: one image under two ids would be its own false negative."""
    path = finder.find(entry.name)
    owner = owners.setdefault(os.path.realpath(path), entry)
    if owner is not entry:
        remedy = f"{owner.source} names {owner.name!r} and this {entry.name!r}: give the image one name and one id."
        raise Fault("image listed twice", remedy)
    return path


def _look(entry: Entry, path: Path, decode: bool) -> tuple[int, int] | None:
    """(width, height) that the entry's boxes are written for, or None without boxes; decodes the image if asked."""
    if decode:
        read_image(path, smallest=1)
    if not entry.boxes:
        return None
    if decode or entry.size is None:
        found = image_size(path)
        _same_shape(entry.size or found, found)
        return entry.size or found
    return entry.size


def _same_shape(written: tuple[int, int], found: tuple[int, int]) -> None:
    """Boxes survive resizing (they become fractions), but not a picture that was cropped or turned."""
    if abs(written[0] * found[1] - written[1] * found[0]) > max(*written, *found):  # more than a pixel of rounding
        remedy = "Was it cropped, or turned by its EXIF tag? Boxes refer to the upright picture."
        sizes = f"{found[0]} x {found[1]} pixels, but its boxes are written for {written[0]} x {written[1]}"
        raise Fault("image of another shape", f"It has {sizes}. {remedy}")


def _regions(entry: Entry, size: tuple[int, int] | None, report: Report) -> tuple[Region, ...]:
    regions = []
    for corners, phrase, kind, where in entry.boxes:
        with report.entry(where, counted=False):
            regions.append(Region(to_fractions(corners, size), phrase, kind))
    return tuple(regions)


def _decode(row: Row, smallest: int | None = None) -> Image.Image:
    try:
        image = read_image(row.file, smallest)
        if row.size:
            _same_shape(row.size, image.size)
        return image
    except Fault as fault:
        hint = "Or open the folder with on_error='skip', which leaves such images out."
        raise DataError(f"{row.file} ({row.source}): {fault.why}. {fault.remedy} {hint}") from fault
