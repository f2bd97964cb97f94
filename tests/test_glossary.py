"""The glossary: its page is what its table gives, and links to it lead to a term."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("glossary", ROOT / "tools" / "glossary.py")
glossary = importlib.util.module_from_spec(spec)
spec.loader.exec_module(glossary)

PAGES = [*ROOT.glob("notebooks/src/*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.md")]
ROWS = glossary.read()


def test_the_page_is_made_from_the_table():
    made = glossary.page(ROWS)
    assert glossary.PAGE.read_text(encoding="utf-8") == made, "run `python tools/glossary.py`"


def test_terms_are_unique():
    anchors = [glossary.anchor(row["term"]) for row in ROWS]
    assert sorted(anchors) == sorted(set(anchors))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["term"])
def test_every_term_has_a_chinese_name_and_a_plain_definition(row):
    assert None not in row and None not in row.values()  # as many columns as the table has
    assert row["chinese"] and re.fullmatch(r"[A-Z(].*[.?]", row["definition"])  # quotes closed, one line
    assert len(row["definition"]) < 330, "one or two plain sentences"


def dead_links(text):
    """Terms that are linked in a text and missing in the glossary."""
    known = {glossary.anchor(row["term"]) for row in ROWS}
    return [term for term in re.findall(r"glossary\.md#([^)\s\"'`]+)", text) if term not in known]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_a_term(path):
    text = path.read_text(encoding="utf-8")
    assert dead_links(text) == [], "add the term to docs/glossary.csv and run `python tools/glossary.py`"


def test_dead_links_are_seen():
    text = "[patches](../docs/glossary.md#patch), [nonsense](glossary.md#no-such-term)"
    assert dead_links(text) == ["no-such-term"]


def test_anchors_are_those_of_github():
    """As github.com shows them for such headings."""
    headings = ("Query, key and value", "R@k", "Whole-word masking", "GIoU")
    assert [glossary.anchor(term) for term in headings] == ["query-key-and-value", "rk", "whole-word-masking", "giou"]
    with pytest.raises(ValueError, match="'Patch': there is no lesson '99'"):
        glossary.page([{"term": "Patch", "chinese": "图像块", "definition": "A square.", "lesson": "99"}])
