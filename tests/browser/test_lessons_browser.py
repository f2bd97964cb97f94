"""The widgets of real lessons, driven as a reader drives them: in JupyterLab with a kernel, and on the lesson's page
without one. Screenshots stay in build/screenshots/."""

from __future__ import annotations

import json
import re
from pathlib import Path

import html_page
import nbformat
import pytest
from driving import PATIENCE, SHOTS, at, contrasts, drag, expect, in_lab, says, watched
from lesson import WIDGETS, widget_cells

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
LESSONS = ["01_clip", "05_blip", "06_capfilt", "07_xvlm"]
WITHOUT_CURVES = {"06_capfilt"}  # a lesson whose models train without a live curve
TRAINING = "recipe.settings(), on_step=[curves.log_row]"
SLOW = 5 * PATIENCE  # for the cells of a lesson
ALL_RUN = """() => document.querySelector('[data-mime-type="application/vnd.jupyter.error"]') ||
    [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every((p) => /\\[\\d+\\]/.test(p.textContent))"""
CLASSES = {
    "AttentionViewer": "attention",
    "FilterBoard": "filter",
    "Grounder": "grounder",
    "LiveCurves": "training",
    "RetrievalBrowser": "retrieval",
}


@pytest.fixture(scope="module", params=LESSONS)
def opened(request, lab, chromium):
    """(name, page, kinds of widget): the lesson's widget cells in JupyterLab, all running in profile quick. Training is
    made so long that it does not end before it is stopped."""
    name = request.param
    notebook = widget_cells(NOTEBOOKS / "src" / f"{name}.py")
    trained = [cell for cell in notebook.cells if TRAINING in cell.source]
    expected = 0 if name in WITHOUT_CURVES else 1
    assert len(trained) == expected, "a lesson has one cell that trains with curves, or none"
    for cell in trained:
        cell.source = cell.source.replace(TRAINING, "recipe.settings(steps=5000), on_step=[curves.log_row]")
    shown = {
        kind
        for kind in WIDGETS
        for cell in notebook.cells
        if re.search(rf"^(?!from|import).*\b{kind}\b", cell.source, re.M)
    }
    with in_lab(chromium, lab, notebook, f"{name}.ipynb", patience=SLOW) as page:
        yield name, page, shown


def test_only_what_the_widgets_need_is_run(tmp_path):
    (tmp_path / "09_x.py").write_text(LESSON, encoding="utf-8")
    kept = [cell.source.split(" =")[0] for cell in widget_cells(tmp_path / "09_x.py").cells]
    assert kept == [
        "from a import Grounder",
        "size",
        "def find(phrase):\n    return table[phrase]",
        "table",
        "picture",
        "if size",
        "Grounder(picture, find)",
    ]


LESSON = """# %%
from a import Grounder

# %%
size = 3

# %%
rows = [row for row in range(9)]  # of another example

# %%
def find(phrase):
    return table[phrase]

# %%
picture = "an older one"

# %%
table = {"a dog": size}

# %%
picture = [size for rows in table]
rows = picture

# %%
if size == 3:
    picture = rows = picture[1:]

# %%
print("seen", find("a dog"))

# %%
Grounder(picture, find)
"""


def test_training_is_watched_and_stopped(opened):
    name, page, _ = opened
    if name in WITHOUT_CURVES:
        pytest.skip("no live curve in this lesson")
    curves = page.locator(".mvlp-training")
    curves.wait_for(timeout=SLOW)
    page.wait_for_function("() => +document.querySelector('.mvlp-training').dataset.steps > 3", timeout=SLOW)
    page.locator('[data-command="notebook:interrupt-kernel"]').first.click()
    says(curves, "Stopped by you; the history is kept.")
    lines = curves.locator("path.mvlp-line")
    straight = lines.first.get_attribute("d")
    curves.get_by_label("log axis").check()
    assert lines.first.get_attribute("d") != straight
    curves.get_by_label("Smooth").fill("0.2")
    expect(lines).to_have_count(2 * curves.get_by_role("group").get_by_role("button").count())
    page.mouse.move(*at(curves.locator("svg.mvlp-chart"), 0.15, 0.5))
    says(curves, "Step ")
    curves.screenshot(path=SHOTS / f"lesson_{name}_curves.png")


def test_every_widget_of_the_lesson_answers(opened):
    name, page, shown = opened
    page.wait_for_function(ALL_RUN, timeout=SLOW)
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts() == []
    for kind in sorted(shown):
        widget = page.locator(f".mvlp-{CLASSES[kind]}")
        expect(widget).not_to_have_count(0)
        for index in range(widget.count()):
            DRIVE[kind](page, widget.nth(index), live=True)
            widget.nth(index).screenshot(path=SHOTS / f"lesson_{name}_{CLASSES[kind]}{index or ''}.png")
    assert min(contrasts(page)) > 4.5


@pytest.mark.parametrize("name", LESSONS)
def test_the_page_of_the_lesson_is_alive_without_a_kernel(name, chromium, tmp_path):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    file = tmp_path / f"{name}.html"
    file.write_text(html_page.page(notebook, name, NOTEBOOKS), encoding="utf-8")
    with watched(chromium, file.as_uri(), viewport={"width": 1100, "height": 1000}) as page:
        page.goto(file.as_uri())
        page.wait_for_function(
            "() => [...document.querySelectorAll('.live-widget')].every((e) => 'alive' in e.dataset)"
        )
        found = 0
        for kind, drive in DRIVE.items():
            widget = page.locator(f".mvlp-{CLASSES[kind]}")
            for index in range(widget.count()):
                drive(page, widget.nth(index), live=False)
                widget.nth(index).screenshot(path=SHOTS / f"page_{name}_{CLASSES[kind]}{index or ''}.png")
                found += 1
        assert found == page.locator(".live-widget").count() > 0
        assert min(contrasts(page)) > 4.5


def drive_curves(page, curves, live):
    """What can be done to curves that no longer grow."""
    says(curves, "Step ")
    lines = curves.locator("path.mvlp-line")
    many = lines.count()
    first = curves.get_by_role("group").get_by_role("button").first
    first.click()
    expect(first).to_have_attribute("aria-pressed", "false")
    expect(lines).not_to_have_count(many)
    first.click()
    expect(lines).to_have_count(many)


def drive_retrieval(page, browser, live):
    captions, images = browser.get_by_role("group", name="captions"), browser.get_by_role("group", name="images")
    caption = captions.get_by_role("button").nth(2)
    words = caption.inner_text()
    caption.click()
    says(browser, f"“{words}”: the true image is at rank")
    true = images.locator(".mvlp-true").get_attribute("data-key")
    images.get_by_role("button").first.click()
    says(browser, "For this image the first of its true captions")
    expect(captions.locator(".mvlp-true").first).to_be_visible()
    box = browser.get_by_role("searchbox")
    noun = words.split()[-1]
    box.fill(noun)  # typing filters the captions
    assert all(noun in text for text in captions.get_by_role("button").all_inner_texts())
    box.fill(f"there is {words}")
    expect(browser.get_by_text("No caption holds all of these words")).to_be_visible()
    box.press("Enter")
    if live:
        says(browser, f"“there is {words}”: words of your own")
        best = [button.get_attribute("data-key") for button in images.get_by_role("button").all()[:8]]
        assert true in best, "words of the reader's own find the picture that they describe"
    else:
        says(browser, "New words need a running kernel")
        box.fill(noun)
        box.press("Enter")
        says(browser, "the true image is at rank")


def drive_attention(page, viewer, live):
    words, canvas = viewer.get_by_role("group", name="words of the caption"), viewer.locator("canvas")
    viewer.get_by_role("button", name="Start again").click()
    says(viewer, "No word and no patch is chosen.")
    word = words.get_by_role("button").last
    word.hover()
    says(viewer, f"“{word.inner_text()}” attends most to row")
    page.mouse.move(2, 2)
    says(viewer, "No word and no patch is chosen.")
    word.click()
    expect(word).to_have_attribute("aria-pressed", "true")
    before = viewer.get_by_role("status").inner_text()
    for label in ("Layer", "Head"):
        slider = viewer.get_by_label(label)
        if slider.count():
            now = slider.input_value()
            slider.fill(
                slider.get_attribute("min") if now != slider.get_attribute("min") else slider.get_attribute("max")
            )
            expect(viewer.get_by_role("status")).not_to_have_text(before)
            slider.fill(now)
            expect(viewer.get_by_role("status")).to_have_text(before)
    share = r"column \d+: (\d+(\.\d)?) % of its attention"
    viewer.get_by_label("Temperature").fill("-0.5")
    assert float(re.search(share, viewer.get_by_role("status").inner_text())[1]) > float(re.search(share, before)[1])
    viewer.get_by_label("Temperature").fill("0")
    page.mouse.click(*at(canvas, 0.3, 0.6))
    says(viewer, "gets most attention from")
    fill = words.get_by_role("button").evaluate_all(
        "all => all.map((b) => parseInt(b.style.getPropertyValue('--share')))"
    )
    assert max(fill) == 100


def drive_grounder(page, grounder, live):
    canvas, chips = grounder.locator("canvas"), grounder.get_by_role("group", name="phrases to try")
    chip = chips.get_by_role("button").nth(1)
    chip.click()
    says(grounder, f"“{chip.inner_text()}”: the model draws its box")
    cx, cy, w, h = json.loads(grounder.get_attribute("data-answer"))
    assert 0 < w <= 1 and 0 < h <= 1
    box = grounder.get_by_label("phrase to look for")
    box.fill(f"the {chip.inner_text().removeprefix('a ')}")
    box.press("Enter")
    says(grounder, f"“{box.input_value()}”: the model draws its box" if live else "This page has no kernel")
    drag(page, canvas, (cx - w / 2, cy - h / 2), (cx + w / 2, cy + h / 2))  # the model's own box, drawn over
    says(grounder, "Your box fits “")
    expect(grounder.locator(".mvlp-bars li")).not_to_have_count(0)
    if not live:
        says(grounder, f"Your box fits “{chip.inner_text()}” best")  # by overlap with the model's box


def drive_board(page, board, live):
    rows = board.locator("tbody tr")
    many = rows.count()
    board.get_by_label("Keep from").fill("0")
    says(board, f"{many} of {many} old captions are kept")
    board.get_by_role("combobox", name="Old caption").select_option("junk")
    says(board, "pictures are shown.")
    assert 0 < rows.count() < many
    for truth in rows.locator("td:nth-child(2) .mvlp-truth").all_inner_texts():
        assert truth.startswith("truth: junk · ⚠ should go")
    board.get_by_role("button", name="Start again").click()
    expect(rows).to_have_count(many)
    board.get_by_role("combobox", name="Order").select_option("web")
    scores = rows.locator("td:nth-child(2) .mvlp-verdict span").all_inner_texts()
    assert scores == sorted(scores, key=float)


DRIVE = {
    "AttentionViewer": drive_attention,
    "FilterBoard": drive_board,
    "Grounder": drive_grounder,
    "LiveCurves": drive_curves,
    "RetrievalBrowser": drive_retrieval,
}
