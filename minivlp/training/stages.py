"""Training in stages, as VLMo does it (Bao et al., NeurIPS 2022, "stagewise pre-training"): images, texts, then pairs.

    stage 1   images without text    attention, image experts    what is behind the hidden patches?
    stage 2   texts without images   text experts; attention     which words are hidden?
                                     stays as images made it
    stage 3   image-text pairs       everything                  contrast, matching, hidden words

    fit(ImageStage(model), batch_at, settings)
    freeze_for_text(model)
    fit(TextStage(model), batch_at, settings)
    unfreeze(model)
    fit(model, batch_at, settings)

All three train the same model; nothing is copied in between. What only a stage needs is part of the stage.

Code and paper: in stage 2 the released code also trains the final LayerNorm, the relative positions and the modality
vectors, which images use too. Stage 1 is BEiT there (Bao et al. 2022), which guesses the codes of a trained tokenizer
of images; here there is none, so `ImageStage` guesses the pixels, as MAE does (He et al. 2022). That asks more for
colours and edges, and less for what a thing is. The VL experts learn nothing before stage 3, there as here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Batch
from minivlp.objectives.masking import IGNORE, Masked, masked_loss


class ImageStage(nn.Module):
    """Stage 1: hide some patches, guess their pixels. To be trained in place of `model`, a VLMo, which it changes.

    rate: share of hidden patches (BEiT: .4).
    """

    def __init__(self, model: nn.Module, rate: float = 0.4) -> None:
        super().__init__()
        config = model.config.image
        self.model, self.rate = model, rate
        self.hidden_patch = nn.Parameter(0.02 * torch.randn(config.block.width))  # stands where a patch is hidden
        self.head = nn.Linear(config.block.width, 3 * config.patch_size**2)

    def losses(self, batch: Batch, hidden: Tensor | None = None) -> dict[str, Tensor]:
        """How far the guessed pixels are off. `hidden` (B, P) takes the place of what is otherwise drawn."""
        patch = self.model.config.image.patch_size
        targets = patch_pixels(batch.images, patch)  # (B, P, 3 patch^2)
        if hidden is None:
            rows, columns = (side // patch for side in batch.images.shape[2:])
            hidden = hide_squares(len(targets), rows, columns, self.rate, targets.device)
        tokens = self.model.joint(self.model.image_input(batch.images, hidden, self.hidden_patch), words=0)
        guessed = self.head(tokens[:, 1:][hidden])  # (M, 3 patch^2)
        errors = (guessed.to(targets.dtype) - targets[hidden]).square()
        return {"pixels": errors.sum() / max(1, errors.numel())}


class TextStage(nn.Module):
    """Stage 2: hide some words, guess them from the others. To be trained in place of `model`, a VLMo.

    Call `freeze_for_text(model)` first. Reads a batch's `ids` and `mask` only.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def losses(self, batch: Batch, masked: Masked | None = None) -> dict[str, Tensor]:
        """The masked-word loss, here at full weight. `masked` takes the place of what is otherwise drawn."""
        masked = masked or self.model.hide_words(batch.ids, batch.mask)
        asked = masked.labels != IGNORE  # (B, L)
        tokens = self.model.encode_text(masked.ids, batch.mask)
        return {"mlm": masked_loss(self.model.word_logits(tokens[asked]), masked.labels[asked])}


def freeze_for_text(model: nn.Module) -> None:
    """Let only those parameters of a VLMo learn that stage 2 trains: see its `learns_from_text`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.learns_from_text(name))


def freeze_for_images(model: nn.Module) -> None:
    """The other way round: let images train only what is theirs, on an attention that texts have made.

    Nobody has published such a stage. It asks a question: would it do to begin with texts?
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.learns_from_images(name))


def unfreeze(model: nn.Module) -> None:
    """Let everything learn (stage 3)."""
    model.requires_grad_(True)


def trainable(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each component of a VLMo, how many of its numbers learn, and how many it has, as the model stands."""
    table: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        learn, have = table.get(component(name), (0, 0))
        table[component(name)] = learn + parameter.numel() * parameter.requires_grad, have + parameter.numel()
    return table


def component(name: str) -> str:
    """Which part of a VLMo the parameter of this name belongs to, in words."""
    parts = name.split(".")
    if "experts" in parts:
        return f"{parts[parts.index('experts') + 1]} expert"
    if "blocks" in parts:
        return "attention"  # with its LayerNorm, and LayerScale
    return COMPONENTS.get(parts[1] if parts[0] == "joint" else parts[0], "heads for pairs")


COMPONENTS = {
    "patches": "patches",
    "class_token": "patches",
    "words": "words",
    "modality": "modality vectors",
    "relative": "relative positions",
    "norm": "final LayerNorm",
    "word_head": "head for words",
}


def expert_map(model: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """Which expert handled which token while `run()` ran: one row per layer, one name per token.

    For instance `expert_map(model, lambda: model.match(images, ids, mask))`. Of several passes, the last one counts.
    """
    table: list[list[str]] = [[] for _ in model.joint.blocks]
    hooks = []
    for row, block in zip(table, model.joint.blocks, strict=True):
        hooks.append(block.register_forward_pre_hook(lambda *_, row=row: row.clear()))
        for name, expert in block.experts.items():
            note = lambda _, inputs, __, row=row, name=name: row.extend([name] * inputs[0].shape[1])  # noqa: E731
            hooks.append(expert.register_forward_hook(note))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return table


def hide_squares(count: int, rows: int, columns: int, rate: float, device: torch.device | str | None = None) -> Tensor:
    """(count, rows * columns) bool, each square of 2 x 2 patches hidden with probability `rate`.

    A single hidden patch could be read off its neighbours; BEiT hides larger blocks, on a larger grid.
    """
    drawn = torch.rand(count, -(-rows // 2), -(-columns // 2), device=device) < rate
    squares = drawn.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    return squares[:, :rows, :columns].flatten(1)  # (count, P)


def patch_pixels(images: Tensor, patch: int) -> Tensor:
    """images (B, 3, H, W) -> the pixels of each patch (B, P, 3 patch^2), mean 0 and spread 1 per colour over the batch.

    So whoever knows nothing but the usual colour has a squared error of 1.
    """
    mean = images.mean(dim=(0, 2, 3), keepdim=True)
    spread = images.std(dim=(0, 2, 3), keepdim=True, correction=0).clamp(min=1e-3)  # a batch of one colour has none
    return F.pixel_unshuffle((images - mean) / spread, patch).flatten(2).transpose(1, 2)
