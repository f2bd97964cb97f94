"""The folder of a training run: what identifies the run, its log, and the state to resume from.

    run.json            the identity: model, settings, data, tokenizer, seed, options. Written once, at the start
    log.jsonl           one row per step and per validation; rows are appended at each save
    state.safetensors   weights, optimizer state and random state at the last save

The process may be killed at any moment. The state is replaced in one operation, so a whole one is always there. The log
is written just before the state: it may be ahead of the state or end in half a line, and is cut back on resuming. If
rows were lost, training still resumes; only the history then has a gap.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.training.checkpoint import CheckpointError, load_tensors, save_tensors, save_text, set_weights, weights
from minivlp.training.tokenizer_of_run import tokenizer_fingerprint

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed there
    fcntl = None

Row = dict[str, float]


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


class RunFolder:
    """A run's folder, claimed for one process while the `with` block lasts.

    `identity` is whatever distinguishes this run from others, as values that JSON can hold. Raises CheckpointError if
    the folder belongs to a run with another identity (every differing field is named), holds files of unknown origin,
    or is in use by another process.
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.state, self.log = self.folder / "state.safetensors", self.folder / "log.jsonl"
        self.identity = json.loads(json.dumps(identity, default=str))  # as it will be read back
        self._logged = 0, 0  # rows of the history that are in the log: steps, validations
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim()
        try:
            self._identify()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self._lock is not None:
            os.close(self._lock)  # which also unlocks, as the end of the process does
            self._lock = None

    def _claim(self) -> None:
        """Lock the folder itself, so that nothing is left behind by a kill."""
        if fcntl is None:
            return
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.__exit__()
            raise CheckpointError(
                f"{self.folder} is in use by another training process: wait for its end, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            pass

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
        except ValueError as error:
            raise CheckpointError(f"{file} cannot be read ({error}): choose another folder, or delete it") from None
        if found := differences(there, self.identity):
            raise CheckpointError(
                f"{self.folder} holds another run ({'; '.join(found)}): choose another folder, or delete this one"
            )

    def save(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], history: History) -> None:
        """Append the new rows to the log, then write everything that step `step` and later ones depend on."""
        tensors = {f"model/{name}": tensor for name, tensor in weights(model).items()}
        for number, optimizer in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{number}/{index}/{key}": torch.as_tensor(v) for key, v in state.items()}
        tensors |= {f"random/{name}": state for name, state in random_state().items()}
        self._append(history)
        save_tensors(self.state, tensors, {"step": step, "seconds": history.seconds})

    def _append(self, history: History) -> None:
        steps, validations = self._logged
        rows = [{"kind": "step", **row} for row in history.steps[steps:]]
        rows += [{"kind": "validation", **row} for row in history.validation[validations:]]
        rows.sort(key=lambda row: row["step"])  # stable: a step comes before its validation
        with open(self.log, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._logged = len(history.steps), len(history.validation)

    def resume(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, History]:
        """Restore the last saved state; returns the next step and the history. A fresh folder gives 0 and no history.

        Raises CheckpointError for a damaged state.
        """
        if not self.state.exists():
            return 0, self._read_log(0)
        tensors, notes = load_tensors(self.state)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
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
        history = self._read_log(notes["step"])
        history.seconds = notes["seconds"]
        return notes["step"], history

    def _read_log(self, step: int) -> History:
        """The rows before `step`; whatever else the log holds is cut off."""
        history, kept = History(), []
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
                kind, early = row.pop("kind"), row["step"] < step
            except (ValueError, LookupError, AttributeError, TypeError):
                continue  # half a line
            if early:
                (history.steps if kind == "step" else history.validation).append(row)
                kept.append(line)
        if len(kept) < len(lines):
            save_text(self.log, "".join(line + "\n" for line in kept))
        self._logged = len(history.steps), len(history.validation)
        return history


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields in which two identities differ, as `settings.steps: there 100, now 200`."""
    old, new = _flat(there), _flat(now)
    fields = [name for name in {**old, **new} if name not in old or name not in new or old[name] != new[name]]

    def shown(values: dict[str, Any], name: str) -> str:
        return json.dumps(values[name], ensure_ascii=False) if name in values else "absent"

    return [f"{name}: there {shown(old, name)}, now {shown(new, name)}" for name in fields]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def run_identity(dataset: Any, tokenizer: Any, seed: int, **options: Any) -> dict[str, Any]:
    """The part of a run's identity that `fit` cannot see: data, tokenizer, seed, and options such as `init_from`.

    The data are known by what the dataset calls itself and by a hash of all image ids and captions.
    """
    digest = hashlib.sha256()
    for row in range(len(dataset)):
        digest.update(json.dumps([dataset.image_id(row), dataset.captions(row)]).encode())
    own = type(dataset).__repr__ is not object.__repr__  # else it shows an address, new in every process
    data = {"description": repr(dataset) if own else type(dataset).__name__, "hash": digest.hexdigest()[:16]}
    return {"data": data, "tokenizer": tokenizer_fingerprint(tokenizer), "seed": seed, "options": options}


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
