"""Data: batches, the synthetic scene world and its noise, folders of real photos, and text."""

from __future__ import annotations

import os
from pathlib import Path


def samples_dir() -> Path:
    """The folder `data_samples`: sprites, photos with captions and boxes, and our tokenizer.

    It is expected beside the package; the environment variable MINIVLP_SAMPLES overrides the location.
    Raises FileNotFoundError if there is no such folder; the message says how to fix it.
    """
    beside = Path(__file__).resolve().parents[2] / "data_samples"
    folder = Path(os.environ.get("MINIVLP_SAMPLES") or beside).expanduser()
    if not (folder / "sprites").is_dir():
        raise FileNotFoundError(
            f"no sample data in {folder}: install minivlp from its checkout with `pip install -e .`, "
            "or set the environment variable MINIVLP_SAMPLES to the checkout's data_samples folder"
        )
    return folder
