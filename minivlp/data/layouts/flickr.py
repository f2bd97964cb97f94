"""Flickr8k and Flickr30k, in any of the forms in which they are distributed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from minivlp.data.layouts.columns import check_columns
from minivlp.data.layouts.entries import (
    SPLIT_NAMES,
    Entries,
    Entry,
    read_json,
    read_lines,
    require_list,
    require_object,
)
from minivlp.data.layouts.published import is_leftover
from minivlp.data.validation import DataError, EntryError, Report, clean_caption, clean_name, decode_text

_KARPATHY = "dataset*.json"
_KARPATHY_KEYS = [("filename",), ("filepath",), ("sentences",), ("split",)]
_FILES = (_KARPATHY, "*.token", "*.token.txt", "captions.txt", "results.csv")
_PIPED_WITHOUT_BAR = re.compile(r"([^|]+)\|\s*(\d+)\s{2,}(\S[^|]*)")


def flickr_file(root: Path) -> Path | None:
    """The file of captions, here or one folder down. Karpathy's JSON comes first, as it has the splits."""
    for pattern in _FILES:
        found = _files_like(root, pattern)
        if pattern == _KARPATHY and len(found) > 1:  # his archive has those of three data sets
            found = [path for path in found if _has_pictures(path, root)] or found
        if len({path.read_bytes() for path in found} if len(found) > 1 else found) > 1:
            raise DataError(f"{root}: both {found[0]} and {found[1]} have captions. Name one: flickr:{found[0]}")
        if found:
            return found[0]
    return None


def _files_like(root: Path, pattern: str) -> list[Path]:
    """The files of captions of one form, here or one folder down."""
    found = sorted(root.glob(pattern)) + sorted(root.glob(f"*/{pattern}"))
    others = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # of Hugging Face
    found = [path for path in found if "lemma" not in path.name and path.name not in others]
    return [path for path in found if path.is_file() and not is_leftover(path)]


def _has_pictures(file: Path, root: Path) -> bool:
    """Whether one of the first pictures that a file of Karpathy's names lies in the folder."""
    with file.open("rb") as opened:
        names = re.findall(rb'"filename": ?"([^"/\\\\]+)"', opened.read(100_000))
    for name in names[:5]:
        for folder in ("", "*/", "*/*/"):
            if next(root.glob(folder + name.decode("utf-8", "replace")), None):
                return True
    return False


def read_flickr(root: Path, file: Path, report: Report) -> list[Entry]:
    """The entries of a file of captions, with the splits of Karpathy's JSON or of lists of names beside it."""
    if file.suffix == ".json":
        return list(_read_karpathy(file, report).values())
    for other in _files_like(root, file.name):
        if other != file and other.read_bytes() == file.read_bytes():
            report.note(f"{other.relative_to(root)} is not read", f"it is a copy of {file.relative_to(root)}")
    entries = _read_caption_lines(file, report)
    _read_split_files(root, file, entries, report)
    return list(entries.values())


def _read_karpathy(file: Path, report: Report) -> Entries:
    entries = Entries()
    short = file.relative_to(report.root)
    for number, item in enumerate(require_list(read_json(file), "images", file)):
        where = f"{short} images[{number}]"
        with report.entry(where):
            check_columns(require_object(item), _KARPATHY_KEYS, where, report)
            name = clean_name(item.get("filename"))
            folder = item.get("filepath")  # COCO in Karpathy's splits has one
            name = clean_name(f"{folder}/{name}") if isinstance(folder, str) and folder else name
            sentences = item.get("sentences")
            if not isinstance(sentences, list) or not sentences:
                raise EntryError("no caption", "'sentences' is a list of at least one {\"raw\": caption}.")
            captions = [clean_caption(require_object(sentence).get("raw")) for sentence in sentences]
            split = SPLIT_NAMES.get(str(item.get("split", "")))
            if "split" in item and split is None:
                raise EntryError("unknown split", f"Found {item['split']!r:.60}, known are {', '.join(SPLIT_NAMES)}.")
            if name in entries:
                same = (entries[name].captions, entries[name].split) == (captions, split)
                raise EntryError("duplicate row", f"{name!r} is also above: keep one of the two.", harmless=same)
            entry = entries.of(name, where)
            entry.captions, entry.split = captions, split
    return entries


def _read_caption_lines(file: Path, report: Report) -> Entries:
    """`name.jpg#0<TAB>caption`, or `image,caption`, or Kaggle's `image_name| number| comment`.

    One row of Kaggle's has lost its second bar: `name.jpg| 4   caption`. Such rows are read and counted.
    """
    entries, seen = Entries(), set()
    split = None
    for where, raw in read_lines(file, report):
        if split is None:
            start = raw.decode("utf-8", "replace").lstrip("\ufeff").lower()
            split = _token_line if "\t" in start else _piped_line if start.startswith("image_name|") else _comma_line
            if split is _comma_line and not re.fullmatch(r'"?(image|file)"?\s*,\s*"?caption"?\s*', start):
                remedy = "Start the file with the line image,caption"
                raise DataError(f"{report.root / where}: neither a header nor name.jpg#0<TAB>caption. {remedy}")
            if split is not _token_line:
                continue
        with report.entry(where):
            line = decode_text(raw)
            if split is _piped_line and (mended := _PIPED_WITHOUT_BAR.fullmatch(line.strip())):
                report.note("rows with blanks in place of the second bar are read all the same", where)
                line = "|".join(mended.groups())
            name, number, caption = split(line)
            name, caption = clean_name(name), clean_caption(caption)
            key = (name, number or caption)
            if key in seen:
                same = not number or caption in entries[name].captions
                raise EntryError("duplicate row", "The same row is above.", harmless=same)
            seen.add(key)
            entries.of(name, where).captions.append(caption)
    return entries


def _token_line(line: str) -> tuple[str, str, str]:
    name, tab, caption = line.partition("\t")
    name, separator, number = name.rpartition("#")
    if not tab or not separator or not number.strip().isdigit():
        raise EntryError("not a token line", "Write name.jpg#0, a tab, and the caption.")
    return name, number.strip(), caption


def _comma_line(line: str) -> tuple[str, str, str]:
    """The name ends at the first comma. The caption may have unquoted commas and quotes, as many such files do."""
    name, comma, caption = line.partition(",")
    if not comma:
        raise EntryError("wrong number of columns", "Write image,caption with a comma between them.")
    caption = caption.strip()
    if caption.startswith('"') and caption.endswith('"') and len(caption) > 1:
        caption = caption[1:-1].replace('""', '"')
    elif caption.count('"') % 2:
        raise EntryError("quote not closed", "Close each quote on its own line.")
    return name.strip('"'), "", caption


def _piped_line(line: str) -> tuple[str, str, str]:
    cells = line.split("|", 2)
    if len(cells) != 3 or not cells[1].strip().isdigit():
        raise EntryError("wrong number of columns", "Write image_name| number| comment.")
    return cells[0], cells[1].strip(), cells[2]


def _read_split_files(root: Path, file: Path, entries: Entries, report: Report) -> None:
    """Read lists of names such as Flickr_8k.trainImages.txt or test.txt. An image in none of them is in no split."""
    stems = {os.path.splitext(name)[0]: name for name in entries}
    for path in sorted({*root.glob("*.txt"), *file.parent.glob("*.txt"), *root.glob("*/*.txt")}):
        match = re.search(r"(?:^|[._])(train|dev|val|validation|test)(?:images)?\.txt$", path.name.lower())
        if not match or path == file or is_leftover(path):
            continue
        split = SPLIT_NAMES[match[1]]
        for where, raw in read_lines(path, report):
            with report.entry(where):
                name = clean_name(decode_text(raw))
                entry = entries.get(name) or entries.get(stems.get(name, ""))
                if entry is None:
                    raise EntryError("no caption", f"{name!r} is not in {file.name}: add it or delete this line.")
                if entry.split not in (None, split):
                    remedy = f"{name!r} is in {entry.split} too: what is tested must be unseen."
                    raise EntryError("image in two splits", remedy)
                entry.split = split
