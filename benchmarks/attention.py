"""Two ways to compute the same attention layer, forward and backward: explicit products, and torch's fused kernel.

    python -m benchmarks.attention [--batch 64] [--rounds 8] [--threads 2] [--width 128] [--heads 4]

The layer has its projections, as in a block, since they compete with the scores for memory. Sequences have 21 to 577
tokens (a short caption, ViT-B/16 at 384 pixels); there are fewer of long ones, so that all rows of the table have about
as many tokens as a batch of images of 65. A ratio above 1 means that the explicit products are faster. Rounds are
interleaved, so that a busy machine slows both alike, and the best round of each counts.

On a CPU `layers.attention.fast_attention` uses the explicit products up to `EXPLICIT_SCORES`, which this table decides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._step import dtypes, options, synchronize
from minivlp.device import device
from minivlp.layers.attention import EXPLICIT_SCORES, Attention, attention_mask, attention_weights

LENGTHS = (21, 33, 49, 65, 81, 97, 113, 129, 161, 197, 257, 325, 401, 485, 577)
Way = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def explicit(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Two products with a softmax between them."""
    return attention_weights(queries, keys, mask) @ values


def fused(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """torch's kernel."""
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def attend(layer: Attention, x: Tensor, mask: Tensor | None, way: Way) -> Tensor:
    """The layer's self-attention, computed in this way: x (B, L, D) -> (B, L, D)."""
    mixed = way(*layer.project(x, None), mask)
    return layer.out(mixed.transpose(1, 2).flatten(2))


def best_times(layer: Attention, x: Tensor, mask: Tensor | None, rounds: int, where: torch.device) -> list[float]:
    """Seconds of forward and backward, explicit and fused."""
    ways = (explicit, fused)
    with torch.no_grad():
        one, other = (attend(layer, x, mask, way) for way in ways)
        assert torch.allclose(one, other, atol=0.05 if x.dtype == torch.bfloat16 else 1e-3), "both must agree"
    best = [1e9, 1e9]
    for _ in range(2 * rounds + 1):  # the first warms up
        for number, way in enumerate(ways):
            start = time.perf_counter()
            attend(layer, x, mask, way).sum().backward()
            synchronize(where)
            best[number] = min(best[number], time.perf_counter() - start)
    return best


def crossing(ratios: list[float]) -> str:
    """Where the fused kernel becomes the faster one: the cut with the least time lost on both sides of it."""
    logs = [math.log(ratio) for ratio in ratios]  # above 0 where explicit products are faster

    def lost(cut: int) -> float:
        return sum(max(0.0, -log) for log in logs[:cut]) + sum(max(0.0, log) for log in logs[cut:])

    cut = min(range(len(logs) + 1), key=lost)
    if cut == 0:
        return "the fused kernel at every length"
    if cut == len(logs):
        return "explicit products at every length"
    return f"explicit products up to {LENGTHS[cut - 1]} tokens, the fused kernel from {LENGTHS[cut]}"


def main() -> None:
    chosen, where = options(__doc__, width=128, heads=4), device()
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds")
    print(f"width {chosen.width}, {chosen.heads} heads; explicit so far up to {EXPLICIT_SCORES**0.5:.0f} tokens")
    for dtype in dtypes(where):
        layer = Attention(chosen.width, chosen.heads).to(where, dtype)
        for padded in (False, True):
            print(f"\n{dtype}, {'with a padding mask' if padded else 'no mask'}")
            print(f"{'tokens':>8}{'rows':>6}{'explicit':>10}{'fused':>8}{'fused/explicit':>16}")
            ratios = []
            for length in LENGTHS:
                rows = max(1, round(chosen.batch * 65 / length))
                x = torch.randn(rows, length, chosen.width, device=where, dtype=dtype, requires_grad=True)
                lengths = torch.randint(length // 2, length + 1, (rows, 1), device=where)
                real = torch.arange(length, device=where) < lengths  # (B, L)
                times = best_times(layer, x, attention_mask(real) if padded else None, chosen.rounds, where)
                ratios.append(times[1] / times[0])
                print(f"{length:8}{rows:6}{1e3 * times[0]:10.2f}{1e3 * times[1]:8.2f}{ratios[-1]:16.2f}", flush=True)
            print(f"faster: {crossing(ratios)}")


if __name__ == "__main__":
    main()
