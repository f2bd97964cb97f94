"""One VLMo training step against the plain block of the same size, and what each choice costs, in one run.

    python -m benchmarks.vlmo_step [--batch 64] [--rounds 8] [--threads 2]

All but the last two compute the same losses on the same batch of drawn scenes with their captions, from four layers of
equal width. "plain block" has `layers.transformer.Block` where the others have experts: as many multiplications, and no
tokens to divide. Relative positions and LayerScale are not part of nano and have a row of their own. The last two are
the stages before the pairs. The columns are explained at `benchmarks._step.race`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from benchmarks._step import Contender, options, race
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.device import device
from minivlp.layers.transformer import Block
from minivlp.models.vlmo import VLMo, VLMoConfig
from minivlp.training.stages import ImageStage, TextStage, freeze_for_text


def plain(config: VLMoConfig) -> VLMo:
    """VLMo with plain blocks: one feed-forward layer, whatever a token is."""
    model = VLMo(config)
    model.joint.blocks = nn.ModuleList(Block(config.image.block) for _ in range(config.image.layers))
    return model


def published(nano: VLMoConfig) -> VLMoConfig:
    """Relative positions and LayerScale, as in the paper."""
    block = replace(nano.image.block, layer_scale=0.1)
    image = replace(nano.image, sincos_positions=False, relative_positions=True, block=block)
    return replace(nano, image=image, text=replace(nano.text, position_std=None, block=block))


def frozen_for_text(model: VLMo) -> VLMo:
    """As stage 2 trains it."""
    freeze_for_text(model)
    return model


def main() -> None:
    chosen = options(__doc__)
    where, tokenizer = device(), load_tokenizer()
    nano = VLMoConfig.nano(len(tokenizer))
    batch = Loader(Scenes(chosen.batch, "train", 0), tokenizer, chosen.batch, nano.image.image_size).batch(0).to(where)
    print(f"captions of {batch.text.mask.sum(dim=1).float().mean():.0f} tokens, {batch.text.length} at most")

    def enter(model: nn.Module) -> Contender:
        return model.to(where), lambda: sum(model.losses(batch).values())

    contenders = {
        "plain block": enter(plain(nano)),
        "experts, nano as in lesson 04": enter(VLMo(nano)),
        "one shared expert": enter(VLMo(replace(nano, shared_expert=True))),
        "relative positions, LayerScale": enter(VLMo(published(nano))),
        "experts, ITC alone": enter(VLMo(replace(nano, losses=("itc",)))),
        "stage 1, images": enter(ImageStage(VLMo(nano))),
        "stage 2, texts": enter(TextStage(frozen_for_text(VLMo(nano)))),
    }
    race(contenders, chosen.batch, chosen.rounds)
    for name, (model, _) in contenders.items():
        print(f"{name:32}{sum(p.numel() for p in model.parameters()) / 1e6:6.2f} M parameters")


if __name__ == "__main__":
    main()
