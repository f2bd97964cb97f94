"""Words and patches in one stack of blocks, text first: what ViLT and VLMo share, and ViLT's own form of it.

Axes: B batch, L text tokens, P patches, N = L + 1 + P, M tokens that are read, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.layers.attention import Rows, attention_mask
from minivlp.layers.embeddings import ImageConfig, ImageEmbedding, TextConfig, TextEmbedding, resize_positions
from minivlp.layers.transformer import Block, Transformer
from minivlp.layers.weights import copy_parts

BERT_EPS = 1e-12  # of the LayerNorm behind the word embedding, which comes from BERT


class SingleStream(Transformer):
    """One transformer for the tokens of both modalities.

    token_type: a learned vector per modality, added to its embedded tokens; text first, then as many kinds of image as
    one text can be about (NLVR2 has two).
    """

    def __init__(self, image: ImageConfig, text: TextConfig, blocks: Iterable[nn.Module], images: int = 1) -> None:
        super().__init__(image.block, blocks)
        self.text_embed = TextEmbedding(text, BERT_EPS if text.embed_norm else None)
        self.image_embed = self.make_image_embedding(image)
        self.token_type = nn.Parameter(0.02 * torch.randn(1 + images, image.block.width))  # (1 + images, D)

    def make_image_embedding(self, config: ImageConfig) -> ImageEmbedding:
        """How pixels become tokens; ViLT has its own way to resize positions."""
        return ImageEmbedding(config)

    def embed_text(self, text: Text) -> Tensor:
        """What the first block gets of a text (B, L): (B, L, D)."""
        return self.text_embed(text.ids) + self.token_type[0]

    def embed_image(self, images: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """What the first block gets of images (B, 3, H, W): (B, 1+P, D). `mask_token` as in `ImageEmbedding`."""
        return self.image_embed(images, masked, mask_token) + self.token_type[1]


def joint_real(text_mask: Tensor, image_tokens: int) -> Tensor:
    """(B, N) which tokens are real: the text's mask (B, L), then all image tokens."""
    return F.pad(text_mask, (0, image_tokens), value=True)


class JointImage(NamedTuple):
    """Image tokens as the transformer gets them."""

    tokens: Tensor  # (B, 1+P, D) class token first
    mask: Tensor  # (B, 1+P) bool, False on padding

    def gather(self, rows: Tensor | slice) -> JointImage:
        """The images of these rows, which may repeat."""
        return JointImage(self.tokens[rows], self.mask[rows])


class PaddedImageEmbedding(ImageEmbedding):
    """Images of several shapes in one padded batch; positions are resized as the released code does it."""

    def resized(self, rows: int, columns: int) -> Tensor:
        return resize_positions(self.positions, self.config.grid, (rows, columns), "bilinear", align_corners=True)

    def embed(self, patches: Tensor, pixel_mask: Tensor | None = None) -> JointImage:
        """Add positions and the class token to projected patches (B, D, rows, columns).

        pixel_mask: (B, H, W), True on the image, which lies in the upper left corner, False on the padding. Positions
        are those of each image's own grid.
        """
        count, _, rows, columns = patches.shape
        if pixel_mask is None:
            real = torch.ones(count, rows * columns, dtype=torch.bool, device=patches.device)
            positions = self.positions_on(rows, columns)  # (P, D)
        else:
            step = self.config.patch_size
            real = pixel_mask[:, ::step, ::step].bool()  # (B, rows, columns)
            grids = zip(real[:, :, 0].sum(1).tolist(), real[:, 0].sum(1).tolist(), strict=True)
            padded = [
                F.pad(self.positions_on(*grid).unflatten(0, grid), (0, 0, 0, columns - grid[1], 0, rows - grid[0]))
                for grid in grids
            ]
            positions, real = torch.stack(padded).flatten(1, 2), real.flatten(1)  # (B, P, D), (B, P)
        x = patches.flatten(2).transpose(1, 2) + positions  # (B, P, D)
        return JointImage(self.with_class_token(x), F.pad(real, (1, 0), value=True))


class ViLTStream(SingleStream):
    """ViLT's transformer, in pre-training and fine-tuned; `images`: how many of them one text can be about."""

    def __init__(self, image: ImageConfig, text: TextConfig, images: int = 1) -> None:
        if text.layers or text.block.width != image.block.width:
            width = image.block.width
            raise ValueError(f"ViLT's text has no layers of its own and the transformer's width {width}, not {text}")
        super().__init__(image, text, (Block(image.block) for _ in range(image.layers)), images)

    def make_image_embedding(self, config: ImageConfig) -> ImageEmbedding:
        return PaddedImageEmbedding(config)

    def embed_images(self, images: Tensor, pixel_mask: Tensor | None = None, kind: int = 1) -> JointImage:
        """images (B, 3, H, W) -> tokens with the token type of the `kind`-th image of a text; `pixel_mask` as above."""
        return self.typed(self.image_embed.cut(images), pixel_mask, kind)

    def typed(self, patches: Tensor, pixel_mask: Tensor | None = None, kind: int = 1) -> JointImage:
        """The same for projected patches (B, D, rows, columns)."""
        image = self.image_embed.embed(patches, pixel_mask)
        return image._replace(tokens=image.tokens + self.token_type[kind])

    def forward(self, image: JointImage, text: Text, rows: Rows | None = None) -> Tensor:
        """Text and image of equal rows together: (B, N, D), N = L + 1 + P, text first; only the `rows` asked for.

        Nothing attends to padding; outputs at padded positions are undefined.
        """
        x = torch.cat([self.embed_text(text), image.tokens], dim=1)  # (B, N, D)
        return super().forward(x, attention_mask(torch.cat([text.mask, image.mask], dim=1)), rows=rows)

    def init_from(self, towers: nn.Module) -> None:
        """Copy patch projection, class token, positions, the first blocks and the words of a model with two towers.

        The paper starts from a ViT trained on labels. `towers` has an `ImageEncoder` as `image` and a `TextEncoder` as
        `text`, such as `XVLM`. Raises ValueError when sizes differ.
        """
        image = towers.image
        parts = {"image_embed": image.embed, "text_embed": towers.text.embed}
        parts |= {f"blocks.{n}": block for n, block in enumerate(image.blocks[: len(self.blocks)])}
        if image.embed.state_dict().keys() != self.image_embed.state_dict().keys():
            raise ValueError("these towers embed images in another way than ViLT: their weights do not fit")
        copy_parts(parts, self)
