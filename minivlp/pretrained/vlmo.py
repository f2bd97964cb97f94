"""VLMo's release: the authors' .pt, as pre-trained, of text alone (stage 2) or of pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minivlp.models.vlmo import VLMoConfig
from minivlp.pretrained.keys import From, Release, Size, flat, plus_first, with_prefix
from minivlp.pretrained.parts import MLM_HEAD, count, squash
from minivlp.weight_files import CheckpointError

LAYER = (
    ("norm1", "self_norm"),
    ("attn.qkv.weight", "self_attention.qkv.weight"),
    # keys have no bias there
    (
        From(("attn.q_bias", "attn.v_bias"), lambda q, v: torch.cat([q, torch.zeros_like(q), v])),
        "self_attention.qkv.bias",
    ),
    ("attn.proj", "self_attention.out"),
    ("gamma_1", "attention_scale.factor"),
    ("gamma_2", "feed_scale.factor"),
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
    # BERT's token type is the same for all tokens of a text; as there are no positions, it is added to the tokens
    (plus_first("text_embeddings.word_embeddings.weight", "text_embeddings.token_type_embeddings.weight"),
     "joint.text_embed.token.weight"),
    ("text_embeddings.LayerNorm", "joint.text_embed.norm"),
    ("token_type_embeddings.weight", "joint.token_type"),
    (flat("transformer.cls_token"), "joint.image_embed.class_token"),
    ("transformer.patch_embed.proj", "joint.image_embed.patches.project"),
    *with_prefix("transformer.blocks.{n}.", "joint.blocks.{n}.", LAYER),
    ("transformer.norm", "joint.norm"),
    ("relative_position_bias_table", "joint.relative.table"),
    ("pooler.dense", "match_head.pooler.dense"),
    ("itm_score.fc", "match_head.classifier"),
    *with_prefix("mlm_score.", "mlm_head.", MLM_HEAD),
    ("itc_image_proj.fc", "itc_head.project_image"),
    ("itc_text_proj.fc", "itc_head.project_text"),
    ("itc_vl_image_proj.fc", "itc_head_vl.project_image"),
    ("itc_vl_text_proj.fc", "itc_head_vl.project_text"),
    ("logit_scale", "itc_head.scale.log_scale"),
    ("logit_vl_scale", "itc_head_vl.scale.log_scale"),
)  # fmt: skip


def config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> VLMoConfig:
    """Sizes from the shapes of the tensors, the rest as in the paper.

    Raises CheckpointError for another context length than the paper's, and for images that are not square: the table
    of relative positions tells the size of square images, if the context length is known.
    """
    paper, before = VLMoConfig.paper(), "transformer.blocks."
    width, _, _, patch = tensors["transformer.patch_embed.proj.weight"].shape
    table, layers = tensors["relative_position_bias_table"], count(tensors, before)
    longest = paper.text.context_length
    reach = math.isqrt(max(0, len(table) - 5 - 2 * longest))  # 2 * grid - 1, see `layers.relative`
    if reach**2 + 5 + 2 * longest != len(table) or reach % 2 == 0:
        raise CheckpointError(
            f"{len(table)} relative positions are not those of {longest} text tokens and a square of patches: give "
            "`config=`, VLMoConfig.paper() with another `text.context_length` and `image.image_size`"
        )
    hidden = len(tensors[f"{before}0.mlp_text.fc1.weight"])
    block = replace(paper.image.block, width=width, heads=table.shape[1] // layers, hidden=hidden)
    with_vl = [n for n in range(layers) if f"{before}{n}.mlp_vl.fc1.weight" in tensors]
    vocabulary = len(tensors["text_embeddings.word_embeddings.weight"])
    return replace(
        paper,
        image=replace(paper.image, image_size=(reach + 1) // 2 * patch, patch_size=patch, layers=layers, block=block),
        text=replace(paper.text, vocabulary=vocabulary, layers=layers, block=block),
        vl_from=min(with_vl, default=layers),
        embed_width=width,
    )


def squash_symmetric(size: Size) -> dict[str, Any]:
    """The whole picture is resized to the model's height and width, with pixels in [-1, 1]."""
    return {**squash(size), "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}


# a checkpoint has the heads of one branch, of both, or none
CONTRASTIVE = tuple(
    f"{head}.{part}"
    for head in ("itc_head", "itc_head_vl")
    for part in ("", "project_image.", "project_text.", "scale.")
)
RELEASES = (
    Release(
        key_prefix="transformer.blocks.",
        table=AUTHORS,
        ignored=("*.position_ids", "*relative_position_index", "text_embeddings.position_embeddings.weight"),
        optional=("mlm_head.", "match_head.classifier.", *CONTRASTIVE),
        config=config,
        processor="BlipImageProcessor",
        processor_settings=squash_symmetric,
        tokenizer="bert-base-uncased",
    ),
)
