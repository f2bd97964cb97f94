"""Every benchmark runs, and says what it is meant to say. Nothing here depends on how fast the machine is."""

import importlib
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import _step, attention, seconds_to_skill
from minivlp.data.scenes import Scenes

NAMES = sorted(path.stem for path in Path(_step.__file__).parent.glob("[a-z]*.py"))
SAYS = {
    "albef_step": ("no length buckets", "transformers' parts, anew"),
    "attention": ("with a padding mask", "faster: "),
    "blip_generate": ("batch 2, 3 beams", "transformers, no cache"),
    "blip_step": ("2 contenders have the same loss", "three losses, anew"),
    "clip_step": ("2 contenders have the same loss", "3 contenders have the same loss", "open_clip"),
    "grounding": ("once per image",),
    "seconds_to_skill": ("step    2  R@1",),
    "vilt_step": ("2 contenders have the same loss", "negative captions"),
    "vlmo_step": ("stage 2, texts", "M parameters"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs(name, monkeypatch, capsys):
    if name == "clip_step":
        pytest.importorskip("open_clip")
    steps = ["--steps", "2"] if name == "seconds_to_skill" else ["--rounds", "1", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", [name, *steps])
    monkeypatch.setattr(_step, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(attention, "LENGTHS", (5, 9, 21))
    monkeypatch.setattr(seconds_to_skill, "Scenes", lambda count, *rest: Scenes(min(count, 70), *rest))
    importlib.import_module(f"benchmarks.{name}").main()
    printed = capsys.readouterr().out
    assert all(text in printed for text in SAYS[name]), printed


def test_losses_that_should_be_equal_and_are_not_stop_a_benchmark():

    losses = {name: (nn.Identity(), partial(torch.tensor, value)) for name, value in {"a": 2.0, "b": 2.1}.items()}
    with pytest.raises(AssertionError, match="equal losses"):
        _step.check_equal(losses)


@pytest.mark.parametrize(
    ("ratios", "where"),
    [
        ((2.0, 1.5, 0.5), "up to 9 tokens, the fused kernel from 21"),
        ((2.0, 0.9, 1.02), "up to 5 tokens, the fused kernel from 9"),  # one late outlier does not count
        ((0.9, 0.9, 0.9), "the fused kernel at every length"),
        ((1.1, 1.1, 1.1), "explicit products at every length"),
    ],
)
def test_the_crossing_of_two_ways(ratios, where, monkeypatch):
    monkeypatch.setattr(attention, "LENGTHS", (5, 9, 21))
    assert where in attention.crossing(list(ratios))
