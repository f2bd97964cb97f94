"""What the benchmarks share: interleaved rounds, the machine's own rate, and the table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minivlp.device import bf16_is_fast, device, reuse_memory
from minivlp.pretrained.keys import Release, translate

Contender = tuple[nn.Module, Callable[[], Tensor]]  # what is trained, and its loss on the one batch


def options(about: str, **more: int) -> argparse.Namespace:
    """--batch, --rounds, --threads, and `more` options with their defaults; also sets the seed and the threads, and
    lets torch reuse its memory."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch": 64, "rounds": 8, "threads": None, **more}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    reuse_memory()  # as the training loop does; it serves all contenders alike
    return chosen


def race(contenders: dict[str, Contender], batch: int, rounds: int) -> None:
    """Print samples per second of each, forward, backward and AdamW, and how that compares with the first.

    Rounds are interleaved, so that a busy machine slows all contenders alike, and the best round of each counts. With
    one thread on a CPU, the time is what the process itself computed: other processes disturb that less. The
    `share` column is the step's matrix products (`GFLOP`, counted by torch) per second, divided by the machine's own
    best rate in the same dtype. Torch does not count the products of a CPU's fused attention: GFLOP and share of
    contenders that use it are too low by that.
    """
    where = device()
    clock = time.process_time if where.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads, batch {batch}")
    wide = max(map(len, contenders)) + 2
    work: dict[str, float] = {}
    for name, (model, loss_of) in contenders.items():
        model.train()
        with FlopCounterMode(display=False) as counter:
            loss_of().backward()
        work[name] = counter.get_total_flops()
    for dtype in dtypes(where):
        cast = torch.autocast(where.type, dtype) if dtype != torch.float32 else nullcontext()
        times: dict[str, float] = {}
        optimizers = {}
        for name, (model, _) in contenders.items():
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizers[name] = torch.optim.AdamW(trained, 1e-4)
        for _ in range(rounds):
            for name, (_, loss_of) in contenders.items():
                for _ in range(2):
                    start = clock()
                    optimizers[name].zero_grad()
                    with cast:
                        loss = loss_of()
                    loss.backward()
                    optimizers[name].step()
                    synchronize(where)
                    times[name] = min(times.get(name, 1e9), clock() - start)
        rate = matmul_rate(dtype, where, clock)
        print(f"\n{dtype}: the machine's own matmul rate is {rate / 1e9:.0f} GFLOP/s")
        print(f"{'':{wide}}{'samples/s':>10}{'ratio':>8}{'GFLOP':>8}{'share':>8}")
        first = next(iter(times.values()))
        for name, seconds in times.items():
            share = work[name] / seconds / rate
            row = f"{batch / seconds:10.0f}{first / seconds:8.2f}{work[name] / 1e9:8.1f}{share:8.0%}"
            print(f"{name:{wide}}{row}")


def copy_weights(reference: nn.Module, release: Release, model: nn.Module) -> None:
    """Give our model the weights of the reference, whose names `release` translates."""
    found, _ = translate(release, reference.state_dict(), model, type(reference).__name__)
    model.load_state_dict(found, strict=False)


def check_equal(contenders: dict[str, Contender]) -> None:
    """Contenders with the same weights that compute the same function must have the same loss."""
    with torch.no_grad():
        losses = {name: loss_of().item() for name, (_, loss_of) in contenders.items()}
    low, high = min(losses.values()), max(losses.values())
    tolerance = 1e-4 if device().type == "cpu" else 1e-3  # a GPU may multiply in TF32
    assert high - low < tolerance * high, f"these should have equal losses: {losses}"
    print(f"with equal weights, {len(losses)} contenders have the same loss: {high:.4f}")


def dtypes(where: torch.device) -> list[torch.dtype]:
    """float32, and bfloat16 where the device computes in it natively."""
    return [torch.float32] + ([torch.bfloat16] if bf16_is_fast(where) else [])


def matmul_rate(dtype: torch.dtype, where: torch.device, clock: Callable[[], float]) -> float:
    """Best floating-point operations per second of one square product."""
    a, best = torch.randn(1024, 1024, device=where, dtype=dtype), 0.0
    for _ in range(12):
        start = clock()
        a @ a
        synchronize(where)
        best = max(best, 2 * 1024**3 / (clock() - start))
    return best


def synchronize(where: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if where.type == "cuda":
        torch.cuda.synchronize()
    elif where.type == "mps":
        torch.mps.synchronize()
