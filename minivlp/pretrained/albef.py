"""ALBEF's release: the authors' .pth, as pre-trained (`ALBEF.pth`) or fine-tuned for retrieval."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from minivlp.models.albef import ALBEFConfig
from minivlp.pretrained.keys import Release, under
from minivlp.pretrained.parts import ALIGNED, FUSED_BERT, MOMENTUM, VIT, fused_sizes, squash, vit_config

AUTHORS = (
    *under("visual_encoder.", "image.", VIT),
    *FUSED_BERT,
    *ALIGNED,
    ("itm_head", "match_head"),
)


def config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> ALBEFConfig:
    """Sizes as the tensors have them, the rest as in the paper; without its teacher."""
    image = vit_config(tensors, "visual_encoder.")
    return replace(ALBEFConfig.paper(), image=image, **fused_sizes(tensors), momentum=None)


RELEASES = (
    Release(
        mark="visual_encoder.",
        table=AUTHORS,
        ignored=("*.position_ids", *MOMENTUM),
        optional=("word_head.",),
        config=config,
        processor="BlipImageProcessor",
        pixels=squash,
        tokenizer="bert-base-uncased",
    ),
)
