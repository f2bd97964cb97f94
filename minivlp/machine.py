"""What this machine can do: device, dtype, profile. Imports nothing of ours, and torch only when asked.

MINIVLP_DEVICE (cpu, cuda, cuda:1, mps) overrides the choice of device, MINIVLP_PROFILE the size of the lessons.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROFILES = ("quick", "laptop", "gpu")


def profile() -> str:
    """The size that lessons run at: `quick` (what the tests run), `laptop` (default) or `gpu`, from MINIVLP_PROFILE.

    Raises ValueError for any other word.
    """
    name = os.environ.get("MINIVLP_PROFILE") or "laptop"
    if name not in PROFILES:
        raise ValueError(f"MINIVLP_PROFILE is {name!r}; it can be {', '.join(PROFILES)} (unset means laptop)")
    return name


def device() -> torch.device:
    """The device to train on: CUDA if there is one, else Apple's MPS, else the CPU; MINIVLP_DEVICE overrides.

    Raises ValueError if MINIVLP_DEVICE names a device that torch does not see.
    """
    import torch

    seen = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    asked = os.environ.get("MINIVLP_DEVICE")
    if not asked:
        return torch.device(next(kind for kind, there in seen.items() if there))
    kind, _, number = asked.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not seen.get(kind, False) or (number and not (number.isdigit() and int(number) < count)):
        there = ", ".join(kind for kind, there in seen.items() if there)
        raise ValueError(f"MINIVLP_DEVICE is {asked!r}, but torch sees only: {there}. Unset it and minivlp chooses")
    return torch.device(asked)


def bf16_is_fast(device: torch.device | str) -> bool:
    """Whether bfloat16 autocast is faster than float32 on this device, by its hardware; False where that is unknown.

    A CPU has it with avx512_bf16 or amx_bf16 (without them it is *slower* than float32), an NVIDIA GPU from compute
    capability 8.0 (Ampere) on.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported() and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})


def cpu_flags() -> set[str]:
    """Names of the CPU's instruction sets as torch sees them, else as Linux lists them; empty where neither knows."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def reuse_memory() -> bool:
    """Ask the C library to keep freed memory instead of handing it back: one tenth off a training step on a Linux CPU.

    Every step allocates the same large tensors; by default glibc returns each to the system, which must then fill fresh
    pages with zeros. Returns whether the request was understood (glibc only; elsewhere nothing happens).
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def missing() -> list[str]:
    """One line for each package that minivlp needs and that is absent or too old, with what is there."""
    from packaging.requirements import Requirement

    try:
        needs = [Requirement(line) for line in importlib.metadata.requires("minivlp") or []]
    except importlib.metadata.PackageNotFoundError:
        return ["minivlp itself is not installed"]
    lines = []
    for need in needs:
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{need} is missing")
        else:
            if not need.specifier.contains(version, prereleases=True):
                lines.append(f"{need} is needed, {version} is there")
    return lines


def report() -> str:
    """What is here and what will be used, for a person: Python, torch, device, dtype, threads, memory, packages."""
    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows.append(("profile", f"{profile()} (MINIVLP_PROFILE: {', '.join(PROFILES)})"))
    absent = missing()
    try:
        import torch
    except ImportError as error:
        rows.append(("torch", f"cannot be imported: {error}"))
    else:
        chosen = device()
        fast = bf16_is_fast(chosen)
        name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else platform.processor()
        rows += [
            ("torch", torch.__version__),
            ("device", f"{chosen} {name}".strip()),
            ("dtype", "bfloat16 autocast: native here" if fast else "float32: bfloat16 would not be faster here"),
            ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ]
    try:
        import psutil
    except ImportError:
        pass
    else:
        memory = psutil.virtual_memory()
        rows.append(("memory", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB"))
    rows.append(("packages", "; ".join(absent) if absent else "all there"))
    lines = [f"{label:<10}{value}" for label, value in rows]
    if absent:
        lines.append(f"{'remedy':<10}{sys.executable} -m pip install -c constraints.txt -e .   (in minivlp's folder)")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(report())
    except ValueError as error:
        sys.exit(str(error))
    sys.exit(1 if missing() else 0)
