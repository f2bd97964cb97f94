"""Align before fuse: what ALBEF, BLIP and X-VLM share (Li et al., NeurIPS 2021, section 3).

    image ──► image tower ──► tokens ──┬─► itc_head ──► unit vector ─┐
                                       │                             ├─► ITC: cosine / temperature
    text  ──► text tower ───► tokens ──┼─► itc_head ──► unit vector ─┘      │ which negatives are hard
                                 │     │                                    ▼
                                 └─────┴─► layers with cross-attention ──► ITM: do they match?

The towers are aligned by the contrastive loss (ITC) first, so that the layers above can relate words and patches. ITC
also finds the hard negatives that matching (ITM) learns from. With `config.momentum`, ITC compares with the features of
a momentum model and of a queue (`objectives.momentum`).

A paper's class adds `fused_first`: how its text attends to the image. Axes: B batch (of all processes, where it says
so), R pairs, T texts, L text tokens, P patches, D width, E joint-embedding width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.layers.attention import KeysValues, Rows
from minivlp.layers.buckets import in_length_buckets
from minivlp.layers.heads import ContrastiveHead, MatchingHead, Temperature
from minivlp.models.pretraining import MatchingEncoded, PretrainingModel
from minivlp.models.verbs import ContrastiveVerbs, MatchingVerbs
from minivlp.objectives.contrastive import cosine_logits
from minivlp.objectives.matching import Negatives, hard_negatives, matching_loss, random_negatives
from minivlp.objectives.momentum import MomentumModel, Queue, pair_ids, queued_contrastive_loss, ramp


class AlignedEncoded(MatchingEncoded):
    """The parts that the losses of an `AlignedModel` share."""

    @cached_property
    def text(self) -> Text:
        """What is matched with the images: the captions (B, L), then the negative captions if there are any."""
        batch = self.batch
        if batch.negatives is None or "itm" not in self.model.config.losses:
            return batch.text
        return Text.cat([batch.text, batch.negatives])

    @cached_property
    def text_tokens(self) -> Tensor:
        """(B or 2B, L, D) of the text tower."""
        return in_length_buckets(self.text, lambda rows, text: self.model.encode_text(text))

    @cached_property
    def pair_tokens(self) -> Tensor:
        """(T, L, D) of the text tower for the texts of `pairs`; those of other processes are encoded here, too."""
        if not len(self.pairs.visitors):
            return self.text_tokens
        both = self.text_tokens, self.model.encode_text(self.pairs.visitors)
        longest = max(tokens.shape[1] for tokens in both)
        return torch.cat([F.pad(tokens, (0, 0, 0, longest - tokens.shape[1])) for tokens in both])

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Unit vectors of images and captions, (B, E) each."""
        head = self.model.itc_head
        return head.embed_image(self.image_tokens), head.embed_text(self.text_tokens[: len(self.batch.text)])

    @cached_property
    def keys_values(self) -> list[KeysValues]:
        """Each cross-attention's keys and values of the images, once for all texts that attend to them."""
        return self.model.keys_values(self.image_tokens)

    @cached_property
    def momentum(self) -> tuple[Tensor | None, float]:
        """The momentum model's image tokens (B, 1+P, D) and its share of the targets; None and 0 without one.

        In training it first takes its step. A frozen image tower is the same in both models and runs once.
        """
        model = self.model
        if model.momentum_model is None:
            return None, 0.0
        alpha = ramp(model.momentum_model.updates, model.config.momentum.alpha_steps, model.config.momentum.alpha)
        if model.training:
            model.momentum_model.update(model)
        if not any(parameter.requires_grad for parameter in model.image.parameters()):
            return self.image_tokens, alpha
        with torch.no_grad():
            return model.momentum_model.model.encode_image(self.batch.images), alpha

    @cached_property
    def compared(self) -> tuple[Tensor, Tensor]:
        """The image and text vectors (B, E) that ours are compared with: the momentum model's, else our own."""
        tokens, _ = self.momentum
        if tokens is None:
            return self.vectors
        momentum = self.model.momentum_model.model
        with torch.no_grad():
            return momentum.itc_head.embed_image(tokens), momentum.embed_texts(self.batch.text)

    @cached_property
    def all_compared(self) -> tuple[Tensor, Tensor]:
        """`compared` of all processes, (B, E) each."""
        tokens, _ = self.momentum
        return self.all_vectors if tokens is None else self.processes.gather(*self.compared)

    @cached_property
    def negatives(self) -> Negatives:
        """One negative per row of all processes and direction, drawn by similarity or at random."""
        if self.given_negatives is not None:
            return self.given_negatives
        generator = self.processes.generator
        if not self.model.draws_hard_negatives():
            return random_negatives(self.excluded, generator)
        own, other = self.all_vectors, self.all_compared  # with gradient: ITC uses the same
        with torch.no_grad():
            scale = self.model.itc_head.scale()
            logits, back = cosine_logits(own[0], other[1], scale), cosine_logits(own[1], other[0], scale)
            if self.elsewhere is not None:  # they take no part in the softmax either
                logits, back = (values.masked_fill(self.elsewhere, -torch.inf) for values in (logits, back))
        return hard_negatives(logits, self.excluded, self.model.negative_floor, back, generator)


class AlignedModel(ContrastiveVerbs, MatchingVerbs, PretrainingModel):
    """Two towers, a joint space, and a head that says whether image and text match.

    `config` has `image`, `text`, `embed_width`, `temperature`, `losses` and may have `momentum`. A subclass makes its
    layers with cross-attention, defines `keys_values`, `cross_encode`, `cross_encode_many` and `fused_first`, and ends
    its `__init__` with `add_momentum_model`. `negative_floor`: see `sampling_weights`.
    """

    encoding = AlignedEncoded
    negative_floor = 0.0

    def __init__(self, config: Any, image: nn.Module, text: nn.Module, classifier: nn.Module) -> None:
        super().__init__(config)
        self.image, self.text = image, text
        scale = Temperature(config.temperature)
        self.itc_head = ContrastiveHead(config.image.block.width, config.text.block.width, config.embed_width, scale)
        self.match_head = MatchingHead(classifier)
        self.momentum_model = self.queue = None

    def add_momentum_model(self, without: tuple[str, ...]) -> None:
        """Make the momentum model, a copy of this one but for the parts named in `without`, and its empty queue."""
        momentum = getattr(self.config, "momentum", None)
        if momentum is not None:
            self.momentum_model = MomentumModel(self, momentum.momentum, without)
            self.queue = Queue(momentum.queue_size, self.config.embed_width)

    def encode_image(self, images: Tensor, rows: Rows | None = None) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, 1+P, D), the class token first; only the `rows` asked for."""
        return self.image(images, rows=rows)

    def encode_text(self, text: Text, rows: Rows | None = None) -> Tensor:
        """Texts (B, L) -> tokens (B, L, D); only the `rows` asked for."""
        return self.text(text, rows=rows)

    def draws_hard_negatives(self) -> bool:
        """Whether negatives are drawn by similarity: only where the towers are being aligned."""
        return "itc" in self.config.losses

    def itc(self, encoded: AlignedEncoded) -> Tensor:
        """Image-text contrast, with the queue and softened targets where there is a momentum model."""
        scale = self.itc_head.scale()
        if self.momentum_model is None:
            return encoded.contrast(encoded.vectors, encoded.all_vectors, scale, encoded.positives)
        momentum, (_, alpha) = self.config.momentum, encoded.momentum
        (ids,) = encoded.processes.gather(pair_ids(encoded.batch.image_ids, encoded.batch.text))
        loss = queued_contrastive_loss(
            encoded.vectors,
            encoded.all_compared,
            self.queue.features(),
            self.queue.positives(ids, encoded.rows),
            scale,
            alpha if "itc" in momentum.distill else 0.0,
            encoded.rows,
        )
        if self.training:
            self.queue.put(*encoded.all_compared, ids)  # of all processes, in the same order in each
        return encoded.share(loss, len(encoded.batch))

    def itm(self, encoded: AlignedEncoded) -> Tensor:
        """Image-text matching of `encoded.pairs`."""
        text, text_rows, image_rows, matched, _ = encoded.pairs
        first = in_length_buckets(
            text[text_rows],
            lambda rows, some: self.fused_first(encoded, some, text_rows[rows], image_rows[rows]),
        )  # (R, 1, D)
        logits = self.match_head(first)
        return encoded.share(matching_loss(logits[:matched], logits[matched:]), len(logits))

    def fused_first(self, encoded: AlignedEncoded, text: Text, text_rows: Tensor, image_rows: Tensor) -> Tensor:
        """The first fused token (R, 1, D) of the texts `text_rows` of `encoded.pairs` with images `image_rows`."""
        raise NotImplementedError

    def cross_encode(self, images: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        """Text tokens (B, L, D) that have attended to the image of their row; only the `rows` asked for."""
        raise NotImplementedError

    def cross_encode_many(self, images: Tensor, image_rows: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        """The same for text r and image `image_rows[r]`, (R, L, D); each image is encoded once."""
        raise NotImplementedError
