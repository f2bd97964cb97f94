"""Word-patch alignment: move the words of a caption onto the patches of its picture as cheaply as possible.

A word and a patch are close where the cosine of their features is large. If the caption belongs to the picture, all its
words find patches nearby and the move is cheap; if not, it should be dear. UNITER (Chen et al., ECCV 2020) asks this of
words and regions, ViLT (Kim et al., ICML 2021, section 3.2) of words and patches. The move itself, a transport plan, is
found by inexact proximal point steps (Xie et al., UAI 2020, "A fast proximal point method for computing exact
Wasserstein distance"), and is a map from words to patches that one can draw.

Axes: B batch, L text tokens, P patches, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Alignment(NamedTuple):
    """The loss, and what it was made from."""

    loss: Tensor  # scalar
    distance: Tensor  # (B,) what moving the words onto the patches costs, from 0 to 2
    plan: Tensor  # (B, L, P) how much of each word goes to each patch, without gradient; sums to one


def cosine_cost(words: Tensor, patches: Tensor) -> Tensor:
    """One minus the cosine of every word with every patch: (B, L, D), (B, P, D) -> (B, L, P), from 0 to 2."""
    with torch.autocast(words.device.type, enabled=False):  # a cosine in bf16 has three digits
        words, patches = (F.normalize(tokens, dim=-1, eps=1e-5) for tokens in (words, patches))
        return 1 - words @ patches.transpose(1, 2)


@torch.no_grad()
def ipot(
    cost: Tensor, text_mask: Tensor, image_mask: Tensor, beta: float = 0.5, outer: int = 50, inner: int = 1
) -> Tensor:
    """The cheapest way to move the words onto the patches, nearly: (B, L, P), sums to one, without gradient.

    Every word that counts has the same share to give, 1 / their number, and every patch the same to take.

    Args:
        cost: (B, L, P). text_mask (B, L), image_mask (B, P): True on what counts; the rest gives and takes nothing.
        beta: how far one step may go; smaller is bolder. outer: steps. inner: rescalings of rows and columns per step.

    Each step solves a softened problem that must stay close to the plan so far, so that, unlike Sinkhorn's algorithm,
    the softening fades away as the steps go on. The words' shares are exact after any step, the patches' in the limit.
    A row of the batch without words or without patches gets a plan of zeros.
    """
    with torch.autocast(cost.device.type, enabled=False):
        pairs = (text_mask[:, :, None] & image_mask[:, None, :]).to(cost.dtype)  # (B, L, P)
        kernel = (-cost / beta).exp_()
        give, take = (mask / mask.sum(1, keepdim=True).clamp(min=1) for mask in (text_mask, image_mask))
        give, take = give[:, :, None].to(cost.dtype), take[:, None, :].to(cost.dtype)  # (B, L, 1), (B, 1, P)
        plan, rows, none = pairs, give, torch.finfo(cost.dtype).tiny
        for _ in range(outer):
            plan = plan * kernel
            for _ in range(inner):
                columns = take / (rows.mT @ plan).clamp_(min=none)  # (B, 1, P)
                rows = give / (plan @ columns.mT).clamp_(min=none)  # (B, L, 1)
            plan.mul_(rows).mul_(columns)
    return plan


def word_patch_alignment(
    words: Tensor, patches: Tensor, text_mask: Tensor, image_mask: Tensor, matched: Tensor, weight: float = 0.1
) -> Alignment:
    """Cheap moves for pairs that match, dear ones for pairs that do not.

    Args:
        words (B, L, D), patches (B, P, D): both after they have seen each other. text_mask, image_mask: as in `ipot`;
            leave out what stands for the whole: class and closing tokens (`inner_words`).
        matched: (B,) bool, True where text and image belong together.
        weight: ViLT's code has 0.1.

    Returns: `loss` is `weight` times (sum of the matched pairs' distances - sum of the others') / B. The gradient flows
    through the cost alone: the plan is taken as given.
    """
    cost = cosine_cost(words, patches)
    plan = ipot(cost, text_mask, image_mask)
    distance = (plan * cost).sum(dim=(1, 2))
    return Alignment(weight * torch.where(matched, distance, -distance).mean(), distance, plan)


def inner_words(mask: Tensor) -> Tensor:
    """Real tokens (B, L) without the first and the last of each row ([CLS] and [SEP]); padding stands at the end."""
    inner = F.pad(mask[:, 1:], (0, 1))  # the token after it is real
    inner[:, 0] = False
    return inner
