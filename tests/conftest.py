"""What all tests share: seeds, and the golden runs of the reference models. (../conftest.py forbids the network.)"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def same_every_time():
    """Every test starts from the same random state, and plots without a window."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if "matplotlib" in sys.modules:
        sys.modules["matplotlib"].use("Agg")
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def float64():
    """For parity: in float32, a wrong LayerNorm epsilon would not be seen. Test files ask for it by `pytestmark`."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Golden:
    """A run of a reference model. Floats are float64, flags bool, ids int64."""

    config: dict[str, Any]
    info: dict[str, Any]  # the whole JSON file: reference, conventions, what each tensor is
    tolerance: float  # largest absolute difference allowed in float64
    state: dict[str, Tensor]  # weights by the reference's own names, tied ones under each of their names
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def as_golden(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.double()
    return tensor.bool() if tensor.dtype == torch.uint8 else tensor


def load_golden(name: str) -> Golden:
    info = json.loads((HERE / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    groups: dict[str, dict[str, Tensor]] = {"state": {}, "in": {}, "out": {}}
    for key, tensor in load_file(HERE / "golden" / f"{name}.safetensors").items():
        group, _, rest = key.partition(".")
        groups[group][rest] = as_golden(tensor)
    state = groups["state"]
    state |= {alias: state[stored] for alias, stored in info.get("state", {}).get("tied", {}).items()}
    return Golden(info["config"], info, info["tolerance"]["default"], state, groups["in"], groups["out"])


@pytest.fixture(scope="session")
def golden():
    """`golden("clip_hf")` loads tests/golden/clip_hf.safetensors and .json."""
    return load_golden
