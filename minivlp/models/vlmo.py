"""VLMo: one transformer with a feed-forward expert per modality (Bao et al., NeurIPS 2022, "VLMo: Unified
Vision-Language Pre-Training with Mixture-of-Modality-Experts").

                                          ┌─► text expert ──┐
    text  ──► tokens ───┐                 │                 │
                        ├─► attention, ───┼─► image expert ─┼──► next layer
    image ──► patches ──┘   shared        │                 │
                                          └─► VL expert ────┘   (only in the top layers)

    input              lower layers           top layers      used for
    an image           image expert           image expert    a vector for retrieval
    a text             text expert            text expert     a vector for retrieval
    both, text first   text | image expert    VL expert       match? (yes / no) · which word is masked?

What was new: a dual encoder and a fusion encoder in one set of weights (mixture of modality experts, MoME). Attention
is shared by all tokens, and only the feed-forward layer depends on a token's modality; no router is learned. So layers
can be trained in stages, on images without text and on text without images, before there are any pairs
(`training.stages`).

Here as in the released code: the contrastive loss is computed twice, with the experts of one modality in all layers and
with the VL expert in the top layers, and averaged; retrieval uses the first. Each expert has its own LayerNorm in
front, while LayerScale is shared. Both temperatures are learned and never clamped; masked language modeling has weight
1/4.

Where we differ without effect: keys have no bias there; a bias adds the same number to all scores of a query and the
softmax removes it, so ours may stay. There, texts are padded to one length and the joint input is split at it; here at
the longest text of the batch, since nothing attends to padding. Where it matters: another row of the same image or
caption is no negative here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.layers.attention import Rows
from minivlp.layers.buckets import in_length_buckets
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.heads import ContrastiveHead, LogScale, MaskedLMHead, MatchingHead, Pooler
from minivlp.layers.single_stream import BERT_EPS
from minivlp.layers.transformer import BlockConfig
from minivlp.layers.weights import copy_parts
from minivlp.models.pretraining import MatchingEncoded, PretrainingModel
from minivlp.models.verbs import FIRST, ContrastiveVerbs, MaskedLMVerbs, MatchingVerbs
from minivlp.models.vlmo_stream import VLMoStream
from minivlp.objectives.contrastive import cosine_logits
from minivlp.objectives.masking import IGNORE, TokenMasking, WordMasking, labeled_places, masked_loss
from minivlp.objectives.matching import Negatives, hard_negatives, matching_loss

MLM_WEIGHT = 0.25  # the released code's
SHARED = ("joint.norm.", "joint.relative.", "joint.token_type")  # parameters that every stage trains


@dataclass(frozen=True)
class VLMoConfig:
    """Sizes, and which losses are on.

    image, text: `layers` and `block` must agree, since both go through the same layers. `image.relative_positions` with
    `text.position_std` None is the paper's; `image.sincos_positions` with learned text positions is ours.
    vl_from: first layer with a VL expert. shared_expert: one feed-forward layer for all modalities instead of experts,
    at equal compute (the paper's ablation). losses: any of itc, itm, mlm.
    """

    image: ImageConfig
    text: TextConfig
    vl_from: int
    embed_width: int
    shared_expert: bool = False
    losses: tuple[str, ...] = ("itc", "itm", "mlm")
    temperature: float = 0.07
    masking: TokenMasking = WordMasking()

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> VLMoConfig:
        """1.9 M parameters, minutes on a laptop. Ours, as for X-VLM: absolute positions, two-step patches, ReLU.

        LayerScale is left out: in a run of minutes it only delays.
        """
        return cls(ImageConfig.nano(layers=4), TextConfig.nano(vocabulary, layers=4), vl_from=3, embed_width=64)

    @classmethod
    def small(cls, vocabulary: int = 30522) -> VLMoConfig:
        """About 50 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        return cls(ImageConfig.small(), TextConfig.small(vocabulary, layers=8), vl_from=6, embed_width=256)

    @classmethod
    def paper(cls) -> VLMoConfig:
        """VLMo-Base: 175 M parameters without the heads of pre-training, as the README of the released code counts."""
        block = BlockConfig(768, 12, 3072, norm_eps=1e-6, layer_scale=0.1)
        return cls(
            image=ImageConfig(224, 16, 12, block, relative_positions=True),
            text=TextConfig(30522, 196, 12, block, embed_norm=True, position_std=None),
            vl_from=10,
            embed_width=768,
            masking=WordMasking(mask_id=103, never_mask=(0, 100, 101, 102, 103)),
        )


class VLMoEncoded(MatchingEncoded):
    """Parts that the losses share. The captions are rows 0 to B-1 of `text`, negative captions follow."""

    @cached_property
    def text(self) -> Text:
        """Captions (B, L), then negative captions if there are any."""
        batch = self.batch
        return batch.text if batch.negatives is None else Text.cat([batch.text, batch.negatives])

    @cached_property
    def image(self) -> Tensor:
        """The embedded images (B, 1+P, D), input of the first layer."""
        return self.model.joint.embed_image(self.batch.images)

    @cached_property
    def branches(self) -> tuple[Tensor, Tensor]:
        """First tokens of images and captions, (B, 1, 2, D) each, as `VLMoStream.branches` returns them."""
        joint = self.model.joint
        texts = in_length_buckets(
            self.batch.text, lambda rows, text: joint.branches(joint.embed_text(text), text.length, text.mask)
        )
        return joint.branches(self.image, 0), texts

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, E) of images and captions by their own experts."""
        (image, text), head = self.branches, self.model.itc_head
        return head.embed_image(image[:, :, 0]), head.embed_text(text[:, :, 0])

    @cached_property
    def negatives(self) -> Negatives:
        """Drawn by similarity, for the rows of all processes."""
        if self.given_negatives is not None:
            return self.given_negatives
        vectors = self.all_vectors  # with gradient: ITC uses the same
        with torch.no_grad():
            logits = cosine_logits(*vectors, self.model.itc_head.scale())
            if self.elsewhere is not None:  # they take no part in the softmax either
                logits = logits.masked_fill(self.elsewhere, -torch.inf)
        return hard_negatives(logits, self.excluded, 0.0, None, self.processes.generator)


class VLMo(ContrastiveVerbs, MatchingVerbs, MaskedLMVerbs, PretrainingModel):
    """A dual encoder and a fusion encoder in the same weights."""

    Config = VLMoConfig
    encoding = VLMoEncoded

    def __init__(self, config: VLMoConfig) -> None:
        """Raises ValueError where image and text differ in `layers` or `block`."""
        super().__init__(config)
        image, text = config.image, config.text
        if (image.layers, image.block) != (text.layers, text.block):
            raise ValueError("image and text go through the same layers: give both the same `layers` and `block`")
        self.joint = VLMoStream(image, text, config.vl_from, config.shared_expert)
        width = image.block.width
        self.match_head = MatchingHead(nn.Linear(width, 2), Pooler(width))
        self.mlm_head = MaskedLMHead(width, text.vocabulary, BERT_EPS)
        self.itc_head, self.itc_head_vl = (
            ContrastiveHead(width, width, config.embed_width, LogScale(config.temperature, at_most=None), bias=False)
            for _ in range(2)
        )

    def encode_image(self, images: Tensor, rows: Rows | None = None) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, 1+P, D), by the image experts alone; only the `rows` asked for."""
        return self.joint(self.joint.embed_image(images), 0, rows=rows)

    def encode_text(self, text: Text, rows: Rows | None = None) -> Tensor:
        """Texts (B, L) -> tokens (B, L, D), by the text experts alone; only the `rows` asked for."""
        return self.joint(self.joint.embed_text(text), text.length, text.mask, rows)

    def fuse(self, image: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        """Embedded images (B, 1+P, D) and texts of equal rows in one pass -> (B, N, D), text first."""
        x = torch.cat([self.joint.embed_text(text), image], dim=1)
        return self.joint(x, text.length, text.mask, rows)

    def cross_encode(self, images: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        """Text and image tokens (B, N, D) of equal rows, text first; only the `rows` asked for."""
        return self.fuse(self.joint.embed_image(images), text, rows)

    def cross_encode_many(self, images: Tensor, image_rows: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        """The same for text r and image `image_rows[r]`; the images are embedded once."""
        return self.fuse(self.joint.embed_image(images)[image_rows], text, rows)

    def itc(self, encoded: VLMoEncoded) -> Tensor:
        """Image-text contrast, the mean of both branches."""
        (image, text), head, positives = encoded.branches, self.itc_head_vl, encoded.positives
        own = encoded.contrast(encoded.vectors, encoded.all_vectors, self.itc_head.scale(), positives)
        vl = head.embed_image(image[:, :, 1]), head.embed_text(text[:, :, 1])
        return (own + encoded.contrast(vl, encoded.processes.gather(*vl), head.scale(), positives)) / 2

    def itm(self, encoded: VLMoEncoded) -> Tensor:
        """Image-text matching of `encoded.pairs`."""
        text, text_rows, image_rows, matched, _ = encoded.pairs
        first = in_length_buckets(
            text[text_rows], lambda rows, some: self.fuse(encoded.image[image_rows[rows]], some, FIRST)
        )
        logits = self.match_head(first)
        return encoded.share(matching_loss(logits[:matched], logits[matched:]), len(logits))

    def mlm(self, encoded: VLMoEncoded) -> Tensor:
        """Masked language modeling with the image; the last block computes the masked places alone."""
        masked = encoded.masked

        def fused(rows: Tensor | slice, text: Text) -> Tensor:
            places, _ = labeled_places(masked.labels[rows, : text.length])
            return self.fuse(encoded.image[rows], text, places)

        _, labels = labeled_places(masked.labels)  # (B, M)
        tokens, asked = in_length_buckets(masked.text, fused), labels != IGNORE
        labels = labels[asked]
        return MLM_WEIGHT * encoded.share(masked_loss(self.mlm_head(tokens[asked]), labels), len(labels))

    def init_from(self, start: nn.Module) -> None:
        """Begin with trained weights, as the paper begins with BEiT's.

        Towers, an `ImageEncoder` as `image` and a `TextEncoder` as `text`, such as `XVLM`: the image blocks become the
        attention and the image experts of our lowest layers; of the text, the token embedding is used. A single stream
        (`GroundedStream`): every expert begins as a copy of its layer's feed-forward layer, so image and text together
        are computed as there. Raises ValueError when sizes or positions differ.
        """
        if hasattr(start, "joint"):
            blocks, embed = start.joint.blocks, {"image": start.joint.image_embed, "text": start.joint.text_embed}
            experts = ("text", "image", "vl", "shared")
            parts = {"joint.token_type": start.joint.token_type, "joint.norm": start.joint.norm}
            parts["mlm_head"] = start.mlm_head
        else:
            blocks, embed = start.image.blocks, {"image": start.image.embed, "text": start.text.embed}
            experts, parts = ("image", "shared"), {}
        if not embed["image"].config.sincos_positions or not self.config.image.sincos_positions:
            raise ValueError("this start has other positions than VLMo: both need sine-cosine positions")
        parts |= {"joint.image_embed": embed["image"], "joint.text_embed": embed["text"]}
        for ours, (layer, theirs) in zip(self.joint.blocks, enumerate(blocks), strict=False):
            own = {"feed_norm": [f"experts.{name}.norm" for name in ours.experts if name in experts]}
            own["feed_forward"] = [f"experts.{name}.feed_forward" for name in ours.experts if name in experts]
            for name, part in theirs.named_children():
                parts |= {f"joint.blocks.{layer}.{place}": part for place in own.get(name, [name])}
        copy_parts(parts, self)

    @staticmethod
    def learns_from_text(name: str) -> bool:
        """Whether the parameter of this name is trained on text alone (stage 2), as in the released code.

        The text experts, the token embedding and the head that predicts tokens, and, shared with images, the relative
        positions, the token types and the last LayerNorm. Attention, which was trained on images, is not.
        """
        own = ("joint.text_embed.", "mlm_head.")
        return name.startswith(SHARED + own) or ".experts.text." in name or ".experts.shared." in name

    @staticmethod
    def learns_from_images(name: str) -> bool:
        """The mirror image of `learns_from_text`: image experts and patches, on an attention that stays as it is."""
        own = ("joint.image_embed.",)
        return name.startswith(SHARED + own) or ".experts.image." in name or ".experts.shared." in name
