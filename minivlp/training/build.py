"""The model of a training run: a recipe's, one that goes on from a checkpoint, or one with an image tower from timm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minivlp.errors import UserError
from minivlp.layers.timm_tower import timm_tower
from minivlp.training.checkpoint import load_model
from minivlp.training.recipes import Recipe

DOWNLOAD = "pretrained"


def build_model(
    model_class: type,
    recipe: Recipe,
    tokenizer: Any,
    *,
    init_from: Path | str | None = None,
    tower: str | None = None,
    tower_weights: Path | str | None = None,
    frozen: bool = False,
) -> nn.Module:
    """The model to be trained.

    Args:
        model_class, recipe, tokenizer: as in `Recipe.build`.
        init_from: a checkpoint of this class, from which all weights and the config are taken; not the recipe's.
        tower: name of one of timm's image models, which becomes the image tower; the rest is random.
        tower_weights: its weights, a file or "pretrained" to download timm's; None is random.
        frozen: the image tower is not trained.

    Raises UserError for options that exclude each other, for a model without an image tower of its own, and as
    `Recipe.build`, `load_model` and `timm_tower` do.
    """
    if (tower or frozen) and not has_image_tower(model_class):
        message = f"{model_class.__name__} has no image tower of its own to exchange or to freeze."
        raise UserError(message, "Leave out {}.", "tower" if tower else "frozen")
    if tower_weights and not tower:
        raise UserError("weights of a tower need the name of the tower.", "Name it with {}.", "tower")
    if tower and init_from:
        raise UserError("a checkpoint brings its own image tower.", "Leave out the checkpoint or {}.", "tower")
    if init_from:
        model = load_model(model_class, init_from)
    elif tower:
        model = with_timm_tower(model_class, recipe, tokenizer, tower, tower_weights)
    else:
        model = recipe.build(model_class, tokenizer)
    if frozen:
        model.image.requires_grad_(False)
    return model


def with_timm_tower(
    model_class: type, recipe: Recipe, tokenizer: Any, name: str, weights: Path | str | None
) -> nn.Module:
    """A model of this recipe with timm's image model `name` as its tower; `weights` as in `build_model`."""
    download = weights == DOWNLOAD
    tower = timm_tower(name, None if download else weights, pretrained=download)
    recipe = replace(recipe, init_from=None, frozen=(), config={**recipe.config, "image": tower.config})
    model = recipe.build(model_class, tokenizer)
    model.image.load_state_dict(tower.state_dict())
    if getattr(model, "momentum_model", None) is not None:
        model.momentum_model.copy_from(model)
    return model


def has_image_tower(model_class: type) -> bool:
    """Whether models of this class have an image tower, `image`, apart from all else (single streams have none)."""
    with torch.device("meta"):
        return hasattr(model_class(model_class.Config.nano()), "image")
