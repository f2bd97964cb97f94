"""NegCLIP: CLIP with a false caption per image (Yuksekgonul et al., ICLR 2023, "When and Why Vision-Language Models
Behave Like Bags-of-Words, and What to Do About It?", section 4).

    images ──► B unit vectors ──┬─► B x 2B logits: which of all captions, true and false, belongs to the image?
    captions, false captions ──►┴─► B x B logits:  which image belongs to the true caption?

A false caption is a true one with words exchanged. It is one more candidate for every image of the batch, and has no
image of its own, so it takes no part in the other direction. The paper also adds images that are similar to those of
the batch, as hard negative images: not here.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.layers.buckets import in_length_buckets
from minivlp.models.clip import CLIP, CLIPEncoded
from minivlp.objectives.contrastive import cosine_logits, equal_shares, soft_cross_entropy


class NegCLIPEncoded(CLIPEncoded):
    """CLIP's vectors, and those of the negative captions."""

    @cached_property
    def all_negative_vectors(self) -> Tensor:
        """Unit vectors (B, E) of the negative captions of all processes."""
        if self.batch.negatives is None:
            raise ValueError("NegCLIP learns from negative captions, and this batch has none: load them with the batch")
        tokens = in_length_buckets(self.batch.negatives, lambda rows, part: self.model.summarize(part))  # (b, 1, D)
        (everyone,) = self.processes.gather(self.model.itc_head.embed_text(tokens))
        return everyone


class NegCLIP(CLIP):
    """CLIP whose images also tell their captions from negative ones."""

    encoding = NegCLIPEncoded

    def itc(self, encoded: NegCLIPEncoded) -> Tensor:
        """Image-text contrast with the batch's negative captions as further candidates of every image."""
        scale, (images, texts) = self.itc_head.scale(), encoded.vectors
        all_images, all_texts = encoded.all_vectors
        positives = (encoded.diagonal if self.config.diagonal_only else encoded.positives)[encoded.rows]  # (b, B)
        own, false = cosine_logits(images, all_texts, scale), cosine_logits(images, encoded.all_negative_vectors, scale)
        shares = equal_shares(positives, own.dtype)
        to_text = soft_cross_entropy(torch.cat([own, false], dim=1), F.pad(shares, (0, false.shape[1])))  # (b, 2B)
        to_image = soft_cross_entropy(cosine_logits(texts, all_images, scale), shares)  # `positives` is symmetric
        return encoded.share((to_text + to_image) / 2, len(images))
