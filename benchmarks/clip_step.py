"""One CLIP training step: ours against transformers' CLIPModel and open_clip's CLIP of the same size, in one run.

    python -m benchmarks.clip_step [--batch 64] [--rounds 8] [--threads 2]

Every contender does the same on the same batch: forward, contrastive loss, backward, AdamW; all but our nano compute
the same function. Rounds are interleaved, so that a busy machine slows all of them alike, and the best round of each
counts. The `share` column is the step's matrix products (`GFLOP`, counted by torch) per second against the machine's
own best rate in the same dtype. Torch does not count what a CPU's fused attention does: GFLOP and share of the
contenders that use it (transformers' default, open_clip) are too low by that.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minivlp.data.batch import Batch
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.machine import bf16_is_fast, device, reuse_memory
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


def matmul_rate(dtype: torch.dtype, where: torch.device) -> float:
    """Best floating-point operations per second of one square product."""
    a, best = torch.randn(1024, 1024, device=where, dtype=dtype), 0.0
    for _ in range(12):
        began = time.perf_counter()
        a @ a
        synchronise(where)
        best = max(best, 2 * 1024**3 / (time.perf_counter() - began))
    return best


def synchronise(where: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if where.type == "cuda":
        torch.cuda.synchronize()
    elif where.type == "mps":
        torch.mps.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    reuse_memory()  # as the training loop does; it serves all contenders alike
    where = device()
    ids = torch.randint(3, VOCABULARY - 1, (options.batch, LENGTH))
    ids[:, -1] = VOCABULARY - 1  # open_clip reads the text at the largest id
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(torch.randn(options.batch, 3, SIZE, SIZE), ids, mask, torch.arange(options.batch)).to(where)
    models = {
        "minivlp, published choices": published_nano(),
        "minivlp, nano as in lesson 01": nano(),
        "transformers, default (sdpa)": transformers_clip("sdpa"),
        "transformers, eager": transformers_clip("eager"),
        "open_clip": open_clip_model(),
    }
    dtypes = [torch.float32] + ([torch.bfloat16] if bf16_is_fast(where) else [])
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads, batch {options.batch}")
    for dtype in dtypes:
        cast = torch.autocast(where.type, dtype) if dtype != torch.float32 else nullcontext()
        times: dict[str, float] = {}
        work: dict[str, float] = {}
        optimisers = {}
        for name, model in models.items():
            model.to(where).train()
            optimisers[name] = torch.optim.AdamW(model.parameters(), 1e-4)
            with FlopCounterMode(display=False) as counter:
                loss_of(model, batch).backward()
            work[name] = counter.get_total_flops()
        for _ in range(options.rounds):
            for name, model in models.items():
                for _ in range(2):
                    began = time.perf_counter()
                    optimisers[name].zero_grad()
                    with cast:
                        loss = loss_of(model, batch)
                    loss.backward()
                    optimisers[name].step()
                    synchronise(where)
                    times[name] = min(times.get(name, 1e9), time.perf_counter() - began)
        rate = matmul_rate(dtype, where)
        print(f"\n{dtype}: the machine's own matmul rate is {rate / 1e9:.0f} GFLOP/s")
        print(f"{'':32}{'samples/s':>10}{'ratio':>8}{'GFLOP':>8}{'share':>8}")
        first = times["minivlp, published choices"]
        for name, seconds in times.items():
            share = work[name] / seconds / rate
            row = f"{options.batch / seconds:10.0f}{first / seconds:8.2f}{work[name] / 1e9:8.1f}{share:8.0%}"
            print(f"{name:32}{row}")


if __name__ == "__main__":
    main()
