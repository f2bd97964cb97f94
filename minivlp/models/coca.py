"""CoCa: a contrastive captioner, one forward pass for two losses (Yu et al. 2022, "CoCa: Contrastive Captioners are
Image-Text Foundation Models", TMLR).

    image ──► image tower ──► N tokens ──► pooler, Q queries ──► Q tokens ──► pooler, 1 query ──► unit vector ─┐
                                                                   │                                           ├─► ITC
    text  ──► unimodal half: causal, no image ────────────────► [CLS] ──► project ──► unit vector ─────────────┘
                      │  text tokens                               │
                      └──► multimodal half: causal, attends to the Q tokens ──► LM: what is the next token? (x 2)

What was new: the text decoder has two halves. The unimodal one does not see the image, so it serves as CLIP's text
tower; the multimodal one does, and writes. Both losses come from the same pass, where ALBEF and BLIP read each text two
or three times. The unimodal half has to be causal, because the captioning loss must not see the next word. So [CLS], a
learned vector, stands *behind* the text: only there it sees all of it. It attends to no padding, and the multimodal
half does not read it. The image tower has no class token: attentional poolers read its tokens, one for each loss
(`layers.poolers`).

Code and paper: the authors published no code. Sizes are those of the paper's table 1, which are met with separate
matrices for token embedding and output layer. Where the paper says nothing we do as open_clip does: pre-norm blocks,
no LayerNorm between the halves, no bias in the output layer, and CLIP's way to learn the temperature. Where open_clip
differs from the paper, a field of the config says so. Texts begin with [DEC], as BLIP's do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.data.text import SpecialTokens
from minivlp.layers.attention import KeysValues, KVCache, Rows, attention_mask, causal_mask, gather_kv, select
from minivlp.layers.buckets import in_length_buckets
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.heads import ContrastiveHead, LogScale, NextTokenHead
from minivlp.layers.poolers import Pooling
from minivlp.layers.timm_tower import image_tower
from minivlp.layers.towers import TextEncoder
from minivlp.layers.transformer import Block, BlockConfig, Transformer, TwoFeedsBlock
from minivlp.layers.weights import copy_parts
from minivlp.models.pretraining import Encoded, PretrainingModel
from minivlp.models.verbs import FIRST, CaptioningVerbs, ContrastiveVerbs
from minivlp.objectives.captioning import caption_loss


@dataclass(frozen=True)
class CoCaConfig:
    """Sizes and weights of the losses.

    text: the unimodal half; the multimodal half has `decoder_layers` of the same width. pooling: how image tokens are
    pooled (`layers.poolers`); a subclass is another way. losses: itc, lm or both; caption_weight is the weight of lm.
    prefix_length: how many tokens at the start of each caption are given, not predicted.

    Of open_clip's model: two_feeds: each multimodal layer has a feed-forward layer behind both of its attentions.
    legacy_mask: [CLS] sees the first padding instead of itself.
    """

    image: ImageConfig
    text: TextConfig
    decoder_layers: int
    embed_width: int
    pooling: Pooling
    losses: tuple[str, ...] = ("itc", "lm")
    caption_weight: float = 2.0
    temperature: float = 0.07
    prefix_length: int = 1
    tokens: SpecialTokens = SpecialTokens()
    two_feeds: bool = False
    legacy_mask: bool = False
    needed_tokens: ClassVar[tuple[str, ...]] = ("pad", "sep", "dec")

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> CoCaConfig:
        """2.0 M parameters, minutes on a laptop."""
        image, text = replace(ImageConfig.nano(), class_token=False), TextConfig.nano(vocabulary, causal=True)
        return cls(image, text, 2, 64, Pooling(queries=32, heads=4))

    @classmethod
    def small(cls, vocabulary: int = 30522) -> CoCaConfig:
        """About 56 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        image, text = replace(ImageConfig.small(), class_token=False), TextConfig.small(vocabulary, causal=True)
        return cls(image, text, 4, 256, Pooling(queries=64, heads=6))

    @classmethod
    def paper(cls) -> CoCaConfig:
        """CoCa-Base of the paper's table 1: an image tower of 86 M and a text decoder of 297 M parameters; poolers and
        projections, which the table leaves out, add 6 M. 256 patches of 18 x 18 pixels, 64,000 word pieces.
        """
        block = BlockConfig(768, 12, 3072)
        image, text = ImageConfig(288, 18, 12, block, class_token=False), TextConfig(64_000, 64, 12, block, causal=True)
        return cls(image, text, 12, 768, Pooling(queries=256, heads=12))


class UnimodalText(TextEncoder):
    """The lower half: a causal text tower, and a vector [CLS] behind each text that sums it up.

    [CLS] has one position, the last, however long the text: its embedding is a part of the vector.
    """

    def __init__(self, config: TextConfig, legacy_mask: bool, pad: int) -> None:
        super().__init__(config)
        self.class_token = nn.Parameter(torch.randn(config.block.width) * config.word_std)
        self.legacy_mask, self.pad = legacy_mask, pad

    def forward(self, text: Text, cache: list[KVCache] | None = None) -> Tensor:
        """Texts (B, L) -> tokens (B, L, D) as the upper half reads them, without [CLS] and without the LayerNorm."""
        read = len(cache[0]) if cache else 0
        mask = causal_mask(text.length, read, text.ids.device)
        return self.run(self.embed(text.ids, read), range(len(self.blocks)), mask, cache=cache)

    def with_class(self, text: Text, alone: bool = False) -> Tensor:
        """(B, 1+L, D): [CLS], which has read the whole text and passed the LayerNorm, then the tokens of `forward`.

        alone: [CLS] alone, (B, 1, D).
        """
        length, real = text.length, F.pad(text.mask, (0, 1), value=True)  # (B, L+1): [CLS] stands last
        if self.legacy_mask:
            text, real = with_legacy_mask(text, self.pad, self.config.context_length)
        x = torch.cat([self.embed(text.ids), self.class_token.expand(len(text), 1, -1)], dim=1)  # (B, L+1, D)
        mask, last = attention_mask(real, causal=True), slice(-1, None)
        x = self.run(x, range(len(self.blocks)), mask, rows=last if alone else None)
        return torch.cat([self.norm(x[:, last]), x[:, :-1][:, :length]], dim=1)


def with_legacy_mask(text: Text, pad: int, longest: int) -> tuple[Text, Tensor]:
    """The texts (B, L) with room for one more token, and open_clip's mask of them and [CLS].

    It is one place off: [CLS] sees the first padding, with the id `pad`, and does not see itself; of a text of
    `longest` tokens it sees everything.
    """
    text = text.padded(min(text.length + 1, longest))
    return text.with_ids(text.ids.masked_fill(~text.mask, pad)), F.pad(text.mask, (1, 0), value=True)


class CoCaEncoded(Encoded):
    """One pass through each part, which both losses read."""

    @cached_property
    def pooled(self) -> tuple[Tensor, Tensor]:
        """What sums each image up (b, 1, D), and what captions attend to (b, Q, D)."""
        return self.model.poolers(self.image_tokens)

    @cached_property
    def text_tokens(self) -> Tensor:
        """(b, 1+L, D) of the unimodal half, [CLS] first; [CLS] alone where there is no captioning."""
        rows = None if "lm" in self.model.config.losses else FIRST
        return in_length_buckets(self.batch.text, lambda _, text: self.model.encode_text(text, rows))

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Unit vectors of images and captions, (b, E) each."""
        head = self.model.itc_head
        return head.embed_image(self.pooled[0]), head.embed_text(self.text_tokens)


class CoCa(CaptioningVerbs, ContrastiveVerbs, PretrainingModel):
    """A dual encoder whose text tower is the lower half of a captioner."""

    Config = CoCaConfig
    encoding = CoCaEncoded

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__(config)
        block, image_width = config.text.block, config.image.block.width
        width = block.width
        self.image = image_tower(config.image)
        if not config.pooling.tower_norm:
            self.image.norm = nn.Identity()
        self.poolers = config.pooling.build(image_width, width, block.norm_eps)
        self.text = UnimodalText(config.text, config.legacy_mask, config.tokens.pad)
        kind = TwoFeedsBlock if config.two_feeds else Block
        self.decoder = Transformer(block, (kind(block, width) for _ in range(config.decoder_layers)))
        self.itc_head = ContrastiveHead(width, width, config.embed_width, LogScale(config.temperature), bias=False)
        self.caption_head = NextTokenHead(width, config.text.vocabulary, bias=False)

    def encode_image(self, images: Tensor, rows: Rows | None = None) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, N, D) of the image tower, which the poolers read."""
        return self.image(images, rows=rows)

    def encode_text(self, text: Text, rows: Rows | None = None) -> Tensor:
        """Texts (B, L) -> tokens (B, 1+L, D) of the unimodal half, [CLS] first although it was read last."""
        text = text.with_first(self.start_token)
        if rows == FIRST:  # then the last block computes nothing else
            return self.text.with_class(text, alone=True)
        tokens = self.text.with_class(text)
        return tokens if rows is None else select(tokens, rows)

    def embed_images(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> unit vectors (B, E)."""
        return self.itc_head.embed_image(self.poolers(self.encode_image(images))[0])

    def image_context(self, images: Tensor) -> list[KeysValues]:
        return self.decoder.keys_values(self.poolers(self.encode_image(images))[1])

    def empty_cache(self) -> list[KVCache]:
        return [KVCache() for _ in (*self.text.blocks, *self.decoder.blocks)]

    def decode(self, text: Text, context: Tensor | list[KeysValues], cache: list[KVCache] | None = None) -> Tensor:
        """Tokens (B, L, D) of both halves, each computed from the image and the tokens up to its own."""
        below = len(self.text.blocks)
        lower, upper = (cache[:below], cache[below:]) if cache else (None, None)
        return self.fuse(self.text(text, lower), context, upper)

    def fuse(self, tokens: Tensor, context: Tensor | list[KeysValues], cache: list[KVCache] | None = None) -> Tensor:
        """The multimodal half: tokens (B, L, D) of the unimodal one attend to pooled image tokens (B, Q, D)."""
        mask = causal_mask(tokens.shape[1], len(cache[0]) if cache else 0, tokens.device)
        return self.decoder(tokens, mask, context, cache=cache)

    def itc(self, encoded: CoCaEncoded) -> Tensor:
        """Image-text contrast over the batch."""
        return encoded.contrast(encoded.vectors, encoded.all_vectors, self.itc_head.scale(), encoded.positives)

    def lm(self, encoded: CoCaEncoded) -> Tensor:
        """Captioning, times its weight: each caption's next token, from the image and the tokens before it."""
        context = self.decoder.keys_values(encoded.pooled[1])

        def decoded(rows: Tensor | slice, text: Text) -> Tensor:
            before = encoded.text_tokens[rows, 1 : text.length]  # without [CLS] and each text's last place
            return self.fuse(before, gather_kv(context, rows))

        logits, labels = self.predict_from(encoded.batch, decoded)
        return encoded.share(self.config.caption_weight * caption_loss(logits, labels), len(labels))

    def init_from(self, towers: nn.Module) -> None:
        """Begin with trained towers: image and text tower, and fusion layers as the multimodal half.

        `towers` is a `FusionEncoder` such as X-VLM. Poolers, [CLS] and output layer stay random, as does the joint
        space: nothing in the towers is like them. Raises ValueError when sizes differ.
        """
        image = towers.image.state_dict()
        if not self.config.image.class_token:
            image = {name: weight for name, weight in image.items() if "class" not in name}
        parts = {f"image.{name}": weight for name, weight in image.items()}
        copy_parts({**parts, "text": towers.text, "decoder": towers.fusion}, self)
