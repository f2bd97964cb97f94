"""Text, Regions and Batch: what indexing, padding and joining do to ids, mask and words together."""

import numpy as np
import pytest
import torch

from minivlp.data.batch import Batch, Regions, Text, to_tensor

PAD = 0


def text(rows, word=None):
    """A `Text` of lists of ids that are padded with 0."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    return Text(ids, mask, None if word is None else torch.tensor(word))


@pytest.fixture
def two():
    return text([[1, 20, 21, 30, 2], [1, 40, 2]], [[-1, 0, 0, 1, -1], [-1, 0, -1, -1, -1]])


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "mask", "word"))


def test_without_words_every_real_token_is_a_word_of_its_own():
    plain = text([[1, 20, 2], [1, 2]])
    assert plain.word.tolist() == [[0, 1, 2], [0, 1, -1]]
    assert len(plain) == 2 and plain.length == 3


def test_rows_are_taken_from_all_three(two):
    assert two[torch.tensor([1, 0, 1])].ids.tolist() == two.ids[[1, 0, 1]].tolist()
    for rows in (torch.tensor([1]), torch.tensor([False, True]), slice(1, 2), [1]):
        one = two[rows]
        assert len(one) == 1 and one.ids[0].tolist() == [1, 40, 2, PAD, PAD] and one.word[0, 1] == 0
    assert len(two[:0]) == 0


def test_padding_and_trimming_are_inverse(two):
    wider = two.padded(8)
    assert wider.length == 8 and not wider.mask[:, 5:].any() and (wider.word[:, 5:] == -1).all()
    assert same(wider.trimmed(), two) and same(two.trimmed(), two)
    assert two[1:].trimmed().ids.tolist() == [[1, 40, 2]]
    assert two[:0].trimmed().ids.shape == (0, 0)
    assert same(two.first(3), Text(two.ids[:, :3], two.mask[:, :3], two.word[:, :3]))


def test_texts_of_different_lengths_are_joined(two):
    joined = Text.cat([two[1:].trimmed(), two, text([[1, 2]])])
    assert joined.ids.shape == (4, 5)
    assert same(joined[1:3], two) and same(joined[0:1], two[1:])
    assert joined.word[3].tolist() == [0, 1, -1, -1, -1]
    assert same(Text.cat([two]), two)


def test_another_first_token_and_other_ids_leave_the_rest(two):
    decoded = two.with_first(5)
    assert decoded.ids[:, 0].tolist() == [5, 5] and two.ids[:, 0].tolist() == [1, 1]
    assert torch.equal(decoded.ids[:, 1:], two.ids[:, 1:])
    assert torch.equal(decoded.mask, two.mask) and torch.equal(decoded.word, two.word)
    other = two.with_ids(two.ids + 1)
    assert torch.equal(other.ids, two.ids + 1) and torch.equal(other.word, two.word)


def test_a_batch_moves_to_another_device_with_all_its_parts(two):
    regions = Regions(torch.rand(2, 4), two, torch.tensor([0, 0]), torch.tensor([True, False]))
    batch = Batch(torch.rand(2, 3, 4, 4), two, torch.tensor([7, 8]), negatives=two, regions=regions)
    moved = batch.to("meta")
    assert len(batch) == len(moved) == 2 and len(moved.regions) == 2
    for tensor in (moved.images, moved.text.word, moved.negatives.mask, moved.regions.boxes, moved.regions.text.ids):
        assert tensor.device.type == "meta"
    assert moved.answers is None and moved.image_tokens is None
    assert batch.images.device.type == "cpu"


def test_pixels_become_images():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    images = to_tensor(pixels)
    assert images.shape == (2, 3, 4, 6) and images.dtype == torch.float32 and images.is_contiguous()
    assert torch.allclose(images[1, 2], torch.from_numpy(pixels[1, :, :, 2] / 127.5 - 1).float(), atol=1e-6)
    assert to_tensor(np.array([[[[0, 255, 0]]]], np.uint8)).flatten().tolist() == [-1, 1, -1]
