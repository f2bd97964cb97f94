"""Captioning as language modeling: at every place of a text, predict the next token.

All places are predicted in one pass, each from the true tokens before it ("teacher forcing").
Axes: B batch, L text tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.data.batch import Text
from minivlp.objectives.masking import IGNORE


def next_tokens(text: Text, prefix_length: int | Tensor = 1) -> Tensor:
    """(B, L-1) the id that follows each token but the last, IGNORE where nothing is predicted.

    Predicted is every real token of the texts (B, L) after the first `prefix_length` ones, as many in all rows or (B,)
    in each: these are given, the start token at least. The closing token is predicted too, or the model would never
    learn to stop.
    """
    given = torch.as_tensor(prefix_length, device=text.ids.device).reshape(-1, 1)  # (B, 1) or (1, 1)
    predicted = text.mask & (torch.arange(text.length, device=text.ids.device) >= given)  # (B, L)
    return text.ids.masked_fill(~predicted, IGNORE)[:, 1:]


def caption_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy where `labels` (...) is not IGNORE; `logits` (..., V). 0 if nothing is predicted.

    `smoothing` moves that share of the target to a uniform distribution over the vocabulary (label smoothing, Szegedy
    et al. 2016; BLIP: .1), which keeps the model from becoming overconfident. The loss then has a minimum above 0. At
    initialization it is about ln V.
    """
    predicted = labels != IGNORE
    logits, labels = logits[predicted], labels[predicted]  # (N, V), (N,)
    return F.cross_entropy(logits, labels, label_smoothing=smoothing) if len(labels) else logits.sum()


def smoothed_kl(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean Kullback-Leibler divergence from the smoothed targets where `labels` (...) is not IGNORE; `logits` (..., V).

    This is the smoothing of GIT's released code. The label keeps 1 - smoothing, and each of the V - 1 other tokens gets
    an equal part of the rest; `caption_loss` gives such a part to the label, too. The divergence is the cross-entropy
    with these targets less their own entropy, so its minimum is 0 and its gradient is that of the cross-entropy. 0 if
    nothing is predicted.
    """
    predicted = labels != IGNORE
    logits, labels = logits[predicted], labels[predicted]  # (N, V), (N,)
    if not len(labels):
        return logits.sum()
    if not smoothing:
        return F.cross_entropy(logits, labels)
    log_probs, other = logits.log_softmax(dim=-1), smoothing / (logits.shape[-1] - 1)
    chosen = log_probs.gather(-1, labels[:, None])[:, 0]  # (N,)
    cross_entropy = -(1 - smoothing) * chosen - other * (log_probs.sum(dim=-1) - chosen)
    entropy = -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(other)
    return cross_entropy.mean() - entropy


def caption_logprob(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each text, (B,): the sum over its predicted tokens.

    logits (B, L, V) and labels (B, L) as from `next_tokens`. Longer texts are less likely: divide by the number of
    tokens to compare texts of different length.
    """
    predicted = labels != IGNORE
    chosen = logits.log_softmax(dim=-1).gather(-1, labels.where(predicted, 0)[..., None])[..., 0]  # (B, L)
    return (chosen * predicted).sum(dim=-1)
