"""One VLMo training step against the plain block of the same size, and what each choice costs, in one run.

    python -m benchmarks.vlmo_step [--batch 32] [--rounds 8] [--threads 2]

All but the last two compute the same losses on the same batch of drawn scenes with their captions, from four layers of
equal width. "plain block" has `layers.block.Block` where the others have experts: as many multiplications, and nothing
to sort. Since the relative positions and LayerScale are not part of nano, they stand in a row of their own. The last
two are the stages before the pairs. The columns are explained at `benchmarks._step.race`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from benchmarks._step import Contender, options, race
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.layers.block import Block, BlockConfig
from minivlp.machine import device
from minivlp.models.vlmo import VLMo, VLMoConfig
from minivlp.training.stages import ImageStage, TextStage, freeze_for_text


class Plain(nn.Module):
    """A plain block in an expert block's place: it does not ask which token is what."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.block = Block(config)

    def forward(self, x: Tensor, parts: tuple, mask: Tensor | None = None) -> Tensor:
        return self.block(x, mask)


def plain(config: VLMoConfig) -> VLMo:
    """VLMo around plain blocks."""
    model = VLMo(config)
    model.joint.blocks = nn.ModuleList(Plain(config.image.block) for _ in range(config.image.layers))
    return model


def frozen_for_text(model: VLMo) -> VLMo:
    """As stage 2 trains it."""
    freeze_for_text(model)
    return model


def main() -> None:
    chosen = options(__doc__)
    where, tokenizer = device(), load_tokenizer()
    nano = VLMoConfig.nano(len(tokenizer))
    published = replace(nano, image=replace(nano.image, sincos_positions=False), layer_scale=0.1)
    batch = Loader(Scenes(chosen.batch, "train", 0), tokenizer, chosen.batch, nano.image.image_size).batch(0).to(where)
    print(f"captions of {batch.mask.sum(dim=1).float().mean():.0f} tokens, {batch.ids.shape[1]} at most")

    def enter(model: nn.Module) -> Contender:
        return model.to(where), lambda: sum(model.losses(batch).values())

    contenders = {
        "plain block": enter(plain(nano)),
        "experts, nano as in lesson 04": enter(VLMo(nano)),
        "one shared expert": enter(VLMo(replace(nano, shared_expert=True))),
        "relative positions, LayerScale": enter(VLMo(published)),
        "experts, contrast alone": enter(VLMo(replace(nano, losses=("itc",)))),
        "stage 1, images": enter(ImageStage(VLMo(nano))),
        "stage 2, texts": enter(TextStage(frozen_for_text(VLMo(nano)))),
    }
    race(contenders, chosen.batch, chosen.rounds)
    for name, (model, _) in contenders.items():
        print(f"{name:32}{sum(p.numel() for p in model.parameters()) / 1e6:6.2f} M parameters")


if __name__ == "__main__":
    main()
