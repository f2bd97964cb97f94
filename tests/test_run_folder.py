"""Run folders on real machines: one process at a time, what a kill leaves behind, rights of files, damaged logs."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_training import QUIET, Captions, Words, batch_at, tiny

from minivlp.data.batch import Region
from minivlp.training import run_lock
from minivlp.training.checkpoint import CheckpointError, load_tensors, save_model, save_tensors, save_text
from minivlp.training.loop import Settings, fit
from minivlp.training.run import OtherRun, data_fingerprint, differing, run_identity, saved_step
from minivlp.training.run_lock import FolderLock, Owner

HOST = socket.gethostname()
ENDED = 2**22 + 1  # no process has this number: Linux counts to 2^22


def train(folder, steps=4, **options):
    return fit(tiny(), batch_at, Settings(steps=steps, save_every=2), run_dir=folder, **QUIET, **options)


# ----------------------------------------------------------------------------------------------------- one process only


@pytest.fixture(params=["no flock", "flock fails"])
def without_locks(request, monkeypatch):
    """Windows, and a network file system that refuses to lock."""
    if request.param == "no flock":
        monkeypatch.setattr(run_lock, "fcntl", None)
    elif run_lock.fcntl is None:
        pytest.skip("this is Windows")
    else:

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(run_lock.fcntl, "flock", refuse)


def leave_lock(folder: Path, pid: int, host: str = HOST) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "lock").write_text(json.dumps({"pid": pid, "host": host}), encoding="utf-8")


HOLDER = "import sys, time; sys.path.insert(0, {root!r}); from pathlib import Path\n" + (
    "from minivlp.training.run_lock import FolderLock\n"
    "with FolderLock(Path({folder!r})): print('held', flush=True); time.sleep(60)"
)


def test_a_second_process_is_refused_by_the_number_of_the_first(tmp_path):
    """And when the first is killed, its claim is gone."""
    code = HOLDER.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"in use by another training process \(process {holder.pid}\)"):
            train(tmp_path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (tmp_path / "lock").exists(), "a kill leaves the file"
    assert len(train(tmp_path).steps) == 4 and not (tmp_path / "lock").exists()


def test_without_locks_a_running_process_is_looked_up(tmp_path, without_locks):
    leave_lock(tmp_path, os.getppid())
    with pytest.raises(CheckpointError, match=rf"\(process {os.getppid()}\): wait for its end, or choose another"):
        train(tmp_path)
    assert (tmp_path / "lock").exists(), "it is the other's"


@pytest.mark.parametrize("pid", [ENDED, os.getpid()])
def test_without_locks_an_ended_process_is_taken_over(tmp_path, without_locks, pid):
    """Our own number too: in a container, each process may have the same one."""
    leave_lock(tmp_path, pid)
    assert len(train(tmp_path).steps) == 4 and not (tmp_path / "lock").exists()


def test_without_locks_we_do_not_claim_twice(tmp_path, without_locks):
    with FolderLock(tmp_path), pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        FolderLock(tmp_path).__enter__()
    with FolderLock(tmp_path):
        assert run_lock.read(tmp_path / "lock") == Owner(os.getpid(), HOST)


def test_a_process_of_another_machine_cannot_be_looked_up(tmp_path, without_locks):
    leave_lock(tmp_path, ENDED, "elsewhere")
    with pytest.raises(CheckpointError, match=f"process {ENDED} on elsewhere.*has ended, delete {tmp_path / 'lock'}"):
        train(tmp_path)


@pytest.mark.parametrize("content", [b"", b"12", b"{}", b'{"pid": null, "host": 1}', b"\xff"])
def test_a_lock_that_names_nobody_is_taken_over_when_it_is_old(tmp_path, without_locks, content):
    lock = tmp_path / "lock"
    lock.write_bytes(content)
    with pytest.raises(CheckpointError, match="in use"):  # its process may be about to write its name
        train(tmp_path)
    os.utime(lock, (time.time() - 60,) * 2)
    assert len(train(tmp_path).steps) == 4


def test_of_two_that_take_over_one_gets_it(tmp_path, without_locks, monkeypatch):
    leave_lock(tmp_path, ENDED)
    plain = run_lock.write

    def overtaken(descriptor, owner):
        plain(descriptor, owner)
        leave_lock(tmp_path, os.getppid())

    monkeypatch.setattr(run_lock, "write", overtaken)
    with pytest.raises(CheckpointError, match=f"process {os.getppid()}"):
        train(tmp_path)


@pytest.mark.skipif(run_lock.fcntl is None, reason="no flock here")
def test_with_locks_a_name_alone_is_no_claim(tmp_path):
    leave_lock(tmp_path, os.getppid())
    assert len(train(tmp_path).steps) == 4


# --------------------------------------------------------------------------------------------------- what a kill leaves


def test_leftovers_of_a_kill_are_deleted_and_nothing_else(tmp_path):
    train(tmp_path, steps=2)
    left = ["state.safetensors.77.part", "log.jsonl.4194305.part", ".tmpJ7cT9S", "tokenizer.12.part"]
    kept = ["notes.part", "my.12.partial", ".tmp", "page.html", "12.parts"]
    for name in [*left[:3], *kept]:
        (tmp_path / name).write_text("half")
    (tmp_path / left[3]).mkdir()
    (tmp_path / left[3] / "tokenizer.json").write_text("half")
    train(tmp_path, steps=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.json", "log.jsonl", "state.safetensors", *kept}


def test_in_the_folder_of_another_run_nothing_is_deleted(tmp_path):
    train(tmp_path, steps=2)
    (tmp_path / "state.safetensors.77.part").write_text("half")
    with pytest.raises(OtherRun):
        train(tmp_path, steps=3)
    assert (tmp_path / "state.safetensors.77.part").exists()


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        train(tmp_path)
        save_text(tmp_path / "card.md", "text")
        save_model(tiny(), tmp_path / "model.safetensors")
        save_model(tiny(), tmp_path / "model.safetensors")  # the second time in place of a file
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {mode} and len(modes) == 5, modes


# ------------------------------------------------------------------------------------------------------ logs and states


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "step", "step": 1}',  # without the values that every step has
        '{"kind": "step", "step": "1", "loss": 1, "seconds": 1}',
        '{"kind": "step", "step": NaN, "loss": 1, "seconds": 1}',
        '{"kind": "step", "step": 1, "loss": null, "seconds": 1}',
        '{"kind": ["step"], "step": 1, "loss": 1, "seconds": 1}',
        '{"kind": "other", "step": 1, "loss": 1, "seconds": 1}',
        '{"kind": "step", "step": 0, "loss": 9, "seconds": 1}',  # a second time
        "[" * 100_000,
        '{"kind": "validation"}',
        "\x00" * 100,
    ],
)
def test_a_damaged_line_of_the_log_is_passed_over(tmp_path, line):
    whole = train(tmp_path)
    log = tmp_path / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    log.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n", encoding="utf-8")
    again = train(tmp_path)
    assert again.steps == whole.steps and repr(again) == repr(whole)
    assert log.read_text(encoding="utf-8").splitlines() == lines


def test_a_state_of_another_run_is_noticed(tmp_path):
    """As after copying files between folders; both fit the model."""
    train(tmp_path / "one", identity={"seed": 0})
    train(tmp_path / "two", identity={"seed": 1})
    (tmp_path / "one" / "state.safetensors").replace(tmp_path / "two" / "state.safetensors")
    with pytest.raises(CheckpointError, match="state.safetensors is of another run than .*run.json"):
        train(tmp_path / "two", identity={"seed": 1})


@pytest.mark.parametrize("tensors, notes", [({}, {}), ({"other": 1}, {"step": 2, "seconds": 1.0}), ({}, [])])
def test_a_file_that_is_no_state_is_said(tmp_path, tensors, notes):
    train(tmp_path)
    state = tmp_path / "state.safetensors"
    there = load_tensors(state)[0]
    other = torch.ones(1)
    save_tensors(state, {**there, **{f"{name}/x": other for name in tensors}}, notes)
    with pytest.raises(CheckpointError, match="state.safetensors is not the state of a run"):
        train(tmp_path)


def test_how_far_a_run_is_saved(tmp_path):
    assert saved_step(tmp_path) == saved_step(tmp_path / "nowhere") == 0
    train(tmp_path, steps=5)
    assert saved_step(tmp_path) == 5
    (tmp_path / "state.safetensors").write_bytes(b"half")
    assert saved_step(tmp_path) == 0


@pytest.mark.parametrize("text", ["[]", '"run"', "3", "", "[" * 100_000])
def test_an_identity_that_is_none_is_said(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match="run.json cannot be read"):
        train(tmp_path)


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError) as raised:
            save_text(tmp_path / "log.jsonl", "text")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "log.jsonl")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- what identifies data


class Pictures(Captions):
    """A folder of pictures: names, captions and boxes."""

    def __init__(self, names=("a.jpg", "b.jpg"), captions=("a dog", "a cat"), width=0.5):
        super().__init__(*captions)
        self.rows = [SimpleNamespace(file=Path("/data") / name) for name in names]
        self.width = width

    def regions(self, row):
        return [Region((0.5, 0.5, self.width, 0.5), "a thing", "phrase")]


@pytest.mark.parametrize(
    "changed",
    [{"names": ("a.jpg", "c.jpg")}, {"captions": ("a dog", "a cow")}, {"width": 0.25}],
)
def test_data_are_told_apart_by_names_captions_and_boxes(changed):
    there = data_fingerprint(Pictures())
    assert there == data_fingerprint(Pictures())
    assert set(differing(there, data_fingerprint(Pictures(**changed)))) == {"hash"}


def test_a_folder_that_moved_is_the_same_data():
    moved = Pictures()
    for row in moved.rows:
        row.file = Path("/elsewhere") / row.file.name
    assert data_fingerprint(moved) == data_fingerprint(Pictures())


def test_the_tokenizer_is_part_of_the_identity():
    one, other = (run_identity(Captions("a dog"), Words(*words), 0) for words in (("a", "b"), ("b", "a")))
    assert set(differing(one, other)) == {"tokenizer"}
