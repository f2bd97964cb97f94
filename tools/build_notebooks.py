"""One source, several notebooks: notebooks/src/NAME.py (jupytext's percent format) is the only form edited by hand.

    python tools/build_notebooks.py                  build notebooks/NAME.ipynb (run, profile quick) and the student
                                                     copies in notebooks/exercises
    python tools/build_notebooks.py --check          fail if a built notebook is stale; runs nothing
    python tools/build_notebooks.py --html           run in the reader's profile and write build/NAME.html instead
    python tools/build_notebooks.py --slides         the same as build/NAME.slides.html
    ... --only 01                                    one lesson, by the beginning of its name

The built notebooks are run with MINIVLP_PROFILE=quick, as the tests run them, so that nbval compares outputs of the
same profile. In a source, what stands between `### BEGIN SOLUTION` and `### END SOLUTION` is for the student to write;
a cell tagged `solution` is missing from the student's copy, and one tagged `needs-solution` may fail there.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from minivlp.console import print_in_any_encoding

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
STATE = "application/vnd.jupyter.widget-state+json"
STUB = "{indent}raise NotImplementedError('your turn')"
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", re.DOTALL | re.MULTILINE)
MARKER = re.compile(r"^[ \t]*### (?:BEGIN|END) SOLUTION(?:\n|\Z)", re.MULTILINE)


def load(source: Path) -> NotebookNode:
    """The lesson as a notebook without outputs. A cell's id depends on its text alone, so that diffs stay small."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    times: dict[str, int] = {}
    for cell in notebook.cells:
        times[cell.source] = times.get(cell.source, 0) + 1
        key = f"{source.stem}/{times[cell.source]}/{cell.source}"
        cell.id = hashlib.sha256(key.encode()).hexdigest()[:12]
        cell.metadata.pop("lines_to_next_cell", None)
    return notebook


def solved(notebook: NotebookNode) -> NotebookNode:
    """The lesson with its solutions in place and their markers gone."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        cell.source = MARKER.sub("", cell.source).rstrip("\n")
    return notebook


def exercises(notebook: NotebookNode) -> NotebookNode:
    """The student's copy: solutions replaced by a stub, cells tagged `solution` left out. It stands one folder deeper
    than the lesson, and so do its links to other folders.

    Raises ValueError for a marker without its partner, which would give the solution away.
    """
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", "](../../")
        if "needs-solution" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("raises-exception")  # "run all" goes on behind an exercise that is not written
        cell.source = SOLUTION.sub(lambda found: STUB.format(indent=found[1]), cell.source)
        if MARKER.search(cell.source):
            raise ValueError(f"BEGIN SOLUTION and END SOLUTION do not pair up in this cell:\n{cell.source}")
    return notebook


def execute(notebook: NotebookNode, environment: dict[str, str], folder: Path = NOTEBOOKS) -> NotebookNode:
    """Run all cells top to bottom in a fresh kernel in `folder`; outputs and widget states are kept, times are not.

    Raises nbclient's CellExecutionError if a cell fails.
    """
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)

    def show_progress(cell: NotebookNode, cell_index: int) -> None:
        print(f"\r  cell {cell_index + 1} of {len(notebook.cells)}", end="", file=sys.stderr, flush=True)

    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        on_cell_execute=show_progress,
    )
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    try:
        client.execute(env=os.environ | backend | environment)
    finally:
        print(file=sys.stderr)
    widgets = notebook.metadata.get("widgets")
    notebook.metadata = nbformat.from_dict(METADATA | ({"widgets": widgets} if widgets else {}))
    return notebook


def text_of(notebook: NotebookNode) -> str:
    """The notebook as it is written to disk. Widgets' random ids become their numbers in order of creation."""
    text = nbformat.writes(notebook, version=4)
    for number, name in enumerate(notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})):
        text = text.replace(name, f"{number:032x}")
    return nbformat.writes(nbformat.reads(text, as_version=4)).rstrip("\n") + "\n"  # read again: keys in their order


def write(path: Path, text: str) -> None:
    """UTF-8 with '\\n' line ends on every platform."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    print(path)


def sources(folder: Path = NOTEBOOKS, only: str | None = None) -> list[Path]:
    """The lessons' sources, or the one whose name begins with `only` ("01", "your_own"). Exits with a list if there is
    none."""
    found = sorted((folder / "src").glob("*.py"))
    chosen = [path for path in found if only is None or path.stem == only or path.stem.startswith(f"{only}_")]
    if only is not None and not chosen:
        sys.exit(f"There is no lesson {only}. There are: {', '.join(path.stem for path in found) or 'none yet'}.")
    return chosen


def skeleton(notebook: NotebookNode) -> list[tuple]:
    """What must agree between a source and its built notebook: everything but outputs."""
    return [(cell.cell_type, cell.id, cell.source, dict(cell.metadata)) for cell in notebook.cells]


def stale(folder: Path = NOTEBOOKS) -> list[str]:
    """Built notebooks that are missing, differ from their source in more than outputs, or have no source any more."""
    problems, names = [], set()
    for source in sources(folder):
        lesson = load(source)
        names.add(source.stem)
        built = {folder / f"{source.stem}.ipynb": solved, folder / "exercises" / f"{source.stem}.ipynb": exercises}
        for path, make in built.items():
            if not path.exists():
                problems.append(f"{path.name} is missing in {path.parent.name}/")
            elif skeleton(nbformat.read(path, as_version=4)) != skeleton(make(lesson)):
                problems.append(f"{path.parent.name}/{path.name} is older than src/{source.name}")
    for path in [*folder.glob("*.ipynb"), *folder.glob("exercises/*.ipynb")]:
        if path.stem not in names:
            problems.append(f"{path.parent.name}/{path.name} has no source in src/")
    return problems


def run(source: Path, notebook: NotebookNode, environment: dict[str, str]) -> NotebookNode:
    """`execute`, with an exit that names the lesson if a cell fails."""
    print(f"running {source.stem}", file=sys.stderr)
    try:
        return execute(notebook, environment, source.parents[1])
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        sys.exit(f"{error}\nLesson {source.stem} stopped at the cell above; nothing was written.")


def build(source: Path) -> None:
    """Write the lesson's built notebook and its student copy."""
    lesson = load(source)
    student = exercises(lesson)
    ran = run(source, solved(lesson), {"MINIVLP_PROFILE": "quick"})
    folder = source.parents[1]
    write(folder / f"{source.stem}.ipynb", text_of(ran))
    write(folder / "exercises" / f"{source.stem}.ipynb", text_of(student))


def publish(source: Path, slides: bool) -> None:
    """Run the lesson in the reader's profile and leave it as one HTML file in build/."""
    from html_page import page  # only a page needs nbconvert

    ran = run(source, solved(load(source)), {})
    ending = "slides.html" if slides else "html"
    write(ROOT / "build" / f"{source.stem}.{ending}", page(ran, source.stem, source.parents[1], slides))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the lessons from notebooks/src.")
    parser.add_argument("--only", metavar="NAME", help="one lesson, by its number or the beginning of its name")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--check", action="store_true", help="fail if a built notebook is stale; run nothing")
    form.add_argument("--html", action="store_true", help="run in MINIVLP_PROFILE (default laptop), write build/*.html")
    form.add_argument("--slides", action="store_true", help="the same as slides, build/*.slides.html")
    asked = parser.parse_args(arguments)

    if asked.check:
        problems = stale()
        if problems:
            sys.exit("\n".join(["Run `python tasks.py notebooks`:", *problems]))
        return
    for source in sources(only=asked.only):
        if asked.html or asked.slides:
            publish(source, slides=asked.slides)
        else:
            build(source)


if __name__ == "__main__":
    print_in_any_encoding()
    main()
