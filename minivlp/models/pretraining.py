"""What all models share in training: one method per loss, and one object that keeps what the losses share.

    encoded = model.encode(batch)          nothing is computed yet
    model.itc(encoded), model.itm(encoded)   the first that needs the image tokens computes them, once

A variant of a paper overrides one method. Axes: B batch, P patches, D width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from minivlp.data.batch import Batch
from minivlp.objectives.contrastive import find_positives
from minivlp.objectives.masking import MaskedTokens
from minivlp.objectives.matching import Negatives


class Encoded:
    """What a model computes of a batch, each part once, when it is first asked for.

    `negatives` and `masked` take the place of what is otherwise drawn at random.
    """

    def __init__(
        self, model: Any, batch: Batch, negatives: Negatives | None = None, masked: MaskedTokens | None = None
    ) -> None:
        self.model, self.batch = model, batch
        self.given_negatives, self.given_masked = negatives, masked

    @cached_property
    def image_tokens(self) -> Tensor:
        """(B, 1+P, D), or what a frozen tower computed before (`Batch.image_tokens`)."""
        if self.batch.image_tokens is not None:
            return self.batch.image_tokens
        return self.model.encode_image(self.batch.images)

    @cached_property
    def positives(self) -> Tensor:
        """(B, B) bool: rows of the same image or the same caption."""
        return find_positives(self.batch.image_ids, self.batch.text)

    @cached_property
    def masked(self) -> MaskedTokens:
        """The captions with some tokens replaced."""
        config = self.model.config
        return self.given_masked or config.masking.apply(self.batch.text, config.text.vocabulary)


class PretrainingModel(nn.Module):
    """A model whose `config.losses` names its loss terms, each a method of that name."""

    encoding = Encoded  # the class of what the losses share

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def encode(self, batch: Batch, **given: Any) -> Encoded:
        """What the losses of this batch share; `given` as in `losses`."""
        return self.encoding(self, batch, **given)

    def losses(self, batch: Batch, **given: Any) -> dict[str, Tensor]:
        """The terms of `config.losses` by name, scalars; a term that this batch cannot have is left out.

        `negatives` and `masked` take the place of what is otherwise drawn at random. A momentum model, in training,
        takes its step and fills its queue here.
        """
        encoded = self.encode(batch, **given)
        terms = {name: getattr(self, name)(encoded) for name in self.config.losses}
        return {name: term for name, term in terms.items() if term is not None}

    def after_step(self) -> None:
        """Called after each optimizer step: learned scales are brought back into their range."""
        for module in self.modules():
            if hasattr(module, "clamp"):
                module.clamp()
