"""What can only be seen on a GPU, in one run: do the models compute there what they compute on a CPU, do they train,
how fast, and with how much memory?

    python tools/gpu_check.py                     everything; writes records/gpu.json after each part
    python tools/gpu_check.py --steps 50 --batch 64 --only parity training
    python tools/gpu_check.py --list              the parts

Without a GPU it says so, writes nothing and ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.console import print_in_any_encoding
from minivlp.data.batch import Batch, Text
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.device import bf16_is_fast, device
from minivlp.papers import PAPERS
from minivlp.training.checkpoint import save_text
from minivlp.training.loop import Settings, fit
from minivlp.training.optim import make_optimizers
from minivlp.training.recipes import Recipe

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "records" / "gpu.json"
BENCHMARKS = ("clip_step", "vilt_step", "albef_step", "vlmo_step", "blip_step", "blip_generate", "attention")
LONGEST = 300  # seconds of one benchmark
# Largest differences from the CPU in float32 that count as equal. bfloat16 has three digits, float32 seven; sums of
# another order cost some of them.
TOLERANCE = {"float32": {"loss": 1e-4, "gradient": 1e-3}, "bfloat16": {"loss": 0.05, "gradient": 0.2}}
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- parity


def parity(name: str, where: torch.device, options: argparse.Namespace) -> Row:
    """How far losses and gradients of a nano model on `where` are from those on the CPU in float32.

    Same weights, same batch, and the same random choices, which are made on the CPU. `gradient` is the norm of the
    difference of all gradients together, over the norm of the CPU's.
    """
    model, batch = nano_with_batch(name)
    drawn = choices(model, batch)
    expected, gradient = losses_and_gradient(model, batch, drawn, nullcontext())
    model.to(where)
    row: Row = {}
    for dtype in ("float32", *(["bfloat16"] if bf16_is_fast(where) else [])):
        cast = torch.autocast(where.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
        losses, found = losses_and_gradient(model, batch.to(where), moved(drawn, where), cast)
        differences = {
            "loss": max(abs(losses[term] / expected[term] - 1) for term in expected),
            "gradient": ((found - gradient).norm() / gradient.norm()).item(),
        }
        row[dtype] = {**differences, "equal": all(v <= TOLERANCE[dtype][k] for k, v in differences.items())}
    return row


def nano_with_batch(name: str) -> tuple[nn.Module, Batch]:
    """A random nano model, in evaluation mode (a momentum model takes no step), and eight scenes for it."""
    torch.manual_seed(0)
    tokenizer, paper = load_tokenizer(), PAPERS[name]
    recipe = replace(paper.recipe("quick"), batch_size=8, init_from=None, frozen=())
    model = recipe.build(paper.model_class(), tokenizer).eval()
    scenes = Scenes(64, size=recipe.size, objects=recipe.objects)
    return model, recipe.batches(scenes, tokenizer, model=model)(0)


def choices(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the losses would draw at random, as they take it: negatives, masked tokens, ViLT's paired images."""
    encoded, found = model.encode(batch), {}
    with torch.no_grad():
        if {"itm", "mlm", "wpa"} & set(model.config.losses):
            found |= {"masked": encoded.masked} if "mlm" in model.config.losses else {}
            if hasattr(type(encoded), "paired"):
                found["paired"] = encoded.paired
            elif "itm" in model.config.losses:
                found["negatives"] = encoded.negatives
    return found


def moved(value: Any, where: torch.device) -> Any:
    """Tensors, texts, tuples and dicts of them, on another device."""
    if isinstance(value, dict):
        return {key: moved(part, where) for key, part in value.items()}
    if isinstance(value, (Tensor, Text)):
        return value.to(where)
    return type(value)(*(moved(part, where) for part in value))


def losses_and_gradient(model: nn.Module, batch: Batch, drawn: dict[str, Any], cast: Any) -> tuple[Row, Tensor]:
    """Each loss, and all gradients in one vector on the CPU."""
    model.zero_grad()
    with cast:
        losses = model.losses(batch, **drawn)
    sum(losses.values()).backward()
    gradients = [p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return {term: loss.item() for term, loss in losses.items()}, torch.cat(gradients)


# ----------------------------------------------------------------------------------------------------------- training


def training(name: str, where: torch.device, options: argparse.Namespace) -> Row:
    """A model of the profile `gpu`, trained for some steps as the command line does it: the loss must fall.

    `seconds_making_batches` of drawing scenes pass on the CPU, in the background; where they come near `seconds`, the
    GPU waits for them, and `step_time` says what it can do.
    """
    recipe, model, batch_at = of_gpu_profile(name, where, options)
    seconds = 0.0

    def timed(step: int) -> Batch:
        nonlocal seconds
        began = time.perf_counter()
        batch = batch_at(step)
        seconds += time.perf_counter() - began
        return batch

    reset_peak(where)
    settings = Settings(steps=options.steps, lr=recipe.lr, warmup=options.steps // 6)
    history = fit(model, timed, settings, device=where)
    losses = [row["loss"] for row in history.steps]
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": recipe.batch_size,
        "steps": options.steps,
        "seconds": history.seconds,
        "seconds_making_batches": seconds,
        "loss_first_tenth": first,
        "loss_last_tenth": last,
        "falls": last < first,
        "peak_GiB": peak(where),
    }


def of_gpu_profile(
    name: str, where: torch.device, options: argparse.Namespace
) -> tuple[Recipe, nn.Module, Callable[[int], Batch]]:
    """The recipe of the profile `gpu` with the options' batch size, its model and its batches."""
    torch.manual_seed(0)
    tokenizer, paper = load_tokenizer(), PAPERS[name]
    recipe = paper.recipe("gpu")
    recipe = replace(recipe, batch_size=options.batch or recipe.batch_size, preset=options.preset)
    scenes = Scenes(min(recipe.scenes, recipe.batch_size * options.steps), size=recipe.size, objects=recipe.objects)
    model = recipe.build(paper.model_class(), tokenizer).to(where)
    return recipe, model, recipe.batches(scenes, tokenizer, model=model)


def step_time(name: str, where: torch.device, options: argparse.Namespace) -> Row:
    """Milliseconds of an optimizer step on one batch that lies on the device, and the peak memory, by dtype."""
    recipe, model, batch_at = of_gpu_profile(name, where, options)
    optimizers, batch = make_optimizers(model, recipe.lr, 0.05, {}), batch_at(0).to(where)
    row: Row = {"batch": recipe.batch_size}
    model.train()
    for dtype in ("float32", *(["bfloat16"] if bf16_is_fast(where) else [])):
        cast = torch.autocast(where.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
        reset_peak(where)
        times = []
        for _ in range(options.rounds + 3):  # the first ones find kernels and take memory
            began = time.perf_counter()
            for optimizer in optimizers:
                optimizer.zero_grad()
            with cast:
                loss = sum(model.losses(batch).values())
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            synchronize(where)
            times.append(time.perf_counter() - began)
        middle = sorted(times[3:])[options.rounds // 2]
        row[dtype] = {"ms": 1000 * middle, "pairs_per_second": recipe.batch_size / middle, "peak_GiB": peak(where)}
    return row


# ------------------------------------------------------------------------------------------------ programs of their own


def benchmark(name: str, where: torch.device, options: argparse.Namespace) -> Row:
    """What a benchmark prints, at its own settings."""
    return program([sys.executable, "-m", f"benchmarks.{name}"])


def processes(name: str, where: torch.device, options: argparse.Namespace) -> Row:
    """The command line with one process per GPU, by NCCL."""
    count = torch.cuda.device_count()
    if count < 2:
        return {"skipped": f"{count} GPU: two are needed"}
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "minivlp"]
    out = ROOT / "runs" / f"gpu-check-{os.getpid()}"
    return program([*run, "train", name, "--steps", "30", "--out", str(out)])


def program(command: list[str]) -> Row:
    """The output of a program and whether it succeeded, within `LONGEST` seconds."""
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return {"succeeded": False, "said": [f"not finished after {LONGEST} s"]}
    said = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    seconds = time.perf_counter() - began
    return {"succeeded": done.returncode == 0, "seconds": seconds, "said": said.strip().splitlines()[-40:]}


# ------------------------------------------------------------------------------------------------------------- memory


def synchronize(where: torch.device) -> None:
    """Wait until the device has computed everything."""
    if where.type != "cpu":
        getattr(torch, where.type).synchronize()


def reset_peak(where: torch.device) -> None:
    """From now on `peak` counts anew."""
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)


def peak(where: torch.device) -> float | None:
    """The most memory that tensors have taken, in GiB; None where torch does not count it."""
    return torch.cuda.max_memory_allocated(where) / 2**30 if where.type == "cuda" else None


# --------------------------------------------------------------------------------------------------------------- all

PARTS: dict[str, tuple[Callable[..., Row], tuple[str, ...]]] = {
    "parity": (parity, tuple(PAPERS)),
    "training": (training, tuple(PAPERS)),
    "step_time": (step_time, tuple(PAPERS)),
    "benchmark": (benchmark, BENCHMARKS),
    "processes": (processes, ("clip", "albef")),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, write the record after each row, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each training (default: 300)")
    parser.add_argument("--rounds", type=int, default=20, help="steps that are timed (default: 20)")
    parser.add_argument("--batch", type=int, help="pairs per step (default: each recipe's)")
    parser.add_argument("--preset", default="small", help="size of the trained models (default: small)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list the parts and their rows")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{part:10} {' '.join(names)}" for part, (_, names) in PARTS.items()))
        return 0
    where = device()
    if where.type == "cpu":
        print("gpu_check: torch sees no GPU here, so nothing was checked and nothing was written", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    record: Row = {"command": "python tools/gpu_check.py", "machine": machine(where), "options": vars(options)}
    failed = []
    for part in options.only:
        call, names = PARTS[part]
        for name in names:
            row = attempt(call, name, where, options)
            record.setdefault(part, {})[name] = row
            save_text(RECORD, json.dumps(record, indent=1, default=str) + "\n")
            print(f"{part} {name}: {json.dumps({k: v for k, v in row.items() if k != 'said'})}", flush=True)
            if not succeeded(row):
                failed.append(f"{part} {name}")
    print(f"written: {RECORD}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def attempt(call: Callable[..., Row], name: str, where: torch.device, options: argparse.Namespace) -> Row:
    """The row of a part; an error, such as too little memory, is a row too and does not end the others."""
    try:
        return call(name, where, options)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        if where.type == "cuda":
            torch.cuda.empty_cache()


def succeeded(row: Row) -> bool:
    """Whether nothing in a row says otherwise."""
    wrong = "error" in row or not row.get("succeeded", True) or not row.get("falls", True)
    return (
        not wrong and all(succeeded(part) for part in row.values() if isinstance(part, dict)) and row.get("equal", True)
    )


def machine(where: torch.device) -> Row:
    """What the numbers were measured on."""
    row: Row = {"device": str(where), "torch": torch.__version__, "bfloat16": bf16_is_fast(where)}
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        row |= {"name": properties.name, "GiB": properties.total_memory / 2**30, "count": torch.cuda.device_count()}
        row |= {"cuda": torch.version.cuda, "capability": f"{properties.major}.{properties.minor}"}
    return row


if __name__ == "__main__":
    print_in_any_encoding()
    sys.exit(main())
