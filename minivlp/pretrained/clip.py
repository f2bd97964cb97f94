"""CLIP's releases: transformers' (`openai/clip-vit-base-patch32`), and OpenAI's own names, which open_clip kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.transformer import BlockConfig
from minivlp.models.clip import CLIPConfig
from minivlp.pretrained.keys import Inputs, Release, Size, first, rest, scalar, transposed, with_prefix
from minivlp.pretrained.parts import CLIP_LAYER, crop, transformers_block
from minivlp.pretrained.preprocess import from_open_clip
from minivlp.pretrained.settings import HARMLESS, Section, shown, transformers_sections
from minivlp.weight_files import UnsupportedModel

TRANSFORMERS_IMAGE = (
    ("embeddings.patch_embedding", "embed.patches.project"),
    ("embeddings.class_embedding", "embed.class_token"),
    (first("embeddings.position_embedding.weight"), "embed.class_position"),
    (rest("embeddings.position_embedding.weight"), "embed.positions"),
    ("pre_layrnorm", "embed.ln_pre"),
    *with_prefix("encoder.layers.{n}.", "blocks.{n}.", CLIP_LAYER),
    ("post_layernorm", "norm"),
)
TRANSFORMERS = (
    ("logit_scale", "itc_head.scale.log_scale"),
    ("visual_projection", "itc_head.project_image"),
    ("text_projection", "itc_head.project_text"),
    *with_prefix("vision_model.", "image.", TRANSFORMERS_IMAGE),
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
    ("ls_1.gamma", "attention_scale.factor"),
    ("ls_2.gamma", "feed_scale.factor"),
)
OPENAI_IMAGE = (
    ("conv1", "embed.patches.project"),
    ("class_embedding", "embed.class_token"),
    (first("positional_embedding"), "embed.class_position"),
    (rest("positional_embedding"), "embed.positions"),
    ("ln_pre", "embed.ln_pre"),
    *with_prefix("transformer.resblocks.{n}.", "blocks.{n}.", OPENAI_LAYER),
    ("ln_post", "norm"),
)
OPENAI = (
    (scalar("logit_scale"), "itc_head.scale.log_scale"),
    (transposed("visual.proj"), "itc_head.project_image.weight"),
    (transposed("text_projection"), "itc_head.project_text.weight"),
    *with_prefix("visual.", "image.", OPENAI_IMAGE),
    ("token_embedding", "text.embed.token"),
    ("positional_embedding", "text.embed.position"),
    *with_prefix("transformer.resblocks.{n}.", "text.blocks.{n}.", OPENAI_LAYER),
    ("ln_final", "text.norm"),
)


# what open_clip takes where a file says nothing
IMAGE_DEFAULTS = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
TEXT_DEFAULTS = {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0, "eos_id": 2,
}  # fmt: skip
# switches of open_clip's towers that change what they compute, and the values at which they compute what ours do
BLOCK_SWITCHES = {
    "block_type": ("default",),
    **{
        name: (False,)
        for name in ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    },
}
IMAGE_SWITCHES = {
    "timm_model_name": (),
    "attentional_pool": (False,),
    "global_average_pool": (False,),
    "input_patchnorm": (False,),
    "pool_type": ("tok",),
    **BLOCK_SWITCHES,
}
TEXT_SWITCHES = {
    "hf_model_name": (),
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "pool_type": ("argmax", "eos"),
    "proj_type": ("linear",),
    "proj_bias": (False,),
    **BLOCK_SWITCHES,
}
TOP_SWITCHES = {"custom_text": (False,), "init_logit_bias": (), "multimodal_cfg": ()}


def transformers_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> CLIPConfig:
    """From transformers' config.json. Raises CheckpointError for settings that we do not know or cannot express."""
    top, image, text = sections = transformers_sections("CLIPConfig", settings, "vision_config", "text_config")
    image.only("num_channels", 3)
    config = CLIPConfig(
        ImageConfig(
            *image.image_and_patch_size(),
            image.integer("num_hidden_layers"),
            transformers_block(image),
            ln_pre=True,
            patch_bias=False,
        ),
        TextConfig(
            text.integer("vocab_size"),
            text.integer("max_position_embeddings"),
            text.integer("num_hidden_layers"),
            transformers_block(text),
            causal=True,
        ),
        top.integer("projection_dim"),
    )
    for section in sections:
        section.finish(HARMLESS["transformers"])
    return config


def openai_config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> CLIPConfig:
    """From open_clip_config.json, whose towers have to be the paper's ViT and text transformer.

    Raises UnsupportedModel for switches of open_clip that our model cannot express, CheckpointError for unknown ones.
    """
    top, image, text = open_clip_sections(settings)
    quick = top("quick_gelu")
    top.only("quick_gelu", False, True)
    for section, switches in ((top, TOP_SWITCHES), (image, IMAGE_SWITCHES), (text, TEXT_SWITCHES)):
        for key, fine in switches.items():
            section.only(key, *fine)
    for key in ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "eos_id"):
        text(key)  # read by `open_clip_inputs`
    width, head_width = image.integer("width"), image.integer("head_width")
    image.only("no_ln_pre", False, True)
    config = CLIPConfig(
        ImageConfig(
            *image.image_and_patch_size(),
            image.integer("layers"),
            open_clip_block(image, width // head_width, quick),
            ln_pre=not image("no_ln_pre"),
            patch_bias=False,
        ),
        TextConfig(
            text.integer("vocab_size"),
            text.integer("context_length"),
            text.integer("layers"),
            open_clip_block(text, text.integer("heads"), quick),
            causal=True,
        ),
        top.integer("embed_dim"),
    )
    for section in (top, image, text):
        section.finish(HARMLESS["open_clip"])
    return config


def open_clip_sections(settings: dict[str, Any]) -> tuple[Section, Section, Section]:
    """`model_cfg` and, in it, `vision_cfg` and `text_cfg`."""
    file = Section("open_clip_config.json", settings)
    where, model = "open_clip_config.json, model_cfg", file("model_cfg")
    file("preprocess_cfg")  # read by `open_clip_inputs`
    file.finish(())
    top = Section(where, model)
    image = Section(f"{where}.vision_cfg", top("vision_cfg"), IMAGE_DEFAULTS)
    return top, image, Section(f"{where}.text_cfg", top("text_cfg"), TEXT_DEFAULTS)


def open_clip_block(section: Section, heads: int, quick_gelu: bool | None) -> BlockConfig:
    """The blocks of one of open_clip's towers."""
    width, scale = section.integer("width"), section("ls_init_value")
    if heads < 1 or width % heads:
        raise section.wrong("width", f"a multiple of its {heads} heads")
    activation, norm = (Section(f"{section.where}.{key}", section(key) or {}) for key in ("act_kwargs", "norm_kwargs"))
    activation.only("approximate", *(("none",) if quick_gelu else ("none", "tanh")))
    gelu = "gelu_tanh" if activation("approximate") == "tanh" else "gelu"
    epsilon = norm.number("eps") if "eps" in norm.given else 1e-5
    for part in (activation, norm):
        part.finish(())
    return BlockConfig(
        width,
        heads,
        int(section.number("mlp_ratio") * width),
        "quick_gelu" if quick_gelu else gelu,
        epsilon,
        layer_scale=None if scale is None else section.number("ls_init_value"),
    )


def open_clip_inputs(settings: dict[str, Any], size: Size) -> Inputs:
    """What open_clip_config.json says of texts and pictures. Raises CheckpointError for what we do not know."""
    _, _, text = open_clip_sections(settings)
    for key in ("tokenizer_kwargs", "tokenizer_mode"):
        if text(key):
            raise UnsupportedModel(
                f"{text.where}: {key!r} is {shown(text(key))}, which changes the texts before they are tokenized; we "
                "cannot. Remove it from the file if you tokenize the texts yourself"
            )
    end = text.integer("eos_id") if text("pool_type") == "eos" else None
    told = settings.get("preprocess_cfg")
    return Inputs(text("hf_tokenizer_name"), end, None if told is None else from_open_clip(told, size))


FROM_TRANSFORMERS = Release(
    key_prefix="vision_model.",
    table=TRANSFORMERS,
    ignored=("*.position_ids",),
    config=transformers_config,
    processor="CLIPImageProcessor",
    processor_settings=crop,
    tokenizer="openai/clip-vit-base-patch32",
    settings_file="config.json",
)
RELEASES = (
    FROM_TRANSFORMERS,
    replace(
        FROM_TRANSFORMERS,
        key_prefix="visual.",
        table=OPENAI,
        config=openai_config,
        settings_file="open_clip_config.json",
        inputs=open_clip_inputs,
        ignored=("input_resolution", "context_length", "vocab_size", "attn_mask"),
    ),
)
