"""Libraries that only some data need: imported when they are, with a clear error where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from minivlp.data.validation import DataError


def library(name: str, kind: str) -> ModuleType:
    """The module. Raises DataError that says how to install what data of this kind need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = "Install it with: pip install 'minivlp[stored]'"
        raise DataError(f"{kind}: data need the Python package {name} here, which is missing. {remedy}") from error
