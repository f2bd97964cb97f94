"""BLIP's releases: transformers' captioner, filter and question answerer (`Salesforce/blip-image-captioning-base`), and
the authors' .pth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.transformer import BlockConfig
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
        tokens=replace(
            BLIPConfig.paper().tokens,
            pad=text.pad_token_id,
            sep=text.sep_token_id,
            dec=text.bos_token_id,
            enc=text.bos_token_id + 1,  # [ENC] was added after [DEC]
        ),
        momentum=None,
    )


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
)
RELEASES = (
    FROM_TRANSFORMERS,
    replace(
        FROM_TRANSFORMERS,
        key_prefix="visual_encoder.",
        table=AUTHORS,
        config=authors_config,
        ignored=("*.position_ids", *MOMENTUM),
    ),
)
