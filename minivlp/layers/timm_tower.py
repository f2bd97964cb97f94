"""Pre-trained image towers from timm: a vision transformer in our own encoder, any other model by its feature map.

    timm_tower("vit_small_patch16_224", weights="vit_small.safetensors")   an ImageEncoder: blocks, attention maps, all
    timm_tower("convnext_tiny")                                             a FeatureTower: the map's places are patches

Both take our images, in [-1, 1]; how the model wants its pixels is taken care of inside. timm itself is imported when a
tower is made. Axes: B batch, P patches = rows * columns, D width.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.layers.block import ACTIVATIONS, BlockConfig
from minivlp.layers.encoders import ImageConfig, ImageEncoder


@dataclass(frozen=True)
class TimmConfig(ImageConfig):
    """The feature map of the timm model `name`. `patch_size`: pixels to a place of the map; of `block` and `layers`
    only the width means something. mean, std: how the model wants pixels of 0..1 to be normalised."""

    name: str = ""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


class FeatureTower(nn.Module):
    """images (B, 3, H, W) -> tokens (B, 1+P, D): the class token if the model has one, else the mean, then the map."""

    def __init__(self, config: TimmConfig, model: nn.Module | None = None) -> None:
        """`model`: one that was opened already; None makes one with random weights."""
        super().__init__()
        self.config = config
        self.model = open_timm(config.name) if model is None else model
        scale, shift = pixel_change(config.mean, config.std)
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        first, patches = feature_map(self.model, images * self.scale + self.shift)
        return torch.cat([first, patches.flatten(1, 2)], dim=1)  # (B, 1+P, D)


def image_tower(config: ImageConfig) -> nn.Module:
    """The tower of a config, with random weights: ours, or a timm model's feature map."""
    return FeatureTower(config) if isinstance(config, TimmConfig) else ImageEncoder(config)


def timm_tower(
    name: str, weights: Path | str | None = None, *, pretrained: bool = False
) -> ImageEncoder | FeatureTower:
    """The timm model `name` as a tower: in our encoder where that can express it, else by its feature map.

    weights: a file that timm wrote or published, .safetensors or .pth (of which only tensors are read). pretrained:
    fetch them from the model hub. Neither: random. Raises ValueError for an unknown name or weights that do not fit,
    FileNotFoundError where there is no file or no hub.
    """
    model = open_timm(name, weights, pretrained)
    try:
        return as_encoder(model)
    except BeyondUs:
        return feature_tower(name, model)


def from_timm(name: str, weights: Path | str | None = None, *, pretrained: bool = False) -> ImageEncoder:
    """As `timm_tower`, but always our own encoder. Raises ValueError, saying why, where it cannot express the model."""
    try:
        return as_encoder(open_timm(name, weights, pretrained))
    except BeyondUs as problem:
        raise ValueError(
            f"{name} {problem}, which ImageEncoder cannot express: timm_tower takes its feature map"
        ) from None


def open_timm(name: str, weights: Path | str | None = None, pretrained: bool = False) -> nn.Module:
    """timm's own model without its classifier, in evaluation mode; arguments and errors as in `timm_tower`."""
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4)
        raise ValueError(f"timm has no model {name!r}{'; did you mean ' if near else ''}{', '.join(near)}")
    overlay: dict[str, Any] = {"classifier": None}  # strict: every weight must be there
    if weights is not None:
        heads = timm.get_pretrained_cfg(name).classifier or ()
        heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        tensors = {key: tensor for key, tensor in read_weights(weights).items() if not key.startswith(heads)}
        overlay |= {"state_dict": tensors, "custom_load": False}
    how = {"pretrained": True, "pretrained_cfg_overlay": overlay} if weights is not None else {"pretrained": pretrained}
    try:
        return timm.create_model(name, num_classes=0, **how).eval()
    except Exception as error:  # which ones, depends on the network library underneath
        if weights is not None:
            raise ValueError(f"{weights} does not fit timm's {name}: {error}") from None
        if pretrained:
            remedy = "download the file where there is a network, and give it as weights"
            raise FileNotFoundError(f"no pretrained weights of {name} to be had ({error}): {remedy}") from None
        raise


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or a torch file, from which no code is run."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a file of tensors alone: {str(error).splitlines()[0]}") from None
    for wrapper in ("state_dict", "model"):
        found = found.get(wrapper, found)
    return found


def pixel_change(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """scale and shift (3,) that bring pixels in [-1, 1] to what `mean` and `std` make of pixels in 0..1."""
    mean_, std_ = torch.tensor(mean), torch.tensor(std)
    return 0.5 / std_, (0.5 - mean_) / std_


# ---- any model, by its feature map -----------------------------------------------------------------------------------


def feature_map(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The first token (B, 1, D) and the map (B, rows, columns, D) of a timm model."""
    features = model.forward_features(images)
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise ValueError(f"{type(model).__name__} of timm has no single feature map: choose another model")
    if features.ndim == 4:
        patches = features if getattr(model, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
        return patches.mean(dim=(1, 2))[:, None], patches
    prefix = getattr(model, "num_prefix_tokens", 0)  # class token, then registers
    flat = features[:, prefix:]
    rows = round(flat.shape[1] ** 0.5 * (images.shape[2] / images.shape[3]) ** 0.5)
    has_class = getattr(model, "cls_token", None) is not None
    first = features[:, :1] if has_class else flat.mean(dim=1, keepdim=True)
    return first, flat.unflatten(1, (rows, -1))  # (B, P, D) -> (B, rows, columns, D)


def feature_tower(name: str, model: nn.Module) -> FeatureTower:
    """The model with what its feature map looks like, found by asking it once."""
    told, weight = model.pretrained_cfg, next(model.parameters())
    size = told["input_size"][-1]
    with torch.no_grad():
        _, patches = feature_map(model, torch.zeros(1, 3, size, size).to(weight))
    rows, columns, width = patches.shape[1:]
    if rows != columns or size % rows:
        raise ValueError(f"{name} makes a map of {rows} x {columns} from {size} pixels: choose a model that divides it")
    block = BlockConfig(width, heads=1, hidden=width)
    config = TimmConfig(size, size // rows, 0, block, name=name, mean=tuple(told["mean"]), std=tuple(told["std"]))
    return FeatureTower(config, model)


# ---- vision transformers, in our own encoder -------------------------------------------------------------------------

_LAYER = {
    "self_norm": "norm1",
    "self_attention.qkv": "attn.qkv",
    "self_attention.out": "attn.proj",
    "feed_norm": "norm2",
    "feed_forward.up": "mlp.fc1",
    "feed_forward.down": "mlp.fc2",
}
_SCALED = {"self_attention.out": "ls1.gamma", "feed_forward.down": "ls2.gamma"}  # LayerScale's factors
_AFTER = ("attn_pool.", "fc_norm.")  # how timm pools the tokens, which is not our business


class BeyondUs(ValueError):
    """What keeps a timm model out of our encoder, in words that follow its name."""


def as_encoder(model: nn.Module) -> ImageEncoder:
    """Our encoder with the weights of a timm vision transformer, proven on one picture. Raises BeyondUs."""
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise BeyondUs("is no plain vision transformer")
    if model.cls_token is None or model.reg_token is not None:
        raise BeyondUs("has no class token" if model.cls_token is None else "has register tokens")
    if isinstance(model.norm, nn.Identity):
        raise BeyondUs("normalises only the mean of its tokens")
    try:
        encoder, (tensors, unused) = ImageEncoder(_config(model)), _translate(model)
        if unused:
            raise BeyondUs(f"has parts such as {min(unused)}")
        encoder.to(next(model.parameters())).load_state_dict(tensors)
    except (AttributeError, KeyError, RuntimeError) as error:
        raise BeyondUs(f"is built otherwise ({error})") from None
    scale, shift = (x.to(encoder.class_token)[:, None, None] for x in _pixel_change(model))
    picture = torch.rand(1, 3, encoder.config.image_size, encoder.config.image_size).to(scale) * 2 - 1
    with torch.no_grad():
        ours, theirs = encoder.eval()(picture), model.eval().forward_features(picture * scale + shift)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise BeyondUs("computes something else")
    return encoder


def _config(model: Any) -> ImageConfig:
    first = model.blocks[0]
    hidden, width = first.mlp.fc1.weight.shape
    x = torch.linspace(-4, 4, 99)
    same = [name for name, ours in ACTIVATIONS.items() if torch.allclose(ours(x.clone()), first.mlp.act(x.clone()))]
    if not same:
        raise BeyondUs(f"has the activation {first.mlp.act}")
    block = BlockConfig(width, first.attn.num_heads, hidden, same[0], model.norm.eps)
    size, patch = model.patch_embed.img_size[0], model.patch_embed.patch_size[0]
    return ImageConfig(size, patch, len(model.blocks), block, norm_before=not isinstance(model.norm_pre, nn.Identity))


def _translate(model: Any) -> tuple[dict[str, Tensor], set[str]]:
    """timm's weights under our names, and the names of those that have no place with us.

    LayerScale multiplies what a branch adds, which the branch's last matrix can do itself; likewise the first matrix
    normalises the pixels.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_AFTER)}
    ours: dict[str, Tensor] = {}

    def move(own: str, theirs: str, gain: Tensor | None = None) -> None:
        weight = state.pop(f"{theirs}.weight")
        bias = state.pop(f"{theirs}.bias", weight.new_zeros(len(weight)))
        ours[f"{own}.weight"] = weight if gain is None else gain[:, None] * weight
        ours[f"{own}.bias"] = bias if gain is None else gain * bias

    move("patches.project", "patch_embed.proj")
    weight = ours["patches.project.weight"]  # (D, 3, patch, patch)
    scale, shift = (x.to(weight)[:, None, None] for x in _pixel_change(model))
    ours["patches.project.weight"] = weight * scale
    ours["patches.project.bias"] = ours["patches.project.bias"] + (weight * shift).sum(dim=(1, 2, 3))
    ours["class_token"], positions = state.pop("cls_token")[0, 0], state.pop("pos_embed")[0]
    if model.no_embed_class:
        ours["class_position"], ours["positions"] = torch.zeros_like(positions[0]), positions
    else:
        ours["class_position"], ours["positions"] = positions[0], positions[1:]
    move("norm", "norm")
    if not isinstance(model.norm_pre, nn.Identity):
        move("norm_before", "norm_pre")
    for n in range(len(model.blocks)):
        for own, theirs in _LAYER.items():
            gain = state.pop(f"blocks.{n}.{_SCALED[own]}", None) if own in _SCALED else None
            move(f"blocks.{n}.{own}", f"blocks.{n}.{theirs}", gain)
    return ours, set(state)


def _pixel_change(model: Any) -> tuple[Tensor, Tensor]:
    return pixel_change(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
