"""Data: what travels (batch), the scene world, its noise, folders of real pictures, and text."""

from __future__ import annotations

import os
from pathlib import Path


def samples_dir() -> Path:
    """The folder `data_samples`: sprites, photos with captions and boxes, and our tokenizer.

    It lies beside the package; the environment variable MINIVLP_SAMPLES names another place.
    Raises FileNotFoundError, with the remedy, where there is no such folder.
    """
    beside = Path(__file__).resolve().parents[2] / "data_samples"
    folder = Path(os.environ.get("MINIVLP_SAMPLES") or beside).expanduser()
    if not (folder / "sprites").is_dir():
        raise FileNotFoundError(
            f"no sample data in {folder}: install minivlp from its checkout with `pip install -e .`, "
            "or set the environment variable MINIVLP_SAMPLES to the checkout's data_samples folder"
        )
    return folder
