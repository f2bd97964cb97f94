"""Tar shards as img2dataset and webdataset write them: `0001.jpg`, `0001.txt` and `0001.json` are one sample.

webdataset streams shards through a shuffle buffer, so which samples meet in a batch depends on how many processes read
and what they read before. Here each shard is indexed once instead (where each picture is, and its captions), and a
picture is then one read at a known place of an uncompressed tar file. So the order is that of every other dataset: a
full shuffle by seed and epoch, resumable at any step, divided among processes by rows, with no buffer in memory. It
costs the index (five seconds for a shard of 10,000 samples, the first time only) and reads in random order, which suit
solid-state disks. The library webdataset serves where shards are not on this machine: it fetches each URL or `pipe:`
command once, into the cache.

The cache is ~/.cache/minivlp, or the folder that the environment variable MINIVLP_CACHE names.
"""

from __future__ import annotations

import glob
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minivlp.data.layouts.published import is_leftover
from minivlp.data.stored.cache import fetched
from minivlp.data.stored.library import library
from minivlp.data.stored.samples import (
    Samples,
    Strings,
    splits_of_files,
)
from minivlp.data.stored.shard_index import ShardIndex, index_of
from minivlp.data.validation import DataError, EntryError, Report

REMOTE = ("http:", "https:", "s3:", "gs:", "pipe:")


@dataclass(frozen=True)
class TarMember:
    """A picture inside a shard."""

    shard: Path
    name: str
    offset: int
    length: int

    def read(self) -> bytes:
        """Its bytes. Raises OSError if the shard is gone or has become shorter."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.length)
        if len(content) < self.length:
            raise OSError("the shard has become shorter")
        return content

    def stat(self) -> os.stat_result:
        """Size and time of the shard."""
        return self.shard.stat()

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


class ShardSamples(Samples):
    """The samples of all shards."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.shards: list[Path] = []
        self._shard, self._offset, self._length = array("l"), array("q"), array("q")
        self._pictures = Strings()  # names of members

    def add_picture(self, member: str, offset: int, length: int) -> None:
        """Where the picture of the next sample is, in the last of the shards."""
        self._pictures.append(member)
        self._shard.append(len(self.shards) - 1)
        self._offset.append(offset)
        self._length.append(length)

    def where(self, number: int) -> str:
        return f"{_short(self.shards[self._shard[number]], self.root)} key {self.names[number]}"

    def file(self, number: int) -> TarMember:
        shard = self.shards[self._shard[number]]
        return TarMember(shard, self._pictures[number], self._offset[number], self._length[number])


def read_shards(place: str, report: Report, language: str) -> ShardSamples:
    """The samples of the shards that `place` names. Raises DataError."""
    samples = ShardSamples(report.root)
    shards = find_shards(place)
    splits = splits_of_files([_short(path, report.root) for path in shards])
    bar = tqdm(shards, "shards", disable=len(shards) < 20)  # it takes minutes for hundreds of new ones
    for path, of_file in zip(bar, splits, strict=True):
        short = _short(path, report.root)
        index = ShardIndex()
        with report.entry(short, counted=False):
            index = index_of(path, language)
        samples.shards.append(path)
        report.entries += len(index.samples)
        for key, reason, remedy, harmless in index.problems:
            with report.entry(f"{short} key {key}" if key else short, counted=bool(key)):
                raise EntryError(reason, remedy, harmless)
        for what, (count, first) in index.notes.items():
            report.notes.setdefault(what, []).extend([first] * count)
        for key, member, offset, length, captions, split, sha256 in index.samples:
            samples.add_picture(member, offset, length)
            samples.add(key, captions, split or of_file, sha256)
    return samples


def find_shards(place: str) -> list[Path]:
    """The shards of a folder, a file, or a pattern with {0000..0099} or *. Fetches remote ones. Raises DataError."""
    if place.startswith(REMOTE):
        return [fetched(url) for url in _expanded(place)]
    paths = [Path(name).expanduser() for name in _expanded(place)]
    if len(paths) == 1 and paths[0].is_dir():
        found = sorted(path for path in paths[0].rglob("*.tar") if not is_leftover(path))
        if not found:
            packed = any(paths[0].rglob("*.tar.*")) or any(paths[0].rglob("*.tgz"))
            hint = "Decompress the .tar.gz files first." if packed else "Write wds:DIR with DIR/00000.tar in it."
            raise DataError(f"{paths[0]}: no .tar file in or below it. {hint}")
        return found
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such shard. Write wds:DIR, wds:DIR/00000.tar or wds:DIR/{{00000..00099}}.tar")
    return paths


def _expanded(place: str) -> list[str]:
    """The names that a pattern stands for: {a..b} and {a,b} always, * and ? only for local files."""
    names = list(library("braceexpand", "wds").braceexpand(place)) if "{" in place else [place]
    if place.startswith(REMOTE):
        return names
    return [found for name in names for found in (sorted(glob.glob(os.path.expanduser(name))) or [name])]


def _short(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
