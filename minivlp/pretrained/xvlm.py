"""X-VLM's releases: the authors' .pth with each of its image towers, as pre-trained or fine-tuned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minivlp.layers.embeddings import ImageConfig
from minivlp.layers.swin import SwinConfig
from minivlp.layers.transformer import BlockConfig
from minivlp.models.xvlm import XVLMConfig
from minivlp.pretrained.keys import Release, Size, first, rest, with_prefix
from minivlp.pretrained.parts import (
    ALIGNED,
    CLIP_LAYER,
    FUSED_BERT,
    VIT,
    count,
    fused_sizes,
    heads,
    square_side,
    squash,
    vit_config,
)
from minivlp.weight_files import CheckpointError

REGION_BLOCKS = 4  # the released code's choice for its towers with a class token
SWIN = (  # timm begins a stage with the merging of patches, the authors end one with it
    ("patch_embed", "swin.patch_embed"),
    ("layers.{n}.blocks", "swin.layers.{n}.blocks"),
    ("layers.{n-1}.downsample", "swin.layers.{n}.downsample"),
    ("norm", "swin.norm"),
)
CLIP_VIT = (
    ("patch_embed", "embed.patches.project"),
    ("class_embedding", "embed.class_token"),
    (first("pos_embed.weight"), "embed.class_position"),
    (rest("pos_embed.weight"), "embed.positions"),
    ("pre_layrnorm", "embed.ln_pre"),
    *with_prefix("encoder.layers.{n}.", "blocks.{n}.", CLIP_LAYER),
    ("post_layernorm", "norm"),
)
TEXT_AND_HEADS = (
    *FUSED_BERT,
    *ALIGNED,
    ("bbox_head", "box_head.mlp"),
)


def swin_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> XVLMConfig:
    """Sizes from the tensors. Raises CheckpointError where they do not tell the image's height and width."""
    before, stages = "vision_encoder.layers.", count(tensors, "vision_encoder.layers.")
    width, _, _, patch = tensors["vision_encoder.patch_embed.proj.weight"].shape
    tables = [tensors[f"{before}{n}.blocks.0.attn.relative_position_bias_table"] for n in range(stages)]
    window = (math.isqrt(len(tables[0])) + 1) // 2
    depths = tuple(count(tensors, f"{before}{n}.blocks.") for n in range(stages))
    last, patch_size = width * 2 ** (stages - 1), patch * 2 ** (stages - 1)
    head_counts = tuple(table.shape[1] for table in tables)
    rows, columns = windows_of(tensors.get(f"{before}0.blocks.1.attn_mask"), window)
    height, width = rows * window * patch, columns * window * patch
    image = SwinConfig(
        image_size=height if height == width else (height, width),
        patch_size=patch_size,
        layers=sum(depths),
        block=BlockConfig(last, head_counts[-1], 4 * last),
        first_patch=patch,
        depths=depths,
        heads=head_counts,
        window=window,
    )
    return replace(XVLMConfig.paper(), image=image, **fused_sizes(tensors))


def windows_of(mask: Tensor | None, window: int) -> Size:
    """Rows and columns of windows in the first stage of a Swin transformer, from the mask of its first shifted block.

    mask: (windows, window^2, window^2), not 0 where two patches of a window are kept apart, because the shift brought
    one of them from the opposite edge of the image. So it shows which windows are in the last row or column.
    Raises CheckpointError without a mask, or with one of another form.
    """
    for rows in range(1, 1 + (0 if mask is None else len(mask))):
        if len(mask) % rows == 0 and torch.equal(mask != 0, kept_apart(rows, len(mask) // rows, window)):
            return rows, len(mask) // rows
    raise CheckpointError(
        "the checkpoint does not tell the height and width of the images of its Swin transformer (it needs the mask of "
        "the first shifted block, layers.0.blocks.1.attn_mask): give `config=`, such as "
        "XVLMConfig.paper() with another `image.image_size`"
    )


def kept_apart(rows: int, columns: int, window: int) -> Tensor:
    """(rows * columns, window^2, window^2) bool: which patches of a window a shifted Swin block keeps apart."""
    wrapped = torch.arange(window) >= window - window // 2  # (window,) patches that came from the opposite edge
    down = (torch.arange(rows) == rows - 1)[:, None] & wrapped  # (rows, window)
    right = (torch.arange(columns) == columns - 1)[:, None] & wrapped  # (columns, window)
    part = 2 * down[:, None, :, None] + right[None, :, None, :].int()  # (rows, columns, window, window)
    part = part.flatten(2).flatten(0, 1)
    return part[:, :, None] != part[:, None, :]


def vit_tower_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> XVLMConfig:
    """Sizes from the shapes of the tensors."""
    image = vit_config(tensors, "vision_encoder.")
    return replace(XVLMConfig.paper(), image=image, **fused_sizes(tensors), region_blocks=REGION_BLOCKS)


def clip_tower_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> XVLMConfig:
    """Sizes from the shapes of the tensors."""
    before = "vision_encoder."
    width, _, _, patch = tensors[f"{before}patch_embed.weight"].shape
    side = square_side(len(tensors[f"{before}pos_embed.weight"]) - 1)
    hidden = len(tensors[f"{before}encoder.layers.0.mlp.fc1.weight"])
    block = BlockConfig(width, heads(width), hidden, "quick_gelu")
    layers = count(tensors, f"{before}encoder.layers.")
    image = ImageConfig(side * patch, patch, layers, block, ln_pre=True, patch_bias=False)
    return replace(XVLMConfig.paper(), image=image, **fused_sizes(tensors), region_blocks=REGION_BLOCKS)


FROM_AUTHORS = Release(
    key_prefix="vision_encoder.layers.",
    table=(*with_prefix("vision_encoder.", "image.", SWIN), *TEXT_AND_HEADS),
    ignored=("*.position_ids", "*.relative_position_index", "*.attn_mask"),  # they follow from the sizes
    optional=("mlm_head.", "match_head.", "box_head."),
    config=swin_config,
    processor="BlipImageProcessor",
    processor_settings=squash,
    tokenizer="bert-base-uncased",
)
RELEASES = (
    FROM_AUTHORS,
    replace(
        FROM_AUTHORS,
        key_prefix="vision_encoder.blocks.",
        table=(*with_prefix("vision_encoder.", "image.", VIT), *TEXT_AND_HEADS),
        config=vit_tower_config,
    ),
    replace(
        FROM_AUTHORS,
        key_prefix="vision_encoder.encoder.",
        table=(*with_prefix("vision_encoder.", "image.", CLIP_VIT), *TEXT_AND_HEADS),
        config=clip_tower_config,
    ),
)
