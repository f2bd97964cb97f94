"""Image-text matching: does this text belong to this image? A two-way classification of matched pairs and negatives.

ALBEF (Li et al., NeurIPS 2021, section 3.2) draws negatives by in-batch similarity ("hard negatives"): pairs that the
contrastive loss finds similar and that do not match. Axes: B rows; row i of the images belongs to row i of the texts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Negatives(NamedTuple):
    """One negative partner per row, -1 where a row has none."""

    image: Tensor  # (B,) for text b, the row of an image that does not match
    text: Tensor  # (B,) for image b, the row of a text that does not match

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Rows (image, text) of all negative pairs: drawn images first, then drawn texts; rows without one left out."""
        by_image, by_text = ((partner >= 0).nonzero()[:, 0] for partner in self)
        return torch.cat([self.image[by_image], by_text]), torch.cat([by_image, self.text[by_text]])


def sampling_weights(logits: Tensor, positives: Tensor, floor: float = 0.0) -> Tensor:
    """How likely each column is drawn as the negative of each row: softmax of `logits` (B, K), 0 on `positives`.

    `positives` (B, K) bool as from `contrastive.find_positives`: never the own pair, nor another row of the same image
    or with the same caption. The softmax is taken over the whole row first, as in the papers. `floor` is added to every
    weight: X-VLM's code has 1e-5, BLIP's 1e-4; ALBEF's and VLMo's have none, so that a row whose weights all underflow
    has no negative.
    """
    return (logits.detach().softmax(-1) + floor).masked_fill(positives, 0)


def _draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B,) a column per row by its weight, -1 for rows without any weight."""
    possible = weights.sum(-1) > 0
    safe = torch.where(possible[:, None], weights, torch.ones_like(weights))  # multinomial refuses rows of zeros
    safe = safe / safe.amax(-1, keepdim=True)  # it would round weights near the smallest float down to zero
    drawn = torch.multinomial(safe, 1, generator=generator)[:, 0]
    return torch.where(possible, drawn, torch.full_like(drawn, -1))


def hard_negatives(
    logits: Tensor,
    positives: Tensor,
    floor: float = 0.0,
    back: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Negatives:
    """Draw by similarity: `logits` (B, B) images by texts; `positives` and `floor` as in `sampling_weights`.

    `back` (B, B), texts by images, where it is not the transpose: ALBEF and BLIP compare the online images with the
    momentum model's texts, and the online texts with the momentum model's images.
    """
    back = logits.T if back is None else back
    return Negatives(
        image=_draw(sampling_weights(back, positives.T, floor), generator),
        text=_draw(sampling_weights(logits, positives, floor), generator),
    )


def random_negatives(positives: Tensor, generator: torch.Generator | None = None) -> Negatives:
    """Draw evenly among the rows that are not `positives` (B, B): what hard negatives are compared with."""
    return Negatives(_draw((~positives.T).float(), generator), _draw((~positives).float(), generator))


def matching_loss(matched: Tensor, negatives: Tensor) -> Tensor:
    """Cross-entropy of the two-way logits of `matched` (N, 2) and `negatives` (M, 2) pairs, mean over all pairs;
    column 1 = match.

    At initialization it is about ln 2 = 0.69.
    """
    labels = torch.cat([matched.new_ones(len(matched)), negatives.new_zeros(len(negatives))]).long()
    return F.cross_entropy(torch.cat([matched, negatives]), labels)
