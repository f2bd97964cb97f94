"""BLIP's releases: transformers' captioner, filter and question answerer (`Salesforce/blip-image-captioning-base`), and
the authors' .pth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.models.blip import CROSS_ATTENTION, THE_REST, BLIPConfig
from minivlp.pretrained.keys import Release, first, flat, rest, under
from minivlp.pretrained.parts import (
    ALIGNED,
    BERT_LAYER,
    MOMENTUM,
    VIT,
    WORD_HEAD,
    bert_config,
    count,
    squash,
    vit_config,
)

IMAGE_LAYER = (
    ("layer_norm1", "self_norm"),
    ("self_attn.qkv", "self_attention.qkv"),
    ("self_attn.projection", "self_attention.out"),
    ("layer_norm2", "feed_norm"),
    ("mlp.fc1", "feed_forward.up"),
    ("mlp.fc2", "feed_forward.down"),
)
IMAGE = (
    ("embeddings.patch_embedding", "patches.project"),
    (flat("embeddings.class_embedding"), "class_token"),
    (first("embeddings.position_embedding"), "class_position"),
    (rest("embeddings.position_embedding"), "positions"),
    *under("encoder.layers.{n}.", "blocks.{n}.", IMAGE_LAYER),
    ("post_layernorm", "norm"),
)
TEXT = (  # a BERT without token types
    ("embeddings.word_embeddings", "embed.words"),
    ("embeddings.position_embeddings.weight", "embed.positions"),
    ("embeddings.LayerNorm", "embed.norm"),
    *under("encoder.layer.{n}.", "blocks.{n}.", BERT_LAYER),
)
TEXTS_AND_HEADS = (
    *under("text_encoder.", "text.", TEXT),
    *under("text_decoder.bert.", "decoder.", TEXT),
    *under("text_decoder.cls.predictions.", "word_head.", WORD_HEAD),
    *ALIGNED,
    ("itm_head", "match_head"),
)
TRANSFORMERS = (*under("vision_model.", "image.", IMAGE), *TEXTS_AND_HEADS)
AUTHORS = (*under("visual_encoder.", "image.", VIT), *TEXTS_AND_HEADS)


def shared(tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """What reader and writer share: in a question answerer, which has no space to meet in, nothing."""
    asks = {name.split(".")[0] for name in tensors}
    return () if {"text_encoder", "text_decoder"} <= asks and "vision_proj" not in asks else CROSS_ATTENTION + THE_REST


def transformers_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> BLIPConfig:
    """From transformers' config.json."""
    from transformers import BlipConfig as Settings

    theirs = Settings.from_dict(settings)
    image, text = theirs.vision_config, theirs.text_config
    image_block, text_block = (
        BlockConfig(c.hidden_size, c.num_attention_heads, c.intermediate_size, c.hidden_act, c.layer_norm_eps)
        for c in (image, text)
    )
    text_block = replace(text_block, norm_first=False)
    length = text.max_position_embeddings
    return BLIPConfig(
        ImageConfig(image.image_size, image.patch_size, image.num_hidden_layers, image_block),
        TextConfig(text.vocab_size, length, text.num_hidden_layers, text_block, embed_norm=True, position_std=0.02),
        theirs.image_text_hidden_size,
        shared(tensors),
        pad_id=text.pad_token_id,
        stop_id=text.sep_token_id,
        decode_id=text.bos_token_id,
        match_id=text.bos_token_id + 1,  # [ENC] was added after [DEC]
        momentum=None,
    )


def authors_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> BLIPConfig:
    """Sizes as the tensors have them, the rest as in the paper."""
    paper = BLIPConfig.paper()
    stack = "text_encoder." if "text_encoder.embeddings.word_embeddings.weight" in tensors else "text_decoder.bert."
    text = bert_config(tensors, stack, count(tensors, f"{stack}encoder.layer."))
    return replace(
        paper,
        image=vit_config(tensors, "visual_encoder."),
        text=text,
        embed_width=len(tensors["vision_proj.weight"]) if "vision_proj.weight" in tensors else paper.embed_width,
        shared=shared(tensors),
        decode_id=text.vocabulary - 2,  # [DEC] and [ENC] were added to BERT's words, in this order
        match_id=text.vocabulary - 1,
        momentum=None,
    )


FROM_TRANSFORMERS = Release(
    mark="vision_model.",
    table=TRANSFORMERS,
    ignored=("*.position_ids",),
    optional=("text.", "decoder.", "word_head.", "project_image.", "project_text.", "match_head.", "temperature"),
    config=transformers_config,
    processor="BlipImageProcessor",
    pixels=squash,
    tokenizer="bert-base-uncased",
)
RELEASES = (
    FROM_TRANSFORMERS,
    replace(
        FROM_TRANSFORMERS,
        mark="visual_encoder.",
        table=AUTHORS,
        config=authors_config,
        ignored=("*.position_ids", *MOMENTUM),
    ),
)
