"""Generating a text token by token: greedily, by beam search, or by nucleus sampling.

All three ask the model for the next token by a function `step`:

    step(ids, rows) -> logits (N, V) of the token after each text

`ids` (N, n) are the tokens that are new since the last call (all of the start at first, then one a call), so that the
model may keep the rest (`attention.KVCache`). `rows` (N,) says which text of the last call each of these continues;
None means each its own.

Lengths count every token: the start, what was generated, and the closing token. Results equal those of transformers'
`generate`. Axes: B texts, K beams, N = B or B*K, n tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[[Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class DecodingConfig:
    """How a text is generated. By default the most likely token is taken each time.

    beams: above 1, so many texts per row are kept in play (beam search). top_p: draw each token from the most likely
    ones that together have this probability (nucleus sampling). A text has at least `min_length` tokens and at most
    `max_length`; None is the model's context length. repetition_penalty: above 1, a token that is already there becomes
    less likely (Keskar et al. 2019, section 4.1). length_penalty: of beam search, 0 favors short texts, above 1 long
    ones. Raises ValueError for beams together with top_p, and for a top_p outside 0..1.
    """

    beams: int = 1
    top_p: float | None = None
    max_length: int | None = None
    min_length: int = 0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        beams, top_p = self.beams, self.top_p
        if beams < 1 or (beams > 1 and top_p is not None) or not 0 < (1.0 if top_p is None else top_p) <= 1:
            raise ValueError(f"beams {beams} and top_p {top_p}: give beams above 1, or top_p in 0..1, or neither")

    def adjust(self, scores: Tensor, ids: Tensor, stop: int) -> Tensor:
        """`scores` (N, V) of the next token after `ids` (N, n), with the repetition penalty and without `stop` where a
        text is too short to end."""
        if self.repetition_penalty != 1.0:
            used = scores.gather(1, ids)  # (N, n)
            used = torch.where(used < 0, used * self.repetition_penalty, used / self.repetition_penalty)
            scores = scores.scatter(1, ids, used)
        if ids.shape[1] < self.min_length:
            scores = scores.index_fill(1, torch.tensor([stop], device=scores.device), -torch.inf)
        return scores


def generate(
    step: Step,
    start: Tensor,
    decoding: DecodingConfig,
    stop: int,
    pad: int,
    longest: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue `start` (B, n) until every text has ended: ids (B, L), start included.

    `stop` ends a text, `pad` fills the row after it; no text has more than `longest` tokens. With several beams, `step`
    gets B*beams rows, each row's beside each other. Raises ValueError for a start that leaves no token to generate.
    """
    longest = longest if decoding.max_length is None else min(decoding.max_length, longest)
    if start.shape[1] >= longest:
        raise ValueError(f"the start has {start.shape[1]} tokens, which leaves none of {longest} to write")
    if decoding.beams > 1:
        return beam_search(step, start, decoding, stop, pad, longest)

    def choose(scores: Tensor) -> Tensor:
        if decoding.top_p is None:
            return scores.argmax(dim=-1)
        return torch.multinomial(nucleus(scores, decoding.top_p).softmax(dim=-1), 1, generator=generator)[:, 0]

    ids, new = start, start
    ended = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    while ids.shape[1] < longest and not ended.all():
        scores = decoding.adjust(step(new, None), ids, stop)
        new = choose(scores).masked_fill(ended, pad)[:, None]  # (B, 1)
        ids = torch.cat([ids, new], dim=1)
        ended = ended | (new[:, 0] == stop)
    return ids


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Only the most likely tokens that together reach `top_p`; the others' logits (..., V) become -inf.

    The token that crosses the line stays in, so at least one always does. Source: Holtzman et al. 2020, section 3.1.
    """
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # of all more likely tokens
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(outside, -torch.inf)


def beam_search(step: Step, start: Tensor, decoding: DecodingConfig, stop: int, pad: int, longest: int) -> Tensor:
    """Keep the most likely unfinished texts of each row; of those that end, the best one wins: (B, L).

    A text scores the sum of its log-probabilities, divided by the number of generated tokens to the power of
    `length_penalty`. A row is done when it has `beams` finished texts and its best unfinished one scores no better than
    the worst of them.
    """
    beams, length_penalty = decoding.beams, decoding.length_penalty
    rows, begun, device = len(start), start.shape[1], start.device
    first = torch.arange(rows, device=device)[:, None] * beams  # (B, 1) where each row's beams begin
    ids, new, origin = start.repeat_interleave(beams, dim=0), start.repeat_interleave(beams, dim=0), None  # (B*K, n)
    running = torch.full((rows, beams), -torch.inf, device=device)  # (B, K) sums of log-probabilities
    running[:, 0] = 0.0  # at first all beams are alike: only one may go on, or all would go the same way
    finished = torch.full((rows, beams, longest), pad, device=device)  # (B, K, max_length)
    score = torch.full((rows, beams), -torch.inf, device=device)  # (B, K) of the finished ones
    going = torch.ones(rows, 1, dtype=torch.bool, device=device)
    for length in range(begun + 1, longest + 1):
        scores = decoding.adjust(step(new, origin).log_softmax(dim=-1), ids, stop)  # (B*K, V)
        total = running[..., None] + scores.unflatten(0, (rows, beams))  # (B, K, V)
        # twice as many as are kept: should all of the best end here, there are others to go on with
        best, place = total.flatten(1).topk(2 * beams)  # (B, 2K)
        came_from, token = first + place // total.shape[-1], place % total.shape[-1]
        texts = torch.cat([ids[came_from], token[..., None]], dim=-1)  # (B, 2K, length)

        ends = (token == stop) | (length == longest)
        ended = best / (length - begun) ** length_penalty
        ended = ended.masked_fill(~(ends & going), -torch.inf)[:, :beams]  # the second half is in reserve only
        score, kept = torch.cat([score, ended], dim=1).topk(beams)
        padded = torch.full((rows, beams, longest), pad, device=device)
        padded[..., :length] = texts[:, :beams]
        finished = torch.cat([finished, padded], dim=1).gather(1, kept[..., None].expand(-1, -1, longest))

        running, kept = best.masked_fill(ends, -torch.inf).topk(beams)
        ids, origin = texts.gather(1, kept[..., None].expand(-1, -1, length)).flatten(0, 1), came_from.gather(1, kept)
        new, origin = ids[:, -1:], origin.flatten()  # (B*K, 1), (B*K,)
        going = going & (running[:, :1] / (length - begun) ** length_penalty > score[:, -1:])
        if not going.any():
            break
    winners = finished[:, 0]  # (B, max_length)
    return winners[:, : int((winners != pad).any(dim=0).nonzero().max()) + 1]
