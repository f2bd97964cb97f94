"""The contrastive loss with a teacher at hand, as ALBEF and BLIP compute it: compared is with what a slow copy of the
model says, now and in batches past (see `objectives.momentum`)."""

from __future__ import annotations

import torch
from torch import Tensor

from minivlp.data.batch import Batch
from minivlp.models.fused import AlignedTowers
from minivlp.objectives.contrastive import same_group
from minivlp.objectives.momentum import Queue, Teacher, pair_ids, queued_contrastive_loss, ramp


class TaughtTowers(AlignedTowers):
    """Towers with a teacher and a queue, or with neither where `config.momentum` is None.

    `config` also needs `momentum`, `alpha`, `alpha_steps` and `queue_size`. Call `find_teacher` once all parts are
    there.
    """

    def find_teacher(self, without: tuple[str, ...]) -> None:
        """Make the teacher, a copy of this model but for the parts named in `without`, and its empty queue."""
        config = self.config
        self.teacher = None if config.momentum is None else Teacher(self, config.momentum, without)
        self.queue = None if config.momentum is None else Queue(config.queue_size, config.embed_width)

    @torch.no_grad()
    def ask_teacher(self, images: Tensor, visual: Tensor) -> tuple[Tensor | None, float]:
        """The teacher's image tokens (B, 1+P, D) and its present share of the targets; None and 0 without a teacher.

        In training it first takes its step towards the student. A tower that is frozen is the same in both, so that its
        tokens `visual` serve twice.
        """
        if self.teacher is None:
            return None, 0.0
        alpha = ramp(self.teacher.updates, self.config.alpha_steps, self.config.alpha)
        if self.training:
            self.teacher.update(self)
        frozen = not any(parameter.requires_grad for parameter in self.image.parameters())
        return (visual if frozen else self.teacher.model.encode_image(images)), alpha

    def contrast(
        self, batch: Batch, visual: Tensor, words: Tensor, taught: Tensor | None, alpha: float
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The contrastive loss, and the likeness of all in-batch pairs, images by texts and texts by images (B, B).

        `taught` and `alpha` come from `ask_teacher`. With a teacher, its vectors are what the student's are compared
        with, and in training they join the queue; without, both are the student's own.
        """
        scale = 1 / self.temperature
        own = self.embed_visual(visual), self.embed_words(words)
        if taught is None:
            theirs, past = own, (own[0][:0], own[1][:0])
            positive = same_group(batch.image_ids, batch.ids, batch.mask)
        else:
            teacher, pairs = self.teacher.model, pair_ids(batch.image_ids, batch.ids, batch.mask)
            with torch.no_grad():
                theirs = teacher.embed_visual(taught), teacher.embed_texts(batch.ids, batch.mask)
            past, positive = self.queue.past(), self.queue.together(pairs)
        loss = queued_contrastive_loss(own, theirs, past, positive, scale, alpha)
        if taught is not None and self.training:
            self.queue.put(*theirs, pairs)
        return loss, (scale * own[0] @ theirs[1].T, scale * own[1] @ theirs[0].T)
