"""The environment: one list of packages in two files, tasks.py on a bare Python, the hardware report, no network."""

from __future__ import annotations

import ast
import asyncio
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import tasks
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sitecustomize import NetworkBlocked

from minivlp import device as hardware

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
ON_CONDA = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}  # other names there


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def conda() -> dict[str, str]:
    """Package to version range, in pip's names and spelling."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    pairs = [re.fullmatch(r"([\w.-]+)\s*(\S*)", line).groups() for line in listed if isinstance(line, str)]
    return {canonicalize_name(ON_CONDA.get(name, name)): bounds for name, bounds in pairs}


# --- one list, two files ---------------------------------------------------------------------------------------------


def test_conda_and_pip_ask_for_the_same():
    needs = [Requirement(line) for line in project()["dependencies"] + project()["optional-dependencies"]["test"]]
    wanted = {canonicalize_name(need.name): str(need.specifier) for need in needs if need.marker is None}
    assert conda() == wanted | {"python": project()["requires-python"], "pip": ""}


def test_constraints_lie_within_the_ranges():
    ranges = {need.name: need.specifier for need in map(Requirement, project()["dependencies"])}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert {pin.name for pin in pins} == {"torch", "torchvision"}
    for pin in pins:
        (version,) = pin.specifier
        assert version.operator == "==" and version.version in ranges[pin.name]


def test_this_environment_has_everything():
    assert hardware.missing() == []


# --- tasks.py --------------------------------------------------------------------------------------------------------


def test_tasks_needs_only_the_standard_library():
    tree = ast.parse((ROOT / "tasks.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.fixture
def house(tmp_path, monkeypatch):
    """tasks.py in a folder of its own, with an environment that does not exist yet; pip calls are only written down."""
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"))
    env = tmp_path / "env"
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    monkeypatch.setattr(tasks, "ENV", env)
    monkeypatch.setattr(tasks, "PYTHON", env / "bin" / "python")
    monkeypatch.setattr(tasks, "STAMP", env / "stamp")
    monkeypatch.setattr(tasks, "serves_already", lambda: False)
    monkeypatch.setattr(tasks, "works", lambda *command: tasks.PYTHON.exists())
    calls = []

    def create(folder, clear, with_pip):
        calls.append("venv")
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / "python").touch()
        (folder / "pyvenv.cfg").touch()

    def call(command, **options):
        calls.append(" ".join(map(str, command[1:4])))
        return house_status["status"]

    house_status = {"status": 0}
    monkeypatch.setattr(tasks.venv, "create", create)
    monkeypatch.setattr(tasks.subprocess, "call", call)
    return calls, house_status


def test_installs_once_and_again_when_the_requirements_change(house):
    calls, _ = house
    tasks.install()
    assert calls == ["venv", "-m pip install"]
    tasks.install()
    assert len(calls) == 2
    (tasks.ROOT / "constraints.txt").write_text("torch==99\n")
    tasks.install()
    assert calls[2:] == ["-m pip install"]


def test_a_stopped_install_is_redone(house):
    calls, outcome = house
    outcome["status"] = 1
    with pytest.raises(SystemExit, match="again goes on"):
        tasks.install()
    outcome["status"] = 0
    tasks.install()
    assert calls == ["venv", "-m pip install", "-m pip install"]


def test_a_half_made_environment_is_made_anew(house):
    calls, _ = house
    tasks.ENV.mkdir()
    (tasks.ENV / "pyvenv.cfg").touch()  # venv was stopped before it put Python there
    tasks.install()
    assert calls[0] == "venv"


def test_a_folder_that_is_no_environment_is_left_alone(house):
    calls, _ = house
    tasks.ENV.mkdir()
    (tasks.ENV / "thesis.txt").touch()
    with pytest.raises(SystemExit, match="MINIVLP_VENV"):
        tasks.install()
    assert calls == []


def test_an_old_python_is_told_so(monkeypatch):
    monkeypatch.setattr(tasks.sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match="needs Python 3.10 or newer"):
        tasks.main(["run", "01"])


def test_jobs_pass_arguments_and_failures_on(monkeypatch):
    seen = []
    monkeypatch.setattr(tasks, "install", lambda: "python")
    monkeypatch.setattr(tasks.subprocess, "call", lambda command, cwd: seen.append(command) or 3)
    assert tasks.main(["test", "tests/test_clip.py", "-x"]) == 3
    assert seen == [["python", "-m", "pytest", "tests/test_clip.py", "-x"]]
    assert tasks.main(["run", "01"]) == 3
    assert seen[1][-2:] == ["--only", "01"]


def test_an_unknown_job_shows_the_list(capsys, monkeypatch):
    monkeypatch.setattr(tasks, "install", lambda: pytest.fail("nothing to install for"))
    assert tasks.main(["bake"]) == 2
    assert tasks.main([]) == 0
    assert "python tasks.py run 01" in capsys.readouterr().out


def test_benchmarks_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    for name in ("speed", "_shared", "data"):
        (tmp_path / "benchmarks" / f"{name}.py").touch()
    assert tasks.commands("bench", []) == [["-m", "benchmarks.data"], ["-m", "benchmarks.speed"]]
    assert tasks.commands("bench", ["speed"]) == [["-m", "benchmarks.speed"]]
    with pytest.raises(SystemExit, match="data, speed"):
        tasks.commands("bench", ["sped"])


# --- the hardware ----------------------------------------------------------------------------------------------------


def test_profile(monkeypatch):
    monkeypatch.delenv("MINIVLP_PROFILE")
    assert hardware.profile() == "laptop"
    monkeypatch.setenv("MINIVLP_PROFILE", "gpu")
    assert hardware.profile() == "gpu"
    monkeypatch.setenv("MINIVLP_PROFILE", "huge")
    with pytest.raises(ValueError, match="quick, laptop, gpu"):
        hardware.profile()


def test_device_takes_the_best_there_is(monkeypatch):
    monkeypatch.delenv("MINIVLP_DEVICE", raising=False)
    for cuda, mps, best in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert hardware.device() == torch.device(best)


@pytest.mark.parametrize("asked", ["tpu", "cuda", "mps", "cuda:7", "cpu:x"])
def test_a_device_that_is_not_there_is_named(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked == "cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("MINIVLP_DEVICE", asked)
    with pytest.raises(ValueError, match=asked):
        hardware.device()


def test_device_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("MINIVLP_DEVICE", "cpu")
    assert hardware.device() == torch.device("cpu")


@pytest.mark.parametrize(("flag", "fast"), [("avx512_bf16", True), ("amx_bf16", True), ("avx2", False)])
def test_bf16_on_a_cpu_needs_its_instructions(monkeypatch, flag, fast):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: {"avx", flag})
    assert hardware.bf16_is_fast("cpu") is fast


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_on_a_gpu_needs_ampere(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # true on a T4 as well: emulated there
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.bf16_is_fast("cuda") is fast


def test_report_names_what_is_missing_and_the_remedy(monkeypatch):
    assert "all installed" in hardware.report()
    monkeypatch.setattr(hardware.importlib.metadata, "requires", lambda name: ["torch>=99", "no-such-package>=1"])
    text = hardware.report()
    assert f"torch>=99 is required, {metadata.version('torch')} is installed" in text
    assert "no-such-package>=1 is missing" in text
    assert "-m pip install" in text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_returned_when_the_setting_ends():
    code = """
import torch
from minivlp.device import reuse_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

torch.ones(3)
before = resident()
with reuse_memory() as setting:
    if not setting.active:
        raise SystemExit(print("no glibc"))
    tensors = [torch.ones(10 << 20) for _ in range(4)]  # 40 MiB each
    del tensors
    print(round(resident() - before))
print(round(resident() - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if "no glibc" in done.stdout:
        pytest.skip("no glibc")
    within, after = map(int, done.stdout.split())
    assert within > 120 and after < 20, (within, after, done.stderr)


def test_without_glibc_memory_is_left_alone(monkeypatch):
    import ctypes

    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with hardware.reuse_memory() as setting:
        assert not setting.active


# --- the network -----------------------------------------------------------------------------------------------------

ELSEWHERE = "192.0.2.1"  # an address that documentation may use and nobody has


def dial(address: str) -> None:
    socket.create_connection((address, 80), timeout=0.2)


def dial_in_a_loop(address: str) -> None:
    async def dial() -> None:
        await asyncio.wait_for(asyncio.open_connection(address, 80), 0.2)

    with ThreadPoolExecutor(1) as pool:  # the browser tests keep a loop running in this thread
        pool.submit(lambda: asyncio.run(dial())).result()


def post(address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.sendto(b"x", (address, 9))


@pytest.mark.parametrize("address", [ELSEWHERE, "2001:db8::1", "minivlp.example"])
@pytest.mark.parametrize("reach", [dial, dial_in_a_loop])
def test_nothing_leaves_this_machine(reach, address):
    with pytest.raises(NetworkBlocked):
        reach(address)


def test_not_even_a_datagram():
    with pytest.raises(NetworkBlocked):
        post(ELSEWHERE)


def test_processes_that_tests_start_are_blocked_too():
    code = f"import socket; socket.create_connection(({ELSEWHERE!r}, 80), timeout=0.2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "NetworkBlocked" in done.stderr


def test_this_machine_may_be_talked_to():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as connection:
            assert connection.getpeername()[0] == "127.0.0.1"
