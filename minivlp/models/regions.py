"""Two published ways to turn a box into tokens (X-VLM, section 3.1): pool the patches inside, or encode them again.

Axes: B batch, R regions, P patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers.attention import KeysValues, attention_mask, gather_kv
from minivlp.layers.towers import ImageEncoder


class PooledRegions:
    """The Swin way: an image's first token is the mean of its patches, a region's the mean of those inside its box.

    All patches are kept for every region, and the fusion layers attend to those inside. No block runs twice, and keys
    and values of the patches are computed once per image.
    """

    def image_tokens(self, image: nn.Module, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, 1+P, D)."""
        patches = image(images)[:, 1:]  # (B, P, D)
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)

    def first_tokens(self, tokens: Tensor, rows: Tensor, inside: Tensor) -> Tensor:
        """The first token (R, 1, D) of regions: `rows` (R,) says of which image, `inside` (R, P) of which patches."""
        share = inside.to(tokens.dtype) / inside.sum(dim=1, keepdim=True)  # (R, P)
        return share[:, None, :] @ tokens[rows, 1:]

    def keys_values(self, model: Any, encoded: Any) -> list[KeysValues]:
        """Of each region, for each fusion layer: its own first token, and the patches of its image."""
        of_first = model.keys_values(encoded.first_tokens)
        of_images = gather_kv(encoded.full_keys_values, encoded.batch.regions.image_rows)
        return [
            tuple(torch.cat([one, of_image[:, :, 1:]], dim=2) for one, of_image in zip(*layer, strict=True))
            for layer in zip(of_first, of_images, strict=True)
        ]


@dataclass(frozen=True)
class ReencodedRegions:
    """The ViT way: the last `blocks` of the image tower run again for each region, and attend to nothing outside it.

    The first token sums up the region as the class token sums up the image; the blocks below saw the whole image, so a
    region's tokens still know their surroundings.
    """

    blocks: int

    def image_tokens(self, image: ImageEncoder, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, 1+P, D)."""
        return image(images)

    def both(self, image: ImageEncoder, images: Tensor, rows: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1+P, D) of images and (R, 1+P, D) of regions; `rows` and `inside` as in `PooledRegions`."""
        layers = len(image.blocks)
        lower, upper = range(layers - self.blocks), range(layers - self.blocks, layers)
        x = image.run(image.embed(images), lower)
        whole = image.run(x, upper)
        # the regions last: recorded attention maps are those of the last pass
        regions = image.run(x.index_select(0, rows), upper, attention_mask(with_first(inside)))
        return image.norm(whole), image.norm(regions)


def with_first(inside: Tensor) -> Tensor:
    """Patches (R, P) bool -> tokens (R, 1+P): the first token can always be attended to."""
    return F.pad(inside, (1, 0), value=True)


def same_place(image_ids: Tensor, boxes: Tensor) -> Tensor:
    """(R,) numbers, equal where image and box are: "a heart" and "a red heart" of one box are no negatives.

    image_ids (R,), boxes (R, 4).
    """
    return torch.cat([image_ids[:, None].double(), boxes.double()], dim=1).unique(dim=0, return_inverse=True)[1]
