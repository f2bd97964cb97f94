"""Learning from a slow copy of oneself: a teacher that lags behind, a queue of what it said, and softened targets.

The teacher is MoCo's (He et al., CVPR 2020): an exponential moving average of the student, steady enough that features
of past batches can be kept as negatives. ALBEF (Li et al., NeurIPS 2021, section 3.3) lets it also say what else would
be a good answer ("momentum distillation"); BLIP does the same. Axes: B batch, K candidates, Q queue, E joint width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minivlp.objectives.contrastive import soft_cross_entropy


class Teacher(nn.Module):
    """A copy of the student, `model`, that follows it slowly and gets no gradient.

    `momentum` is the share it keeps of itself at each `update`; `without` names parts of the student that it need not
    have. `updates` counts, which is what `ramp` asks for. All of it is saved with the model that holds the teacher.
    """

    def __init__(self, student: nn.Module, momentum: float, without: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.momentum = momentum
        self.model = copy.deepcopy(student).requires_grad_(False)  # weights that are tied stay tied
        for name in without:
            delattr(self.model, name)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Every parameter becomes m * teacher + (1 - m) * student. Before the teacher is asked, once a step."""
        for own, new in self._pairs(student):
            own.lerp_(new, 1 - self.momentum)
        self.updates += 1

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        """Start over as an exact copy: after other weights were loaded into the student."""
        for own, new in self._pairs(student):
            own.copy_(new)

    def _pairs(self, student: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters of equal name; the student may have more of them. Buffers are not averaged."""
        theirs = dict(student.named_parameters())
        return ((own, theirs[name]) for name, own in self.model.named_parameters())


class Queue(nn.Module):
    """The last `size` pairs of features that the teacher computed, oldest overwritten first.

    `put` takes batches of any size (ALBEF's code only such that divide the queue's). A slot that was never written does
    not exist for `past` and `together`, so a short run meets no random vectors as negatives (ALBEF's code starts with
    them). With each pair `pair_ids` are kept, so that an image or a caption that comes again is known for what it is.
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
        """Add unit vectors (B, E) of both kinds and the `pair_ids` (B, 2)."""
        rows = torch.arange(len(ids), device=ids.device)[-len(self.ids) :]  # of too many only the last
        slots = (self.count + rows) % len(self.ids)
        for kept, new in ((self.images, images), (self.texts, texts), (self.ids, ids)):
            kept[slots] = new[rows].to(kept.dtype)
        self.count += len(ids)

    def past(self) -> tuple[Tensor, Tensor]:
        """Image and text vectors of all filled slots, (q, E) each, in the order of the slots."""
        return self.images[: len(self)], self.texts[: len(self)]

    def together(self, ids: Tensor) -> Tensor:
        """Which candidates belong to each row of `pair_ids` (B, 2): (B, B+q), the batch itself first, then `past`.

        As `contrastive.same_group`: the same image, or the same caption.
        """
        return (ids[:, None] == torch.cat([ids, self.ids[: len(self)]])[None]).any(dim=-1)


def pair_ids(image_ids: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, 2): the image's number and one made of the caption, equal where `ids` (B, L) are equal but for padding."""
    powers = ids.new_tensor([pow(1_000_003, place, 2**63) for place in range(ids.shape[1])])
    # the products wrap around at 64 bits, which is meant
    return torch.stack([image_ids, ((ids + 1) * mask * powers).sum(dim=1)], dim=1)


def soft_targets(teacher_logits: Tensor, positive: Tensor, alpha: float) -> Tensor:
    """What the teacher believes, mixed with what is known: (B, K) with rows that sum to one.

    A share `alpha` is the softmax of `teacher_logits` (B, K) over the whole row, the rest is spread evenly over the
    `positive` (B, K) bool, of which each row needs one.
    """
    known = positive.to(teacher_logits.dtype)
    return alpha * teacher_logits.softmax(dim=-1) + (1 - alpha) * known / known.sum(dim=-1, keepdim=True)


def ramp(step: Tensor | int, steps: int, alpha: float) -> float:
    """`alpha` at this step: from 0 to `alpha` in a straight line over `steps`, since a young teacher knows nothing."""
    return alpha * min(1.0, float(step) / steps) if steps else alpha


def queued_contrastive_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    past: tuple[Tensor, Tensor],
    positive: Tensor,
    scale: Tensor,
    alpha: float = 0.0,
) -> Tensor:
    """`contrastive_loss` with more candidates than the batch holds (ALBEF, equations 1 and 6).

    The student's images look for the right text among the teacher's of this batch and of the past, its texts likewise
    for the right image.

    Args:
        student, teacher: image and text vectors of the batch, (B, E) each, unit length; compute the teacher's without
            gradient. With the student as its own teacher and no past this is `contrastive_loss`.
        past: image and text vectors (q, E) of earlier batches, as `Queue.past` gives them.
        positive: (B, B+q) bool as from `Queue.together`. scale: one over the temperature.
        alpha: share of the teacher's opinion in the targets.

    Returns: the mean of the two cross-entropies, a scalar.
    """
    candidates = [torch.cat([now, old]) for now, old in zip(teacher, past, strict=True)]  # (B+q, E) each

    def search(own: Tensor, teachers: Tensor, among: Tensor) -> Tensor:
        with torch.no_grad():
            targets = soft_targets(scale * teachers @ among.T, positive, alpha)  # (B, B+q)
        return soft_cross_entropy(scale * own @ among.T, targets)

    with torch.autocast(scale.device.type, enabled=False):  # as in `contrastive_loss`
        return (search(student[0], teacher[0], candidates[1]) + search(student[1], teacher[1], candidates[0])) / 2
