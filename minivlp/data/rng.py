"""Random choices that are the same on every platform and in every library version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class RandomSource(Protocol):
    """A `random.Random` or a NumPy `Generator`."""

    def random(self) -> float:
        """A float in [0, 1)."""


def pick(rng: RandomSource, options: Sequence[T]) -> T:
    """One of the options, uniformly.

    It calls only `rng.random()`, whose values never change between versions; those of `choice` do.
    """
    return options[int(rng.random() * len(options))]
