"""Files that are no captions file: what they are, and how minivlp opens what is in them."""

from __future__ import annotations

from pathlib import Path

_UNPACK = "Unpack it and give the folder that then holds captions and pictures."
_SHEET = "Save the sheet as CSV (UTF-8), with a first line such as file,caption, and give that file."
_SHARD = "With pairs as img2dataset writes them (0001.jpg beside 0001.txt), write wds:{path}. If not, unpack it."
_PARQUET = "Write parquet:{path}, or hf: and the folder if `datasets` of Hugging Face wrote it."
_ARROW = (
    "Write hf: and the folder that it lies in, as `save_to_disk` of Hugging Face's `datasets` made it: hf:{folder}."
)
_TABLE = "Save it as captions.csv (UTF-8, first line file,caption) or captions.jsonl."
_WAYS = {
    (".tar", ".tar.gz", ".tgz"): ("a tar archive", _SHARD),
    (".parquet", ".pq"): ("a parquet table", _PARQUET),
    (".arrow",): ("an arrow table", _ARROW),
    (".zip", ".rar", ".7z"): ("a packed archive", _UNPACK),
    (".gz", ".bz2", ".xz", ".zst"): ("a compressed file", "Decompress it and give the file that comes out."),
    (".xlsx", ".xls", ".ods", ".numbers"): ("a spreadsheet", _SHEET),
    (".pkl", ".pickle", ".npy", ".npz", ".h5", ".hdf5", ".mat", ".pt", ".pth", ".db", ".sqlite", ".mdb", ".lmdb",
     ".tfrecord", ".feather", ".xml", ".yaml", ".yml", ".html"): ("no file of captions", _TABLE),
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        ("a picture", "Give the folder, with a captions.csv or captions.jsonl in it."),
}  # fmt: skip
_BEGINNINGS = {b"PK\x03\x04": ".zip", b"PAR1": ".parquet", b"\x1f\x8b": ".gz", b"ARROW1": ".arrow"}
_XLSX = b"[Content_Types].xml"  # the first file in every .xlsx


def another_container(path: Path) -> str | None:
    """What a file is and how to open what is in it; None for what may be a text file of captions."""
    return _way(path, path.name.lower()) or _way_by_content(path)


def containers_in(folder: Path) -> str | None:
    """The same for a folder that holds such files, or tables of another name; None if there are none."""
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return None
    names = {path.name for path in files}
    if names & {"dataset_info.json", "state.json", "dataset_dict.json"}:
        return f"It was written by `datasets` of Hugging Face: write hf:{folder}"
    tables = [path for path in files if path.suffix.lower() in (".csv", ".tsv", ".jsonl", ".json") and path.is_file()]
    for path in [*tables, *files]:
        if path in tables:
            return f"If {path.name} holds the captions, name it: folder:{path}"
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp") and (way := _way(path, path.name.lower())):
            return f"It holds {path.name}, {way}"
    return None


def _way(path: Path, name: str) -> str | None:
    for suffixes, (what, way) in _WAYS.items():
        if name.endswith(suffixes):
            return f"{what}. {way.format(path=path, folder=path.parent)}"
    return None


def _way_by_content(path: Path) -> str | None:
    """By the first bytes, for a file that is called .csv and is something else."""
    try:
        with path.open("rb") as file:
            start = file.read(100)
    except OSError:
        return None  # the reader says why it cannot be read
    suffix = next((suffix for beginning, suffix in _BEGINNINGS.items() if start.startswith(beginning)), None)
    if suffix == ".zip" and _XLSX in start:
        suffix = ".xlsx"
    return _way(path, f"x{suffix}") if suffix else None
