"""ALBEF: align before fuse (Li et al., NeurIPS 2021, "Align before Fuse: Vision and Language Representation Learning
with Momentum Distillation").

    image ──► image tower ──► all tokens ──┬──► unit vector ─┐
                                           │                 ├─► ITC: who belongs to whom, of this batch and the queue?
    text  ──► lower half of BERT ──► words ┼──► unit vector ─┘              ▲
                                     │     │                                │ past vectors, and what else would be right
                                     └─────┴─► upper half ──► ITM, MLM      │
                                                 of BERT       ▲            │
                                                               └─── teacher: the average of the model's own past

What was new: (1) the towers are pulled into one space before anything fuses them, so no object detector is needed;
(2) the contrastive loss then knows which wrong pairs are almost right, and those are what matching learns from ("hard
negatives"); (3) captions from the web are often incomplete or wrong, so a slow copy of the model says what else would
have been a good text, or a good word, and gets a share of the target ("momentum distillation").

The image is encoded once for all three losses; a text once for ITC and ITM, and once more with words hidden.

Code and paper: the teacher moves inside the forward pass, before it is asked; the share alpha rises over the first
epoch; [SEP] may be hidden like a word; matching is never distilled; temperature and matching head have no copy in the
teacher. Nothing of the teacher is needed afterwards: `dataclasses.replace(config, momentum=None)` is the same model
without it. Where we differ: an image or a caption that is met again, in the batch or in the queue, counts as right,
there as wrong; our queue starts empty, theirs with random vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlp.data.batch import Batch
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.layers.timm_tower import image_tower
from minivlp.models.fused import FusedTowers, with_wrong
from minivlp.models.taught import TaughtTowers
from minivlp.objectives.contrastive import same_group
from minivlp.objectives.masking import IGNORE, Masked, choose_tokens, hide, maskable, masked_loss
from minivlp.objectives.matching import Negatives, hard_negatives, random_negatives


@dataclass(frozen=True)
class ALBEFConfig:
    """Sizes, and which of the paper's ideas are on.

    tie_words: masked words are read off with the word embedding itself. losses: any of itc, itm, mlm. hard_negatives:
    wrong pairs by likeness (needs itc), else at random. never_mask: ids that are not asked; these are our tokenizer's
    [PAD] and [CLS].

    momentum: what the teacher keeps of itself at each step; None is no teacher and no queue. It must remember less than
    the run is long: .995 looks back over about 200 steps. distil: the losses in which the teacher has a say; none of
    them leaves the queue alone. alpha: how large a say, after `alpha_steps` steps.
    """

    image: ImageConfig
    text: TextConfig
    fusion_layers: int
    embed_width: int
    tie_words: bool = True
    losses: tuple[str, ...] = ("itc", "itm", "mlm")
    temperature: float = 0.07
    mask_rate: float = 0.15
    mask_id: int = 3
    never_mask: tuple[int, ...] = (0, 1)
    hard_negatives: bool = True
    momentum: float | None = 0.995
    distil: tuple[str, ...] = ("itc", "mlm")
    alpha: float = 0.4
    alpha_steps: int = 10_000
    queue_size: int = 65_536

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> ALBEFConfig:
        """1.9 M parameters, minutes on a laptop. The sizes are X-VLM's nano, so its towers fit; so are the differences.

        No teacher by default: it needs time, and a run of minutes has little (lesson 03 measures what it brings).
        """
        block = BlockConfig(width=128, heads=4, hidden=512, activation="relu")
        return cls(
            image=ImageConfig(64, 8, 3, block, two_step_patches=True, sincos_positions=True),
            text=TextConfig(vocabulary, 56, 2, block, word_std=0.5, position_std=0.2),
            fusion_layers=2,
            embed_width=64,
            tie_words=False,
            momentum=None,
            alpha_steps=200,
            queue_size=1024,
        )

    @classmethod
    def small(cls, vocabulary: int = 30522) -> ALBEFConfig:
        """About 55 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        block = BlockConfig(width=384, heads=6, hidden=1536)
        return cls(
            image=ImageConfig(128, 8, 8, block, two_step_patches=True, sincos_positions=True),
            text=TextConfig(vocabulary, 64, 4, block, word_std=0.5, position_std=0.2),
            fusion_layers=4,
            embed_width=256,
            tie_words=False,
            alpha_steps=1000,
            queue_size=8192,
        )

    @classmethod
    def paper(cls) -> ALBEFConfig:
        """ViT-B/16 at 256 pixels and BERT-base, whose upper six layers fuse: 209.9 M parameters, the teacher's apart.

        The paper names 85.8 M and 123.7 M. `alpha_steps` is about an epoch of its 4 M images in batches of 512.
        """
        text_block = BlockConfig(768, 12, 3072, norm_eps=1e-12, norm_first=False)
        return cls(
            image=ImageConfig(256, 16, 12, BlockConfig(768, 12, 3072, norm_eps=1e-6)),
            text=TextConfig(30522, 512, 6, text_block, embed_norm=True, position_std=0.02),
            fusion_layers=6,
            embed_width=256,
            mask_id=103,
            never_mask=(0, 101),
        )


class ALBEF(TaughtTowers, FusedTowers):
    """Aligns image and text, then lets the words look, and learns with the help of its own past."""

    Config = ALBEFConfig
    lesson = "03"

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__(config, image_tower(config.image), nn.Linear(config.text.block.width, 2))
        self.find_teacher(without=("temperature", "match_head"))

    def losses(
        self, batch: Batch, negatives: Negatives | None = None, masked: Masked | None = None
    ) -> dict[str, Tensor]:
        """The losses of `config.losses`. In training this also moves the teacher and fills the queue.

        False captions that the batch brings along are more wrong pairs for ITM. `negatives` and `masked` take the place
        of what is otherwise drawn at random.
        """
        on = set(self.config.losses)
        visual = self.encode_image(batch.images)  # once, for all that follows
        taught, alpha = self.ask_teacher(batch.images, visual)
        together = same_group(batch.image_ids, batch.ids, batch.mask)
        out = {}
        if on & {"itc", "itm"}:
            ids, mask = with_wrong(batch) if "itm" in on else (batch.ids, batch.mask)
            words = self.encode_text(ids, mask)
        if "itc" in on:
            share = alpha if "itc" in self.config.distil else 0.0
            out["itc"], likeness = self.contrast(batch, visual, words[: len(batch)], taught, share)
        if on & {"itm", "mlm"}:
            keys_values = self.fusion.keys_values(visual)  # once for all the texts that will look at it
        if "itm" in on:
            if negatives is None and "itc" in on and self.config.hard_negatives:
                negatives = hard_negatives(likeness[0], together, back=likeness[1])
            out["itm"] = self.matching(words, mask, keys_values, negatives or random_negatives(together))
        if "mlm" in on:
            masked = masked or self.hide_words(batch.ids, batch.mask)
            believed = None
            if taught is not None and "mlm" in self.config.distil:
                with torch.no_grad():
                    believed = self.teacher.model.guess(masked, batch.mask, taught)
            asked = masked.labels[masked.labels != IGNORE]
            out["mlm"] = masked_loss(self.guess(masked, batch.mask, keys_values), asked, believed, alpha)
        return out

    def hide_words(self, ids: Tensor, mask: Tensor) -> Masked:
        """Put `mask_rate` of the tokens (B, L) behind [MASK] as BERT does, each by itself."""
        config = self.config
        chosen = choose_tokens(maskable(ids, mask, config.never_mask), config.mask_rate)
        return hide(ids, chosen, config.mask_id, config.text.vocabulary)
