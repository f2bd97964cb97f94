"""X-VLM's releases: the authors' .pth with each of its image towers, as pre-trained or fine-tuned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig
from minivlp.models.xvlm import SwinConfig, XVLMConfig
from minivlp.pretrained.keys import Release, first, rest, under
from minivlp.pretrained.parts import (
    ALIGNED,
    CLIP_LAYER,
    FUSED_BERT,
    VIT,
    count,
    fused_sizes,
    heads,
    squash,
    vit_config,
)

RERUN_BLOCKS = 4  # the released code's choice for its towers with a class token
SWIN = (  # timm begins a stage with the merging of patches, the authors end one with it
    ("patch_embed", "swin.patch_embed"),
    ("layers.{n}.blocks", "swin.layers.{n}.blocks"),
    ("layers.{n-1}.downsample", "swin.layers.{n}.downsample"),
    ("norm", "swin.norm"),
)
CLIP_VIT = (
    ("patch_embed", "patches.project"),
    ("class_embedding", "class_token"),
    (first("pos_embed.weight"), "class_position"),
    (rest("pos_embed.weight"), "positions"),
    ("pre_layrnorm", "norm_before"),
    *under("encoder.layers.{n}.", "blocks.{n}.", CLIP_LAYER),
    ("post_layernorm", "norm"),
)
TEXTS_AND_HEADS = (
    *FUSED_BERT,
    *ALIGNED,
    ("itm_head", "match_head"),
    ("bbox_head", "box_head"),
)


def swin_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> XVLMConfig:
    """Sizes as the tensors have them; an image of which the last stage sees one window, as the released ones."""
    before, stages = "vision_encoder.layers.", count(tensors, "vision_encoder.layers.")
    width, _, _, patch = tensors["vision_encoder.patch_embed.proj.weight"].shape
    tables = [tensors[f"{before}{n}.blocks.0.attn.relative_position_bias_table"] for n in range(stages)]
    window = (math.isqrt(len(tables[0])) + 1) // 2
    depths = tuple(count(tensors, f"{before}{n}.blocks.") for n in range(stages))
    last, places = width * 2 ** (stages - 1), patch * 2 ** (stages - 1)
    counts = tuple(table.shape[1] for table in tables)
    image = SwinConfig(
        window * places, places, sum(depths), BlockConfig(last, counts[-1], 4 * last), first_patch=patch,
        depths=depths, heads=counts, window=window,
    )  # fmt: skip
    return replace(XVLMConfig.paper(), image=image, **fused_sizes(tensors))


def vit_tower_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> XVLMConfig:
    """Sizes as the tensors have them."""
    image = vit_config(tensors, "vision_encoder.")
    return replace(XVLMConfig.paper(), image=image, **fused_sizes(tensors), rerun_blocks=RERUN_BLOCKS)


def clip_tower_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> XVLMConfig:
    """Sizes as the tensors have them."""
    before = "vision_encoder."
    width, _, _, patch = tensors[f"{before}patch_embed.weight"].shape
    side, layers = math.isqrt(len(tensors[f"{before}pos_embed.weight"]) - 1), count(tensors, f"{before}encoder.layers.")
    hidden = len(tensors[f"{before}encoder.layers.0.mlp.fc1.weight"])
    block = BlockConfig(width, heads(width), hidden, "quick_gelu")
    image = ImageConfig(side * patch, patch, layers, block, norm_before=True, patch_bias=False)
    return replace(XVLMConfig.paper(), image=image, **fused_sizes(tensors), rerun_blocks=RERUN_BLOCKS)


FROM_AUTHORS = Release(
    mark="vision_encoder.layers.",
    table=(*under("vision_encoder.", "image.", SWIN), *TEXTS_AND_HEADS),
    ignored=("*.position_ids", "*.relative_position_index", "*.attn_mask"),  # they follow from the sizes
    optional=("word_head.", "match_head.", "box_head."),
    config=swin_config,
    processor="BlipImageProcessor",
    pixels=squash,
    tokenizer="bert-base-uncased",
)
RELEASES = (
    FROM_AUTHORS,
    replace(
        FROM_AUTHORS,
        mark="vision_encoder.blocks.",
        table=(*under("vision_encoder.", "image.", VIT), *TEXTS_AND_HEADS),
        config=vit_tower_config,
    ),
    replace(
        FROM_AUTHORS,
        mark="vision_encoder.encoder.",
        table=(*under("vision_encoder.", "image.", CLIP_VIT), *TEXTS_AND_HEADS),
        config=clip_tower_config,
    ),
)
