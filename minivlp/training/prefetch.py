"""Prepare the next batch while the model computes the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import zip_longest
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Calls `prepare(step)` for each step in one background thread, one step ahead of the loop.

        with Prefetch(loader.batch, range(100)) as batches:
            for step, batch in batches:
                ...                # the batch of step + 1 is being prepared
                batches.wait()     # it is ready now, so the thread uses neither the dataset nor the tokenizer

    `prepare` must depend on its argument alone, so that the results do not depend on the timing. In particular it must
    not use the global random generators of torch and NumPy, which the loop may use at the same time. What `prepare`
    raises is raised in the loop, at the step concerned and with the thread's traceback. The thread ends with the `with`
    block, however the block is left; a call that has begun is completed first.
    """

    def __init__(self, prepare: Callable[[int], Item], steps: Sequence[int]) -> None:
        self.prepare, self.steps = prepare, steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="minivlp-prefetch")
        self._next: Future[Item] | None = None

    def __enter__(self) -> Prefetch[Item]:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[int, Item]]:
        for step, following in zip_longest(self.steps, self.steps[1:]):
            current = self._next or self._pool.submit(self.prepare, step)
            self._next = None if following is None else self._pool.submit(self.prepare, following)
            yield step, current.result()

    def wait(self) -> None:
        """Return when the next batch is ready, or has failed."""
        if self._next is not None:
            wait([self._next])
