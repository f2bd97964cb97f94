"""The processes that train one model together, and the rows of a batch that each of them has.

One process alone is the usual case, and `ALONE` stands for it. `training.distributed.Distributed` is the same for
several: there a model's losses see the rows of all processes where a paper needs them (negatives, the queue), and each
process computes its *share* of every loss. The loss of the whole batch is the sum of the shares; so is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from minivlp.data.batch import Text

Result = TypeVar("Result")
Opened = TypeVar("Opened", bound=AbstractContextManager)


def rows_of_part(count: int, part: int, parts: int) -> slice:
    """The rows of one of `parts` nearly equal parts of `count` rows, in order."""
    return slice(count * part // parts, count * (part + 1) // parts)


class Processes:
    """One process: all rows are its own, and its share of a loss is all of it.

    Axes: b rows of this process, B rows of all processes in the order of their ranks.

    Attributes:
        rank, size: the number of this process, and how many there are.
        generator: draws what all processes must draw alike; None is torch's own generator.
        local_negatives: hard negatives are drawn among the rows of the same process only.
        device: where the tensors of this process must be; None leaves the choice.
    """

    rank, size = 0, 1
    local_negatives = False
    generator: torch.Generator | None = None
    device: torch.device | None = None

    def part(self, count: int) -> slice:
        """Which of the `count` rows of a whole batch this process takes."""
        return rows_of_part(count, self.rank, self.size)

    def place(self, count: int) -> slice:
        """Where the `count` rows of this process stand among the rows of all."""
        return slice(0, count)

    def ours(self, rows: Tensor, place: slice) -> Tensor:
        """Which of `rows` (N,), numbers among the rows of all, are rows of this process: their indices (n,)."""
        return torch.arange(len(rows), device=rows.device)

    def gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(b, ...) of this process -> (B, ...) of all, each; gradients flow back to where the rows came from."""
        return tensors

    def gather_text(self, text: Text) -> Text:
        """The texts of all processes."""
        return text

    def total(self, count: int) -> int:
        """The sum of a number of each process."""
        return count

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all processes, without gradient."""
        return values

    def share(self, loss: Tensor, count: Tensor | int) -> Tensor:
        """What `loss`, a mean over `count` items of this process, adds to the mean over the items of all."""
        return loss

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Each parameter gets the sum of its gradients in all processes."""

    def begin(self, model: torch.nn.Module) -> None:
        """Before training: all processes have the same weights and the same random state."""

    def step(self, step: int) -> AbstractContextManager:
        """The random draws of a training step are made in this block."""
        return nullcontext()

    def barrier(self) -> None:
        """Wait until all processes are here, however long the slowest takes."""

    def first_in_line(self) -> AbstractContextManager:
        """The first process runs this block before the others, which then find what it has written."""
        return nullcontext()

    def on_first(self, call: Callable[[], Result]) -> Result:
        """What `call()` returns in the first process; the others do not run it. What it raises is raised in all."""
        return call()

    @contextmanager
    def opened_by_first(self, thing: Opened) -> Iterator[Opened]:
        """`thing`, a context manager such as a run's folder, is entered by the first process alone; all get it."""

        def enter() -> None:
            stack.enter_context(thing)

        with ExitStack() as stack:
            self.on_first(enter)
            yield thing


ALONE = Processes()
