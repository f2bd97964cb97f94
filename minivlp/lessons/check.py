"""What the checks of all exercises share: call the student's function, and say which property of its answer failed."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class NotYet(AssertionError):
    """The answer is not right yet; the message says which property failed."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook prints: the message alone. The lines of a check would give the answer away."""
        return [f"Not yet: {self}"]


def attempt(function: Callable, *arguments: Any, none_counts: bool = False) -> Any:
    """The answer of the student's function, which is called with copies of all tensors in `arguments`.

    A function that works in place therefore cannot change what a check compares its answer with. The copies keep dtype
    and strides, and gradients pass through them. Raises `NotYet` for an unwritten function, for an exception in it
    (naming the line and the arguments' shapes), and for a missing `return`, unless None is a possible answer
    (`none_counts`).
    """
    return attempt_with(function, *map(_copy, arguments), none_counts=none_counts)


def attempt_with(function: Callable, *arguments: Any, none_counts: bool = False) -> Any:
    """`attempt` without copies, for a check that looks at the arguments after the call."""
    name = getattr(function, "__name__", "your function")
    try:
        answer = function(*arguments)
    except NotImplementedError:
        raise NotYet("Nothing written yet: replace the line that raises NotImplementedError.") from None
    except Exception as error:
        shapes = ", ".join(map(_describe, arguments))
        message = _shorten(str(error).strip(), 300)
        raise NotYet(
            f"{name} stopped with {type(error).__name__}: {message}{_line(function, error)} (called with {shapes})"
        ) from error
    demand(answer is not None or none_counts, f"{name} returns nothing: is its `return` missing?")
    return answer


def demand(holds: Any, otherwise: str) -> None:
    """Raise `NotYet(otherwise)` unless it holds."""
    if not bool(holds):
        raise NotYet(otherwise)


def demand_gradients(loss: Any, wanted: Tensor, **inputs: Tensor) -> None:
    """Demand that a student's loss can train: its gradient for each input, by name, is that of the `wanted` loss.

    loss: the answer, a scalar computed from `inputs`, tensors that require gradients. wanted: the right loss of the
    same tensors. Inputs of which the right loss is independent must get no gradient from the student's either.
    """
    demand(
        isinstance(loss, Tensor) and loss.requires_grad,
        "The value is right, but the loss has no gradient, so it trains nothing: compute it with tensors all the way, "
        "without .item(), .detach(), float() or torch.no_grad().",
    )
    got = _gradients(loss, inputs)
    right = _gradients(wanted, inputs)
    for name in inputs:
        demand(
            got[name].any() or not right[name].any(),
            f"The value is right, but loss.backward() gives `{name}` no gradient: is it detached on the way?",
        )
        demand(
            right[name].any() or not got[name].any(),
            f"The value is right, but loss.backward() gives `{name}` a gradient; it is a target: detach it.",
        )
        demand(
            torch.allclose(got[name].float(), right[name].float(), rtol=1e-3, atol=1e-5),
            f"The value is right, but the gradient for `{name}` is another one: part of the loss is detached.",
        )


def _gradients(loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of the loss for each input, zeros where it does not depend on it."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(value) for name, value in inputs.items()}
    try:
        found = torch.autograd.grad(loss.sum(), list(inputs.values()), retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise NotYet(
            "The value is right, but loss.backward() stops: a tensor that the gradient needs was changed in place "
            "(`+=`, `x[...] =`, a method that ends in `_`)."
        ) from error
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(inputs.items(), found, strict=True)
    }


def _copy(argument: Any) -> Any:
    """Tensors, also in lists, tuples and dicts, copied with their strides; all else as it is."""
    if isinstance(argument, Tensor):
        overlaps = any(step == 0 and size > 1 for step, size in zip(argument.stride(), argument.shape, strict=True))
        if overlaps or argument.is_contiguous():
            return argument.clone()
        copy = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=argument.device)
        return copy.copy_(argument)
    if type(argument) in (list, tuple):
        return type(argument)(map(_copy, argument))
    if type(argument) is dict:
        return {name: _copy(value) for name, value in argument.items()}
    return argument


def _describe(argument: Any) -> str:
    """An argument in a message: the shape of a tensor, never its numbers."""
    if hasattr(argument, "shape"):
        return str(tuple(argument.shape))
    if isinstance(argument, (list, tuple)):
        inner = ", ".join(map(_describe, argument))
        return _shorten(f"[{inner}]" if isinstance(argument, list) else f"({inner})", 120)
    if isinstance(argument, dict):
        return "{" + ", ".join(map(str, argument)) + "}"
    return type(argument).__name__ if isinstance(argument, torch.nn.Module) else _shorten(repr(argument), 60)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 4] + " ..."


def _line(function: Callable, error: Exception) -> str:
    """The last line of the student's own code that the error passed through, ` at "..."`; empty if unknown."""
    code = getattr(function, "__code__", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    source = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip() if frames else ""
    return f' at "{source}"' if source else ""


def same(got: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors have the same shape and, to 1e-5, the same numbers, in whatever dtype."""
    return got.shape == wanted.shape and torch.allclose(got.float(), wanted.float(), atol=1e-5)
