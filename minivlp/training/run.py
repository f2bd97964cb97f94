"""The folder of a training run: what identifies the run, its log, and the state to resume from.

    run.json            the identity: model, settings, data, tokenizer, seed, options. Written once, at the start
    tokenizer/          the files of the tokenizer (see `tokenizer_of_run`)
    log.jsonl           one row per step and per validation; rows are appended at each save
    state.safetensors   weights, optimizer state and random state at the last save
    lock                the process that trains here now (see `run_lock`)

The process may be killed at any moment. The state is replaced in one operation, so a whole one is always there. The log
is written just before the state: it may be ahead of the state or end in half a line, and is cut back on resuming. If
rows were lost, training still resumes; only the history then has a gap.

A run cannot be made longer: its learning rate is planned for its number of steps and has come down to zero at the end.
More steps are a new run in another folder, which starts from the weights of the first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.training.checkpoint import (
    CheckpointError,
    config_to_dict,
    load_tensors,
    naming,
    read_notes,
    save_tensors,
    save_text,
    set_weights,
    weights,
)
from minivlp.training.run_lock import FolderLock
from minivlp.training.tokenizer_of_run import tokenizer_fingerprint

Row = dict[str, float]
STATE = "state.safetensors"
LEFT_BY_A_KILL = re.compile(r".+\.\d+\.part|\.tmp\w{6}")  # ours, and those of safetensors


@dataclass
class History:
    """The course of a training: one row per step (`step`, `loss`, each term, `gradient`, `seconds`), and `validation`
    (`step` and what was measured). `seconds` of training so far, validation not counted."""

    steps: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    def __repr__(self) -> str:
        last = f", loss {self.steps[-1]['loss']:.2f}" if self.steps else ""
        return f"History({len(self.steps)} steps{last}{', interrupted' if self.interrupted else ''})"


class OtherRun(CheckpointError):
    """A folder holds another run. `found`: the fields that differ, each with its values there and now."""

    def __init__(self, folder: Path, found: dict[str, tuple[str, str]]) -> None:
        remedy = "choose another folder, or delete this one"
        if "settings.steps" in found:
            remedy += ". A run cannot be made longer, but a new run in another folder can start from its weights"
        super().__init__(f"{folder} holds another run ({'; '.join(listed(found))}): {remedy}")
        self.folder, self.found = folder, found


class RunFolder:
    """A run's folder, claimed for one process while the `with` block lasts.

    `identity` is whatever distinguishes this run from others, as values that JSON can hold. What a killed process left
    half-written is deleted. Raises OtherRun if the folder belongs to a run with another identity (every differing field
    is named), and CheckpointError if it holds files of unknown origin, or is in use by another process.
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.state, self.log = self.folder / STATE, self.folder / "log.jsonl"
        self.identity = json.loads(json.dumps(identity, default=str))  # as it will be read back
        self._logged = 0, 0  # rows of the history that are in the log: steps, validations
        self._lock = FolderLock(self.folder)

    def __enter__(self) -> RunFolder:
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.__enter__()
        try:
            self._identify()
            self._sweep()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.__exit__()

    def _identify(self) -> None:
        """Write `run.json`, or compare with the one that is there."""
        file = self.folder / "run.json"
        if not file.exists():
            if strange := [path.name for path in (self.state, self.log) if path.exists()]:
                raise CheckpointError(
                    f"{self.folder} has {' and '.join(strange)}, but no run.json that says of which run: "
                    "choose another folder, or delete these files"
                )
            save_text(file, json.dumps(self.identity, indent=1, ensure_ascii=False) + "\n")
            return
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            found = differing(there, self.identity)
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): choose another folder, or delete it") from None
        if found:
            raise OtherRun(self.folder, found)

    def _sweep(self) -> None:
        """Delete what a killed process left half-written. Nobody else writes here now."""
        for path in self.folder.iterdir():
            if LEFT_BY_A_KILL.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def save(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], history: History) -> None:
        """Append the new rows to the log, then write everything that step `step` and later ones depend on."""
        tensors = {f"model/{name}": tensor for name, tensor in weights(model).items()}
        for number, optimizer in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{number}/{index}/{key}": torch.as_tensor(v) for key, v in state.items()}
        tensors |= {f"random/{name}": state for name, state in random_state().items()}
        self._append(history)
        save_tensors(self.state, tensors, {"step": step, "seconds": history.seconds, "run": self._fingerprint()})

    def _fingerprint(self) -> str:
        """A hash of the identity, by which a state that was copied here from another run is noticed."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def _append(self, history: History) -> None:
        steps, validations = self._logged
        rows = [{"kind": "step", **row} for row in history.steps[steps:]]
        rows += [{"kind": "validation", **row} for row in history.validation[validations:]]
        rows.sort(key=lambda row: row["step"])  # stable: a step comes before its validation
        with naming(self.log), open(self.log, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._logged = len(history.steps), len(history.validation)

    def resume(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, History]:
        """Restore the last saved state; returns the next step and the history. A fresh folder gives 0 and no history.

        Raises CheckpointError for a damaged state.
        """
        step, seconds = self.restore(model, optimizers)
        history = self._read_log(step)
        history.seconds = seconds
        return step, history

    def restore(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
        """`resume` without the log: the next step and the seconds so far. It writes nothing, and needs no lock."""
        if not self.state.exists():
            return 0, 0.0
        tensors, notes = load_tensors(self.state)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        if len(parts) > 3 or not {"step", "seconds"} <= notes.keys():
            raise CheckpointError(f"{self.state} is not the state of a run: choose another folder, or delete it")
        if notes.get("run", self._fingerprint()) != self._fingerprint():
            raise CheckpointError(f"{self.state} is of another run than {self.folder / 'run.json'}: put its own back")
        set_weights(model, parts["model"], str(self.state))
        for number, optimizer in enumerate(optimizers):
            state = optimizer.state_dict()
            state["state"] = {}
            for name, tensor in parts["optimizer"].items():
                owner, index, key = name.split("/")
                if int(owner) == number:
                    state["state"].setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict(state)
        set_random_state(parts["random"])
        return notes["step"], notes["seconds"]

    def _read_log(self, step: int) -> History:
        """The rows before `step`; whatever else the log holds is cut off."""
        history, kept = History(), []
        with naming(self.log):
            text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        lines = text.splitlines()
        for line in lines:
            kind, row = _parsed(line)
            rows = {"step": history.steps, "validation": history.validation}.get(kind)
            if rows is not None and row["step"] < step and (not rows or rows[-1]["step"] < row["step"]):
                rows.append(row)
                kept.append(line)
        if len(kept) < len(lines):
            save_text(self.log, "".join(line + "\n" for line in kept))
        self._logged = len(history.steps), len(history.validation)
        return history


def _parsed(line: str) -> tuple[str, Row]:
    """Kind and values of a row of the log; kind "" for a line that is damaged."""
    try:
        row = json.loads(line)
        kind = row.pop("kind")
        numbers = [row["step"], *([row["loss"], row["seconds"]] if kind == "step" else [])]
        whole = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        return (kind, row) if whole and isinstance(kind, str) else ("", {})
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, OverflowError):
        return "", {}


def saved_step(folder: Path | str) -> int:
    """How many steps of the run in this folder are in its saved state; 0 where there is none that can be read."""
    try:
        return int(read_notes(Path(folder) / STATE)["step"])
    except (CheckpointError, OSError, LookupError, TypeError, ValueError):
        return 0


def differing(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The fields in which two identities differ, nested names joined by dots, with both values as JSON or "absent"."""
    old, new = _flat(there), _flat(now)
    fields = [name for name in {**old, **new} if name not in old or name not in new or old[name] != new[name]]

    def shown(values: dict[str, Any], name: str) -> str:
        return json.dumps(values[name], ensure_ascii=False) if name in values else "absent"

    return {name: (shown(old, name), shown(new, name)) for name in fields}


def listed(found: Mapping[str, tuple[str, str]]) -> list[str]:
    """What `differing` found, each as `settings.steps: there 100, now 200`."""
    return [f"{name}: there {there}, now {now}" for name, (there, now) in found.items()]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def run_identity(dataset: Any, tokenizer: Any, seed: int, **options: Any) -> dict[str, Any]:
    """The part of a run's identity that `fit` cannot see: data, tokenizer, seed, and options such as `init_from`."""
    data = data_fingerprint(dataset)
    return {"data": data, "tokenizer": tokenizer_fingerprint(tokenizer), "seed": seed, "options": options}


def model_identity(model: nn.Module, settings: Any) -> dict[str, Any]:
    """The part of a run's identity that `fit` knows: the model's class and config, and the settings (a dataclass)."""
    config = getattr(model, "config", None)
    return {
        "model": {
            "class": type(model).__name__,
            "config": config_to_dict(config) if dataclasses.is_dataclass(config) else None,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "settings": dataclasses.asdict(settings),
    }


def data_fingerprint(dataset: Any) -> dict[str, str]:
    """How a dataset describes itself, and a hash of what it says about its pictures (not of their pixels).

    That is ids and captions and, of pictures on disk, file names and boxes. Scenes follow from their captions' seed.
    """
    digest = hashlib.sha256()
    rows = getattr(dataset, "rows", ())
    on_disk = len(rows) == len(dataset) > 0 and hasattr(rows[0], "file")
    for row in range(len(dataset)):
        known = [dataset.image_id(row), dataset.captions(row)]
        if on_disk:
            name = os.path.basename(str(rows[row].file))  # without the folder, which may have moved
            known += [name, [(region.kind, region.phrase, region.box) for region in dataset.regions(row)]]
        digest.update(json.dumps(known).encode())
    own = type(dataset).__repr__ is not object.__repr__  # else it shows an address, new in every process
    return {"description": repr(dataset) if own else type(dataset).__name__, "hash": digest.hexdigest()[:16]}


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators: CPU, every CUDA device, MPS."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # otherwise nothing was drawn there
        states |= {f"cuda:{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` returned, for the devices that are available now."""
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == "mps" and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state)
        elif name.startswith("cuda") and torch.device(name).index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)
