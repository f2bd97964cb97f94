"""What test_distributed.py computes in one process and in several; run as a program, it is one of several.

RANK=0 WORLD_SIZE=2 ... python distributed_worker.py FOLDER CASE [CASE ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from small_models import small_model, some_batch, some_texts
from torch import Tensor

from minivlp.data.batch import Batch, Regions
from minivlp.data.processes import ALONE, Processes
from minivlp.errors import UserError
from minivlp.models.albef import ALBEF
from minivlp.models.blip import BLIP
from minivlp.models.clip import CLIP
from minivlp.models.coca import CoCa
from minivlp.models.git import GIT
from minivlp.models.vilt import ViLT
from minivlp.models.vlmo import VLMo
from minivlp.models.xvlm import XVLM
from minivlp.objectives.masking import WordDropout
from minivlp.objectives.momentum import MomentumConfig
from minivlp.training.distributed import join
from minivlp.training.loop import Settings, fit, train_step
from minivlp.training.optim import make_optimizers

STEPS = 3
MOMENTUM = MomentumConfig(momentum=0.9, alpha_steps=2, queue_size=8)  # smaller than two batches: old pairs leave
SETTINGS = Settings(steps=STEPS, warmup=1)


@dataclass(frozen=True)
class Case:
    """A model and its batches."""

    model: type
    config: dict[str, Any] = field(default_factory=dict)
    rows: int = 6
    negatives: bool = False
    regions: Callable[[int], list[int]] | None = None  # step -> image row of each region
    accumulate: int = 1

    def batch(self, step: int) -> Batch:
        """The whole batch of a step; its first and last row are of one image, and two rows have one caption."""
        batch = some_batch(self.rows, self.negatives, seed=step)
        batch.image_ids[-1] = batch.image_ids[0]
        batch.text.ids[1], batch.text.mask[1] = batch.text.ids[-2], batch.text.mask[-2]
        if self.regions is not None:
            image_rows = torch.tensor(self.regions(step), dtype=torch.long)
            draw = torch.Generator().manual_seed(step)
            boxes = torch.rand(len(image_rows), 4, generator=draw) * 0.4 + 0.3
            text = some_texts(max(1, len(image_rows)), generator=draw)[: len(image_rows)]
            batch.regions = Regions(boxes, text, image_rows, torch.arange(len(image_rows)) % 3 == 0)
        return batch


def uneven(step: int) -> list[int]:
    """All images have regions at first, then those of the second process alone, then none."""
    return [[0, 0, 1, 3, 3, 3, 5], [3, 4, 4], []][step]


ALL_OF_XVLM = {"losses": ("itc", "itm", "mlm", "box_l1", "box_giou")}
CASES = {
    "clip": Case(CLIP, rows=5),
    "clip diagonal": Case(CLIP, {"diagonal_only": True}),
    "clip with word dropout": Case(CLIP, {"masking": WordDropout(0.5), "mean_text": True}),
    "clip in parts": Case(CLIP, accumulate=2),
    "albef": Case(ALBEF, {"momentum": MOMENTUM}, negatives=True),
    "albef plain": Case(ALBEF, rows=7, negatives=True),
    "albef random negatives": Case(ALBEF, {"hard_negatives": False}),
    "albef itm first": Case(ALBEF, {"losses": ("itm", "itc")}),
    "blip": Case(BLIP, {"momentum": MOMENTUM}, rows=5),
    "blip plain": Case(BLIP, {"momentum": None}, negatives=True),
    "coca": Case(CoCa, rows=5),
    "git": Case(GIT, rows=5),
    "vilt": Case(ViLT, {"losses": ("itm", "mlm", "wpa", "mpp")}, negatives=True),
    "vilt itm": Case(ViLT, {"losses": ("itm",)}, rows=5),
    "vlmo": Case(VLMo, negatives=True),
    "xvlm pooled": Case(XVLM, ALL_OF_XVLM, regions=uneven),
    "xvlm again": Case(XVLM, {**ALL_OF_XVLM, "region_blocks": 1}, rows=6, regions=uneven),
    "xvlm pairs": Case(XVLM, ALL_OF_XVLM),
}


def run(case: Case, processes: Processes = ALONE, steps: int = STEPS) -> dict[str, Any]:
    """Train for some steps: the values of each, the gradients of the first, and the weights at the end."""
    torch.manual_seed(1)
    model = small_model(case.model, **case.config).train()
    if processes.rank:
        torch.nn.init.zeros_(next(model.parameters()))  # the first process's weights count
    optimizers = make_optimizers(model, 1e-3, 0.05, {})
    torch.manual_seed(2)
    processes.begin(model)
    rows, gradients = [], {}
    for step in range(steps):
        whole = case.batch(step)
        batch = whole if processes.size == 1 else whole[processes.part(len(whole))]
        with processes.step(step):
            parts = case.accumulate if processes.size > 1 else 1  # the whole batch at once is what it must equal
            rows.append(train_step(model, optimizers, batch, SETTINGS, step, nullcontext(), parts, processes))
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"rows": rows, "gradients": gradients, "state": state, "random": torch.get_rng_state()}


def gathered(processes: Processes) -> dict[str, Tensor]:
    """The gradient of a function of all rows, of which this process has some; the rows are unevenly spread."""
    x = torch.arange(10.0).reshape(5, 2)[slice(0, 4) if processes.rank == 0 else slice(4, 5)].requires_grad_()
    y = (2 * x.detach()[:, 0]).requires_grad_()
    everyone, others = processes.gather(x, y)
    (everyone.prod(dim=0).sum() * (1 + processes.rank) + others.square().sum()).backward()
    (empty,) = processes.gather(x[: 2 * processes.rank])
    return {"all": everyone.detach(), "x": x.grad, "y": y.grad, "empty": empty.detach()}


def local(processes: Processes) -> dict[str, Any]:
    """Which rows were drawn for which with local negatives."""
    processes.local_negatives = True
    try:
        case, found = CASES["albef plain"], []
        torch.manual_seed(1)
        for kind, changes in ((ALBEF, {}), (ALBEF, {"hard_negatives": False}), (VLMo, {})):
            model, whole = small_model(kind, **changes).train(), case.batch(0)
            encoded = model.encode(whole[processes.part(len(whole))], processes=processes)
            found.append((tuple(encoded.negatives), len(encoded.pairs.visitors)))
        return {"drawn": found}
    finally:
        processes.local_negatives = False


def without_share(processes: Processes) -> str:
    """What is said of a loss that does not say what its share is."""
    model = small_model(CLIP)
    model.itc = lambda encoded: encoded.vectors[0].sum()
    try:
        model.losses(some_batch(2), processes=processes)
    except ValueError as error:
        return str(error)
    return "nothing"


def in_turn(processes: Processes) -> list[str]:
    """What the first process returns, opens and raises, and the order in which the processes run a block."""
    found = [processes.on_first(lambda: f"of {processes.rank}")]
    with processes.opened_by_first(nullcontext(processes.rank)) as opened:
        found.append(str(opened is not None))
    for kind in (UserError, KeyError):
        try:
            processes.on_first(partial(fail, kind, processes.rank))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    started = time.time()
    with processes.first_in_line():
        time.sleep(0.2 * (1 - processes.rank))
        found.append("waited" if time.time() - started > 0.15 else "went on")
    return found


def fail(kind: type[Exception], rank: int) -> None:
    raise kind(f"no disk in {rank}")


class Stopped(Exception):
    """The run ends here."""


def fit_until(folder: Path, stop: int, processes: Processes = ALONE) -> list[tuple[str, Tensor]]:
    """Train ALBEF in a run folder, from what is there to the end, or to step `stop`; saved every second step."""
    torch.manual_seed(3)
    case, validated = CASES["albef"], []

    def batch_at(step: int) -> Batch:
        if step == stop:
            raise Stopped
        whole = case.batch(step)
        return whole if processes.size == 1 else whole[processes.part(len(whole))]

    def validate() -> dict[str, float]:
        validated.append(processes.rank)
        return {"norm": sum(p.norm().item() for p in model.parameters())}

    model = small_model(ALBEF, **case.config)
    settings = Settings(steps=6, warmup=2, save_every=2, validate_every=2)
    options = {"run_dir": folder, "processes": processes, "bar": False, "device": "cpu"}
    with suppress(Stopped):
        fit(model, batch_at, settings, validate=validate, on_step=[lambda row: validated.append(0)], **options)
    assert processes.rank == 0 or not validated
    return sorted(model.state_dict().items())


EXTRA = {
    "gather": gathered,
    "local negatives": local,
    "without share": without_share,
    "in turn": in_turn,
}


def main(folder: Path, names: list[str]) -> None:
    torch.set_default_dtype(torch.float64)
    with join() as processes:
        for name in names:
            found = EXTRA[name](processes) if name in EXTRA else run(CASES[name], processes)
            torch.save(found, folder / f"{name} {processes.rank}.pt")
        fit_until(folder / "begun by two", 4, processes)
        torch.save(fit_until(folder / "begun by one", 6, processes), folder / f"ended by two {processes.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
