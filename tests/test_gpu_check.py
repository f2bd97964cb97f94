"""The script for a GPU, as far as a CPU can run it: its logic, and that it writes nothing where there is no GPU."""

from __future__ import annotations

import argparse
import json

import gpu_check
import pytest
import torch

from minivlp.papers import PAPERS

CPU = torch.device("cpu")
OPTIONS = argparse.Namespace(steps=2, rounds=1, batch=4, preset="nano")


@pytest.fixture(autouse=True)
def record(monkeypatch, tmp_path):
    """The record goes elsewhere."""
    monkeypatch.setattr(gpu_check, "RECORD", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu_check, "bf16_is_fast", lambda where: False)
    return tmp_path / "gpu.json"


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, capsys, record):
    monkeypatch.setattr(gpu_check, "device", lambda: CPU)
    assert gpu_check.main([]) == 1
    assert "no GPU here" in capsys.readouterr().err and not record.exists()


@pytest.mark.parametrize("name", PAPERS)
def test_parity_of_the_cpu_with_itself(name):
    """All random choices are passed on: the second computation draws none of its own."""
    row = gpu_check.parity(name, CPU, OPTIONS)
    assert row["float32"]["equal"] and row["float32"]["gradient"] < 1e-6


def test_parity_notices_another_result(monkeypatch):
    """Weights that moving to the device has changed."""
    plain = torch.nn.Module.to

    def to(model, *where):
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        return plain(model, *where)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    row = gpu_check.parity("albef", CPU, OPTIONS)
    assert not row["float32"]["equal"] and not gpu_check.succeeded(row)


def test_rows_of_training_and_of_step_time():
    row = gpu_check.training("clip", CPU, OPTIONS)
    assert row["steps"] == 2 and row["batch"] == 4 and row["seconds"] > 0 and row["peak_GiB"] is None
    row = gpu_check.step_time("clip", CPU, OPTIONS)
    assert row["float32"]["pairs_per_second"] == pytest.approx(4000 / row["float32"]["ms"])


def test_a_row_that_fails_does_not_end_the_others(monkeypatch, capsys, record):
    def part(name, where, options):
        if name == "two":
            raise RuntimeError("out of memory\nand more")
        return {"falls": name == "one"}

    monkeypatch.setattr(gpu_check, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(gpu_check, "PARTS", {"training": (part, ("one", "two", "three"))})
    assert gpu_check.main(["--only", "training"]) == 1
    assert "failed: training two, training three" in capsys.readouterr().out
    written = json.loads(record.read_text())
    assert written["training"]["two"] == {"error": "RuntimeError: out of memory"}
