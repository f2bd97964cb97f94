"""A paper in one file: two towers that learn by a pairwise sigmoid loss (after SigLIP, Zhai et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.heads import ContrastiveHead, LogScale
from minivlp.layers.timm_tower import image_tower
from minivlp.layers.towers import TextEncoder
from minivlp.models.pretraining import Encoded, PretrainingModel
from minivlp.models.verbs import ContrastiveVerbs
from minivlp.papers import PAPERS, Paper
from minivlp.training.recipes import gpu, laptop, quick


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of both towers and of the joint space, and the losses by name."""

    image: ImageConfig
    text: TextConfig
    embed_width: int
    losses: tuple[str, ...] = ("sigmoid",)

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> ToyConfig:
        return cls(ImageConfig.nano(), TextConfig.nano(vocabulary), embed_width=64)

    @classmethod
    def small(cls, vocabulary: int = 30522) -> ToyConfig:
        return cls(ImageConfig.small(), TextConfig.small(vocabulary), embed_width=256)

    @classmethod
    def paper(cls) -> ToyConfig:
        return cls.small()


class Toy(ContrastiveVerbs, PretrainingModel):
    """Each image-text pair of the batch is a yes-no question of its own."""

    Config = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.image, self.text = image_tower(config.image), TextEncoder(config.text)
        widths = config.image.block.width, config.text.block.width
        self.itc_head = ContrastiveHead(*widths, config.embed_width, LogScale(0.1))
        self.bias = nn.Parameter(torch.tensor(-10.0))  # most pairs do not match

    def encode_image(self, images: Tensor, rows=None) -> Tensor:
        return self.image(images, rows=rows)  # (B, 1+P, D)

    def encode_text(self, text, rows=None) -> Tensor:
        return self.text(text, rows=rows)  # (B, L, D)

    def sigmoid(self, encoded: Encoded) -> Tensor:
        images = self.itc_head.embed_image(encoded.image_tokens)  # (B, E)
        logits = self.score(images, self.embed_texts(encoded.batch.text)) + self.bias  # (B, B)
        signs = 2 * encoded.positives.to(logits.dtype) - 1
        return -F.logsigmoid(signs * logits).sum() / len(logits)


RECIPES = {
    "quick": quick(batch_size=16, steps=4),
    "laptop": laptop(batch_size=64, steps=500),
    "gpu": gpu(batch_size=256),
}
PAPERS["toy"] = Paper("toy", "Two towers and a sigmoid loss", "toy_paper:Toy", "toy_paper:RECIPES")
