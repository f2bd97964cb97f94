"""Tables of Hugging Face's `datasets`: folders that it wrote, Parquet files, and data sets of the hub.

`datasets` maps Arrow files into memory, so any row can be read at once and only what is used is loaded. Parquet files
cannot be read in this way: `datasets` converts them once, into its own cache (HF_HOME), which needs as much space
again. The hub is asked only for an id such as `nlphuji/flickr30k`, and not at all with HF_HUB_OFFLINE=1: then a data
set comes from the cache or not at all.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlp.data.layouts.columns import CAPTION, FILE, check_columns, in_language
from minivlp.data.layouts.entries import SPLIT_NAMES
from minivlp.data.layouts.published import is_leftover
from minivlp.data.stored.library import library
from minivlp.data.stored.samples import Samples, check_status, clean_captions, known_split, splits_of_files
from minivlp.data.validation import DataError, EntryError, Report

# What published data sets call their captions, in this order; `caption_0`, `caption_1`, ... are read together.
CAPTION_COLUMNS = (*CAPTION, "texts", "sentence", "sentences", "sentences_raw", "alt_text", "description", "prompt")
INSIDE = ("raw", "caption", "text", "sentence")  # where a caption is an object with its words and more
PICTURE_COLUMNS = (*FILE, "jpg", "jpeg", "png", "webp", "img", "picture")
NAME_COLUMNS = ("file_name", "filename", "image_name", "filepath", "key", "__key__")
FACTS = ("split", "status", "error_message", "sha256")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
CHUNK = 1000  # rows that are checked at a time


@dataclass(frozen=True)
class TableCell:
    """A picture in a column of a table. `table` has only this column, undecoded."""

    table: Any
    column: str
    row: int
    split: str
    place: str

    @property
    def name(self) -> str:
        """The same wherever the data set lies."""
        return f"{self.split} row {self.row}"

    def read(self) -> bytes:
        """The bytes of the picture's file. Raises OSError if the file that the table names is not there."""
        cell = self.table[self.row][self.column]
        if not isinstance(cell, dict):
            return cell
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def stat(self) -> os.stat_result:
        """Size and time of the table's first file."""
        return os.stat(self.table.cache_files[0]["filename"])

    def __str__(self) -> str:
        return f"{self.place} {self.split} row {self.row}"


class TableSamples(Samples):
    """The samples of the tables of all splits."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.tables: list[tuple[str, str, Any]] = []  # name of the split, column of pictures, table of this column
        self._table, self._row = array("l"), array("q")

    def add_row(self, row: int) -> None:
        """Where the next sample is, in the last of the tables."""
        self._table.append(len(self.tables) - 1)
        self._row.append(row)

    def where(self, number: int) -> str:
        return _where(self.tables[self._table[number]][0], self._row[number], self.names[number])

    def file(self, number: int) -> TableCell:
        split, column, table = self.tables[self._table[number]]
        return TableCell(table, column, self._row[number], split, self.place)


def read_tables(kind: str, place: str, report: Report, language: str) -> TableSamples:
    """The samples of all splits of a data set, rows numbered from 0 as in `datasets`. Raises DataError."""
    tables = open_tables(kind, place)
    samples = TableSamples(place)
    several = len({SPLIT_NAMES.get(split, split) for split in tables}) > 1
    for split, table in tables.items():
        _add_table(samples, split, table, several, report, language)
    return samples


def _add_table(samples: TableSamples, split: str, table: Any, several: bool, report: Report, language: str) -> None:
    place = f"{report.root} {split}"
    picture = picture_column(table, place)
    captions = caption_columns(table.column_names, language, place)
    _check_columns(table, [picture, *captions], f"{split} row 0", report, language)
    cells = table.select_columns([picture])
    if isinstance(table.features[picture], library("datasets", "hf").Image):
        cells = cells.cast_column(picture, library("datasets", "hf").Image(decode=False))
    samples.tables.append((split, picture, cells))
    named = [column for column in NAME_COLUMNS if column in table.column_names and column not in captions]
    facts = table.select_columns([c for c in (*captions, *FACTS, *named) if c in table.column_names])
    of_table = SPLIT_NAMES.get(split) if several else None
    for row, (item, cell) in enumerate(zip(_items(facts), _cells(cells, picture), strict=True)):
        name = next((str(item[column]) for column in named if item[column] not in (None, "")), cell or f"{row}")
        name = os.path.basename(name)
        with report.entry(_where(split, row, name)):
            check_status(item)
            if cell is None:
                raise EntryError("no picture", f"Column {picture!r} is empty there.")
            said = [text for column in captions for text in texts_of(item[column])]
            if not said:
                raise EntryError("no caption", f"Column {' and '.join(captions)} is empty there.")
            samples.add_row(row)
            sha256 = item.get("sha256")
            sha256 = sha256 if isinstance(sha256, str) else None
            samples.add(name, clean_captions(said), known_split(item.get("split")) or of_table, sha256)


def _where(split: str, row: int, name: str) -> str:
    """The place of a sample in messages: its row, and its name where it has one."""
    return f"{split} row {row}" + (f" ({name})" if name != str(row) else "")


def _items(table: Any) -> Iterator[dict[str, Any]]:
    """The rows as dictionaries."""
    for start in range(0, len(table), CHUNK):
        chunk = table[start : start + CHUNK]
        for values in zip(*chunk.values(), strict=True):
            yield dict(zip(chunk, values, strict=True))


def _cells(cells: Any, column: str) -> Iterator[str | None]:
    """Of each picture the path that is stored with it, or ""; None for an empty cell. No picture is loaded."""
    arrow = cells.with_format("arrow")
    for start in range(0, len(cells), CHUNK):
        values = arrow[start : start + CHUNK].column(column)
        if not hasattr(values.type, "fields") or not values.type.num_fields:
            yield from ("" if there else None for there in values.is_valid().to_pylist())
            continue
        parts = values.flatten()  # without copying
        names = [values.type.field(i).name for i in range(values.type.num_fields)]
        paths = parts[names.index("path")].to_pylist()
        filled = parts[names.index("bytes")].is_valid().to_pylist()
        yield from ((path or "") if full or path else None for path, full in zip(paths, filled, strict=True))


# ---------------------------------------------------------------------------------------------------------- the columns


def _is_binary(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def picture_column(table: Any, place: str) -> str:
    """The column that holds pictures. Raises DataError for none, and for several of unknown names."""
    image = library("datasets", "hf").Image
    found = [
        name
        for name, feature in table.features.items()
        if isinstance(feature, image)
        or _is_binary(feature)
        or (isinstance(feature, dict) and {"bytes", "path"} == set(feature))
    ]
    if len(found) > 1:
        found = [name for name in PICTURE_COLUMNS if name in found][:1] or found
    if len(found) == 1:
        return found[0]
    columns = ", ".join(table.column_names)
    if found:
        remedy = "Rename the right one to image with `rename_column`, and save it with `save_to_disk`."
        raise DataError(f"{place}: pictures in several columns ({', '.join(found)}). {remedy}")
    if any(name.lower() in ("url", "image_url") for name in table.column_names):
        remedy = "It has only their addresses: download them with img2dataset, then write wds: and its folder."
    else:
        remedy = "If names of files are in it, save it as metadata.csv beside the pictures, then write folder:DIR."
    raise DataError(f"{place}: no column holds pictures; there are {columns}. {remedy}")


def caption_columns(columns: list[str], language: str, place: str) -> list[str]:
    """The columns of captions: the first known name, or all of `caption_0`, `caption_1`, ... Raises DataError."""
    by_name = {column.lower(): column for column in reversed(columns)}
    for name in in_language(CAPTION_COLUMNS, language):
        if name in by_name:
            return [by_name[name]]
        numbered = [column for column in columns if re.fullmatch(rf"{name}_?\d+", column.lower())]
        if numbered:
            return numbered
    known = ", ".join(in_language(CAPTION_COLUMNS[:4], language))
    remedy = f"Rename a column to one of {known} with `rename_column` of `datasets`, and save it with `save_to_disk`."
    raise DataError(f"{place}: no column of captions; there are {', '.join(columns)}. {remedy}")


def _check_columns(table: Any, read: list[str], where: str, report: Report, language: str) -> None:
    """Note the columns that are not read, judged by the first row. Raises DataError for a mistyped name."""
    plain = [name for name in table.column_names if name not in read and _is_plain(table.features[name])]
    for name in table.column_names:
        if name not in read and name not in plain:
            report.note(f"column {name!r} is not read", where)
    if not plain or not len(table):
        return
    with report.entry(where, counted=False):
        item = table.select_columns(plain)[0]
        groups = [(name,) for name in (*FACTS, *NAME_COLUMNS, "width", "height")]
        check_columns(
            {n: v for n, v in item.items() if n.lower() not in CAPTION_COLUMNS}, groups, where, report, language
        )
        for name in plain:
            if language == "en" and name.lower() in CAPTION_COLUMNS:
                report.note(f"column {name!r} is not read where there is {read[1]!r}", where)


def _is_plain(feature: Any) -> bool:
    """Whether a column holds texts, numbers, and lists and objects of them, which are small and need no decoder."""
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, list):
        return all(map(_is_plain, feature))
    if hasattr(feature, "feature"):
        return _is_plain(feature.feature)
    return type(feature).__name__ in ("Value", "ClassLabel") and not _is_binary(feature)


def texts_of(value: Any) -> list[Any]:
    """The captions in a cell: a text, a list of texts, objects with a text in them, or None."""
    if value is None:
        return []
    if isinstance(value, dict):
        return texts_of(next((value[key] for key in INSIDE if key in value), None))
    if isinstance(value, list):
        return [text for one in value for text in texts_of(one)]
    return [value]


# ---------------------------------------------------------------------------------------------------------- the library


def open_tables(kind: str, place: str) -> dict[str, Any]:
    """The tables of a folder, a file, or an id of the hub, by the names of their splits. Raises DataError."""
    datasets = library("datasets", kind)
    path = Path(place).expanduser()
    if not path.exists() and not (kind == "hf" and HUB_ID.fullmatch(place)):
        hub = ", or hf:OWNER/NAME for a data set of the hub" if kind == "hf" else ""
        raise DataError(f"{path}: no such file or folder. Write {kind}:DIR{hub}.")
    try:
        found = _opened(datasets, kind, place, path)
    except DataError:
        raise
    except Exception as error:  # of the library, of Arrow, of the network
        raise DataError(f"{place}: {_reason(error, path)}") from error
    if isinstance(found, datasets.DatasetDict):
        return {str(split): table for split, table in found.items()}
    return {str(found.split or "train"): found}


def _opened(datasets: Any, kind: str, place: str, path: Path) -> Any:
    """What `datasets` returns for a place."""
    if path.is_file():
        return _opened_file(datasets, path)
    if not path.exists():
        name, _, config = place.partition(":")
        return datasets.load_dataset(name, config or None)
    if kind == "parquet":
        return datasets.load_dataset("parquet", data_files=_parquet_files(path))
    if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path))


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    """The Parquet files in or below a folder, by split."""
    files = sorted(path for path in folder.rglob("*.parquet") if not is_leftover(path))
    if not files:
        raise DataError(f"{folder}: no .parquet file in or below it. Write parquet:DIR with DIR/00000.parquet in it.")
    by_split: dict[str, list[str]] = {}
    for file, split in zip(files, splits_of_files([str(file.relative_to(folder)) for file in files]), strict=True):
        by_split.setdefault(split or "files", []).append(str(file))
    return by_split


def _opened_file(datasets: Any, path: Path) -> Any:
    if path.suffix == ".arrow":
        return datasets.Dataset.from_file(str(path))
    if path.suffix not in (".parquet", ".pq"):
        raise DataError(f"{path}: no .parquet or .arrow file. Write parquet:DIR, parquet:FILE or hf:DIR.")
    return datasets.load_dataset("parquet", data_files=[str(path)])


def _reason(error: Exception, path: Path) -> str:
    """Why `datasets` could not open a place, and what to do."""
    cause = error.__cause__ or error
    what = " ".join(str(cause).split())[:300] or type(cause).__name__
    if path.exists():
        return f"`datasets` cannot read it ({what}). Was it written completely? Download or save it again."
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return f"no such folder, and the hub is not asked because HF_HUB_OFFLINE is set ({what})."
    several = " Write hf:OWNER/NAME:CONFIG to name one of several." if "onfig" in what else ""
    return f"no such folder, and the hub has no such data set or cannot be reached ({what}).{several}"
