"""Importing minivlp stays cheap: the large libraries are loaded by the functions that need them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"transformers", "timm", "matplotlib"}
PROBE = """
import importlib, json, sys
from pathlib import Path
import minivlp
loaded = {"minivlp": sorted({name.split(".")[0] for name in sys.modules})}
def room(name): return "minivlp.visualize" if name.startswith("minivlp.visualize") else "the rest"
home = Path(minivlp.__file__).parent
files = (file.relative_to(home.parent).with_suffix("") for file in home.rglob("*.py"))
names = sorted((".".join(file.parts).removesuffix(".__init__") for file in files), key=room, reverse=True)
for name in names:  # visualize last: it may load matplotlib
    importlib.import_module(name)
    loaded[room(name)] = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Top-level modules in a fresh Python after `import minivlp`, after every module, and after visualize too."""
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {stage: set(names) for stage, names in json.loads(done.stdout).items()}


def test_import_minivlp_loads_nothing_large(loaded):
    assert not loaded["minivlp"] & (HEAVY | {"torch", "torchvision"})


def test_no_module_loads_them(loaded):
    assert "torch" in loaded["the rest"]  # the probe did import the modules
    assert not loaded["the rest"] & HEAVY


def test_visualize_may_draw_and_nothing_else(loaded):
    assert not loaded["minivlp.visualize"] & {"transformers", "timm"}
