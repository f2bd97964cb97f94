"""Layers and towers whose names several releases share, with our names, and how to derive sizes from the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minivlp.layers import timm_weights
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.transformer import BlockConfig
from minivlp.pretrained.keys import Size, first, flat, plus_first, rest, stack, with_prefix
from minivlp.pretrained.settings import Section
from minivlp.weight_files import CheckpointError

HEAD_WIDTH = 64  # of every released model here; the shapes of the tensors do not tell it

VIT_EMBED = (  # timm's vision transformer: the image tower of ViLT, ALBEF, BLIP and X-VLM
    ("patch_embed.proj", "patches.project"),
    (flat("cls_token"), "class_token"),
    (first("pos_embed"), "class_position"),
    (rest("pos_embed"), "positions"),
)
VIT_LAYER = tuple((theirs, ours) for ours, theirs in timm_weights.VIT_LAYER.items())
VIT = (
    *with_prefix("", "embed.", VIT_EMBED),
    *with_prefix("blocks.{n}.", "blocks.{n}.", VIT_LAYER),
    ("norm", "norm"),
)
CLIP_LAYER = (  # transformers' CLIP
    ("layer_norm1", "self_norm"),
    (stack("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attention.qkv"),
    ("self_attn.out_proj", "self_attention.out"),
    ("layer_norm2", "feed_norm"),
    ("mlp.fc1", "feed_forward.up"),
    ("mlp.fc2", "feed_forward.down"),
)
BERT_LAYER = (
    (stack("attention.self.query", "attention.self.key", "attention.self.value"), "self_attention.qkv"),
    ("attention.output.dense", "self_attention.out"),
    ("attention.output.LayerNorm", "self_norm"),
    ("crossattention.self.query", "cross_attention.q"),
    (stack("crossattention.self.key", "crossattention.self.value"), "cross_attention.kv"),
    ("crossattention.output.dense", "cross_attention.out"),
    ("crossattention.output.LayerNorm", "cross_norm"),
    ("intermediate.dense", "feed_forward.up"),
    ("output.dense", "feed_forward.down"),
    ("output.LayerNorm", "feed_norm"),
)
BERT_EMBED = (
    ("word_embeddings", "token"),
    (plus_first("position_embeddings.weight", "token_type_embeddings.weight"), "position"),
    ("LayerNorm", "norm"),
)
MLM_HEAD = (  # BERT's head of masked tokens, or of next tokens
    ("transform.dense", "dense"),
    ("transform.LayerNorm", "norm"),
    ("decoder", "decoder"),
    ("bias", "decoder.bias"),  # some files have it under this name, some under both
)
ALIGNED = (  # ALBEF, BLIP and X-VLM
    ("vision_proj", "itc_head.project_image"),
    ("text_proj", "itc_head.project_text"),
    ("temp", "itc_head.scale.temperature"),
    ("itm_head", "match_head.classifier"),
)
# the momentum model and the queue: needed only to resume the very same run
MOMENTUM = ("*_m.*", "*_queue", "queue_ptr", "ptr_queue")
FUSED_BERT = (  # ALBEF and X-VLM: one BERT whose upper layers fuse; fine-tuned checkpoints lack the "bert."
    *with_prefix("text_encoder.bert.embeddings.", "text.embed.", BERT_EMBED),
    *with_prefix("text_encoder.bert.encoder.layer.{n}.", "text.blocks.{n}.", BERT_LAYER),
    *with_prefix("text_encoder.bert.encoder.layer.{n+text}.", "fusion.blocks.{n}.", BERT_LAYER),
    *with_prefix("text_encoder.cls.predictions.", "mlm_head.", MLM_HEAD),
    *with_prefix("text_encoder.embeddings.", "text.embed.", BERT_EMBED),
    *with_prefix("text_encoder.encoder.layer.{n}.", "text.blocks.{n}.", BERT_LAYER),
    *with_prefix("text_encoder.encoder.layer.{n+text}.", "fusion.blocks.{n}.", BERT_LAYER),
)
CLIP_MEAN_STD = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}


def crop(size: Size) -> dict[str, Any]:
    """The short side is resized to that of the model's square, and the middle of the long one is kept.

    For images that are not square, pictures are squashed: transformers' processor cannot fill a rectangle and crop.
    """
    height, width = size
    if height != width:
        return {"size": {"height": height, "width": width}, "do_center_crop": False}
    return {"size": {"shortest_edge": height}, "crop_size": {"height": height, "width": width}}


def squash(size: Size) -> dict[str, Any]:
    """The whole picture is resized to the model's height and width."""
    return {"size": {"height": size[0], "width": size[1]}, **CLIP_MEAN_STD}


def transformers_block(section: Section) -> BlockConfig:
    """The blocks that a section of transformers' config.json describes."""
    width, heads = section.integer("hidden_size"), section.integer("num_attention_heads")
    if width % heads:
        raise section.wrong("hidden_size", f"a multiple of its {heads} attention heads")
    hidden, eps = section.integer("intermediate_size"), section.number("layer_norm_eps")
    return BlockConfig(width, heads, hidden, section.activation("hidden_act"), eps)


def heads(width: int) -> int:
    """Attention heads of a layer of this width."""
    return max(1, width // HEAD_WIDTH)


def count(tensors: Mapping[str, Tensor], before: str) -> int:
    """How many layers there are: `before` stands in front of their numbers."""
    numbers = {name.removeprefix(before).split(".")[0] for name in tensors if name.startswith(before)}
    return len({number for number in numbers if number.isdigit()})


def square_side(patches: int) -> int:
    """Rows of a square grid of so many patches. Raises CheckpointError where it cannot be square."""
    side = math.isqrt(patches)
    if side**2 != patches:
        raise CheckpointError(
            f"{patches} patch positions are no square, and the tensors do not tell the grid: give `config=` with "
            "`image.image_size=(height, width)`"
        )
    return side


def vit_config(tensors: Mapping[str, Tensor], before: str) -> ImageConfig:
    """Sizes of a timm vision transformer, for square images. Raises CheckpointError where they cannot be square."""
    width, _, _, patch = tensors[f"{before}patch_embed.proj.weight"].shape
    side = square_side(tensors[f"{before}pos_embed"].shape[1] - 1)
    hidden = len(tensors[f"{before}blocks.0.mlp.fc1.weight"])
    block = BlockConfig(width, heads(width), hidden, norm_eps=1e-6)
    return ImageConfig(side * patch, patch, count(tensors, f"{before}blocks."), block)


def bert_config(tensors: Mapping[str, Tensor], before: str, layers: int) -> TextConfig:
    """Sizes of a BERT of which `layers` layers read text alone."""
    vocabulary, width = tensors[f"{before}embeddings.word_embeddings.weight"].shape
    hidden = len(tensors[f"{before}encoder.layer.0.intermediate.dense.weight"])
    block = BlockConfig(width, heads(width), hidden, norm_eps=1e-12, norm_first=False)
    length = len(tensors[f"{before}embeddings.position_embeddings.weight"])
    return TextConfig(vocabulary, length, layers, block, embed_norm=True, position_std=0.02)


def fused_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """`text`, `fusion_layers` and `embed_width` of a model with `FUSED_BERT`."""
    bert = "text_encoder.bert." if "text_encoder.bert.embeddings.LayerNorm.bias" in tensors else "text_encoder."
    layers = count(tensors, f"{bert}encoder.layer.")
    fusing = [n for n in range(layers) if f"{bert}encoder.layer.{n}.crossattention.self.query.weight" in tensors]
    text = bert_config(tensors, bert, layers - len(fusing))
    return {"text": text, "fusion_layers": len(fusing), "embed_width": len(tensors["text_proj.weight"])}
