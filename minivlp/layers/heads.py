"""Small heads that several papers share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class WordHead(nn.Module):
    """BERT's head for masked words: (…, D) -> logits (…, V). Tied to the word embedding where `tied` is given."""

    def __init__(self, width: int, vocabulary: int, norm_eps: float, tied: nn.Embedding | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.decoder = nn.Linear(width, vocabulary)
        if tied is not None:
            self.decoder.weight = tied.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(x))))
