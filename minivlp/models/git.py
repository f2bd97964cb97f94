"""GIT: one decoder that reads the image as the beginning of the text (Wang et al., TMLR 2022, "GIT: A Generative
Image-to-text Transformer for Vision and Language").

    image ──► image tower ──► project, LayerNorm ──► image tokens ─┐
                                                                   ├─► decoder, self-attention alone ──► LM: what is
    text  ──► words + positions, LayerNorm ────────► text tokens ──┘                                the next token?

    a query of  attends to image  attends to text
    image       all               nothing
    text        all               itself and what stands before it

What was new is how little there is: an image tower, a decoder, one loss. There is no cross-attention, no matching head,
no object detector and no list of answers. A task is a text that begins with its question: captions, answers, names of
classes, words in the image. A video is the tokens of its frames, one after the other.

The mask is that of a prefix language model: image tokens attend to each other, text tokens to the image and to the text
up to themselves. The image never attends to the text, so its keys and values are computed once, for all texts and for
all steps of generation.

Code and paper: the image tower is CLIP's, all of its tokens after the last LayerNorm. The decoder has BERT's layers,
with a LayerNorm behind each residual, and begins at random. Its output layer is the token embedding, with a bias.
Labels are smoothed by .1 (`smoothed_kl`). Texts begin with [CLS] and end with [SEP]. A given beginning, such as a
question, is not predicted. Each frame of a video gets a learned vector, added before the projection; a single image
gets none. The paper trains the decoder with five times the tower's learning rate. The released code suppresses repeated
tokens when it generates; ours does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.data.text import SpecialTokens
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.heads import NextTokenHead
from minivlp.layers.prefix import PrefixDecoder
from minivlp.layers.timm_tower import image_tower
from minivlp.layers.transformer import BlockConfig
from minivlp.layers.weights import copy_parts
from minivlp.models.pretraining import Encoded, PretrainingModel
from minivlp.models.verbs import CaptioningVerbs
from minivlp.objectives.captioning import smoothed_kl


@dataclass(frozen=True)
class GITConfig:
    """Sizes of the image tower and of the decoder (`text`).

    frames: most frames of a video, each with a learned vector; with 0 a video may have any number of frames, and
    nothing tells their order. embed_eps: epsilon of the LayerNorm behind the text embedding; transformers' models have
    that of their layers, 1e-12. tie_words: the output layer is the token embedding. smoothing: see `smoothed_kl`.
    prefix_length: how many tokens at the start of each text are given, not predicted, where a batch does not say it.
    """

    needed_tokens: ClassVar[tuple[str, ...]] = ("pad", "cls", "sep")

    image: ImageConfig
    text: TextConfig
    frames: int = 0
    embed_eps: float = 1e-8
    tie_words: bool = True
    losses: tuple[str, ...] = ("lm",)
    smoothing: float = 0.1
    prefix_length: int = 1
    tokens: SpecialTokens = SpecialTokens()

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> GITConfig:
        """1.2 M parameters, minutes on a laptop. The image tower is that of X-VLM's nano."""
        block = replace(BlockConfig.nano(), norm_first=False)
        return cls(ImageConfig.nano(), decoder_config(vocabulary, 56, 2, block))

    @classmethod
    def small(cls, vocabulary: int = 30522) -> GITConfig:
        """About 33 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        block = replace(BlockConfig.small(), norm_first=False)
        return cls(ImageConfig.small(ln_pre=True), decoder_config(vocabulary, 64, 4, block))

    @classmethod
    def paper(cls) -> GITConfig:
        """The paper's base model, as released: CLIP's ViT-B/16 at 224 pixels and six layers of BERT's size."""
        tower = BlockConfig(768, 12, 3072, activation="quick_gelu")
        return cls(
            ImageConfig(224, 16, 12, tower, ln_pre=True, patch_bias=False),
            decoder_config(30522, 1024, 6, BlockConfig(768, 12, 3072, norm_eps=1e-12, norm_first=False)),
            tokens=SpecialTokens(pad=0, cls=101, sep=102, mask=103, unk=100, dec=None, enc=None),
        )


def decoder_config(vocabulary: int, context_length: int, layers: int, block: BlockConfig) -> TextConfig:
    """A decoder as the paper has it: a LayerNorm behind the embedding, whose size then does not matter."""
    return TextConfig(vocabulary, context_length, layers, block, causal=True, embed_norm=True, position_std=0.02)


class GIT(CaptioningVerbs, PretrainingModel):
    """Continues an image by a text. Images are (B, 3, H, W), or videos of F frames, (B, F, 3, H, W)."""

    Config = GITConfig

    def __init__(self, config: GITConfig) -> None:
        super().__init__(config)
        tower, width = config.image.block, config.text.block.width
        self.image = image_tower(config.image)
        self.frames = nn.ParameterList(torch.zeros(tower.width) for _ in range(config.frames))  # F of (D,)
        project = nn.Sequential(nn.Linear(tower.width, width), nn.LayerNorm(width, eps=tower.norm_eps))
        self.decoder = PrefixDecoder(config.text, project, config.embed_eps)
        tied = self.decoder.embed.token if config.tie_words else None
        self.caption_head = NextTokenHead(width, config.text.vocabulary, tied)

    @property
    def start_token(self) -> int:
        return self.config.tokens.cls

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, 1+P, D); videos (B, F, 3, H, W) -> (B, F (1+P), D), frame by frame.

        Raises ValueError for a video with more frames than the model has vectors for.
        """
        if images.dim() == 4:
            return self.image(images)
        count, known = images.shape[1], len(self.frames)
        if known and count > known:
            raise ValueError(f"videos of {count} frames, but the model knows the order of {known}: give fewer frames")
        tokens = self.image(images.flatten(0, 1)).unflatten(0, images.shape[:2])  # (B, F, 1+P, D)
        if known:
            tokens = tokens + torch.stack([*self.frames][:count])[:, None]  # (F, 1, D)
        return tokens.flatten(1, 2)

    def cross_encode(self, images: Tensor, text: Text) -> Tensor:
        """(B, 1+P+L, D): image tokens, then text tokens, in one pass, as in the figure above.

        Losses and generation compute the image's part once and keep it; the text tokens are the same.
        """
        return self.decoder.joint(self.encode_image(images), text.with_first(self.start_token))

    def lm(self, encoded: Encoded) -> Tensor:
        """Language modeling: each text's next token, from the image and the tokens before it."""
        image = self.decoder.keys_values(encoded.image_tokens)
        logits, labels = self.predict_next(encoded.batch, image)
        return encoded.share(smoothed_kl(logits, labels, self.config.smoothing), len(labels))

    def init_from(self, towers: nn.Module) -> None:
        """Begin with a trained image tower, `towers.image`; the decoder begins at random, as in the paper.

        Raises ValueError when sizes differ.
        """
        copy_parts({"image": towers.image}, self)
