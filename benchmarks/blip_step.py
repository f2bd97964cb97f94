"""One BLIP training step: writing alone against transformers' captioner of the same size, and what sharing brings.

    python -m benchmarks.blip_step [--batch 64] [--rounds 8] [--threads 2]

All learn from the same batch of drawn scenes with their captions; forward, backward, AdamW. The first two compute the
same function (the tests hold ours to transformers' logits and loss). Below, all three losses: the image encoded once,
its keys and values computed once for judging and writing, or everything anew for each loss. The columns are explained
at `benchmarks._step.race`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks._step import options, race
from benchmarks.blip_generate import HEADS, PATCH, SIZE, VOCABULARY, WIDTH, theirs
from minivlp.data.batch import Batch
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.machine import device
from minivlp.models.blip import BLIP, BLIPConfig

LENGTH = 20


def published(**changes) -> BLIP:
    """Our class with every published choice, at nano's size, without a teacher."""
    block = BlockConfig(WIDTH, HEADS, 4 * WIDTH, norm_eps=1e-6)
    text = TextConfig(VOCABULARY, LENGTH, 2, replace(block, norm_eps=1e-12, norm_first=False), embed_norm=True)
    return BLIP(replace(BLIPConfig(ImageConfig(SIZE, PATCH, 3, block), text, 64, momentum=None), **changes))


def whole(model: BLIP, batch: Batch) -> Tensor:
    """All losses, what can be shared shared."""
    return sum(model.losses(batch).values())


def anew(models: list[BLIP], batch: Batch) -> Tensor:
    """The same weights asked for one loss at a time: the image is encoded for each."""
    return sum(sum(model.losses(batch).values()) for model in models)


def captioner(model: torch.nn.Module, batch: Batch) -> Tensor:
    """transformers' loss of the captions."""
    labels = batch.ids.masked_fill(~batch.mask, -100)
    return model(batch.images, batch.ids, attention_mask=batch.mask.long(), labels=labels).loss


def main() -> None:
    chosen, where = options(__doc__), device()
    scenes, tokenizer = Scenes(chosen.batch, "train", 0), load_tokenizer()
    batch = Loader(scenes, tokenizer, chosen.batch, SIZE, max_tokens=LENGTH).batch(0).to(where)
    writer, reference, shared = published(losses=("lm",)), theirs(), published()
    parts = [published(losses=losses) for losses in (("itc",), ("itm",), ("lm",))]
    for part in parts[1:]:  # one set of weights: the losses of all are summed before the step
        for name, module in parts[0].named_children():
            setattr(part, name, module)
        part.temperature = parts[0].temperature
    models = (writer, reference, shared, parts[0])
    for model in models:
        model.to(where)
    race(
        {
            "minivlp, writing": (writer, partial(whole, writer, batch)),
            "transformers, writing": (reference, partial(captioner, reference, batch)),
            "minivlp, three losses, shared": (shared, partial(whole, shared, batch)),
            "minivlp, three losses, anew": (parts[0], partial(anew, parts, batch)),
        },
        chosen.batch,
        chosen.rounds,
    )


if __name__ == "__main__":
    main()
