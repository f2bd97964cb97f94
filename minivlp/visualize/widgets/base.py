"""What all widgets have in common."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anywidget

STATIC = Path(__file__).resolve().parents[1] / "static"


def source(name: str) -> str:
    """The JavaScript of one widget: the shared part, then its own."""
    return "\n".join((STATIC / file).read_text(encoding="utf-8") for file in ("common.js", f"{name}.js"))


class Widget(anywidget.AnyWidget):
    """A widget with our style sheet; a notebook also stores its `repr` and a still picture beside the live view."""

    _css = (STATIC / "widgets.css").read_text(encoding="utf-8")

    def to_png(self) -> bytes:
        """The still picture, as the bytes of a PNG."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        live = super()._repr_mimebundle_(**kwargs)
        data, metadata = live if isinstance(live, tuple) else (live, {})
        still = base64.b64encode(self.to_png()).decode("ascii")
        return {**data, "text/plain": repr(self), "image/png": still}, metadata


@contextmanager
def show_errors(widget: Widget, trait: str, question: dict[str, Any]) -> Iterator[None]:
    """Show an error of the block in the widget, as `problem` in `trait`: a callback has no cell to show it in."""
    try:
        yield
    except Exception as error:
        setattr(widget, trait, {**question, "problem": f"{type(error).__name__}: {error}"})
