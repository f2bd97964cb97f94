"""A momentum model, a queue of its features, and targets softened by what it predicts.

The momentum model is MoCo's (He et al., CVPR 2020): an exponential moving average (EMA) of the model in training,
steady enough that features of past batches can be kept as negatives. ALBEF (Li et al., NeurIPS 2021, section 3.3) also
mixes its predictions into the targets ("momentum distillation"); BLIP does the same. Axes: B batch, K candidates, Q
queue, q filled slots of the queue, E joint-embedding width."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits, equal_shares

EVERY = slice(None)  # all rows


@dataclass(frozen=True)
class MomentumConfig:
    """momentum: share of itself that the momentum model keeps at each step. It should forget faster than the run is
    long: .995 averages over about 200 steps. alpha: share of its predictions in the targets, reached after
    `alpha_steps` steps. distill: the losses whose targets it softens; with none of them only the queue remains.
    queue_size: pairs of past features that are kept as negatives.
    """

    momentum: float = 0.995
    alpha: float = 0.4
    alpha_steps: int = 10_000
    queue_size: int = 65_536
    distill: tuple[str, ...] = ("itc", "mlm")


class MomentumModel(nn.Module):
    """A copy of the model, `model`, that follows it slowly and gets no gradient.

    `without` names parts that the copy need not have, such as "match_head" or "itc_head.scale". `updates` counts the
    steps (see `ramp`). All of it is saved with the model that holds it.
    """

    def __init__(self, online: nn.Module, momentum: float, without: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.momentum = momentum
        self.model = copy.deepcopy(online).requires_grad_(False)  # weights that are tied stay tied
        for name in without:
            parent, _, child = name.rpartition(".")
            delattr(self.model.get_submodule(parent), child)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """Every parameter becomes m * own + (1 - m) * online. Once a step, before the momentum model is used."""
        own, new = self._pairs(online)
        torch._foreach_lerp_(own, new, 1 - self.momentum)  # one call for all parameters
        self.updates += 1

    @torch.no_grad()
    def copy_from(self, online: nn.Module) -> None:
        """Become an exact copy: after other weights were loaded into the online model."""
        torch._foreach_copy_(*self._pairs(online))

    def _pairs(self, online: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters of equal name; the online model may have more of them. Buffers are not averaged."""
        theirs = dict(online.named_parameters(remove_duplicate=False))  # tied: the copy may lack the first name
        own = dict(self.model.named_parameters())
        return list(own.values()), [theirs[name] for name in own]


class Queue(nn.Module):
    """The last `size` pairs of the momentum model's features; the oldest are overwritten first.

    `put` takes batches of any size (ALBEF's code: only divisors of the queue's). Slots that were never written are not
    part of `features` and `positives`, so early batches meet no random vectors as negatives (ALBEF's code starts with
    them). With each pair its `pair_ids` are kept, so that a repeated image or caption counts as a positive.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(size, width))  # (Q, E)
        self.register_buffer("texts", torch.zeros(size, width))  # (Q, E)
        self.register_buffer("ids", torch.zeros(size, 2, dtype=torch.long))  # (Q, 2)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # ever put; the next slot is count % size

    def __len__(self) -> int:
        """How many slots are filled; the filled ones come first."""
        return min(int(self.count), len(self.ids))

    @torch.no_grad()
    def put(self, images: Tensor, texts: Tensor, ids: Tensor) -> None:
        """Add unit vectors (B, E) of both modalities and the `pair_ids` (B, 2)."""
        rows = torch.arange(len(ids), device=ids.device)[-len(self.ids) :]  # of too many only the last
        slots = (self.count + rows) % len(self.ids)
        for kept, new in ((self.images, images), (self.texts, texts), (self.ids, ids)):
            kept[slots] = new[rows].to(kept.dtype)
        self.count += len(ids)

    def features(self) -> tuple[Tensor, Tensor]:
        """Image and text vectors of all filled slots, (q, E) each, in the order of the slots."""
        return self.images[: len(self)], self.texts[: len(self)]

    def positives(self, ids: Tensor, rows: slice = EVERY) -> Tensor:
        """Which candidates belong to each row of `pair_ids` (B, 2): (B, B+q), the batch itself first, then the queue.

        As `contrastive.find_positives`: the same image, or the same caption. Only these `rows` of the result.
        """
        return (ids[rows, None] == torch.cat([ids, self.ids[: len(self)]])[None]).any(dim=-1)


def pair_ids(image_ids: Tensor, text: Text) -> Tensor:
    """(B, 2): the image's number, and a hash of the caption, equal where `text` (B, L) is equal but for padding."""
    powers = text.ids.new_tensor([pow(1_000_003, place, 2**63) for place in range(text.length)])
    # the products wrap around at 64 bits, as a hash may
    return torch.stack([image_ids, ((text.ids + 1) * text.mask * powers).sum(dim=1)], dim=1)


def soft_targets(momentum_logits: Tensor, positives: Tensor, alpha: float) -> Tensor:
    """The momentum model's predictions mixed with what is known: (B, K) with rows that sum to one.

    A share `alpha` is the softmax of `momentum_logits` (B, K) over the whole row, the rest is spread evenly over the
    `positives` (B, K) bool, of which each row needs one.
    """
    return alpha * momentum_logits.softmax(dim=-1) + (1 - alpha) * equal_shares(positives, momentum_logits.dtype)


def ramp(step: Tensor | int, steps: int, alpha: float) -> float:
    """`alpha` at this step: a straight line from 0 over `steps` steps; early in training the momentum model is no
    better than chance."""
    return alpha * min(1.0, float(step) / steps) if steps else alpha


def queued_contrastive_loss(
    online: tuple[Tensor, Tensor],
    momentum: tuple[Tensor, Tensor],
    queue: tuple[Tensor, Tensor],
    positives: Tensor,
    scale: Tensor,
    alpha: float = 0.0,
    rows: slice = EVERY,
) -> Tensor:
    """`contrastive_loss` with the features of past batches as further candidates (ALBEF, equations 1 and 6).

    The online model's images are compared with the momentum model's texts of this batch and of the queue, its texts
    likewise with the images.

    Args:
        online, momentum: image and text vectors of the batch, (B, E) each, unit length; the momentum model's without
            gradient. With the same vectors in both and an empty queue this is `contrastive_loss`.
        rows: the loss is that of these rows, the only ones in `online` and `positives` (one process of several).
        queue: image and text vectors (q, E) from `Queue.features`. positives: (B, B+q) bool from `Queue.positives`.
        scale: one over the temperature. alpha: share of the momentum model's predictions in the targets.

    Returns: the mean of the two cross-entropies, a scalar.
    """
    images, texts = (torch.cat([now, old.to(now.dtype)]) for now, old in zip(momentum, queue, strict=True))  # (B+q, E)
    with torch.no_grad():
        soft = (
            soft_targets(cosine_logits(momentum[0][rows], texts, scale), positives, alpha),
            soft_targets(cosine_logits(momentum[1][rows], images, scale), positives, alpha),
        )
    return contrastive_loss(
        cosine_logits(online[0], texts, scale), back=cosine_logits(online[1], images, scale), soft=soft
    )
