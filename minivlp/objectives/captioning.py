"""Writing captions: at every place of a text, ask for the next word.

All places are asked at once and each is given the true words before it, not the model's own ("teacher forcing").
Axes: B batch, L text tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.objectives.masking import IGNORE


def next_words(ids: Tensor, mask: Tensor, prompt: int | Tensor = 1) -> Tensor:
    """(B, L-1) the id that follows each token but the last, IGNORE where nothing is asked.

    ids, mask (B, L), True on real tokens. Asked is every real token after the first `prompt` ones, as many in all rows
    or (B,) in each: these are given, the start token at least. The closing token is asked too, or the model would never
    learn to stop.
    """
    given = torch.as_tensor(prompt, device=ids.device).reshape(-1, 1)  # (B, 1) or (1, 1)
    asked = mask & (torch.arange(ids.shape[1], device=ids.device) >= given)  # (B, L)
    return ids.masked_fill(~asked, IGNORE)[:, 1:]


def caption_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy where `labels` (...) is not IGNORE; `logits` (..., V). 0 if nothing is asked.

    `smoothing` spreads that share of the target evenly over the whole vocabulary (Szegedy et al. 2016; BLIP: .1): no
    word is ever the only possible one. The loss then has a floor above 0. At initialisation it is about ln V.
    """
    asked = labels != IGNORE
    logits, labels = logits[asked], labels[asked]  # (M, V), (M,)
    return F.cross_entropy(logits, labels, label_smoothing=smoothing) if len(labels) else logits.sum()


def caption_logprob(logits: Tensor, labels: Tensor) -> Tensor:
    """How likely each text is, (B,): the sum of its words' log-probabilities.

    logits (B, L, V) and labels (B, L) as from `next_words`. Longer texts are less likely: divide by the number of words
    to compare them.
    """
    asked = labels != IGNORE
    chosen = logits.log_softmax(dim=-1).gather(-1, labels.where(asked, 0)[..., None])[..., 0]  # (B, L)
    return (chosen * asked).sum(dim=-1)
