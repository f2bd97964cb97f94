"""What the checks of all exercises share: call the student's function, and say which property of its answer failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class NotYet(AssertionError):
    """The answer is not right yet; the message says which property failed."""


def attempt(function: Callable, *arguments: Any, none_counts: bool = False) -> Any:
    """The answer of the student's function. Raises `NotYet` for an unwritten function, for an exception in it, with the
    arguments' shapes, and for a missing `return`, unless None is a possible answer (`none_counts`).
    """
    name = getattr(function, "__name__", "your function")
    try:
        answer = function(*arguments)
    except NotImplementedError:
        raise NotYet("Nothing written yet: replace the line that raises NotImplementedError.") from None
    except Exception as error:
        shapes = ", ".join(str(tuple(a.shape)) if hasattr(a, "shape") else repr(a) for a in arguments)
        raise NotYet(f"{name} stopped with {type(error).__name__}: {error} (called with {shapes})") from error
    demand(answer is not None or none_counts, f"{name} returns nothing: is its `return` missing?")
    return answer


def demand(holds: Any, otherwise: str) -> None:
    """Raise `NotYet(otherwise)` unless it holds."""
    if not bool(holds):
        raise NotYet(otherwise)
