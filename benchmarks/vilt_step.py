"""One ViLT training step: ours against transformers' ViltForMaskedLM of the same size, in one run.

    python -m benchmarks.vilt_step [--batch 64] [--rounds 8] [--threads 2]

The first two do the same on the same batch of drawn scenes with their captions: one forward pass with the same tokens
masked, their loss, backward, AdamW. They get the same weights, and must have the same loss. Ours computes the head and
the last block for masked tokens alone, and short texts apart from long ones; transformers' computes all, and shuffles
the patches. The others are what lesson 02 trains, with two forward passes (matching and masked tokens), and what each
part adds. The columns are explained at `benchmarks._step.race`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from benchmarks._step import Contender, check_equal, copy_weights, options, race
from minivlp.data.batch import Batch
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.device import device
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.transformer import BlockConfig
from minivlp.models.vilt import ViLT, ViLTConfig
from minivlp.objectives.masking import MaskedTokens
from minivlp.pretrained.vilt import RELEASES

WIDTH, HEADS, HIDDEN, LAYERS, SIZE, PATCH, LENGTH = 128, 4, 512, 4, 64, 8, 56


def published(vocabulary: int) -> ViLT:
    """Our class with every published choice, at nano's size."""
    image = ImageConfig(
        SIZE, PATCH, LAYERS, BlockConfig(WIDTH, HEADS, HIDDEN, norm_eps=1e-12)
    )  # as transformers has it
    words = BlockConfig(WIDTH, HEADS, HIDDEN, norm_eps=1e-12)
    return ViLT(ViLTConfig(image, TextConfig(vocabulary, LENGTH, 0, words, embed_norm=True), losses=("mlm",)))


def transformers_vilt(vocabulary: int) -> nn.Module:
    """transformers' ViltForMaskedLM of the same size; it has eager attention only."""
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


def ours(model: ViLT, batch: Batch, masked: MaskedTokens) -> Tensor:
    """All losses of its config."""
    return sum(model.losses(batch, masked=masked).values())


def theirs(model: nn.Module, batch: Batch, masked: MaskedTokens) -> Tensor:
    """The loss of the masked tokens."""
    read = dict(input_ids=masked.text.ids, attention_mask=masked.text.mask.long(), pixel_values=batch.images)
    return model(**read, labels=masked.labels).loss


def main() -> None:
    chosen = options(__doc__)
    where, tokenizer = device(), load_tokenizer()
    vocabulary = len(tokenizer)
    loader = Loader(Scenes(chosen.batch, "train", 0, size=SIZE), tokenizer, chosen.batch, SIZE, negative_captions=True)
    with_negatives = loader.batch(0).to(where)
    batch = replace(with_negatives, negatives=None)
    minivlp, reference = published(vocabulary), transformers_vilt(vocabulary)
    copy_weights(reference, RELEASES[0], minivlp)
    masked = minivlp.config.masking.apply(batch.text, vocabulary)
    print(f"captions of {batch.text.mask.sum(dim=1).float().mean():.0f} tokens, {batch.text.length} at most")

    def enter(model: nn.Module, loss_of=ours, of: Batch = batch) -> Contender:
        return model.to(where), partial(loss_of, model, of, masked)

    nano = ViLTConfig.nano(vocabulary)
    contenders = {
        "minivlp, published choices, MLM": enter(minivlp),
        "transformers, MLM": enter(reference, theirs),
        "minivlp, nano, MLM": enter(ViLT(replace(nano, losses=("mlm",)))),
        "minivlp, nano, ITM + MLM": enter(ViLT(replace(nano, losses=("itm", "mlm")))),
        "minivlp, nano as in lesson 02": enter(ViLT(nano)),
        "minivlp, nano, negative captions": enter(ViLT(nano), of=with_negatives),
    }
    check_equal(dict(list(contenders.items())[:2]))
    race(contenders, chosen.batch, chosen.rounds)


if __name__ == "__main__":
    main()
