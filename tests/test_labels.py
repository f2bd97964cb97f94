"""The tower that is trained on labels: what each patch is labeled with, and that its checkpoint initializes a BLIP."""

import dataclasses

import numpy as np
import torch

from minivlp.data.placement import SceneObject
from minivlp.data.scene import Background, Scene
from minivlp.data.scenes import Scenes
from minivlp.models.blip import BLIP, BLIPConfig
from minivlp.training.checkpoint import bundled, init_from, load_model, save_model
from minivlp.training.labels import COLOR_IDS, NOUN_IDS, LabeledConfig, LabeledTower, labeled_batches, patch_labels
from minivlp.training.loop import Settings, fit

HEART = SceneObject("heart", "red", None, 1, ((0, 0, 16, 24),))
DOGS = SceneObject("dog", None, None, 2, ((32, 40, 48, 56), (50, 40, 64, 56)))


def test_a_patch_has_the_label_of_the_object_at_its_center():
    scene = Scene((HEART, DOGS), Background(((0, 0, 0),)), 64)
    nouns, colors = (part.reshape(8, 8) for part in patch_labels(scene, (8, 8)))
    expected = np.zeros((8, 8), dtype=int)
    expected[:3, :2] = NOUN_IDS["heart"]
    assert (colors == np.where(expected, COLOR_IDS["red"], 0)).all()
    expected[5:7, 4:6] = expected[5:7, 6:8] = NOUN_IDS["dog"]
    assert (nouns == expected).all()
    wide = patch_labels(scene, (8, 16))[0].reshape(8, 16)  # the same image, resized to twice the width
    assert (wide[:, ::2] == nouns).mean() > 0.95


def test_a_batch_depends_on_seed_and_step_alone_and_labels_its_own_images():
    scenes, config = Scenes(30, "train", 1), BLIPConfig.nano().image
    one, two = labeled_batches(scenes, config, 6, seed=3), labeled_batches(scenes, config, 6, seed=3)
    assert torch.equal(one(4).nouns, two(4).nouns) and torch.equal(one(4).images, two(4).images)
    assert not torch.equal(one(4).images, one(5).images)
    batch = one(0)
    contrast = batch.images.unfold(2, 8, 8).unfold(3, 8, 8).std(dim=(1, 4, 5)).flatten(1)  # (B, P)
    assert contrast[batch.nouns > 0].mean() > 2 * contrast[batch.nouns == 0].mean()


def test_it_learns_its_labels_and_its_checkpoint_initializes_a_model(tmp_path):
    nano = BLIPConfig.nano()
    block = dataclasses.replace(nano.image.block, width=32, heads=2, hidden=64)
    image = dataclasses.replace(nano.image, block=block, layers=1)
    torch.manual_seed(0)
    tower = LabeledTower(LabeledConfig(image))
    same = labeled_batches(Scenes(8, "train", 1), image, 8)(0)
    settings = Settings(40, lr=8e-3, warmup=5)
    rows = fit(tower, lambda step: same, settings, bar=False, device="cpu").steps
    assert all(rows[-1][name] < 0.5 * rows[0][name] for name in ("noun", "color", "presence"))
    save_model(tower, tmp_path / "tower.safetensors")
    model = BLIP(dataclasses.replace(nano, image=image))
    init_from(model, tmp_path / "tower.safetensors", ("image.",))
    assert torch.equal(model.encode_image(same.images), tower.image(same.images))


def test_the_bundled_tower_knows_its_labels():
    tower = load_model(LabeledTower, bundled("image_nano"))
    batch = labeled_batches(Scenes(50, "test", 7), tower.config.image, 50)(0)
    with torch.no_grad():
        patches, shown = tower.image(batch.images)[:, 1:], batch.nouns > 0
        assert (tower.noun_head(patches).argmax(dim=-1) == batch.nouns)[shown].float().mean() > 0.75
        assert (tower.color_head(patches).argmax(dim=-1) == batch.colors)[shown].float().mean() > 0.75
