"""A timm vision transformer in our own `ImageEncoder`: its sizes and its weights, translated and checked.

Axes: B batch, P patches, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minivlp.layers.embeddings import ImageConfig, PixelNormalization, pixel_change
from minivlp.layers.towers import ImageEncoder
from minivlp.layers.transformer import ACTIVATIONS, BlockConfig
from minivlp.weight_files import UnsupportedModel

VIT_LAYER = {  # our names of the parts of a block, and timm's
    "self_norm": "norm1",
    "self_attention.qkv": "attn.qkv",
    "self_attention.out": "attn.proj",
    "feed_norm": "norm2",
    "feed_forward.up": "mlp.fc1",
    "feed_forward.down": "mlp.fc2",
}
SCALED = {"self_attention.out": "ls1.gamma", "feed_forward.down": "ls2.gamma"}  # LayerScale's factors
POOLING = ("attn_pool.", "fc_norm.")  # what timm does with the tokens afterwards; we read the tokens themselves


def encoder_from_timm(model: nn.Module) -> ImageEncoder:
    """Our encoder with the weights of a timm vision transformer. It takes our pixels, in [-1, 1].

    Both are run on a random image, and their tokens compared. Raises UnsupportedModel where they differ, or where the
    model has parts that our encoder does not have; its message goes on after the model's name.
    """
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise UnsupportedModel("is no plain vision transformer")
    if model.cls_token is None or model.reg_token is not None:
        raise UnsupportedModel("has no class token" if model.cls_token is None else "has register tokens")
    if isinstance(model.norm, nn.Identity):
        raise UnsupportedModel("normalizes only the mean of its tokens")
    mean, std = pixel_statistics(model)
    try:
        encoder, (tensors, unused) = ImageEncoder(encoder_config(model)), translate(model, *pixel_change(mean, std))
        if unused:
            raise UnsupportedModel(f"has parts such as {min(unused)}")
        encoder.to(next(model.parameters())).load_state_dict(tensors)
    except (AttributeError, KeyError, RuntimeError) as error:
        raise UnsupportedModel(f"is built in another way ({error})") from None
    images = torch.rand(1, 3, *encoder.config.size).to(encoder.embed.class_token) * 2 - 1
    with torch.no_grad():
        ours, theirs = encoder.eval()(images), model.eval().forward_features(PixelNormalization(mean, std)(images))
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise UnsupportedModel("computes something else")
    return encoder


def pixel_statistics(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (3,) by which a timm model wants pixels of 0..1 to be normalized."""
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])


def encoder_config(model: Any) -> ImageConfig:
    """The sizes of a timm vision transformer. Raises UnsupportedModel for an activation that we do not have."""
    first, patches = model.blocks[0], model.patch_embed
    hidden, width = first.mlp.fc1.weight.shape
    x = torch.linspace(-4, 4, 99)
    same = [name for name, ours in ACTIVATIONS.items() if torch.allclose(ours(x.clone()), first.mlp.act(x.clone()))]
    if not same:
        raise UnsupportedModel(f"has the activation {first.mlp.act}")
    if len(set(patches.patch_size)) > 1:
        raise UnsupportedModel(f"has patches of {patches.patch_size} pixels, which are not square")
    block = BlockConfig(width, first.attn.num_heads, hidden, same[0], model.norm.eps)
    return ImageConfig(
        one_or_two(*patches.img_size),
        patches.patch_size[0],
        len(model.blocks),
        block,
        ln_pre=not isinstance(model.norm_pre, nn.Identity),
    )


def one_or_two(height: int, width: int) -> int | tuple[int, int]:
    """`ImageConfig.image_size`: one number for square images."""
    return height if height == width else (height, width)


def translate(model: Any, scale: Tensor, shift: Tensor) -> tuple[dict[str, Tensor], set[str]]:
    """timm's weights under our names, and the names of those that have no counterpart.

    LayerScale multiplies what a residual branch adds: the last matrix of the branch takes that factor in. Likewise the
    patch projection takes in the change of the pixels, `images * scale + shift`, (3,) each.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(POOLING)}
    ours: dict[str, Tensor] = {}

    def move(own: str, theirs: str, gain: Tensor | None = None) -> None:
        weight = state.pop(f"{theirs}.weight")
        bias = state.pop(f"{theirs}.bias", weight.new_zeros(len(weight)))
        ours[f"{own}.weight"] = weight if gain is None else gain[:, None] * weight
        ours[f"{own}.bias"] = bias if gain is None else gain * bias

    move("embed.patches.project", "patch_embed.proj")
    weight = ours["embed.patches.project.weight"]  # (D, 3, patch, patch)
    scale, shift = (x.to(weight)[:, None, None] for x in (scale, shift))
    ours["embed.patches.project.weight"] = weight * scale
    ours["embed.patches.project.bias"] = ours["embed.patches.project.bias"] + (weight * shift).sum(dim=(1, 2, 3))
    ours["embed.class_token"], positions = state.pop("cls_token")[0, 0], state.pop("pos_embed")[0]
    if model.no_embed_class:
        positions = torch.cat([torch.zeros_like(positions[:1]), positions])
    ours["embed.class_position"], ours["embed.positions"] = positions[0], positions[1:]
    move("norm", "norm")
    if not isinstance(model.norm_pre, nn.Identity):
        move("embed.ln_pre", "norm_pre")
    for n in range(len(model.blocks)):
        for own, theirs in VIT_LAYER.items():
            gain = state.pop(f"blocks.{n}.{SCALED[own]}", None) if own in SCALED else None
            move(f"blocks.{n}.{own}", f"blocks.{n}.{theirs}", gain)
    return ours, set(state)
