"""What all datasets have in common, and what a wrapper passes on."""

import copy
import pickle

import numpy as np
import pytest

from minivlp.data.augment import Augmented
from minivlp.data.batch import Sample
from minivlp.data.dataset import Wrapper, height_width
from minivlp.data.folders import Photos
from minivlp.data.noise import NoisyCaptions
from minivlp.data.recaptioned import Recaptioned
from minivlp.data.scenes import Scenes

OPTIONAL = ("scene", "questions", "statements", "negative_caption", "language")


def scenes():
    return Scenes(12, size=48)


DATASETS = {
    "scenes": scenes,
    "photos": Photos,
    "wrapped scenes": lambda: Wrapper(scenes()),
    "wrapped photos": lambda: Wrapper(Photos()),
    "noisy scenes": lambda: NoisyCaptions(scenes(), 0.5),
    "noisy photos": lambda: NoisyCaptions(Photos(), 0.5, kinds=("swapped", "junk")),
    "augmented scenes": lambda: Augmented(scenes(), 3),
    "augmented noisy photos": lambda: Augmented(NoisyCaptions(Photos(), 0.5, kinds=("junk",)), 2),
    "recaptioned": lambda: Recaptioned(Photos(), {2: ["a", "b"], 0: ["c"]}, scenes()),
}


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_keeps_the_protocol(name):
    dataset = DATASETS[name]()
    rows = [0, len(dataset) - 1, 1]
    assert len(dataset) > 2 and repr(dataset)
    assert dataset.pixels(rows, 32).shape == (3, 32, 32, 3) and dataset.pixels(rows, 32).dtype == np.uint8
    assert dataset.pixels(np.array(rows), (16, 40)).shape == (3, 16, 40, 3)
    assert dataset.pixels([], (16, 40)).shape == (0, 16, 40, 3)
    for row in rows:
        sample = dataset[row]
        assert isinstance(sample, Sample) and sample.image.ndim == 3
        assert sample.captions == dataset.captions(row) and sample.regions == dataset.regions(row)
        assert sample.image_id == dataset.image_id(row) or name == "recaptioned"
    for clone in (pickle.loads(pickle.dumps(dataset)), copy.copy(dataset)):
        assert clone.captions(1) == dataset.captions(1)
        assert np.array_equal(clone.pixels(rows, 32), dataset.pixels(rows, 32))


@pytest.mark.parametrize("inner", [scenes, Photos])
def test_a_wrapper_has_exactly_what_its_dataset_has(inner):
    inner = inner()
    wrapper = Wrapper(Wrapper(inner))
    for name in (*OPTIONAL, "rows", "size", "rows_skipped", "no_such_thing"):
        assert hasattr(wrapper, name) == hasattr(inner, name), name
    with pytest.raises(AttributeError, match="no_such_thing"):
        wrapper.no_such_thing()  # noqa: B018
    if isinstance(inner, Scenes):
        assert wrapper.scene(3) is inner.scene(3) and wrapper.questions(3) == inner.questions(3)


def test_a_wrapper_hides_what_would_no_longer_be_true():
    for dataset in (Augmented(scenes()), Recaptioned(scenes(), {0: ["a"]}, scenes())):
        assert [name for name in OPTIONAL if hasattr(dataset, name)] == ["language"]
    noisy = NoisyCaptions(scenes(), 0.5)
    assert [name for name in OPTIONAL if not hasattr(noisy, name)] == ["negative_caption"]
    assert not hasattr(Augmented(Photos()), "language")


def test_a_size_is_a_side_or_height_and_width():
    assert height_width(32) == height_width(np.int64(32)) == (32, 32)
    assert height_width((16, 40)) == height_width([16, 40]) == (16, 40)
