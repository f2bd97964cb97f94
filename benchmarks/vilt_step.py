"""One ViLT training step: ours against transformers' ViltForMaskedLM of the same size, in one run.

    python -m benchmarks.vilt_step [--batch 64] [--rounds 8] [--threads 2]

The first two do the same on the same batch of drawn scenes with their captions: one forward pass with the same words
hidden, the loss of the hidden words, backward, AdamW. Ours runs the word head on the hidden words alone, transformers'
on every token, and transformers shuffles the patches. The others are what lesson 02 trains, with two forward passes
(matching and words), and what each part adds. The columns are explained at `benchmarks._step.race`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from benchmarks._step import Contender, options, race
from minivlp.data.batch import Batch
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.machine import device
from minivlp.models.vilt import ViLT, ViLTConfig
from minivlp.objectives.masking import Masked

WIDTH, HEADS, HIDDEN, LAYERS, SIZE, PATCH, LENGTH = 128, 4, 512, 4, 64, 8, 56


def published(vocabulary: int) -> ViLT:
    """Our class with every published choice, at nano's size."""
    image = ImageConfig(SIZE, PATCH, LAYERS, BlockConfig(WIDTH, HEADS, HIDDEN, norm_eps=1e-6))
    words = BlockConfig(WIDTH, HEADS, HIDDEN, norm_eps=1e-12)
    return ViLT(ViLTConfig(image, TextConfig(vocabulary, LENGTH, 0, words, embed_norm=True), losses=("mlm",)))


def transformers_vilt(vocabulary: int) -> nn.Module:
    """transformers' ViltForMaskedLM of the same size; it knows eager attention only."""
    from transformers import ViltConfig, ViltForMaskedLM

    return ViltForMaskedLM(
        ViltConfig(
            vocab_size=vocabulary,
            max_position_embeddings=LENGTH,
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_attention_heads=HEADS,
            num_hidden_layers=LAYERS,
            image_size=SIZE,
            patch_size=PATCH,
        )
    )


def ours(model: ViLT, batch: Batch, masked: Masked) -> Tensor:
    """All losses of its config."""
    return sum(model.losses(batch, masked=masked).values())


def theirs(model: nn.Module, batch: Batch, masked: Masked) -> Tensor:
    """The loss of the hidden words."""
    read = dict(input_ids=masked.ids, attention_mask=batch.mask.long(), pixel_values=batch.images)
    return model(**read, labels=masked.labels).loss


def main() -> None:
    chosen = options(__doc__)
    where, tokenizer = device(), load_tokenizer()
    vocabulary = len(tokenizer)
    batch = Loader(Scenes(chosen.batch, "train", 0, size=SIZE), tokenizer, chosen.batch, SIZE, wrong_captions=True)
    with_false = batch.batch(0).to(where)
    batch = replace(with_false, wrong_ids=None, wrong_mask=None)
    masked = published(vocabulary).to(where).hide_words(batch.ids, batch.mask)
    print(f"captions of {batch.mask.sum(dim=1).float().mean():.0f} tokens, {batch.ids.shape[1]} at most")

    def enter(model: nn.Module, loss_of=ours, of: Batch = batch) -> Contender:
        return model.to(where), partial(loss_of, model, of, masked)

    nano = ViLTConfig.nano(vocabulary)
    contenders = {
        "minivlp, published choices, MLM": enter(published(vocabulary)),
        "transformers, MLM": enter(transformers_vilt(vocabulary), theirs),
        "minivlp, nano, MLM": enter(ViLT(replace(nano, losses=("mlm",)))),
        "minivlp, nano, ITM + MLM": enter(ViLT(replace(nano, losses=("itm", "mlm")))),
        "minivlp, nano as in lesson 02": enter(ViLT(nano)),
        "minivlp, nano, with false captions": enter(ViLT(nano), of=with_false),
    }
    race(contenders, chosen.batch, chosen.rounds)


if __name__ == "__main__":
    main()
