"""The widgets without a browser: what they send, what they answer, what they store, and what they refuse."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
import json
import math
import re
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from minivlp.data.batch import Region, to_tensor
from minivlp.data.noise import NoisyCaptions
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer, tokenize
from minivlp.layers.attention import record_attention
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.models.vilt import ViLT, ViLTConfig
from minivlp.models.xvlm import XVLM, XVLMConfig
from minivlp.visualize.attention import grad_cam, word_patch_attention
from minivlp.visualize.page import save_page
from minivlp.visualize.widgets import STATIC, AttentionViewer, FilterBoard, Grounder, LiveCurves, RetrievalBrowser, rgb

PIXELS = np.full((32, 48, 3), 200, np.uint8)
BOX = (0.5, 0.5, 0.2, 0.4)
WEB = [{"caption": "a", "score": 0.9, "truth": "clean"}, {"caption": "b", "score": 0.2, "truth": "junk"}]


def viewer(**changes) -> AttentionViewer:
    attention = np.random.default_rng(0).random((2, 3, 4, 6), dtype=np.float32)
    return AttentionViewer(**{"image": PIXELS, "words": list("abcd"), "attention": attention, "grid": (2, 3)} | changes)


def grounder() -> Grounder:
    return Grounder(PIXELS, lambda phrase: (BOX, 0.75), lambda box: [("x", box[0]), ("y", box[1])], ["one", "two"])


def browser() -> RetrievalBrowser:
    similarity = [[0.9, 0.1, 0.2], [0.3, 0.8, 0.7]]
    return RetrievalBrowser(
        [PIXELS, PIXELS[:, ::-1]], [["a"], ["b", "c"]], np.array(similarity), lambda text: [0.1, 0.6]
    )


def board(**changes) -> FilterBoard:
    new = [{"caption": "c", "score": 0.4, "truth": "true"}, {"caption": "", "score": 0.7, "truth": "false"}]
    return FilterBoard(**{"images": [PIXELS, PIXELS[:, ::-1]], "web": WEB, "synthetic": new} | changes)


def curves() -> LiveCurves:
    live = LiveCurves(every=0)
    live.log(0, loss=1.0)
    live.log(1, loss=torch.tensor(0.5), other=2)
    return live


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def scene():
    scenes = Scenes(30, "validation")
    return next(scenes[row] for row in range(30) if len(scenes.regions(row)) >= 5)


@pytest.fixture(scope="module")
def xvlm(tokenizer):
    torch.manual_seed(0)
    return XVLM(XVLMConfig.nano(len(tokenizer)))  # in training mode, as fit() has it


# What is stored in a notebook.


@pytest.mark.parametrize("make", [viewer, grounder, curves, browser, board])
def test_a_notebook_stores_a_picture_and_a_short_text_beside_the_view(make):
    widget = make()
    data, _ = widget._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    assert data["text/plain"] == repr(make()) and len(repr(widget)) < 80  # the same for another one of the same values
    still = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert still.format == "PNG" and min(still.size) > 100
    assert len(still.convert("RGBA").getcolors()) > 5  # something is drawn
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()  # no figure waits to be shown a second time


def test_nothing_is_fetched_or_imported_by_the_scripts():
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|^\s*import\s|@import|url\(|fetch\(", text, re.MULTILINE), file.name


def test_a_page_holds_the_values_and_no_way_out(tmp_path):
    evil = viewer(words=["</script><script>bad()", "b", "c", "d"])
    widgets = [evil, grounder(), curves(), browser(), board()]
    text = save_page(widgets, tmp_path / "deep" / "page.html", "A & B").read_text(encoding="utf-8")
    assert "A &amp; B" in text and "</script><script>bad()" not in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    state = json.loads(re.search(r'id="widget-state">(.*?)</script>', text, re.DOTALL)[1])
    assert set(state) == {widget.model_id for widget in widgets} == set(re.findall('data-model="([0-9a-f]+)"', text))
    first = state[evil.model_id]
    assert first["state"]["words"][0] == "</script><script>bad()"
    [buffer] = first["buffers"]
    sent = np.frombuffer(base64.b64decode(buffer["data"]), np.float32)
    assert buffer["path"] == ["attention"] and np.array_equal(sent, evil.weights.ravel())


HOSTILE = [
    "x <!-- <script> y",
    "</script><script>bad()</script>",
    "<!--<script></script>-->",
    "]]> <![CDATA[ <style> </title>",
    "two\u2028lines\u2029here \\u003c",
    "&lt;b&gt; &amp; \"quoted\" 'single'",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_caption_can_leave_its_place_in_a_page(tmp_path, text):
    class Named(RetrievalBrowser):  # its repr, which stands in the page until the scripts run
        def __repr__(self) -> str:
            return text

    widget = Named([PIXELS, PIXELS], [[text], ["b"]], np.eye(2))
    page = save_page([widget], tmp_path / "page.html", text).read_text(encoding="utf-8")
    state = re.search(r'id="widget-state">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in state and state.isascii() and len(state.splitlines()) == 1
    assert json.loads(state)[widget.model_id]["state"]["captions"] == [text, "b"]
    assert page.count("<script") == 2 + page.count("in <script id=") and page.count("</script>") == 2
    around = page.replace(state, "")
    assert around.count(html.escape(text)) == 3  # title, heading and fallback
    assert text not in around or text == html.escape(text)


# The attention viewer.


def test_shares_sum_to_one_and_follow_layer_and_head():
    widget = viewer()
    mean = widget.weights[1].mean(axis=0)
    np.testing.assert_allclose(widget.shares(), mean / mean.sum(axis=1, keepdims=True), rtol=1e-6)
    widget.layer, widget.head = 0, 2
    alone = widget.weights[0, 2]
    np.testing.assert_allclose(widget.shares(), alone / alone.sum(axis=1, keepdims=True), rtol=1e-6)


def test_it_begins_with_the_last_layer_and_the_word_with_the_sharpest_map():
    attention = np.ones((2, 1, 4, 6), np.float32)
    attention[1, 0, 2, 5] = 9
    widget = viewer(attention=torch.from_numpy(attention), boxes=[Region(BOX, "c"), ("d", BOX)])
    assert (widget.layer, widget.head, widget.word) == (1, -1, 2)
    assert widget.boxes == [["c", list(BOX)], ["d", list(BOX)]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": np.ones((2, 3, 4, 7))}, r"ask for \(layers, heads, 4, 6\).*class token"),
        ({"attention": np.ones((3, 4, 6))}, "ask for"),
        ({"attention": np.full((1, 1, 4, 6), np.nan)}, "finite"),
        ({"attention": -np.ones((1, 1, 4, 6))}, "not negative"),
        ({"words": ["only one"]}, "1 words"),
        ({"image": PIXELS.astype(float)}, "0..255.*uint8"),
        ({"image": np.zeros((3, 32, 3), np.uint8)}, "first or the last axis"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        viewer(**changes)


def test_attention_of_a_model_with_cross_attention(xvlm, scene, tokenizer):
    caption = scene.captions[0] + " zyx"  # the last word falls to pieces
    widget = AttentionViewer.of(xvlm, scene.image, caption, tokenizer, scene.regions)
    assert xvlm.training  # left as it was
    text = tokenize(tokenizer, [caption], 40)
    xvlm.eval()
    with torch.no_grad(), record_attention(xvlm) as maps:
        xvlm.match(to_tensor(scene.image[None]), text)
    xvlm.train()
    last = max(name for name in maps if name.endswith(".cross"))
    kept = maps[last][0, :, :, 1:].numpy()  # (H, L, P)
    assert widget.words[0] == caption.split()[0] and len(widget.words) == len(caption.split())
    np.testing.assert_allclose(widget.weights[-1, :, 0], kept[:, 1], rtol=1e-5)  # token 0 is [CLS]
    pieces = range(len(widget.words), text.length - 1)  # the last word's, up to [SEP]
    assert len(pieces) > 1
    np.testing.assert_allclose(widget.weights[-1, :, -1], kept[:, list(pieces)].mean(axis=1), rtol=1e-5)
    assert tuple(widget.grid) == (8, 8)


def test_a_dual_encoder_shows_the_cosines_of_words_and_patches(scene, tokenizer):
    clip = CLIP(CLIPConfig.nano(len(tokenizer)))
    widget = AttentionViewer.of(clip, Image.fromarray(scene.image), scene.captions[0], tokenizer)
    assert widget.shape == [1, 1, len(widget.words), 64]
    np.testing.assert_allclose(widget.weights.sum(axis=-1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="no words"):
        AttentionViewer.of(clip, scene.image, "", tokenizer)


def test_attention_of_a_single_stream_is_cut_out_of_its_map(scene, tokenizer):
    model = ViLT(ViLTConfig.nano(len(tokenizer))).eval()
    widget = AttentionViewer.of(model, scene.image, scene.captions[0], tokenizer)
    text = tokenize(tokenizer, [scene.captions[0]], 40)
    with torch.no_grad(), record_attention(model) as maps:
        model.match(to_tensor(scene.image[None]), text)
    length = text.length
    assert widget.shape == [len(model.joint.blocks), model.config.image.block.heads, len(widget.words), 64]
    for layer in range(widget.shape[0]):
        kept = maps[f"joint.{layer}.self"][0, :, 1, length + 1 :]  # the first word, after [CLS]; its patches
        np.testing.assert_allclose(widget.weights[layer, :, 0], kept.numpy(), rtol=1e-5)


def test_images_need_not_be_square(scene, tokenizer):
    config = XVLMConfig.nano(len(tokenizer))
    model = XVLM(dataclasses.replace(config, image=dataclasses.replace(config.image, image_size=(32, 48))))
    widget = AttentionViewer.of(model, PIXELS, "a dog", tokenizer)
    assert tuple(widget.grid) == (4, 6) and widget.shape[-1] == 24
    assert Grounder.of(model, PIXELS, tokenizer, ["a dog"]).phrases == ["a dog"]


def test_layers_come_in_their_order_and_words_before_patches():
    cross = {f"fusion.{layer}.cross": torch.full((1, 2, 3, 5), float(layer)) for layer in (10, 2, 0)}
    found = word_patch_attention(cross | {"text.0.self": torch.ones(1, 2, 3, 3)}, 3)
    assert list(found) == ["fusion.0.cross", "fusion.2.cross", "fusion.10.cross"]
    assert found["fusion.2.cross"].shape == (1, 2, 3, 4)
    joint = torch.arange(64.0).view(1, 1, 8, 8)  # 3 words, the class token, 4 patches
    assert word_patch_attention({"joint.0.self": joint}, 3)["joint.0.self"].tolist() == joint[:, :, :3, 4:].tolist()
    assert word_patch_attention({"text.0.self": joint, "image.0.self": joint}, 3) == {}


def test_any_maps_can_be_shown_under_their_names(xvlm, scene, tokenizer):
    caption = scene.captions[0]
    text = tokenize(tokenizer, [caption], 40)
    images = to_tensor(scene.image[None])
    cams = grad_cam(xvlm, lambda: xvlm.match(images, text), ["fusion.1.cross"])
    cam = cams["fusion.1.cross"][0, :, 1:]  # (L, P)
    plan = torch.rand(2, text.length, 64)
    widget = AttentionViewer.of(xvlm, scene.image, caption, tokenizer, maps={"Grad-CAM": cam, "transport plan": plan})
    assert widget.names == ["Grad-CAM", "transport plan"] and widget.shape == [2, 1, len(widget.words), 64]
    np.testing.assert_allclose(widget.weights[0, 0, 0], cam[1])  # the first word, after [CLS]
    np.testing.assert_allclose(widget.weights[1, 0, 1], plan[:, 2].mean(dim=0), rtol=1e-6)
    alone = AttentionViewer.of(xvlm, scene.image, caption, tokenizer, maps=plan)
    assert alone.shape == [1, 2, len(widget.words), 64] and alone.names == []
    with pytest.raises(ValueError, match=rf"maps of 3 tokens, but .* has {text.length}, including \[CLS\]"):
        AttentionViewer.of(xvlm, scene.image, caption, tokenizer, maps=plan[:, :3])
    with pytest.raises(ValueError, match="1 names for 2 layers"):
        viewer(names=["one"])


# The grounder.


def test_known_phrases_are_asked_once_and_others_when_wanted():
    asked = []

    def ground(phrase):
        asked.append(phrase)
        return BOX, 0.75

    widget = Grounder(PIXELS, ground, phrases=["one", "two"])
    assert widget.known == {"one": [*BOX, 0.75], "two": [*BOX, 0.75]} and widget.answer["phrase"] == "one"
    widget.ask("two")
    assert asked == ["one", "two"]
    widget.question = {"phrase": "three", "number": 1}  # as the browser asks
    assert asked == ["one", "two", "three"]
    assert widget.answer == {"phrase": "three", "box": list(BOX), "confidence": 0.75}


def test_a_drawn_box_is_described_and_an_error_is_shown():
    widget = grounder()
    widget.question = {"box": [0.9, 0.2, 0.1, 0.1], "number": 1}
    assert widget.found["items"] == [["x", 0.9], ["y", 0.2]]
    widget.ground = lambda phrase: ((math.nan, 0, 1, 1), 0.5)
    widget.question = {"phrase": "new", "number": 2}
    assert "a box is four numbers" in widget.answer["problem"] and widget.answer["phrase"] == "new"
    with pytest.raises(ValueError, match="four numbers"):
        widget.ask("new")  # in Python it is an error like any other


def test_answers_can_be_given_instead_of_a_model():
    widget = Grounder(PIXELS, phrases={"a cup": (BOX, None)})
    assert widget.known == {"a cup": [*BOX, None]} and not widget.asks and not widget.describes
    with pytest.raises(KeyError, match="no `ground` function"):
        widget.ask("a dog")
    with pytest.raises(TypeError, match="no `describe` function"):
        widget.describe_box(BOX)
    with pytest.raises(ValueError, match="give a dict"):
        Grounder(PIXELS, phrases=["a cup"])


def test_the_still_picture_leaves_out_phrases_that_do_not_fit_and_boxes_at_the_same_place():
    here, beside = (0.3, 0.3, 0.2, 0.2), (0.6, 0.3, 0.2, 0.2)
    answers = {"a cup": (here, 0.9), "a red cup": (here, 0.8), "a dog": (beside, 0.1), "a car": (beside, 0.7)}
    chosen = Grounder(PIXELS, phrases=answers)._worth_drawing()
    assert [phrase for phrase, _, _ in chosen] == ["a cup", "a car"]
    assert [phrase for phrase, _, _ in Grounder(PIXELS, phrases={"a dog": (here, 0.0)})._worth_drawing()] == ["a dog"]


def test_grounding_with_a_model(xvlm, scene, tokenizer):
    phrases = [region.phrase for region in scene.regions]
    widget = Grounder.of(xvlm, scene.image, tokenizer, phrases)
    assert widget.phrases == list(widget.known) == list(dict.fromkeys(phrases)) and xvlm.training
    text = tokenize(tokenizer, phrases[:1], 40)
    xvlm.eval()
    with torch.no_grad():
        image = to_tensor(scene.image[None])
        box = xvlm.ground(image, text)
        fit = xvlm.match_regions(image, box, torch.tensor([0]), text).item()  # with what is in the box
        box = box[0].tolist()
    xvlm.train()
    np.testing.assert_allclose(widget.known[phrases[0]], [*box, fit], atol=1e-5)
    untrained = XVLM(dataclasses.replace(xvlm.config, losses=("itc", "box_l1", "box_giou")))
    silent = Grounder.of(untrained, scene.image, tokenizer, phrases)
    assert silent.known[phrases[0]][4] is None  # a matching head that was never trained is not asked
    scores = [score for _, score in widget.describe_box(BOX)["items"]]
    assert scores == sorted(scores, reverse=True) and len(scores) > 1
    with pytest.raises(TypeError, match="no `ground`"):
        Grounder.of(CLIP(CLIPConfig.nano(len(tokenizer))), scene.image, tokenizer, phrases)


# Live curves.


def test_the_stop_button_keeps_the_history_and_errors_pass():
    live = LiveCurves()
    with live.guard():
        for step in range(10):
            live.log(step, loss=step)
            if step == 4:
                raise KeyboardInterrupt
    assert live.interrupted and live.state == "stopped" and live.series == [["loss", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]]
    with pytest.raises(RuntimeError), live.guard():
        raise RuntimeError
    assert not live.interrupted and live.state == "done"


def test_the_stop_button_is_noticed_where_the_loop_takes_it_for_itself():
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with none
    live, before = LiveCurves(), signal.getsignal(signal.SIGINT)
    with live.guard(), contextlib.suppress(KeyboardInterrupt):  # as `fit` does, to keep its own history
        signal.raise_signal(signal.SIGINT)
    assert live.interrupted and live.state == "stopped" and signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, found)


def test_curves_grow_in_a_thread_too():
    live = LiveCurves()

    def train():
        with live.guard():
            live.log(0, loss=1.0)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()  # signals are the main thread's: none can be listened to here, and that is no error
    assert live.state == "done" and live.history == {"loss": [(0, 1.0)]}


def test_few_points_are_sent_and_gaps_and_ends_are_among_them():
    live = LiveCurves()
    for step in range(10_000):
        live.log(step, loss=math.nan if 4321 <= step < 4330 else 1.0)
    live.flush()
    [[_, steps, values]] = live.series
    assert len(live.history["loss"]) == 10_000 and len(steps) < 500
    assert steps[-1] == 9999 and steps == sorted(steps)
    assert values[steps.index(4321)] is None
    json.dumps(live.series, allow_nan=False)


def test_rows_of_the_training_loop_become_curves():
    live = LiveCurves()
    live.log_row({"step": 3, "loss": 2.0, "itc": 2.0, "gradient": 9.0, "seconds": 1.0})
    live.log_row({"step": 4, "loss": 5.0, "itc": 2.0, "itm": 3.0, "gradient": 9.0, "seconds": 1.0})
    assert live.history == {"loss": [(3, 2.0), (4, 5.0)], "itc": [(4, 2.0)], "itm": [(4, 3.0)]}, (
        "one term is drawn once"
    )


def test_the_still_picture_is_renewed_after_training(monkeypatch):
    """A code host shows only the picture, and the widget is displayed before there is anything to draw."""
    shown = []

    class Output:
        def update(self, data, **options):
            shown.append(data)

    def display(data, **options):
        shown.append(data)
        return Output()

    monkeypatch.setattr("IPython.display.display", display)
    live = LiveCurves()
    live._ipython_display_()
    with live.guard():
        live.log(0, loss=1.0)
        live.log(1, loss=0.5)
    before, after = shown
    assert before["image/png"] != after["image/png"]
    view = "application/vnd.jupyter.widget-view+json"
    assert before[view] == after[view] and before["text/plain"] == after["text/plain"]


# The retrieval browser.


def test_captions_belong_to_their_images_and_free_words_are_ranked():
    widget = browser()
    assert widget.owner == [0, 1, 1] and widget.captions == ["a", "b", "c"]
    assert np.frombuffer(widget.similarity, np.float32).reshape(2, 3)[1].tolist() == pytest.approx([0.3, 0.8, 0.7])
    assert widget.search("anything") == [1, 0]
    widget.score_text = lambda text: 1 / 0
    widget.question = {"text": "new", "number": 1}
    assert "ZeroDivisionError" in widget.answer["problem"]


def test_similarities_of_a_model(xvlm, tokenizer):
    scenes = Scenes(4, "validation")
    images, captions = [scenes[row].image for row in range(4)], [scenes.captions(row)[:2] for row in range(4)]
    widget = RetrievalBrowser.of(xvlm, images, captions, tokenizer)
    scores = widget.score_text(captions[2][1])
    np.testing.assert_allclose(scores, widget.table[:, widget.captions.index(captions[2][1])], atol=1e-4)


@pytest.mark.parametrize(
    ("images", "captions", "similarity", "message"),
    [
        (2, ["a"], np.ones((2, 1)), "2 images but captions for 1"),
        (2, ["a", "b"], np.ones((2, 3)), r"ask for \(2, 2\)"),
        (1, [[]], np.ones((1, 0)), "at least one"),
        (1, ["a"], np.array([[np.inf]]), "not finite"),
    ],
)
def test_tables_that_do_not_fit_are_refused(images, captions, similarity, message):
    with pytest.raises(ValueError, match=message):
        RetrievalBrowser([PIXELS] * images, captions, similarity)


# The filter board.


def test_a_board_knows_what_is_true_and_shows_the_true_ones_first():
    widget = board()
    assert [row["web"]["holds"] for row in widget.rows] == [True, False]
    assert widget.rows[1]["synthetic"] == {"caption": "", "score": 0.7, "truth": "false", "holds": False, "more": 0}
    assert widget.kinds == ["clean", "junk"] and board(web=WEB[::-1]).kinds == ["clean", "junk"]
    unknown = board(web=[{"caption": "a", "score": 1}] * 2, synthetic=None)
    assert unknown.rows[0] == {
        "web": {"caption": "a", "score": 1.0, "truth": "", "holds": None, "more": 0},
        "synthetic": None,
    }
    assert unknown.kinds == [] and unknown._repr_mimebundle_()[0]["image/png"]


def test_a_board_of_a_table_and_the_data_it_was_made_from():
    noisy = NoisyCaptions(Scenes(12, size=32), 0.5)
    table = []
    for row in range(12):
        for source, texts in (("web", noisy.captions(row)), ("synthetic", ["a dog"])):
            scores = [0.1 * (row % 10) for _ in texts]
            table += [
                {"row": row, "source": source, "caption": text, "score": score, "kept": score >= 0.5}
                for text, score in zip(texts, scores, strict=True)
            ]
    widget = FilterBoard.of(table, noisy, lambda row, text: row == 3, limit=10)
    assert len(widget.rows) == 10 == len(widget.thumbs)
    for row in range(10):
        web, new = widget.rows[row]["web"], widget.rows[row]["synthetic"]
        assert web["caption"] == noisy.captions(row)[0] and web["more"] == len(noisy.captions(row)) - 1
        assert web["truth"] == noisy.kind(row) and web["holds"] is noisy.is_clean(row)
        assert new["caption"] == "a dog" and new["holds"] is (row == 3)
    assert FilterBoard.of(table, noisy).rows[0]["synthetic"]["holds"] is None  # nobody was asked
    alone = FilterBoard.of([line for line in table if line["source"] == "web"], Scenes(12, size=32))
    assert alone.rows[0]["synthetic"] is None and alone.rows[0]["web"]["truth"] == ""
    with pytest.raises(ValueError, match="threshold of 0.35: pass"):
        FilterBoard.of(table, noisy, threshold=0.35)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [PIXELS]}, "1 images, 2 web and 2 new"),
        ({"images": [], "web": [], "synthetic": None}, "0 images"),
        ({"web": [{"caption": "a", "score": math.nan}] * 2}, "'a' is not finite"),
    ],
)
def test_a_board_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        board(**changes)


# Any picture.


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16"])
def test_any_picture_is_taken(mode):
    image = rgb(Image.new(mode, (60, 40)))
    assert image.mode == "RGB" and image.size == (60, 40)


def test_pictures_are_turned_and_shrunk_and_stand_on_white():
    turned = Image.new("RGB", (60, 40))
    turned.getexif()[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=turned.getexif())
    assert rgb(Image.open(file)).size == (40, 60)
    assert rgb(np.zeros((2000, 1000), np.uint8)).size == (256, 512)
    assert rgb(Image.new("RGBA", (4, 4), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(TypeError, match="not dict"):
        rgb({"a": "picture"})
