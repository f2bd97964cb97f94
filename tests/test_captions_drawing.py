"""Figures of generated captions: wrong words are marked, and the decoder's attention belongs to the right word."""

from __future__ import annotations

import dataclasses
import io
import warnings
from random import Random

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.offsetbox import HPacker, TextArea
from PIL import Image

from minivlp.data.batch import Text
from minivlp.data.scene import Background, Scene, SceneObject
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.facts import check_facts, proofread
from minivlp.layers.attention import record_attention
from minivlp.models.blip import BLIP, BLIPConfig
from minivlp.visualize import drawing
from minivlp.visualize.attention import decoder_attention

HEART = SceneObject("heart", "red", "small", 1, ((0, 40, 20, 60),))
BEES = SceneObject("bee", None, None, 2, ((60, 40, 80, 60), (60, 70, 80, 90)))
SCENE = Scene((HEART, BEES), Background(((0, 0, 0), (9, 9, 9))), 100)
PICTURE = np.full((40, 40, 3), 200, np.uint8)


# ------------------------------------------------------------------------------------------------------ which words


@pytest.mark.parametrize(
    ("caption", "wrong", "missing"),
    [
        ("A small red heart left of two bees.", "", []),
        ("a picture of two bees to the right of a small red heart", "", []),
        ("a large red heart left of two bees", "large", []),
        ("a small blue heart above two bees", "blue above", []),
        ("a small red heart left of three bees", "three", []),
        ("a heart left of bees", "", ["small red heart", "two bees"]),
        ("a small red heart", "", ["two bees"]),
        ("a small red heart and two bees", "", ["heart left of bee"]),
        ("a yellow dog left of two bees", "a yellow dog left", ["a small red heart"]),
        ("", "", ["a small red heart", "two bees"]),
    ],
)
def test_wrong_words_are_found_in_their_places(caption, wrong, missing):
    words, left_out = proofread(caption, SCENE)
    assert " ".join(word for word, bad in words if bad) == wrong
    assert [word for word, _ in words] == caption.lower().rstrip(".").split()
    assert left_out == missing


def test_as_many_words_are_wrong_as_facts_are():
    rng, dataset = Random(0), Scenes(60, "test", seed=7)
    words = "a two red small heart hearts dog left above of picture bees".split()
    texts = [(" ".join(rng.choice(words) for _ in range(rng.randrange(14))), SCENE) for _ in range(60)]
    for row in range(60):
        texts += [(text, dataset.scene(row)) for text in dataset.scene(row).counterfactuals(Random(row)).values()]
    for text, scene in texts:
        counts, (marked, missing) = check_facts(text, scene), proofread(text, scene)
        assert sum(bad for _, bad in marked) == counts[:, 1].sum(), text
        assert bool(missing) == bool(counts[:, 2].any()), text


# ------------------------------------------------------------------------------------------------------- the figure


def texts_of(figure):
    """Every word drawn below the pictures."""
    return [area._text for ax in figure.axes for area in ax.findobj(TextArea)]


def test_a_wrong_word_is_marked_by_more_than_its_color():
    read = [proofread("a small blue heart above two bees", SCENE), proofread("a heart", SCENE)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = drawing.caption_grid([PICTURE] * 2, [words for words, _ in read], [gone for _, gone in read])
        file = io.BytesIO()
        figure.savefig(file, dpi=60)
    assert plt.get_fignums() == [] and not np.asarray(Image.open(file).convert("RGBA"))[[0, -1], [0, -1], 3].any()
    marked = {text.get_text(): text for text in texts_of(figure)}
    for word, text in marked.items():
        wrong = word in ("blue", "above")
        assert (text.get_color() == drawing.VERMILION) is wrong
        assert (text.get_fontweight() == "bold") is wrong
        assert (text.get_bbox_patch() is not None) is wrong  # the wavy line
    assert "".join(marked).replace("\n", " ").endswith("missing: small red heart, two bees")


def test_a_tick_only_where_nothing_is_wrong_and_nothing_missing():
    captions = ["a small red heart left of two bees", "a small blue heart left of two bees", "two bees"]
    read = [proofread(text, SCENE) for text in captions]
    figure = drawing.caption_grid([PICTURE] * 3, [words for words, _ in read], [gone for _, gone in read])
    assert [sum(text.get_text() == "✓" for text in texts_of_one) for texts_of_one in map(of_axes, figure.axes)] == [
        1,
        0,
        0,
    ]
    unjudged = drawing.caption_grid([PICTURE], [read[0][0]])
    assert not any("✓" in text.get_text() for text in texts_of(unjudged))  # nobody asked what is missing
    with pytest.raises(ValueError, match="2 pictures"):
        drawing.caption_grid([PICTURE] * 2, [read[0][0]])


def of_axes(ax):
    return [area._text for area in ax.findobj(TextArea)]


def test_long_captions_are_broken_and_an_empty_one_is_said():
    words = [("pineapple", i == 7) for i in range(12)]
    figure = drawing.caption_grid([PICTURE] * 2, [words, []], columns=2)
    lines = [line.get_children() for line in figure.axes[0].findobj(HPacker)]
    assert [len(line) for line in lines] == [5, 5, 2]  # as many as fit below half a notebook's width
    assert "(nothing)" in [text.get_text() for text in of_axes(figure.axes[1])]


# ------------------------------------------------------------------------------------------- the decoder's attention


@pytest.mark.parametrize("shared", [BLIPConfig.nano().shared, ()])
def test_a_token_is_predicted_one_position_before_it_is_read(shared):
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    model = BLIP(dataclasses.replace(BLIPConfig.nano(len(tokenizer)), shared=shared))
    images = torch.rand(2, 3, 64, 64)
    ids = torch.tensor([[1, 9, 8, 7, 2], [1, 9, 2, 0, 0]])
    by_layer = decoder_attention(model, images, Text(ids, ids > 0))
    assert model.training and len(by_layer) == model.config.text.layers
    model.eval()
    with torch.no_grad(), record_attention(model) as maps:
        prefix = torch.tensor([[model.config.tokens.dec, 9, 8]])
        model.decode(Text(prefix, prefix > 0), model.encode_image(images[:1]))
    cross = [weights for name, weights in maps.items() if name.endswith("cross")]
    for found, weights in zip(by_layer.values(), cross, strict=True):
        assert found.shape == (2, 4, 5, 64) and not found[:, :, 0].any()
        # the token 7, at position 3, is predicted from [DEC] 9 8
        torch.testing.assert_close(found[0, :, 3], weights[0, :, 2, 1:])
    other = ids.clone()
    other[0, 3] = 30  # a later token changes nothing before
    changed = decoder_attention(model, images, Text(other, ids > 0))
    for before, after in zip(by_layer.values(), changed.values(), strict=True):
        torch.testing.assert_close(before[0, :, :4], after[0, :, :4])
        assert not torch.allclose(before[0, :, 4], after[0, :, 4])
