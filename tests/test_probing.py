"""Linear probes: what is in the tokens is found on other scenes, what is not in them is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minivlp.data.scenes import Scenes
from minivlp.evaluation.probing import LinearMap, linear_probe, object_patches
from minivlp.models.xvlm import XVLM, XVLMConfig


@pytest.fixture(scope="module")
def scenes():
    return Scenes(60, "validation", 3), Scenes(30, "test", 7)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return XVLM(XVLMConfig.nano(100)).eval()


def test_each_patch_gets_the_object_whose_box_holds_its_center(model, scenes):
    patches = object_patches(model, scenes[1], [4, 9])
    assert patches.tokens.shape == (len(patches.nouns), 128) and set(patches.rows) == {4, 9}
    everything = {(row, x, y) for row in (4, 9) for x in range(8) for y in range(8)}
    for place, noun, color, row in zip(patches.places, patches.nouns, patches.colors, patches.rows, strict=True):
        x, y = (place * 64).tolist()  # in pixels
        boxes = [(one, box) for one in scenes[1].scene(row).objects for box in one.boxes]
        (one,) = [one for one, (x0, y0, x1, y1) in boxes if x0 <= x <= x1 and y0 <= y <= y1]
        assert (one.noun, one.color or "") == (noun, color)
        everything.remove((row, int(x // 8), int(y // 8)))
    for row, column, line in everything:  # all others lie on no object, or on two
        x, y = 8 * column + 4, 8 * line + 4
        boxes = [box for one in scenes[1].scene(row).objects for box in one.boxes]
        assert sum(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes) != 1


def test_a_layer_is_the_tower_up_to_this_block(model, scenes):
    last = object_patches(model, scenes[1], [2], 3).tokens
    assert torch.allclose(model.image.norm(last), object_patches(model, scenes[1], [2]).tokens, atol=1e-5)
    assert not torch.allclose(last, object_patches(model, scenes[1], [2], 2).tokens, atol=1e-2)


def test_positions_are_read_where_they_were_added_and_not_elsewhere(model, scenes):
    """Sine waves are added to the patches; without them one patch hardly tells where it lies."""
    with_positions = linear_probe(model, *scenes, layer=1)
    assert with_positions["position R²"].value > 0.9
    config = XVLMConfig.nano(100)
    blind = XVLM(replace(config, image=replace(config.image, sincos_positions=False))).eval()
    torch.nn.init.zeros_(blind.image.embed.positions)
    without = linear_probe(blind, *scenes, layer=1)
    assert without["position R²"].value < 0.5
    for found in (with_positions, without):
        assert set(found) == {"position R²", "object", "color"}
        assert found["color"].value > found["color"].chance > 0 and found["object"].n > found["color"].n > 0


def test_the_map_is_linear_regression_with_a_constant():
    tokens = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    read = LinearMap.fit(tokens, tokens @ torch.tensor([[2.0], [0.0], [-1.0]]) + 5)(torch.eye(3))
    assert np.allclose(read[:, 0], [7, 5, 4], atol=0.2)
