"""A run notebook as one HTML file that needs neither network nor kernel.

nbconvert draws the cells; what it would fetch from a CDN is replaced: formulas become MathML, our own widgets come
alive by minivlp's page.js from the state that the notebook stores, Jupyter's own (progress bars) are written out.
"""

from __future__ import annotations

import copy
import html
from pathlib import Path

from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from minivlp.visualize.page import script_json

HERE = Path(__file__).resolve().parent
LIVE_WIDGETS = HERE.parent / "minivlp" / "visualize" / "static" / "page.js"
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
# The lab page without the scripts it would load from elsewhere, and in the dark where the reader's system is dark.
TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block notebook_css -%}
{{ super() }}
<style media="(prefers-color-scheme: dark)">
{{ resources.include_css("static/theme-dark.css") | striptags }}
</style>
<style>
body { max-width: 62rem; margin: 0 auto; }
math { font-size: 1.15em; }
.jp-InputArea-editor { overflow-x: auto; }
</style>
{%- endblock -%}
"""


class MathRenderer(IPythonRenderer):
    """Writes formulas as MathML, which browsers draw by themselves."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def multiline_math(self, text: str) -> str:
        return convert(text.strip().strip("$"), display="block")


class PageExporter(HTMLExporter):
    """nbconvert's HTML without any address of another machine."""

    def markdown2html(self, source: str) -> str:
        renderer = MathRenderer(escape=False, embed_images=True, path=self.folder, exclude_anchor_links=True)
        return MarkdownWithMath(renderer=renderer).render(source)


def page(notebook: NotebookNode, name: str, folder: Path, slides: bool = False) -> str:
    """The HTML of a run notebook. `folder` is where its relative pictures lie; `slides` shows it one step at a time."""
    notebook = copy.deepcopy(notebook)
    states = notebook.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})
    alive = {}
    for cell in notebook.cells:
        if slides and opens_slide(cell):
            cell.metadata.setdefault("tags", []).append("slide")
        for output in cell.get("outputs", []):
            if VIEW in output.get("data", {}):
                model = output.data.pop(VIEW)["model_id"]
                if "_esm" in states.get(model, {}).get("state", {}):
                    alive[model] = states[model]
                    output.data = {"text/html": stand_in(model, output.data)}
                elif "image/png" not in output.data:
                    output.data = {"text/html": written_out(model, states) or html.escape(output.data["text/plain"])}
    exporter = PageExporter(raw_template=TEMPLATE)
    exporter.folder = str(folder)
    exporter.register_filter("markdown2html", exporter.markdown2html)
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": name, "path": str(folder)}})
    scripts = []
    if alive:
        state = f'<script type="application/json" id="widget-state">{script_json(alive)}</script>'
        scripts += [state, script(LIVE_WIDGETS)]
    if slides:
        scripts.append(script(HERE / "page_slides.js"))
    before, end = body.rsplit("</body>", 1)
    return before + "\n".join(scripts) + "</body>" + end


def opens_slide(cell: NotebookNode) -> bool:
    """A slide begins where the lesson says so, else with each title and section."""
    kind = cell.metadata.get("slideshow", {}).get("slide_type")
    return kind == "slide" if kind else cell.cell_type == "markdown" and cell.source.startswith(("# ", "## "))


def script(path: Path) -> str:
    return f'<script type="module">\n{path.read_text(encoding="utf-8")}</script>'


def stand_in(model: str, data: dict) -> str:
    """Where a widget will stand, with its picture until it does."""
    text = html.escape(data.get("text/plain", "widget"))
    picture = data.get("image/png", "").replace("\n", "")
    inside = f'<img alt="{text}" src="data:image/png;base64,{picture}">' if picture else f"<pre>{text}</pre>"
    return f'<div class="live-widget" data-model="{model}">{inside}</div>'


def written_out(model: str, states: dict) -> str:
    """One of Jupyter's own widgets as plain HTML: texts and progress bars, boxes by their children; else nothing."""
    entry = states.get(model, {})
    state, kind = entry.get("state", {}), entry.get("model_name", "")
    if kind in ("HTMLModel", "HTMLMathModel"):
        return f"<span>{state.get('value', '')}</span>"
    if kind == "LabelModel":
        return f"<span>{html.escape(state.get('value', ''))}</span>"
    if kind in ("FloatProgressModel", "IntProgressModel"):
        value, most = (html.escape(str(state.get(*default))) for default in (("value", 0), ("max", 100)))
        return f'<progress value="{value}" max="{most}"></progress>'
    children = [child.removeprefix("IPY_MODEL_") for child in state.get("children", [])]
    inside = " ".join(filter(None, (written_out(child, states) for child in children)))
    return f"<div>{inside}</div>" if inside else ""
