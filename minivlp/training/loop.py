"""The training loop. It knows no model: whatever has `losses(batch)` can be trained."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.data.batch import Batch
from minivlp.machine import bf16_is_fast, reuse_memory
from minivlp.machine import device as best_device
from minivlp.training.checkpoint import CheckpointError, load_tensors, save_tensors, set_weights, weights
from minivlp.training.optim import cosine, make_optimisers


@dataclass(frozen=True)
class Settings:
    """How to train. `faster`: multiples of the learning rate by prefix of parameter name."""

    steps: int
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    faster: dict[str, float] = field(default_factory=dict)
    validate_every: int = 100
    save_every: int = 200


@dataclass
class History:
    """What happened: one row per step (`step`, `loss`, each term, `seconds`), and `validation` (`step`, measures)."""

    steps: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def seconds(self) -> float:
        """Seconds spent training, validation not counted."""
        return self.steps[-1]["seconds"] if self.steps else 0.0

    def __repr__(self) -> str:
        last = f", loss {self.steps[-1]['loss']:.2f}" if self.steps else ""
        return f"History({len(self.steps)} steps{last}{', interrupted' if self.interrupted else ''})"


def fit(
    model: nn.Module,
    batch_at: Callable[[int], Batch],
    settings: Settings,
    *,
    validate: Callable[[], dict[str, float]] | None = None,
    on_step: Iterable[Callable[[dict[str, float]], Any]] = (),
    run_dir: Path | str | None = None,
    device: torch.device | str | None = None,
    bar: bool = True,
) -> History:
    """Train `model` for `settings.steps` steps and return the history.

    Args:
        batch_at: the batch of a step, for instance `Loader(...).batch`. It must depend on the step alone: then a
            resumed run sees what the unbroken one would have seen.
        validate: called every `validate_every` steps and at the end, in evaluation mode and without gradient.
        on_step: called with each step's row, for instance `LiveCurves.log_row`.
        run_dir: where the log (`log.jsonl`) and the state are kept. If it holds an unfinished run with the same
            settings, that run goes on, and equals the unbroken one bit for bit on the same machine.
        device: cuda, mps or cpu, whichever is there; the model is moved to it, stays there, and is left in evaluation
            mode.

    The stop button (KeyboardInterrupt) ends training and keeps the history. Raises CheckpointError when `run_dir` holds
    a run with other settings, FloatingPointError when the loss is no longer a number.
    """
    device = torch.device(device) if device is not None else best_device()
    model.to(device).train()
    reuse_memory()
    optimisers = make_optimisers(model, settings.lr, settings.weight_decay, settings.faster)
    history, start = History(), 0
    run = None if run_dir is None else Run(Path(run_dir), settings)
    if run is not None and run.exists():
        start, history = run.resume(model, optimisers)
    half = torch.autocast(device.type, torch.bfloat16) if bf16_is_fast(device) else nullcontext()
    progress = _progress(start, settings.steps) if bar else None
    began = time.perf_counter() - history.seconds
    try:
        for step in range(start, settings.steps):
            row = {"step": step, **train_step(model, optimisers, batch_at(step).to(device), settings, step, half)}
            row["seconds"] = time.perf_counter() - began
            history.steps.append(row)
            for call in on_step:
                call(row)
            if progress is not None:
                progress.set_postfix(loss=f"{row['loss']:.2f}", refresh=False)
                progress.update()
            done = step + 1
            if validate is not None and (done % settings.validate_every == 0 or done == settings.steps):
                paused = time.perf_counter()
                history.validation.append({"step": step, **evaluate(model, validate)})
                began += time.perf_counter() - paused
            if run is not None and (done % settings.save_every == 0 or done == settings.steps):
                run.save(done, model, optimisers, history)
    except KeyboardInterrupt:
        history.interrupted = True  # the state on disk stays the last whole one: a step may be half done here
    finally:
        if progress is not None:
            progress.close()
        model.eval()
    return history


def train_step(model, optimisers, batch: Batch, settings: Settings, step: int, half) -> dict[str, float]:
    """One optimiser step; returns the loss, its terms and the norm of the gradient."""
    share = cosine(step, settings.steps, settings.warmup)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * group["multiple"] * share
        optimiser.zero_grad()
    with half:
        terms: dict[str, Tensor] = model.losses(batch)
    loss = sum(terms.values())
    if not torch.isfinite(loss):
        parts = ", ".join(f"{name} {value.item():.3g}" for name, value in terms.items())
        raise FloatingPointError(f"the loss is not a number at step {step} ({parts}): lower the learning rate")
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    for optimiser in optimisers:
        optimiser.step()
    if hasattr(model, "after_step"):
        model.after_step()
    return {"loss": loss.item(), **{name: value.item() for name, value in terms.items()}, "gradient": norm.item()}


def evaluate(model: nn.Module, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Call `measure` with the model in evaluation mode and no gradient, then go on training."""
    model.eval()
    with torch.no_grad():
        values = {name: float(value) for name, value in measure().items()}
    model.train()
    return values


def overfit_one_batch(model: nn.Module, batch: Batch, steps: int = 60, lr: float = 2e-3) -> list[float]:
    """Train on one batch only and return the losses: the first thing to try on any new model.

    A model that cannot drive the loss of a single batch towards its floor has a bug, and no data will mend it.
    """
    history = fit(model, lambda step: batch, Settings(steps=steps, lr=lr, warmup=5), bar=False)
    return [row["loss"] for row in history.steps]


def _progress(start: int, steps: int):
    from tqdm.auto import tqdm

    return tqdm(initial=start, total=steps, unit="step")


class Run:
    """A training run's folder: `log.jsonl` for people, `state.safetensors` to go on from."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.state, self.log = folder, folder / "state.safetensors", folder / "log.jsonl"
        self.settings = dataclasses.asdict(settings)

    def exists(self) -> bool:
        return self.state.exists()

    def save(self, step: int, model: nn.Module, optimisers: list[torch.optim.Optimizer], history: History) -> None:
        """Write everything the next step depends on."""
        tensors = {f"model/{name}": tensor for name, tensor in weights(model).items()}
        for which, optimiser in enumerate(optimisers):
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser/{which}/{index}/{key}": torch.as_tensor(v) for key, v in state.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        rows = [{"kind": "step", **row} for row in history.steps]
        rows += [{"kind": "validation", **row} for row in history.validation]
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.log.with_suffix(".part")
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        beside.replace(self.log)  # before the state: a log that is ahead is cut on resuming, one that is behind is lost
        save_tensors(self.state, tensors, {"step": step, "settings": self.settings})

    def resume(self, model: nn.Module, optimisers: list[torch.optim.Optimizer]) -> tuple[int, History]:
        """Put everything back and return the next step and the history so far."""
        tensors, notes = load_tensors(self.state)
        if notes.get("settings") != self.settings:
            raise CheckpointError(
                f"{self.folder} holds a run with other settings ({notes.get('settings')}): "
                "choose another run_dir, or delete this one"
            )
        part = {"model": {}, "optimiser": {}, "random": {}}
        for name, tensor in tensors.items():
            kind, rest = name.split("/", 1)
            part[kind][rest] = tensor
        set_weights(model, part["model"], str(self.state))
        for which, optimiser in enumerate(optimisers):
            state = optimiser.state_dict()
            state["state"] = {}
            for name, tensor in part["optimiser"].items():
                owner, index, key = name.split("/")
                if int(owner) == which:
                    state["state"].setdefault(int(index), {})[key] = tensor
            optimiser.load_state_dict(state)
        torch.set_rng_state(part["random"]["cpu"])
        if "cuda" in part["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(part["random"]["cuda"])
        history = History()
        for line in self.log.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            kind = row.pop("kind")
            if row["step"] < notes["step"]:
                (history.steps if kind == "step" else history.validation).append(row)
        return notes["step"], history
