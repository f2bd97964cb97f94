"""What errors say in Python, said in options of the command line."""

from __future__ import annotations

import argparse
from typing import Any

from minivlp.console import explained

OPTIONS = {  # what errors advise in Python -> what does the same here
    "split=None": "--split all",
    "on_error='skip'": "--skip-errors",
    "language": "--language",
    "tower": "--tower",
    "frozen": "--frozen",
    "image_tokens": "--frozen",
    "Settings.lr": "--lr",
    "tokenizer": "--tokenizer",
    "tokenizer=FOLDER": "--tokenizer FOLDER",
    "accumulate": "--accumulate",
}
FIELDS = {  # of a run's identity -> the option that sets it
    "data.description": "--data",
    "data.hash": "names, captions or boxes of --data",
    "tokenizer": "--tokenizer",
    "seed": "--seed",
    "settings.steps": "--steps",
    "settings.lr": "--lr",
    "model.class": "MODEL",
    "options.start": "--start",
    "options.tower": "--tower",
    "options.tower_weights": "--tower-weights",
    "options.frozen": "--frozen",
    "options.recipe.batch_size": "--batch",
    "options.local_negatives": "--local-negatives",
}


def in_options(error: Exception, options: argparse.Namespace) -> str | None:
    """An error in the words of the command line; None for a fault of our own."""
    from minivlp.training.run import OtherRun

    if isinstance(error, OtherRun):
        return of_other_run(error)
    has = vars(options)
    names = {name: word for name, word in OPTIONS.items() if word.split()[0].strip("-").replace("-", "_") in has}
    return explained(error, has, names)


def of_other_run(error: Any) -> str:
    """What differs between the run in a folder and the one asked for, by options where they tell it."""
    from minivlp.training.run import listed

    folder, weights = error.folder, error.folder / "model.safetensors"
    options = {FIELDS[name]: values for name, values in error.found.items() if name in FIELDS}
    found = "; ".join(listed(options or error.found))
    remedy = "choose another --out, or delete this folder"
    if "settings.steps" in error.found and "data.hash" not in error.found:  # other data alone make another number
        steps = error.found["settings.steps"][0]
        go_on = f"--start {weights} --out {folder}-more"
        remedy += (
            f". A run cannot be made longer, because its learning rate ends at zero. To train on, start a new run from "
            f"its weights: {go_on}"
            if weights.is_file()
            else f". A run cannot be made longer: finish this one with --steps {steps}, then train on with {go_on}"
        )
    return f"{folder} holds another run ({found}): {remedy}"
