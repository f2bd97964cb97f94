"""CLIP's releases: transformers' (`openai/clip-vit-base-patch32`), and OpenAI's own names, which open_clip kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.models.clip import CLIPConfig
from minivlp.pretrained.keys import Release, first, rest, turned, under
from minivlp.pretrained.parts import CLIP_LAYER, HEAD_WIDTH, crop

TRANSFORMERS = (
    ("logit_scale", "log_scale"),
    ("visual_projection", "project_image"),
    ("text_projection", "project_text"),
    ("vision_model.embeddings.patch_embedding", "image.patches.project"),
    ("vision_model.embeddings.class_embedding", "image.class_token"),
    (first("vision_model.embeddings.position_embedding.weight"), "image.class_position"),
    (rest("vision_model.embeddings.position_embedding.weight"), "image.positions"),
    ("vision_model.pre_layrnorm", "image.norm_before"),
    *under("vision_model.encoder.layers.{n}.", "image.blocks.{n}.", CLIP_LAYER),
    ("vision_model.post_layernorm", "image.norm"),
    ("text_model.embeddings.token_embedding", "text.embed.words"),
    ("text_model.embeddings.position_embedding.weight", "text.embed.positions"),
    *under("text_model.encoder.layers.{n}.", "text.blocks.{n}.", CLIP_LAYER),
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
    ("logit_scale", "log_scale"),
    (turned("visual.proj"), "project_image.weight"),
    (turned("text_projection"), "project_text.weight"),
    ("visual.conv1", "image.patches.project"),
    ("visual.class_embedding", "image.class_token"),
    (first("visual.positional_embedding"), "image.class_position"),
    (rest("visual.positional_embedding"), "image.positions"),
    ("visual.ln_pre", "image.norm_before"),
    *under("visual.transformer.resblocks.{n}.", "image.blocks.{n}.", OPENAI_LAYER),
    ("visual.ln_post", "image.norm"),
    ("token_embedding", "text.embed.words"),
    ("positional_embedding", "text.embed.positions"),
    *under("transformer.resblocks.{n}.", "text.blocks.{n}.", OPENAI_LAYER),
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
            image.image_size, image.patch_size, image.num_hidden_layers, blocks[0], norm_before=True, patch_bias=False
        ),
        TextConfig(text.vocab_size, text.max_position_embeddings, text.num_hidden_layers, blocks[1], causal=True),
        theirs.projection_dim,
    )


def openai_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> CLIPConfig:
    """From open_clip_config.json. Raises KeyError for towers of another kind than the paper's ViT and text model."""
    theirs = settings["model_cfg"]
    image, text = theirs["vision_cfg"], theirs["text_cfg"]
    activation = "quick_gelu" if theirs.get("quick_gelu") else "gelu"
    width, words = image["width"], text["width"]
    image_block = BlockConfig(
        width, width // image.get("head_width", HEAD_WIDTH), int(image.get("mlp_ratio", 4) * width), activation
    )
    text_block = BlockConfig(words, text["heads"], int(text.get("mlp_ratio", 4) * words), activation)
    return CLIPConfig(
        ImageConfig(
            image["image_size"], image["patch_size"], image["layers"], image_block, norm_before=True, patch_bias=False
        ),
        TextConfig(text["vocab_size"], text["context_length"], text["layers"], text_block, causal=True),
        theirs["embed_dim"],
    )


FROM_TRANSFORMERS = Release(
    mark="vision_model.",
    table=TRANSFORMERS,
    ignored=("*.position_ids",),
    config=transformers_config,
    processor="CLIPImageProcessor",
    pixels=crop,
    tokenizer="openai/clip-vit-base-patch32",
)
RELEASES = (
    FROM_TRANSFORMERS,
    replace(
        FROM_TRANSFORMERS,
        mark="visual.",
        table=OPENAI,
        config=openai_config,
        ignored=("input_resolution", "context_length", "vocab_size", "attn_mask"),
    ),
)
