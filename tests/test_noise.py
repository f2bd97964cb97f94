"""Noisy captions: the exact rate, false of their images, and recorded."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from minivlp.data.batch import Region
from minivlp.data.english import parse
from minivlp.data.noise import JUNK, KINDS, NoisyCaptions
from minivlp.data.scenes import Scenes


@pytest.fixture(scope="module")
def scenes():
    return Scenes(300, objects=(1, 2))


class Photos:
    """A dataset without truth: three pictures share a caption, one image id stands twice."""

    texts = (["a cat", "a tabby"], ["a cat"], ["a cat"], ["a tower"], ["a tower seen from below"])

    def __len__(self):
        return len(self.texts)

    def captions(self, row):
        return self.texts[row]

    def image_id(self, row):
        return min(row, 3)

    def regions(self, row):
        return []


@pytest.mark.parametrize("rate", [0, 0.333, 0.5, 1])
def test_rate_and_shares_are_exact(scenes, rate):
    noisy = NoisyCaptions(scenes, rate, seed=1)
    kinds = Counter(noisy.kind(row) for row in range(len(noisy)))
    assert kinds["clean"] == 300 - round(300 * rate)
    assert all(abs(kinds[kind] - round(300 * rate) / 3) < 1 for kind in KINDS)
    assert sum(noisy.is_clean(row) for row in range(300)) == kinds["clean"]


@pytest.mark.parametrize("split", ["train", "composition"])
def test_noise_is_false_and_the_truth_is_kept(split):
    scenes = Scenes(300, split, objects=(1, 1))  # single things of `composition` are eight: captions of others are true
    noisy = NoisyCaptions(scenes, 0.6, seed=2)
    for row in range(len(noisy)):
        assert noisy.true_captions(row) == scenes.captions(row)
        if noisy.is_clean(row):
            assert noisy.captions(row) == scenes.captions(row)
            continue
        (text,) = noisy.captions(row)
        facts = parse(text)
        assert (facts is None) == (noisy.kind(row) == "junk")
        assert facts is None or not scenes.scene(row).holds(facts), (noisy.kind(row), text)


def test_the_noise_depends_on_the_seed_only(scenes):
    def captions(seed):
        noisy = NoisyCaptions(scenes, 0.4, seed)
        return [noisy.captions(row) for row in range(300)]

    assert captions(1) == captions(1) != captions(2)


def test_the_rest_of_the_dataset_is_untouched(scenes):
    noisy = NoisyCaptions(scenes, 0.5, seed=3)
    row = next(row for row in range(300) if not noisy.is_clean(row))
    sample = noisy[row]
    assert sample.captions == noisy.captions(row) and sample.regions == noisy.regions(row)
    assert sample.image_id == noisy.image_id(row) == scenes.image_id(row)
    assert np.array_equal(noisy.pixels([row], 64), scenes.pixels([row], 64))
    assert sample.truth is scenes.scene(row)
    *parts, whole = noisy.regions(row)
    assert parts == scenes.regions(row)[:-1]
    assert whole == Region((0.5, 0.5, 1.0, 1.0), noisy.captions(row)[0], "image")
    assert noisy.kind(-1) == noisy.kind(299) and noisy.captions(-1) == noisy.captions(299)
    with pytest.raises(IndexError, match="no row 300"):
        noisy.captions(300)


def test_chinese_scenes_get_chinese_noise():
    scenes = Scenes(30, language="zh")
    noisy = NoisyCaptions(scenes, 1, seed=0)
    known = {caption for row in range(30) for caption in scenes.captions(row)}
    for row in range(30):
        text = noisy.captions(row)[0]
        assert noisy.kind(row) != "swapped" or text in known
        assert noisy.kind(row) == "junk" or not text.isascii()
    assert any(not text.isascii() for text in JUNK["zh"])


def test_photos_can_be_swapped_but_not_for_themselves():
    noisy = NoisyCaptions(Photos(), 1, seed=0, kinds=("swapped", "junk"))
    assert {noisy.kind(row) for row in range(5)} == {"swapped", "junk"}
    for seed in range(10):
        swapped = NoisyCaptions(Photos(), 1, seed, kinds=("swapped",))
        assert all("tower" in swapped.captions(row)[0] for row in range(3))
        assert swapped.captions(3) == swapped.captions(4) == ["a cat"]  # one picture: its other caption is no noise
    with pytest.raises(ValueError, match="leave 'replaced' out"):
        NoisyCaptions(Photos(), 0.5)


def test_a_noisy_dataset_knows_the_truth_but_makes_no_negative_captions(scenes):
    noisy = NoisyCaptions(scenes, 0.5, seed=3)
    assert noisy.scene(4) is scenes.scene(4) and noisy.questions(4) == scenes.questions(4)
    assert noisy.language == "en" and noisy.size == 64
    assert not hasattr(noisy, "negative_caption"), "it would show a noisy row its true caption"
    photos = NoisyCaptions(Photos(), 0, kinds=("junk",))
    assert not hasattr(photos, "scene") and not hasattr(photos, "questions")


# Hashes of all captions with seed 4: recorded results depend on them.
TEXTS = {"en": "b6b8bb1e", "zh": "2444f024"}


@pytest.mark.parametrize("language", TEXTS)
def test_the_noise_of_a_seed_never_changes(language):
    noisy = NoisyCaptions(Scenes(100, seed=2, language=language), 0.5, 4)
    texts = [[*noisy.captions(row), noisy.kind(row)] for row in range(100)]
    assert hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()[:8] == TEXTS[language]


def test_wrong_arguments_are_explained(scenes):
    with pytest.raises(ValueError, match="between 0 and 1"):
        NoisyCaptions(scenes, 40)
    with pytest.raises(ValueError, match="choose from swapped, replaced, junk"):
        NoisyCaptions(scenes, 0.4, kinds=("typo",))
    with pytest.raises(ValueError, match="no other row"):
        NoisyCaptions(Scenes(1), 1, kinds=("swapped",))
