"""Figures of a transformer with experts say what they were given: letter, color, mark and number, all in place."""

from __future__ import annotations

import io
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image

from minivlp.data.batch import Text
from minivlp.models.vlmo import VLMo, VLMoConfig
from minivlp.training.stages import freeze_for_text, trainable
from minivlp.visualize import drawing
from minivlp.visualize.attention import expert_map
from minivlp.visualize.drawing.experts import EXPERTS, runs, thousands

plt.switch_backend("Agg")  # no window, wherever the tests run

BELOW, ABOVE = ["text"] * 3 + ["image"] * 5, ["vl"] * 8
PAIR = {"a pair": [BELOW, BELOW, ABOVE]}
LABELS = {"a pair": ["[CLS]", "a", "dog", "class", *["patch"] * 4]}
STAGES = {
    "images": {"attention": (600, 600), "image expert": (1_500_000, 1_500_000)},
    "texts": {"attention": (0, 600), "words": (20_000, 70_000)},
}


def cells(ax) -> list[tuple[float, str, str]]:
    """(layer, letter, color of the box behind the letter) of all cells, from left to right in each layer."""
    boxes = [p for p in ax.patches if isinstance(p, Rectangle) and to_hex(p.get_facecolor()) != drawing.INK]
    found = []
    for text in ax.texts:
        x, y = text.get_position()
        behind = [p for p in boxes if p.get_window_extent().contains(*ax.transData.transform((x, y)))]
        if behind:
            found.append((int(y), x, text.get_text(), to_hex(behind[0].get_facecolor(), keep_alpha=False).upper()))
    return [(layer, letter, color) for layer, _, letter, color in sorted(found)]


def figures():
    half = np.full((3, 3), 0.5)
    return {
        "experts": drawing.expert_figure(PAIR | {"alone": [["shared"]] * 3}, LABELS | {"alone": ["狗"]}),
        "stages": drawing.frozen_table(STAGES),
        "words": drawing.word_attention(["a", "red", "dog"], {f"map {i}": half for i in range(5)}),
    }


@pytest.mark.parametrize("name", ["experts", "stages", "words"])
def test_every_figure_draws_without_a_warning_and_is_transparent(name):
    before, buffer = dict(plt.rcParams), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "No font on this machine")
        figures()[name].savefig(buffer, dpi=60)
    picture = np.asarray(Image.open(buffer).convert("RGBA"))
    assert plt.get_fignums() == [] and dict(plt.rcParams) == before
    assert not picture[[0, 0, -1, -1], [0, -1, 0, -1], 3].any() and picture[..., 3].any()


# ------------------------------------------------------------------------------------------------------- who handles it


def test_letter_and_color_name_the_expert_of_each_token_from_the_lowest_layer_up():
    ax = drawing.expert_figure(PAIR, LABELS).axes[0]
    t, i, v = (EXPERTS[name][:2] for name in ("text", "image", "vl"))
    low = [t, t, t, i, i]  # three words, the class token, and four patches that share a cell
    wanted = [(0, *cell) for cell in low] + [(1, *cell) for cell in low] + [(2, *v)] * 5
    assert cells(ax) == wanted
    below = [text.get_text() for text in ax.texts if text.get_position()[1] < 0]
    assert below == ["[CLS]", "a", "dog", "class", "4 x patch"]


def test_equal_tokens_that_go_to_different_experts_are_not_drawn_as_one():
    ax = drawing.expert_figure({"odd": [["image", "image", "vl", "image"]]}, {"odd": ["patch"] * 4}).axes[0]
    assert [letter for _, letter, _ in cells(ax)] == ["I", "V", "I"]


def test_the_legend_names_only_experts_that_are_there():
    legend = drawing.expert_figure(PAIR, LABELS).legends[0]
    names = " ".join(text.get_text() for text in legend.get_texts())
    assert "T  text expert" in names and "V  vision-language expert" in names and "shared by all tokens" in names
    assert "S  " not in names


def test_it_draws_what_a_model_did():
    model = VLMo(VLMoConfig.nano(50)).eval()
    images, ids = torch.randn(1, 3, 64, 64), torch.tensor([[1, 9, 2]])
    text = Text(ids, ids > 0)
    words, patches = ["[CLS]", "dog", "[SEP]"], ["class", *["patch"] * 64]
    routes = {
        "image": expert_map(model, lambda: model.embed_images(images)),
        "text": expert_map(model, lambda: model.embed_texts(text)),
        "pair": expert_map(model, lambda: model.match(images, text)),
    }
    axes = drawing.expert_figure(routes, {"image": patches, "text": words, "pair": words + patches}).axes
    found = ["".join(letter for _, letter, _ in cells(ax)) for ax in axes[:3]]
    assert found == ["II" * 4, "TTT" * 4, "TTTII" * 3 + "VVVVV"]


def test_a_layer_without_an_expert_for_each_token_is_refused():
    with pytest.raises(ValueError, match="layer 1 has experts for 3 of 8 tokens"):
        drawing.expert_figure({"a pair": [BELOW, ["vl"] * 3]}, LABELS)


def test_each_expert_has_its_own_letter_and_its_own_color():
    for kind in zip(*EXPERTS.values(), strict=True):  # letters, colors, meanings
        assert len(set(kind)) == len(EXPERTS)


def test_runs_give_everything_back():
    items = list("aabccc")
    assert list(runs(items)) == [(0, 2, "a"), (2, 3, "b"), (3, 6, "c")] and list(runs([])) == []


# ------------------------------------------------------------------------------------------------------- what is frozen


def marks(figure) -> dict[tuple[str, str], str]:
    """(component, stage) to how the dot is filled; a dash where there is a dash."""
    ax = figure.axes[0]
    rows = [label.get_text() for label in ax.get_yticklabels()]
    columns = [label.get_text() for label in ax.get_xticklabels()]
    found = {}
    for line in ax.lines:
        if line.get_marker() == "o":
            (x,), (y,) = line.get_data()
            found[rows[y], columns[x]] = line.get_fillstyle()
    for text in ax.texts:
        if text.get_text() == "–":
            x, y = text.get_position()
            found[rows[y], columns[x]] = "–"
    return found


def test_a_dot_is_full_where_it_learns_empty_where_it_is_frozen_and_half_in_between():
    assert marks(drawing.frozen_table(STAGES)) == {
        ("attention", "images"): "full",
        ("attention", "texts"): "none",
        ("image expert", "images"): "full",
        ("image expert", "texts"): "–",
        ("words", "images"): "–",
        ("words", "texts"): "left",
    }


def test_the_numbers_are_sizes_what_part_learns_and_sums():
    texts = [text.get_text() for text in drawing.frozen_table(STAGES).axes[0].texts]
    for size in ("600", "1.5 M", "70 k"):  # of attention, image expert, words
        assert size in texts
    assert texts.count("20 k") == 2  # beside the half dot, and as all that learns from texts
    assert texts.count("1.6 M") == 1 and texts.count("1.5 M") == 2  # all there is; all that learns from images


def test_it_agrees_with_a_frozen_model():
    model = VLMo(VLMoConfig.nano(50))
    freeze_for_text(model)
    found = marks(drawing.frozen_table({"2": trainable(model)}))
    assert found["attention", "2"] == found["image expert", "2"] == "none"
    assert found["text expert", "2"] == found["token embedding", "2"] == "full"


@pytest.mark.parametrize(("count", "said"), [(7, "7"), (1_499, "1 k"), (999_499, "999 k"), (999_500, "1.0 M")])
def test_thousands(count, said):
    assert thousands(count) == said


# ----------------------------------------------------------------------------------------------------- words and words


def test_word_attention_puts_the_looking_word_in_the_row_and_uses_one_scale():
    before, after = np.zeros((2, 2)), np.full((2, 2), 0.1)
    before[0, 1] = 0.8
    figure = drawing.word_attention(["red", "dog"], {"before": before, "after": torch.from_numpy(after)})
    first, second = (ax.images[0] for ax in figure.axes[:2])
    assert first.get_array()[0, 1] == pytest.approx(0.8) and first.get_clim() == second.get_clim()
    assert first.get_clim() == pytest.approx((0, 0.8))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["red", "dog"]
    with pytest.raises(ValueError, match="2 words need"):
        drawing.word_attention(["red", "dog"], {"before": np.zeros((3, 3))})
