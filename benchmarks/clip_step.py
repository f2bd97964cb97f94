"""One CLIP training step: ours against transformers' CLIPModel and open_clip's CLIP of the same size, in one run.

    python -m benchmarks.clip_step [--batch 64] [--rounds 8] [--threads 2]

Every contender does the same on the same batch: forward, contrastive loss, backward, AdamW; all but our nano compute
the same function. What the columns mean is written at `benchmarks._step.race`; those whose GFLOP and share are too low
are transformers' default and open_clip.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks._step import options, race
from minivlp.data.batch import Batch
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.machine import device
from minivlp.models.clip import CLIP, CLIPConfig

VOCABULARY, LENGTH, WIDTH, HEADS, SIZE, PATCH = 1200, 16, 128, 4, 64, 8


def published_nano() -> CLIP:
    """Our class with every published choice, at nano's size: the same function as the references compute."""
    block = BlockConfig(WIDTH, HEADS, 4 * WIDTH, "quick_gelu")
    image = ImageConfig(SIZE, PATCH, 3, block, norm_before=True, patch_bias=False)
    return CLIP(CLIPConfig(image, TextConfig(VOCABULARY, LENGTH, 2, block, causal=True), 64, diagonal_only=True))


def nano() -> CLIP:
    """What lesson 01 trains."""
    return CLIP(CLIPConfig.nano(VOCABULARY))


def transformers_clip(attention: str) -> nn.Module:
    """transformers' CLIPModel of the same size."""
    from transformers import CLIPConfig as Config
    from transformers import CLIPModel

    same = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=HEADS)
    config = Config(
        text_config=dict(
            same, vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=LENGTH, eos_token_id=1
        ),
        vision_config=dict(same, num_hidden_layers=3, image_size=SIZE, patch_size=PATCH),
        projection_dim=64,
        attn_implementation=attention,
    )
    return CLIPModel(config)


def open_clip_model() -> nn.Module:
    """open_clip's CLIP of the same size (head_width 32)."""
    from open_clip.model import CLIP as Reference

    return Reference(
        64,
        dict(image_size=SIZE, patch_size=PATCH, layers=3, width=WIDTH, head_width=WIDTH // HEADS),
        dict(context_length=LENGTH, vocab_size=VOCABULARY, layers=2, width=WIDTH, heads=HEADS),
        quick_gelu=True,
    )


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Each library's own way to its contrastive loss."""
    if isinstance(model, CLIP):
        return model.losses(batch)["contrastive"]
    if type(model).__module__.startswith("transformers"):
        return model(input_ids=batch.ids, pixel_values=batch.images, return_loss=True).loss
    image, text, scale = model(batch.images, batch.ids)
    logits, truth = scale * image @ text.T, torch.arange(len(image), device=image.device)
    return (nn.functional.cross_entropy(logits, truth) + nn.functional.cross_entropy(logits.T, truth)) / 2


def main() -> None:
    chosen = options(__doc__)
    where = device()
    ids = torch.randint(3, VOCABULARY - 1, (chosen.batch, LENGTH))
    ids[:, -1] = VOCABULARY - 1  # open_clip reads the text at the largest id
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(torch.randn(chosen.batch, 3, SIZE, SIZE), ids, mask, torch.arange(chosen.batch)).to(where)
    models = {
        "minivlp, published choices": published_nano(),
        "minivlp, nano as in lesson 01": nano(),
        "transformers, default (sdpa)": transformers_clip("sdpa"),
        "transformers, eager": transformers_clip("eager"),
        "open_clip": open_clip_model(),
    }
    contenders = {name: (model.to(where), partial(loss_of, model, batch)) for name, model in models.items()}
    race(contenders, chosen.batch, chosen.rounds)


if __name__ == "__main__":
    main()
