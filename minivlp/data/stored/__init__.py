"""Pictures inside larger files, as image-text data of the web are stored: tar shards, Parquet and Arrow tables.

    open_folder("wds:~/cc3m")                            DIR/00000.tar ..., as img2dataset and webdataset write them
    open_folder("wds:~/cc3m/{00000..00099}.tar")         some of them
    open_folder("parquet:~/laion")                       Parquet with the bytes of pictures in a column
    open_folder("hf:~/flickr30k", split="train")         a folder of Hugging Face's `datasets`
    open_folder("hf:nlphuji/flickr30k")                  a data set of the hub

All become a `Folder`: pictures are numbered and read at any place, so that a batch stays a pure function of the seed
and the step. It can be resumed exactly, each process of several reads its own rows only, and memory holds no pictures:
per picture there are its captions, its name and its place in a file, about 100 bytes and the text.
"""

from __future__ import annotations

from pathlib import Path

from minivlp.data.stored.samples import Samples, StoredRows, choose
from minivlp.data.validation import Report

__all__ = ["KINDS", "StoredRows", "choose", "read_samples", "root_of", "stored_kind"]

KINDS = ("wds", "parquet", "hf")


def stored_kind(spec: str | Path) -> tuple[str, str] | None:
    """("wds", place) of "wds:place", for each of `KINDS`; None for any other spec."""
    kind, colon, place = str(spec).partition(":")
    return (kind, place) if colon and kind in KINDS else None


def root_of(kind: str, place: str) -> Path:
    """What names in messages are relative to: the folder, or the id of the hub."""
    path = Path(place).expanduser()
    return path.parent if kind == "wds" and not path.is_dir() else path


def read_samples(kind: str, place: str, report: Report, language: str) -> Samples:
    """The samples of all splits. Raises DataError where there is nothing to read or a library is missing."""
    if kind == "wds":
        from minivlp.data.stored.shards import read_shards

        samples = read_shards(place, report, language)
    else:
        from minivlp.data.stored.tables import read_tables

        samples = read_tables(kind, place, report, language)
    samples.complete()
    return samples
