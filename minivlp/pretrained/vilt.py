"""ViLT's releases: transformers' with any of its heads (`dandelin/vilt-b32-mlm`), and the authors' .ckpt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.models.vilt import ViLTConfig
from minivlp.models.vilt_answers import AnswersConfig
from minivlp.pretrained.keys import From, Release, Size, first, flat, rest, stack, with_prefix
from minivlp.pretrained.parts import BERT_EMBED, MLM_HEAD, VIT_EMBED, VIT_LAYER, transformers_block, vit_config
from minivlp.pretrained.settings import HARMLESS, transformers_sections

LAYER = (
    ("layernorm_before", "self_norm"),
    (stack(*(f"attention.attention.{part}" for part in ("query", "key", "value"))), "self_attention.qkv"),
    ("attention.output.dense", "self_attention.out"),
    ("layernorm_after", "feed_norm"),
    ("intermediate.dense", "feed_forward.up"),
    ("output.dense", "feed_forward.down"),
)
# their head has one logit, "match"; ours has two, of which "no match" is then 0
ONE_LOGIT = From(("rank_output",), lambda match: torch.cat([torch.zeros_like(match), match]))
# where the head of masked tokens has no matrix of its own, it is the token embedding
TIED = From(
    ("vilt.embeddings.text_embeddings.word_embeddings.weight", "mlm_score.transform.dense.weight"),
    lambda words, _: words,
)
TRANSFORMERS = (
    *with_prefix("vilt.embeddings.text_embeddings.", "joint.text_embed.", BERT_EMBED),
    ("vilt.embeddings.token_type_embeddings.weight", "joint.token_type"),
    ("vilt.embeddings.patch_embeddings.projection", "joint.image_embed.patches.project"),
    (flat("vilt.embeddings.cls_token"), "joint.image_embed.class_token"),
    (first("vilt.embeddings.position_embeddings"), "joint.image_embed.class_position"),
    (rest("vilt.embeddings.position_embeddings"), "joint.image_embed.positions"),
    *with_prefix("vilt.encoder.layer.{n}.", "joint.blocks.{n}.", LAYER),
    ("vilt.layernorm", "joint.norm"),
    ("vilt.pooler.dense", "match_head.pooler.dense"),
    ("vilt.pooler.dense", "pooler.dense"),  # of `ViLTAnswers`
    *with_prefix("mlm_score.", "mlm_head.", MLM_HEAD),
    (TIED, "mlm_head.decoder.weight"),
    (ONE_LOGIT, "match_head.classifier"),
    ("classifier", "answer_head.mlp"),
)
AUTHORS = (
    *with_prefix("text_embeddings.", "joint.text_embed.", BERT_EMBED),
    ("token_type_embeddings.weight", "joint.token_type"),
    *with_prefix("transformer.", "joint.image_embed.", VIT_EMBED),
    *with_prefix("transformer.blocks.{n}.", "joint.blocks.{n}.", VIT_LAYER),
    ("transformer.norm", "joint.norm"),
    ("pooler.dense", "match_head.pooler.dense"),
    ("pooler.dense", "pooler.dense"),
    *with_prefix("mlm_score.", "mlm_head.", MLM_HEAD),
    ("itm_score.fc", "match_head.classifier"),
    *with_prefix("mpp_score.", "patch_head.", MLM_HEAD),
    (flat("transformer.mask_token"), "mask_token"),
    ("vqa_classifier", "answer_head.mlp"),
)


def transformers_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> ViLTConfig:
    """From transformers' config.json. With a list of answers it is a model for VQA or NLVR2.

    Raises CheckpointError for settings that we do not know or cannot express.
    """
    (theirs,) = transformers_sections("ViltConfig", settings)
    for key, fine in (("num_channels", 3), ("qkv_bias", True), ("max_image_length", -1)):
        theirs.only(key, fine)
    block, layers = transformers_block(theirs), theirs.integer("num_hidden_layers")
    vocabulary, length = theirs.integer("vocab_size"), theirs.integer("max_position_embeddings")
    sizes = {
        "image": ImageConfig(*theirs.image_and_patch_size(), layers, block),
        "text": TextConfig(vocabulary, length, 0, block, embed_norm=True, position_std=0.02),
        "masking": ViLTConfig.paper().masking,
    }
    theirs.finish(HARMLESS["transformers"])
    if "classifier.3.weight" not in tensors:
        return ViLTConfig(**sizes)
    images = tensors["classifier.0.weight"].shape[1] // block.width
    return AnswersConfig(**sizes, answers=len(tensors["classifier.3.weight"]), images_per_text=images)


def authors_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> ViLTConfig:
    """Sizes from the shapes of the tensors."""
    image = vit_config(tensors, "transformer.")
    vocabulary, length = (
        len(tensors[f"text_embeddings.{kind}_embeddings.weight"]) for kind in ("word", "position")
    )  # fmt: skip
    text = TextConfig(vocabulary, length, 0, image.block, embed_norm=True, position_std=0.02)
    masking = ViLTConfig.paper().masking
    if "vqa_classifier.3.weight" in tensors:
        return AnswersConfig(image, text, masking=masking, answers=len(tensors["vqa_classifier.3.weight"]))
    return ViLTConfig(image, text, masking=masking)


def fit(size: Size) -> dict[str, Any]:
    """The short side is resized to the model's, and the long one in proportion; a mask says where the picture ends."""
    return {"size": {"shortest_edge": min(size)}}


FROM_TRANSFORMERS = Release(
    key_prefix="vilt.",
    table=TRANSFORMERS,
    ignored=("*.position_ids",),
    optional=("mlm_head.", "match_head.classifier."),
    config=transformers_config,
    processor="ViltImageProcessor",
    processor_settings=fit,
    tokenizer="bert-base-uncased",
    settings_file="config.json",
    interpolation=("bilinear", True),
)
FROM_AUTHORS = replace(
    FROM_TRANSFORMERS,
    key_prefix="transformer.",
    table=AUTHORS,
    settings_file="",
    config=authors_config,
    ignored=("*.position_ids", "transformer.mask_token", "mpp_score.*"),  # masked patch prediction was only an ablation
)
RELEASES = (
    FROM_TRANSFORMERS,
    # a fine-tuned checkpoint may still have the heads of its pre-training
    replace(FROM_AUTHORS, key_prefix="vqa_classifier.", ignored=(*FROM_AUTHORS.ignored, "mlm_score.*", "itm_score.*")),
    FROM_AUTHORS,
)
