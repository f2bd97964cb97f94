"""Attention maps: what a token attends to, on the grid of patches. `evaluation.grounding` measures how good they are.

The functions take the maps that `record_attention` yields and read the number of layers, heads, tokens and patches off
their shapes. Axes: B batch, L text tokens, P patches, N tokens of one sequence, H heads, E joint-embedding width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.inference import evaluating
from minivlp.layers.attention import record_attention


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """How much of each input token reaches each output token through all layers: (B, N, N), rows sum to one.

    `maps`: self-attention of one tower from the first layer to the last, (B, H, N, N) each. Heads are averaged; half of
    every layer is the identity, which stands for the residual connection. Raises ValueError without maps, and for
    cross-attention. Source: Abnar and Zuidema 2020, "Quantifying attention flow in transformers", section 3.
    """
    if not maps:
        raise ValueError("There are no maps: run the model inside `with record_attention(model) as maps:`.")
    if any(weights.shape[-1] != weights.shape[-2] for weights in maps):
        raise ValueError("Rollout needs self-attention: the rows and columns of these maps differ.")
    joint = torch.eye(maps[0].shape[-1], device=maps[0].device)
    for weights in maps:
        layer = weights.detach().float().mean(1)  # (B, N, N)
        joint = (layer + torch.eye(layer.shape[-1], device=layer.device)) / 2 @ joint
    return joint


def cls_map(weights: Tensor) -> Tensor:
    """What the class token attends to: (B, H, 1+P, 1+P), or (B, 1+P, 1+P) as from `rollout` -> (B, P), rows sum to one.

    Heads are averaged (pick one with `weights[:, [h]]`); the class token's attention to itself is left out.
    """
    rows = weights.detach().float()
    rows = rows.mean(1) if rows.dim() == 4 else rows  # (B, 1+P, 1+P)
    patches = rows[:, 0, 1:]  # (B, P)
    return patches / patches.sum(-1, keepdim=True)


def grad_cam(model: nn.Module, score: Callable[[], Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Grad-CAM of attention maps: weights times the positive part of the score's gradient, averaged over heads.

    `score` runs the model and returns one number per row, such as `lambda: model.match(images, text)`. `names`: which
    maps, as `record_attention` names them (`fusion.1.cross`). Returns (B, L, K) by name; values are not negative and
    have no fixed sum. The model runs in evaluation mode. Sources: Selvaraju et al. 2017 (Grad-CAM); Li et al. 2021
    (ALBEF, section 6.2), who apply it to attention.

    Raises KeyError for an unknown name, ValueError for a map that the score does not depend on.
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
            raise KeyError(f"No attention map {name!r}; this forward pass has {', '.join(maps) or 'none'}.")
        if not maps[name].requires_grad:
            raise ValueError(f"{name} has no gradient: call without torch.no_grad, with weights that require one.")
    gradients = torch.autograd.grad(total, [maps[name] for name in names], allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"The score does not depend on {name}: choose a map that it is computed from.")
    return {
        name: (maps[name] * gradient.clamp(min=0)).mean(1).detach().float()
        for name, gradient in zip(names, gradients, strict=True)
    }


def word_patch_attention(maps: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """How much each of `length` text tokens attends to each patch: (B, H, L, P) by name, from first layer to last.

    `maps` is what `record_attention` yields: either cross-attention (`fusion.1.cross`, (B, H, L, 1+P)), or the
    self-attention of one sequence with the text first (`joint.1.self`, (B, H, L+1+P, L+1+P)). The image's class token
    is left out, so rows sum to less than one. Empty for a dual encoder, whose text never attends to patches.
    """

    def layers(ending: str) -> list[str]:
        found = {name: re.search(rf"(\d+)\.{ending}$", name) for name in maps}
        return sorted((name for name, match in found.items() if match), key=lambda name: int(found[name][1]))

    if crossing := layers("cross"):
        return {name: maps[name][..., 1:] for name in crossing}
    return {name: maps[name][:, :, :length, length + 1 :] for name in layers("self") if name.startswith("joint.")}


def joint_map(weights: Tensor, text_length: int) -> Tensor:
    """What the text attends to in the image, (B, L, P), cut out of a map over the whole joint sequence, text first.

    weights: (B, N, N) as `rollout` or `grad_cam` return it, or one layer's (B, H, N, N), whose heads are averaged. What
    goes to other text tokens and to the class token is left out, so rows sum to less than one.
    """
    rows = weights.detach().float()
    rows = rows.mean(dim=1) if rows.dim() == 4 else rows  # (B, N, N)
    return rows[:, :text_length, text_length + 1 :]


def decoder_attention(model: nn.Module, images: Tensor, text: Text) -> dict[str, Tensor]:
    """What a decoder attends to when it predicts each token of a given text: (B, H, L, P) by layer, first to last.

    The texts (B, L) are given, not generated ("teacher forcing"). Token t is predicted at position t - 1, which has
    read the tokens up to there. Row t of the result is that position's attention, so that it belongs to token t; row 0
    is zero, because the first token is not predicted. The image's class token is left out, so rows sum to less than
    one. Needs `caption_logprob`.
    """
    with evaluating(model), record_attention(model) as maps:
        model.caption_logprob(images, text)
    weights = word_patch_attention(maps, text.length)
    return {name: F.pad(layer[:, :, :-1], (0, 0, 1, 0)) for name, layer in weights.items()}


def value_tokens(tower: nn.Module, images: Tensor, layer: int = -1) -> Tensor:
    """What a token receives when it attends to one patch alone, for every patch: (B, P, D).

    These are the values of one layer's self-attention after its output projection, then the tower's last LayerNorm,
    without residual and feed-forward layer. `tower` is an `ImageEncoder`; `layer` counts as list indices do, and the
    last one is usual.

    Patches of a tower that was trained by contrast are read from here. Its loss sees the class token alone, and the
    class token takes from the last layer a weighted mean of these values. The outputs of the patches themselves reach
    no loss. Source: Zhou et al. 2022, "Extract free dense labels from CLIP" (MaskCLIP), section 3.
    """
    layer = range(len(tower.blocks))[layer]
    x, block = tower.run(tower.embed(images), range(layer)), tower.blocks[layer]
    alone = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)  # each token attends to itself, with weight 1
    values = block.attention_scale(block.self_attention(block.self_norm(x), mask=alone))  # (B, 1+P, D)
    return tower.norm(values)[:, int(tower.config.class_token) :]


def text_patch_similarity(model: nn.Module, patches: Tensor, text: Text) -> Tensor:
    """Cosine of the vector of each text with every patch of its image in the joint space: (B, P).

    patches: (B, P, D), row i from the image of text i: `value_tokens`, or the tower's outputs. Needs `itc_head` and
    `embed_texts`.
    """
    with evaluating(model):
        vectors = F.normalize(model.itc_head.project_image(patches).float(), dim=-1)  # (B, P, E)
        return torch.einsum("be,bpe->bp", model.embed_texts(text), vectors)


def word_patch_similarity(model: nn.Module, images: Tensor, text: Text) -> Tensor:
    """Cosine of every text token with every patch in the joint space: (B, L, P); zero where the text is padding.

    Needs `itc_head`, `encode_image` and `encode_text`. Patches are `value_tokens` where the image tower has blocks of
    ours, and its outputs otherwise (timm's feature maps). The contrastive loss trains one vector of each text only, so
    the map of a dual encoder is rough; FILIP (Yao et al. 2022, section 3.2) trains all tokens. Raises TypeError for a
    model without `itc_head`.
    """
    if not hasattr(model, "itc_head"):
        raise TypeError(f"{type(model).__name__} has no joint space for text and patches: use its cross-attention.")
    with evaluating(model):
        tower = model.image
        has_values = hasattr(tower, "blocks")
        patches = value_tokens(tower, images) if has_values else model.encode_image(images)[:, 1:]  # (B, P, D)
        patches = F.normalize(model.itc_head.project_image(patches).float(), dim=-1)  # (B, P, E)
        tokens = F.normalize(model.itc_head.project_text(model.encode_text(text)).float(), dim=-1)  # (B, L, E)
        return tokens @ patches.transpose(1, 2) * text.mask[..., None]  # (B, L, P)


def expert_map(model: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """Which expert of a VLMo handled which token while `run()` ran: one row per layer, one name per token.

    For instance `expert_map(model, lambda: model.match(images, text))`. Of several forward passes the last one counts.
    """
    table: list[list[str]] = [[] for _ in model.joint.blocks]
    hooks = []
    for row, block in zip(table, model.joint.blocks, strict=True):
        hooks.append(block.register_forward_pre_hook(lambda *_, row=row: row.clear()))
        for name, expert in block.experts.items():
            note = lambda _, inputs, __, row=row, name=name: row.extend([name] * inputs[0].shape[1])  # noqa: E731
            hooks.append(expert.register_forward_hook(note))
    try:
        # while maps are recorded, the last block computes all tokens, not only those that are read
        with torch.no_grad(), record_attention(model):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return table


def to_grid(weights: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Weights over patches (..., P) as a picture (..., rows, columns). `grid` is (rows, columns); None is a square.

    Raises ValueError where the number of patches does not fit the grid.
    """
    patches = weights.shape[-1]
    rows, columns = grid or (math.isqrt(patches), math.isqrt(patches))
    if rows * columns != patches:
        raise ValueError(
            f"{patches} patches do not fill a grid of {rows} x {columns}: "
            "drop the class token (`weights[..., 1:]`), or give grid=(rows, columns)."
        )
    return weights.unflatten(-1, (rows, columns))
