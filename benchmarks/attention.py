"""Two ways to the same attention, forward and backward: plain matrix products, and torch's fused kernel.

    python -m benchmarks.attention

`layers.attention.fast_attention` takes the first on a CPU, and this table is the reason, and the second elsewhere.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from benchmarks._step import synchronise
from minivlp.layers.attention import attention_weights
from minivlp.machine import bf16_is_fast, device, reuse_memory


def main() -> None:
    reuse_memory()
    where = device()
    ways = {
        "plain": lambda q, k, v: attention_weights(q, k, None) @ v,
        "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    }
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds, best of 30")
    print(f"{'':36}{'plain':>8}{'fused':>8}{'plain/fused':>13}")
    for dtype in [torch.float32] + ([torch.bfloat16] if bf16_is_fast(where) else []):
        for name, shape in {
            "image, 64 x 4 heads x 65": (64, 4, 65, 32),
            "text, 64 x 4 heads x 16": (64, 4, 16, 32),
        }.items():
            q, k, v = (torch.randn(shape, device=where, dtype=dtype, requires_grad=True) for _ in range(3))
            best = dict.fromkeys(ways, 1e9)
            for _ in range(30):
                for way, attend in ways.items():
                    began = time.perf_counter()
                    attend(q, k, v).sum().backward()
                    synchronise(where)
                    best[way] = min(best[way], time.perf_counter() - began)
            plain, fused = 1e3 * best["plain"], 1e3 * best["fused"]
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            print(f"{label:36}{plain:8.2f}{fused:8.2f}{plain / fused:10.2f}")


if __name__ == "__main__":
    main()
