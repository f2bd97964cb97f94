"""Several processes that train one model: one per GPU, or several on CPUs.

    torchrun --nproc-per-node 2 -m minivlp train clip         the command line does what is below

    with join() as processes:                                  `ALONE` without torchrun
        loader = Loader(dataset, tokenizer, 256, 224, processes=processes)     256 pairs in all
        fit(model, loader.batch, settings, processes=processes)

Every process makes the same random choices for the whole batch, computes the losses of its own rows and its share of
the gradient, and takes the same optimizer step. The result is that of one process with the whole batch, up to rounding
(docs/distributed.md says what is sent, and what differs).

This is not torch's DistributedDataParallel: that averages the gradients of the processes, which is right only where
each has the same number of items. Masked words, drawn pairs and boxes are unevenly spread.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.data.processes import ALONE, Processes, Result
from minivlp.errors import UserError
from minivlp.training.checkpoint import weights

EXCHANGE_TIMEOUT = timedelta(minutes=30)  # for a process that hangs; one that dies ends the others at once
PATIENCE = timedelta(days=2)  # while the first process encodes a folder or measures the model
BUCKET = 1 << 23  # gradients that are sent together, in numbers


class LostProcess(UserError):
    """Another process has ended or does not answer."""


@contextmanager
def join(local_negatives: bool = False) -> Iterator[Processes]:
    """The processes that torchrun has started, this one among them; without torchrun `ALONE`.

    local_negatives: see `Processes`. GPUs are used where there are any, by NCCL, one for each process; else CPUs, by
    gloo. Raises ValueError where that cannot be, and LostProcess when another process is gone.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    device = device_of_process()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=EXCHANGE_TIMEOUT)
    try:
        processes = Distributed(device, local_negatives)
        yield processes
        processes.barrier()  # what the first one still does, such as measuring the model, is not cut off
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostProcess("the connection to another process is lost: its own message says why") from error
        raise
    finally:
        dist.destroy_process_group()


def device_of_process() -> torch.device:
    """The GPU that is this process's own, else the CPU. Raises ValueError where there are too few GPUs."""
    wanted = os.environ.get("MINIVLP_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in ("cuda", "cpu"):
        raise ValueError(f"MINIVLP_DEVICE is {wanted!r}: several processes need cuda (a GPU each) or cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"process {number} of this machine has no GPU, there are {count}: lower --nproc-per-node, "
            "or set MINIVLP_DEVICE=cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


class Distributed(Processes):
    """The processes of torch's default group. Every method but `part` and `ours` is called by all of them together."""

    def __init__(self, device: torch.device, local_negatives: bool = False) -> None:
        self.device, self.local_negatives = device, local_negatives
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.generator = torch.Generator(device)
        self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)  # for Python objects and for waiting

    # ---------------------------------------------------------------------------------------- rows of all processes

    def place(self, count: int) -> slice:
        counts = self._counts(count)
        start = sum(counts[: self.rank])
        return slice(start, start + count)

    def ours(self, rows: Tensor, place: slice) -> Tensor:
        return ((rows >= place.start) & (rows < place.stop)).nonzero()[:, 0]

    def total(self, count: int) -> int:
        return sum(self._counts(count))

    def gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count, shapes = len(tensors[0]), [tensor.shape[1:] for tensor in tensors]
        flat = torch.cat([tensor.reshape(count, math.prod(tensor.shape[1:])) for tensor in tensors], dim=1)  # (b, n)
        sent = flat.to(torch.uint8) if flat.dtype == torch.bool else flat
        received = Gather.apply(sent, self._counts(count), self.rank).to(flat.dtype)
        parts = received.split([math.prod(shape) for shape in shapes], dim=1)
        return tuple(part.reshape(len(part), *shape) for part, shape in zip(parts, shapes, strict=True))

    def gather_text(self, text: Text) -> Text:
        longest = max(self._counts(text.length))
        text = text.padded(longest)
        ids, mask, word = self.gather(text.ids, text.mask.to(text.ids.dtype), text.word)
        return Text(ids, mask.bool(), word)

    def _counts(self, count: int) -> list[int]:
        """A number of each process. They are exchanged on the CPU, so no GPU is waited for."""
        found = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor([count]), group=self.patient)
        return [int(number) for number in found]

    # ----------------------------------------------------------------------------------------- losses and gradients

    @torch.no_grad()
    def add_up(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    def share(self, loss: Tensor, count: Tensor | int) -> Tensor:
        count = torch.as_tensor(count, dtype=torch.float64, device=loss.device)
        share = count / self.add_up(count).clamp(min=1)
        return loss.where(count > 0, 0) * share.to(loss.dtype)  # the mean of nothing is not a number

    @torch.no_grad()
    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Each parameter gets the sum of its gradients in all processes.

        One that has a gradient nowhere keeps none; one that has it in some processes only (no region in the rows of
        the others) counts as zero there.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        somewhere = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8)
        dist.all_reduce(somewhere, dist.ReduceOp.MAX, group=self.patient)
        gradients = []
        for parameter, there in zip(trained, somewhere.tolist(), strict=True):
            if there and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if there:
                gradients.append(parameter.grad)
        for bucket in buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])

    # ------------------------------------------------------------------------------------------------- random draws

    def begin(self, model: nn.Module) -> None:
        """All processes continue from the weights and the random state of the first."""
        for tensor in weights(model).values():
            dist.broadcast(tensor.data, 0)
        state = self._default_state()
        self.set_random_state(self.on_first(lambda: state))

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """What the model draws for its own rows (dropout) depends on the seed, the step and the process.

        What is drawn for the rows of all comes from `generator`. Afterwards torch's generator is as if all draws had
        been made for all rows, in one process: that is the state which is saved.
        """
        seed = self.generator.initial_seed() + 1_000_003 * (step * self.size + self.rank + 1)
        torch.manual_seed(seed % 2**63)
        yield
        self._set_default_state(self.generator.get_state())

    def set_random_state(self, state: Tensor) -> None:
        """Continue the draws that all make alike from this state."""
        self.generator.set_state(state)
        self._set_default_state(state)

    def _default_state(self) -> Tensor:
        return torch.get_rng_state() if self.device.type == "cpu" else torch.cuda.get_rng_state(self.device)

    def _set_default_state(self, state: Tensor) -> None:
        if self.device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, self.device)

    # ------------------------------------------------------------------------------------------- one after the other

    def barrier(self) -> None:
        dist.barrier(group=self.patient)

    @contextmanager
    def first_in_line(self) -> Iterator[None]:
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()

    def on_first(self, call: Callable[[], Result]) -> Result:
        self.barrier()  # so that no other process still reads what the call will write
        result, problem = None, None
        if self.rank == 0:
            try:
                result = call()
            except Exception as error:
                problem = error
        kind = UserError if isinstance(problem, UserError) else RuntimeError
        sent: list[Any] = [result, problem and (kind, str(problem))]
        dist.broadcast_object_list(sent, 0, group=self.patient)
        if problem is not None:
            raise problem
        result, failure = sent
        if failure is not None:
            raise failure[0](failure[1])
        return result


class Gather(torch.autograd.Function):
    """The rows of all processes (b, n) -> (B, n). Backward adds the gradients that all have for a row."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        longest = max(counts)
        padded = F.pad(own, (0, 0, 0, longest - len(own))).contiguous()
        everyone = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(everyone, padded)
        return torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.rows], None, None


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbors of one dtype, together at most BUCKET numbers or a single tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in bucket) + tensor.numel() > BUCKET
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
