"""Readers of annotation files: COCO, Flickr8k/30k, CSV and JSONL. Each returns one `Entry` per image.

They read annotations only, no images. Every entry is checked inside `with report.entry(where)`.
"""

from __future__ import annotations

from pathlib import Path

from minivlp.data.layouts.coco import coco_files, read_coco
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
        layout = layout or ("folder" if path.suffix in (".csv", ".jsonl") else "flickr")
        if layout == "coco":
            raise DataError(f"{path}: a file where a folder is expected. Write coco:DIR, with DIR/annotations in it.")
        return layout, path.parent, path
    table, flickr = table_file(path), flickr_file(path)
    if not layout:
        layout = "coco" if coco_files(path, "captions") else "folder" if table else "flickr" if flickr else ""
    needs = {"coco": "annotations/*captions*.json", "folder": " or ".join(TABLES),
             "flickr": "dataset*.json, *.token.txt, captions.txt or results.csv"}  # fmt: skip
    if not layout:
        raise DataError(f"{path}: not one of the known layouts, which need {', or '.join(needs.values())}.")
    file = {"folder": table, "flickr": flickr}.get(layout)
    if not (coco_files(path, "captions") if layout == "coco" else file):
        raise DataError(f"{path}: no {needs[layout]}, which {layout}:DIR needs. Put it there, or try another layout.")
    return layout, path, file
