"""ALBEF's release: the authors' .pth, as pre-trained (`ALBEF.pth`) or fine-tuned for retrieval."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from minivlp.models.albef import ALBEFConfig
from minivlp.pretrained.keys import Release, with_prefix
from minivlp.pretrained.parts import ALIGNED, FUSED_BERT, MOMENTUM, VIT, fused_sizes, squash, vit_config

AUTHORS = (
    *with_prefix("visual_encoder.", "image.", VIT),
    *FUSED_BERT,
    *ALIGNED,
)


def config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> ALBEFConfig:
    """Sizes from the shapes of the tensors, the rest as in the paper; without the momentum model."""
    image = vit_config(tensors, "visual_encoder.")
    return replace(ALBEFConfig.paper(), image=image, **fused_sizes(tensors), momentum=None)


RELEASES = (
    Release(
        key_prefix="visual_encoder.",
        table=AUTHORS,
        ignored=("*.position_ids", *MOMENTUM),
        optional=("mlm_head.",),
        config=config,
        processor="BlipImageProcessor",
        processor_settings=squash,
        tokenizer="bert-base-uncased",
    ),
)
