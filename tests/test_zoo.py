"""The list of models: what stands in docs/zoo.md is what the code says, and what it says of weights is so."""

from pathlib import Path

from minivlp.pretrained.loading import RELEASES
from minivlp.pretrained.origins import WEIGHTS
from minivlp.zoo import as_markdown, in_columns, zoo

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_in_the_docs_is_what_the_code_says():
    page = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    there = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    assert there == as_markdown(zoo()), "put what `python -m minivlp info --markdown` prints into docs/zoo.md"


def test_the_weights_that_are_named_are_those_that_load():
    """`load` knows a release by how its names begin: transformers' by these, any other is someone else's."""
    marks = {family: {release.mark for release in releases} for family, releases in RELEASES.items()}
    theirs = {"vision_model.", "vilt."}
    assert WEIGHTS.keys() == marks.keys()
    for family, said in WEIGHTS.items():
        assert ("transformers" in said) == bool(marks[family] & theirs), family
        assert ("authors'" in said or "open_clip" in said) == bool(marks[family] - theirs), family


def test_columns_line_up():
    lines = in_columns([{"model": "a", "verbs": "look ask"}, {"model": "longer", "verbs": "x"}]).splitlines()
    assert lines == ["model   verbs", "a       look ask", "longer  x"]
