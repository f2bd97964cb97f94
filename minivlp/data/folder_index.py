"""From the entries of an annotation file to the rows of a `Folder`, the same for all layouts.

It assigns splits, draws the subset, finds the image files, and converts boxes from pixels to fractions.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from minivlp.data.batch import Region
from minivlp.data.layouts import Entry
from minivlp.data.layouts.published import MISSING, is_leftover, without_picture_folders
from minivlp.data.threads import THREADS
from minivlp.data.validation import EntryError, Report, StoredFile, image_size, read_image, to_fractions


@dataclass(frozen=True)
class Row:
    """One image of a folder: its file, its captions and regions, and the place in the annotations (`source`).

    `size` is the (width, height) in pixels that its boxes refer to, or None without boxes.
    """

    file: Path | StoredFile
    captions: tuple[str, ...]
    regions: tuple[Region, ...]
    image_id: int
    source: str
    size: tuple[int, int] | None = None


def split_by_hash(entries: Sequence[Entry]) -> None:
    """Assign splits 80/10/10 by a hash of the file name, unless the annotations say the splits.

    The split of an image is the same on every machine and does not depend on the other images.
    """
    if any(entry.split for entry in entries):
        return
    for entry in entries:
        entry.split = split_of(os.path.basename(entry.name))


def split_of(name: str) -> str:
    """The split of a picture of this name, where the data do not say one."""
    tenth = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def make_rows(entries: Sequence[Entry], root: Path, report: Report, subset: int | None, seed: int) -> list[Row]:
    """Rows of valid entries in the order of the file: all, or `subset` of them drawn by `seed`."""
    order = list(range(len(entries)))
    if subset is not None:
        order = np.random.default_rng(seed).permutation(len(entries)).tolist()
    wanted = len(entries) if subset is None else min(subset, len(entries))
    finder = _Finder(root, report)
    owners: dict[str, Entry] = {}
    valid: dict[int, Row] = {}

    def check(entry: Entry, path: Path) -> tuple[int, int] | EntryError | None:
        try:
            return _check_image(entry, path, decode=report.skip)
        except EntryError as error:
            return EntryError(error.reason, f"{path}: {error.remedy}")  # the source alone does not name the file

    with ThreadPoolExecutor(THREADS) as pool:
        while order and len(valid) < wanted:
            count = min(256, wanted - len(valid))
            candidates, order = order[:count], order[count:]
            files: dict[int, Path] = {}
            for index in candidates:
                with report.entry(entries[index].source, counted=False):
                    files[index] = _own_file(entries[index], finder, owners)
            sizes = pool.map(check, [entries[i] for i in files], files.values())
            for (index, file), size in zip(files.items(), sizes, strict=True):
                entry = entries[index]
                with report.entry(entry.source, counted=False):
                    if isinstance(size, EntryError):
                        raise size
                    regions = _regions(entry, size, report)
                    valid[index] = Row(file, tuple(entry.captions), regions, entry.image_id, entry.source, size)
    return [valid[index] for index in sorted(valid)]


def check_shape(annotated: tuple[int, int], found: tuple[int, int]) -> None:
    """Raise an EntryError if the aspect ratio of an image is not that of its annotations.

    Boxes stay valid when an image is resized, because they are fractions, but not when it is cropped or rotated.
    """
    if abs(annotated[0] * found[1] - annotated[1] * found[0]) > max(*annotated, *found):  # more than rounding
        remedy = "Was it cropped, or turned by its EXIF tag? Boxes refer to the upright picture."
        sizes = f"{found[0]} x {found[1]} pixels, but its boxes are written for {annotated[0]} x {annotated[1]}"
        raise EntryError("image of another shape", f"It has {sizes}. {remedy}")


class _Finder:
    """Finds images by name: the given path below the folder, else anywhere up to three levels down."""

    def __init__(self, root: Path, report: Report) -> None:
        self.root, self.report = root, report
        self.paths: dict[str, list[str]] | None = None  # base name -> paths; filled when first needed
        self.alike: dict[str, list[str]] | None = None  # what names have in common -> paths; for suggestions
        self.siblings: list[str] | None = None

    def find(self, name: str) -> Path:
        """The path of the image. Raises an EntryError if there is none, or more than one."""
        direct = os.path.join(self.root, name)
        if os.path.isfile(direct):
            return Path(direct)
        if self.paths is None:
            self.paths = {}
            self._walk(str(self.root), depth=3)
        ending = "/" + name
        found = [p for p in self.paths.get(os.path.basename(name), ()) if p.replace("\\", "/").endswith(ending)]
        found = list({os.path.realpath(path): path for path in found}.values())
        if len(found) > 1:
            return self._one_of_copies(found)
        if not found:
            if flaw := MISSING.get(os.path.basename(name)):
                raise EntryError(flaw, "It is left out.", harmless=True)
            problem = "a folder, not a file" if os.path.isdir(direct) else "not a file in or below the folder"
            remedy = self._suggestion(name) or "Put it there, fix the name or delete the row."
            raise EntryError("missing image", f"{name!r} is {problem}. {remedy}")
        return Path(found[0])

    def _one_of_copies(self, found: list[str]) -> Path:
        """The upper one of copies that a published archive holds. Raises an EntryError for any others."""
        paths = sorted(map(Path, found), key=lambda path: len(path.parts))
        if len({without_picture_folders(path, self.root) for path in paths}) > 1:
            remedy = f"{found[0]} and {found[1]}: write the folder into the name, or remove one."
            raise EntryError("image in two places", remedy)
        above, below = (os.path.relpath(path.parent, self.root) for path in paths[:2])
        self.report.note(f"pictures are in {above} and again in {below}: the upper ones are read", paths[0].name)
        return paths[0]

    def _suggestion(self, name: str) -> str:
        """The file that a wrong name probably means, and what is different about it; "" if there is none."""
        if self.alike is None:
            self.alike = {}
            for paths in self.paths.values():
                for path in paths:
                    self.alike.setdefault(_alike(path), []).append(path)
        near = self.alike.get(_alike(name), ())
        if not near:
            beside = next((folder for folder in self._beside() if os.path.isfile(os.path.join(folder, name))), None)
            return f"It lies beside, in {beside}: name the folder above both." if beside else ""
        others = [os.path.relpath(path, self.root) for path in near[:2]]
        difference = f" ({_difference(name, near[0])})" if len(near) == 1 else ""
        return f"Did you mean {' or '.join(map(repr, others))}{difference}? Names must be the same, letter by letter."

    def _beside(self) -> list[str]:
        """The folders beside this one, where captions and pictures were unpacked apart; none if there are too many."""
        if self.siblings is None:
            try:
                items = list(os.scandir(self.root.absolute().parent))
            except OSError:
                items = []
            self.siblings = [item.path for item in items if item.is_dir()] if len(items) <= 100 else []
        return self.siblings

    def _walk(self, folder: str, depth: int) -> None:
        try:
            items = list(os.scandir(folder))
        except PermissionError:  # a folder that cannot be read is treated as empty
            return
        for item in items:
            if is_leftover(Path(item.name)):
                continue
            if item.is_file():
                self.paths.setdefault(item.name, []).append(item.path)
            elif depth and item.is_dir() and not item.name.startswith("."):
                self._walk(item.path, depth - 1)


def _base_name(name: str) -> str:
    """The name without folders. Archives packed on Windows may leave backslashes in the names of files."""
    return name.replace("\\", "/").rpartition("/")[2]


def _alike(name: str) -> str:
    """What two names have in common if they probably mean the same picture."""
    name = unicodedata.normalize("NFC", unquote(_base_name(name))).casefold().strip()
    name = re.sub(r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?)$", "", name)
    return re.sub(r"^coco_(train|val|test)\d{4}_", "", name)


def _difference(name: str, path: str) -> str:
    """In what the name differs from the file's."""
    wanted, found = _base_name(name), _base_name(path)
    if wanted == found:
        backslash = "\\" in os.path.basename(path)
        return "a backslash in the file's name: rename the file" if backslash else "another folder"
    if unquote(wanted) == found or wanted == unquote(found):
        return "%-escapes as in a web address"
    one, two = unicodedata.normalize("NFC", wanted), unicodedata.normalize("NFC", found)
    if one == two:
        return "the same letters in another Unicode form, NFC or NFD: accents may be letters of their own"
    if one.casefold() == two.casefold():
        return "upper and lower case"
    if os.path.splitext(one)[0] == os.path.splitext(two)[0]:
        return "another extension"
    return "a similar name"


def _own_file(entry: Entry, finder: _Finder, owners: dict[str, Entry]) -> Path:
    """The file of the entry. No other entry may have it: an image with two ids would be its own negative."""
    path = finder.find(entry.name)
    owner = owners.setdefault(os.path.realpath(path), entry)
    if owner is not entry:
        remedy = f"{owner.source} names {owner.name!r} and this {entry.name!r}: give the image one name and one id."
        raise EntryError("image listed twice", remedy)
    return path


def _check_image(entry: Entry, path: Path, decode: bool) -> tuple[int, int] | None:
    """The (width, height) that the entry's boxes refer to, or None without boxes. With `decode`, decode the image."""
    if decode:
        read_image(path, smallest=1)
    if not entry.boxes:
        return None
    if decode or entry.size is None:
        found = image_size(path)
        check_shape(entry.size or found, found)
        return entry.size or found
    return entry.size


def _regions(entry: Entry, size: tuple[int, int] | None, report: Report) -> tuple[Region, ...]:
    regions = []
    for marked in entry.boxes:
        with report.entry(marked.where, counted=False):
            box = marked.box if marked.fractions else to_fractions(marked.box, size)
            regions.append(Region(box, marked.phrase, marked.kind))
    return tuple(regions)
