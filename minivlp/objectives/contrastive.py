"""Contrastive learning: pull the two halves of a pair together, push all other pairings of the batch apart.

Losses start from logits, whatever they were computed with: cosines (`cosine_logits`), a queue of past batches
(`objectives.momentum`), or late interaction. Axes: B batch, K candidates, E joint-embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivlp.data.batch import Text


def find_positives(image_ids: Tensor, text: Text | None = None) -> Tensor:
    """Which rows of a batch are positives of each other, (B, B) bool: the same image, or the same caption.

    Captions are compared where `text` (B, L) is given, padding left out. Negatives must not be drawn from these rows.
    """
    same = image_ids[:, None] == image_ids[None, :]  # (B, B)
    if text is not None:
        ids = text.ids.masked_fill(~text.mask, -1)
        same = same | (ids[:, None] == ids[None, :]).all(dim=-1)  # (B, B, L) -> (B, B)
    return same


def cosine_logits(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Scaled cosines of every image with every text: unit vectors (B, E) and (K, E) -> (B, K).

    In float32 at least, also under autocast: a cosine in bfloat16 has three digits.
    """
    with torch.autocast(images.device.type, enabled=False):
        dtype = torch.promote_types(images.dtype, torch.float32)
        return scale * (images.to(dtype) @ texts.to(dtype).T)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with a distribution as target: logits and targets (B, K), rows of targets sum to one -> scalar."""
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def equal_shares(positives: Tensor, dtype: torch.dtype) -> Tensor:
    """The target distribution of `positives` (B, K) bool: each row spread evenly over its positives."""
    shares = positives.to(dtype)
    return shares / shares.sum(dim=-1, keepdim=True)


def contrastive_loss(
    logits: Tensor,
    positives: Tensor | None = None,
    back: Tensor | None = None,
    soft: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, figure 3).

    Args:
        logits: (B, K) of image i with text j; row i of the images belongs to row i of the texts.
        positives: (B, K) bool, True where image i and text j belong together; the diagonal if None. A row with several
            positives has equal shares as its target.
        back: (B, K) logits of text i with image j, where they are more than the transpose: with a queue, or with late
            interaction, which is not symmetric.
        soft: instead of `positives` the two target distributions, image to text and text to image, (B, K) each with
            rows that sum to one (momentum distillation).

    Returns: the mean of the two cross-entropies, a scalar. Uniform logits over all K give log K where each row has one
    positive. Raises ValueError for shapes that do not fit.

    Where all rows of a group share the same image vector, or the same text vector, the diagonal and equal shares have
    the same loss and gradient: the summed targets of a column that appears twice are equal. They differ for two crops
    of a picture with two captions: there the diagonal pushes apart what belongs together.
    """
    back = logits.T if back is None else back
    if back.shape != logits.shape:
        raise ValueError(f"give `back` of the shape of the logits, {tuple(logits.shape)}, not {tuple(back.shape)}")
    if soft is None:
        if positives is None:
            positives = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
        if positives.shape != logits.shape:
            raise ValueError(f"positives of shape {tuple(positives.shape)} for logits of {tuple(logits.shape)}")
        square = logits.shape[0] == logits.shape[1]
        soft = tuple(equal_shares(p, logits.dtype) for p in (positives, positives.T if square else positives))
    return (soft_cross_entropy(logits, soft[0]) + soft_cross_entropy(back, soft[1])) / 2
