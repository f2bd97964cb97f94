"""ViLT: one transformer for both modalities (Kim, Son and Kim, ICML 2021, "ViLT: Vision-and-Language Transformer
Without Convolution or Region Supervision").

    text  ──► token + position, LayerNorm ──► + token type "text" ──┐   [CLS] a red heart [SEP] │ class token, patches
                                                                    ├─► one ViT, every token attends to every other
    image ──► patch projection + position ──► + token type "image" ─┘     │            │                 │
                                                                        [CLS]        words            patches
                                                                          ▼            ▼                 ▼
                                                                  pooler ─► ITM       MLM     WPA: words to patches

What was new: no image tower at all. Most earlier models ran a detector on the image before the transformer; here a
patch is embedded by one matrix product, as cheaply as a word, and all other computation is joint. The price: nothing
can be computed ahead. There is no vector of an image alone, so searching N captions takes N passes (CLIP: one dot
product each).

Code and paper: the pooled vector is read at the text's [CLS], not at the image's class token. The head of masked words
is not tied to the token embedding. For ITM half of a batch's rows keep their image, the others get one drawn at random;
here never one of the same image or caption (`find_positives`). MLM is a forward pass of its own: masked words with a
wrong image could not be predicted. Whole words are masked, so that no word is predicted from its own pieces. Masked
patch prediction is an ablation; the released code calls for a mask token that it does not have. That code also shuffles
the patches and drops some of large images: not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.layers.attention import Rows
from minivlp.layers.buckets import in_length_buckets
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.heads import MaskedLMHead, MatchingHead, Pooler, to_float32
from minivlp.layers.single_stream import BERT_EPS, JointImage, ViLTStream
from minivlp.layers.transformer import BlockConfig
from minivlp.layers.weights import copy_parts
from minivlp.models.pretraining import Encoded, PretrainingModel
from minivlp.models.verbs import FIRST
from minivlp.objectives.alignment import Alignment, inner_words, word_patch_alignment
from minivlp.objectives.masking import IGNORE, TokenMasking, WordMasking, labeled_places, masked_loss
from minivlp.objectives.matching import matching_loss, random_negatives


@dataclass(frozen=True)
class ViLTConfig:
    """Sizes, and which losses are on.

    image: the one transformer, a ViT with its patch projection. text: how tokens are embedded; it has no layers of its
    own (`layers` is 0). losses: any of itm, mlm, wpa, mpp. patch_rate: of patches that mpp predicts.
    """

    image: ImageConfig
    text: TextConfig
    losses: tuple[str, ...] = ("itm", "mlm", "wpa")
    masking: TokenMasking = WordMasking()
    patch_rate: float = 0.15

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> ViLTConfig:
        """1.2 M parameters, minutes on a laptop. The first blocks can start from a trained tower (`init_from`)."""
        words = TextConfig(vocabulary, 56, 0, BlockConfig.nano(), embed_norm=True, word_std=0.5, position_std=0.2)
        return cls(ImageConfig.nano(layers=4), words)

    @classmethod
    def small(cls, vocabulary: int = 30522) -> ViLTConfig:
        """About 45 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        words = TextConfig(vocabulary, 64, 0, BlockConfig.small(), embed_norm=True, word_std=0.5, position_std=0.2)
        return cls(ImageConfig.small(layers=12), words)

    @classmethod
    def paper(cls) -> ViLTConfig:
        """ViLT-B/32: a ViT-B/32 of 87.5 M parameters, 111.6 M with words and pooler, 135.7 M with the heads."""
        block = BlockConfig(768, 12, 3072, norm_eps=1e-6)
        return cls(
            image=ImageConfig(384, 32, 12, block),
            text=TextConfig(30522, 40, 0, block, embed_norm=True, position_std=0.02),
            masking=WordMasking(mask_id=103, never_mask=(0, 100, 101, 102, 103)),
        )


class MaskedPatches(NamedTuple):
    """Which patches are predicted, and which of these are replaced by the mask token, (B, P) bool each."""

    predicted: Tensor
    replaced: Tensor


class ViLTEncoded(Encoded):
    """Parts that ITM, WPA and MLM share. `paired` takes the place of `draw_images`."""

    def __init__(self, model: ViLT, batch, paired: Tensor | None = None, patches: MaskedPatches | None = None, **given):
        super().__init__(model, batch, **given)
        self.given_paired, self.given_patches = paired, patches

    @cached_property
    def image(self) -> JointImage:
        """The embedded images."""
        return self.model.joint.embed_images(self.batch.images)

    @cached_property
    def paired(self) -> Tensor:
        """(B,) the image row that each caption is shown with, of all processes."""
        if self.given_paired is not None:
            return self.given_paired
        return self.model.draw_images(self.excluded, self.processes.generator)

    @cached_property
    def shown(self) -> tuple[Tensor, Tensor]:
        """The captions that are shown with an image of ours: their rows (n,) among those of all processes, and the
        rows (n,) of their images among ours. A pair is computed where its image is."""
        here = self.processes.ours(self.paired, self.rows)
        return here, self.paired[here] - self.rows.start

    @cached_property
    def pairs(self) -> tuple[Text, Tensor, Tensor]:
        """Texts (T, L), the image row of each, and whether they match: captions (n), then our negative captions."""
        batch, (captions, image_rows) = self.batch, self.shown
        text, matched = self.all_captions[captions], self.paired[captions] == captions
        if batch.negatives is None or "itm" not in self.model.config.losses:
            return text, image_rows, matched
        own = torch.arange(len(batch), device=image_rows.device)
        text = Text.cat([text, batch.negatives])
        return text, torch.cat([image_rows, own]), F.pad(matched, (0, len(own)))

    @cached_property
    def masked_patches(self) -> MaskedPatches:
        """Ours; the choice is made for the images of all processes."""
        if self.given_patches is not None:
            return self.given_patches
        (real,) = self.processes.gather(self.image.mask[:, 1:])
        drawn = self.model.mask_patches(real, self.processes.generator)
        return MaskedPatches(*(patches[self.rows] for patches in drawn))

    @cached_property
    def caption_tokens(self) -> Tensor:
        """All tokens (n, N, D) of the captions that are shown with our images; only WPA reads them all."""
        captions, image_rows = self.shown
        return self.model.joint(self.image.gather(image_rows), self.all_captions[captions])

    @cached_property
    def first(self) -> Tensor:
        """The first token (T, 1, D) of each pair."""
        (text, image_rows, _), done = self.pairs, []
        if "wpa" in self.model.config.losses:  # then the captions' first tokens are there already
            done, count = [self.caption_tokens[:, FIRST]], len(self.caption_tokens)
            text, image_rows = text[count:], image_rows[count:]
        if len(text) or not done:
            done.append(
                in_length_buckets(
                    text, lambda rows, some: self.model.joint(self.image.gather(image_rows[rows]), some, FIRST)
                )
            )
        return torch.cat(done)


class ViLT(PretrainingModel):
    """Pre-training: do image and text match (ITM), which words are masked (MLM), where do the words go (WPA)?"""

    Config = ViLTConfig
    encoding = ViLTEncoded

    def __init__(self, config: ViLTConfig) -> None:
        super().__init__(config)
        self.joint = ViLTStream(config.image, config.text)
        width = config.image.block.width
        self.match_head = MatchingHead(nn.Linear(width, 2), Pooler(width))
        self.mlm_head = MaskedLMHead(width, config.text.vocabulary, BERT_EPS)
        if "mpp" in config.losses:
            self.mask_token = nn.Parameter(torch.zeros(width))
            self.patch_head = MaskedLMHead(width, 3 * 256, BERT_EPS)  # 256 values for each of three colors

    def cross_encode(
        self, images: Tensor, text: Text, rows: Rows | None = None, pixel_mask: Tensor | None = None
    ) -> Tensor:
        """Text and image tokens (B, N, D) of equal rows, text first; only the `rows` asked for."""
        return self.joint(self.joint.embed_images(images, pixel_mask), text, rows)

    def match(self, images: Tensor, text: Text, pixel_mask: Tensor | None = None) -> Tensor:
        """(B,) probability that image and text of equal rows match."""
        return self.match_head(self.cross_encode(images, text, FIRST, pixel_mask)).softmax(dim=-1)[:, 1]

    def mlm_logits(self, images: Tensor, text: Text, pixel_mask: Tensor | None = None) -> Tensor:
        """(B, L, V) logits of the token at every place; put [MASK] where you want a prediction."""
        return self.mlm_head(self.cross_encode(images, text, slice(0, text.length), pixel_mask))

    def transport(self, images: Tensor, text: Text) -> Tensor:
        """(B, L, P) WPA's transport plan: how much of each word goes to each patch.

        A row of a word sums to 1 / number of words, rows of [CLS], [SEP] and padding to 0.
        """
        image = self.joint.embed_images(images)
        return self.alignment(self.joint(image, text), text.mask, image.mask).plan

    def alignment(
        self, fused: Tensor, text_mask: Tensor, image_mask: Tensor, matched: Tensor | None = None
    ) -> Alignment:
        """WPA of pairs (B, N, D): text_mask (B, L), image_mask (B, 1+P), matched (B,) bool, all of them if None.

        Words without [CLS] and [SEP] go to patches without the class token.
        """
        words, patches = to_float32(fused).split([text_mask.shape[1], image_mask.shape[1]], dim=1)
        matched = torch.ones_like(text_mask[:, 0]) if matched is None else matched
        return word_patch_alignment(words, patches[:, 1:], inner_words(text_mask), image_mask[:, 1:], matched)

    def itm(self, encoded: ViLTEncoded) -> Tensor:
        """Image-text matching. Negative captions of the batch are further negatives, each with its own image."""
        logits, matched = self.match_head(encoded.first), encoded.pairs[2]
        return encoded.share(matching_loss(logits[matched], logits[~matched]), len(logits))

    def wpa(self, encoded: ViLTEncoded) -> Tensor:
        """Word-patch alignment, of the captions alone: most words of a negative caption do have their patch."""
        captions, image_rows = encoded.shown
        matched, image_mask = encoded.paired[captions] == captions, encoded.image.mask[image_rows]
        text_mask = encoded.all_captions.mask[captions]
        loss = self.alignment(encoded.caption_tokens, text_mask, image_mask, matched).loss
        return encoded.share(loss, len(captions))

    def mlm(self, encoded: ViLTEncoded) -> Tensor:
        """Masked language modeling with the matching image; the last block computes the masked places alone."""
        masked = encoded.masked

        def fused(rows: Tensor | slice, text: Text) -> Tensor:
            places, _ = labeled_places(masked.labels[rows, : text.length])
            return self.joint(encoded.image.gather(rows), text, places)

        _, labels = labeled_places(masked.labels)  # (B, M)
        tokens, asked = in_length_buckets(masked.text, fused), labels != IGNORE
        labels = labels[asked]
        return encoded.share(masked_loss(self.mlm_head(tokens[asked]), labels), len(labels))

    def mpp(self, encoded: ViLTEncoded) -> Tensor:
        """Masked patch prediction (the paper's ablation): the mean red, green and blue of masked patches."""
        logits, labels = self.predict_patches(encoded.batch.images, encoded.batch.text, encoded.masked_patches)
        return encoded.share(masked_loss(logits, labels), labels.numel())

    def draw_images(self, positives: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B,) the image row of each text: its own for half the rows, a drawn negative for the others.

        A row that has no negative in the batch keeps its own. positives: (B, B) bool.
        """
        others = random_negatives(positives, generator).image
        own = torch.arange(len(others), device=others.device)
        swap = torch.randperm(len(others), generator=generator, device=others.device) >= len(others) // 2
        return torch.where(swap & (others >= 0), others, own)

    def mask_patches(self, real: Tensor, generator: torch.Generator | None = None) -> MaskedPatches:
        """Choose some of the patches `real` (B, P) to predict, and replace four fifths of these."""
        chosen, replaced = (torch.rand(real.shape, generator=generator, device=real.device) for _ in range(2))
        predicted = real & (chosen < self.config.patch_rate)
        return MaskedPatches(predicted, predicted & (replaced < 0.8))

    def predict_patches(
        self, images: Tensor, text: Text, masked: MaskedPatches, pixel_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (M, 3, 256) and labels (M, 3) of the predicted patches that are not padding.

        Patches are replaced before they get positions.
        """
        patches = self.joint.image_embed.cut(images)  # (B, D, rows, columns)
        replaced = masked.replaced.unflatten(1, patches.shape[2:])[:, None]  # (B, 1, rows, columns)
        image = self.joint.typed(torch.where(replaced, self.mask_token[:, None, None], patches), pixel_mask)
        predicted = masked.predicted & image.mask[:, 1:]
        fused = self.joint(image, text, slice(text.length + 1, None))  # (B, P, D)
        colors = F.avg_pool2d(images / 2 + 0.5, self.config.image.patch_size)  # (B, 3, rows, columns), in 0..1
        labels = (255 * colors).long().flatten(2).transpose(1, 2)  # (B, P, 3)
        return self.patch_head(fused[predicted]).unflatten(-1, (3, 256)), labels[predicted]

    def init_from(self, start: nn.Module) -> None:
        """Start from trained towers (see `ViLTStream.init_from`), or from a `GroundedStream`, with its head of masked
        words. Raises ValueError when sizes differ."""
        if hasattr(start, "joint"):
            copy_parts({"joint": start.joint, "mlm_head": start.mlm_head}, self)
        else:
            self.joint.init_from(start)
