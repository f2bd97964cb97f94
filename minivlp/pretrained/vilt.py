"""ViLT's releases: transformers' with any of its heads (`dandelin/vilt-b32-mlm`), and the authors' .ckpt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.models.vilt import AnswersConfig, ViLTConfig
from minivlp.pretrained.keys import From, Release, first, flat, rest, stack, under
from minivlp.pretrained.parts import BERT_WORDS, VIT, WORD_HEAD, vit_config

LAYER = (
    ("layernorm_before", "self_norm"),
    (stack(*(f"attention.attention.{part}" for part in ("query", "key", "value"))), "self_attention.qkv"),
    ("attention.output.dense", "self_attention.out"),
    ("layernorm_after", "feed_norm"),
    ("intermediate.dense", "feed_forward.up"),
    ("output.dense", "feed_forward.down"),
)
# a head of one logit, "how well do they match?", is ours of two in which "no match" has the logit 0
ONE_LOGIT = From(("rank_output",), lambda match: torch.cat([torch.zeros_like(match), match]))
# where the head of hidden words has no matrix of its own, it is the word embedding
TIED = From(
    ("vilt.embeddings.text_embeddings.word_embeddings.weight", "mlm_score.transform.dense.weight"),
    lambda words, _: words,
)
TRANSFORMERS = (
    *under("vilt.embeddings.text_embeddings.", "words.", BERT_WORDS),
    ("vilt.embeddings.token_type_embeddings.weight", "modality"),
    ("vilt.embeddings.patch_embeddings.projection", "joint.patches.project"),
    (flat("vilt.embeddings.cls_token"), "joint.class_token"),
    (first("vilt.embeddings.position_embeddings"), "joint.class_position"),
    (rest("vilt.embeddings.position_embeddings"), "joint.positions"),
    *under("vilt.encoder.layer.{n}.", "joint.blocks.{n}.", LAYER),
    ("vilt.layernorm", "joint.norm"),
    ("vilt.pooler.dense", "pool"),
    *under("mlm_score.", "word_head.", WORD_HEAD),
    (TIED, "word_head.decoder.weight"),
    (ONE_LOGIT, "match_head"),
    ("classifier", "answer_head"),
)
AUTHORS = (
    *under("text_embeddings.", "words.", BERT_WORDS),
    ("token_type_embeddings.weight", "modality"),
    *under("transformer.", "joint.", VIT),
    ("pooler.dense", "pool"),
    *under("mlm_score.", "word_head.", WORD_HEAD),
    ("itm_score.fc", "match_head"),
    *under("mpp_score.", "patch_head.", WORD_HEAD),
    (flat("transformer.mask_token"), "mask_token"),
    ("vqa_classifier", "answer_head"),
)
BERT_IDS = {"mask_id": 103, "never_mask": (0, 100, 101, 102, 103)}


def transformers_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> ViLTConfig:
    """From transformers' config.json. With a list of answers it is a model for VQA or NLVR2."""
    from transformers import ViltConfig as Settings

    theirs = Settings.from_dict(settings)
    width = theirs.hidden_size
    block = BlockConfig(
        width, theirs.num_attention_heads, theirs.intermediate_size, theirs.hidden_act, theirs.layer_norm_eps
    )
    sizes = {
        "image": ImageConfig(theirs.image_size, theirs.patch_size, theirs.num_hidden_layers, block),
        "text": TextConfig(
            theirs.vocab_size, theirs.max_position_embeddings, 0, block, embed_norm=True, position_std=0.02
        ),
        **BERT_IDS,
    }
    if "classifier.3.weight" not in tensors:
        return ViLTConfig(**sizes)
    images = tensors["classifier.0.weight"].shape[1] // width
    return AnswersConfig(**sizes, answers=len(tensors["classifier.3.weight"]), images_per_text=images)


def authors_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> ViLTConfig:
    """Sizes as the tensors have them."""
    image = vit_config(tensors, "transformer.")
    vocabulary, length = (
        len(tensors[f"text_embeddings.{kind}_embeddings.weight"]) for kind in ("word", "position")
    )  # fmt: skip
    words = replace(image.block, norm_eps=1e-12)
    text = TextConfig(vocabulary, length, 0, words, embed_norm=True, position_std=0.02)
    if "vqa_classifier.3.weight" in tensors:
        return AnswersConfig(image, text, **BERT_IDS, answers=len(tensors["vqa_classifier.3.weight"]))
    return ViLTConfig(image, text, **BERT_IDS)


def fit(size: int) -> dict[str, Any]:
    """The short side becomes `size` pixels long, the long one follows; a mask says where the picture ends."""
    return {"size": {"shortest_edge": size}}


FROM_TRANSFORMERS = Release(
    mark="vilt.",
    table=TRANSFORMERS,
    ignored=("*.position_ids",),
    optional=("word_head.", "match_head."),
    config=transformers_config,
    processor="ViltImageProcessor",
    pixels=fit,
    tokenizer="bert-base-uncased",
    resize=("bilinear", True),
)
FROM_AUTHORS = replace(
    FROM_TRANSFORMERS,
    mark="transformer.",
    table=AUTHORS,
    config=authors_config,
    ignored=("*.position_ids", "transformer.mask_token", "mpp_score.*"),  # patch prediction: only an ablation
)
RELEASES = (
    FROM_TRANSFORMERS,
    # what was fine-tuned may still carry the heads of its pre-training
    replace(FROM_AUTHORS, mark="vqa_classifier.", ignored=(*FROM_AUTHORS.ignored, "mlm_score.*", "itm_score.*")),
    FROM_AUTHORS,
)
