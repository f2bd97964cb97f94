"""Figures of lesson 02: they draw without a warning, and show what they are given."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import Rectangle

from minivlp.visualize import drawing


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert plt.get_fignums() == []  # a notebook shows the returned figure once, not twice


def test_a_strip_has_every_token_and_the_right_patches():
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[8:, :8] = 200  # patch 2 of four, row by row
    figure = drawing.token_strip([["[CLS]", "bee", None]], [picture], [1, 2])
    figure.canvas.draw()
    ax = figure.axes[0]
    words = [text.get_text() for text in ax.texts]
    assert {"[CLS]", "bee", "class"} <= set(words)
    assert [int(image.get_array().max()) for image in ax.images] == [0, 200]
    assert sum(patch.get_hatch() is not None for patch in ax.patches) == 1


def test_tables_write_shares_in_percent():
    figure = drawing.number_tables(
        {"cost": np.array([[0.3, 0.4]]), "plan": np.array([[0.25, 0.75]])}, ["bee"], ["left", "right"], ["plan"]
    )
    figure.canvas.draw()
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert texts == [["0.3", "0.4"], ["25 %", "75 %"]]


def test_stacked_bars_begin_where_the_part_before_ends():
    figure = drawing.stacked_bars(
        {"ms": {"A": [1.0, 2.0], "B": [3.0, 0.0]}}, {"VE": drawing.BLUE, "TE": drawing.ORANGE}
    )
    figure.canvas.draw()
    bars = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches if isinstance(bar, Rectangle)]
    assert bars == [(0, 1), (1, 2), (0, 3), (3, 0)]


def test_picture_rows_name_each_row():
    pictures = [np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)]
    figure = drawing.picture_rows({"masked": pictures, "predicted": pictures[::-1]})
    figure.canvas.draw()
    assert [ax.get_ylabel() for ax in figure.axes] == ["masked", "", "predicted", ""]
    assert [ax.images[0].get_array().max() > 0 for ax in figure.axes] == [False, True, True, False]
