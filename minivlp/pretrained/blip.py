"""BLIP's releases: transformers' captioner, filter and question answerer (`Salesforce/blip-image-captioning-base`), and
the authors' .pth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.models.blip import CROSS_ATTENTION, THE_REST, BLIPConfig
from minivlp.pretrained.keys import Release, first, flat, rest, with_prefix
from minivlp.pretrained.parts import (
    ALIGNED,
    BERT_LAYER,
    MLM_HEAD,
    MOMENTUM,
    VIT,
    bert_config,
    count,
    squash,
    transformers_block,
    vit_config,
)
from minivlp.pretrained.settings import HARMLESS, transformers_sections

IMAGE_LAYER = (
    ("layer_norm1", "self_norm"),
    ("self_attn.qkv", "self_attention.qkv"),
    ("self_attn.projection", "self_attention.out"),
    ("layer_norm2", "feed_norm"),
    ("mlp.fc1", "feed_forward.up"),
    ("mlp.fc2", "feed_forward.down"),
)
IMAGE = (
    ("embeddings.patch_embedding", "embed.patches.project"),
    (flat("embeddings.class_embedding"), "embed.class_token"),
    (first("embeddings.position_embedding"), "embed.class_position"),
    (rest("embeddings.position_embedding"), "embed.positions"),
    *with_prefix("encoder.layers.{n}.", "blocks.{n}.", IMAGE_LAYER),
    ("post_layernorm", "norm"),
)
TEXT = (  # a BERT without token types
    ("embeddings.word_embeddings", "embed.token"),
    ("embeddings.position_embeddings.weight", "embed.position"),
    ("embeddings.LayerNorm", "embed.norm"),
    *with_prefix("encoder.layer.{n}.", "blocks.{n}.", BERT_LAYER),
)
TEXT_AND_HEADS = (
    *with_prefix("text_encoder.", "text.", TEXT),
    *with_prefix("text_decoder.bert.", "decoder.", TEXT),
    *with_prefix("text_decoder.cls.predictions.", "caption_head.", MLM_HEAD),
    *ALIGNED,
)
TRANSFORMERS = (*with_prefix("vision_model.", "image.", IMAGE), *TEXT_AND_HEADS)
AUTHORS = (*with_prefix("visual_encoder.", "image.", VIT), *TEXT_AND_HEADS)


def shared(tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """What encoder and decoder share: in a question answerer, which has no joint space, nothing."""
    parts = {name.split(".")[0] for name in tensors}
    answers = {"text_encoder", "text_decoder"} <= parts and "vision_proj" not in parts
    return () if answers else CROSS_ATTENTION + THE_REST


def transformers_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> BLIPConfig:
    """From transformers' config.json. Raises CheckpointError for settings that we do not know or cannot express."""
    top, image, text = sections = transformers_sections("BlipConfig", settings, "vision_config", "text_config")
    image.only("num_channels", 3)
    text("encoder_hidden_size")  # transformers takes the image tower's width instead
    text.only("position_embedding_type", "absolute")
    text_block = replace(transformers_block(text), norm_first=False)
    vocabulary, length = text.integer("vocab_size"), text.integer("max_position_embeddings")
    first = text("bos_token_id")
    config = BLIPConfig(
        ImageConfig(*image.image_and_patch_size(), image.integer("num_hidden_layers"), transformers_block(image)),
        TextConfig(
            vocabulary, length, text.integer("num_hidden_layers"), text_block, embed_norm=True, position_std=0.02
        ),
        top.integer("image_text_hidden_size"),
        shared(tensors),
        tokens=replace(
            BLIPConfig.paper().tokens,
            pad=text("pad_token_id"),
            sep=text("sep_token_id"),
            dec=first,
            enc=first + 1,  # [ENC] was added after [DEC]
        ),
        momentum=None,
    )
    for section in sections:
        section.finish(HARMLESS["transformers"])
    return config


def authors_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> BLIPConfig:
    """Sizes from the shapes of the tensors, the rest as in the paper; without the momentum model."""
    paper = BLIPConfig.paper()
    stack = "text_encoder." if "text_encoder.embeddings.word_embeddings.weight" in tensors else "text_decoder.bert."
    text = bert_config(tensors, stack, count(tensors, f"{stack}encoder.layer."))
    return replace(
        paper,
        image=vit_config(tensors, "visual_encoder."),
        text=text,
        embed_width=len(tensors["vision_proj.weight"]) if "vision_proj.weight" in tensors else paper.embed_width,
        shared=shared(tensors),
        # [DEC] and [ENC] were added to BERT's vocabulary, in this order
        tokens=replace(paper.tokens, dec=text.vocabulary - 2, enc=text.vocabulary - 1),
        momentum=None,
    )


FROM_TRANSFORMERS = Release(
    key_prefix="vision_model.",
    table=TRANSFORMERS,
    ignored=("*.position_ids",),
    optional=("text.", "decoder.", "caption_head.", "itc_head.", "itc_head.scale.", "match_head."),
    config=transformers_config,
    processor="BlipImageProcessor",
    processor_settings=squash,
    tokenizer="bert-base-uncased",
    settings_file="config.json",
)
RELEASES = (
    FROM_TRANSFORMERS,
    replace(
        FROM_TRANSFORMERS,
        settings_file="",
        key_prefix="visual_encoder.",
        table=AUTHORS,
        config=authors_config,
        ignored=("*.position_ids", *MOMENTUM),
    ),
)
