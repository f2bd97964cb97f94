"""The widgets, driven as a reader drives them: in JupyterLab with a kernel, and in a static page without one."""

from __future__ import annotations

import base64
import re

import nbformat
import pytest
from driving import SHOTS, at, contrasts, drag, in_lab, near, says, watched
from toys import BLUE, IMAGE, RED, WORDS, attention, gallery, ground, judged

CELLS = [
    """
from IPython.display import display
import time
from toys import *
from minivlp.visualize.widgets import AttentionViewer, FilterBoard, Grounder, LiveCurves, RetrievalBrowser
display(AttentionViewer(IMAGE, WORDS, attention(), (8, 8), [("red disc", RED), ("blue square", BLUE)]))""",
    """
def describe(box):
    return [("a thing on the left", 1 - box[0]), ("a thing on the right", box[0])][:: 1 if box[0] < 0.5 else -1]

def find(phrase):
    if "dragon" in phrase:
        raise ValueError("there be none")
    return ground(phrase)

Grounder(IMAGE, find, describe, ["the red disc", "the blue square"])""",
    """
images, captions, similarity = gallery()
RetrievalBrowser(images, captions, similarity, lambda text: [float(i == len(text)) for i in range(len(images))])""",
    "FilterBoard(*judged())",
    """
curves = LiveCurves()
curves""",
    """
with curves.guard():
    for step in range(100_000):
        curves.log(step, loss=2 / (1 + step / 40), other=1 / (1 + step / 90))
        time.sleep(0.01)
print("stopped early:", curves.interrupted)""",
    "print('the next cell', 'still runs')",
]


@pytest.fixture(scope="module")
def page(lab, chromium):
    """The notebook, opened, all its cells running."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS])
    with in_lab(chromium, lab, notebook, "widgets.ipynb") as page:
        yield page


def test_curves_grow_and_the_stop_button_keeps_them(page):
    curves = page.locator(".mvlp-training")
    curves.wait_for()
    page.wait_for_function("() => +document.querySelector('.mvlp-training').dataset.steps > 60")
    says(curves, "Running")
    # a browser-side answer while the kernel is busy: this is what the sliders are built for
    viewer = page.locator(".mvlp-attention")
    viewer.get_by_role("button", name="blue").click()
    says(viewer, "“blue” attends most to row 6, column 6")
    curves.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "lab_training.png")
    page.locator('[data-command="notebook:interrupt-kernel"]').first.click()
    page.get_by_text("stopped early: True").wait_for()
    page.get_by_text("the next cell still runs").wait_for()
    says(curves, "Stopped by you; the history is kept.")
    assert curves.locator("path.mvlp-line").count() == 2
    straight = curves.locator("path.mvlp-line").first.get_attribute("d")
    curves.get_by_label("log axis").check()
    assert curves.locator("path.mvlp-line").first.get_attribute("d") != straight
    curves.get_by_role("button", name="other").click()
    assert curves.locator("path.mvlp-line").count() == 1
    chart = curves.locator("svg.mvlp-chart")
    page.mouse.move(*at(chart, 0.1, 0.5))
    says(curves, "loss 1.9")  # at the left end, not at the last step


def test_attention_follows_words_patches_and_sliders(page):
    viewer = page.locator(".mvlp-attention")
    canvas = viewer.locator("canvas")
    viewer.get_by_role("button", name="Start again").click()
    says(viewer, "No word and no patch is chosen.")
    viewer.get_by_role("button", name="disc").hover()
    says(viewer, "“disc” attends most to row 3, column 3")
    assert "falls in the box “red disc”" in viewer.get_by_role("status").inner_text()
    page.mouse.move(2, 2)
    says(viewer, "No word and no patch is chosen.")
    viewer.get_by_role("button", name="red").click()
    says(viewer, "“red” attends most to row 1, column 8")  # head 2 dominates the mean of the heads
    head = viewer.get_by_label("Head")
    head.focus()
    page.keyboard.press("ArrowRight")
    says(viewer, "“red” attends most to row 3, column 3")  # head 1 alone
    layer = viewer.get_by_label("Layer")
    layer.focus()
    page.keyboard.press("ArrowLeft")
    assert viewer.get_attribute("data-best") != "18"  # the first layer has no preference
    page.keyboard.press("ArrowRight")
    share = r"(\d+(\.\d)?) % of its attention"
    before = re.search(share, viewer.get_by_role("status").inner_text())[1]
    viewer.get_by_label("Temperature").fill("-0.5")
    after = re.search(share, viewer.get_by_role("status").inner_text())[1]
    assert float(after) > 1.5 * float(before)
    page.mouse.click(*at(canvas, 0.7, 0.7))
    says(viewer, "The patch at row 6, column 6 gets most attention from")
    share_of = "buttons => buttons.map((b) => parseInt(b.style.getPropertyValue('--share')))"
    fill = viewer.locator(".mvlp-word").evaluate_all(share_of)
    assert min(fill[5:]) > 90 and max(fill[:5]) < 10  # "blue" and "square", and nothing else
    viewer.screenshot(path=SHOTS / "attention_viewer_light.png")


def test_keys_stay_in_the_widget(page):
    """Arrows move the patch and no cell; d d deletes no cell; Escape lets go."""
    viewer = page.locator(".mvlp-attention")
    canvas = viewer.locator("canvas")
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    viewer.get_by_role("button", name="Start again").click()
    canvas.focus()
    for key in ("ArrowUp", "ArrowLeft", "d", "d"):
        page.keyboard.press(key)
    says(viewer, "The patch at row 4, column 4")
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells
    page.keyboard.press("Escape")
    says(viewer, "No word and no patch is chosen.")
    viewer.get_by_role("button", name="red").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    says(viewer, "“disc” attends most to")


def test_grounder_answers_phrases_and_boxes(page):
    grounder = page.locator(".mvlp-grounder")
    canvas = grounder.locator("canvas")
    says(grounder, "“the red disc”: the model draws its box at the top left and gives 97 %")
    phrase = grounder.get_by_label("phrase to look for")
    phrase.fill("something blue")
    phrase.press("Enter")  # not known before: the kernel is asked
    says(grounder, "“something blue”: the model draws its box at the bottom right and gives 91 %")
    assert near(grounder.get_attribute("data-answer"), BLUE)
    phrase.fill("a dragon")
    for _ in range(2):  # asked twice, answered twice
        phrase.press("Enter")
        says(grounder, "ValueError: there be none")
        grounder.get_by_role("button", name="the red disc").click()
        says(grounder, "“the red disc”")
        phrase.fill("a dragon")
    drag(page, canvas, (0.55, 0.55), (0.9, 0.9))
    says(grounder, "Your box fits “a thing on the right” best (0.73).")
    assert near(grounder.get_attribute("data-drawn"), (0.725, 0.725, 0.35, 0.35))
    grounder.screenshot(path=SHOTS / "grounder_light.png")
    canvas.focus()
    for key in ["Escape", *["ArrowLeft"] * 9, "ArrowUp", "-"]:  # the first arrow makes a box in the middle
        page.keyboard.press(key)
    assert near(grounder.get_attribute("data-drawn"), (0.26, 0.47, 0.26, 0.26))
    page.keyboard.press("Enter")
    says(grounder, "Your box fits “a thing on the left” best (0.74).")


def test_retrieval_ranks_both_ways_and_takes_free_words(page):
    browser = page.locator(".mvlp-retrieval")
    captions, images = browser.get_by_role("group", name="captions"), browser.get_by_role("group", name="images")
    captions.get_by_role("button").first.click()
    says(browser, "the true image is at rank 2 of 24")
    assert [images.locator("button").nth(i).get_attribute("data-key") for i in (0, 1)] == ["3", "0"]
    assert "true pair" in images.locator("button").nth(1).get_attribute("aria-label")
    browser.screenshot(path=SHOTS / "retrieval_browser_light.png")
    images.locator("button").nth(1).click()
    says(browser, "is at rank 1 of 48")
    assert captions.locator("button").first.get_attribute("data-key") in ("0", "1")
    words = browser.get_by_role("searchbox")
    words.fill("yellow triangle left")
    assert 0 < captions.locator("button").count() <= 48
    words.fill("five!")
    words.press("Enter")
    says(browser, "“five!”: words of your own")  # the answer, not the question
    assert images.locator("button").first.get_attribute("data-key") == "5"
    browser.get_by_role("button", name="Show all").click()
    says(browser, "Nothing is chosen.")


def test_the_board_judges_sorts_and_filters(page):
    board = page.locator(".mvlp-filter")
    rows = board.locator("tbody tr")
    says(board, "2 of 4 old captions are kept; 50 % of those are true, and 50 % of all true ones are kept.")
    says(board, "4 of 4 new captions are kept; 75 % of those are true, and 100 % of all true ones are kept.")
    assert keys(rows) == [0, 1, 2, 3]
    assert board.locator("[data-mistake=true]").all_inner_texts() == [
        "a green disc\n\n✓ kept\n0.60\n\ntruth: swapped · ⚠ should go",
        "a yellow disc\n\n✗ thrown out\n0.40\n\ntruth: clean · ⚠ should stay",
        "a yellow square\n\n✓ kept\n0.55\n\ntruth: false · ⚠ should go",
    ]
    board.screenshot(path=SHOTS / "filter_board_light.png")
    threshold = board.get_by_label("Keep from")
    threshold.focus()
    for _ in range(11):
        page.keyboard.press("ArrowRight")
    says(board, "1 of 4 old captions are kept; 100 % of those are true")
    assert threshold.get_attribute("aria-valuetext") == "score 0.61"
    orders = {"old caption, lowest": [2, 3, 1, 0], "new caption, lowest": [3, 0, 1, 2], "better than": [2, 1, 3, 0]}
    orders["worst mistakes"] = [3, 1, 0, 2]
    for label, order in orders.items():
        option = board.get_by_role("combobox", name="Order").locator("option", has_text=label)
        board.get_by_role("combobox", name="Order").select_option(option.get_attribute("value"))
        assert keys(rows) == order, label
    board.get_by_role("button", name="Start again").click()
    kind, verdict = board.get_by_role("combobox", name="Old caption"), board.get_by_role("combobox", name="Verdict")
    assert kind.locator("option").all_inner_texts() == ["any", "clean", "swapped", "junk"]
    kind.select_option("clean")
    assert keys(rows) == [0, 3]
    verdict.select_option("01")
    assert keys(rows) == [3]
    says(board, "1 of 4 pictures are shown.")
    kind.select_option("")
    for value, left in {"01": [2, 3], "11": [0, 1], "10": [], "00": [], "mistake": [1, 3]}.items():
        verdict.select_option(value)
        assert keys(rows) == left
    board.get_by_role("button", name="Start again").focus()
    page.keyboard.press("Enter")
    assert keys(rows) == [0, 1, 2, 3]
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    board.get_by_role("region").focus()
    for key in ("d", "d"):  # Jupyter would delete the cell
        page.keyboard.press(key)
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells


def keys(rows) -> list[int]:
    """Which pictures are shown, in their order."""
    return [int(row.get_attribute("data-key")) for row in rows.all()]


def test_dark_theme_and_what_is_saved(page, lab):
    from minivlp.visualize.widgets import LiveCurves

    assert min(contrasts(page)) > 4.5
    page.evaluate("() => jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
    page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
    page.wait_for_timeout(300)
    for name in ("attention", "grounder", "training", "retrieval", "filter"):
        page.locator(f".mvlp-{name}").screenshot(path=SHOTS / f"lab_dark_{name}.png")
    assert min(contrasts(page)) > 4.5
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("() => !jupyterapp.shell.currentWidget.context.model.dirty")
    notebook = nbformat.read(lab[1] / "widgets.ipynb", as_version=4)
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.outputs]
    views = [data for data in outputs if "application/vnd.jupyter.widget-view+json" in data]
    names = [view["text/plain"].split("(")[0] for view in views]
    assert names == ["AttentionViewer", "Grounder", "RetrievalBrowser", "FilterBoard", "LiveCurves"]
    assert all(view["image/png"].startswith("iVBOR") for view in views)
    empty = base64.b64encode(LiveCurves().to_png())
    assert len(views[-1]["image/png"]) > 1.3 * len(empty)  # the curves stand there, although displayed before training


def test_a_caption_cannot_swallow_a_page(chromium, tmp_path):
    from minivlp.visualize.page import save_page
    from minivlp.visualize.widgets import RetrievalBrowser

    hostile = [
        "x <!-- <script> y",
        "</script><b>",
        "<!--<script></script>-->",
        "\u2028 & \u2029 <img src=x onerror=alert()>",
    ]
    images, captions, similarity = gallery(len(hostile))
    captions = [[text, captions[i][0]] for i, text in enumerate(hostile)]
    file = save_page([RetrievalBrowser(images, captions, similarity)], tmp_path / "page.html", hostile[0])
    with watched(chromium, file.as_uri()) as page:
        page.goto(file.as_uri())
        page.wait_for_function("() => document.querySelectorAll('[data-alive]').length === 1")
        assert page.evaluate("document.scripts.length") == 2 and page.title() == hostile[0]
        for text in hostile:
            assert page.locator(".mvlp-caption").filter(has_text=text.split("\u2029")[-1].strip()).count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_static_page_is_alive_without_a_kernel(chromium, tmp_path, scheme):
    from minivlp.visualize.page import save_page
    from minivlp.visualize.widgets import AttentionViewer, FilterBoard, Grounder, LiveCurves, RetrievalBrowser

    curves = LiveCurves()
    for step in range(900):
        curves.log(step, loss=3 / (1 + step / 50), other=float("nan") if step == 600 else 1.5 / (1 + step / 200))
    curves.flush()
    viewer = AttentionViewer(IMAGE, WORDS, attention(), (8, 8), [("red disc", RED), ("blue square", BLUE)])
    grounder = Grounder(IMAGE, ground, phrases=["the red disc", "the blue square", "</script> & more"])
    browser = RetrievalBrowser(*gallery(), lambda text: [])
    file = save_page([viewer, grounder, curves, browser, FilterBoard(*judged())], tmp_path / "page.html")
    with watched(chromium, file.as_uri(), color_scheme=scheme, viewport={"width": 980, "height": 900}) as page:
        page.goto(file.as_uri())
        page.wait_for_function("() => document.querySelectorAll('[data-alive]').length === 5")
        v, g, c, r = (page.locator(f".mvlp-{name}") for name in ("attention", "grounder", "training", "retrieval"))
        v.get_by_role("button", name="square").click()
        says(v, "“square” attends most to row 6, column 6")
        flat = v.get_by_role("status").inner_text()
        v.get_by_label("Temperature").fill("-1")
        assert v.get_by_role("status").inner_text() != flat
        g.get_by_role("button", name="the blue square").click()
        says(g, "bottom right")
        phrase = g.get_by_label("phrase to look for")
        phrase.fill("a dragon")
        phrase.press("Enter")
        says(g, "This page has no kernel")
        drag(page, g.locator("canvas"), (0.17, 0.17), (0.46, 0.46))
        says(g, "Your box fits “the red disc” best (0.9")
        says(c, "Step 899")
        assert c.locator("text=not a number").count() == 1
        c.get_by_label("Smooth").fill("0.1")
        assert c.locator("path.mvlp-line").count() == 4  # the raw curves, faint, and the smooth ones
        r.get_by_role("searchbox").fill("red triangle")
        r.get_by_role("searchbox").press("Enter")
        says(r, "the true image is at rank 1 of 24")
        board = page.locator(".mvlp-filter")
        board.get_by_role("combobox", name="Verdict").select_option("mistake")
        assert keys(board.locator("tbody tr")) == [1, 3]
        board.get_by_label("Keep from").fill("0.65")
        says(board, "1 of 4 old captions are kept; 100 % of those are true")
        assert keys(board.locator("tbody tr")) == [3]
        board.screenshot(path=SHOTS / f"page_filter_{scheme}.png")
        assert min(contrasts(page)) > 4.5
        page.screenshot(path=SHOTS / f"page_{scheme}.png", full_page=True)
