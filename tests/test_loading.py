"""Batches: a pure function of seed and step, every caption belongs to its picture, regions to theirs."""

import numpy as np
import pytest
import torch

from minivlp.data.english import captions, parse
from minivlp.data.folders import Photos
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def scenes():
    return Scenes(40, seed=3)


def test_a_batch_depends_on_seed_and_step_alone(scenes, tokenizer):
    one, two = (Loader(scenes, tokenizer, 8, 64, seed=5, regions_per_image=2) for _ in range(2))
    for step in (0, 3, 7, 23):
        two.batch(step + 1)  # what was asked before does not matter
        a, b = one.batch(step), two.batch(step)
        for name in ("images", "ids", "mask", "image_ids", "region_boxes", "region_ids", "region_image"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert not torch.equal(one.batch(0).image_ids, Loader(scenes, tokenizer, 8, 64, seed=6).batch(0).image_ids)


def test_an_epoch_shows_every_picture_once_and_in_another_order_the_next_time(scenes, tokenizer):
    loader = Loader(scenes, tokenizer, 8, 64)
    epochs = [torch.cat([loader.batch(e * 5 + s).image_ids for s in range(5)]) for e in (0, 1)]
    assert all(len(set(epoch.tolist())) == 40 for epoch in epochs)
    assert not torch.equal(*epochs)


def test_captions_and_regions_belong_to_their_pictures(scenes, tokenizer):
    loader = Loader(scenes, tokenizer, 8, 64, regions_per_image=3)
    batch = loader.batch(2)
    for i, image_id in enumerate(batch.image_ids.tolist()):
        text = tokenizer.decode(batch.ids[i][batch.mask[i]], skip_special_tokens=True)
        assert text in scenes.captions(image_id)
        pixels = torch.from_numpy(scenes.pixels([image_id], 64)[0]).permute(2, 0, 1) / 127.5 - 1
        assert torch.allclose(batch.images[i], pixels.float(), atol=1e-6)
    for r, image in enumerate(batch.region_image.tolist()):
        phrase = tokenizer.decode(batch.region_ids[r][batch.region_mask[r]], skip_special_tokens=True)
        there = {(x.phrase, x.kind == "image"): x.box for x in scenes.regions(batch.image_ids[image].item())}
        box = there[phrase, bool(batch.region_is_image[r])]
        assert np.allclose(batch.region_boxes[r], box, atol=1e-6)


def test_kinds_of_region_can_be_left_out(scenes, tokenizer):
    loader = Loader(scenes, tokenizer, 8, 64, regions_per_image=9, kinds=("object",))
    batch = loader.batch(0)
    assert not batch.region_is_image.any()
    objects = [r for row in batch.image_ids.tolist() for r in scenes.regions(row) if r.kind == "object"]
    assert len(batch.region_boxes) == len(objects)


def test_a_batch_moves_to_another_device_whole(scenes, tokenizer):
    moved = Loader(scenes, tokenizer, 8, 64, regions_per_image=1).batch(0).to("meta")
    assert moved.images.device.type == moved.region_boxes.device.type == "meta"
    assert Loader(scenes, tokenizer, 8, 64).batch(0).to("meta").region_boxes is None


def test_an_image_without_a_caption_is_named(scenes, tokenizer, monkeypatch):
    monkeypatch.setattr(scenes, "captions", lambda row: [] if row == 7 else ["a dog"])
    with pytest.raises(ValueError, match="row 7 .* no caption"):
        Loader(scenes, tokenizer, 8, 64)


def test_too_small_a_dataset_is_refused_with_a_remedy(scenes, tokenizer):
    with pytest.raises(ValueError, match="lower the batch size"):
        Loader(scenes, tokenizer, 41, 64)


def test_false_captions_differ_from_the_true_one_in_a_fact_and_not_in_the_wording(scenes, tokenizer):
    loader = Loader(scenes, tokenizer, 8, 64, wrong_captions=True)
    batch, again = loader.batch(1), Loader(scenes, tokenizer, 8, 64, wrong_captions=True).batch(1)
    assert torch.equal(batch.wrong_ids, again.wrong_ids) and torch.equal(
        batch.ids, Loader(scenes, tokenizer, 8, 64).batch(1).ids
    )
    for i, row in enumerate(batch.image_ids.tolist()):
        true, wrong = (
            tokenizer.decode(ids[i][mask[i]], skip_special_tokens=True)
            for ids, mask in ((batch.ids, batch.mask), (batch.wrong_ids, batch.wrong_mask))
        )
        facts = parse(wrong)
        assert facts is not None and not scenes.scene(row).holds(facts)
        wording = scenes.captions(row).index(true)
        assert wrong in (captions(facts)[wording], captions(facts.reversed())[wording])


def test_false_captions_are_asked_only_of_a_dataset_that_can_make_them(tokenizer):
    with pytest.raises(ValueError, match="cannot make false captions"):
        Loader(Photos(), tokenizer, 4, 64, wrong_captions=True)
