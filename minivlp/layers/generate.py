"""Writing a text token by token: greedily, by beam search, or by drawing from the likeliest words (nucleus).

All three ask the model the same question, "what comes next?", by a function `step`:

    step(ids, rows) -> logits (N, V) of the token after each text

`ids` (N, n) are the tokens that are new since the last call (all of the start at first, then one a call), so that the
model may remember the rest (`attention.Past`). `rows` (N,) says which text of the last call each of these goes on with;
None means each with its own.

Lengths count every token: the start, what was written, and the closing token. Results equal those of transformers'
`generate`. Axes: B texts, K beams, N = B or B*K, n tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[[Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Rules:
    """What every way of writing keeps to.

    stop: the token that ends a text; pad: what fills the row after it. A text has at least `min_length` tokens and at
    most `max_length`. repetition_penalty: above 1, a token that is already there becomes less likely (Keskar et al.
    2019, section 4.1).
    """

    stop: int
    pad: int
    max_length: int
    min_length: int = 0
    repetition_penalty: float = 1.0

    def apply(self, scores: Tensor, ids: Tensor) -> Tensor:
        """`scores` (N, V) of the next token (logits or log-probabilities) as the rules would have them after `ids`."""
        if self.repetition_penalty != 1.0:
            said = scores.gather(1, ids)  # (N, n)
            said = torch.where(said < 0, said * self.repetition_penalty, said / self.repetition_penalty)
            scores = scores.scatter(1, ids, said)
        if ids.shape[1] < self.min_length:
            scores = scores.index_fill(1, torch.tensor([self.stop], device=scores.device), -torch.inf)
        return scores


def generate(
    step: Step,
    start: Tensor,
    rules: Rules,
    *,
    beams: int = 1,
    length_penalty: float = 1.0,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Go on with `start` (B, n) until every text has ended: ids (B, L), start included.

    By default the likeliest token is taken each time. `beams` above 1 keeps that many texts per row in play, and `step`
    then gets B*beams rows, each row's beside each other. `top_p` in 0..1 draws instead. Raises ValueError for both at
    once, for a `top_p` outside, and for a start that fills `max_length`.
    """
    if beams < 1 or (beams > 1 and top_p is not None) or not 0 < (1.0 if top_p is None else top_p) <= 1:
        raise ValueError(f"beams {beams} and top_p {top_p}: give beams above 1, or top_p in 0..1, or neither")
    if start.shape[1] >= rules.max_length:
        raise ValueError(f"the start has {start.shape[1]} tokens, which leaves none of {rules.max_length} to write")
    if beams > 1:
        return beam_search(step, start, rules, beams, length_penalty)

    def choose(scores: Tensor) -> Tensor:
        if top_p is None:
            return scores.argmax(dim=-1)
        return torch.multinomial(nucleus(scores, top_p).softmax(dim=-1), 1, generator=generator)[:, 0]

    ids, new = start, start
    ended = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    while ids.shape[1] < rules.max_length and not ended.all():
        new = choose(rules.apply(step(new, None), ids)).masked_fill(ended, rules.pad)[:, None]  # (B, 1)
        ids = torch.cat([ids, new], dim=1)
        ended = ended | (new[:, 0] == rules.stop)
    return ids


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Only the likeliest tokens that together reach `top_p`; the others' logits (..., V) become -inf.

    The token that crosses the line stays in, so at least one always does. Source: Holtzman et al. 2020, section 3.1.
    """
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    likelier = probabilities.cumsum(dim=-1) - probabilities  # what all the tokens before this one have already
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, likelier >= top_p)
    return logits.masked_fill(outside, -torch.inf)


def beam_search(step: Step, start: Tensor, rules: Rules, beams: int, length_penalty: float) -> Tensor:
    """Keep the `beams` likeliest unfinished texts of each row; of those that end, the best one wins: (B, L).

    A text scores the sum of its log-probabilities, divided by the number of tokens written to the power of
    `length_penalty` (0 favours short texts, above 1 long ones). A row is done when it has `beams` finished texts and
    its best unfinished one scores no better than the worst of them.
    """
    rows, begun, device = len(start), start.shape[1], start.device
    first = torch.arange(rows, device=device)[:, None] * beams  # (B, 1) where each row's beams begin
    ids, new, origin = start.repeat_interleave(beams, dim=0), start.repeat_interleave(beams, dim=0), None  # (B*K, n)
    running = torch.full((rows, beams), -torch.inf, device=device)  # (B, K) sums of log-probabilities
    running[:, 0] = 0.0  # at first all beams are alike: only one may go on, or all would go the same way
    finished = torch.full((rows, beams, rules.max_length), rules.pad, device=device)  # (B, K, max_length)
    score = torch.full((rows, beams), -torch.inf, device=device)  # (B, K) of the finished ones
    going = torch.ones(rows, 1, dtype=torch.bool, device=device)
    for length in range(begun + 1, rules.max_length + 1):
        scores = rules.apply(step(new, origin).log_softmax(dim=-1), ids)  # (B*K, V)
        total = running[..., None] + scores.unflatten(0, (rows, beams))  # (B, K, V)
        # twice as many as are kept: should all of the best end here, there are others to go on with
        best, place = total.flatten(1).topk(2 * beams)  # (B, 2K)
        came_from, token = first + place // total.shape[-1], place % total.shape[-1]
        texts = torch.cat([ids[came_from], token[..., None]], dim=-1)  # (B, 2K, length)

        ends = (token == rules.stop) | (length == rules.max_length)
        ended = best / (length - begun) ** length_penalty
        ended = ended.masked_fill(~(ends & going), -torch.inf)[:, :beams]  # the second half is in reserve only
        score, kept = torch.cat([score, ended], dim=1).topk(beams)
        padded = torch.full((rows, beams, rules.max_length), rules.pad, device=device)
        padded[..., :length] = texts[:, :beams]
        finished = torch.cat([finished, padded], dim=1).gather(1, kept[..., None].expand(-1, -1, rules.max_length))

        running, kept = best.masked_fill(ends, -torch.inf).topk(beams)
        ids, origin = texts.gather(1, kept[..., None].expand(-1, -1, length)).flatten(0, 1), came_from.gather(1, kept)
        new, origin = ids[:, -1:], origin.flatten()  # (B*K, 1), (B*K,)
        going = going & (running[:, :1] / (length - begun) ** length_penalty > score[:, -1:])
        if not going.any():
            break
    winners = finished[:, 0]  # (B, max_length)
    return winners[:, : int((winners != rules.pad).any(dim=0).nonzero().max()) + 1]
