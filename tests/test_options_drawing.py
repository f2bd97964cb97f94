"""Scored options, one bar for each text, true ones marked by more than their color; ROC curves of scores."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from minivlp.evaluation.filtering import roc
from minivlp.visualize.drawing.filters import CAPFILT, capfilt, roc_curves
from minivlp.visualize.drawing.options import Options, option_bars, ticks


def bars(ax):
    return [patch.get_width() for patch in ax.patches if isinstance(patch, Rectangle)]


def test_every_text_has_its_score_and_a_true_one_a_tick():
    first, second = (
        Options("fits?", ["a cat", "a dog"], [0.9, 0.25], right={0}),
        Options("next?", ["a"], np.array([1.0])),
    )
    figure = option_bars([first, second], widths=[2, 1])
    left, right = figure.axes
    assert bars(left) == [0.9, 0.25] and bars(right) == [1.0]
    assert [text.get_text() for text in left.texts] == ["✓ a cat", "a dog"]
    assert left.get_title() == "fits?" and left.get_ylim() == right.get_ylim()  # bars of all panels are equally thick


def test_pictures_stand_above_their_panels():
    picture = np.zeros((8, 8, 3), np.uint8)
    figure = option_bars([Options("one", ["x"], [0.5], image=picture), Options("two", ["y"], [0.5])])
    above, empty, *_ = figure.axes
    assert len(above.images) == 1 and not empty.images


def test_a_text_without_a_score_is_an_error():
    with pytest.raises(ValueError, match="'fits' has 2 texts and 1 scores"):
        option_bars([Options("fits", ["a", "b"], [0.5])])


def test_a_curve_for_each_score_and_the_threshold_that_is_marked():
    curves = {"good": roc([0.9, 0.8, 0.1], [True, True, False]), "bad": roc([0.1, 0.2, 0.3], [True, True, False])}
    ax = roc_curves(curves, {"one half": (0.25, 0.75)}).axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["chance", "good", "bad", "one half"]
    assert lines["good"].get_ydata()[1] > 0 and lines["bad"].get_xdata()[1] == 1
    assert [line.get_linestyle() for line in ax.lines[1:3]] == ["-", "-."]  # not by color alone
    assert lines["one half"].get_xydata().tolist() == [[0.25, 0.75]]


def test_right_and_wrong_answers_are_told_by_their_signs():
    ax = ticks({"a cat": [True, False], "a dog": [False, False]}, ["CLIP", "BLIP"]).axes[0]
    said = [(text.get_text(), *text.get_position()) for text in ax.texts]
    names = {text: x for text, x, y in said if y < 0}
    assert list(names) == ["CLIP", "BLIP"]
    assert [sign for sign, x, y in said if y == 0] == ["a cat", "✓", "✗"]
    assert [sign for sign, x, y in said if x == names["CLIP"] and y >= 0] == ["✓", "✗"]
    with pytest.raises(ValueError):
        ticks({"a cat": [True]}, ["CLIP", "BLIP"])


def test_the_new_model_of_capfilt_reads_what_was_kept_and_the_clean_captions():
    said = {text.get_text() for text in capfilt().axes[0].texts}
    assert {"captioner", "filter", "a new BLIP", "not filtered"} <= said
    ways = {(arrow.start.split()[0], arrow.end.split()[0]) for arrow in CAPFILT.arrows}
    assert {start for start, end in ways if end == "final"} == {"kept", "clean"}
    assert {start for start, end in ways if end == "filter"} == {"first", "clean", "new", "web"}
