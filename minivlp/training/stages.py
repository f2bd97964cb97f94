"""Training in stages, as VLMo does it (Bao et al., NeurIPS 2022, "stagewise pre-training"): images, texts, then pairs.

    stage 1   images alone   attention, image experts           masked image modeling: predict masked patches
    stage 2   text alone     text experts; attention is frozen  masked language modeling
    stage 3   pairs          everything                         ITC, ITM, masked language modeling

    fit(ImageStage(model), batch_at, settings)
    freeze_for_text(model)
    fit(TextStage(model), batch_at, settings)
    unfreeze(model)
    fit(model, batch_at, settings)

All stages train the same model, a `VLMo`; nothing is copied in between. What only one stage needs belongs to the stage.

Code and paper: in stage 2 the released code also trains the final LayerNorm, the relative positions and the token
types, which images use too. Stage 1 is BEiT there (Bao et al., ICLR 2022), which predicts the codes of a trained image
tokenizer. There is none here, so `ImageStage` predicts pixels, as MAE does (He et al., CVPR 2022); that asks more for
colors and edges, and less for what an object is. The VL experts are first trained in stage 3, there as here.

Axes: B batch, P patches, M masked patches of the batch, L text tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Batch, Text
from minivlp.layers.buckets import in_length_buckets
from minivlp.objectives.masking import IGNORE, MaskedTokens, labeled_places, masked_loss


class ImageStage(nn.Module):
    """Stage 1: mask some patches and predict their pixels. Is trained in place of `model`, a VLMo, and changes it.

    rate: share of masked patches (BEiT: .4).
    """

    def __init__(self, model: nn.Module, rate: float = 0.4) -> None:
        super().__init__()
        config = model.config.image
        self.model, self.rate = model, rate
        self.mask_token = nn.Parameter(0.02 * torch.randn(config.block.width))  # takes the place of a masked patch
        self.pixel_head = nn.Linear(config.block.width, 3 * config.patch_size**2)

    def predict(self, images: Tensor, masked: Tensor) -> Tensor:
        """The masked patches of images (B, 3, H, W), in the units of `patch_pixels`: (M, 3 patch^2).

        masked: (B, P) bool. The results stand in the order of `masked.nonzero()`.
        """
        joint = self.model.joint
        tokens = joint(joint.embed_image(images, masked, self.mask_token), text=0)  # (B, 1+P, D)
        return self.pixel_head(tokens[:, 1:][masked])

    def losses(self, batch: Batch, masked: Tensor | None = None) -> dict[str, Tensor]:
        """The mean squared error of the masked pixels. `masked` (B, P) takes the place of what is otherwise drawn."""
        images, patch = batch.images, self.model.config.image.patch_size
        if masked is None:
            rows, columns = (side // patch for side in images.shape[2:])
            masked = mask_blocks(len(images), rows, columns, self.rate, images.device)
        targets = patch_pixels(images, patch)[masked]  # (M, 3 patch^2)
        errors = (self.predict(images, masked).to(targets.dtype) - targets).square()
        return {"mim": errors.sum() / max(1, errors.numel())}


class TextStage(nn.Module):
    """Stage 2: mask some words and predict them from the others. Is trained in place of `model`, a VLMo.

    Call `freeze_for_text(model)` first. Of a batch, only `text` is read.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def losses(self, batch: Batch, masked: MaskedTokens | None = None) -> dict[str, Tensor]:
        """Masked language modeling, here with weight one. `masked` takes the place of what is otherwise drawn."""
        model, config = self.model, self.model.config
        masked = masked or config.masking.apply(batch.text, config.text.vocabulary)

        def encoded(rows: Tensor | slice, text: Text) -> Tensor:
            places, _ = labeled_places(masked.labels[rows, : text.length])
            return model.encode_text(text, places)

        _, labels = labeled_places(masked.labels)  # (B, masked tokens of a text at most)
        tokens, asked = in_length_buckets(masked.text, encoded), labels != IGNORE
        return {"mlm": masked_loss(model.mlm_head(tokens[asked]), labels[asked])}


def freeze_for_text(model: nn.Module) -> None:
    """Train only those parameters of a VLMo that stage 2 trains: see `VLMo.learns_from_text`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.learns_from_text(name))


def freeze_for_images(model: nn.Module) -> None:
    """The reverse: images train only what is theirs, on an attention that was trained on text.

    No paper has such a stage. It asks whether stages could also begin with text.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.learns_from_images(name))


def unfreeze(model: nn.Module) -> None:
    """Train everything (stage 3)."""
    model.requires_grad_(True)


def trainable(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each component of a VLMo: how many of its parameters are trained now, and how many it has."""
    table: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        trained, count = table.get(component(name), (0, 0))
        own = parameter.numel()
        table[component(name)] = trained + own * parameter.requires_grad, count + own
    return table


COMPONENTS = {
    "image_embed": "patch embedding",
    "text_embed": "token embedding",
    "token_type": "token types",
    "relative": "relative positions",
    "norm": "final LayerNorm",
    "mlm_head": "MLM head",
    "match_head": "ITM head",
    "itc_head": "ITC heads",
    "itc_head_vl": "ITC heads",
}


def component(name: str) -> str:
    """The component of a VLMo that the parameter of this name belongs to, in words."""
    parts = name.split(".")
    if "experts" in parts:
        return f"{parts[parts.index('experts') + 1]} expert"
    if "blocks" in parts:
        return "attention"  # with its LayerNorm, and both factors of LayerScale
    return COMPONENTS[parts[1] if parts[0] == "joint" else parts[0]]


def mask_blocks(count: int, rows: int, columns: int, rate: float, device: torch.device | str | None = None) -> Tensor:
    """(count, rows * columns) bool: each block of 2 x 2 patches is masked with probability `rate`.

    A single masked patch could be predicted from its neighbors. BEiT's blockwise masking has larger blocks of several
    shapes, on a larger grid.
    """
    drawn = torch.rand(count, -(-rows // 2), -(-columns // 2), device=device) < rate
    blocks = drawn.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    return blocks[:, :rows, :columns].flatten(1)  # (count, P)


def patch_pixels(images: Tensor, patch: int) -> Tensor:
    """images (B, 3, H, W) -> the pixels of each patch (B, P, 3 patch^2), of mean 0 and variance 1 per color channel.

    Mean and variance are taken over the batch, so a model that predicts the mean color has a squared error of 1.
    """
    mean = images.mean(dim=(0, 2, 3), keepdim=True)
    std = images.std(dim=(0, 2, 3), keepdim=True, correction=0).clamp(min=1e-3)  # a batch of one color has none
    return F.pixel_unshuffle((images - mean) / std, patch).flatten(2).transpose(1, 2)
