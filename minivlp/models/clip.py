"""CLIP: a dual encoder (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision").

    image ──► image tower ──► class token ──► project ──► unit vector ─┐
                                                                      ├─► cosine x scale ──► B x B logits: which text
    text  ──► text tower ───► last token ───► project ──► unit vector ─┘    goes with which image? (cross-entropy, rows
                                                                            and columns)

What was new is less the objective (ConVIRT's, Zhang et al. 2020, simplified) than its scale: no labels, only image-text
pairs from the web, and a classifier for any set of classes by writing their names ("zero-shot").

Its limit follows from the structure: image and text meet only once, as two vectors. No word attends to a patch.

Code and paper: the text tower is causal and its feature is read at the end-of-text token; the scale is learned as a
logarithm that starts at ln(1/.07) and is clamped to ln 100 after each step; biases and the scale are not decayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.layers.attention import Rows
from minivlp.layers.buckets import in_length_buckets
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.heads import ContrastiveHead, LogScale, last_token
from minivlp.layers.timm_tower import image_tower
from minivlp.layers.towers import TextEncoder
from minivlp.layers.transformer import BlockConfig
from minivlp.models.pretraining import Encoded, PretrainingModel
from minivlp.models.verbs import FIRST, ContrastiveVerbs
from minivlp.objectives.masking import WordDropout


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers and of the joint space (`embed_width`, E).

    learn_temperature: the paper learns it; False keeps the initial value. diagonal_only: the paper's targets; ours are
    shared among all rows of the same image or caption (`contrastive_loss` says when the two are the same).

    Not in the paper, for little data (docs/recipe.md): mean_text reads the mean of the text tokens instead of the last;
    with 0 text layers that is a mean of word embeddings. image_dropout: share of the image features that are dropped
    in training. masking: words that are replaced in training; None is none.
    """

    image: ImageConfig
    text: TextConfig
    embed_width: int
    temperature: float = 0.07
    learn_temperature: bool = True
    diagonal_only: bool = False
    losses: tuple[str, ...] = ("itc",)
    mean_text: bool = False
    image_dropout: float = 0.0
    masking: WordDropout | None = None

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> CLIPConfig:
        """1.2 M parameters, minutes on a laptop."""
        return cls(ImageConfig.nano(ln_pre=True), TextConfig.nano(vocabulary, causal=True), embed_width=64)

    @classmethod
    def small(cls, vocabulary: int = 30522) -> CLIPConfig:
        """About 27 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        text_block = BlockConfig(width=256, heads=4, hidden=1024)
        text = TextConfig(vocabulary, 64, 6, text_block, causal=True, word_std=0.5, position_std=0.2)
        return cls(ImageConfig.small(ln_pre=True), text, embed_width=256)

    @classmethod
    def paper(cls) -> CLIPConfig:
        """ViT-B/32 as released: 151,277,313 parameters."""
        image_block, text_block = (
            BlockConfig(width, width // 64, 4 * width, activation="quick_gelu") for width in (768, 512)
        )
        return cls(
            ImageConfig(224, 32, 12, image_block, ln_pre=True, patch_bias=False),
            TextConfig(49408, 77, 12, text_block, causal=True),
            embed_width=512,
        )


class CLIPEncoded(Encoded):
    """One token per image and per text: the last block of each tower computes no other."""

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Unit vectors of images and texts, (B, E) each."""
        model, batch, masking = self.model, self.batch, self.model.config.masking
        text = batch.text
        if masking is not None and model.training:
            text = masking.drop(self.all_captions, self.processes.generator)[self.rows]
        texts = in_length_buckets(text, lambda rows, part: model.summarize(part))  # (B, 1, D)
        images = model.encode_image(batch.images, FIRST) if batch.image_tokens is None else batch.image_tokens
        return model.itc_head.embed_image(model.image_dropout(images)), model.itc_head.embed_text(texts)


class CLIP(ContrastiveVerbs, PretrainingModel):
    """A dual encoder: each picture and each text is encoded once, then any pair costs one dot product."""

    Config = CLIPConfig
    encoding = CLIPEncoded

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.image = image_tower(config.image)
        self.text = TextEncoder(config.text)
        self.image_dropout = nn.Dropout(config.image_dropout)
        scale = LogScale(config.temperature, learned=config.learn_temperature)
        widths = config.image.block.width, config.text.block.width
        self.itc_head = ContrastiveHead(*widths, config.embed_width, scale, bias=False)
        for projection in (self.itc_head.project_image, self.itc_head.project_text):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def encode_image(self, images: Tensor, rows: Rows | None = None) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, 1+P, D), class token first; only the `rows` asked for."""
        return self.image(images, rows=rows)

    def encode_text(self, text: Text, rows: Rows | None = None) -> Tensor:
        """Texts (B, L) -> tokens (B, L, D); only the `rows` asked for."""
        return self.text(text, rows=rows)

    def summarize(self, text: Text) -> Tensor:
        """Texts (B, L) -> (B, 1, D): the last real token, or the mean of all with `mean_text`."""
        if not self.config.mean_text:
            return self.encode_text(text, last_token(text))
        real = text.mask[..., None]  # (B, L, 1)
        return self.encode_text(text).masked_fill(~real, 0).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)

    def embed_texts(self, text: Text) -> Tensor:
        """Texts (B, L) -> unit vectors (B, E)."""
        return self.itc_head.embed_text(self.summarize(text))

    def itc(self, encoded: CLIPEncoded) -> Tensor:
        """Image-text contrast over the batch."""
        positives = encoded.diagonal if self.config.diagonal_only else encoded.positives
        return encoded.contrast(encoded.vectors, encoded.all_vectors, self.itc_head.scale(), positives)
