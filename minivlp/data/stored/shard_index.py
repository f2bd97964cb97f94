"""The index of a tar shard: where each picture is, and its captions. Made once, and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from minivlp.data.layouts.columns import BOX, OBJECTS, REGIONS, check_columns, first_of
from minivlp.data.stored.cache import cache_folder, written_whole
from minivlp.data.stored.samples import (
    caption_names,
    check_status,
    clean_captions,
    known_split,
)
from minivlp.data.validation import EntryError, Report, decode_text

PICTURES = frozenset("jpg jpeg png webp gif bmp tif tiff ppm".split())
TEXTS = ("txt", "text", "caption")
LONGEST_TEXT = 1_000_000  # bytes of a text or JSON file
BLOCK = 512  # of a tar file: a header, and the unit to which members are padded
INDEX_VERSION = 1  # raise it when `ShardIndex` or what it is made from changes


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


def _keep(path: Path, index: ShardIndex) -> None:
    """Write the index into the cache, whole or not at all. A cache that cannot be written costs only time."""
    try:
        with written_whole(path) as file:
            file.write(json.dumps(asdict(index)).encode())
    except OSError:
        pass
