"""Relative positions: which row of the table belongs to which pair of tokens."""

import pytest
import torch

from minivlp.layers.relative import RelativePositions, image_index, joint_index


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_one_row_for_each_offset_of_two_patches(grid):
    rows, columns = grid
    index, found = image_index(grid), {}
    for i in range(rows * columns):
        for j in range(rows * columns):
            offset = i // columns - j // columns, i % columns - j % columns
            found.setdefault(offset, set()).add(index[1 + i, 1 + j].item())
    assert all(len(numbers) == 1 for numbers in found.values())
    offsets = (2 * rows - 1) * (2 * columns - 1)
    assert sorted(number for numbers in found.values() for number in numbers) == list(range(offsets))
    assert index[0, 1:].unique().tolist() == [offsets] and index[1:, 0].unique().tolist() == [offsets + 1]
    assert index[0, 0] == offsets + 2


def test_the_joint_index_uses_every_row_and_keeps_text_and_image_apart():
    longest, grid = 6, (3, 3)
    index = joint_index(longest, grid)
    text, image = set(index[:longest, :longest].flatten().tolist()), set(index[longest:, longest:].flatten().tolist())
    assert torch.equal(index[longest:, longest:], image_index(grid))
    assert index[:longest, longest:].unique().tolist() == [28] and index[longest:, :longest].unique().tolist() == [29]
    assert text | image | {28, 29} == set(range(30 + 2 * longest)) and not text & image
    words = index[1:longest, 1:longest]
    assert all(words.diagonal(k).unique().numel() == 1 for k in range(-4, 5)) and words.unique().numel() == 9


def test_the_bias_of_each_layer_and_head_is_looked_up():
    layers, heads, words = 3, 2, 5
    relative = RelativePositions(20, (4, 4), layers, heads)
    relative.table.data.normal_()
    bias = relative(words, 17)
    places = [*range(words), *range(20, 37)]  # a shorter text takes the first of its places
    for layer, head, i, j in ((0, 0, 0, 0), (1, 1, 2, 4), (2, 0, 3, 9), (2, 1, 12, 1), (1, 0, 20, 7)):
        row = relative.index[places[i], places[j]]
        assert bias[layer, head, i, j] == relative.table[row, heads * layer + head]
    assert torch.equal(relative(0, 17), bias[:, :, words:, words:])
    assert torch.equal(relative(words, 0), bias[:, :, :words, :words])
