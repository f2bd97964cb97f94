"""Contrastive learning: pull the two halves of a pair together, push all other pairings of the batch apart.

Axes: B batch, K candidates, E joint-embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def same_group(image_ids: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Which rows of a batch are positives of each other, (B, B) boolean: the same image, or the same caption.

    Captions are compared where `ids` (B, L) are given, `mask` (B, L) hiding their padding. Whoever draws negatives must
    leave these rows out; what they change in the loss itself, `contrastive_loss` says.
    """
    same = image_ids[:, None] == image_ids[None, :]  # (B, B)
    if ids is not None:
        words = ids if mask is None else ids.masked_fill(~mask, -1)
        same = same | (words[:, None] == words[None, :]).all(dim=-1)  # (B, B, L) -> (B, B)
    return same


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with a distribution as target: logits and targets (B, K), rows of targets sum to one -> scalar."""
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    positive: Tensor | None = None,
    soft: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, figure 3).

    Args:
        images, texts: (B, E) unit vectors, row i of the one belongs to row i of the other.
        scale: what cosines are multiplied with, i.e. one over the temperature; scalar, may be trainable.
        positive: (B, B) boolean, True where image i and text j belong together; the diagonal if None. A row with
            several positives asks for equal shares.
        soft: instead of `positive`, the two target distributions themselves, image to text and text to image, each
            (B, B) with rows that sum to one (momentum distillation, label smoothing).

    Returns: the mean of the two cross-entropies, a scalar. A blind guess among all B costs log B.

    Where the rows of a group all have the very same image vector, or all the very same text vector, the diagonal and
    equal shares give the same loss: what one row asks too much of, its twin asks too little. Otherwise they differ, as
    for two crops of a picture with two captions: there the diagonal pushes apart what belongs together.
    """
    if images.shape != texts.shape:
        raise ValueError(f"images {tuple(images.shape)} and texts {tuple(texts.shape)} must have the same shape")
    with torch.autocast(images.device.type, enabled=False):  # a cosine in bf16 has three digits: too few to compare by
        logits = scale * images @ texts.T  # (B, B), rows are images
    if soft is None:
        if positive is None:
            positive = torch.eye(len(images), dtype=torch.bool, device=images.device)
        share = positive.to(logits.dtype)
        soft = share / share.sum(dim=1, keepdim=True), share.T / share.T.sum(dim=1, keepdim=True)
    return (soft_cross_entropy(logits, soft[0]) + soft_cross_entropy(logits.T, soft[1])) / 2
