"""The training loop and the run folder: learning, bit-exact resumption after a kill at any moment, clear refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minivlp.training import loop, run
from minivlp.training.checkpoint import CheckpointError, load_tensors, save_tensors, weights
from minivlp.training.loop import Settings, evaluate, fit, overfit_one_batch, train_step
from minivlp.training.optim import make_optimizers
from minivlp.training.prefetch import Prefetch
from minivlp.training.run import RunFolder, differing, listed, random_state, set_random_state, tokenizer_fingerprint


@dataclass
class Pairs:
    """A batch: vectors, and the row that belongs to each."""

    inputs: Tensor  # (B, 6)
    targets: Tensor  # (B, 4)

    def to(self, device):
        return Pairs(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Config:
    width: int = 8
    noise: float = 0.1


class Model(nn.Module):
    """A network with a matrix for Muon, other parameters for AdamW, a buffer, and noise in every step."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.up, self.down = nn.Linear(6, config.width), nn.Linear(config.width, 4)
        self.register_buffer("steps_taken", torch.zeros(()))

    def block_matrices(self):
        yield self.up.weight, 1

    def losses(self, batch: Pairs) -> dict[str, Tensor]:
        noise = self.config.noise * torch.randn_like(batch.inputs)  # as masking draws: its state must survive
        outputs = self.down(torch.relu(self.up(batch.inputs + noise)))
        return {"squares": (outputs - batch.targets).square().mean(), "size": 0.01 * outputs.square().mean()}

    def after_step(self) -> None:
        self.steps_taken += 1


def tiny(seed: int = 0, **config) -> Model:
    torch.manual_seed(seed)
    return Model(Config(**config))


def batch_at(step: int) -> Pairs:
    draw = torch.Generator().manual_seed(step)
    inputs = torch.randn(5, 6, generator=draw)
    return Pairs(inputs, inputs[:, :4].sin())


class Killed(BaseException):
    """Like a kill: nothing in the loop catches it."""


QUIET = {"bar": False, "device": "cpu"}

# ---------------------------------------------------------------------------------------------------------- the loop


def test_one_batch_is_overfit():
    losses = overfit_one_batch(tiny(noise=0.0, width=64), batch_at(0), steps=150)
    assert losses[0] > 0.3 and losses[-1] < 0.02


def test_each_row_of_the_history_says_what_happened():
    history = fit(tiny(), batch_at, Settings(steps=4), **QUIET)
    assert [row["step"] for row in history.steps] == [0, 1, 2, 3]
    for row in history.steps:
        assert set(row) == {"step", "loss", "squares", "size", "gradient", "seconds"}
        assert row["loss"] == pytest.approx(row["squares"] + row["size"], rel=1e-5) and row["gradient"] > 0
    assert history.seconds == history.steps[-1]["seconds"] > 0 and not history.interrupted


def test_the_stop_button_keeps_the_history_and_leaves_the_model_usable():
    def stop(row):
        if row["step"] == 2:
            raise KeyboardInterrupt

    model = tiny()
    history = fit(model, batch_at, Settings(steps=50), on_step=[stop], **QUIET)
    assert history.interrupted and len(history.steps) == 3 and not model.training
    assert history.seconds > 0 and "interrupted" in repr(history)


@pytest.mark.parametrize("what, message", [("loss", r"step 2: loss nan, squares nan, size"), ("gradient", "gradient")])
def test_what_is_not_finite_stops_training_before_the_weights_change(what, message):
    model, seen = tiny(), []
    plain = model.losses

    def losses(batch):
        seen.append({name: param.detach().clone() for name, param in model.named_parameters()})
        terms = plain(batch)
        if len(seen) == 3 and what == "loss":
            terms["squares"] = terms["squares"] * float("nan")
        elif len(seen) == 3:
            terms["root"] = (model.up.weight[0, 0] * 0).sqrt()  # 0, with an infinite derivative
        return terms

    model.losses = losses
    with pytest.raises(FloatingPointError, match=message):
        fit(model, batch_at, Settings(steps=9), **QUIET)
    assert len(seen) == 3
    assert all(torch.equal(param, seen[-1][name]) for name, param in model.named_parameters())


def test_validation_is_in_evaluation_mode_without_gradients():
    model, seen = tiny(), []

    def validate():
        seen.append((model.training, torch.is_grad_enabled()))
        return {"measure": torch.tensor(0.5)}

    history = fit(model, batch_at, Settings(steps=5, validate_every=2), validate=validate, **QUIET)
    assert seen == [(False, False)] * 3
    assert history.validation == [{"step": step, "measure": 0.5} for step in (1, 3, 4)]
    model.train()
    evaluate(model, validate)
    assert model.training


def test_the_numbers_of_a_step_are_fetched_at_once(monkeypatch):
    """On a GPU each fetch makes the CPU wait for all that was asked so far."""
    fetched = []

    class Fetches(TorchDispatchMode):  # whatever turns one number of a tensor into one of Python
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "aten::_local_scalar_dense":
                fetched.append("one")
            return func(*args, **(kwargs or {}))

    plain = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: fetched.append("list") or plain(self))
    model = tiny()
    muon = make_optimizers(model, 1e-3, 0.0, {})[:1]  # AdamW counts its steps on the CPU
    with Fetches():
        train_step(model, muon, batch_at(0), Settings(steps=3), 0, torch.autocast("cpu", enabled=False))
    assert fetched == ["list"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_on_a_gpu_waits_for_it_once():
    model, settings = tiny().cuda(), Settings(steps=9)
    optimizers = make_optimizers(model, 1e-3, 0.0, {})
    batch, autocast = batch_at(0).to("cuda"), torch.autocast("cuda", enabled=False)
    train_step(model, optimizers, batch, settings, 0, autocast)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as warned:
            train_step(model, optimizers, batch, settings, 1, autocast)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in warned if "synchronizing" in str(w.message)]) == 1


def test_freed_memory_is_kept_only_during_the_run(monkeypatch):
    events = []

    class Recorded:
        def __enter__(self):
            events.append("kept")

        def __exit__(self, *_):
            events.append("returned")

    monkeypatch.setattr(loop, "reuse_memory", Recorded)
    fit(tiny(), batch_at, Settings(steps=2), on_step=[lambda row: events.append(row["step"])], **QUIET)
    assert events == ["kept", 0, 1, "returned"]


# ---------------------------------------------------------------------------------------------------------- prefetch


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("minivlp-prefetch")]


def test_the_next_batch_is_prepared_while_this_one_is_used():
    prepared = [threading.Event() for _ in range(6)]
    names = []

    def prepare(step):
        names.append(threading.current_thread().name)
        prepared[step].set()
        return 10 * step

    with Prefetch(prepare, range(2, 6)) as batches:
        for step, batch in batches:
            assert batch == 10 * step
            assert step == 5 or prepared[step + 1].wait(5)
            batches.wait()
            assert not any(event.is_set() for event in prepared[step + 2 :]), "one step ahead, no more"
    assert len(names) == 4 and set(names) == {"minivlp-prefetch_0"} and not workers()


def test_no_steps_are_no_batches():
    with Prefetch(lambda step: pytest.fail("prepared"), range(0)) as batches:
        assert list(batches) == []
        batches.wait()


def broken_at(step: int):
    def batch(number: int) -> Pairs:
        if number == step:
            raise OSError("picture 7.jpg cannot be read")
        return batch_at(number)

    return batch


def test_an_error_in_a_batch_is_raised_at_its_step_with_its_own_traceback():
    steps = []
    with pytest.raises(OSError, match="7.jpg") as raised:
        fit(tiny(), broken_at(3), Settings(steps=9), on_step=[lambda row: steps.append(row["step"])], **QUIET)
    assert steps == [0, 1, 2]
    assert "in batch\n    raise OSError" in "".join(traceback.format_tb(raised.tb))
    assert not workers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed, ZeroDivisionError])
def test_the_thread_ends_with_the_run(error):
    def stop(row):
        if row["step"] == 1:
            raise error

    try:
        fit(tiny(), batch_at, Settings(steps=9), on_step=[stop], **QUIET)
    except (Killed, ZeroDivisionError):
        pass
    assert not workers()


def test_validation_and_callbacks_have_the_dataset_for_themselves():
    busy = threading.Event()

    def slow_batch(step):
        busy.set()
        time.sleep(0.02)
        busy.clear()
        return batch_at(step)

    seen = []
    look = lambda *_: seen.append(busy.is_set()) or {}  # noqa: E731
    fit(tiny(), slow_batch, Settings(steps=5, validate_every=1), validate=look, on_step=[look], **QUIET)
    assert seen == [False] * 10


# ------------------------------------------------------------------------------------------------------------- kills


def measure_of(model):
    return lambda: {"weight": model.up.weight.sum().item(), "noise": torch.rand(()).item()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run that no kill may change: final weights, history, and the log."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    model = tiny()
    history = fit(model, batch_at, KILLED, validate=measure_of(model), run_dir=folder, **QUIET)
    return weights(model), history, log_of(folder)


KILLED = Settings(steps=12, warmup=2, save_every=5, validate_every=4)


def log_of(folder: Path) -> list[dict]:
    """The rows of a log, without seconds."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def resumed(folder: Path, **options):
    """The run of `unbroken` in this folder. A new process starts from anything, unless nothing was saved."""
    begun = (folder / "state.safetensors").exists()
    model = tiny(seed=77 if begun else 0)
    return model, fit(model, batch_at, KILLED, validate=measure_of(model), run_dir=folder, **QUIET, **options)


def check(folder: Path, unbroken, model, history, complete_log: bool = True) -> None:
    wanted, expected, log = unbroken
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, wanted[name]), name
    if complete_log:
        assert [row["loss"] for row in history.steps] == [row["loss"] for row in expected.steps]
        assert history.validation == expected.validation
        assert log_of(folder) == log
    assert model.steps_taken == 12
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("kill_at", [0, 1, 4, 5, 6, 11])
def test_a_killed_run_resumed_equals_the_unbroken_one_bit_for_bit(tmp_path, unbroken, kill_at):
    def kill(row):
        if row["step"] == kill_at:
            raise Killed

    with pytest.raises(Killed):
        resumed(tmp_path, on_step=[kill])
    check(tmp_path, unbroken, *resumed(tmp_path))


@pytest.mark.parametrize("save", [1, 2, 3])
@pytest.mark.parametrize("moment", ["half a line", "whole rows", "half a state", "new state"])
def test_a_kill_while_saving_loses_nothing(tmp_path, unbroken, monkeypatch, moment, save):
    saves = []

    def killed_save(path, tensors, notes):
        saves.append(path)
        if len(saves) < save:
            return save_tensors(path, tensors, notes)
        if moment == "half a line":
            log = path.with_name("log.jsonl")
            log.write_bytes(log.read_bytes()[:-20])
        elif moment == "half a state":
            path.with_name("state.safetensors.1.part").write_bytes(b"half")
        elif moment == "new state":
            save_tensors(path, tensors, notes)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_tensors", killed_save)
        with pytest.raises(Killed):
            resumed(tmp_path)
    model, history = resumed(tmp_path)
    (tmp_path / "state.safetensors.1.part").unlink(missing_ok=True)
    check(tmp_path, unbroken, model, history)


@pytest.mark.parametrize("damage", ["absent", "empty", "first rows", "garbage in between", "zeros at the end"])
def test_a_damaged_log_does_not_stop_a_whole_state(tmp_path, unbroken, damage):
    def kill(row):
        if row["step"] == 8:
            raise Killed

    with pytest.raises(Killed):
        resumed(tmp_path, on_step=[kill])
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    if damage == "absent":
        log.unlink()
    else:
        changed = {
            "empty": b"",
            "first rows": b"".join(lines[3:]),
            "garbage in between": lines[0] + b'\xff{"step": 1\n[1]\n' + b"".join(lines[1:]),
            "zeros at the end": b"".join(lines) + bytes(64),
        }
        log.write_bytes(changed[damage])
    model, history = resumed(tmp_path)
    whole = damage in ("garbage in between", "zeros at the end")
    check(tmp_path, unbroken, model, history, complete_log=whole)
    assert [row["step"] for row in history.steps][-7:] == [5, 6, 7, 8, 9, 10, 11]
    assert history.seconds >= history.steps[-1]["seconds"] > 0
    assert len(log_of(tmp_path)) == len(history.steps) + len(history.validation)


PROGRAM = """
import sys
sys.path[:0] = {paths!r}
import torch
from test_training import batch_at, tiny
from minivlp.training.loop import Settings, fit
fit(tiny(), batch_at, Settings(steps=600, save_every=1), run_dir=sys.argv[1], bar=False, device="cpu")
"""


def test_a_process_killed_anywhere_goes_on(tmp_path):
    """With a save in every step, a kill hits one of them."""
    program = PROGRAM.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    log = tmp_path / "log.jsonl"
    for wanted in (3, 40):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        while not (log.exists() and log.read_bytes().count(b"\n") >= wanted):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    saved = load_tensors(tmp_path / "state.safetensors")[1]["step"]
    model = tiny(seed=9)
    settings = Settings(steps=600, save_every=1)
    history = fit(model, batch_at, settings, run_dir=tmp_path, on_step=[stop_after(saved + 3)], **QUIET)
    expected = fit(tiny(), batch_at, settings, on_step=[stop_after(saved + 3)], **QUIET)
    assert [row["loss"] for row in history.steps] == [row["loss"] for row in expected.steps]


def stop_after(step: int):
    def stop(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    return stop


# ----------------------------------------------------------------------------------------------------- the run folder


def test_a_finished_run_is_not_run_again(tmp_path):
    settings = Settings(steps=3, save_every=2)
    fit(tiny(), batch_at, settings, run_dir=tmp_path, **QUIET)
    again = fit(tiny(), lambda step: pytest.fail("trained again"), settings, run_dir=tmp_path, **QUIET)
    assert len(again.steps) == 3 and again.seconds > 0


def test_another_run_is_refused_and_every_difference_named(tmp_path):
    identity = {"seed": 0, "options": {"data": "scenes", "frozen": None}}
    settings = Settings(steps=3, save_every=2, lr_multipliers={"up.": 2.0})
    fit(tiny(), batch_at, settings, run_dir=tmp_path, identity=identity, **QUIET)
    state = (tmp_path / "state.safetensors").read_bytes()
    other = {"seed": 1, "options": {"data": "scenes", "frozen": None, "tower": "vit"}}
    changed = replace(settings, steps=4, lr_multipliers={})
    model = tiny(width=16)
    model.up.requires_grad_(False)
    with pytest.raises(CheckpointError) as raised:
        fit(model, batch_at, changed, run_dir=tmp_path, identity=other, **QUIET)
    for part in (
        f"{tmp_path} holds another run",
        "model.config.width: there 8, now 16",
        "model.trainable_parameters: there 92, now 68",
        "settings.steps: there 3, now 4",
        "settings.lr_multipliers.up.: there 2.0, now absent",
        "seed: there 0, now 1",
        'options.tower: there absent, now "vit"',
        "choose another folder, or delete this one",
    ):
        assert part in str(raised.value)
    assert "options.data" not in str(raised.value) and "class" not in str(raised.value)
    assert (tmp_path / "state.safetensors").read_bytes() == state
    assert len(fit(tiny(), batch_at, settings, run_dir=tmp_path, identity=identity, **QUIET).steps) == 3


def test_another_class_of_model_is_another_run(tmp_path):
    class Other(Model):
        pass

    fit(tiny(), batch_at, Settings(steps=1), run_dir=tmp_path, **QUIET)
    with pytest.raises(CheckpointError, match='model.class: there "Model", now "Other"'):
        fit(Other(Config()), batch_at, Settings(steps=1), run_dir=tmp_path, **QUIET)


def test_an_identity_may_hold_whatever_can_be_written(tmp_path):
    identity = {"path": Path("a/b"), "pair": (1, 2)}
    for _ in range(2):
        with RunFolder(tmp_path, identity):
            pass
    assert json.loads((tmp_path / "run.json").read_text()) == {"path": os.path.join("a", "b"), "pair": [1, 2]}


@pytest.mark.parametrize("name", ["state.safetensors", "log.jsonl"])
def test_files_of_unknown_origin_are_not_touched(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(CheckpointError, match=f"has {name}, but no run.json"):
        fit(tiny(), batch_at, Settings(steps=1), run_dir=tmp_path, **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "precious"


def test_an_identity_that_cannot_be_read_is_said(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": ')
    with pytest.raises(CheckpointError, match="run.json cannot be read"):
        fit(tiny(), batch_at, Settings(steps=1), run_dir=tmp_path, **QUIET)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    refused = []

    def second(row):
        with pytest.raises(CheckpointError, match="in use by another training process") as raised:
            fit(tiny(), batch_at, Settings(steps=3), run_dir=tmp_path, **QUIET)
        refused.append(raised)

    fit(tiny(), batch_at, Settings(steps=1), on_step=[second], run_dir=tmp_path, **QUIET)
    assert refused
    with pytest.raises(CheckpointError, match="another run"):  # the lock is gone: this is about the settings
        fit(tiny(), batch_at, Settings(steps=3), run_dir=tmp_path, **QUIET)


def test_the_log_is_appended_at_each_save(tmp_path):
    log, sizes, starts = tmp_path / "log.jsonl", [], []

    def look(row):
        if log.exists():
            sizes.append(log.stat().st_size)
            starts.append((log.stat().st_ino, log.read_bytes()[: sizes[0]]))

    fit(tiny(), batch_at, Settings(steps=9, save_every=3), on_step=[look], run_dir=tmp_path, **QUIET)
    assert len(set(sizes)) == 2 and len(set(starts)) == 1, "two saves seen from within, always the same file"
    assert len(log_of(tmp_path)) == 9


def test_differences_are_told_field_by_field():
    there = {"a": {"b": 1, "c": [1, 2]}, "same": {"x": None}}
    now = {"a": {"b": 2, "d": "é"}, "same": {"x": None}}
    assert listed(differing(there, now)) == [
        "a.b: there 1, now 2",
        "a.c: there [1, 2], now absent",
        'a.d: there absent, now "é"',
    ]
    assert differing(there, there) == {}


def test_the_random_state_comes_back():
    state, drawn = random_state(), torch.rand(3)
    torch.rand(7)
    set_random_state(state)
    assert torch.equal(torch.rand(3), drawn)
    set_random_state({**state, "cuda:9": state["cpu"], "mps": state["cpu"]} if not torch.cuda.is_available() else state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_random_state_of_every_gpu_comes_back():
    torch.cuda.init()
    state = random_state()
    drawn = [torch.rand(3, device=f"cuda:{n}") for n in range(torch.cuda.device_count())]
    set_random_state(state)
    assert all(torch.equal(torch.rand(3, device=tensor.device), tensor) for tensor in drawn)


class Words:
    """As much of a tokenizer as a fingerprint needs."""

    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}

    def __call__(self, texts):
        return {"input_ids": [[len(text) % len(self.words)] for text in texts]}


def test_tokenizers_are_told_apart_by_what_they_number():
    one = tokenizer_fingerprint(Words("a", "b", "c"))
    assert one.startswith("3 tokens, ") and one == tokenizer_fingerprint(Words("a", "b", "c"))
    assert len({one, tokenizer_fingerprint(Words("b", "a", "c")), tokenizer_fingerprint(Words("a", "b"))}) == 3


class Captions:
    """As much of a dataset as an identity needs."""

    def __init__(self, *captions):
        self.texts = captions

    def __len__(self):
        return len(self.texts)

    def captions(self, row):
        return [self.texts[row]]

    def image_id(self, row):
        return row


def test_data_are_told_apart_by_their_captions():
    one = run.run_identity(Captions("a dog", "a cat"), Words("a"), 3, init_from="towers")
    assert one == run.run_identity(Captions("a dog", "a cat"), Words("a"), 3, init_from="towers")
    assert one["seed"] == 3 and one["options"] == {"init_from": "towers"}
    assert one["data"]["description"] == "Captions", "not the address of an object"
    other = run.run_identity(Captions("a dog", "a cow"), Words("a"), 3, init_from="towers")
    assert list(differing(one, other)) == ["data.hash"]
