"""Readers of annotation files: COCO, Flickr8k/30k, CSV, JSONL and JSON lists. Each returns one `Entry` per image.

They read annotations only, no images. Every entry is checked inside `with report.entry(where)`.
"""

from __future__ import annotations

from pathlib import Path

from minivlp.data.layouts.coco import coco_files, read_coco
from minivlp.data.layouts.containers import another_container, containers_in
from minivlp.data.layouts.entries import Entry
from minivlp.data.layouts.flickr import flickr_file, read_flickr
from minivlp.data.layouts.table import TABLES, read_table, table_file
from minivlp.data.validation import DataError

__all__ = ["Entry", "read_coco", "read_flickr", "read_table", "detect_layout"]


def detect_layout(spec: str | Path) -> tuple[str, Path, Path | None]:
    """(layout, folder, file of captions or None for COCO) of `layout:DIR` or a plain path. Raises DataError."""
    layout, colon, rest = str(spec).partition(":")
    if not colon or layout not in ("coco", "flickr", "folder"):
        layout, rest = "", str(spec)
    path = Path(rest).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such folder. Write coco:DIR, flickr:DIR, folder:DIR or just the path.")
    if path.is_file():
        if other := another_container(path):
            raise DataError(f"{path}: {other}")
        layout = _layout_of_file(path, layout)
        if layout == "coco":
            raise DataError(f"{path}: a file where a folder is expected. Write coco:DIR, with DIR/annotations in it.")
        return layout, path.parent, path
    table, flickr = table_file(path), flickr_file(path)
    if not layout:
        layout = "coco" if coco_files(path, "captions") else "folder" if table else "flickr" if flickr else ""
    needs = {"coco": "annotations/*captions*.json", "folder": " or ".join(TABLES),
             "flickr": "dataset*.json, *.token.txt, captions.txt or results.csv"}  # fmt: skip
    file = {"folder": table, "flickr": flickr}.get(layout)
    if layout and (coco_files(path, "captions") if layout == "coco" else file):
        if file and (other := another_container(file)):
            raise DataError(f"{file}: {other}")
        return layout, path, file
    other = _other_layout(path) or containers_in(path)
    if layout:
        remedy = other or "Put it there, or try another layout."
        raise DataError(f"{path}: no {needs[layout]}, which {layout}:DIR needs. {remedy}")
    message = f"{path}: not one of the known layouts, which need {', or '.join(needs.values())}."
    raise DataError(f"{message} {other}" if other else message)


def _other_layout(path: Path) -> str | None:
    """How to open a folder that has files of another layout than it was named."""
    names = ["coco"] if coco_files(path, "captions") else []
    names += ["folder"] if table_file(path) else []
    names += ["flickr"] if flickr_file(path) else []
    return f"It has the files of another layout: write {names[0]}:{path}" if names else None


def _layout_of_file(path: Path, layout: str) -> str:
    """The layout of a file: the given one, else by its name. A JSON list is always a table."""
    suffix = path.suffix.lower()
    if suffix == ".json" and layout != "coco":
        with path.open("rb") as file:
            start = file.read(100_000).lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith(b"["):
            return "folder"
        return layout or ("flickr" if b'"sentences"' in start else "folder")
    return layout or ("folder" if suffix in (".csv", ".tsv", ".jsonl") else "flickr")
