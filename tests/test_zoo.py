"""The table of models: docs/zoo.md is up to date, and the weights it names are those that load."""

from pathlib import Path

from minivlp.papers import PAPERS
from minivlp.zoo import as_markdown, code_lines, in_columns, zoo

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_in_the_docs_is_what_the_code_says():
    page = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    there = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    assert there == as_markdown(zoo()), "put what `python -m minivlp info --markdown` prints into docs/zoo.md"


def test_the_weights_that_are_named_are_those_that_load():
    """`load` tells releases by how their names begin: transformers' by these, all others are those of the authors."""
    theirs = {"vision_model.", "vilt.", "git."}
    for name, paper in PAPERS.items():
        marks = {release.key_prefix for release in paper.release_list()}
        assert ("transformers" in paper.weights) == bool(marks & theirs), name
        assert ("authors'" in paper.weights or "open_clip" in paper.weights) == bool(marks - theirs), name


def test_code_lines_leave_out_what_explains(tmp_path, monkeypatch):
    source = '"""About."""\n\n# a remark\nimport os\n\n\ndef f():\n    """What."""\n    return """a\nb"""  # kept\n'
    (tmp_path / "lines_of_code.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import lines_of_code

    assert code_lines(lines_of_code) == 4


def test_columns_line_up():
    lines = in_columns([{"model": "a", "verbs": "look ask"}, {"model": "longer", "verbs": "x"}]).splitlines()
    assert lines == ["model   verbs", "a       look ask", "longer  x"]
