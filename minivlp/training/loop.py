"""The training loop. It knows no model: whatever has `losses(batch)` can be trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minivlp.data.batch import Batch
from minivlp.data.processes import ALONE, Processes
from minivlp.device import bf16_is_fast, reuse_memory
from minivlp.device import device as best_device
from minivlp.errors import NotFinite
from minivlp.training.accumulation import backward_in_parts
from minivlp.training.optim import cosine, make_optimizers
from minivlp.training.prefetch import Prefetch
from minivlp.training.run import History, RunFolder, model_identity
from minivlp.weight_files import CheckpointError


@dataclass(frozen=True)
class Settings:
    """How to train. `lr_multipliers`: prefix of parameter names -> multiple of the learning rate."""

    steps: int
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    validate_every: int = 100
    save_every: int = 200


def fit(
    model: nn.Module,
    batch_at: Callable[[int], Batch],
    settings: Settings,
    *,
    validate: Callable[[], dict[str, float]] | None = None,
    on_step: Iterable[Callable[[dict[str, float]], Any]] = (),
    run_dir: Path | str | RunFolder | None = None,
    identity: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    bar: bool = True,
    accumulate: int = 1,
    processes: Processes = ALONE,
) -> History:
    """Train `model` for `settings.steps` steps and return the history.

    Args:
        batch_at: the batch of a step, for instance `Loader(...).batch`. It must depend on the step alone, because a
            background thread calls it one step ahead, and because a resumed run must see what the uninterrupted one
            would have seen. The thread is idle while `validate` and `on_step` run.
        validate: called every `validate_every` steps and at the end, in evaluation mode and without gradients.
        on_step: called with each step's row, for instance `LiveCurves.log_row`.
        run_dir: the folder of the log and the state (see `run`). An unfinished run with the same identity is resumed,
            and equals the uninterrupted one bit for bit on the same hardware. A `RunFolder` that is open already, whose
            identity includes `model_identity`, takes the place of `run_dir` and `identity`.
        identity: what else distinguishes this run from others, besides the model's class and config and the settings:
            see `run_identity`.
        device: cuda, mps or cpu; by default the best available. The model is moved there, stays there, and is left in
            evaluation mode.
        accumulate: in how many parts the batch is computed, one after the other, to need less memory (`accumulation`).
        processes: the processes that train together (`distributed.join`). Then `batch_at` gives this process's rows,
            and `validate`, `on_step`, the bar and the files are the first one's alone.

    The stop button (KeyboardInterrupt) ends training and keeps the history. Raises CheckpointError when `run_dir` holds
    another run, NotFinite when a loss or the gradient is not finite; the weights are then those before the
    step.
    """
    device = torch.device(device or processes.device or best_device())
    first = processes.rank == 0
    model.to(device).train()
    optimizers = make_optimizers(model, settings.lr, settings.weight_decay, settings.lr_multipliers)
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16_is_fast(device) else nullcontext()

    def prepare(step: int) -> Batch:
        batch = batch_at(step)
        return batch.to(device) if device.type == "cuda" else batch  # MPS is not made for several threads

    history, start, run = History(), 0, None
    with ExitStack() as stack:
        stack.callback(model.eval)  # last of all, when the background thread has ended
        if run_dir is not None:
            run = run_dir
            if not isinstance(run_dir, RunFolder):
                whole = {**(identity or {}), **model_identity(model, settings)}
                run = stack.enter_context(processes.opened_by_first(RunFolder(run_dir, whole)))
            start, history = processes.on_first(lambda: run.resume(model, optimizers))
            if not first and run.restore(model, optimizers)[0] != start:
                raise CheckpointError(f"{run.state} differs between processes: they need a disk that all can read")
        processes.begin(model)
        if device.type == "cpu":
            stack.enter_context(reuse_memory())
        batches = stack.enter_context(Prefetch(prepare, range(start, settings.steps)))
        progress = stack.enter_context(_progress(start, settings.steps, bar and first))
        began = time.perf_counter() - history.seconds
        try:
            for step, batch in batches:
                with processes.step(step):
                    values = train_step(
                        model, optimizers, batch.to(device), settings, step, autocast, accumulate, processes
                    )
                row = {"step": step, **values}
                row["seconds"] = history.seconds = time.perf_counter() - began
                history.steps.append(row)
                batches.wait()
                for call in on_step if first else ():
                    call(row)
                progress.set_postfix(loss=f"{row['loss']:.2f}", refresh=False)
                progress.update()
                done = step + 1
                if validate is not None and (done % settings.validate_every == 0 or done == settings.steps):
                    paused = time.perf_counter()
                    if first:
                        history.validation.append({"step": step, **evaluate(model, validate)})
                    processes.barrier()
                    began += time.perf_counter() - paused
                if run is not None and first and (done % settings.save_every == 0 or done == settings.steps):
                    run.save(done, model, optimizers, history)
        except KeyboardInterrupt:
            history.interrupted = True  # nothing is saved now: the step may be half done
    return history


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batch: Batch,
    settings: Settings,
    step: int,
    autocast: AbstractContextManager,
    accumulate: int = 1,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """One optimizer step; returns the loss, its terms and the norm of the gradient before clipping.

    The numbers are fetched from the device together, once: it is the only time that the CPU waits for it.
    """
    fraction = cosine(step, settings.steps, settings.warmup)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * group["lr_multiplier"] * fraction
        optimizer.zero_grad()
    if accumulate > 1:
        terms = backward_in_parts(model, batch, accumulate, autocast, processes)
    else:
        with autocast:
            terms = model.losses(batch) if processes.size == 1 else model.losses(batch, processes=processes)
        sum(terms.values()).backward()
    processes.add_gradients(model.parameters())
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    loss = sum(terms.values())
    dtype = torch.promote_types(loss.dtype, torch.float32)
    shares = torch.stack([value.detach().to(loss.device, dtype) for value in (loss, *terms.values())])
    on_device = torch.cat([processes.add_up(shares), norm.detach().to(shares)[None]])
    values = dict(zip(("loss", *terms, "gradient"), on_device.tolist(), strict=True))
    if not all(math.isfinite(value) for value in values.values()):
        parts = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        raise NotFinite(f"not finite at step {step}: {parts}.", "Lower the learning rate: {}.", "Settings.lr")
    for optimizer in optimizers:
        optimizer.step()
    if hasattr(model, "after_step"):
        model.after_step()
    return values


def evaluate(model: nn.Module, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Call `measure` with the model in evaluation mode and without gradients, then return to training mode."""
    model.eval()
    with torch.no_grad():
        values = {name: float(value) for name, value in measure().items()}
    model.train()
    return values


def overfit_one_batch(model: nn.Module, batch: Batch, steps: int = 60, lr: float = 2e-3) -> list[float]:
    """Train on one batch only and return the losses: the first test of any new model.

    If the loss of a single batch does not fall towards its minimum, the model or its loss has a bug.
    """
    history = fit(model, lambda step: batch, Settings(steps=steps, lr=lr, warmup=5), bar=False)
    return [row["loss"] for row in history.steps]


def _progress(start: int, steps: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(initial=start, total=steps, unit="step", disable=not shown)
