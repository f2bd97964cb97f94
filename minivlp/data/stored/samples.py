"""The samples of shards and tables: a compact list, from which rows are made when they are asked for."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from minivlp.data.folder_index import Row, split_of
from minivlp.data.layouts.columns import CAPTION, in_language
from minivlp.data.layouts.entries import SPLIT_NAMES
from minivlp.data.threads import THREADS
from minivlp.data.validation import EntryError, NoSuchSplit, Report, StoredFile, clean_caption, read_image

SPLITS = ("train", "validation", "test")


class Strings(Sequence[str]):
    """Texts in one block of memory, without the 50 bytes that every Python string takes beside its letters."""

    def __init__(self) -> None:
        self._block, self._ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        """Add one text."""
        self._block += text.encode()
        self._ends.append(len(self._block))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._block[self._ends[index] : self._ends[index + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class Samples:
    """Pictures and their captions in the order of the files. Subclasses say where the bytes of each picture are.

    Two samples have the same `image_ids` if and only if their files have the same SHA-256, where the data tell it.
    """

    def __init__(self) -> None:
        self.names, self.splits, self.image_ids = Strings(), [], array("q")
        self._captions = Strings()  # of each sample its captions, with line breaks between them
        self._of_hash: dict[str, int] = {}

    def add(self, name: str, captions: Sequence[str], split: str | None, sha256: str | None) -> None:
        """Add one sample. Its captions are clean, so they have no line breaks."""
        number = len(self)
        self.names.append(name)
        self._captions.append("\n".join(captions))
        self.splits.append(split)
        self.image_ids.append(self._of_hash.setdefault(sha256, number) if sha256 else number)

    def complete(self) -> None:
        """Forget what only `add` needs: the hashes take more memory than all the rest."""
        self._of_hash.clear()

    def __len__(self) -> int:
        return len(self.names)

    def captions(self, number: int) -> tuple[str, ...]:
        """The captions of a sample."""
        return tuple(self._captions[number].split("\n"))

    def where(self, number: int) -> str:
        """File and row or key, for messages."""
        raise NotImplementedError

    def file(self, number: int) -> StoredFile:
        """The picture's file."""
        raise NotImplementedError


class StoredRows(Sequence[Row]):
    """The chosen samples as rows of a `Folder`. A row is made when it is asked for."""

    def __init__(self, samples: Samples, chosen: Sequence[int]) -> None:
        self.samples, self.chosen = samples, np.asarray(chosen, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Row:
        number, samples = int(self.chosen[index]), self.samples
        where = samples.where(number)
        return Row(samples.file(number), samples.captions(number), (), samples.image_ids[number], where)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def choose(samples: Samples, split: str | None, subset: int | None, seed: int, report: Report) -> StoredRows:
    """The rows of a split, or `subset` of them drawn by `seed`, in the order of the files.

    Where the data say no split, it follows from a hash of the name. If the report skips errors, every chosen picture is
    decoded once and broken ones are left out. Raises NoSuchSplit.
    """
    splits = samples.splits if any(samples.splits) else [split_of(name) for name in samples.names]
    order = np.array([i for i, found in enumerate(splits) if split is None or found == split], dtype=np.int64)
    if len(samples) and not len(order):
        raise NoSuchSplit(report.root, split, ", ".join(name for name in SPLITS if name in splits))
    wanted = len(order) if subset is None else min(subset, len(order))
    if subset is not None:
        order = np.random.default_rng(seed).permutation(order)
    return StoredRows(samples, np.sort(_sound(samples, order, wanted, report) if report.skip else order[:wanted]))


def _sound(samples: Samples, order: np.ndarray, wanted: int, report: Report) -> list[int]:
    """The first `wanted` samples whose pictures can be decoded."""

    def problem(number: int) -> EntryError | None:
        try:
            read_image(samples.file(number), smallest=1)
        except EntryError as error:
            return error
        return None

    sound: list[int] = []
    start = 0
    with ThreadPoolExecutor(THREADS) as pool:
        while start < len(order) and len(sound) < wanted:
            some = order[start : start + min(256, wanted - len(sound))].tolist()
            start += len(some)
            for number, error in zip(some, pool.map(problem, some), strict=True):
                with report.entry(samples.where(number), counted=False):
                    if error:
                        raise error
                    sound.append(number)
    return sound


def caption_names(language: str) -> list[str]:
    """What fields with captions are called."""
    return in_language(CAPTION, language)


def clean_captions(value: Any) -> list[str]:
    """The distinct captions of a field: a text, or a list of texts. Raises EntryError."""
    found = value if isinstance(value, list | tuple) else [value]
    if not found:
        raise EntryError("empty caption", "The list is empty: leave the sample out.")
    return list(dict.fromkeys(clean_caption(caption) for caption in found))


def known_split(value: Any) -> str | None:
    """The split that a field `split` names; None without one. Raises EntryError."""
    if value is None or value == "":
        return None
    if str(value).lower() not in SPLIT_NAMES:
        raise EntryError("unknown split", f"Found {value!r:.60}, known are {', '.join(SPLIT_NAMES)}.")
    return SPLIT_NAMES[str(value).lower()]


def splits_of_files(names: Sequence[str]) -> list[str | None]:
    """The split that the name of each file or of a folder above it says: train/00000.tar, laion-val-0001.parquet.

    If all say the same, as "train" in files that were never divided, it tells nothing: then there is none.
    """
    found = [re.findall(r"(?<![a-z])(train|validation|valid|val|dev|test)(?![a-z])", name.lower()) for name in names]
    splits = [known_split({"valid": "val"}.get(words[-1], words[-1])) if words else None for words in found]
    return splits if len(set(splits) - {None}) > 1 else [None] * len(splits)


def check_status(facts: dict[str, Any]) -> None:
    """Raise EntryError for a picture that img2dataset could not download."""
    status = facts.get("status")
    if isinstance(status, str) and status and status != "success":
        message = facts.get("error_message") or status
        raise EntryError("download failed", f"img2dataset says: {message}. Download it again.")
