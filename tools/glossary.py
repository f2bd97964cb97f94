"""The glossary's page, docs/glossary.md, from its table, docs/glossary.csv: one row per term.

    python tools/glossary.py

A lesson links a term at its first use, as `../docs/glossary.md#contrastive-loss`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE, PAGE = ROOT / "docs" / "glossary.csv", ROOT / "docs" / "glossary.md"
BEGINNING = """# Glossary

The terms of the lessons, with their Chinese names. `tools/glossary.py` makes this page from `glossary.csv`; add a term
there, one row per term, and run it.
"""

Row = dict[str, str]  # term, chinese, definition, lesson


def read(table: Path = TABLE) -> list[Row]:
    """The rows, ordered by term."""
    with table.open(encoding="utf-8", newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: row["term"].lower())


def anchor(term: str) -> str:
    """What GitHub makes of a heading: the end of a link to it."""
    return re.sub(r"[^\w\- ]", "", term.lower()).replace(" ", "-")


def page(rows: Sequence[Row]) -> str:
    """The page: all terms by letter, then a heading for each. Raises ValueError for a lesson that is missing."""
    letters = groupby(rows, key=lambda row: row["term"][0].upper())
    index = [f"{letter}: {' · '.join(link(row['term']) for row in group)}\\" for letter, group in letters]
    return "\n".join([BEGINNING, "\n".join(index).rstrip("\\"), *map(entry, rows)]) + "\n"


def link(term: str) -> str:
    return f"[{term}](#{anchor(term)})"


def entry(row: Row) -> str:
    """A term's heading, Chinese name, lesson and definition."""
    found = sorted((ROOT / "notebooks").glob(f"{row['lesson']}_*.ipynb"))
    if not found:
        raise ValueError(f"{row['term']!r}: there is no lesson {row['lesson']!r}.")
    lesson = f"[lesson {row['lesson']}](../notebooks/{found[0].name})"
    return f"\n## {row['term']}\n\n**{row['chinese']}** · {lesson}\n\n{row['definition']}"


if __name__ == "__main__":
    PAGE.write_text(page(read()), encoding="utf-8", newline="\n")
    print(PAGE)
