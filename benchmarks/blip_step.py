"""One BLIP training step: captioning alone against transformers' captioner of the same size, and what sharing brings.

    python -m benchmarks.blip_step [--batch 64] [--rounds 8] [--threads 2]

All learn from the same batch of drawn scenes with their captions; forward, backward, AdamW. The first two compute the
same function: they get the same weights, and must have the same loss. Below, all three losses: the image encoded once,
and its keys and values computed once for matching and captioning, or everything anew for each loss. The columns are
explained at `benchmarks._step.race`.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from benchmarks._step import Contender, check_equal, copy_weights, options, race
from benchmarks.blip_generate import LENGTH, SIZE, published, transformers_blip
from minivlp.data.batch import Batch
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.device import device
from minivlp.models.blip import BLIP
from minivlp.objectives.masking import IGNORE
from minivlp.pretrained.blip import RELEASES


def shared(model: BLIP, batch: Batch) -> Tensor:
    """All losses of its config, which share what they can."""
    return sum(model.losses(batch).values())


def anew(model: BLIP, batch: Batch) -> Tensor:
    """The same losses, each from the batch itself; only the negatives are those that ITC has found."""
    first = model.encode(batch)
    loss = model.itc(first) + model.itm(model.encode(batch, negatives=first.negatives))
    return loss + model.lm(model.encode(batch))


def captioning(model: nn.Module, batch: Batch, start: int) -> Tensor:
    """transformers' loss of the captions; `start` is the id of [DEC], which it expects in front."""
    text = batch.text.with_first(start)
    labels = text.ids.masked_fill(~text.mask, IGNORE)
    return model(batch.images, text.ids, attention_mask=text.mask.long(), labels=labels).loss


def main() -> None:
    chosen, where = options(__doc__), device()
    loader = Loader(Scenes(chosen.batch, "train", 0), load_tokenizer(), chosen.batch, SIZE, max_tokens=LENGTH)
    batch = loader.batch(0).to(where)
    writer, reference = published(losses=("lm",)), transformers_blip()
    copy_weights(reference, RELEASES[0], writer)
    print(f"captions of {batch.text.mask.sum(dim=1).float().mean():.0f} tokens, {batch.text.length} at most")

    def enter(model: nn.Module, loss_of, *arguments) -> Contender:
        return model.to(where), partial(loss_of, model, batch, *arguments)

    contenders = {
        "minivlp, captioning": enter(writer, shared),
        "transformers, captioning": enter(reference, captioning, writer.config.tokens.dec),
        "minivlp, three losses, shared": enter(published(), shared),
        "minivlp, three losses, anew": enter(published(), anew),
    }
    check_equal(dict(list(contenders.items())[:2]))
    race(contenders, chosen.batch, chosen.rounds)


if __name__ == "__main__":
    main()
