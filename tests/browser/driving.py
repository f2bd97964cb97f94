"""How the tests drive a page: point, drag, read, and watch that nothing goes wrong meanwhile."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import nbformat

PATIENCE = 120_000  # milliseconds until something is given up that usually takes a second: test machines are busy
SHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"


@contextmanager
def watched(browser, home: str, **options):
    """A page; fails at the end if a script failed in it, or if it asked anyone but `home` for anything."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
    page.on("request", lambda r: r.url.startswith((home, "data:", "blob:")) or wrong.append(f"request to {r.url}"))
    page.on("websocket", lambda s: s.url.startswith(home.replace("http", "ws")) or wrong.append(f"socket to {s.url}"))
    yield page
    context.close()
    assert not wrong


@contextmanager
def in_lab(browser, lab, notebook, name: str, patience: int = PATIENCE):
    """The notebook, opened in JupyterLab, all its cells running."""
    address, root = lab
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, root / name)
    with watched(browser, address, viewport={"width": 1180, "height": 1150}) as page:
        page.goto(f"{address}/lab/tree/{name}?reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=patience)
        page.wait_for_function(
            "() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=patience
        )
        page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")  # not awaited
        yield page


def at(canvas, x: float, y: float) -> tuple[float, float]:
    """A place in the picture, in fractions, as a place on the screen."""
    for _ in range(20):  # JupyterLab takes a cell off the page and puts it back while others grow
        canvas.scroll_into_view_if_needed()
        if (box := canvas.bounding_box()) is not None:
            break
        canvas.page.wait_for_timeout(250)
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def drag(page, canvas, start, end) -> None:
    page.mouse.move(*at(canvas, *start))
    page.mouse.down()
    page.mouse.move(*at(canvas, *[(a + b) / 2 for a, b in zip(start, end, strict=True)]))
    page.mouse.move(*at(canvas, *end))
    page.mouse.up()


def expect(what):
    """Playwright's, with our patience."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    return expect(what)


def says(widget, text: str) -> None:
    """Wait until the widget's line in words holds `text`."""
    expect(widget.get_by_role("status")).to_contain_text(text)


def near(found: str, box) -> bool:
    return all(abs(a - b) < 0.02 for a, b in zip(json.loads(found), box, strict=True))


def contrasts(page) -> list[float]:
    """WCAG contrast of each widget's words with the ground they stand on; 4.5 is asked for."""
    return page.evaluate(
        """() => {
          const parse = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return n.length === 4 && n[3] === 0 ? null : n.slice(0, 3); };
          const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const ground = (e) => (e ? parse(getComputedStyle(e).backgroundColor) ?? ground(e.parentElement) : [255, 255, 255]);
          return [...document.querySelectorAll(".mvlp :is(.mvlp-hint, .mvlp-status, .mvlp-word, .mvlp-caption, h4, .mvlp-value, th, .mvlp-board p, select)")]
            .filter((e) => e.textContent.trim()).map((e) => {
              const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
              return (a + 0.05) / (b + 0.05);
            });
        }"""  # noqa: E501
    )
