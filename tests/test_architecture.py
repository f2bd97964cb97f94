"""The code holds to the arrows in docs/architecture.md: nothing imports upwards, nothing goes round in a circle."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARROW = re.compile(r"^minivlp/(\S+?)/?\s+──►\s+(.+?)(?:\s{2,}.*)?$", re.MULTILINE)
EVERYWHERE = {"minivlp", "minivlp.machine"}  # the version, and what the machine can do: below every room


def modules() -> dict[str, Path]:
    """Dotted name to file, for the whole package."""
    found = {}
    for path in sorted((ROOT / "minivlp").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows() -> dict[str, set[str]]:
    """Room to what it may import, as dotted names, read from the drawing in docs/architecture.md."""
    drawing = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    allowed = {}
    for room, targets in ARROW.findall(drawing):
        plain = re.sub(r"\(.*?\)", "", targets)
        names = [] if "nothing of ours" in plain else [f"minivlp.{name.strip()}" for name in plain.split(",")]
        allowed["minivlp." + room.removesuffix(".py")] = set(names)
    return allowed


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
        for target in sorted(targets - EVERYWHERE):
            if not within(target, {room_of(name)} | allowed.get(room_of(name), set())):
                problems.append(f"{name} imports {target}")
    return problems


def test_every_room_is_in_the_drawing():
    rooms = {room_of(name) for name in modules()} - EVERYWHERE
    assert rooms <= set(arrows()), "draw it in docs/architecture.md, with what it may import"


def test_imports_follow_the_arrows():
    assert forbidden(graph(), arrows()) == []


def test_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail("imports go round: " + " → ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("from minivlp.models.clip import CLIP", False),  # upwards
        ("def late():\n    import minivlp.training.loop", False),  # upwards, hidden in a function
        ("from ..models import clip", False),  # upwards, relative
        ("from minivlp import evaluation", False),
        ("from minivlp.layers.attention import Attention", True),
        ("from minivlp.layers import block", False),  # only layers.attention is allowed to visualize
        ("from . import drawing", True),
        ("from minivlp.machine import device", True),
        ("import numpy.random", True),
    ],
)
def test_what_an_arrow_allows(tmp_path, code, allowed):
    """The reader of imports sees every form of them: here from a module in visualize/."""
    path = tmp_path / "widgets.py"
    path.write_text(code)
    known = set(modules()) | {"minivlp.visualize.drawing", "minivlp.training.loop", "minivlp.models.clip"}
    edges = {"minivlp.visualize.widgets": imports("minivlp.visualize.widgets", path, known)}
    drawn = {"minivlp.visualize": {"minivlp.layers.attention", "minivlp.data"}}
    assert (forbidden(edges, drawn) == []) is allowed
