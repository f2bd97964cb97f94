"""A large contrastive batch in little memory: the gradient of the whole batch, computed in parts.

Adding up the gradients of small batches would train on another loss: a pair would have the negatives of its own part
only. Here (GradCache; Gao et al., RepL4NLP 2021)

    1   the vectors of all parts are computed without keeping what their gradient needs,
    2   the loss of the whole batch gives the gradient of each vector,
    3   each part is computed again, and hands the gradient of its vectors on to the weights.

The result is exact. The memory is that of one part, the time that of one more forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from minivlp.data.batch import Batch
from minivlp.data.processes import ALONE, Processes, rows_of_part
from minivlp.errors import UserError
from minivlp.training.run import random_state, set_random_state


def backward_in_parts(
    model: Any, batch: Batch, parts: int, autocast: AbstractContextManager, processes: Processes = ALONE
) -> dict[str, Tensor]:
    """Add the gradients of `model.losses(batch)` to the parameters, in `parts` parts; returns the losses.

    What a part draws at random, such as dropout, is the same in both passes. Raises UserError for a model with other
    losses than `itc`, and for a batch smaller than `parts`.
    """
    check(model, len(batch), parts)
    places = [rows_of_part(len(batch), part, parts) for part in range(parts)]
    pieces = [batch[rows] for rows in places]
    draws, found = [], []
    with torch.no_grad():
        for piece in pieces:
            draws.append(random_state())
            with autocast:
                found.append(model.encode(piece).vectors)
    vectors = tuple(torch.cat(of_parts).requires_grad_() for of_parts in zip(*found, strict=True))  # (B, E) each
    with autocast:
        terms = model.losses(batch, vectors=vectors, processes=processes)
    sum(terms.values()).backward()
    with restored_random_state():
        for piece, rows, state in zip(pieces, places, draws, strict=True):
            set_random_state(state)
            with autocast:
                again = model.encode(piece).vectors
            torch.autograd.backward(again, [vector.grad[rows] for vector in vectors])
    return terms


def check(model: Any, rows: int, parts: int) -> None:
    """Raises UserError where a batch of this model cannot be computed in parts."""
    losses = model.config.losses
    if losses != ("itc",) or not hasattr(model.encoding, "vectors"):
        raise UserError(
            f"{type(model).__name__} is trained with {', '.join(losses)}: only a batch for the contrastive loss alone "
            "(itc, as CLIP) can be computed in parts.",
            "Leave out {}, or use a smaller batch.",
            "accumulate",
        )
    if rows < parts:
        raise UserError(f"a batch of {rows} cannot be computed in {parts} parts")


@contextmanager
def restored_random_state() -> Iterator[None]:
    """After the block, torch's generators are as they were before it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
