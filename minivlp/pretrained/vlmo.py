"""VLMo's release: the authors' .pt, as pre-trained, of text alone (stage 2) or of pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minivlp.layers.block import BlockConfig
from minivlp.models.vlmo import VLMoConfig
from minivlp.pretrained.keys import From, Release, flat, plus_first, under
from minivlp.pretrained.parts import WORD_HEAD, count, squash
from minivlp.training.checkpoint import CheckpointError

LAYER = (
    ("norm1", "self_norm"),
    ("attn.qkv.weight", "self_attention.qkv.weight"),
    # keys have no bias there
    (
        From(("attn.q_bias", "attn.v_bias"), lambda q, v: torch.cat([q, torch.zeros_like(q), v])),
        "self_attention.qkv.bias",
    ),
    ("attn.proj", "self_attention.out"),
    ("gamma_1", "attention_scale"),
    ("gamma_2", "expert_scale"),
    ("norm2_text", "experts.text.norm"),
    ("mlp_text.fc1", "experts.text.feed_forward.up"),
    ("mlp_text.fc2", "experts.text.feed_forward.down"),
    ("norm2_imag", "experts.image.norm"),
    ("mlp_imag.fc1", "experts.image.feed_forward.up"),
    ("mlp_imag.fc2", "experts.image.feed_forward.down"),
    ("norm2_vl", "experts.vl.norm"),
    ("mlp_vl.fc1", "experts.vl.feed_forward.up"),
    ("mlp_vl.fc2", "experts.vl.feed_forward.down"),
)
AUTHORS = (
    # BERT's token type is the same for every word; positions are relative, so that it has no other place
    (plus_first("text_embeddings.word_embeddings.weight", "text_embeddings.token_type_embeddings.weight"),
     "words.words.weight"),
    ("text_embeddings.LayerNorm", "words.norm"),
    ("token_type_embeddings.weight", "modality"),
    (flat("transformer.cls_token"), "class_token"),
    ("transformer.patch_embed.proj", "patches.project"),
    *under("transformer.blocks.{n}.", "joint.blocks.{n}.", LAYER),
    ("transformer.norm", "joint.norm"),
    ("relative_position_bias_table", "joint.relative.table"),
    ("pooler.dense", "pooler"),
    ("itm_score.fc", "match_head"),
    *under("mlm_score.", "word_head.", WORD_HEAD),
    ("itc_image_proj.fc", "project_image"),
    ("itc_text_proj.fc", "project_text"),
    ("itc_vl_image_proj.fc", "project_image_vl"),
    ("itc_vl_text_proj.fc", "project_text_vl"),
    ("logit_scale", "log_scale"),
    ("logit_vl_scale", "log_scale_vl"),
)  # fmt: skip


def config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> VLMoConfig:
    """Sizes as the tensors have them, the rest as in the paper.

    Raises CheckpointError for another longest text than the paper's: the table of relative positions tells the image's
    size only if that is known.
    """
    paper, before = VLMoConfig.paper(), "transformer.blocks."
    width, _, _, patch = tensors["transformer.patch_embed.proj.weight"].shape
    table, layers = tensors["relative_position_bias_table"], count(tensors, before)
    longest = paper.text.context_length
    reach = math.isqrt(max(0, len(table) - 5 - 2 * longest))  # 2 * grid - 1, see `layers.relative`
    if reach**2 + 5 + 2 * longest != len(table) or reach % 2 == 0:
        raise CheckpointError(
            f"{len(table)} relative positions are not those of {longest} words and a square of patches: give `config=`"
            ", VLMoConfig.paper() with another `text.context_length` and `image.image_size`"
        )
    hidden = len(tensors[f"{before}0.mlp_text.fc1.weight"])
    block = BlockConfig(width, table.shape[1] // layers, hidden, norm_eps=1e-6)
    with_vl = [n for n in range(layers) if f"{before}{n}.mlp_vl.fc1.weight" in tensors]
    vocabulary = len(tensors["text_embeddings.word_embeddings.weight"])
    return replace(
        paper,
        image=replace(paper.image, image_size=(reach + 1) // 2 * patch, patch_size=patch, layers=layers, block=block),
        text=replace(paper.text, vocabulary=vocabulary, layers=layers, block=block),
        vl_from=min(with_vl, default=layers),
        embed_width=width,
    )


def pixels(size: int) -> dict[str, Any]:
    """The whole picture becomes a square in [-1, 1]."""
    return {**squash(size), "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}


RELEASES = (
    Release(
        mark="transformer.blocks.",
        table=AUTHORS,
        ignored=("*.position_ids", "*relative_position_index", "text_embeddings.position_embeddings.weight"),
        optional=(
            "word_head.",
            "match_head.",
            "project_image.",
            "project_text.",
            "project_image_vl.",
            "project_text_vl.",
            "log_scale",
            "log_scale_vl",
        ),
        config=config,
        processor="BlipImageProcessor",
        pixels=pixels,
        tokenizer="bert-base-uncased",
    ),
)
