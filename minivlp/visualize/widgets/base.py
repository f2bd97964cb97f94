"""What all widgets share."""

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
    """What our four widgets share: one style sheet, a short name in text, a still picture beside the live view."""

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
def told(widget: Widget, trait: str, question: dict[str, Any]) -> Iterator[None]:
    """Show an error in the widget: a callback has no cell whose output it could appear in."""
    try:
        yield
    except Exception as error:
        setattr(widget, trait, {**question, "problem": f"{type(error).__name__}: {error}"})
