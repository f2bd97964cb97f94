"""Several processes train as one: the same losses, gradients and weights, to 1e-9 in float64.

`distributed_worker` computes all cases in two processes, which are started once; the tests compare.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from distributed_worker import CASES, EXTRA, Case, fit_until, run
from small_models import small_model, some_batch, some_texts

from minivlp.data.batch import Regions
from minivlp.data.loading import Loader
from minivlp.data.processes import ALONE, Processes, rows_of_part
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.errors import UserError
from minivlp.models.albef import ALBEF
from minivlp.models.clip import CLIP
from minivlp.training import distributed
from minivlp.training.accumulation import backward_in_parts
from minivlp.training.loop import Settings, fit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def environment(**more: str) -> dict[str, str]:
    """Of a process on this machine, one thread each."""
    paths = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    loopback = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MINIVLP_DEVICE": "cpu", **loopback, **more}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes found, and two run folders: one that they began, one that one process began and they ended."""
    folder = tmp_path_factory.mktemp("two processes")
    torch.set_default_dtype(torch.float64)
    fit_until(folder / "begun by one", 4)
    torch.set_default_dtype(torch.float32)
    command = [sys.executable, str(HERE / "distributed_worker.py"), str(folder), *CASES, *EXTRA]
    port = str(free_port())
    ranks = [environment(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", MASTER_PORT=port) for r in range(2)]
    workers = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for env in ranks
    ]
    try:
        said = [worker.communicate(timeout=600)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    return folder


def of_both(folder: Path, name: str) -> list:
    return [torch.load(folder / f"{name} {rank}.pt") for rank in range(2)]


# ---------------------------------------------------------------------------------------------- two equal one


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name, folder, float64):
    """Every logged value of three steps, every gradient of the first, every weight, the queue and the random state."""
    expected = run(CASES[name])
    assert len(expected["gradients"]) > 10
    for found in of_both(folder, name):
        for ours, theirs in zip(found["rows"], expected["rows"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for part in ("gradients", "state"):
            for key, value in expected[part].items():
                assert torch.allclose(found[part][key], value, atol=1e-9, rtol=0), f"{part} {key}"
        assert torch.equal(found["random"], expected["random"]), "what is drawn next is the same, too"


def test_the_gradient_flows_through_the_gather(folder, float64):
    x = torch.arange(10.0).reshape(5, 2).requires_grad_()
    y = (2 * x.detach()[:, 0]).requires_grad_()
    (3 * x.prod(dim=0).sum() + 2 * y.square().sum()).backward()  # both processes' losses together
    first, second = of_both(folder, "gather")
    for found in (first, second):
        assert torch.equal(found["all"], x.detach()) and torch.equal(found["empty"], x[4:].detach())
    assert torch.equal(torch.cat([first["x"], second["x"]]), x.grad)
    assert torch.equal(torch.cat([first["y"], second["y"]]), y.grad)


def test_local_negatives_are_of_the_same_process(folder):
    """Seven rows, of which the first process has three. They are still the same draws in both."""
    first, second = (found["drawn"] for found in of_both(folder, "local negatives"))
    assert len(first) == len(second) == 3
    for (ours, visitors), (theirs, also) in zip(first, second, strict=True):
        assert visitors == also == 0
        for drawn, same in zip(ours, theirs, strict=True):
            assert torch.equal(drawn, same) and (drawn >= 0).sum() >= 5
            for row, other in enumerate(drawn.tolist()):
                assert other < 0 or (other < 3) == (row < 3)


def test_a_loss_without_a_share_is_refused(folder):
    """It would count twice."""
    assert of_both(folder, "without share") == ["CLIP.itc must end with `encoded.share` for several processes"] * 2


def test_one_after_the_other_and_all_or_none(folder):
    first, second = of_both(folder, "in turn")
    assert first == ["of 0", "True", "UserError: no disk in 0", "KeyError: 'no disk in 0'", "waited"]
    assert second == ["of 0", "True", "UserError: no disk in 0", "RuntimeError: 'no disk in 0'", "waited"]


# ------------------------------------------------------------------------------------------------------- resume


def test_a_run_goes_on_with_another_number_of_processes(folder, tmp_path, float64):
    """Saved by two and ended by one, or the reverse: the weights of the uninterrupted run, and one whole log."""
    expected = dict(fit_until(tmp_path / "whole", 6))
    found = [fit_until(folder / "begun by two", 6), *of_both(folder, "ended by two")]
    for state in found:
        assert all(torch.allclose(tensor, expected[name], atol=1e-9, rtol=0) for name, tensor in state)
    logs = [(run / "log.jsonl").read_text() for run in (tmp_path / "whole", *folder.glob("begun by *"))]
    assert len(logs) == 3 and all(log.count('"step": ') == len(logs[0].splitlines()) == 9 for log in logs)


# --------------------------------------------------------------------------------------------- torchrun


def test_a_killed_process_ends_all_with_a_message(tmp_path):
    """And only the first process prints what the command prints."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    train = ["-m", "minivlp", "train", "clip", "--steps", "5000", "--batch", "8", "--out", str(tmp_path / "run")]
    output = tmp_path / "output"
    with open(output, "w") as file:
        started = subprocess.Popen([*run, *train], env=environment(), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        deadline = time.time() + 200
        while "/5000" not in output.read_text() and started.poll() is None:
            assert time.time() < deadline, output.read_text()
            time.sleep(0.5)
        assert started.poll() is None, output.read_text()
        workers = {p.environ()["RANK"]: p for p in psutil.Process(started.pid).children()}
        workers["1"].send_signal(signal.SIGKILL)
        code = started.wait(timeout=60)
    finally:
        for process in [*psutil.Process(started.pid).children(), started] if started.poll() is None else []:
            process.kill()
    said = output.read_text()
    assert code != 0 and "SIGKILL" in said, "torchrun says which process was killed"
    assert said.count("5000 steps of 8") == 1
    assert "another process is lost" in said or "stopped" in said
    assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers.values())


@pytest.mark.parametrize(
    ("variables", "gpus", "message"),
    [
        ({"MINIVLP_DEVICE": "mps"}, 0, "'mps': several processes need cuda"),
        ({"MINIVLP_DEVICE": "cuda", "LOCAL_RANK": "2"}, 2, "process 2 of this machine has no GPU, there are 2"),
        ({"MINIVLP_DEVICE": "", "LOCAL_RANK": "1"}, 1, "lower --nproc-per-node, or set MINIVLP_DEVICE=cpu"),
    ],
)
def test_devices_that_cannot_be_used_together(monkeypatch, variables, gpus, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=message):
        distributed.device_of_process()


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.join() as processes:
        assert processes is ALONE


# ------------------------------------------------------------------------------------------- rows of a batch


class OneOf(Processes):
    """One of several processes, without the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("count", "parts"), [(6, 2), (7, 3), (2, 2), (5, 4)])
def test_parts_are_all_rows_in_order(count, parts):
    rows = [list(range(count))[rows_of_part(count, part, parts)] for part in range(parts)]
    assert sum(rows, []) == list(range(count)) and {len(part) for part in rows} <= {count // parts, -(-count // parts)}


@pytest.mark.parametrize("rows", [slice(1, 4), torch.tensor([4, 0, 2]), torch.tensor([True, False, False, True, True])])
def test_rows_of_a_batch_take_all_that_is_theirs_along(rows):
    batch = some_batch(5, negatives=True)
    image_rows = torch.tensor([0, 0, 2, 4, 3, 2])
    batch.regions = Regions(torch.rand(6, 4), some_texts(6), image_rows, torch.arange(6) > 2)
    batch.answers, batch.prefix_length = torch.arange(5) + 10, torch.arange(5)
    part, kept = batch[rows], torch.arange(5)[rows]
    for name in ("images", "image_ids", "answers", "prefix_length"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[kept])
    for name in ("text", "negatives"):
        assert torch.equal(getattr(part, name).ids, getattr(batch, name).ids[kept])
    chosen = torch.isin(image_rows, kept)
    assert torch.equal(kept[part.regions.image_rows], image_rows[chosen])
    assert torch.equal(part.regions.boxes, batch.regions.boxes[chosen])
    assert torch.equal(part.regions.text.ids, batch.regions.text.ids[chosen])
    assert torch.equal(part.regions.is_image, batch.regions.is_image[chosen]) and part.image_tokens is None


def test_the_loader_decodes_only_the_rows_of_its_process():
    dataset, tokenizer, asked = Scenes(30, seed=1, size=32), load_tokenizer(), []
    pixels = dataset.pixels
    dataset.pixels = lambda rows, size: asked.append(len(rows)) or pixels(rows, size)
    options = {"regions_per_image": 2, "negative_captions": True}
    whole = Loader(dataset, tokenizer, 7, 32, **options).batch(3)
    for rank in range(3):
        process = OneOf(rank, 3)
        found, wanted = Loader(dataset, tokenizer, 7, 32, processes=process, **options).batch(3), whole[process.part(7)]
        assert torch.equal(found.images, wanted.images) and torch.equal(found.image_ids, wanted.image_ids)
        assert torch.equal(found.text.ids, wanted.text.ids) and torch.equal(found.negatives.ids, wanted.negatives.ids)
        assert torch.equal(found.regions.boxes, wanted.regions.boxes)
    assert asked == [7, 2, 2, 3]
    tokens = Loader(
        dataset, tokenizer, 4, 32, image_tokens=lambda rows: torch.tensor(np.array(rows)), processes=OneOf(1, 2)
    )
    assert tokens.batch(0).images is None and len(tokens.batch(0).image_tokens) == 2


def test_a_batch_smaller_than_the_number_of_processes():
    with pytest.raises(ValueError, match="a batch of 2 for 3 processes"):
        Loader(Scenes(30, size=32), load_tokenizer(), 2, 32, processes=OneOf(0, 3))


# ----------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(parts, float64):
    """With the negatives of the whole batch, and never with more than one part in the towers."""
    case = Case(CLIP, rows=5)
    torch.manual_seed(0)
    whole, cut, batch = small_model(CLIP).train(), small_model(CLIP).train(), case.batch(0)
    cut.load_state_dict(whole.state_dict())
    losses = whole.losses(batch)
    losses["itc"].backward()
    sizes = []
    encode = cut.encode_image
    cut.encode_image = lambda images, rows=None: sizes.append(len(images)) or encode(images, rows)
    found = backward_in_parts(cut, batch, parts, torch.autocast("cpu", enabled=False))
    assert found["itc"].item() == pytest.approx(losses["itc"].item(), abs=1e-12)
    for name, parameter in whole.named_parameters():
        assert torch.allclose(dict(cut.named_parameters())[name].grad, parameter.grad, atol=1e-9, rtol=0), name
    assert len(sizes) == 2 * parts and max(sizes) == -(-5 // parts)


def test_what_is_dropped_is_the_same_in_both_passes(float64):
    """With dropout the gradient is that of the loss which is returned: checked by a finite difference."""
    model, batch = small_model(CLIP).train(), Case(CLIP, rows=4).batch(0)
    model.itc_head.project_image = torch.nn.Sequential(model.itc_head.project_image, torch.nn.Dropout(0.5))
    weight, step = model.itc_head.project_text.weight, 1e-6

    def loss(shift: float) -> float:
        torch.manual_seed(5)
        model.zero_grad()
        with torch.no_grad():
            weight[0, 0] += shift
        found = backward_in_parts(model, batch, 2, torch.autocast("cpu", enabled=False))["itc"].item()
        with torch.no_grad():
            weight[0, 0] -= shift
        return found

    slope = (loss(step) - loss(-step)) / (2 * step)
    loss(0.0)
    assert weight.grad[0, 0].item() == pytest.approx(slope, abs=1e-7)
    bias = model.image.norm.bias

    def loss_of_image(shift: float) -> float:
        with torch.no_grad():
            bias[0] += shift
        found = loss(0.0)
        with torch.no_grad():
            bias[0] -= shift
        return found

    slope = (loss_of_image(step) - loss_of_image(-step)) / (2 * step)
    loss(0.0)
    assert bias.grad[0].item() == pytest.approx(slope, abs=1e-7)


def test_training_in_parts_is_training(float64):
    def trained(accumulate: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = small_model(CLIP)
        fit(model, Case(CLIP).batch, Settings(steps=3, warmup=1), bar=False, device="cpu", accumulate=accumulate)
        return model.state_dict()

    expected, found = trained(1), trained(4)
    assert all(torch.allclose(found[name], tensor, atol=1e-9, rtol=0) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [(ALBEF, 2, "ALBEF is trained with itc, itm, mlm"), (CLIP, 7, "a batch of 6 cannot be computed in 7 parts")],
)
def test_what_cannot_be_computed_in_parts(model, parts, message):
    with pytest.raises(UserError, match=message):
        fit(small_model(model), Case(model).batch, Settings(steps=1), bar=False, device="cpu", accumulate=parts)


# ---------------------------------------------------------------------------------------------- the page's exercise


def exercise(number: int) -> type:
    """The class of docs/distributed.md with a piece of code in the place of its gap: 1 the solution, 2 constants."""
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "rows" in block]
    names: dict = {}
    code = re.sub(r" +\.\.\..*\n", lambda gap: blocks[number], blocks[0])
    exec(code, names)
    return names["Apart"]


def test_the_exercise_computes_what_it_says(float64):
    """Without a gather the mean of the parts' losses; with constants the right loss and another gradient."""
    batch, whole = Case(CLIP).batch(0), small_model(CLIP)
    apart, constants = (exercise(number)(whole.config) for number in (1, 2))
    apart.parts, constants.parts = 2, 2
    losses = {}
    for name, model in (("whole", whole), ("apart", apart), ("constants", constants)):
        model.load_state_dict(whole.state_dict())
        losses[name] = model.losses(batch)["itc"]
        losses[name].backward()
    halves = [whole.losses(batch[rows_of_part(6, part, 2)])["itc"].item() for part in range(2)]
    assert losses["apart"].item() == pytest.approx(sum(halves) / 2, abs=1e-12) and losses["apart"] < losses["whole"]
    assert losses["constants"].item() == pytest.approx(losses["whole"].item(), abs=1e-12)
    right, wrong = (model.itc_head.project_text.weight.grad for model in (whole, constants))
    assert (right - wrong).norm() > 0.05 * right.norm()
