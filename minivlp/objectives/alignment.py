"""Word-patch alignment (WPA): optimal transport between the words of a caption and the patches of its picture.

Transporting a word to a patch costs one minus the cosine of their features. The loss makes the transport cost low for
matching pairs and high for mismatched ones. UNITER (Chen et al., ECCV 2020) does this with words and regions, ViLT (Kim
et al., ICML 2021, section 3.2) with words and patches. The transport plan is found by inexact proximal point steps
(IPOT; Xie et al., UAI 2020, "A fast proximal point method for computing exact Wasserstein distance"); it is a map from
words to patches that can be drawn.

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
    distance: Tensor  # (B,) cost of transporting the words to the patches, from 0 to 2
    plan: Tensor  # (B, L, P) how much of each word goes to each patch, without gradient; sums to one


def cosine_cost(words: Tensor, patches: Tensor) -> Tensor:
    """One minus the cosine of every word with every patch: (B, L, D), (B, P, D) -> (B, L, P), from 0 to 2."""
    with torch.autocast(words.device.type, enabled=False):  # a cosine in bfloat16 has three digits
        words, patches = (F.normalize(tokens, dim=-1, eps=1e-5) for tokens in (words, patches))
        return 1 - words @ patches.transpose(1, 2)


@torch.no_grad()
def ipot(
    cost: Tensor, text_mask: Tensor, image_mask: Tensor, beta: float = 0.5, outer: int = 50, inner: int = 1
) -> Tensor:
    """An approximately optimal transport plan from words to patches: (B, L, P), sums to one, without gradient.

    Every word has the same mass, 1 / number of words, and every patch the same capacity, 1 / number of patches.

    Args:
        cost: (B, L, P). text_mask (B, L), image_mask (B, P): True on the words and patches that take part.
        beta: step size of the proximal point method; smaller values take larger steps. outer: steps. inner: Sinkhorn
            rescalings of rows and columns per step.

    Each step solves an entropy-regularized problem relative to the previous plan, so that, unlike with Sinkhorn's
    algorithm alone, the plan converges to the unregularized optimum. The words' marginals are exact after any step, the
    patches' in the limit. A row of the batch without words or without patches gets a plan of zeros.
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
    """Low transport cost for pairs that match, high cost for pairs that do not.

    Args:
        words (B, L, D), patches (B, P, D): outputs of the transformer that saw both. text_mask, image_mask: as in
            `ipot`; leave out class and closing tokens (`inner_words`).
        matched: (B,) bool, True where text and image belong together.
        weight: ViLT's code has 0.1.

    Returns: `loss` is `weight` times (sum of the matched pairs' distances - sum of the others') / B. The gradient flows
    through the cost alone; the plan is treated as a constant.
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
