"""Relative positions, as BEiT has them for images and VLMo for texts, images and both: a learned number for each pair
of tokens, which depends on where they are to each other and is added to the score before the softmax.

Axes: L text tokens, P patches, N tokens that look at each other, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RelativePositions(nn.Module):
    """One table for texts of up to `longest` tokens, images of `grid` x `grid` patches, and one behind the other."""

    def __init__(self, longest: int, grid: int, layers: int, heads: int) -> None:
        super().__init__()
        self.longest, self.layers = longest, layers
        self.register_buffer("index", joint_index(longest, grid), persistent=False)
        self.table = nn.Parameter(torch.zeros(image_rows(grid) + 2 + 2 * longest, layers * heads))

    def forward(self, words: int, patches: int) -> Tensor:
        """For `words` text tokens, then `patches` image tokens, either may be 0: (layers, H, N, N), query by key."""
        places = torch.arange(self.longest + patches, device=self.table.device)
        places = torch.cat([places[:words], places[self.longest :]])  # a shorter text takes the first of its places
        bias = F.embedding(self.index[places][:, places], self.table)  # (N, N, layers * H)
        return bias.permute(2, 0, 1).unflatten(0, (self.layers, -1))  # (layers, H, N, N)


def image_rows(grid: int) -> int:
    """Rows of the table for an image: one for each offset in x and y, three for the class token."""
    return (2 * grid - 1) ** 2 + 3


def image_index(grid: int) -> Tensor:
    """Which row of the table serves patch i looking at patch j: by their offset, (1+P, 1+P), class token first."""
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"))  # (P,)
    reach = 2 * grid - 1  # offsets from -(grid - 1) to grid - 1
    down, right = (axis[:, None] - axis[None, :] + grid - 1 for axis in (y, x))  # (P, P), from 0 on
    return with_first(down * reach + right, reach**2)


def joint_index(longest: int, grid: int) -> Tensor:
    """The same for a text of `longest` tokens, then an image: (longest+1+P, longest+1+P).

    Text and image each have their offsets; how far a word is from a patch means nothing, so all of one direction share
    one row. The table holds the image's rows, those two, then the text's.
    """
    image, cross = image_index(grid), image_rows(grid)  # cross: text looks at image; the row after it: image at text
    place = torch.arange(longest - 1)
    offsets = place[None, :] - place[:, None] + longest - 2  # (longest-1, longest-1), from 0 on
    text = with_first(cross + 2 + offsets, cross + 2 + 2 * longest - 3)
    upper = torch.cat([text, torch.full((longest, len(image)), cross)], dim=1)
    return torch.cat([upper, torch.cat([torch.full((len(image), longest), cross + 1), image], dim=1)])


def with_first(inner: Tensor, start: int) -> Tensor:
    """Put a class token in front, (n, n) -> (1+n, 1+n): it has three rows of its own, from `start` on."""
    index = F.pad(inner, (1, 0, 1, 0), value=start + 1)  # from any token to the class token
    index[0] = start  # from the class token to any
    index[0, 0] = start + 2  # and to itself
    return index
