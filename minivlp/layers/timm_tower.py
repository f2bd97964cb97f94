"""Pre-trained image towers from timm: a vision transformer in our own encoder, any other model by its feature map.

    timm_tower("vit_small_patch16_224", weights="vit_small.safetensors")   an ImageEncoder: blocks, attention maps
    timm_tower("convnext_tiny")                                            a FeatureTower: places of the map are patches

Both take our images, in [-1, 1], and change them to the pixels that the model was trained on. timm itself is imported
when a tower is made. Axes: B batch, P patches = rows * columns, D width.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.layers.attention import Rows, select
from minivlp.layers.embeddings import ImageConfig, PixelNormalization
from minivlp.layers.timm_weights import UnsupportedModel, encoder_from_timm, one_or_two, pixel_statistics
from minivlp.layers.towers import ImageEncoder
from minivlp.layers.transformer import BlockConfig
from minivlp.weight_files import CheckpointError, grouped, read_weights, suggestion

KEY_ERRORS = ("Missing", "Unexpected")  # torch's words for names that a model needs, and that it does not have


@dataclass(frozen=True)
class TimmConfig(ImageConfig):
    """The feature map of the timm model `name`.

    patch_size: pixels to a place of the map. Of `block` only the width is meaningful, `layers` is 0. mean, std: how the
    model wants pixels of 0..1 to be normalized.
    """

    name: str = ""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


class FeatureTower(nn.Module):
    """images (B, 3, H, W) -> tokens (B, 1+P, D): the class token if the model has one, else the mean, then the map.

    `model`: one that was opened already; None makes one with random weights.
    """

    def __init__(self, config: TimmConfig, model: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = open_timm(config.name) if model is None else model
        self.normalize: nn.Module = PixelNormalization(config.mean, config.std)

    def block_matrices(self) -> Iterator[tuple[nn.Parameter, int]]:
        """The matrices of timm's blocks, and how many projections each stacks (for the optimizer)."""
        stacked = {"qkv": 3, "kv": 2}
        for name, layer in self.model.named_modules():
            if isinstance(layer, nn.Linear) and "blocks." in name:
                yield layer.weight, stacked.get(name.rpartition(".")[2], 1)

    def forward(self, images: Tensor, rows: Rows | None = None) -> Tensor:
        """`rows`: which tokens are returned; all of them are computed."""
        first, patches = feature_map(self.model, self.normalize(images))
        tokens = torch.cat([first, patches.flatten(1, 2)], dim=1)  # (B, 1+P, D)
        return tokens if rows is None else select(tokens, rows)


def image_tower(config: ImageConfig) -> nn.Module:
    """The tower of a config, with random weights: ours, or a timm model's feature map."""
    return FeatureTower(config) if isinstance(config, TimmConfig) else ImageEncoder(config)


def timm_tower(
    name: str, weights: Path | str | None = None, *, pretrained: bool = False, weight_set: str | None = None
) -> ImageEncoder | FeatureTower:
    """The timm model `name` as a tower: in our encoder where that can express it, else by its feature map.

    weights: a file that timm wrote or published, .safetensors or .pth (of which only tensors are read), or a training
    script's, from which prefixes such as `module.` are taken off. weight_set: which set of weights of such a file, as
    "model_ema". pretrained: download them from the model hub. Neither: random. Raises ValueError for an unknown name or
    weights that do not fit, FileNotFoundError where there is no file or no hub.
    """
    model = open_timm(name, weights, pretrained, weight_set)
    try:
        return encoder_from_timm(model)
    except UnsupportedModel:
        return feature_tower(name, model)


def from_timm(
    name: str, weights: Path | str | None = None, *, pretrained: bool = False, weight_set: str | None = None
) -> ImageEncoder:
    """As `timm_tower`, but always our own encoder. Raises ValueError, saying why, where it cannot express the model."""
    try:
        return encoder_from_timm(open_timm(name, weights, pretrained, weight_set))
    except UnsupportedModel as problem:
        raise ValueError(
            f"{name} {problem}, which ImageEncoder cannot express: timm_tower takes its feature map"
        ) from None


def open_timm(
    name: str, weights: Path | str | None = None, pretrained: bool = False, weight_set: str | None = None
) -> nn.Module:
    """timm's own model without its classifier, in evaluation mode; arguments and errors as in `timm_tower`."""
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4)
        raise ValueError(f"timm has no model {name!r}{'; did you mean ' if near else ''}{', '.join(near)}")
    overlay: dict[str, Any] = {"classifier": None}  # strict: every weight must be there
    if weights is not None:
        heads = timm.get_pretrained_cfg(name).classifier or ()
        heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        path = Path(weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}{suggestion(path)}")
        found = read_weights(path, weight_set)
        tensors = {key: tensor for key, tensor in found.items() if not key.startswith(heads)}
        overlay |= {"state_dict": tensors, "custom_load": False}
    source = {"pretrained": pretrained}
    if weights is not None:
        source = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        return timm.create_model(name, num_classes=0, **source).eval()
    except Exception as error:  # its class depends on the network library underneath
        if weights is not None:
            raise CheckpointError(f"{weights} does not fit timm's {name}: {what_does_not_fit(error)}") from None
        if pretrained:
            remedy = "download the file where there is a network, and give it as weights"
            raise FileNotFoundError(f"cannot download the pretrained weights of {name} ({error}): {remedy}") from None
        raise


def what_does_not_fit(error: Exception) -> str:
    """torch's list of names that do not fit, which may be of hundreds, in groups."""
    parts = []
    for kind in KEY_ERRORS:
        if found := re.search(rf"{kind} key\(s\) in state_dict: (.*?)\. ?$", str(error), re.MULTILINE):
            parts.append(kind.lower() + ": " + grouped(re.findall('"(.+?)"', found[1])))
    parts += [line.strip() for line in str(error).splitlines() if "size mismatch" in line][:3]
    return "; ".join(parts) or (str(error).splitlines() or [type(error).__name__])[0]


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
    """The feature map of a timm model; its shape is found by running the model once.

    Raises ValueError where the map does not divide the image into square patches.
    """
    height, width = model.pretrained_cfg["input_size"][1:]
    with torch.no_grad():
        _, patches = feature_map(model, torch.zeros(1, 3, height, width).to(next(model.parameters())))
    rows, columns, channels = patches.shape[1:]
    patch = height // rows
    if (rows * patch, columns * patch) != (height, width):
        raise ValueError(
            f"{name} makes a map of {rows} x {columns} from {height} x {width} pixels: choose a model "
            "whose map divides the image into square patches"
        )
    mean, std = pixel_statistics(model)
    block = BlockConfig(channels, heads=1, hidden=channels)
    config = TimmConfig(one_or_two(height, width), patch, 0, block, name=name, mean=mean, std=std)
    return FeatureTower(config, model)
