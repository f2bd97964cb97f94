"""CLIP's releases: transformers' (`openai/clip-vit-base-patch32`), and OpenAI's own names, which open_clip kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.transformer import BlockConfig
from minivlp.models.clip import CLIPConfig
from minivlp.pretrained.keys import Release, first, rest, transposed, with_prefix
from minivlp.pretrained.parts import CLIP_LAYER, HEAD_WIDTH, crop, one_or_two

TRANSFORMERS = (
    ("logit_scale", "itc_head.scale.log_scale"),
    ("visual_projection", "itc_head.project_image"),
    ("text_projection", "itc_head.project_text"),
    ("vision_model.embeddings.patch_embedding", "image.embed.patches.project"),
    ("vision_model.embeddings.class_embedding", "image.embed.class_token"),
    (first("vision_model.embeddings.position_embedding.weight"), "image.embed.class_position"),
    (rest("vision_model.embeddings.position_embedding.weight"), "image.embed.positions"),
    ("vision_model.pre_layrnorm", "image.embed.ln_pre"),
    *with_prefix("vision_model.encoder.layers.{n}.", "image.blocks.{n}.", CLIP_LAYER),
    ("vision_model.post_layernorm", "image.norm"),
    ("text_model.embeddings.token_embedding", "text.embed.token"),
    ("text_model.embeddings.position_embedding.weight", "text.embed.position"),
    *with_prefix("text_model.encoder.layers.{n}.", "text.blocks.{n}.", CLIP_LAYER),
    ("text_model.final_layer_norm", "text.norm"),
)
OPENAI_LAYER = (
    ("ln_1", "self_norm"),
    ("attn.in_proj_weight", "self_attention.qkv.weight"),
    ("attn.in_proj_bias", "self_attention.qkv.bias"),
    ("attn.out_proj", "self_attention.out"),
    ("ln_2", "feed_norm"),
    ("mlp.c_fc", "feed_forward.up"),
    ("mlp.c_proj", "feed_forward.down"),
)
OPENAI = (
    ("logit_scale", "itc_head.scale.log_scale"),
    (transposed("visual.proj"), "itc_head.project_image.weight"),
    (transposed("text_projection"), "itc_head.project_text.weight"),
    ("visual.conv1", "image.embed.patches.project"),
    ("visual.class_embedding", "image.embed.class_token"),
    (first("visual.positional_embedding"), "image.embed.class_position"),
    (rest("visual.positional_embedding"), "image.embed.positions"),
    ("visual.ln_pre", "image.embed.ln_pre"),
    *with_prefix("visual.transformer.resblocks.{n}.", "image.blocks.{n}.", OPENAI_LAYER),
    ("visual.ln_post", "image.norm"),
    ("token_embedding", "text.embed.token"),
    ("positional_embedding", "text.embed.position"),
    *with_prefix("transformer.resblocks.{n}.", "text.blocks.{n}.", OPENAI_LAYER),
    ("ln_final", "text.norm"),
)


def transformers_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> CLIPConfig:
    """From transformers' config.json."""
    from transformers import CLIPConfig as Settings

    theirs = Settings.from_dict(settings)
    image, text = theirs.vision_config, theirs.text_config
    blocks = [
        BlockConfig(c.hidden_size, c.num_attention_heads, c.intermediate_size, c.hidden_act, c.layer_norm_eps)
        for c in (image, text)
    ]
    return CLIPConfig(
        ImageConfig(
            image.image_size, image.patch_size, image.num_hidden_layers, blocks[0], ln_pre=True, patch_bias=False
        ),
        TextConfig(text.vocab_size, text.max_position_embeddings, text.num_hidden_layers, blocks[1], causal=True),
        theirs.projection_dim,
    )


def openai_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> CLIPConfig:
    """From open_clip_config.json. Raises KeyError for towers of another kind than the paper's ViT and text model."""
    theirs = settings["model_cfg"]
    image, text = theirs["vision_cfg"], theirs["text_cfg"]
    activation = "quick_gelu" if theirs.get("quick_gelu") else "gelu"
    width, text_width = image["width"], text["width"]
    image_block = BlockConfig(
        width, width // image.get("head_width", HEAD_WIDTH), int(image.get("mlp_ratio", 4) * width), activation
    )
    text_block = BlockConfig(text_width, text["heads"], int(text.get("mlp_ratio", 4) * text_width), activation)
    return CLIPConfig(
        ImageConfig(
            one_or_two(image["image_size"]),
            image["patch_size"],
            image["layers"],
            image_block,
            ln_pre=True,
            patch_bias=False,
        ),
        TextConfig(text["vocab_size"], text["context_length"], text["layers"], text_block, causal=True),
        theirs["embed_dim"],
    )


FROM_TRANSFORMERS = Release(
    key_prefix="vision_model.",
    table=TRANSFORMERS,
    ignored=("*.position_ids",),
    config=transformers_config,
    processor="CLIPImageProcessor",
    processor_settings=crop,
    tokenizer="openai/clip-vit-base-patch32",
)
RELEASES = (
    FROM_TRANSFORMERS,
    replace(
        FROM_TRANSFORMERS,
        key_prefix="visual.",
        table=OPENAI,
        config=openai_config,
        ignored=("input_resolution", "context_length", "vocab_size", "attn_mask"),
    ),
)
