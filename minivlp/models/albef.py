"""ALBEF: align before fuse (Li et al., NeurIPS 2021, "Align before Fuse: Vision and Language Representation Learning
with Momentum Distillation").

    image ──► image tower ──► all tokens ──┬──► unit vector ─┐
                                           │                 ├─► ITC: which text goes with which image, in this batch
    text  ──► lower half of BERT ──► tokens┼──► unit vector ─┘   and in the queue?
                                     │     │                     ▲ features of past batches, softened targets
                                     └─────┴─► upper half ──► ITM, MLM
                                                 of BERT       ▲ softened targets
                                                               └─── momentum model: EMA of the model's own weights

What was new: (1) the towers are aligned by a contrastive loss before anything fuses them, so no object detector is
needed; (2) the contrastive similarities choose hard negatives for matching; (3) web captions are often incomplete or
wrong, so an exponential moving average of the model predicts what else would be a good text, or a good word, and its
predictions are mixed into the targets ("momentum distillation").

The image is encoded once for all three losses; a text once for ITC and ITM, and once more with masked tokens.

Code and paper: the momentum model is updated inside the forward pass, before it is used; its share alpha rises over the
first epoch; [SEP] may be masked; matching is never distilled; temperature and matching head have no momentum copy. The
momentum model is not needed after training: `dataclasses.replace(config, momentum=None)` is the same model without it.
Where we differ: a repeated image or caption, in the batch or in the queue, is a positive, there a negative; our queue
starts empty, theirs with random vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.timm_tower import image_tower
from minivlp.layers.transformer import BlockConfig
from minivlp.models.fusion_encoder import FusionEncoder
from minivlp.objectives.masking import TokenMasking
from minivlp.objectives.momentum import MomentumConfig


@dataclass(frozen=True)
class ALBEFConfig:
    """Sizes, and which of the paper's ideas are on.

    tie_words: masked tokens are predicted with the token embedding itself. losses: any of itc, itm, mlm.
    hard_negatives: negatives are drawn by similarity (needs itc), else at random. momentum: None is no momentum model
    and no queue.
    """

    image: ImageConfig
    text: TextConfig
    fusion_layers: int
    embed_width: int
    tie_words: bool = True
    losses: tuple[str, ...] = ("itc", "itm", "mlm")
    temperature: float = 0.07
    hard_negatives: bool = True
    masking: TokenMasking = TokenMasking(never_mask=(0, 1))  # [PAD] and [CLS]
    momentum: MomentumConfig | None = MomentumConfig()

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> ALBEFConfig:
        """1.9 M parameters, minutes on a laptop. The towers are those of X-VLM's nano.

        No momentum model by default: in minutes it does not pay (lesson 03 measures it).
        """
        return cls(ImageConfig.nano(), TextConfig.nano(vocabulary), 2, 64, tie_words=False, momentum=None)

    @classmethod
    def small(cls, vocabulary: int = 30522) -> ALBEFConfig:
        """About 55 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        momentum = MomentumConfig(alpha_steps=1000, queue_size=8192)
        return cls(ImageConfig.small(), TextConfig.small(vocabulary), 4, 256, tie_words=False, momentum=momentum)

    @classmethod
    def paper(cls) -> ALBEFConfig:
        """ViT-B/16 at 256 pixels and BERT-base, whose upper six layers fuse: 209.9 M parameters.

        The momentum model is not counted. `alpha_steps` is about an epoch of 4 M images in batches of 512.
        """
        bert = BlockConfig(768, 12, 3072, norm_eps=1e-12, norm_first=False)
        return cls(
            image=ImageConfig(256, 16, 12, BlockConfig(768, 12, 3072, norm_eps=1e-6)),
            text=TextConfig(30522, 512, 6, bert, embed_norm=True, position_std=0.02),
            fusion_layers=6,
            embed_width=256,
            masking=TokenMasking(mask_id=103, never_mask=(0, 101)),
        )


class ALBEF(FusionEncoder):
    """ITC aligns the towers, ITM and MLM train the fusion layers, a momentum model softens the targets."""

    Config = ALBEFConfig

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__(config, image_tower(config.image), nn.Linear(config.text.block.width, 2))
        self.add_momentum_model(without=("match_head", "itc_head.scale"))

    def draws_hard_negatives(self) -> bool:
        return self.config.hard_negatives and super().draws_hard_negatives()
