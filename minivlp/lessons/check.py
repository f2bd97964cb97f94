"""How an exercise answers: one line when all is well, or the property that failed, in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class NotYet(AssertionError):
    """An answer that is not right yet; the message says which property failed and where to look."""


def attempt(function: Callable, *arguments: Any, none_counts: bool = False) -> Any:
    """Call the student's function; turn what it raises into a message that names the arguments' shapes.

    A forgotten `return` gets a message of its own, unless None is an answer (`none_counts`).
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
