"""Figures of architectures: nothing overlaps, all is readable, and they say what the papers do. Colors of models."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text as DrawnText

from minivlp.papers import PAPERS
from minivlp.visualize import drawing
from minivlp.visualize.drawing import model_colors
from minivlp.visualize.drawing.designs import DESIGNS
from minivlp.visualize.drawing.parts import Arrow, Box, Note, Tokens, route

plt.switch_backend("Agg")


@cache
def drawn(title):
    """The figure, and its texts with the place of each in pixels."""
    figure = drawing.structure(title)
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for text in figure.findobj(DrawnText) if text.get_text() and text.get_visible()]
    shown = [text for text in texts if text.axes is None or text in text.axes.texts]
    return figure, [(text, text.get_window_extent(renderer)) for text in shown]


@pytest.mark.parametrize("title", DESIGNS)
def test_all_text_is_readable(title):
    figure, texts = drawn(title)
    assert all(text.get_fontsize() >= 8 for text, _ in texts)
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in texts:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text.get_text()
    for (one, first), (two, second) in combinations(texts, 2):
        apart = first.x1 <= second.x0 or second.x1 <= first.x0 or first.y1 <= second.y0 or second.y1 <= first.y0
        assert apart, f"{one.get_text()!r} and {two.get_text()!r} overlap"


@pytest.mark.parametrize("title", DESIGNS)
def test_text_stays_inside_its_box(title):
    figure, texts = drawn(title)
    inches = {}
    for text, box in texts:
        inches.setdefault(text.get_text(), []).append((box.x0 / figure.dpi, box.x1 / figure.dpi))
    for part in DESIGNS[title].parts:
        if isinstance(part, Box):
            for line in part.text.split("\n"):
                inside = [left > part.left and right < part.left + part.width for left, right in inches[line]]
                assert any(inside), f"{line!r} is wider than its box"


def crosses(first, second, box):
    """Whether the piece of an arrow from `first` to `second`, level or upright, goes through a box."""
    (x0, x1), (y0, y1) = (sorted(pair) for pair in zip(first, second, strict=True))
    left, bottom, right, top = box
    return x0 < right and x1 > left and y0 < top and y1 > bottom


@pytest.mark.parametrize("title", DESIGNS)
def test_arrows_cross_neither_boxes_nor_text(title):
    figure, texts = drawn(title)
    design = DESIGNS[title]
    by_name = {part.name: part for part in design.parts if not isinstance(part, Note)}
    solid = [part for part in by_name.values() if type(part) is Box or isinstance(part, Tokens)]
    boxes = [(p.left, p.bottom, p.left + p.width, p.bottom + p.height) for p in solid]
    boxes += [tuple(box.extents / figure.dpi) for _, box in texts]
    for arrow in design.arrows:
        points = route(arrow, by_name)
        for piece in zip(points, points[1:], strict=False):
            hit = [box for box in boxes if crosses(*piece, box)]
            assert not hit, f"{arrow} goes through {hit}"


def test_a_figure_per_paper_and_a_list_for_other_names():
    titles = {paper.title.split(" (")[0] for paper in PAPERS.values()}
    assert titles <= set(DESIGNS), "describe the new paper in designs.py"
    with pytest.raises(ValueError, match=r"'Clip'; there are: CLIP, ViLT, ALBEF, VLMo, BLIP, X-VLM"):
        drawing.structure("Clip")


def said(title):
    return " ".join(text.get_text() for text, _ in drawn(title)[1])


@pytest.mark.parametrize(
    ("title", "losses", "also"),
    [
        ("CLIP", {"ITC"}, ("scale", "causal")),
        ("ViLT", {"ITM", "MLM", "WPA"}, ("patch projection", "pooler")),
        ("ALBEF", {"ITC", "ITM", "MLM"}, ("cross-attention", "EMA", "queue", "pseudo-targets", "hard negatives")),
        ("VLMo", {"ITC", "ITM", "MLM"}, ("vision-language FFN", "frozen", "hard negatives")),
        ("BLIP", {"ITC", "ITM", "LM"}, ("causal", "[DEC]", "[ENC]", "momentum", "hard negatives")),
        ("X-VLM", {"ITC", "ITM", "MLM", "L1 + GIoU"}, ("box head", "full image", "hard negatives")),
        ("GIT", {"LM"}, ("projection", "in front of the text", "image tokens attend to the image")),
        ("CoCa", {"ITC", "LM"}, ("attentional pooler", "unimodal half", "multimodal half", "[CLS] last")),
    ],
)
def test_losses_and_what_is_special(title, losses, also):
    boxes = [part for part in DESIGNS[title].parts if isinstance(part, Box) and part.kind == "loss"]
    assert {box.text.split(":")[0].split("\n")[0] for box in boxes} == losses
    assert all(word in said(title) for word in also)


def kind_of(title, name):
    return next(part for part in DESIGNS[title].parts if getattr(part, "name", None) == name)


def test_blips_three_uses_go_through_the_same_boxes():
    """Self-attention is the decoder's own; cross-attention serves two uses, the feed-forward layer all three."""
    arrows = {(arrow.start.split()[0], arrow.end.split()[0]): 0 for arrow in DESIGNS["BLIP"].arrows}
    for arrow in DESIGNS["BLIP"].arrows:
        arrows[arrow.start.split()[0], arrow.end.split()[0]] += 1
    assert arrows["dec", "causal"] == arrows["causal", "cross"] == 1
    assert arrows["enc", "self"] == arrows["cls", "self"] == arrows["self", "cross"] == arrows["self", "ffn"] == 1
    assert arrows["cross", "ffn"] == 2
    assert kind_of("VLMo", "s2_attention").frozen and not kind_of("VLMo", "s3_attention").frozen


def test_an_arrow_is_straight_where_it_can_be():
    parts = {"low": Box("low", "", 0, 0, 4, 1, "text"), "high": Box("high", "", 2, 2, 1, 1, "text")}
    (x0, y0), (x1, y1) = route(Arrow("low top", "high bottom"), parts)
    assert x0 == x1 == 2.5 and 1 < y0 < y1 < 2
    assert route(Arrow("low top .1", "high bottom"), parts)[0][0] == pytest.approx(0.4)
    assert len(route(Arrow("low top .1", "high bottom"), parts)) == 4  # two corners between two upright ends
    assert len(route(Arrow("low right", "high bottom"), parts)) == 3
    assert route(Arrow("low top", "high left", through=((1, 5),)), parts)[1] == (1, 5)
    with pytest.raises(KeyError, match="nowhere"):
        route(Arrow("low top", "nowhere left"), parts)


# --------------------------------------------------------------------------------------------------------------- colors

# What a dichromat sees, on linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.
EYES = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color):
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    x, y, z = np.cbrt(XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", EYES)
def test_models_can_be_told_apart(eye):
    seen = {title: lab(EYES[eye] @ linear(color)) for title, (color, _) in model_colors.MODELS.items()}
    for one, two in combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[two]) > 14, f"{one} and {two} look alike"


def test_every_model_has_a_color_a_mark_and_contrast():
    colors, marks = zip(*model_colors.MODELS.values(), strict=True)
    assert len(set(colors)) == len(set(marks)) == len(colors)
    assert {paper.title.split(" (")[0] for paper in PAPERS.values()} <= set(model_colors.MODELS)
    for color in colors:
        light = float(XYZ[1] @ linear(color))
        assert 1.05 / (light + 0.05) > 1.9 and (light + 0.05) / (linear("#111111")[0] + 0.05) > 2.2
    with pytest.raises(ValueError, match="no color for 'Clip'; there are: CLIP, ViLT"):
        drawing.color_of("Clip")


@pytest.mark.parametrize(
    ("label", "model"),
    [
        ("CLIP", "CLIP"),
        ("Chinese-CLIP, base", "Chinese-CLIP"),
        ("CLIPping", None),
        ("CLIP-like", None),
        ("X-VLM nano", "X-VLM"),
        ("BEiT-3", "BEiT-3"),
        ("our ALBEF", None),
    ],
)
def test_the_model_that_a_label_begins_with(label, model):
    assert model_colors.model_of(label) == model
