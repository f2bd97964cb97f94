"""Attention maps against naive loops, and figures that show what they were given, in the right place."""

from __future__ import annotations

import dataclasses
import io
import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text as DrawnText
from PIL import Image
from torch import nn

from minivlp.data.batch import Region, Sample, Text
from minivlp.evaluation.score import Score
from minivlp.layers.attention import Attention, record_attention
from minivlp.layers.embeddings import ImageConfig
from minivlp.layers.towers import ImageEncoder
from minivlp.layers.transformer import BlockConfig
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.models.vilt import ViLT, ViLTConfig
from minivlp.papers import PAPERS
from minivlp.visualize import drawing
from minivlp.visualize.attention import (
    cls_map,
    grad_cam,
    joint_map,
    rollout,
    text_patch_similarity,
    to_grid,
    value_tokens,
    word_patch_similarity,
)
from minivlp.visualize.drawing import ink

plt.switch_backend("Agg")  # no window, wherever the tests run


@pytest.fixture(scope="module")
def clip():
    config = CLIPConfig.nano(50)
    return CLIP(dataclasses.replace(config, image=dataclasses.replace(config.image, layers=2))).eval()


def text_of(ids):
    """The ids as a Text; 0 is padding."""
    return Text(ids, ids > 0)


def soft(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).softmax(-1)


# ------------------------------------------------------------------------------------------------------- attention maps


def test_rollout_equals_the_naive_product_of_layers():
    maps = [soft(2, heads, 5, 5) for heads in (1, 3, 3)]  # layers need not have as many heads
    for row, found in enumerate(rollout(maps)):
        joint = np.eye(5)
        for weights in maps:
            joint = (np.mean([head.numpy() for head in weights[row]], axis=0) + np.eye(5)) / 2 @ joint
        assert np.allclose(found, joint, atol=1e-6)
        assert torch.allclose(found.sum(-1), torch.ones(5))


def test_rollout_refuses_what_it_cannot_follow():
    with pytest.raises(ValueError, match="record_attention"):
        rollout([])
    with pytest.raises(ValueError, match="self-attention"):
        rollout([soft(1, 2, 4, 7)])


def test_cls_map_is_the_first_row_without_its_own_column():
    weights = torch.zeros(1, 2, 4, 4)
    weights[0, 0, 0] = torch.tensor([0.6, 0.4, 0.0, 0.0])
    weights[0, 1, 0] = torch.tensor([0.2, 0.0, 0.4, 0.4])
    assert torch.allclose(cls_map(weights), torch.tensor([[1 / 3, 1 / 3, 1 / 3]]))
    assert torch.allclose(cls_map(weights[:, [0]]), torch.tensor([[1.0, 0, 0]]))
    assert torch.equal(cls_map(weights.mean(1)), cls_map(weights))


def test_maps_of_a_real_model_at_any_size(clip):
    for side in (64, 96):
        with torch.no_grad(), record_attention(clip) as maps:
            clip.encode_image(torch.randn(2, 3, side, side))
        patches = (side // 8) ** 2
        picture = to_grid(cls_map(rollout([maps["image.0.self"], maps["image.1.self"]])))
        assert picture.shape == (2, side // 8, side // 8) and patches == picture[0].numel()
        assert torch.allclose(picture.sum((1, 2)), torch.ones(2))


def test_to_grid_goes_row_by_row_and_says_when_it_cannot():
    assert to_grid(torch.arange(6), (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="drop the class token"):
        to_grid(torch.zeros(2, 65))


class OneLayer(nn.Module):
    """Self-attention whose output *is* its weights: tokens are unit vectors, values and output pass them through."""

    def __init__(self):
        super().__init__()
        self.image = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"self_attention": Attention(4, 1)})])})
        layer = self.image["blocks"][0]["self_attention"]
        with torch.no_grad():
            layer.qkv.bias.zero_(), layer.out.bias.zero_()
            layer.qkv.weight[8:] = torch.eye(4)
            layer.out.weight.copy_(torch.eye(4))
        self.layer = layer

    def forward(self):
        return self.layer(torch.eye(4).expand(2, 4, 4))  # (2, 4, 4), equal to the weights


def test_grad_cam_lights_what_speaks_for_the_score_and_nothing_else():
    model = OneLayer().train()
    cam = grad_cam(model, lambda: model()[:, 0, 2], ["image.0.self"])["image.0.self"]
    with torch.no_grad():
        weights = model()
    expected = torch.zeros(2, 4, 4)
    expected[:, 0, 2] = weights[:, 0, 2]  # the slope is 1 there, 0 elsewhere
    assert torch.allclose(cam, expected) and not cam.requires_grad
    against = grad_cam(model, lambda: -model()[:, 0, 2], ["image.0.self"])["image.0.self"]
    assert not against.any()  # what speaks against is cut off
    assert model.training and all(p.grad is None for p in model.parameters())


def test_grad_cam_says_what_is_missing(clip):
    model = OneLayer()
    with pytest.raises(KeyError, match="has image.0.self"):
        grad_cam(model, lambda: model().sum(), ["fusion.0.cross"])
    images, text = torch.randn(1, 3, 64, 64), text_of(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="does not depend on text.0.self"):
        grad_cam(clip, lambda: (clip.encode_text(text), clip.encode_image(images))[1][:, 0], ["text.0.self"])
    frozen = OneLayer().requires_grad_(False)
    with pytest.raises(ValueError, match="no gradient"):
        grad_cam(frozen, lambda: frozen()[:, 0, 2], ["image.0.self"])


@pytest.mark.parametrize("layer", [-1, 0])
def test_value_tokens_are_what_the_class_token_mixes(clip, layer):
    """The attention's output for the class token is the mean of the values, weighted by its attention."""
    block = clip.image.blocks[layer]
    kept, norm = {}, clip.image.norm
    block.self_attention.register_forward_hook(lambda module, inputs, output: kept.update(out=output[:, 0]))
    with torch.no_grad(), record_attention(clip) as maps:
        images = torch.randn(2, 3, 64, 64)
        clip.encode_image(images)
        mixed, weights = kept["out"], maps[f"image.{layer % 2}.self"][:, :, 0]  # (B, D), (B, H, 1+P)
        assert weights.shape == (2, 4, 65)
        clip.image.norm = nn.Identity()
        values = value_tokens(clip.image, images, layer)  # (B, P, D)
        clip.image.norm = norm
        assert torch.allclose(value_tokens(clip.image, images, layer), norm(values), atol=1e-5)
        own = kept["out"]  # the class token's own value
    block.self_attention._forward_hooks.clear()
    with torch.no_grad():  # heads have weights of their own: compare head by head, before the output projection
        inverse = torch.linalg.inv(block.self_attention.out.weight.T.double())
        bias = block.self_attention.out.bias
        heads = lambda x: ((x - bias).double() @ inverse).unflatten(-1, (4, -1))  # noqa: E731
        everything = torch.cat([heads(own)[:, None], heads(values)], dim=1)  # (B, 1+P, H, D/H)
        expected = torch.einsum("bhp,bphd->bhd", weights.double(), everything)
    assert torch.allclose(heads(mixed), expected, atol=1e-4)


def test_similarities_with_patches_equal_the_cosines_one_by_one(clip):
    images, ids = torch.randn(2, 3, 64, 64), torch.randint(7, 50, (2, 5))
    ids[1, 3:] = 0
    text = text_of(ids)
    words = word_patch_similarity(clip, images, text)
    assert words.shape == (2, 5, 64) and not words[1, 3:].any()
    with torch.no_grad():
        values = value_tokens(clip.image, images)
        patch = clip.itc_head.project_image(values[1, 17])
        word = clip.itc_head.project_text(clip.encode_text(text)[1, 2])
    assert words[1, 2, 17].item() == pytest.approx(torch.cosine_similarity(word, patch, 0).item(), abs=1e-5)
    whole = text_patch_similarity(clip, values, text)
    assert whole.shape == (2, 64)
    assert whole[1, 17].item() == pytest.approx(words[1, 2, 17].item(), abs=1e-5)  # its last token stands for the text
    with pytest.raises(TypeError, match="cross-attention"):
        word_patch_similarity(OneLayer(), images, text)


def test_joint_map_is_the_text_rows_and_patch_columns():
    model, images = ViLT(ViLTConfig.nano(50)).eval(), torch.randn(2, 3, 64, 64)
    text = text_of(torch.tensor([[1, 9, 8, 2], [1, 9, 2, 0]]))
    with torch.no_grad(), record_attention(model) as maps:
        model.match(images, text)
    layers = [maps[f"joint.{n}.self"] for n in range(4)]  # (B, H, 4 + 1 + 64, 4 + 1 + 64)
    found = joint_map(layers[2], 4)
    assert found.shape == (2, 4, 64)
    assert found[1, 2, 63].item() == pytest.approx(layers[2][1, :, 2, -1].mean().item())
    rolled = rollout(layers)
    assert joint_map(rolled, 4)[0, 0, 0].item() == pytest.approx(rolled[0, 0, 5].item())


# -------------------------------------------------------------------------------------------------------------- figures


def sample(name, side=(48, 48)):
    regions = [Region((0.5, 0.25, 0.4, 0.2), name)]
    return Sample(np.full((*side, 3), 200, np.uint8), 0, [f"a {name} and a rather long caption behind it"], regions)


def scores(value):
    return {"object": Score(value, value - 0.05, value + 0.05, 0.5, 100), "swap": Score(0.5, 0.4, 0.6, 0.5, 100)}


def history():
    rows = [{"step": i, "loss": 3.0 - i / 50, "itc": 3.0 - i / 50, "gradient": 1.0} for i in range(100)]
    return SimpleNamespace(steps=rows, validation=[{"step": 49, "R@1": 0.3}, {"step": 99, "R@1": 0.7}])


def boxes_figure():
    with drawing.style():
        figure, ax = plt.subplots()
        plt.close(figure)
    drawing.draw_boxes(ax, sample("dog").image, sample("dog").regions, [(0.5, 0.5, 0.2, 0.2)])
    return figure


FIGURES = {
    "show_scenes": lambda: drawing.show_scenes([sample("dog"), sample("cat", (30, 60)), sample("bus")], 2, boxes=True),
    "draw_boxes": boxes_figure,
    "attention": lambda: drawing.attention_figure(
        sample("dog", (30, 60)).image, list("abcdefg"), np.random.rand(7, 3, 6), [(0.5, 0.5, 0.2, 0.2)]
    ),
    "retrieval": lambda: drawing.retrieval_grid(["a dog", "a cat"], [sample("x").image] * 3, np.eye(3)[:, :2], [0, 2]),
    "matrix": lambda: drawing.similarity_matrix(np.eye(3), ["a", "b", "c"], [sample("x").image] * 3),
    "matrix of many": lambda: drawing.similarity_matrix(np.random.rand(20, 30), ["a caption"] * 30),
    "matrices": lambda: drawing.similarity_matrices({"a": np.eye(2), "b": -np.eye(2)}, [sample("x").image] * 2),
    "patches": lambda: drawing.cut_into_patches(sample("x").image, 8),
    "differences": lambda: drawing.differences({"a": [0.1, -0.2], "b": [0.3]}, "cosine", sample("x").image),
    "curves": lambda: drawing.training_curves(history()),
    "runs": lambda: drawing.curves({"loss": {"a": [2, 1], "b": [1]}, "R@1": {"a": [0, 1]}}, {"R@1": 0.1}),
    "bars": lambda: drawing.bars_with_spread({"CLIP": [scores(0.8), scores(0.9)], "X-VLM": [scores(0.95)]}),
    "taxonomy": drawing.taxonomy,
    "timeline": lambda: drawing.timeline({"CLIP": "01"}),
}


def pixels(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=60)
    return np.asarray(Image.open(buffer).convert("RGBA"))


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_without_a_warning_and_leaves_nothing_behind(name):
    before = dict(plt.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = pixels(FIGURES[name]())
    assert plt.get_fignums() == []  # a notebook shows the returned figure once, not twice
    assert dict(plt.rcParams) == before
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert not corners[:, 3].any()  # transparent: suits any theme
    assert picture[..., 3].any()


@pytest.mark.parametrize("ground", ["#ffffff", "#111111"])
def test_ink_is_readable_on_light_and_dark(ground):
    def luminance(color):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))

    dark, light = sorted((luminance(drawing.INK), luminance(ground)))
    assert (light + 0.05) / (dark + 0.05) > 4


def test_heat_glows_where_the_weight_is():
    weights = np.zeros((4, 8))
    weights[3, 1] = 1  # low and left
    figure, ax = plt.subplots(figsize=(4, 2))
    plt.close(figure)
    ax.set_position((0, 0, 1, 1))
    drawing.heat(ax, np.full((40, 80, 3), 128, np.uint8), weights)
    picture = pixels(figure)[..., :3].astype(float)
    color = picture.max(-1) - picture.min(-1)
    y, x = np.unravel_index(color.argmax(), color.shape)
    assert 0.7 < y / len(picture) < 1 and 0.1 < x / picture.shape[1] < 0.28
    assert color[: len(picture) // 2].max() < 5  # elsewhere the picture stays gray


def test_boxes_are_drawn_where_they_are():
    found = [p for p in boxes_figure().axes[0].patches if isinstance(p, Rectangle)]
    corners = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in found]
    assert np.allclose(corners, [(0.3, 0.15, 0.4, 0.2), (0.4, 0.4, 0.2, 0.2)])
    assert found[0].get_linestyle() != found[1].get_linestyle()  # predicted boxes are dashed


def test_attention_figure_uses_one_scale_for_all_words():
    maps = np.stack([np.full((2, 2), 0.1), np.full((2, 2), 0.4)])
    figure = drawing.attention_figure(sample("dog").image, ["a", "dog"], maps)
    drawn = [ax.images[-1] for ax in figure.axes[1:3]]
    assert np.allclose([image.get_clim() for image in drawn], [(0, 0.4), (0, 0.4)])
    with pytest.raises(ValueError, match="one map per word"):
        drawing.attention_figure(sample("dog").image, ["a"], maps)


def test_retrieval_grid_orders_by_similarity_and_marks_the_right_image():
    images = [np.full((8, 8, 3), 60 * i, np.uint8) for i in range(4)]
    similarity = np.array([[0.1], [0.9], [0.2], [0.5]])
    figure = drawing.retrieval_grid(["a dog"], images, similarity, [3], top=3)
    shown = [int(ax.images[0].get_array()[0, 0, 0]) // 60 for ax in figure.axes[1:]]
    assert shown == [1, 3, 2]
    assert [any(t.get_text() == "✓" for t in ax.texts) for ax in figure.axes[1:]] == [False, True, False]
    assert "rank 2" in figure.axes[0].texts[1].get_text()


def test_curves_show_each_quantity_once():
    figure = drawing.training_curves(history())
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert [title.split(":")[0] for title in titles if title] == ["loss", "R@1"]  # `itc` only repeats the loss
    assert "R@1: 0.70" in titles
    rows = history().steps  # as read back from a log
    assert drawing.training_curves(rows, ["gradient"]).axes[0].get_title(loc="left") == "gradient: 1.00"
    with pytest.raises(ValueError, match="no accuracy; it has loss"):
        drawing.training_curves(rows, ["accuracy"])
    with pytest.raises(ValueError, match="empty"):
        drawing.training_curves([])


def test_bars_show_every_seed_the_mean_and_chance():
    ax = drawing.bars_with_spread({"CLIP": [scores(0.8), scores(0.9)]}, ["object"]).axes[0]
    assert ax.patches[0].get_width() == pytest.approx(0.85)
    interval, seeds, chance = (line.get_xdata() for line in ax.lines)
    assert list(seeds) == [0.8, 0.9] and np.allclose(interval, [0.75, 0.95]) and set(chance) == {0.5}
    with pytest.raises(ValueError, match="at least one run"):
        drawing.bars_with_spread({"CLIP": []})


def test_bars_say_what_they_show():
    def said_below(runs):
        return [text.get_text() for text in drawing.bars_with_spread(runs).legends[0].texts]

    seeds = said_below({"plain": [scores(0.8), scores(0.9)]})
    assert seeds == ["mean of the seeds", "one seed", "95 % interval (the widest of the seeds)", "chance"]
    assert said_below({"plain": [scores(0.8)]}) == ["value", "95 % interval", "chance"]


@pytest.mark.parametrize(
    ("measure", "shown"),
    [
        ("text to image R@1", "text to image R@1"),
        ("facts wrong", "facts wrong\n(lower is better)"),
        ("facts wrong (lower is better)", "facts wrong (lower is better)"),  # said once
        ("image to text median rank", "image to text median rank\n(lower is better)"),
        ("validation loss", "validation loss\n(lower is better)"),
        ("masked word: right image", "masked word: right image"),
        ("masked word: wrong image", "masked word: wrong image\n(lower if the image is used)"),
        ("masked word: no image", "masked word: no image\n(guessed from the text)"),
        ("where, gray image", "where, gray image\n(guessed from the text)"),
        ("kept, lossless", "kept, lossless"),  # a word that only contains one of ours
    ],
)
def test_measures_of_which_less_is_better_say_so(measure, shown):
    ax = drawing.bars_with_spread({"a": [{measure: Score(0.5, 0.4, 0.6, 0.5, 9)}]}).axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [shown]


def test_bars_of_models_have_the_colors_of_the_models():
    def drawn(*labels):
        bars = (
            drawing.bars_with_spread({label: [{"object": scores(0.8)["object"]}] for label in labels}).axes[0].patches
        )
        return [(to_hex(bar.get_facecolor()), bar.get_hatch() or "") for bar in bars]

    albef, xvlm = (drawing.color_of(title).lower() for title in ("ALBEF", "X-VLM"))
    first, second, other = drawn("ALBEF, grounded", "ALBEF, plain", "X-VLM nano")
    assert first == (albef, "") and second[0] == albef and second[1] and other == (xvlm, "")
    plain = [(color.lower(), "") for color in drawing.PALETTE[:2]]
    assert drawn("ALBEF", "without ITC") == plain  # not all are models
    assert drawn("X-VLM, boxes", "X-VLM, none") == plain  # the same color twice would say nothing
    assert drawn("X-VLM") == [(xvlm, "")]


def test_curves_say_what_lines_and_dots_are():
    def said_below(*arguments):
        return [text.get_text() for text in drawing.training_curves(*arguments).legends[0].texts]

    assert said_below(history()) == ["each step", "running mean", "validation"]
    assert said_below(history().steps) == ["each step", "running mean"]
    assert said_below(history(), ["R@1"]) == ["validation"]


def test_taxonomy_orders_the_parts_as_the_papers_do():
    text = " ".join(t.get_text() for t in drawing.taxonomy().axes[0].texts)
    for order in ("VE > TE > MI", "VE = TE > MI", "VE > MI > TE", "MI > VE = TE"):
        assert order in text


def test_timeline_has_every_paper_of_the_library():
    lessons = {row.title.split(" (")[0]: row.lesson for row in PAPERS.values()}
    said = " ".join(t.get_text() for t in drawing.timeline(lessons).axes[0].texts)
    for title, lesson in lessons.items():
        assert (f"{title}\nlesson {lesson}" if lesson else title) in said
    assert said.count("\nlesson ") == sum(bool(lesson) for lesson in lessons.values())
    for title in ("CoCa", "FLAVA", "FILIP", "Chinese-CLIP", "GIT", "BEiT-3", "BridgeTower"):
        assert title in said


def test_patches_are_cut_row_by_row():
    image = np.zeros((16, 24, 3), np.uint8)
    image[8:, 16:] = 255  # the last patch of the second row
    drawn = drawing.cut_into_patches(image, 8).axes[1].images
    assert len(drawn) == 6 and [int(patch.get_array().max()) for patch in drawn] == [0, 0, 0, 0, 0, 255]


TEXTS = {  # what a caption may hold, and no drawing may take for a formula
    "prices": "a $5 hat and a $20 coat",
    "broken formula": r"from $\frac{1$ to $x_^$ 100 %",
    "names of files": "dog_1^2_a.jpg #1 & ~ {x} \\$5",
    "one dollar": "only $",
}


def said(texts):
    """Figures that show these texts, two of them at least."""
    image, some = sample("x").image, [*texts, *texts][:2]
    labelled = Sample(image, 0, list(some), [Region((0.5, 0.5, 0.4, 0.4), some[0])])
    figure, ax = plt.subplots()  # axes of the user's own
    drawing.draw_boxes(ax, image, labelled.regions)
    plt.close(figure)
    rows = [{"step": step, some[0]: 1.0} for step in range(3)]
    return {
        "draw_boxes": figure,
        "show_scenes": drawing.show_scenes([labelled], boxes=True),
        "attention_figure": drawing.attention_figure(image, some, np.ones((2, 3, 3))),
        "attention_grid": drawing.attention_grid([labelled], {some[0]: np.ones((1, 3, 3))}),
        "caption_grid": drawing.caption_grid([image], [[(some[0], True)]], [some]),
        "retrieval_grid": drawing.retrieval_grid(some, [image] * 2, np.eye(2), [0, 1]),
        "similarity_matrix": drawing.similarity_matrix(np.eye(2), some),
        "word_attention": drawing.word_attention(some, {some[0]: np.eye(2)}),
        "expert_figure": drawing.expert_figure({some[0]: [["text", "image"]]}, {some[0]: some}),
        "frozen_table": drawing.frozen_table({some[0]: {some[1]: (1, 2)}}),
        "training_curves": drawing.training_curves(rows),
        "bars_with_spread": drawing.bars_with_spread({some[0]: [{some[0]: Score(0.5, 0.4, 0.6, 0.5, 9)}]}),
    }


@pytest.mark.parametrize("kind", TEXTS)
def test_no_text_is_read_as_a_formula(kind):
    for name, figure in said([TEXTS[kind]]).items():
        pixels(figure)  # matplotlib raises for a broken formula here
        shown = [text for text in figure.findobj(DrawnText) if "$" in text.get_text()]
        if "$" in TEXTS[kind]:
            assert shown, name
        for text in shown:
            assert not text.get_usetex() and text._preprocess_math(text.get_text()) == (text.get_text(), False), name


@pytest.mark.parametrize(
    "text",
    [
        "一只狗 $5",
        "a dog \U0001f415\u200d\U0001f9ba",
        "\u0645\u0631\u062d\u0628\u0627 \u0e2a",
        "\x07 \x00 \ud83d \ufffe",
    ],
)
def test_letters_without_a_font_are_no_error(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for figure in said([text]).values():
            pixels(figure)


def test_letters_that_no_font_has_become_squares_with_one_warning(monkeypatch):
    monkeypatch.setattr(ink, "glyphs", lambda: frozenset(map(ord, "a dog")))
    ink.warn_of_missing_font.cache_clear()
    with pytest.warns(UserWarning, match="Noto Sans CJK") as caught:
        assert ink.printable("a 狗") == ink.printable("a 狗") == "a □"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ink.printable("a dog\n") == "a dog\n"


def test_values_are_those_of_all_patches_with_and_without_a_class_token():
    for class_token in (True, False):
        config = ImageConfig(32, 8, 1, BlockConfig(16, 2, 32), class_token=class_token)
        assert value_tokens(ImageEncoder(config), torch.randn(2, 3, 32, 32)).shape == (2, 16, 16)
