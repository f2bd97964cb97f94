"""CoCa's releases: open_clip's (`laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k`); the authors have none."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from minivlp.data.text import SpecialTokens
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.poolers import ParallelPooling, Pooling, SinglePooling
from minivlp.layers.transformer import BlockConfig
from minivlp.models.coca import CoCaConfig
from minivlp.pretrained.clip import (
    IMAGE_DEFAULTS,
    IMAGE_SWITCHES,
    OPENAI_IMAGE,
    OPENAI_LAYER,
    TEXT_SWITCHES,
    TOP_SWITCHES,
    open_clip_block,
    open_clip_inputs,
    open_clip_sections,
)
from minivlp.pretrained.keys import From, Release, scalar, stack, transposed, with_prefix
from minivlp.pretrained.parts import crop
from minivlp.pretrained.settings import HARMLESS, Section, shown
from minivlp.weight_files import UnsupportedModel


def part_of(name: str, start: int, stop: int) -> From:
    """Thirds `start` to `stop` of their matrix of queries, keys and values, or of its bias."""
    return From((name,), lambda qkv: qkv[start * len(qkv) // 3 : stop * len(qkv) // 3])


CROSS_ATTENTION = (  # torch's MultiheadAttention: three matrices where queries and keys have different widths
    (part_of("attn.in_proj_weight", 0, 1), "cross_attention.q.weight"),
    (part_of("attn.in_proj_weight", 1, 3), "cross_attention.kv.weight"),
    ("attn.q_proj_weight", "cross_attention.q.weight"),
    (stack("attn.k_proj_weight", "attn.v_proj_weight"), "cross_attention.kv.weight"),
    (part_of("attn.in_proj_bias", 0, 1), "cross_attention.q.bias"),
    (part_of("attn.in_proj_bias", 1, 3), "cross_attention.kv.bias"),
    ("attn.out_proj", "cross_attention.out"),
)
POOLER = (
    ("query", "query"),
    ("ln_q", "query_norm"),
    ("ln_k", "context_norm"),
    *CROSS_ATTENTION,
)
SELF_LAYER = (  # of the multimodal half: self-attention with its feed-forward layer
    *OPENAI_LAYER[:4],
    ("ln_2", "inner_norm"),
    ("mlp.c_fc", "inner_feed.up"),
    ("mlp.c_proj", "inner_feed.down"),
)
CROSS_LAYER = (  # and cross-attention with its own
    ("ln_1", "cross_norm"),
    ("ln_1_kv", "context_norm"),
    *CROSS_ATTENTION,
    ("ln_2", "feed_norm"),
    ("mlp.c_fc", "feed_forward.up"),
    ("mlp.c_proj", "feed_forward.down"),
)
OPEN_CLIP = (
    (scalar("logit_scale"), "itc_head.scale.log_scale"),
    (transposed("visual.proj"), "itc_head.project_image.weight"),
    (transposed("text.text_projection"), "itc_head.project_text.weight"),
    *with_prefix("visual.", "image.", OPENAI_IMAGE),  # its last LayerNorm stands before two poolers
    ("visual.ln_post", "poolers.norm"),  # and behind one
    *with_prefix("visual.attn_pool.", "poolers.caption.", POOLER),
    *with_prefix("visual.attn_pool_contrastive.", "poolers.contrast.", POOLER),
    ("text.token_embedding", "text.embed.token"),
    (From(("text.positional_embedding",), lambda table: table[:-1]), "text.embed.position"),
    # [CLS] has the last position
    (From(("text.cls_emb", "text.positional_embedding"), lambda cls, table: cls + table[-1]), "text.class_token"),
    *with_prefix("text.transformer.resblocks.{n}.", "text.blocks.{n}.", OPENAI_LAYER),
    ("text.ln_final", "text.norm"),
    *with_prefix("text_decoder.resblocks.{n}.", "decoder.blocks.{n}.", SELF_LAYER),
    *with_prefix("text_decoder.cross_attn.{n}.", "decoder.blocks.{n}.", CROSS_LAYER),
    ("text_decoder.ln_final", "decoder.norm"),
    (transposed("text_decoder.text_projection"), "caption_head.decoder.weight"),
)

POOLINGS = {True: SinglePooling, "cascade": Pooling, "parallel": ParallelPooling}
# what open_clip takes where a file says nothing
POOLER_DEFAULTS = {"attn_pooler_queries": 256, "attn_pooler_heads": 8}
DECODER_DEFAULTS = {"context_length": 77, "width": 512, "heads": 8, "layers": 12}
# of `multimodal_cfg`, what open_clip does not read: poolers are described in `vision_cfg`, the vocabulary in `text_cfg`
NOT_READ = ("n_queries", "attn_pooler_heads", "dim_head", "mlp_ratio", "vocab_size", "embed_cls")


def open_clip_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> CoCaConfig:
    """From open_clip_config.json. The ids of its special tokens are those of CLIP's tokenizer: the last two.

    Raises UnsupportedModel for switches of open_clip that our model cannot express, CheckpointError for unknown ones.
    """
    top, image, text = open_clip_sections(settings)
    decoder = Section(f"{top.where}.multimodal_cfg", top("multimodal_cfg"), DECODER_DEFAULTS)
    image = Section(image.where, image.given, {**IMAGE_DEFAULTS, **POOLER_DEFAULTS})
    quick = top("quick_gelu")
    top.only("quick_gelu", False, True)
    top.only("custom_text", False, True)
    image.only("no_ln_pre", False, True)
    text.only("correct_cls_mask", False, True)
    refuse(top, TOP_SWITCHES, but=("custom_text", "multimodal_cfg"))
    refuse(image, IMAGE_SWITCHES, but=("attentional_pool",))
    refuse(text, {**TEXT_SWITCHES, "hf_tokenizer_name": ()}, but=("embed_cls",))
    refuse(decoder, {"ls_init_value": ()})
    needed(image, "attentional_pool", *POOLINGS)
    needed(text, "embed_cls", True)
    for key in ("tokenizer_kwargs", "tokenizer_mode", "eos_id"):
        text(key)  # read by `open_clip_inputs`; or for another `pool_type`
    image_block = open_clip_block(image, image.integer("width") // image.integer("head_width"), quick)
    block = open_clip_block(text, text.integer("heads"), quick)
    check_blocks(image_block, block, decoder, quick)
    if decoder.integer("context_length") < text.integer("context_length"):
        raise decoder.wrong("context_length", "at least that of 'text_cfg'")
    if top.integer("embed_dim") != block.width:
        raise top.wrong("embed_dim", f"the width of the text, {block.width}, which the decoder reads images with")
    vocabulary = text.integer("vocab_size")
    pooling = POOLINGS[image("attentional_pool")]
    config = CoCaConfig(
        ImageConfig(
            *image.image_and_patch_size(),
            image.integer("layers"),
            image_block,
            ln_pre=not image("no_ln_pre"),
            patch_bias=False,
        ),
        TextConfig(vocabulary, text.integer("context_length"), text.integer("layers"), block, causal=True),
        decoder.integer("layers"),
        top.integer("embed_dim"),
        pooling(image.integer("attn_pooler_queries"), image.integer("attn_pooler_heads")),
        tokens=SpecialTokens(text("pad_id") or 0, None, vocabulary - 1, None, None, vocabulary - 2, None),
        two_feeds=True,
        legacy_mask=not text("correct_cls_mask"),
    )
    for section in (top, image, text):
        section.finish(HARMLESS["open_clip"])
    decoder.finish((*HARMLESS["open_clip"], *NOT_READ))
    return config


def refuse(section: Section, switches: dict[str, tuple], but: tuple[str, ...] = ()) -> None:
    """Raises UnsupportedModel where one of these switches has another value than those that we can express."""
    for key, fine in switches.items():
        if key not in but:
            section.only(key, *fine)


def needed(section: Section, key: str, *allowed: Any) -> None:
    """As `Section.only`, for a switch that open_clip leaves off where the file says nothing."""
    section.only(key, *allowed)
    if section(key) is None:
        raise UnsupportedModel(f"{section.where}: {key!r} is missing; our model can express {shown(list(allowed))}")


def check_blocks(image: BlockConfig, text: BlockConfig, decoder: Section, quick_gelu: bool | None) -> None:
    """Raises UnsupportedModel where the multimodal half has other layers than the unimodal one, or poolers another
    LayerNorm: we have one `BlockConfig` for them, where open_clip has defaults that `text_cfg` does not change."""
    width, heads = decoder.integer("width"), decoder.integer("heads")
    open_clips = BlockConfig(width, heads, 4 * width, "quick_gelu" if quick_gelu else "gelu")
    if text != open_clips or image.norm_eps != text.norm_eps:
        raise UnsupportedModel(
            f"{decoder.where}: its layers are {open_clips}, those of 'text_cfg' {text}; ours are of one kind"
        )


RELEASES = (
    Release(
        key_prefix="text_decoder.",
        table=OPEN_CLIP,
        ignored=("*attn_mask",),
        config=open_clip_config,
        processor="CLIPImageProcessor",
        processor_settings=crop,
        tokenizer="openai/clip-vit-base-patch32",
        settings_file="open_clip_config.json",
        inputs=open_clip_inputs,
    ),
)
