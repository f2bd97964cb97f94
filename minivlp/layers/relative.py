"""Relative positions, as in BEiT for images and in VLMo for texts, images and both: a learned number for each pair of
tokens, which depends on their relative position and is added to the attention score before the softmax.

Axes: L text tokens, P patches, N tokens that attend to each other, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RelativePositions(nn.Module):
    """One table for texts of up to `longest` tokens, images of `grid` (rows, columns) patches, and one after the other.

    The released tables are for square images; other shapes have another number of offsets.
    """

    def __init__(self, longest: int, grid: tuple[int, int], layers: int, heads: int) -> None:
        super().__init__()
        self.longest, self.layers = longest, layers
        self.register_buffer("index", joint_index(longest, grid), persistent=False)
        self.table = nn.Parameter(torch.zeros(image_rows(grid) + 2 + 2 * longest, layers * heads))

    def forward(self, text: int, image: int) -> Tensor:
        """For `text` text tokens, then `image` image tokens, either may be 0: (layers, H, N, N), query by key."""
        places = torch.arange(self.longest + image, device=self.table.device)
        places = torch.cat([places[:text], places[self.longest :]])  # a shorter text takes the first of its places
        bias = F.embedding(self.index[places][:, places], self.table)  # (N, N, layers * H)
        return bias.permute(2, 0, 1).unflatten(0, (self.layers, -1))  # (layers, H, N, N)


def image_rows(grid: tuple[int, int]) -> int:
    """Rows of the table for an image: one for each offset in x and y, three for the class token."""
    rows, columns = grid
    return (2 * rows - 1) * (2 * columns - 1) + 3


def image_index(grid: tuple[int, int]) -> Tensor:
    """The table's row for patch i attending to patch j, by their offset: (1+P, 1+P), class token first."""
    rows, columns = grid
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))  # (P,)
    down = y[:, None] - y[None, :] + rows - 1  # (P, P), from 0 to 2 rows - 2
    right = x[:, None] - x[None, :] + columns - 1
    reach = 2 * columns - 1
    return with_class_token(down * reach + right, (2 * rows - 1) * reach)


def joint_index(longest: int, grid: tuple[int, int]) -> Tensor:
    """The same for a text of `longest` tokens, then an image: (longest+1+P, longest+1+P).

    Text and image each have their offsets; how far a word is from a patch means nothing, so all of one direction share
    one row. The table holds the image's rows, those two, then the text's.
    """
    image, cross = image_index(grid), image_rows(grid)  # cross: text to image; the row after it: image to text
    place = torch.arange(longest - 1)
    offsets = place[None, :] - place[:, None] + longest - 2  # (longest-1, longest-1), from 0 on
    text = with_class_token(cross + 2 + offsets, cross + 2 + 2 * longest - 3)
    upper = torch.cat([text, torch.full((longest, len(image)), cross)], dim=1)
    return torch.cat([upper, torch.cat([torch.full((len(image), longest), cross + 1), image], dim=1)])


def with_class_token(inner: Tensor, start: int) -> Tensor:
    """Put a class token in front, (n, n) -> (1+n, 1+n): it has three rows of its own, from `start` on."""
    index = F.pad(inner, (1, 0, 1, 0), value=start + 1)  # from any token to the class token
    index[0] = start  # from the class token to any
    index[0, 0] = start + 2  # and to itself
    return index
