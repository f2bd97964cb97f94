"""BLIP: one text model that encodes, matches and writes (Li et al., ICML 2022, "Bootstrapping Language-Image
Pre-training for Unified Vision-Language Understanding and Generation").

                       [CLS] text ──► encoder, text alone ────────────► ITC: which text goes with which image?
                                          │ the same layers
    image ──► image tower ──┬──► [ENC] text ──► encoder with cross-attention ──► ITM: do they match?
                            │             │ the same, except for self-attention
                            └──► [DEC] text ──► causal decoder with cross-attention ──► LM: what is the next token?

What was new: (1) the three share their weights ("MED", a mixture of encoder and decoder): token embeddings,
cross-attention and feed-forward layers serve all; only self-attention is the decoder's own, since encoding is
bidirectional and decoding causal; (2) a model that can match and write can clean its own training data. Pre-trained on
web captions, many of which do not describe the image, it is fine-tuned on few good ones as a captioner, which writes a
new caption for each image, and as a filter, which removes captions that do not match ("CapFilt", `training.capfilt`).

Code and paper: [ENC] or [DEC] takes the place of [CLS], and text tokens attend to patches in *every* layer, where ALBEF
has six layers of text alone first. So ITM and LM read the text anew, three passes in all; the image is encoded once,
and with shared cross-attention its keys and values are computed once for both. Labels are smoothed by 0.1. The momentum
model is ALBEF's (so are our differences from its code), softens the targets of ITC only, and has no decoder and no
heads. To answer questions, the paper encodes the question with [ENC], and a separate decoder attends to that instead of
the image; here the decoder reads the question as the beginning of its text and continues with the answer, as GIT does
(Wang et al. 2022): `data.questions`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.data.text import SpecialTokens
from minivlp.layers.attention import KeysValues, Rows, gather_kv
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.heads import MaskedLMHead
from minivlp.layers.timm_tower import image_tower
from minivlp.layers.towers import TextEncoder
from minivlp.layers.transformer import BlockConfig
from minivlp.layers.weights import copy_parts
from minivlp.models.aligned import AlignedEncoded, AlignedModel
from minivlp.models.verbs import FIRST, CaptioningVerbs
from minivlp.objectives.captioning import caption_loss
from minivlp.objectives.momentum import MomentumConfig

SELF_ATTENTION = ("self_attention", "self_norm", "norm")
CROSS_ATTENTION = ("cross_attention", "cross_norm")
THE_REST = ("embed", "feed_forward", "feed_norm")


@dataclass(frozen=True)
class BLIPConfig:
    """Sizes, what encoder and decoder share, and which losses are on.

    shared: names of the parts that encoder and decoder have in common, of the whole stack (embed, norm) or in each of
    its blocks. The paper's other choices are `()` and `SELF_ATTENTION + CROSS_ATTENTION + THE_REST`, or all but
    `CROSS_ATTENTION`. tie_words: the next token is predicted with the token embedding itself.
    losses: any of itc, itm, lm; a captioner is fine-tuned with lm alone, a filter with the other two. smoothing: see
    `caption_loss`. prefix_length: how many tokens at the start of each caption are given, not predicted; more than
    [DEC] where all captions begin with the same prompt. momentum: None is no momentum model.
    """

    image: ImageConfig
    text: TextConfig
    embed_width: int
    shared: tuple[str, ...] = CROSS_ATTENTION + THE_REST
    tie_words: bool = True
    losses: tuple[str, ...] = ("itc", "itm", "lm")
    temperature: float = 0.07
    smoothing: float = 0.1
    prefix_length: int = 1
    tokens: SpecialTokens = SpecialTokens()
    momentum: MomentumConfig | None = MomentumConfig(queue_size=57_600, distill=("itc",))

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> BLIPConfig:
        """1.6 M parameters, minutes on a laptop. The towers are those of X-VLM's nano.

        No momentum model: in minutes it does not pay (lesson 03 measures ALBEF's).
        """
        return cls(ImageConfig.nano(), TextConfig.nano(vocabulary), 64, tie_words=False, momentum=None)

    @classmethod
    def small(cls, vocabulary: int = 30522) -> BLIPConfig:
        """About 56 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        momentum = MomentumConfig(alpha_steps=2000, queue_size=8192, distill=("itc",))
        return cls(ImageConfig.small(), TextConfig.small(vocabulary, 6), 256, tie_words=False, momentum=momentum)

    @classmethod
    def paper(cls) -> BLIPConfig:
        """ViT-B/16 at 224 pixels and BERT-base with [DEC] and [ENC] added to its vocabulary: 251 M parameters, heads
        apart. `alpha_steps` is about two epochs of 14 M images in batches of 2880.
        """
        bert = BlockConfig(768, 12, 3072, norm_eps=1e-12, norm_first=False)
        return cls(
            image=ImageConfig(224, 16, 12, BlockConfig(768, 12, 3072, norm_eps=1e-6)),
            text=TextConfig(30524, 512, 12, bert, embed_norm=True, position_std=0.02),
            embed_width=256,
            tokens=SpecialTokens(pad=0, cls=101, sep=102, mask=103, unk=100, dec=30522, enc=30523),
        )


class BLIP(CaptioningVerbs, AlignedModel):
    """Encodes texts, judges whether they match an image, and writes them."""

    Config = BLIPConfig
    negative_floor = 1e-4

    def __init__(self, config: BLIPConfig) -> None:
        width, image_width = config.text.block.width, config.image.block.width
        text = TextEncoder(config.text, image_width)
        super().__init__(config, image_tower(config.image), text, nn.Linear(width, 2))
        self.decoder = TextEncoder(replace(config.text, causal=True), image_width)
        share(config.shared, text, self.decoder)
        tied = self.decoder.embed.token if config.tie_words else None
        self.caption_head = MaskedLMHead(width, config.text.vocabulary, config.text.block.norm_eps, tied)
        self.add_momentum_model(without=("match_head", "itc_head.scale", "decoder", "caption_head"))

    def keys_values(self, image_tokens: Tensor) -> list[KeysValues]:
        """What the encoder's cross-attention attends to, for each layer."""
        return self.text.keys_values(image_tokens)

    def cross_encode(self, images: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        return self.text(text.with_first(self.config.tokens.enc), self.encode_image(images), rows=rows)

    def cross_encode_many(self, images: Tensor, image_rows: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        image = gather_kv(self.keys_values(self.encode_image(images)), image_rows)
        return self.text(text.with_first(self.config.tokens.enc), image, rows=rows)

    def fused_first(self, encoded: AlignedEncoded, text: Text, text_rows: Tensor, image_rows: Tensor) -> Tensor:
        image = gather_kv(encoded.keys_values, image_rows)
        return self.text(text.with_first(self.config.tokens.enc), image, rows=FIRST)

    def lm(self, encoded: AlignedEncoded) -> Tensor:
        """Language modeling: each caption's next token, from the image and the tokens before it."""
        shared = "cross_attention" in self.config.shared
        image = encoded.keys_values if shared else self.decoder.keys_values(encoded.image_tokens)
        logits, labels = self.predict_next(encoded.batch, image)
        loss = caption_loss(logits, labels, self.config.smoothing)
        return encoded.share(loss, len(labels))

    def init_from(self, towers: nn.Module) -> None:
        """Begin with trained towers, as the paper begins with a ViT and BERT; the decoder begins as the encoder.

        `towers` is a `FusionEncoder` such as X-VLM; the cross-attention of its fusion layers becomes ours, layer by
        layer. Raises ValueError when sizes differ.
        """
        parts = {"image": towers.image, "itc_head": towers.itc_head}
        for stack in ("text", "decoder"):
            parts |= {f"{stack}.embed": towers.text.embed, f"{stack}.norm": towers.text.norm}
            for layer, (text, fusion) in enumerate(zip(towers.text.blocks, towers.fusion.blocks, strict=True)):
                block = dict(text.named_children()) | {name: getattr(fusion, name) for name in CROSS_ATTENTION}
                parts |= {f"{stack}.blocks.{layer}.{name}": part for name, part in block.items()}
        copy_parts(parts, self)
        if self.momentum_model is not None:
            self.momentum_model.copy_from(self)


def share(parts: tuple[str, ...], encoder: TextEncoder, decoder: TextEncoder) -> None:
    """Make these parts of the decoder, of the stack and of each of its blocks, the very modules of the encoder."""
    for name in parts:
        pairs = zip([encoder, *encoder.blocks], [decoder, *decoder.blocks], strict=True)
        having = [(ours, theirs) for ours, theirs in pairs if hasattr(ours, name)]
        if not having:
            raise ValueError(f"encoder and decoder have no {name!r} to share")
        for ours, theirs in having:
            setattr(theirs, name, getattr(ours, name))
