"""Two towers with fusion layers on top, in which text tokens attend to image tokens: ALBEF and X-VLM.

Axes: B batch, R pairs, L text tokens, P patches, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.layers.attention import KeysValues, Rows, attention_mask, gather_kv
from minivlp.layers.buckets import in_length_buckets
from minivlp.layers.heads import MaskedLMHead
from minivlp.layers.towers import TextEncoder
from minivlp.layers.transformer import fusion_layers
from minivlp.models.aligned import AlignedEncoded, AlignedModel
from minivlp.models.verbs import FIRST, MaskedLMVerbs
from minivlp.objectives.masking import IGNORE, MaskedTokens, labeled_places, masked_loss


class FusionEncoder(MaskedLMVerbs, AlignedModel):
    """`config` also has `fusion_layers`, `masking` and `tie_words` (masked tokens are predicted with the token
    embedding itself)."""

    def __init__(self, config: Any, image: nn.Module, classifier: nn.Module) -> None:
        super().__init__(config, image, TextEncoder(config.text), classifier)
        block = config.text.block
        self.fusion = fusion_layers(config.fusion_layers, block, config.image.block.width)
        tied = self.text.embed.token if config.tie_words else None
        self.mlm_head = MaskedLMHead(block.width, config.text.vocabulary, block.norm_eps, tied)

    def keys_values(self, image_tokens: Tensor) -> list[KeysValues]:
        """What the fusion layers attend to, for each layer."""
        return self.fusion.keys_values(image_tokens)

    def fuse(
        self,
        text_tokens: Tensor,
        text_mask: Tensor,
        image: Tensor | list[KeysValues],
        image_mask: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Text tokens (B, L, D) attend to image tokens (B, 1+P, D) or their `keys_values`; of those only to
        `image_mask` (B, 1+P)."""
        context_mask = None if image_mask is None else attention_mask(image_mask)
        return self.fusion(text_tokens, attention_mask(text_mask), image, context_mask, rows=rows)

    def cross_encode(self, images: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        return self.fuse(self.encode_text(text), text.mask, self.encode_image(images), rows=rows)

    def cross_encode_many(self, images: Tensor, image_rows: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        image = gather_kv(self.keys_values(self.encode_image(images)), image_rows)
        return self.fuse(self.encode_text(text), text.mask, image, rows=rows)

    def fused_first(self, encoded: AlignedEncoded, text: Text, text_rows: Tensor, image_rows: Tensor) -> Tensor:
        tokens = encoded.pair_tokens[text_rows, : text.length]
        text_mask, mask = text.mask[:, : tokens.shape[1]], self.image_mask(encoded)
        image = gather_kv(encoded.keys_values, image_rows)
        return self.fuse(tokens, text_mask, image, None if mask is None else mask[image_rows], FIRST)

    def image_mask(self, encoded: AlignedEncoded) -> Tensor | None:
        """(B, 1+P) which image tokens may be attended to; None is all. X-VLM's regions see their box."""
        return None

    def mlm(self, encoded: AlignedEncoded) -> Tensor:
        """Masked language modeling, with softened targets where there is a momentum model."""
        masked, mask = encoded.masked, self.image_mask(encoded)
        logits, labels = self.predict_masked(masked, encoded.keys_values, mask)
        soft, (tokens, alpha) = None, encoded.momentum
        if tokens is not None and "mlm" in self.config.momentum.distill:
            momentum = self.momentum_model.model
            with torch.no_grad():
                soft, _ = momentum.predict_masked(masked, momentum.keys_values(tokens), mask)
        return encoded.share(masked_loss(logits, labels, soft, alpha), len(labels))

    def predict_masked(
        self, masked: MaskedTokens, image: list[KeysValues], image_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits (N, V) and labels (N,) of the masked tokens: last layer and head compute no others."""

        def fused(rows: Tensor | slice, text: Text) -> Tensor:
            places, _ = labeled_places(masked.labels[rows, : text.length])
            seen = None if image_mask is None else image_mask[rows]
            return self.fuse(self.encode_text(text), text.mask, gather_kv(image, rows), seen, places)

        _, labels = labeled_places(masked.labels)  # (B, M)
        tokens = in_length_buckets(masked.text, fused)  # (B, M, D)
        asked = labels != IGNORE
        return self.mlm_head(tokens[asked]), labels[asked]
