"""Masked language modeling: replace some tokens of a text by [MASK] and predict them.

Two steps: which tokens are chosen (one config class per published way), and what stands in their place (`mask_tokens`).
BERT is Devlin et al., NAACL 2019. Axes: B batch, L text tokens, M masked tokens of a text at most, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.data.batch import Text

IGNORE = -100  # a label that no loss counts


class MaskedTokens(NamedTuple):
    """What the model reads, and what it has to predict."""

    text: Text  # (B, L) with some tokens replaced
    labels: Tensor  # (B, L) the original id of a chosen token, IGNORE elsewhere


@dataclass(frozen=True)
class TokenMasking:
    """Each token by itself with probability `rate` (BERT, ALBEF: .15).

    mask_id: the id of [MASK]. never_mask: ids that are never chosen. BERT, ViLT and VLMo leave out all special tokens;
    ALBEF's code leaves out [PAD] and [CLS] only, so that it may mask [SEP].
    alone: ids that are masked without any others, such as the words of relations. In a share `alone_rate` of the texts
    that contain one all of these are chosen and nothing else; in the remaining texts none of these. "A dog left of a
    cup" can be completed without "left", but not without "left" and "dog". Ours; what it is worth: docs/recipe.md.
    """

    rate: float = 0.15
    mask_id: int = 3
    never_mask: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    alone: tuple[int, ...] = ()
    alone_rate: float = 0.5

    def choose(self, text: Text, generator: torch.Generator | None = None) -> Tensor:
        """(B, L) bool: which tokens are to be predicted. A short text may have none."""
        candidates = maskable(text, self.never_mask)
        if not self.alone:
            return self.draw(text, candidates, generator)
        asked = candidates & torch.isin(text.ids, text.ids.new_tensor(self.alone))
        only_these = asked.any(dim=1) & (_rand(text.ids[:, 0], generator) < self.alone_rate)  # (B,)
        return torch.where(only_these[:, None], asked, self.draw(text, candidates & ~asked, generator))

    def draw(self, text: Text, candidates: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B, L) bool: the chosen ones of the `candidates` (B, L)."""
        return candidates & (_rand(text.ids, generator) < self.rate)

    def apply(self, text: Text, vocabulary: int, generator: torch.Generator | None = None) -> MaskedTokens:
        """Choose, and replace as BERT does; `vocabulary` is the number of ids that a token may be replaced by."""
        return mask_tokens(text, self.choose(text, generator), self.mask_id, vocabulary, generator=generator)


@dataclass(frozen=True)
class WordMasking(TokenMasking):
    """Each whole word with probability `rate`, all of its pieces or none (ViLT, VLMo: .15).

    Otherwise "gir ##af ##fe" can be predicted from its own pieces, without the picture (ViLT, section 3.3).
    """

    def draw(self, text: Text, candidates: Tensor, generator: torch.Generator | None) -> Tensor:
        draws = torch.rand(len(text), 2 * text.length, generator=generator, device=text.ids.device)
        return candidates & (draws.gather(1, _word_numbers(text)) < self.rate)


@dataclass(frozen=True)
class SpanMasking(TokenMasking):
    """A share `rate` of each text's tokens, at least one and at most `at_most`, as X-VLM's code chooses them.

    Whole words in random order; with probability `span_rate` a word takes the next one or two along, so that a phrase
    cannot be predicted from its own neighbors. What would exceed the share is left out, except for a text's first word,
    which is never cut.
    """

    rate: float = 0.25
    at_most: int = 8
    span_rate: float = 0.2

    def draw(self, text: Text, candidates: Tensor, generator: torch.Generator | None) -> Tensor:
        turns = _rand(text.ids, generator).argsort(-1).tolist()
        spans = torch.randint(2, 4, text.ids.shape, generator=generator, device=text.ids.device)
        spans = torch.where(_rand(text.ids, generator) < self.span_rate, spans, 1).tolist()
        chosen = torch.zeros_like(candidates)
        for row, (may, word) in enumerate(zip(candidates.tolist(), _word_numbers(text).tolist(), strict=True)):
            share = min(self.at_most, round(self.rate * sum(may)))
            taken: list[int] = []
            for seed in (t for t in turns[row] if may[t]):
                for number in range(word[seed], word[seed] + spans[row][seed]):
                    pieces = [t for t in range(len(word)) if word[t] == number and may[t] and t not in taken]
                    if len(taken) + len(pieces) <= (share if taken else self.at_most):
                        taken += pieces
            chosen[row, taken] = True
        return chosen


@dataclass(frozen=True)
class WordDropout(TokenMasking):
    """Each token is replaced by one id, `mask_id`, with probability `rate`; nothing is predicted.

    A regularizer: a text must be recognized without some of its words. [MASK] stands in their place, or [UNK] where a
    tokenizer has no [MASK].
    """

    rate: float = 0.2

    def drop(self, text: Text, generator: torch.Generator | None = None) -> Text:
        """The texts (B, L) with the chosen tokens replaced."""
        return text.with_ids(text.ids.masked_fill(self.choose(text, generator), self.mask_id))


def maskable(text: Text, never: tuple[int, ...] = ()) -> Tensor:
    """(B, L) bool: real tokens whose id is not in `never`."""
    return text.mask & ~torch.isin(text.ids, text.ids.new_tensor(never))


def _word_numbers(text: Text) -> Tensor:
    """(B, L) `text.word`, in which special tokens and padding are words of their own, numbered from L on."""
    places = torch.arange(text.length, device=text.ids.device)
    return torch.where(text.word >= 0, text.word, text.length + places)


def _rand(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device)


def mask_tokens(
    text: Text,
    chosen: Tensor,
    mask_id: int,
    vocabulary: int,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Replace the `chosen` (B, L) tokens: 80 % by [MASK], 10 % by any id, 10 % stay as they are.

    The last two make the model attend to every position: at test time there is no [MASK] to mark where to predict.
    """
    ids, draw = text.ids, _rand(chosen, generator)
    anything = torch.randint(0, vocabulary, ids.shape, generator=generator, device=ids.device)
    masked = torch.where(chosen & (draw < mask_share), torch.full_like(ids, mask_id), ids)
    masked = torch.where(chosen & (draw >= mask_share) & (draw < mask_share + random_share), anything, masked)
    return MaskedTokens(text.with_ids(masked), torch.where(chosen, ids, torch.full_like(ids, IGNORE)))


def labeled_places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where something is asked: places (B, M) and, for these, labels (B, M), padded with IGNORE to the most of a row.

    labels: (B, L), IGNORE where nothing is asked. A transformer's last block computes these places alone (`rows`).
    """
    asked = labels != IGNORE
    most = int(asked.sum(dim=1).max()) if len(labels) else 0
    places = asked.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, M)
    return places, labels.gather(1, places)


def masked_loss(logits: Tensor, labels: Tensor, momentum: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Mean cross-entropy where `labels` (...) is not IGNORE; `logits` (..., V). 0 if nothing is asked.

    With the `momentum` model's logits (..., V), a share `alpha` of the target is its prediction instead of the one true
    token (ALBEF, section 3.3): a caption is rarely the only good one. At initialization the loss is about ln V.
    """
    asked = labels != IGNORE
    logits, labels = logits[asked], labels[asked]  # (N, V), (N,)
    if len(labels) == 0:
        return logits.sum()
    loss = F.cross_entropy(logits, labels)
    if momentum is None:
        return loss
    return (1 - alpha) * loss + alpha * F.cross_entropy(logits, momentum[asked].detach().softmax(-1))
