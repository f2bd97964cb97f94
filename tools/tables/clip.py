"""CLIP: seeds, temperature, batch size, number of negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minivlp.evaluation.retrieval import retrieval
from minivlp.models.clip import CLIP, CLIPEncoded
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits
from minivlp.training.recipes import Recipe
from tables.variants import Table, Variant


class InBlocks(CLIP):
    """CLIP whose loss compares the pairs of a block with each other and with no others; `block` divides the batch."""

    block: int

    def itc(self, encoded: CLIPEncoded) -> Tensor:
        """The mean of the losses of the blocks."""
        (images, texts), scale, count = encoded.vectors, self.itc_head.scale(), len(encoded.batch)
        blocks = [slice(start, start + self.block) for start in range(0, count, self.block)]
        losses = [
            contrastive_loss(cosine_logits(images[own], texts[own], scale), encoded.positives[own, own])
            for own in blocks
        ]
        return encoded.share(sum(losses) / len(losses), count)


@dataclass(frozen=True)
class BlockVariant(Variant):
    """Batches, steps and computation of the towers are the same for all sizes of `block`."""

    block: int = 64

    def build(self, recipe: Recipe, tokenizer: Any) -> nn.Module:
        model = recipe.build(InBlocks, tokenizer)
        model.block = self.block
        return model


SHORT = {"steps": 150}

TABLES = {
    "clip_seeds": Table("CLIP nano as lesson 01 trains it, three seeds", {"CLIP nano": Variant("clip")}),
    "clip_temperature": Table(
        "temperature learned or fixed (150 steps)",
        {
            "learned from .07": Variant("clip", recipe=SHORT),
            "fixed at .07": Variant("clip", {"learn_temperature": False}, SHORT),
            "fixed at 1": Variant("clip", {"learn_temperature": False, "temperature": 1.0}, SHORT),
        },
        retrieval,
    ),
    "clip_batch": Table(
        "batch size at the same number of training pairs (9,600)",
        {
            f"batch {size}": Variant("clip", recipe={"batch_size": size, "steps": 9600 // size})
            for size in (16, 64, 256)
        },
        retrieval,
    ),
    "clip_negatives": Table(
        "number of negatives alone: the loss in blocks of a batch of 64 (300 steps)",
        {f"blocks of {size}": BlockVariant("clip", recipe={"steps": 300}, block=size) for size in (4, 8, 16, 64)},
        retrieval,
    ),
}
