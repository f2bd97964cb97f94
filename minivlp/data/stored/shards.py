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
import hashlib
import json
import os
import re
import shutil
import tarfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from minivlp.data.layouts.columns import BOX, OBJECTS, REGIONS, check_columns, first_of
from minivlp.data.layouts.published import is_leftover
from minivlp.data.stored.library import library
from minivlp.data.stored.samples import (
    Samples,
    Strings,
    caption_names,
    check_status,
    clean_captions,
    known_split,
    splits_of_files,
)
from minivlp.data.validation import DataError, EntryError, Report, decode_text

PICTURES = frozenset("jpg jpeg png webp gif bmp tif tiff ppm".split())
TEXTS = ("txt", "text", "caption")
LONGEST_TEXT = 1_000_000  # bytes of a text or JSON file
BLOCK = 512  # of a tar file: a header, and the unit to which members are padded
INDEX_VERSION = 1  # raise it when `ShardIndex` or what it is made from changes
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


# ------------------------------------------------------------------------------------------------------------ the index


@dataclass
class ShardIndex:
    """What a shard holds, as the cache keeps it.

    samples: key, name of the picture's member, its offset and length in bytes, captions, split, SHA-256.
    problems: key ("" for the shard itself), reason, remedy, harmless: as of `EntryError`.
    notes: fact -> how often, and where first.
    """

    samples: list[tuple[str, str, int, int, list[str], str | None, str | None]] = field(default_factory=list)
    problems: list[tuple[str, str, str, bool]] = field(default_factory=list)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)


def index_of(path: Path, language: str) -> ShardIndex:
    """The index of a shard, from the cache if the file has not changed since. Raises EntryError if it is no tar."""
    try:
        stat = path.stat()
        identity = f"{INDEX_VERSION} {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {language}"
        kept = cache_folder() / "shards" / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"
        try:
            return ShardIndex(**json.loads(kept.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            pass  # not there, or damaged: it is made again
        index = make_index(path, language)
    except tarfile.TarError as error:
        remedy = f"It is no uncompressed tar file ({error}): decompress a .gz first, or download it again."
        raise EntryError("shard cannot be read", remedy) from error
    except OSError as error:
        raise EntryError("shard cannot be read", f"{error.strerror or error}.") from error
    _keep(kept, index)
    return index


def make_index(path: Path, language: str) -> ShardIndex:
    """Read the headers, texts and JSON of a shard; the pictures are skipped. Raises OSError and tarfile.TarError."""
    index, notes = ShardIndex(), Report(path.parent, "skip")
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    twice: set[str] = set()
    with open(path, "rb") as file:
        end = 0
        for member in _members(path, index):
            key, extension = _key_and_extension(member.name)
            if key is None or not member.isfile():
                continue
            end = member.offset_data + member.size
            group = groups.setdefault(key, {})
            if extension in group:
                twice.add(key)
            group[extension] = member
        for number, (key, group) in enumerate(groups.items()):
            try:
                if key in twice:
                    raise EntryError("key twice", "The shard has two files of one name: write it again.")
                index.samples.append(_sample(file, key, group, f"row {number} of {path.name}", notes, language))
            except EntryError as error:
                index.problems.append((key, error.reason, error.remedy, error.harmless))
        if groups:
            _check_end(file, end, index)
    index.notes = {what: (len(places), places[0]) for what, places in notes.notes.items()}
    return index


def _members(path: Path, index: ShardIndex) -> Iterator[tarfile.TarInfo]:
    """The members that are complete. What follows a damaged one is lost, which is noted as a problem."""
    size = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        while True:
            try:
                member = tar.next()
            except tarfile.TarError as error:
                problem = f"What follows is lost ({error}): download the shard again."
                index.problems.append(("", "shard damaged", problem, False))
                return
            if member is None:
                return
            if member.offset_data + member.size > size:
                problem = f"{member.name} is cut off: download the shard again."
                index.problems.append(("", "shard damaged", problem, False))
                return
            tar.members.clear()  # else it would hold a thousand bytes for each
            yield member


def _check_end(file: BinaryIO, end: int, index: ShardIndex) -> None:
    """A block of zeros follows the last member of every complete tar file; tarfile does not mind if it is missing."""
    file.seek(-(-end // BLOCK) * BLOCK)
    block = file.read(BLOCK)
    if not block:
        problem = "It has no end mark: its writer was stopped, or the download was cut off. What is there is read."
        index.problems.append(("", "shard without end", problem, True))
    elif block != bytes(BLOCK) and not any(reason == "shard damaged" for _, reason, _, _ in index.problems):
        problem = f"What follows byte {end:,} is lost: download the shard again."
        index.problems.append(("", "shard damaged", problem, False))


def _key_and_extension(name: str) -> tuple[str | None, str]:
    """webdataset's rule: the name ends at the first dot after the last slash. (None, "") for what is no sample."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or "__MACOSX" in folder:
        return None, ""
    return folder + slash + stem, extension.lower()


def _sample(
    file: BinaryIO, key: str, group: dict[str, tarfile.TarInfo], row: str, notes: Report, language: str
) -> tuple[str, str, int, int, list[str], str | None, str | None]:
    """One sample of `ShardIndex.samples`. Raises EntryError."""
    facts = _facts(file, group.get("json"))
    check_status(facts)
    pictures = [extension for extension in group if extension in PICTURES]
    if len(pictures) != 1:
        there = ", ".join(f".{extension}" for extension in (pictures or group))
        remedy = f"There are {there}: a sample has one of {', '.join(sorted(PICTURES))}. A key ends at the first dot."
        raise EntryError("several pictures" if pictures else "no picture", remedy)
    _check_fields(facts, f"json {row}", notes, language)
    for extension in set(group) - {"json", *TEXTS, *pictures}:
        notes.note(f"files .{extension} of shards are not read", row)
    captions = _captions(file, group, facts, language)
    member = group[pictures[0]]
    sha256 = facts.get("sha256") if isinstance(facts.get("sha256"), str) else None
    return key, member.name, member.offset_data, member.size, captions, known_split(facts.get("split")), sha256


def _content(file: BinaryIO, member: tarfile.TarInfo) -> str:
    """A text file of a sample. Raises EntryError."""
    if member.size > LONGEST_TEXT:
        raise EntryError("text too long", f"{member.name} has {member.size:,} bytes, more than {LONGEST_TEXT:,}.")
    file.seek(member.offset_data)
    return decode_text(file.read(member.size))


def _facts(file: BinaryIO, member: tarfile.TarInfo | None) -> dict[str, Any]:
    """What the JSON of a sample says. Raises EntryError."""
    if member is None:
        return {}
    try:
        facts = json.loads(_content(file, member))
    except (ValueError, RecursionError) as error:
        raise EntryError("broken JSON", f"{member.name}: {error}.") from error
    if not isinstance(facts, dict):
        raise EntryError("not an object", f'{member.name}: write {{"caption": ...}}.')
    return facts


def _check_fields(facts: dict[str, Any], where: str, notes: Report, language: str) -> None:
    """Note the fields of a JSON that are not read. Raises EntryError for what is probably a mistyped name."""
    boxes = (*BOX, *REGIONS, OBJECTS, "bbox")
    for name in facts:
        if name in boxes:
            notes.note(f"boxes of shards are not read: field {name!r} of json", where)
    others = {name: value for name, value in facts.items() if name not in boxes}
    known = [caption_names(language), *((name,) for name in ("split", "sha256", "status", "key", "width", "height"))]
    check_columns(others, known, where, notes, language)


def _captions(file: BinaryIO, group: dict[str, tarfile.TarInfo], facts: dict[str, Any], language: str) -> list[str]:
    """The captions of the text file, one to a line, and of the JSON. Raises EntryError without any.

    A text of several lines that the JSON has as one caption is one caption.
    """
    name = first_of(facts, caption_names(language))
    said = facts.get(name) if name else None
    extension = first_of(group, TEXTS) if language == "en" else None
    if extension is None:
        if said is None:
            where = "text file or caption in the JSON" if language == "en" else f"caption_{language} in the JSON"
            raise EntryError("no caption", f"The sample has no {where}: add it or leave the sample out.")
        return clean_captions(said)
    text = _content(file, group[extension])
    if isinstance(said, str) and said.split() == text.split():
        return clean_captions(said)
    lines = [line for line in text.splitlines() if line.strip()]
    return clean_captions([*(lines or [text]), *(clean_captions(said) if said else [])])


# ------------------------------------------------------------------------------------------------------------ the cache


def cache_folder() -> Path:
    """Where indexes and fetched shards are kept."""
    return Path(os.environ.get("MINIVLP_CACHE") or "~/.cache/minivlp").expanduser()


def _keep(path: Path, index: ShardIndex) -> None:
    """Write the index into the cache, whole or not at all. A cache that cannot be written costs only time."""
    try:
        with _written_whole(path) as file:
            file.write(json.dumps(asdict(index)).encode())
    except OSError:
        pass


@contextmanager
def _written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its place only when the block has ended without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def fetched(url: str) -> Path:
    """The shard of a URL or `pipe:` command as a file of the cache; webdataset fetches it the first time."""
    name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[-80:].removesuffix(".tar")
    path = cache_folder() / "fetched" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"
    if path.exists():
        return path
    gopen = library("webdataset.gopen", "wds").gopen
    try:
        print(f"fetching {url} into {path.parent}")
        with _written_whole(path) as file, gopen(url, "rb") as stream:
            shutil.copyfileobj(stream, file)
    except Exception as error:  # of the library, of curl and of other programs
        raise DataError(f"{url}: cannot be fetched ({error}). Check the address, or download the shards.") from error
    return path
