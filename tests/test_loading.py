"""Batches: a pure function of seed and step; every caption and every region belongs to its image."""

import hashlib

import numpy as np
import pytest
import torch

from minivlp.data.batch import Text
from minivlp.data.english import captions, parse
from minivlp.data.folders import Photos
from minivlp.data.loading import CachedTokenizer, Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer, tokenize
from minivlp.data.tokenizer_training import pieces_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def scenes():
    return Scenes(40, seed=3)


def decode(tokenizer, text, row):
    return tokenizer.decode(text.ids[row][text.mask[row]], skip_special_tokens=True)


def same(a: Text, b: Text) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "mask", "word"))


def test_a_batch_depends_on_seed_and_step_only(scenes, tokenizer):
    options = dict(seed=5, regions_per_image=2, negative_captions=True)
    one, two = (Loader(scenes, tokenizer, 8, 64, **options) for _ in range(2))
    for step in (0, 3, 7, 23):
        two.batch(step + 1)  # earlier calls must not matter
        a, b = one.batch(step), two.batch(step)
        assert torch.equal(a.images, b.images) and torch.equal(a.image_ids, b.image_ids)
        assert same(a.text, b.text) and same(a.negatives, b.negatives) and same(a.regions.text, b.regions.text)
        for name in ("boxes", "image_rows", "is_image"):
            assert torch.equal(getattr(a.regions, name), getattr(b.regions, name)), name
    assert not torch.equal(one.batch(0).image_ids, Loader(scenes, tokenizer, 8, 64, seed=6).batch(0).image_ids)


# Step, then hashes of captions, negative captions and regions. Recorded results depend on these draws.
DRAWS = {
    0: "a01448a6 dda0773d 0d64e4b6",
    3: "211aa9aa f2bb3d09 4610dc2d",
    11: "ef934dcd 9a2e8bb2 ea25a9f6",
}


def digest(*tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(np.ascontiguousarray(tensor.numpy().astype(np.int64)).tobytes())
    return found.hexdigest()[:8]


@pytest.mark.parametrize("step", DRAWS)
def test_the_draws_of_a_seed_never_change(tokenizer, step):
    loader = Loader(Scenes(60, seed=3), tokenizer, 8, 64, seed=5, regions_per_image=3, negative_captions=True)
    batch = loader.batch(step)
    found = [
        digest(batch.image_ids, batch.text.ids, batch.text.mask),
        digest(batch.negatives.ids, batch.negatives.mask),
        digest(
            (batch.regions.boxes * 64_000).round(),
            batch.regions.text.ids,
            batch.regions.text.mask,
            batch.regions.image_rows,
            batch.regions.is_image,
        ),
    ]
    assert " ".join(found) == DRAWS[step]


def test_an_epoch_has_every_image_once_and_the_next_one_another_order(scenes, tokenizer):
    loader = Loader(scenes, tokenizer, 8, 64)
    epochs = [torch.cat([loader.batch(e * 5 + s).image_ids for s in range(5)]) for e in (0, 1)]
    assert all(len(set(epoch.tolist())) == 40 for epoch in epochs)
    assert not torch.equal(*epochs)


def test_captions_and_regions_belong_to_their_images(scenes, tokenizer):
    batch = Loader(scenes, tokenizer, 8, 64, regions_per_image=3).batch(2)
    for i, image_id in enumerate(batch.image_ids.tolist()):
        assert decode(tokenizer, batch.text, i) in scenes.captions(image_id)
        pixels = torch.from_numpy(scenes.pixels([image_id], 64)[0]).permute(2, 0, 1) / 127.5 - 1
        assert torch.allclose(batch.images[i], pixels.float(), atol=1e-6)
    regions = batch.regions
    for r, row in enumerate(regions.image_rows.tolist()):
        known = {(x.phrase, x.kind == "image"): x.box for x in scenes.regions(batch.image_ids[row].item())}
        box = known[decode(tokenizer, regions.text, r), bool(regions.is_image[r])]
        assert np.allclose(regions.boxes[r], box, atol=1e-6)


def test_texts_of_a_batch_are_those_of_tokenize(scenes, tokenizer):
    """With words of several pieces, cut texts, and the words of each piece."""
    options = dict(max_tokens=9, regions_per_image=2, negative_captions=True)
    for some in (tokenizer, pieces_tokenizer()):
        batch = Loader(scenes, some, 8, 64, **options).batch(1)
        for text in (batch.text, batch.negatives, batch.regions.text):
            assert text.length == int(text.mask.sum(1).max()) <= 9
            for row in range(len(text)):
                alone = text[row : row + 1].trimmed()
                if alone.length < 9:  # not cut
                    again = tokenize(some, [decode(some, text, row)], 9)
                    assert same(alone, again)


def test_kinds_of_region_can_be_left_out(scenes, tokenizer):
    batch = Loader(scenes, tokenizer, 8, 64, regions_per_image=9, kinds=("object",)).batch(0)
    assert not batch.regions.is_image.any()
    objects = [r for row in batch.image_ids.tolist() for r in scenes.regions(row) if r.kind == "object"]
    assert len(batch.regions) == len(objects)


def test_parts_that_were_not_asked_for_are_absent(scenes, tokenizer):
    batch = Loader(scenes, tokenizer, 8, 64).batch(0)
    for name in ("negatives", "regions", "prefix_length", "answers", "image_tokens"):
        assert getattr(batch, name) is None


def test_images_of_any_height_and_width(scenes, tokenizer):
    assert Loader(scenes, tokenizer, 8, (32, 48)).batch(0).images.shape == (8, 3, 32, 48)


def test_image_tokens_replace_images(scenes, tokenizer, monkeypatch):
    """The tokens are those of the rows of the batch, no image is decoded, and everything else is unchanged."""
    options = dict(seed=2, regions_per_image=2, negative_captions=True)
    usual = Loader(scenes, tokenizer, 8, 64, **options).batch(3)
    table = torch.randn(40, 5, 6)
    monkeypatch.setattr(scenes, "pixels", lambda rows, size: pytest.fail("decoded"))
    asked = []

    def image_tokens(rows):
        asked.append(rows)
        return table[torch.as_tensor(rows)]

    batch = Loader(scenes, tokenizer, 8, 64, image_tokens=image_tokens, **options).batch(3)
    assert batch.images is None and len(batch) == 8
    assert len(asked) == 1 and isinstance(asked[0], np.ndarray)
    assert torch.equal(batch.image_tokens, table[batch.image_ids])
    assert torch.equal(batch.image_ids, usual.image_ids)
    assert same(batch.text, usual.text) and same(batch.negatives, usual.negatives)
    assert torch.equal(batch.regions.boxes, usual.regions.boxes)
    assert batch.to("meta").image_tokens.device.type == "meta"


def test_an_image_without_a_caption_is_named(scenes, tokenizer, monkeypatch):
    monkeypatch.setattr(scenes, "captions", lambda row: [] if row == 7 else ["a dog"])
    with pytest.raises(ValueError, match="row 7 .* no caption"):
        Loader(scenes, tokenizer, 8, 64)


def test_too_small_a_dataset_is_refused_with_a_remedy(scenes, tokenizer):
    with pytest.raises(ValueError, match="lower the batch size"):
        Loader(scenes, tokenizer, 41, 64)
    with pytest.raises(ValueError, match="at least one"):
        Loader(scenes, tokenizer, 0, 64)


def test_negative_captions_differ_from_the_true_one_in_a_fact_and_not_in_the_wording(scenes, tokenizer):
    batch = Loader(scenes, tokenizer, 8, 64, negative_captions=True).batch(1)
    assert same(batch.text, Loader(scenes, tokenizer, 8, 64).batch(1).text)
    for i, row in enumerate(batch.image_ids.tolist()):
        true, negative = decode(tokenizer, batch.text, i), decode(tokenizer, batch.negatives, i)
        facts = parse(negative)
        assert facts is not None and not scenes.scene(row).holds(facts)
        wording = scenes.captions(row).index(true)
        assert negative in (captions(facts)[wording], captions(facts.reversed())[wording])


def test_negative_captions_need_a_dataset_that_can_make_them(tokenizer):
    with pytest.raises(ValueError, match="cannot make negative captions"):
        Loader(Photos(), tokenizer, 4, 64, negative_captions=True)


class Counting:
    """Counts the texts that are tokenized."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, []

    def __call__(self, texts, **options):
        self.texts += texts
        return self.tokenizer(texts, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def test_captions_are_tokenized_once(scenes, tokenizer):
    counting = Counting(tokenizer)
    loader = Loader(scenes, counting, 8, 64, regions_per_image=2)
    for step in range(7):
        loader.batch(step)
    phrases = {region.phrase for row in range(40) for region in scenes.regions(row)}
    assert len(counting.texts) == len({c for row in range(40) for c in scenes.captions(row)}) + len(phrases)


def test_a_cached_tokenizer_is_the_tokenizer_with_a_bounded_memory(tokenizer):
    counting = Counting(tokenizer)
    cached = CachedTokenizer(counting, 8, limit=3)
    texts = ["a dog", "a bicycle left of a cup", "a dog"]
    assert same(cached(texts), tokenize(tokenizer, texts, 8)) and len(counting.texts) == 2
    assert same(cached(texts[::-1]), tokenize(tokenizer, texts[::-1], 8)) and len(counting.texts) == 2
    cached(["a dog"])
    cached(["a cat", "a cup"])  # the text that was not asked for longest is forgotten
    assert len(cached.known) == 3 and "a bicycle left of a cup" not in cached.known
    many = [f"{n} dogs" for n in range(9)]  # more than the memory holds
    assert same(cached(many), tokenize(tokenizer, many, 8)) and len(cached.known) == 3
