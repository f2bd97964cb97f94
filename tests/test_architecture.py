"""The code follows the arrows in docs/architecture.md: nothing imports upward, and no imports are circular."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARROW = re.compile(r"^minivlp/(\S+?)/?[^\S\n]+──►[^\S\n]+(.+?)(?:[^\S\n]{2,}(.*))?$", re.MULTILINE)


def modules() -> dict[str, Path]:
    """Dotted name -> file, for the whole package."""
    found = {}
    for path in sorted((ROOT / "minivlp").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def drawing() -> list[tuple[str, str, str]]:
    """(room, what it may import, remark) of each line of the drawing that has an arrow."""
    lines = ARROW.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    return [("minivlp." + room.removesuffix(".py"), targets, remark) for room, targets, remark in lines]


def arrows() -> dict[str, set[str]]:
    """Room -> what it may import, as dotted names."""
    allowed = {}
    for room, targets, _ in drawing():
        plain = re.sub(r"\(.*?\)", "", targets)
        names = [] if "nothing of ours" in plain else [f"minivlp.{name.strip()}" for name in plain.split(",")]
        allowed[room] = set(names)
    return allowed


def everywhere() -> set[str]:
    """What every room may import: the version, and what the drawing says so of (strings, and the hardware)."""
    return {"minivlp", "minivlp.papers"} | {room for room, _, remark in drawing() if "every room may" in remark}


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Our modules that a module imports anywhere in its code, each as the longest name that is a module."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    targets = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            targets += [f"{base}.{alias.name}" for alias in node.names]
    ours = [target for target in targets if target.split(".")[0] == "minivlp"]
    return {target if target in known else target.rpartition(".")[0] for target in ours} - {name}


def graph() -> dict[str, set[str]]:
    found = modules()
    return {name: imports(name, path, set(found)) for name, path in found.items()}


def room_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def forbidden(graph: dict[str, set[str]], allowed: dict[str, set[str]]) -> list[str]:
    """Imports for which there is no arrow."""
    problems = []
    for name, targets in graph.items():
        for target in sorted(targets - everywhere()):
            if not within(target, {room_of(name)} | allowed.get(room_of(name), set())):
                problems.append(f"{name} imports {target}")
    return problems


def test_every_room_is_in_the_drawing():
    rooms = {room_of(name) for name in modules()} - {"minivlp"}
    assert rooms == set(arrows()), "draw it in docs/architecture.md, with what it may import"


def test_arrows_point_to_what_there_is():
    targets = {target for of_room in arrows().values() for target in of_room}
    assert targets <= {".".join(name.split(".")[:n]) for name in modules() for n in (2, 3)}


def test_what_every_room_may_import_imports_nothing_of_ours():
    """At any time, not only when it is imported: `papers` names classes by strings."""
    below = everywhere() - {"minivlp"}
    assert {"minivlp.papers", "minivlp.device"} <= below
    assert all(not targets - {"minivlp"} for name, targets in graph().items() if within(name, below))


def test_papers_are_found_without_importing_a_model():
    """A fresh interpreter lists them in a moment: no torch, no transformers."""
    code = "import sys; from minivlp.papers import PAPERS; assert PAPERS; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    ours = {name for name in loaded.stdout.split() if name.split(".")[0] == "minivlp"}
    assert ours == {"minivlp", "minivlp.papers"} and "torch" not in loaded.stdout.split()


def test_imports_follow_the_arrows():
    assert forbidden(graph(), arrows()) == []


def test_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail("circular imports: " + " → ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("from minivlp.models.clip import CLIP", False),  # upward
        ("def late():\n    import minivlp.training.loop", False),  # upward, hidden in a function
        ("from ..models import clip", False),  # upward, relative
        ("from minivlp import evaluation", False),
        ("from minivlp.layers.attention import Attention", True),
        ("from minivlp.layers import transformer", False),  # visualize may import layers.attention only
        ("from minivlp.layers.transformer import Block", False),
        ("from . import drawing", True),
        ("from minivlp.device import device", True),
        ("from minivlp.papers import PAPERS", True),
        ("from minivlp import __version__", True),
        ("import numpy.random", True),
    ],
)
def test_what_an_arrow_allows(tmp_path, code, allowed):
    """All forms of imports are recognized, here from a module in visualize/."""
    path = tmp_path / "widgets.py"
    path.write_text(code)
    known = set(modules()) | {"minivlp.visualize.drawing", "minivlp.training.loop", "minivlp.models.clip"}
    edges = {"minivlp.visualize.widgets": imports("minivlp.visualize.widgets", path, known)}
    drawn = {"minivlp.visualize": {"minivlp.layers.attention", "minivlp.data"}}
    assert (forbidden(edges, drawn) == []) is allowed
