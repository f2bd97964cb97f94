"""Records of long runs as small JSON files, from which the tables of the lessons and of the README are made.

`tools/experiments.py` writes them. A record has the command that made it, and one entry with scores per run.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from minivlp.evaluation.score import Score, Scores

RECORDS = Path(__file__).resolve().parents[2] / "records"


def save_record(name: str, command: str, runs: list[dict[str, Any]], folder: Path = RECORDS) -> Path:
    """Write `runs`: dicts with `variant`, `seed`, `seconds`, `scores` and more; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**run, "scores": {k: _rounded(s) for k, s in run["scores"].items()}} for run in runs]
    path = folder / f"{name}.json"
    text = ",\n".join(json.dumps(row) for row in rows)
    unfinished = path.with_suffix(".part")  # a crash while writing must not destroy the old record
    unfinished.write_text(f'{{"command": {json.dumps(command)}, "runs": [\n{text}\n]}}\n', encoding="utf-8")
    unfinished.replace(path)
    return path


def _rounded(score: Score) -> dict[str, float]:
    """A score as a dict for JSON, rounded to four decimals."""
    return {name: round(value, 4) for name, value in dataclasses.asdict(score).items()}


def load_runs(name: str, folder: Path = RECORDS) -> list[dict[str, Any]]:
    """The runs of a record, their scores as `Scores`. Raises FileNotFoundError, which says how to make the record."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: make it with `python tools/experiments.py {name}`")
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return [{**run, "scores": Scores({k: Score(**v) for k, v in run["scores"].items()})} for run in runs]


def by_variant(name: str, folder: Path = RECORDS) -> dict[str, list[Scores]]:
    """Scores of a record, one per seed, by variant: the input of `bars_with_spread` and `spread`."""
    found: dict[str, list[Scores]] = {}
    for run in load_runs(name, folder):
        found.setdefault(run["variant"], []).append(run["scores"])
    return found
