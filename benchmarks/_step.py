"""What the benchmarks of a training step share: interleaved rounds, the machine's own rate, and the table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minivlp.machine import bf16_is_fast, device, reuse_memory

Contender = tuple[nn.Module, Callable[[], Tensor]]  # what is trained, and its loss on the one batch


def options(what: str) -> argparse.Namespace:
    """--batch, --rounds, --threads; also sets the seed and the threads, and lets torch reuse its memory."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    reuse_memory()  # as the training loop does; it serves all contenders alike
    return chosen


def race(contenders: dict[str, Contender], batch: int, rounds: int) -> None:
    """Print samples per second of each, forward, backward and AdamW, and how that compares with the first.

    Rounds are interleaved, so that a busy machine slows all of them alike, and the best round of each counts. The
    `share` column is the step's matrix products (`GFLOP`, counted by torch) per second against the machine's own best
    rate in the same dtype. Torch does not count what a CPU's fused attention does: GFLOP and share of contenders that
    use it are too low by that.
    """
    where = device()
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads, batch {batch}")
    wide = max(map(len, contenders)) + 2
    for dtype in [torch.float32] + ([torch.bfloat16] if bf16_is_fast(where) else []):
        cast = torch.autocast(where.type, dtype) if dtype != torch.float32 else nullcontext()
        times: dict[str, float] = {}
        work: dict[str, float] = {}
        optimisers = {}
        for name, (model, loss_of) in contenders.items():
            model.train()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimisers[name] = torch.optim.AdamW(trained, 1e-4)
            with FlopCounterMode(display=False) as counter:
                loss_of().backward()
            work[name] = counter.get_total_flops()
        for _ in range(rounds):
            for name, (_, loss_of) in contenders.items():
                for _ in range(2):
                    began = time.perf_counter()
                    optimisers[name].zero_grad()
                    with cast:
                        loss = loss_of()
                    loss.backward()
                    optimisers[name].step()
                    synchronise(where)
                    times[name] = min(times.get(name, 1e9), time.perf_counter() - began)
        rate = matmul_rate(dtype, where)
        print(f"\n{dtype}: the machine's own matmul rate is {rate / 1e9:.0f} GFLOP/s")
        print(f"{'':{wide}}{'samples/s':>10}{'ratio':>8}{'GFLOP':>8}{'share':>8}")
        first = next(iter(times.values()))
        for name, seconds in times.items():
            share = work[name] / seconds / rate
            row = f"{batch / seconds:10.0f}{first / seconds:8.2f}{work[name] / 1e9:8.1f}{share:8.0%}"
            print(f"{name:{wide}}{row}")


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
