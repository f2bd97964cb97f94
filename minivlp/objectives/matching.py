"""Image-text matching: does this text belong to this image? A yes/no question is only as good as its wrong pairs.

ALBEF (Li et al., NeurIPS 2021, section 3.2) draws them by in-batch similarity: what the contrastive loss finds close
but is wrong teaches most. Axes: B rows; row i of the images and row i of the texts belong together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Negatives(NamedTuple):
    """One wrong partner per row, -1 where a row has none."""

    image: Tensor  # (B,) for text b, the row of a wrong image
    text: Tensor  # (B,) for image b, the row of a wrong text

    def image_pairs(self) -> tuple[Tensor, Tensor]:
        """Rows (image, text) of the wrong pairs that have a drawn image; rows without a partner are dropped."""
        own = (self.image >= 0).nonzero()[:, 0]
        return self.image[own], own

    def text_pairs(self) -> tuple[Tensor, Tensor]:
        """Rows (image, text) of the wrong pairs that have a drawn text; rows without a partner are dropped."""
        own = (self.text >= 0).nonzero()[:, 0]
        return own, self.text[own]


def negative_weights(similarity: Tensor, together: Tensor, floor: float = 1e-5) -> Tensor:
    """How readily each column is drawn for each row: softmax of `similarity` (B, B), 0 where rows belong `together`.

    `together` (B, B) bool as from `contrastive.same_group`: never the own pair, nor another row of the same image or
    with the same words, since "a red heart" is just as true of the other picture with a red heart.
    The softmax is taken over the whole row first, as in the papers. `floor` keeps a weight on what the softmax has
    rounded away (X-VLM 1e-5, BLIP 1e-4; ALBEF has 0 and fails once a row is all zero).
    """
    return (similarity.detach().softmax(-1) + floor).masked_fill(together, 0)


def _draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B,) a column per row by its weight, -1 for rows without any weight."""
    possible = weights.sum(-1) > 0
    safe = torch.where(possible[:, None], weights, torch.ones_like(weights))  # multinomial refuses rows of zeros
    drawn = torch.multinomial(safe, 1, generator=generator)[:, 0]
    return torch.where(possible, drawn, torch.full_like(drawn, -1))


def hard_negatives(
    similarity: Tensor,
    together: Tensor,
    floor: float = 1e-5,
    generator: torch.Generator | None = None,
    back: Tensor | None = None,
) -> Negatives:
    """Draw by likeness: `similarity` (B, B) images by texts, temperature applied; `together` as `negative_weights`.

    `back` (B, B), texts by images, where that is more than the transpose: ALBEF and BLIP compare the student's images
    with the teacher's texts one way, the student's texts with the teacher's images the other.
    """
    back = similarity.T if back is None else back
    return Negatives(
        image=_draw(negative_weights(back, together.T, floor), generator),
        text=_draw(negative_weights(similarity, together, floor), generator),
    )


def random_negatives(together: Tensor, generator: torch.Generator | None = None) -> Negatives:
    """Draw evenly among rows that do not belong `together` (B, B): shows what hard negatives are worth."""
    return Negatives(_draw((~together.T).float(), generator), _draw((~together).float(), generator))


def matching_loss(right: Tensor, wrong: Tensor) -> Tensor:
    """Cross-entropy of the two-way logits of `right` (N, 2) and `wrong` (M, 2) pairs, mean over all; column 1 = match.

    At initialisation it is about ln 2 = 0.69.
    """
    labels = torch.cat([right.new_ones(len(right)), wrong.new_zeros(len(wrong))]).long()
    return F.cross_entropy(torch.cat([right, wrong]), labels)
