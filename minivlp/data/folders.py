"""Folders of real images: COCO, Flickr8k/30k, or any folder with a CSV or JSONL file. Images are decoded on demand.

    open_folder("coco:~/coco", split="train", subset=5000)
    open_folder("flickr:~/flickr8k", split="validation")
    open_folder("folder:~/holidays", language="zh", on_error="skip")
    open_folder("wds:~/cc3m")                                           pictures inside tar shards (see `stored`)

A reader for each layout (`layouts`) returns one `Entry` per image; `folder_index` makes rows of them.
docs/your_own_data.md describes the layouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from minivlp.data import samples_dir
from minivlp.data.batch import Region, Sample
from minivlp.data.dataset import Size, height_width
from minivlp.data.folder_index import Row, check_shape, make_rows, split_by_hash
from minivlp.data.layouts import Entry, detect_layout, read_coco, read_flickr, read_table
from minivlp.data.pictures import resized
from minivlp.data.stored import choose, read_samples, root_of, stored_kind
from minivlp.data.threads import DecodingThreads
from minivlp.data.validation import NO_CAPTION, SKIP, DataError, EntryError, NoSuchSplit, Report, read_image

SPLITS = ("train", "validation", "test")


class Folder:
    """A `Dataset` of real images. Captions and boxes are in memory; images are decoded when they are needed.

    Args:
        rows: the images and their annotations.
        rows_skipped: `(where, reason)` of everything that was left out when the folder was opened.
    """

    def __init__(self, rows: Sequence[Row], rows_skipped: Sequence[tuple[str, str]] = ()) -> None:
        self.rows = rows
        self.rows_skipped = list(rows_skipped)
        self._threads = DecodingThreads()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        """The image at its own size, upright, with its annotations. Raises DataError if it cannot be read."""
        known = self.rows[row]
        image = np.array(_decode(known))  # (H, W, 3)
        return Sample(image, known.image_id, list(known.captions), list(known.regions), source=known.source)

    def captions(self, row: int) -> list[str]:
        """The captions of one image."""
        return list(self.rows[row].captions)

    def regions(self, row: int) -> list[Region]:
        """The phrases with boxes of one image."""
        return list(self.rows[row].regions)

    def image_id(self, row: int) -> int:
        """The id of the image in the annotations, or its number in the order of the file."""
        return self.rows[row].image_id

    def pixels(self, rows: Sequence[int], size: Size) -> np.ndarray:
        """Images (B, H, W, 3) uint8, resized without cropping and decoded in threads.

        Raises DataError with the name of the file if one cannot be decoded.
        """
        height, width = height_width(size)
        smallest = 2 * max(height, width)  # a JPEG's own reduction to less than twice the size would blur the result

        def read(row: int) -> np.ndarray:
            return resized(_decode(self.rows[row], smallest), height, width)

        images = list(self._threads.pool.map(read, rows))
        return np.stack(images) if images else np.zeros((0, height, width, 3), np.uint8)  # (B, H, W, 3)

    def __repr__(self) -> str:
        captions = sum(len(row.captions) for row in self.rows)
        regions = sum(len(row.regions) for row in self.rows)
        return f"{type(self).__name__}({len(self):,} images, {captions:,} captions, {regions:,} regions)"


class Photos(Folder):
    """The free photos that come with minivlp, with captions and boxes in English ("en") or Chinese ("zh")."""

    def __init__(self, language: str = "en") -> None:
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
    """Open `coco:DIR`, `flickr:DIR` or `folder:DIR`, or what stores pictures inside larger files: `wds:`, `parquet:` or
    `hf:` (see `minivlp.data.stored`). The layout of a plain path is detected.

    Args:
        spec: what to open.
        split: "train", "validation" or "test", as the annotations say, else 80/10/10 by a hash of the file name. None
            means all images.
        subset: at most this many images, drawn by `seed`.
        language: "en", or another ("zh") if the rows of a CSV or JSONL file have such a column.
        on_error: "raise": the first invalid row raises DataError with the file, the row and a remedy. Image files must
            exist but are not decoded; a broken one raises when it is used.
            "skip": invalid rows are left out and counted in one printed line. Every chosen image is decoded once, so
            that none fails later. (A JPEG is decoded at an eighth of its size: 2.5 ms for 640 x 480 on one core.
            Pillow's faster `verify` does not detect a truncated JPEG.)

    Raises ValueError for an unknown split or a bad subset, and DataError for what is wrong with the data.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)} or None, not {split!r}")
    if subset is not None and subset < 1:
        raise ValueError(f"subset is a positive number of images or None, not {subset}")
    if stored := stored_kind(spec):
        return _open_stored(*stored, split, subset, seed, language, on_error)
    layout, root, file = detect_layout(spec)
    if layout != "folder" and language != "en":
        message = f"{root}: {layout} files do not say their language, and are read as they are. Or write a JSONL."
        raise DataError(message, "Leave out {}.", "language")
    report = Report(root, on_error)
    if layout == "coco":
        entries = read_coco(root, report, split)
    elif layout == "flickr":
        entries = read_flickr(root, file, report)
    else:
        entries = read_table(file, report, language)
    split_by_hash(entries)
    chosen = [entry for entry in entries if split is None or entry.split == split]
    if entries and not chosen:
        found = ", ".join(name for name in SPLITS if any(entry.split == name for entry in entries))
        raise NoSuchSplit(root, split, found)
    rows = make_rows(chosen, root, report, subset, seed)
    _note_missing_captions(entries, report)
    for line in report.lines():
        print(line)
    if not rows:
        raise DataError(f"{file or root}: no valid row is left. Are there rows, and are their images in {root}?")
    return Folder(rows, report.skipped)


def _open_stored(
    kind: str, place: str, split: str | None, subset: int | None, seed: int, language: str, on_error: str
) -> Folder:
    """`open_folder` for pictures inside shards and tables."""
    report = Report(root_of(kind, place), on_error)
    rows = choose(read_samples(kind, place, report, language), split, subset, seed, report)
    _note_missing_captions(rows, report)
    for line in report.lines():
        print(line)
    if not len(rows):
        raise DataError(f"{kind}:{place}: no valid sample is left.")
    return Folder(rows, report.skipped)


def _note_missing_captions(entries: Iterable[Entry | Row], report: Report) -> None:
    """Note captions such as "nan", which tables hold where a caption is missing. They are kept: one may be meant."""
    for entry in entries:
        for caption in entry.captions:
            if caption.casefold() in NO_CAPTION:
                report.note(f"caption {caption!r} is kept as text: is a caption missing there?", entry.source)


def _decode(row: Row, smallest: int | None = None) -> Image.Image:
    """The upright RGB image of a row. Raises DataError."""
    try:
        image = read_image(row.file, smallest)
        if row.size:
            check_shape(row.size, image.size)
        return image
    except EntryError as error:
        message = f"{row.file} ({row.source}): {error.reason}. {error.remedy}"
        raise DataError(message, "Or open the folder with {}, which leaves such images out.", SKIP) from error
