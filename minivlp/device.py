"""The hardware and the environment: device, bfloat16 support, memory settings, profile, installed packages.

MINIVLP_DEVICE (cpu, cuda, cuda:1, mps) overrides the choice of device, MINIVLP_PROFILE sets the size of the lessons.
torch is imported only inside the functions that need it, so that `report` also works where torch is missing.
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
    """The size at which lessons run, from MINIVLP_PROFILE: `quick` (used by the tests), `laptop` (default) or `gpu`.

    Raises ValueError for any other value.
    """
    name = os.environ.get("MINIVLP_PROFILE") or "laptop"
    if name not in PROFILES:
        raise ValueError(f"MINIVLP_PROFILE is {name!r}; choose {', '.join(PROFILES)}, or unset it (laptop)")
    return name


def device() -> torch.device:
    """The device to use: CUDA if available, else Apple's MPS, else the CPU; MINIVLP_DEVICE overrides the choice.

    Raises ValueError if MINIVLP_DEVICE names a device that is not available to torch.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = os.environ.get("MINIVLP_DEVICE")
    if not wanted:
        return torch.device(next(kind for kind, there in available.items() if there))
    kind, _, number = wanted.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not available.get(kind, False) or (number and not (number.isdigit() and int(number) < count)):
        kinds = ", ".join(kind for kind, there in available.items() if there)
        raise ValueError(f"MINIVLP_DEVICE is {wanted!r}, but torch has only: {kinds}. Unset it to use the best of them")
    return torch.device(wanted)


def bf16_is_fast(device: torch.device | str) -> bool:
    """Whether the device computes in bfloat16 natively, so that autocast is faster than float32; False where unknown.

    A CPU needs the instruction sets avx512_bf16 or amx_bf16 (without them bfloat16 is *slower* than float32), an NVIDIA
    GPU needs compute capability 8.0 (Ampere) or newer.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported() and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})


def cpu_flags() -> set[str]:
    """Names of the CPU's instruction sets, from torch or else from Linux; empty where neither reports them."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


class reuse_memory:
    """Let the C library keep freed memory for the next step instead of returning it to the system.

    Every training step allocates the same large tensors. By default glibc returns those above 32 MiB to the system,
    which must fill fresh pages with zeros at the next step. Keeping them took 10 to 17 % off a step with such tensors
    (batch 64, 260 tokens, width 128, one CPU core), none off a step with smaller ones, and added 1 to 9 % to the peak
    memory. The setting concerns the whole process. It acts when the object is made; `with reuse_memory():` ends it
    with the block: freed memory goes back to the system at once, and the thresholds become 32 and 64 MiB, the largest
    values that glibc's own adaptation reaches. (The adaptation cannot be switched on again, and glibc's initial 128 KiB
    would make every later step take 1.7 times as long.) `active` is False without glibc, where nothing happens.
    """

    TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>

    def __init__(self) -> None:
        import ctypes

        try:
            self._libc = ctypes.CDLL("libc.so.6")
            self.active = self._thresholds(mmap=1 << 30, trim=(1 << 31) - 1)
        except (OSError, AttributeError):
            self.active = False

    def _thresholds(self, mmap: int, trim: int) -> bool:
        mallopt = self._libc.mallopt
        return bool(mallopt(self.MMAP_THRESHOLD, mmap) and mallopt(self.TRIM_THRESHOLD, trim))

    def __enter__(self) -> reuse_memory:
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self._thresholds(mmap=32 << 20, trim=64 << 20)
            self._libc.malloc_trim(0)


def missing() -> list[str]:
    """One line for each package that minivlp requires and that is absent or too old, with the installed version."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("minivlp") or []]
    except importlib.metadata.PackageNotFoundError:
        return ["minivlp itself is not installed"]
    lines = []
    for required in requirements:
        if required.marker and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(required.name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{required} is missing")
        else:
            if not required.specifier.contains(version, prereleases=True):
                lines.append(f"{required} is required, {version} is installed")
    return lines


def report() -> str:
    """A table for people: Python, profile, torch, device, dtype, threads, memory and packages, with remedies."""
    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows.append(("profile", f"{profile()} (MINIVLP_PROFILE: {', '.join(PROFILES)})"))
    absent = missing()
    try:
        import torch
    except ImportError as error:
        rows.append(("torch", f"import failed: {error}"))
    else:
        chosen = device()
        fast = bf16_is_fast(chosen)
        name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else platform.processor()
        rows += [
            ("torch", torch.__version__),
            ("device", f"{chosen} {name}".strip()),
            ("dtype", "bfloat16 autocast (native on this device)" if fast else "float32 (no native bfloat16)"),
            ("threads", f"{torch.get_num_threads()}, on {os.cpu_count()} processors"),
        ]
    try:
        import psutil
    except ImportError:
        pass
    else:
        memory = psutil.virtual_memory()
        rows.append(("memory", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB"))
    rows.append(("packages", "; ".join(absent) if absent else "all installed"))
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
