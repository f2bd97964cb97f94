"""One CLIP training step: ours against transformers' CLIPModel and open_clip's CLIP of the same size, in one run.

    python -m benchmarks.clip_step [--batch 64] [--rounds 8] [--threads 2]

Every contender does the same on the same batch: forward, contrastive loss, backward, AdamW. All but our nano compute
the same function: they get the same weights, and must have the same loss before the race begins. The columns are
explained at `benchmarks._step.race`; GFLOP and share are too low for transformers' default and open_clip.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks._step import Contender, check_equal, copy_weights, options, race
from minivlp.data.batch import Batch, Text
from minivlp.device import device
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.transformer import BlockConfig
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.pretrained.clip import RELEASES

VOCABULARY, LENGTH, WIDTH, HEADS, SIZE, PATCH = 1200, 16, 128, 4, 64, 8
LAST = VOCABULARY - 1  # the end-of-text token: open_clip reads a text at its largest id


def published() -> CLIP:
    """Our class with every published choice, at nano's size."""
    block = BlockConfig(WIDTH, HEADS, 4 * WIDTH, "quick_gelu")
    image = ImageConfig(SIZE, PATCH, 3, block, ln_pre=True, patch_bias=False)
    return CLIP(CLIPConfig(image, TextConfig(VOCABULARY, LENGTH, 2, block, causal=True), 64, diagonal_only=True))


def transformers_clip(attention: str) -> nn.Module:
    """transformers' CLIPModel of the same size."""
    from transformers import CLIPConfig as Config
    from transformers import CLIPModel

    same = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=HEADS)
    text = dict(same, vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=LENGTH)
    text |= dict(bos_token_id=1, eos_token_id=LAST)
    vision = dict(same, num_hidden_layers=3, image_size=SIZE, patch_size=PATCH)
    config = Config(text_config=text, vision_config=vision, projection_dim=64, attn_implementation=attention)
    return CLIPModel(config)


def open_clip_model() -> nn.Module:
    """open_clip's CLIP of the same size."""
    from open_clip.model import CLIP as Reference

    return Reference(
        64,
        dict(image_size=SIZE, patch_size=PATCH, layers=3, width=WIDTH, head_width=WIDTH // HEADS),
        dict(context_length=LENGTH, vocab_size=VOCABULARY, layers=2, width=WIDTH, heads=HEADS),
        quick_gelu=True,
    )


def ours(model: CLIP, batch: Batch) -> Tensor:
    """Our loss."""
    return model.losses(batch)["itc"]


def theirs(model: nn.Module, batch: Batch) -> Tensor:
    """transformers' loss."""
    return model(input_ids=batch.text.ids, pixel_values=batch.images, return_loss=True).loss


def of_open_clip(model: nn.Module, batch: Batch) -> Tensor:
    """open_clip returns vectors; the loss as its training script computes it."""
    image, text, scale = model(batch.images, batch.text.ids)
    logits, truth = scale * image @ text.T, torch.arange(len(image), device=image.device)
    return (nn.functional.cross_entropy(logits, truth) + nn.functional.cross_entropy(logits.T, truth)) / 2


def main() -> None:
    chosen, where = options(__doc__), device()
    ids = torch.randint(3, LAST, (chosen.batch, LENGTH))
    ids[:, -1] = LAST
    images, text = torch.randn(chosen.batch, 3, SIZE, SIZE), Text(ids, torch.ones_like(ids, dtype=torch.bool))
    batch = Batch(images, text, torch.arange(chosen.batch)).to(where)

    of_open = open_clip_model()
    minivlp = published()
    copy_weights(of_open, RELEASES[1], minivlp)
    default, eager, nano = transformers_clip("sdpa"), transformers_clip("eager"), CLIP(CLIPConfig.nano(VOCABULARY))
    eager.load_state_dict(default.state_dict())

    def enter(model: nn.Module, loss_of) -> Contender:
        return model.to(where), partial(loss_of, model, batch)

    contenders = {
        "minivlp, published choices": enter(minivlp, ours),
        "minivlp, nano as in lesson 01": enter(nano, ours),
        "transformers, default (sdpa)": enter(default, theirs),
        "transformers, eager": enter(eager, theirs),
        "open_clip": enter(of_open, of_open_clip),
    }
    first, _, *of_transformers, of_open = contenders
    check_equal({name: contenders[name] for name in (first, of_open)})
    copy_weights(default, RELEASES[0], minivlp)
    check_equal({name: contenders[name] for name in (first, *of_transformers)})
    race(contenders, chosen.batch, chosen.rounds)


if __name__ == "__main__":
    main()
