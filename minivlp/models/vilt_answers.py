"""ViLT fine-tuned to answer: a question about one image (VQA), or a statement about two (NLVR2), from a list of answers
(Kim, Son and Kim, ICML 2021, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.data.batch import Text
from minivlp.layers.heads import AnswerHead, Pooler
from minivlp.layers.single_stream import ViLTStream
from minivlp.models.pretraining import Encoded, PretrainingModel
from minivlp.models.verbs import FIRST
from minivlp.models.vilt import ViLTConfig


@dataclass(frozen=True)
class AnswersConfig(ViLTConfig):
    """How many answers there are to choose from, and how many images a text is about (VQA 3129, 1; NLVR2 2, 2)."""

    losses: tuple[str, ...] = ("answering",)
    answers: int = 3129
    images_per_text: int = 1


class ViLTAnswers(PretrainingModel):
    """The same transformer with a classifier of answers on its pooled vector, one pass per image."""

    Config = AnswersConfig

    def __init__(self, config: AnswersConfig) -> None:
        super().__init__(config)
        width, images = config.image.block.width, config.images_per_text
        self.joint = ViLTStream(config.image, config.text, images)
        self.pooler = Pooler(width)
        self.answer_head = AnswerHead(images * width, 2 * width, config.answers)

    def answer(self, images: Tensor, text: Text, pixel_mask: Tensor | None = None) -> Tensor:
        """Logits (B, answers). `images` (B, 3, H, W), or (B, images_per_text, 3, H, W), each run with the text."""
        views = images.unbind(1) if images.dim() == 5 else [images]
        embedded = [self.joint.embed_images(view, pixel_mask, kind) for kind, view in enumerate(views, start=1)]
        return self.answer_head(torch.cat([self.pooler(self.joint(image, text, FIRST)) for image in embedded], dim=-1))

    def answering(self, encoded: Encoded) -> Tensor:
        """Cross-entropy with the right answers, `batch.answers` (B,): about ln(answers) at initialization.

        Released code and paper sum a binary loss over all answers for VQA, where several are right; for NLVR2, where
        one is, they do as here.
        """
        batch = encoded.batch
        loss = F.cross_entropy(self.answer(batch.images, batch.text), batch.answers)
        return encoded.share(loss, len(batch))
