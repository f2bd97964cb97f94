"""Maps of attention: where a token looks, on the grid of patches. Whether they are right: `evaluation.grounding`.

Every function takes the maps that `record_attention` hands out and reads the number of layers, heads, tokens and
patches off their shapes. Axes: B batch, L text tokens, P patches, N tokens that look at each other, H heads, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.asking import evaluating
from minivlp.layers.attention import record_attention


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """How much of each input token reaches each output token through all layers: (B, N, N), rows sum to one.

    `maps`: self-attention of one tower from the first layer to the last, (B, H, N, N) each. Heads are averaged; half of
    every layer is the identity, since the residual passes a token on untouched. Source: Abnar and Zuidema 2020,
    "Quantifying attention flow in transformers" (section 3).
    """
    if not maps:
        raise ValueError("No maps to roll out: run the model inside `with record_attention(model) as maps:`.")
    if any(weights.shape[-1] != weights.shape[-2] for weights in maps):
        raise ValueError("Roll-out follows self-attention only: a cross-attention's rows and columns differ.")
    joint = torch.eye(maps[0].shape[-1], device=maps[0].device)
    for weights in maps:
        layer = weights.detach().float().mean(1)  # (B, N, N)
        joint = (layer + torch.eye(layer.shape[-1], device=layer.device)) / 2 @ joint
    return joint


def cls_map(weights: Tensor) -> Tensor:
    """What the class token looks at: (B, H, 1+P, 1+P), or (B, 1+P, 1+P) as `rollout` gives it -> (B, P), sums one.

    Heads are averaged (pick one with `weights[:, [h]]`); the class token's look at itself is left out.
    """
    rows = weights.detach().float()
    rows = rows.mean(1) if rows.dim() == 4 else rows  # (B, 1+P, 1+P)
    patches = rows[:, 0, 1:]  # (B, P)
    return patches / patches.sum(-1, keepdim=True)


def grad_cam(model: nn.Module, score: Callable[[], Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Attention that speaks for a score: weights times the positive part of the score's gradient, averaged over heads.

    `score` runs the model and returns one number per row, such as `lambda: model.match(images, ids, mask)`. `names`:
    which maps, as `record_attention` names them (`fusion.1.cross`). Returns (B, L, K) by name; values are not negative
    and have no fixed sum. Sources: Selvaraju et al. 2017 (Grad-CAM); Li et al. 2021 (ALBEF, section 6.2) for attention.

    Raises KeyError for a name that is not there, ValueError for a map that the score does not depend on.
    """
    training = model.training
    model.eval()
    try:
        with torch.enable_grad(), record_attention(model) as maps:
            total = score().sum()
    finally:
        model.train(training)
    for name in names:
        if name not in maps:
            raise KeyError(f"No attention map {name!r}; this pass left {', '.join(maps) or 'none'}.")
        if not maps[name].requires_grad:
            raise ValueError(f"{name} carries no gradient: call without torch.no_grad, with weights that require one.")
    slopes = torch.autograd.grad(total, [maps[name] for name in names], allow_unused=True)
    for name, slope in zip(names, slopes, strict=True):
        if slope is None:
            raise ValueError(f"The score does not depend on {name}: look at a map that lies on its way.")
    return {
        name: (maps[name] * slope.clamp(min=0)).mean(1).detach().float()
        for name, slope in zip(names, slopes, strict=True)
    }


def word_patch_attention(maps: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """How much each of `length` text tokens looks at each patch: (B, H, L, P) by name, from first layer to last.

    `maps` is what `record_attention` filled: either cross-attention (`fusion.1.cross`, (B, H, L, 1+P)), or attention of
    one stream in which words stand before the image's class token and patches (`joint.1.self`, (B, H, L+1+P, L+1+P)).
    The class token is left out, so rows sum to less than one. Empty where words and patches never meet.
    """

    def layers(ending: str) -> list[str]:
        found = {name: re.search(rf"(\d+)\.{ending}$", name) for name in maps}
        return sorted((name for name, match in found.items() if match), key=lambda name: int(found[name][1]))

    if crossing := layers("cross"):
        return {name: maps[name][..., 1:] for name in crossing}
    return {name: maps[name][:, :, :length, length + 1 :] for name in layers("self") if name.startswith("joint.")}


def writing_attention(model: nn.Module, images: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Where a decoder looks at the moment it writes each token of a text: (B, H, L, P) by layer, first to last.

    The text (ids, mask (B, L)) is given, not written anew (teacher forcing). Token t is read off what stands at t - 1,
    which has seen the words up to there: row t holds that look, and row 0, which nobody writes, is zero. The image's
    class token is left out, so rows sum to less than one. Needs `caption_logprob`, which BLIP has.
    """
    with evaluating(model), record_attention(model) as maps:
        model.caption_logprob(images, ids, mask)
    looks = word_patch_attention(maps, ids.shape[1])
    return {name: F.pad(weights[:, :, :-1], (0, 0, 1, 0)) for name, weights in looks.items()}


def word_patch_similarity(model: nn.Module, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cosine of every word with every patch in the joint space: images (B, 3, H, W), ids, mask (B, L) -> (B, L, P).

    Needs `project_image` and `project_text`, the maps into the joint space. A dual encoder is trained on the class
    token and on the last word alone: its patches and other words were never asked to agree, so expect a rough picture.
    Words that are padding get zeros. Source of the idea: Yao et al. 2022 (FILIP, section 3.2), which trains for it.
    """
    if not (hasattr(model, "project_image") and hasattr(model, "project_text")):
        raise TypeError(f"{type(model).__name__} has no joint space for words and patches: use its cross-attention.")
    with torch.no_grad():
        patches = F.normalize(model.project_image(model.encode_image(images)[:, 1:]), dim=-1)  # (B, P, E)
        words = F.normalize(model.project_text(model.encode_text(ids, mask)), dim=-1)  # (B, L, E)
        return (words @ patches.transpose(1, 2) * mask[..., None]).float()  # (B, L, P)


def to_grid(weights: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Weights over patches (…, P) as a picture (…, rows, columns). `grid` is (rows, columns); a square if not given."""
    patches = weights.shape[-1]
    rows, columns = grid or (math.isqrt(patches), math.isqrt(patches))
    if rows * columns != patches:
        raise ValueError(
            f"{patches} patches do not fill a grid of {rows} x {columns}: "
            "drop the class token (`weights[..., 1:]`), or give grid=(rows, columns)."
        )
    return weights.unflatten(-1, (rows, columns))
