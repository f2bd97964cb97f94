"""GIT's releases: transformers' (`microsoft/git-base-coco`, `…-textvqa`, `…-vatex`), and the authors' .pt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from minivlp.layers.embeddings import ImageConfig
from minivlp.models.git import GITConfig, decoder_config
from minivlp.pretrained.clip import OPENAI_IMAGE, TRANSFORMERS_IMAGE
from minivlp.pretrained.keys import Release, flat, with_prefix
from minivlp.pretrained.parts import BERT_LAYER, count, crop, heads, square_side, transformers_block
from minivlp.pretrained.settings import HARMLESS, Section, transformers_sections

TRANSFORMERS = (
    *with_prefix("git.image_encoder.vision_model.", "image.", TRANSFORMERS_IMAGE),
    (flat("git.img_temporal_embedding.{n}"), "frames.{n}"),
    ("git.visual_projection.visual_projection", "decoder.project"),
    ("git.embeddings.word_embeddings", "decoder.embed.token"),
    ("git.embeddings.position_embeddings.weight", "decoder.embed.position"),
    ("git.embeddings.LayerNorm", "decoder.embed.norm"),
    *with_prefix("git.encoder.layer.{n}.", "decoder.blocks.{n}.", BERT_LAYER),
    ("output", "caption_head.decoder"),
)
AUTHORS = (
    *with_prefix("image_encoder.", "image.", OPENAI_IMAGE),
    (flat("img_temperal_embedding.{n}"), "frames.{n}"),
    ("textual.visual_projection", "decoder.project"),
    ("textual.embedding.words", "decoder.embed.token"),
    ("textual.embedding.positions.weight", "decoder.embed.position"),
    ("textual.embedding.layer_norm", "decoder.embed.norm"),
    *with_prefix("textual.transformer.encoder.layer.{n}.", "decoder.blocks.{n}.", BERT_LAYER),
    ("textual.output", "caption_head.decoder"),
)


def transformers_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> GITConfig:
    """From transformers' config.json. Raises CheckpointError for settings that we do not know or cannot express."""
    top, image = sections = transformers_sections("GitConfig", settings, "vision_config")
    image.only("num_channels", 3)
    top.only("position_embedding_type", "absolute")
    block = replace(transformers_block(top), norm_first=False)
    sizes = (top.integer(key) for key in ("vocab_size", "max_position_embeddings", "num_hidden_layers"))
    size, patch = image.image_and_patch_size()
    tower = transformers_block(image)
    config = GITConfig(
        ImageConfig(size, patch, image.integer("num_hidden_layers"), tower, ln_pre=True, patch_bias=False),
        decoder_config(*sizes, block),
        frames=0 if top("num_image_with_embedding") is None else top.integer("num_image_with_embedding"),
        embed_eps=block.norm_eps,
        tie_words=bool(top("tie_word_embeddings")),
        tokens=replace(
            GITConfig.paper().tokens,
            pad=token(top, "pad_token_id"),
            cls=token(top, "bos_token_id"),
            sep=token(top, "eos_token_id"),
        ),
    )
    for section in sections:
        section.finish(HARMLESS["transformers"])
    return config


def token(section: Section, key: str) -> int:
    """One token id; transformers also knows several tokens that end a text, and none."""
    value = section(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise section.wrong(key, "one token id")
    return value


def authors_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> GITConfig:
    """Sizes from the shapes of the tensors, the rest as in the paper."""
    paper = GITConfig.paper()
    width, _, _, patch = tensors["image_encoder.conv1.weight"].shape
    side = square_side(len(tensors["image_encoder.positional_embedding"]) - 1)
    hidden = len(tensors["image_encoder.transformer.resblocks.0.mlp.c_fc.weight"])
    tower = replace(paper.image.block, width=width, heads=heads(width), hidden=hidden)
    layers = count(tensors, "image_encoder.transformer.resblocks.")
    vocabulary, width = tensors["textual.embedding.words.weight"].shape
    before = "textual.transformer.encoder.layer."
    hidden = len(tensors[f"{before}0.intermediate.dense.weight"])
    block = replace(paper.text.block, width=width, heads=heads(width), hidden=hidden)
    length = len(tensors["textual.embedding.positions.weight"])
    return replace(
        paper,
        image=replace(paper.image, image_size=side * patch, patch_size=patch, layers=layers, block=tower),
        text=decoder_config(vocabulary, length, count(tensors, before), block),
        frames=count(tensors, "img_temperal_embedding."),
    )


FROM_TRANSFORMERS = Release(
    key_prefix="git.",
    table=TRANSFORMERS,
    ignored=("*.position_ids",),
    config=transformers_config,
    processor="CLIPImageProcessor",
    processor_settings=crop,
    tokenizer="bert-base-uncased",
    settings_file="config.json",
)
RELEASES = (
    FROM_TRANSFORMERS,
    replace(
        FROM_TRANSFORMERS,
        settings_file="",
        key_prefix="textual.",
        table=AUTHORS,
        config=authors_config,
        ignored=("image_encoder.proj",),  # to the joint space of CLIP, which the tower comes from
    ),
)
