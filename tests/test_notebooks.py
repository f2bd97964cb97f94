"""The lessons' pipeline: built notebooks are fresh and clean (nbval does not look), student copies hide the solutions,
pages need neither network nor kernel."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import build_notebooks
import html_page
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILT = sorted((ROOT / "notebooks").glob("*.ipynb"))
TAGS = {"setup", "exercise", "check", "solution", "needs-solution", "slide"}
TAGS |= {"nbval-check-output", "nbval-ignore-output", "nbval-skip", "raises-exception"}
# nbval cannot follow outputs that change after they were first shown
LIVE = re.compile(r"clear_output|display_id|\binteract\(|\bOutput\(")
PRIVATE = re.compile(r"(?:/home|/root|/Users|/tmp|/var/folders)/\w|[A-Z]:\\\\?Users")


# --- the lessons in notebooks/ ---------------------------------------------------------------------------------------


def test_every_lesson_is_built_from_its_source_as_it_stands():
    assert build_notebooks.stale() == [], "run `python tasks.py notebooks`"


def complaints(notebook: nbformat.NotebookNode, size: int) -> list[str]:
    """What is wrong with a built notebook that nbval would not notice."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if size > 1_500_000:
        found.append(f"{size / 1e6:.1f} MB: shrink its figures, or what its widgets carry")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not run top to bottom in a fresh kernel")
    if not any("check" in cell.metadata.get("tags", []) for cell in code):
        found.append("no cell tagged check")
    for number, cell in enumerate(code, 1):
        tags = set(cell.metadata.get("tags", []))
        if tags - TAGS:
            found.append(f"cell {number}: unknown tag {', '.join(tags - TAGS)}")
        if "raises-exception" not in tags and any(output.output_type == "error" for output in cell.outputs):
            found.append(f"cell {number}: stores a traceback")
        if "nbval-check-output" in tags and not cell.outputs:
            found.append(f"cell {number}: promises an output and has none")
        if LIVE.search(cell.source) and "nbval-ignore-output" not in tags:
            found.append(f"cell {number}: needs the tag nbval-ignore-output")
        if PRIVATE.search(str(cell.outputs)):
            found.append(f"cell {number}: shows a path of the machine it ran on")
    return found


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)
def test_hygiene(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert complaints(notebook, path.stat().st_size) == []


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)
def test_stored_widgets_carry_the_scripts_of_this_checkout(path):
    """A notebook holds the JavaScript that it was built with, and so does its page."""
    from minivlp.visualize import widgets

    now = {str(kind._esm) for kind in vars(widgets).values() if hasattr(kind, "_esm")}
    assert len(now) == 5
    stored = nbformat.read(path, as_version=4).metadata.get("widgets", {}).get(build_notebooks.STATE, {})
    ours = {entry["state"]["_esm"] for entry in stored.get("state", {}).values() if "_esm" in entry.get("state", {})}
    assert ours <= now, "run `python tasks.py notebooks`: widgets have changed since"


# --- the tools, on a small lesson ------------------------------------------------------------------------------------

LESSON = r'''# %% [markdown]
# # A small lesson
# The loss is $-\log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}}$. See [the paper](https://example.org).
#
# $$ a_{ij} = \mathrm{softmax}(q_i^\top k_j) $$

# %% tags=["exercise"]
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION

# %% tags=["check"]
assert double(2) == 4
print("ok")

# %% tags=["check", "needs-solution"]
assert double(3) == 6
print("right")

# %% tags=["solution"]
print("for teachers only")

# %% [markdown]
# ## Things that move

# %%
import os
print(os.environ["MINIVLP_PROFILE"], os.path.basename(os.getcwd()))

# %%
from tqdm.auto import tqdm
for _ in tqdm(range(5)):
    pass

# %%
import anywidget, traitlets
class Counter(anywidget.AnyWidget):
    _esm = "export default { render({ model, el }) { el.textContent = '</script>' + model.get('n'); } };"
    n = traitlets.Int(3).tag(sync=True)
    data = traitlets.Bytes(b"\x01\x07").tag(sync=True)
    def __repr__(self):
        return "Counter()"
Counter()
'''


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A notebooks/ folder with one lesson, built."""
    folder = tmp_path_factory.mktemp("house") / "notebooks"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "01_small.py").write_text(LESSON, encoding="utf-8")
    build_notebooks.build(build_notebooks.sources(folder)[0])
    return folder


@pytest.fixture
def built(house):
    return nbformat.read(house / "01_small.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_built_notebook_is_run_in_the_quick_profile_beside_the_others(built):
    assert complaints(built, 0) == []
    assert "quick notebooks" in [cell.outputs[0].get("text", "").strip() for cell in code_cells(built)[1:6]]
    assert "BEGIN SOLUTION" not in str(built) and "return 2 * x" in code_cells(built)[0].source


def test_student_copy_hides_solutions_and_outputs(house):
    text = (house / "exercises" / "01_small.ipynb").read_text(encoding="utf-8")
    student = nbformat.reads(text, as_version=4)
    assert "SOLUTION" not in text and "2 * x" not in text and "for teachers only" not in text
    assert code_cells(student)[0].source.endswith("    raise NotImplementedError('your turn')")
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(student))
    may_fail = ["raises-exception" in cell.metadata.get("tags", []) for cell in code_cells(student)]
    assert may_fail == [False, False, True, *[False] * (len(may_fail) - 3)]


def test_links_of_the_student_copy_lead_to_the_same_files():
    text = "a [patch](../docs/glossary.md#patch), the [next lesson](02_vilt.ipynb), [code](https://example.org/../a)"
    lesson = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("'](../'")])
    student = build_notebooks.exercises(lesson)
    assert student.cells[0].source == text.replace("(../docs", "(../../docs")
    assert student.cells[1].source == "'](../'" and lesson.cells[0].source == text


def test_an_unpaired_marker_is_an_error():
    half = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("### BEGIN SOLUTION\nsecret = 1")])
    with pytest.raises(ValueError, match="do not pair up"):
        build_notebooks.exercises(half)


def test_building_again_changes_nothing(house):
    """No times, no random ids: a rebuilt notebook is the same file, so a diff shows only what changed."""
    before = {path: path.read_bytes() for path in house.rglob("*.ipynb")}
    build_notebooks.build(house / "src" / "01_small.py")
    rates = re.compile(rb"\[\d+:\d+[^\]]*\]")  # but for the times on a progress bar
    assert {path: rates.sub(b"", path.read_bytes()) for path in before} == {
        path: rates.sub(b"", text) for path, text in before.items()
    }
    assert not any(b"\r" in text or not text.endswith(b"}\n") for text in before.values())


def test_stale_notebooks_are_named(house, tmp_path):
    folder = shutil.copytree(house, tmp_path / "notebooks")
    assert build_notebooks.stale(folder) == []
    source = folder / "src" / "01_small.py"
    source.write_text(LESSON.replace('print("ok")', 'print("fine")'), encoding="utf-8")
    assert build_notebooks.stale(folder) == [
        "notebooks/01_small.ipynb is older than src/01_small.py",
        "exercises/01_small.ipynb is older than src/01_small.py",
    ]
    source.rename(folder / "src" / "02_new.py")
    assert build_notebooks.stale(folder) == [
        "02_new.ipynb is missing in notebooks/",
        "02_new.ipynb is missing in exercises/",
        "notebooks/01_small.ipynb has no source in src/",
        "exercises/01_small.ipynb has no source in src/",
    ]


def test_a_cell_keeps_its_id_when_others_come_and_go(tmp_path):
    path = tmp_path / "01_small.py"
    path.write_text(LESSON, encoding="utf-8")
    before = {cell.source: cell.id for cell in build_notebooks.load(path).cells}
    path.write_text("# %%\nnew = 1\n\n" + LESSON, encoding="utf-8")
    after = {cell.source: cell.id for cell in build_notebooks.load(path).cells}
    assert before.items() <= after.items() and len(set(after.values())) == len(after)


def test_a_lesson_that_is_not_there(house):
    for only in ("01", "01_small"):
        assert [path.stem for path in build_notebooks.sources(house, only)] == ["01_small"]
    assert [path.stem for path in build_notebooks.sources(only="your_own")] == ["your_own_pictures"]
    with pytest.raises(SystemExit, match="no lesson 07. There are: 01_small"):
        build_notebooks.sources(house, "07")


def test_a_failing_lesson_is_named_and_writes_nothing(tmp_path):
    source = tmp_path / "notebooks" / "src" / "01_bad.py"
    source.parent.mkdir(parents=True)
    source.write_text("# %%\nraise ValueError('no sprites')\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no sprites(.|\n)*01_bad"):
        build_notebooks.build(source)
    assert list(tmp_path.rglob("*.ipynb")) == []


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ({"tags": ["chekc"]}, "unknown tag chekc"),
        ({"tags": ["nbval-check-output"]}, "promises an output"),
        ({"source": "clear_output()"}, "nbval-ignore-output"),
        ({"execution_count": 7}, "not run top to bottom"),
        ({"outputs": [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]}, "stores a traceback"),
        ({"outputs": [nbformat.v4.new_output("stream", text="/home/ada/minivlp/x.png")]}, "path of the machine"),
        ({}, "no cell tagged check"),
    ],
)
def test_hygiene_sees(cell, words):
    """Each rule of the hygiene test, on a notebook that breaks it."""
    made = nbformat.v4.new_code_cell(cell.get("source", "x = 1"), execution_count=cell.get("execution_count", 1))
    made.metadata.tags, made.outputs = cell.get("tags", []), cell.get("outputs", [])
    assert words in "; ".join(complaints(nbformat.v4.new_notebook(cells=[made]), 10))


# --- pages -----------------------------------------------------------------------------------------------------------


class Loads(HTMLParser):
    """Collects what a browser would fetch by itself when it opens a page: links to follow are not among them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = re.findall(r"url\(\s*['\"]?((?:https?:)?//[^)]*)", page)
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        values = dict(attributes)
        address = values.get("href" if tag == "link" else "src") if tag != "a" else None
        if address and not address.startswith(("data:", "#")):
            self.found.append(address)

    def handle_data(self, data):
        if self.inside == "script":
            self.found += re.findall(r"https?://[^\s'\"]+", data)


@pytest.mark.parametrize("slides", [False, True])
def test_page_needs_no_other_machine(house, built, slides):
    page = html_page.page(built, "01_small", house, slides=slides)
    assert Loads(page).found == []
    assert "https://example.org" in page  # a link for the reader stays
    assert page.count("<math") == 2 and "$" not in re.sub(r"(?s)<(script|style).*?</\1>", "", page)


def test_page_keeps_widgets_alive_and_writes_progress_out(house, built):
    page = html_page.page(built, "01_small", house)
    assert '<div class="live-widget"' in page
    state = re.search(r'(?s)<script type="application/json" id="widget-state">(.*?)</script>', page)
    assert "<" not in state[1]  # whatever a widget holds, the browser reads the whole of the page
    (entry,) = json.loads(state[1]).values()
    assert entry["state"]["n"] == 3 and "</script>" in entry["state"]["_esm"]
    assert entry["buffers"][0]["path"] == ["data"]
    assert re.search(r'<progress max="5[.0]*" value="5[.0]*">', page)


def test_loads_would_see_a_cdn():
    page = '<script src="https://cdn.example/x.js"></script><script>import("https://cdn.example/y.js")</script>'
    assert len(Loads(page + '<link href="https://cdn.example/z.css"><img src="a.png">').found) == 4
