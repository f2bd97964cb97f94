"""Masked language modelling: hide some words, ask for them back.

Three steps that combine freely: *which* tokens may be asked (`maskable`), which of them are (`choose_tokens` as BERT
and ALBEF, `choose_words` as ViLT and VLMo, `choose_spans` as X-VLM), and what stands in their place (`hide`).
BERT is Devlin et al., NAACL 2019. Axes: B batch, L text tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a label that no loss counts


class Masked(NamedTuple):
    """What the model reads and what it is asked."""

    ids: Tensor  # (B, L) with some tokens hidden
    labels: Tensor  # (B, L) the hidden token's id, IGNORE elsewhere


def maskable(ids: Tensor, mask: Tensor, never: tuple[int, ...] = ()) -> Tensor:
    """(B, L) bool: real tokens (`mask` True) whose id is not in `never`.

    ALBEF's `never` is (cls,), so that it also masks the separator; ViLT, VLMo and BERT leave out all special tokens.
    """
    return mask & ~torch.isin(ids, ids.new_tensor(never))


def word_groups(continues: Tensor) -> Tensor:
    """(B, L) number of the word that each token belongs to; `continues` (B, L) is True on pieces such as "##ing"."""
    return (~continues).cumsum(-1)


def _rand(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device)


def choose_tokens(candidates: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """(B, L) bool: each of the `candidates` (B, L) with probability `rate`, independently. BERT, ALBEF: 0.15."""
    return candidates & (_rand(candidates, generator) < rate)


def choose_words(candidates: Tensor, words: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """(B, L) bool: each word with probability `rate`, all of its pieces or none. ViLT: 0.15.

    `words` (B, L) as from `word_groups`: without it "gir ##af ##fe" is guessed from its own pieces, not the picture.
    """
    draws = _rand(candidates, generator).gather(-1, words - words.min(-1, keepdim=True).values)  # by word, not by token
    return candidates & (draws < rate)


def choose_spans(
    candidates: Tensor,
    words: Tensor,
    rate: float = 0.25,
    at_most: int = 8,
    span_rate: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B, L) bool: a share `rate` of each row, at least one and at most `at_most`, as X-VLM's code chooses them.

    Whole words (`words` (B, L) as from `word_groups`) in random order; with probability `span_rate` a word takes the
    next one or two along, since a phrase hidden as a whole cannot be guessed from its own neighbours. What would pass
    the share is left out, but for a row's first word, which is never cut. Rows without candidates stay empty.
    """
    turns = _rand(candidates, generator).argsort(-1).tolist()
    spans = torch.randint(2, 4, candidates.shape, generator=generator, device=candidates.device)
    spans = torch.where(_rand(candidates, generator) < span_rate, spans, 1).tolist()
    chosen = torch.zeros_like(candidates)
    for row, (may, word) in enumerate(zip(candidates.tolist(), words.tolist(), strict=True)):
        share = min(at_most, round(rate * sum(may)))
        taken: list[int] = []
        for seed in turns[row]:
            for number in range(word[seed], word[seed] + spans[row][seed]):
                pieces = [t for t in range(len(word)) if word[t] == number and may[t] and t not in taken]
                if len(taken) + len(pieces) <= (share if taken else at_most):
                    taken += pieces
        chosen[row, taken] = True
    return chosen


def hide(
    ids: Tensor,
    chosen: Tensor,
    mask_id: int,
    vocab_size: int,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    generator: torch.Generator | None = None,
) -> Masked:
    """Put something else in place of the `chosen` (B, L) tokens: 80 % `[MASK]`, 10 % any id, 10 % left as they are.

    The last two keep the model honest about every position: at test time there is no `[MASK]` to tell it where to look.
    """
    draw = _rand(chosen, generator)
    anything = torch.randint(0, vocab_size, ids.shape, generator=generator, device=ids.device)
    hidden = torch.where(chosen & (draw < mask_share), torch.full_like(ids, mask_id), ids)
    hidden = torch.where(chosen & (draw >= mask_share) & (draw < mask_share + random_share), anything, hidden)
    return Masked(hidden, torch.where(chosen, ids, torch.full_like(ids, IGNORE)))


def masked_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Mean cross-entropy where `labels` (...) is not IGNORE; `logits` (..., V). 0 if nothing is asked.

    With the `teacher`'s logits (..., V), a share `alpha` of the target is what the teacher believes instead of the
    one true word (ALBEF, section 3.3): a caption is rarely the only good one. At initialisation it is about ln V.
    """
    asked = labels != IGNORE
    logits, labels = logits[asked], labels[asked]  # (M, V), (M,)
    if len(labels) == 0:
        return logits.sum()
    loss = F.cross_entropy(logits, labels)
    if teacher is None:
        return loss
    return (1 - alpha) * loss + alpha * F.cross_entropy(logits, teacher[asked].detach().softmax(-1))
