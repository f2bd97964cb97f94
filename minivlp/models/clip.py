"""CLIP: two towers that meet in one space (Radford et al. 2021, "Learning Transferable Visual Models From Natural
Language Supervision").

    image ──► image tower ──► class token ──► project ──► unit vector ─┐
                                                                      ├─► cosine x scale ──► B x B table: who belongs
    text  ──► text tower ───► last token ───► project ──► unit vector ─┘    to whom? (cross-entropy, rows and columns)

What was new is less the objective (ConVIRT's, Zhang et al. 2020, made simpler) than what it led to at the size of
the web: no labels, only pairs that were found, and a classifier for any classes by writing their names ("zero-shot").

What it cannot do follows from the picture: image and text meet only once, as two vectors.
No word ever looks at a patch.

Code and paper: the text tower is causal and its feature is read at the end-of-text token; the scale is learned as a
logarithm that starts at ln(1/.07) and is clamped to ln 100 after each step; biases and the scale are not decayed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Batch
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig, TextEncoder
from minivlp.layers.timm_tower import image_tower
from minivlp.objectives.contrastive import contrastive_loss, same_group


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers and of the space they meet in (`embed_width`, E).

    learn_temperature: the paper learns it; False keeps the initial value. diagonal_only: the paper's targets; ours are
    shared among all rows that belong together. With `Loader`'s batches, where such rows share their caption, both give
    the same loss (`contrastive_loss` says why, and when not).
    """

    image: ImageConfig
    text: TextConfig
    embed_width: int
    temperature: float = 0.07
    learn_temperature: bool = True
    diagonal_only: bool = False

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> CLIPConfig:
        """1.2 M parameters, minutes on a laptop. The fields named here differ from the paper; lesson 01 says why."""
        image_block = BlockConfig(width=128, heads=4, hidden=512, activation="relu")
        text_block = BlockConfig(width=128, heads=4, hidden=512, activation="relu")
        return cls(
            image=ImageConfig(64, 8, 3, image_block, two_step_patches=True, sincos_positions=True, norm_before=True),
            text=TextConfig(vocabulary, 56, 2, text_block, causal=True, word_std=0.5, position_std=0.2),
            embed_width=64,
        )

    @classmethod
    def small(cls, vocabulary: int = 30522) -> CLIPConfig:
        """About 27 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        image_block = BlockConfig(width=384, heads=6, hidden=1536)
        text_block = BlockConfig(width=256, heads=4, hidden=1024)
        return cls(
            image=ImageConfig(128, 8, 8, image_block, two_step_patches=True, sincos_positions=True, norm_before=True),
            text=TextConfig(vocabulary, 64, 6, text_block, causal=True, word_std=0.5, position_std=0.2),
            embed_width=256,
        )

    @classmethod
    def paper(cls) -> CLIPConfig:
        """ViT-B/32 as released: 151,277,313 parameters."""
        return cls(
            image=ImageConfig(
                224, 32, 12, BlockConfig(768, 12, 3072, activation="quick_gelu"), norm_before=True, patch_bias=False
            ),
            text=TextConfig(49408, 77, 12, BlockConfig(512, 8, 2048, activation="quick_gelu"), causal=True),
            embed_width=512,
        )


class CLIP(nn.Module):
    """A dual encoder: each picture and each text is encoded once, then any pair costs one dot product."""

    Config = CLIPConfig
    lesson = "01"

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image = image_tower(config.image)
        self.text = TextEncoder(config.text)
        self.project_image = nn.Linear(config.image.block.width, config.embed_width, bias=False)
        self.project_text = nn.Linear(config.text.block.width, config.embed_width, bias=False)
        for projection in (self.project_image, self.project_text):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        # learned as a logarithm, so that the scale stays positive whatever the optimiser does
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)), config.learn_temperature)

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, 1+P, D), class token first."""
        return self.image(images)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> tokens (B, L, D)."""
        return self.text(ids, mask)

    def embed_images(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> unit vectors (B, E), from the class token."""
        return F.normalize(self.project_image(self.encode_image(images)[:, 0]), dim=-1)

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> unit vectors (B, E), from the last real token: the only one that has read the whole text.

        The mask finds it, not its id: some tokenizers pad with the end-of-text token itself.
        """
        tokens = self.encode_text(ids, mask)
        last = mask.long().sum(dim=1) - 1  # (B,)
        return F.normalize(self.project_text(tokens[torch.arange(len(tokens), device=tokens.device), last]), dim=-1)

    def similarity(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scaled cosines of every image with every text, (B_img, B_txt)."""
        return self.log_scale.exp() * self.embed_images(images) @ self.embed_texts(ids, mask).T

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The contrastive loss of the batch's image-caption pairs."""
        positive = None if self.config.diagonal_only else same_group(batch.image_ids, batch.ids, batch.mask)
        images, texts = self.embed_images(batch.images), self.embed_texts(batch.ids, batch.mask)
        return {"contrastive": contrastive_loss(images, texts, self.log_scale.exp(), positive)}

    def after_step(self) -> None:
        """Keep the scale at 100 at most; the paper found it necessary for stability (section 2.5)."""
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(100))
