"""Weights of one model as the start of another."""

from __future__ import annotations

from torch import Tensor, nn


def copy_parts(parts: dict[str, nn.Module | Tensor], model: nn.Module) -> None:
    """Give a model's parts, by their names in it, the weights of other modules or tensors of the same shape.

    Raises ValueError, naming them, where a weight has no counterpart of its size.
    """
    new = {}
    for name, part in parts.items():
        new |= {name: part} if isinstance(part, Tensor) else {f"{name}.{n}": t for n, t in part.state_dict().items()}
    own = model.state_dict()
    wrong = sorted(name for name, t in new.items() if name not in own or own[name].shape != t.shape)
    if wrong:
        raise ValueError(f"these weights have other sizes than {type(model).__name__}: {', '.join(wrong)}")
    model.load_state_dict(new, strict=False)
