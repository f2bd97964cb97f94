"""Texts of a batch in two groups by length, so that short ones are not computed as long as the longest.

A batch is padded to its longest text, twice the average length in the scene world. Nothing attends to padding, so the
split changes no result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.data.batch import Text

WORTH_IT = 0.9  # the split must leave at most this share of the tokens, or one larger product is as fast
LEAST_SAVED = 256  # tokens that it must save: at 180 of 576, two passes of ALBEF nano took a quarter longer than one


def pays(split: int, whole: int) -> bool:
    """Whether two passes over `split` tokens together are faster than one over `whole`."""
    return split <= WORTH_IT * whole and whole - split >= LEAST_SAVED


def in_length_buckets(text: Text, run: Callable[[Tensor | slice, Text], Tensor]) -> Tensor:
    """What `run(rows, text)` returns for each text, (B, M, ...), in the order of the texts (B, L).

    `run` gets the rows of a group, for whatever else it indexes, and their texts, trimmed; it returns (n, m, ...) with
    any m, and shorter results are padded with zeros. On a GPU everything runs at once: there the lengths are not known
    without waiting for the device, and the padding costs little.
    """
    everything = slice(None)
    if text.ids.device.type != "cpu" or len(text) < 2:
        return run(everything, text)
    lengths, order = text.mask.sum(dim=1).sort()  # (B,) each
    count = torch.arange(1, len(text))
    tokens = count * lengths[:-1] + (len(text) - count) * lengths[-1]  # computed if the first `count` are one group
    best = int(tokens.argmin())
    if not pays(int(tokens[best]), len(text) * text.length):
        return run(everything, text)
    groups = order.split([best + 1, len(text) - best - 1])
    results = [run(rows, text[rows].trimmed()) for rows in groups]
    longest = max(result.shape[1] for result in results)
    padded = [F.pad(r, (0, 0) * (r.dim() - 2) + (0, longest - r.shape[1])) for r in results]
    return torch.cat(padded).index_select(0, order.argsort())
