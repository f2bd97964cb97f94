"""Widgets in one HTML file that needs neither a kernel nor a network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivlp.visualize.widgets import STATIC, Widget

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 900px; margin: 24px auto; padding: 0 16px; font-family: system-ui, sans-serif; }}
body {{ background: #fff; color: #1c1e21; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #17191c; color: #e6e8eb; }} }}
.live-widget {{ margin: 0 0 36px; }}
.live-widget img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
{places}
<script type="application/json" id="widget-state">{state}</script>
<script type="module">
{loader}</script>
</body>
</html>
"""


def save_page(widgets: Sequence[Widget], path: Path | str, title: str = "minivlp") -> Path:
    """Write one self-contained HTML file in which the widgets work without a kernel and without a network.

    What needs the kernel (a phrase that was not asked before, free text) is missing; the widgets say so.
    """
    path = Path(path)
    state = {widget.model_id: stored(widget) for widget in widgets}
    text = PAGE.format(
        title=html.escape(title),
        places="\n".join(map(placeholder, widgets)),
        state=script_json(state),
        loader=(STATIC / "page.js").read_text(encoding="utf-8"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def script_json(value: Any) -> str:
    """JSON that can stand inside a <script> element: no text in it can end the element or open a comment.

    It is pure ASCII, so U+2028 and U+2029, which end a line of JavaScript, are escaped too.
    """
    return json.dumps(value, sort_keys=True).replace("<", "\\u003c")


def stored(widget: Widget) -> dict[str, Any]:
    """A widget's values as a notebook stores them: JSON, and bytes in base64 beside it."""
    values = {name: widget.trait_values()[name] for name in widget.keys if not name.startswith("_")}
    values |= {"_esm": widget._esm, "_css": widget._css}
    buffers = {name: value for name, value in values.items() if isinstance(value, bytes)}
    return {
        "state": {k: v for k, v in values.items() if k not in (*buffers, "layout", "tabbable", "tooltip", "comm")},
        "buffers": [
            {"path": [name], "data": base64.b64encode(value).decode("ascii"), "encoding": "base64"}
            for name, value in buffers.items()
        ],
    }


def placeholder(widget: Widget) -> str:
    """The place of a widget, with its still picture until the script has run."""
    picture = base64.b64encode(widget.to_png()).decode("ascii")
    still = f'<img alt="{html.escape(repr(widget))}" src="data:image/png;base64,{picture}">'
    return f'<div class="live-widget" data-model="{widget.model_id}">{still}</div>'
