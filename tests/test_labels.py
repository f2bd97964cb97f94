"""The tower that learns from labels: what a patch is called, and that the checkpoint starts a BLIP."""

import dataclasses

import numpy as np
import torch

from minivlp.data.scene import Ground, Scene, Thing
from minivlp.data.scenes import Scenes
from minivlp.models.blip import BLIP, BLIPConfig
from minivlp.training.checkpoint import save_model, start_from
from minivlp.training.labels import NOUNS, PAINTS, LabelledConfig, LabelledTower, labelled_batches, labels_of
from minivlp.training.loop import Settings, fit


def test_a_patch_is_what_its_middle_shows():
    things = (
        Thing("heart", "red", None, 1, ((0, 0, 16, 24),)),
        Thing("dog", None, None, 2, ((32, 40, 48, 56), (50, 40, 64, 56))),
    )
    nouns, colors = (part.reshape(8, 8) for part in labels_of(Scene(things, Ground(((0, 0, 0),)), 64), 8))
    wanted = np.zeros((8, 8), dtype=int)
    wanted[:3, :2] = NOUNS["heart"]
    assert (colors == np.where(wanted, PAINTS["red"], 0)).all()
    wanted[5:7, 4:6] = wanted[5:7, 6:8] = NOUNS["dog"]
    assert (nouns == wanted).all()


def test_a_batch_depends_on_seed_and_step_alone_and_speaks_of_its_own_pictures():
    scenes, config = Scenes(30, "train", 1), BLIPConfig.nano().image
    one, two = labelled_batches(scenes, config, 6, seed=3), labelled_batches(scenes, config, 6, seed=3)
    assert torch.equal(one(4).nouns, two(4).nouns) and torch.equal(one(4).images, two(4).images)
    assert not torch.equal(one(4).images, one(5).images)
    batch = one(0)
    shown = batch.images.unfold(2, 8, 8).unfold(3, 8, 8).std(dim=(1, 4, 5)).flatten(1)  # (B, P): how much there is
    assert shown[batch.nouns > 0].mean() > 2 * shown[batch.nouns == 0].mean()


def test_it_learns_what_it_is_shown_and_its_checkpoint_starts_a_model(tmp_path):
    nano = BLIPConfig.nano()
    block = dataclasses.replace(nano.image.block, width=32, heads=2, hidden=64)
    image = dataclasses.replace(nano.image, block=block, layers=1)
    torch.manual_seed(0)
    tower = LabelledTower(LabelledConfig(image))
    same = labelled_batches(Scenes(8, "train", 1), image, 8)(0)
    settings = Settings(40, lr=8e-3, warmup=5)
    rows = fit(tower, lambda step: same, settings, bar=False, device="cpu").steps
    assert all(rows[-1][name] < 0.5 * rows[0][name] for name in ("noun", "colour", "there"))
    save_model(tower, tmp_path / "tower.safetensors")
    model = BLIP(dataclasses.replace(nano, image=image))
    start_from(model, tmp_path / "tower.safetensors", ("image.",))
    assert torch.equal(model.encode_image(same.images), tower.image(same.images))
