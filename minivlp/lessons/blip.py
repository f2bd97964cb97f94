"""Checks of lesson 05's exercises: the causal mask and the greedy loop of the decoder, its loss, and the nucleus."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minivlp.data.batch import Text
from minivlp.layers.attention import attention_mask
from minivlp.layers.generation import DecodingConfig, generate, nucleus
from minivlp.lessons.check import attempt, demand, demand_gradients
from minivlp.objectives.captioning import caption_loss, next_tokens
from minivlp.objectives.masking import IGNORE


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_causal_mask(student: Callable[[Tensor], Tensor]) -> None:
    """Exercise 1a: `student(real)`, (B, L) bool -> (B, 1, L, L) bool, True where a query (row) may attend to a key."""
    lengths = torch.tensor([5, 3, 1])
    padded = torch.arange(5) < lengths[:, None]  # (3, 5): padding stands at the end
    for kind, real in {
        "three texts of 5, 3 and 1 tokens": padded,
        "a batch of one": padded[:1],
        "a single token": torch.ones(2, 1, dtype=torch.bool),
        "a mask that is a view with strides": torch.stack([padded, ~padded], dim=-1)[..., 0],
    }.items():
        batch, length = real.shape
        got = torch.as_tensor(attempt(student, real))
        demand(
            got.dtype == torch.bool,
            f"The mask must be boolean, True where a token may attend; yours is {got.dtype}. Compare, or use .bool().",
        )
        shape = (batch, 1, length, length)
        demand(
            got.shape == shape,
            f"For {kind} the mask has shape {shape}: texts, 1 (all heads alike), queries, keys. Yours has "
            f"{tuple(got.shape)}.",
        )
        wanted, place = attention_mask(real, causal=True), torch.arange(length)
        later = place > place[:, None]  # (L, L)
        demand(
            not (got & later).any() or not torch.equal(got, wanted.mT),
            "Transposed: the rows of the mask are the queries, the columns the keys.",
        )
        demand(
            not (got & later).any(),
            f"For {kind} a token may attend to a later one: the answer that it is to predict.",
        )
        on_itself = got.diagonal(dim1=-2, dim2=-1)[:, 0]  # (B, L)
        demand(
            on_itself[real].all(),
            "A token may not attend to itself in yours. It has been read already: the *next* token is predicted.",
        )
        keys, queries = real[:, None, None, :], real[:, None, :, None]
        demand(
            not (got & ~keys).any(),
            "Padding is attended to: a key may be used only where `real` is True.",
        )
        demand(
            not torch.equal(got, wanted & queries) or torch.equal(wanted, wanted & queries),
            "You switch off the *rows* of padding too, so a padded query may attend to nothing. Only keys are masked: "
            "what stands at padded places is never read.",
        )
        demand(torch.equal(got, wanted), f"For {kind} some earlier tokens are missing: all of them may be attended to.")
    print("ok: each token attends to itself and to earlier real tokens, in every text.")


class _Told:
    """A made-up decoder: the next token follows from all tokens so far, and texts end at different lengths."""

    def __init__(self, stop: int, vocabulary: int = 23) -> None:
        self.table, self.stop, self.calls = _random(97, vocabulary, seed=3), stop, 0
        self.lengths: set[int] = set()  # of the texts that it was given
        self.ends = torch.tensor([4, 7, 6, 9, 11])

    def logits(self, ids: Tensor, row: Tensor) -> Tensor:
        """ids (N, n), row (N,) -> logits (N, V) of the next token."""
        place = torch.arange(1, ids.shape[1] + 1)
        found = self.table[(ids * place * place).sum(dim=1) % len(self.table)].clone()  # (N, V)
        found[:, self.stop] = torch.where(ids.shape[1] >= self.ends[row], 9.0, -9.0)
        return found

    def __call__(self, ids: Tensor) -> Tensor:
        self.calls += 1
        self.lengths.add(ids.shape[1])
        return self.logits(ids, torch.arange(len(ids)))


def check_greedy(student: Callable[..., Tensor]) -> None:
    """Exercise 1b: `student(next_logits, start, stop, pad, longest)` -> ids (B, L), with the start.

    `next_logits(ids)`, (B, n) -> (B, V), sees all tokens so far.
    """
    stop, pad = 2, 0
    for kind, start, longest in (
        ("five texts", torch.full((5, 1), 5), 40),
        ("a batch of one", torch.full((1, 1), 5), 40),
        ("a prompt of two tokens", torch.tensor([[5, 9], [5, 12], [5, 3]]), 40),
        ("at most 6 tokens", torch.full((5, 1), 5), 6),
    ):
        model = _Told(stop)
        got = torch.as_tensor(attempt(student, model, start, stop, pad, longest))
        wanted = _greedy(_Told(stop), start, stop, pad, longest)
        text = f"For {kind}: "
        demand(
            model.calls < 3 or len(model.lengths) > 1,
            f"{text}`next_logits` gets {min(model.lengths, default=0)} token each time. The next token depends on "
            "*all* tokens so far: give it the whole text.",
        )
        demand(got.ndim == 2 and len(got) == len(start), f"{text}return ids (B, L); yours are {tuple(got.shape)}.")
        demand(
            got.shape[1] >= start.shape[1] and torch.equal(got[:, : start.shape[1]], start),
            f"{text}the ids begin with `start`, which is not there in yours.",
        )
        demand(
            got.shape[1] <= longest,
            f"{text}{got.shape[1]} tokens, but a text has at most {longest}, the start included.",
        )
        first = got.shape[1] == start.shape[1] or torch.equal(got[:, start.shape[1]], wanted[:, start.shape[1]])
        demand(first, f"{text}already the first token is another one. Take the argmax over the vocabulary, each time.")
        after = [(row == stop).nonzero()[:1, 0].tolist() for row in got]
        for row, ends in zip(got, after, strict=True):
            demand(
                not ends or (row[ends[0] + 1 :] == pad).all(),
                f"{text}a text goes on after its closing token {stop}. Fill the rest of its row with padding.",
            )
        demand(
            got.shape[1] >= wanted.shape[1] or longest == got.shape[1],
            f"{text}you stop when {got.shape[1]} tokens are written, but not all texts have ended.",
        )
        demand(
            got.shape[1] <= wanted.shape[1],
            f"{text}all texts have ended after {wanted.shape[1]} tokens; yours go on to {got.shape[1]}.",
        )
        demand(
            torch.equal(got, wanted),
            f"{text}the texts differ from place {int((got != wanted).any(dim=0).long().argmax())} on. Each next token "
            "depends on all tokens so far, in their order.",
        )
        demand(
            model.calls <= wanted.shape[1] - start.shape[1],
            f"{text}you ask for the next token {model.calls} times to write {wanted.shape[1] - start.shape[1]}.",
        )
    print("ok: the most likely token each time, until every text has ended.")


def _greedy(model: _Told, start: Tensor, stop: int, pad: int, longest: int) -> Tensor:
    """The library's loop on the same decoder; it hands over new tokens only."""
    read: list[Tensor] = []

    def step(new: Tensor, _: Tensor | None) -> Tensor:
        read.append(new)
        return model(torch.cat(read, dim=1))

    return generate(step, start, DecodingConfig(), stop, pad, longest)


def check_nucleus(student: Callable[[Tensor, float], Tensor]) -> None:
    """Exercise 3: `student(logits, p)`, (B, V) -> the logits, -inf except for the most likely tokens that reach p."""
    probabilities = torch.tensor([[0.05, 0.50, 0.02, 0.30, 0.13]])
    logits = probabilities.log() + 3  # logits are not log-probabilities: a constant may be added

    def ask(logits: Tensor, p: float) -> Tensor:
        got = torch.as_tensor(attempt(student, logits, p))
        demand(
            got.shape == logits.shape,
            f"As many logits come out as go in: {tuple(logits.shape)}, yours are {tuple(got.shape)}.",
        )
        return got

    few, got = ask(logits, 0.4), ask(logits, 0.7)
    kept = got.isfinite()
    demand(
        not (few[0, 2].isfinite() and not few[0, 1].isfinite()),
        "You keep the *least* likely tokens: sort with descending=True.",
    )
    demand(
        not torch.allclose(got.sum(), torch.tensor(1.0)) or not (got >= 0).all(),
        "These are probabilities. Return logits: the caller applies the softmax.",
    )
    demand(
        not kept.all(),
        "All logits are finite, so any token can still be drawn; only -inf has probability 0.",
    )
    in_order = torch.where(
        torch.tensor([[True, True, False, False, False]]), logits.sort(descending=True)[0], -torch.inf
    )
    demand(
        not torch.equal(got, in_order),
        "Your logits are sorted by probability. Bring each back to its token (scatter).",
    )
    names = kept[0].nonzero()[:, 0].tolist()
    demand(names != [], "No token is left to draw from.")
    demand(
        names != [1],
        "With p = .7 you keep the token of .50 alone, which does not reach .7. The token that crosses p stays in.",
    )
    demand(
        names != [1, 3, 4],
        "You keep .50, .30 and .13 for p = .7, but the first two reach it. Compare p with the sum *before* each token.",
    )
    demand(names == [1, 3], f"For p = .7 the tokens 1 and 3 (.50 and .30) are kept; yours are {names}.")
    demand(torch.equal(got[kept], logits[kept]), "The logits of the tokens that stay must not change.")
    certain = torch.tensor([[0.01, 0.95, 0.04]]).log()
    got = ask(certain, 0.9)
    demand(got.isfinite().any(), "One token has .95, p is .9: nothing is left. The most likely token always stays.")
    many = _random(6, 12) * torch.tensor([0.1, 0.5, 1, 2, 4, 8])[:, None]  # from uncertain to certain
    for p in (0.3, 0.9):
        got = ask(many, p).isfinite()
        wanted = nucleus(many, p).isfinite()
        demand(
            not (got == got[:1]).all() and len(set(got.sum(dim=1).tolist())) > 1,
            "In yours every row keeps equally many tokens, as in top-k sampling; a nucleus is larger where it is "
            "uncertain.",
        )
        row = int((got != wanted).any(dim=1).long().argmax())
        demand(
            torch.equal(got, wanted),
            f"Six rows at once, p = {p}: for row {row} the tokens {wanted[row].nonzero()[:, 0].tolist()} are inside, "
            f"not {got[row].nonzero()[:, 0].tolist()}. Each row has its own nucleus.",
        )
    for kind, other in (("float64", many.double()), ("a transposed tensor", many.T.contiguous().T)):
        right = torch.equal(ask(other, 0.9).isfinite(), nucleus(many, 0.9).isfinite())
        demand(right, f"Right so far, but wrong for logits that are {kind}.")
    print("ok: few tokens where the model is certain, many where it is uncertain, and at least one.")


def check_caption_loss(student: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 2: `student(logits, ids, mask, smoothing)`, (B, L, V), (B, L), (B, L) -> the loss, a scalar."""
    ids = torch.tensor([[5, 8, 0, 9, 2], [5, 9, 2, 1, 1], [5, 7, 0, 2, 1]])  # 0 is a token here, 1 is padding
    mask, logits = ids != 1, 2 * _random(3, 5, 10, seed=1)

    def ask(smoothing: float, logits: Tensor = logits, rows: slice = slice(None)) -> Tensor:
        return torch.as_tensor(attempt(student, logits[rows], ids[rows], mask[rows], smoothing)).float()

    def loss(labels: Tensor, at: Tensor = logits[:, :-1], smoothing: float = 0.0) -> Tensor:
        return caption_loss(at, labels, smoothing)

    labels = next_tokens(Text(ids, mask))
    plain, smooth = loss(labels), loss(labels, smoothing=0.1)
    got = ask(0.0)
    demand(got.ndim == 0, f"The loss must be one number, yours has shape {tuple(got.shape)}.")
    here = ids.masked_fill(~mask, IGNORE)
    demand(
        not any(torch.isclose(got, loss(x, logits)) for x in (ids, here)),
        "You predict at each position the token that the model has just read. Predict the next one.",
    )
    before = here[:, :-1]
    demand(
        not any(torch.isclose(got, loss(x, logits[:, 1:])) for x in (ids[:, :-1], before)),
        "You predict at each position the token *before* it: the logits at position t are about token t + 1.",
    )
    demand(
        not torch.isclose(got, loss(ids[:, 1:].masked_fill(~mask[:, :-1], IGNORE))),
        "You select with `mask[:, :-1]`, the tokens that are *read*, so the padding behind each closing token is "
        "predicted. Select the tokens that are *predicted*: `mask[:, 1:]`.",
    )
    without_0 = [x.masked_fill(ids[:, 1:] == 0, IGNORE) for x in (labels, ids[:, 1:])]
    demand(
        not any(torch.isclose(got, loss(x)) for x in without_0),
        "Yours leaves out the token with id 0 (`ignore_index=0`, or `ids != 0`). Here 0 is a token like any other: "
        "only `mask` tells what is padding.",
    )
    demand(
        not torch.isclose(got, loss(ids[:, 1:])),
        "Padding counts in yours. Where `mask` is False nothing is predicted.",
    )
    count = int((labels != IGNORE).sum())
    demand(
        not torch.isclose(got, plain * count / labels.numel()),
        "You divide by all positions, including padding; divide by the number of predicted tokens.",
    )
    demand(not torch.isclose(got, plain * count), "That is the sum. Take the mean over the predicted tokens.")
    no_stop = labels.masked_fill(labels == 2, IGNORE)
    demand(
        not torch.isclose(got, loss(no_stop)),
        "The closing token 2 is not predicted in yours: the model would never learn when to stop.",
    )
    per_text = torch.stack([loss(labels[i], logits[i, :-1]) for i in range(3)]).mean()
    demand(
        not torch.isclose(got, per_text),
        "You average each text first, then the texts: tokens of short captions weigh more. Average over all tokens.",
    )
    demand(
        torch.isclose(got, plain, atol=1e-5),
        f"Without smoothing the loss of these texts is {plain:.3f}, yours is {got:.3f}.",
    )
    got = ask(0.1)
    demand(
        not torch.isclose(got, plain),
        "Smoothing changes nothing in yours: a tenth of the target is spread over all tokens.",
    )
    chosen = logits[:, :-1].log_softmax(-1)[labels != IGNORE]  # (M, V)
    truth = torch.nn.functional.one_hot(labels[labels != IGNORE], 10)
    others = -((0.9 * truth + 0.1 / 9 * (1 - truth)) * chosen).sum(-1).mean()
    demand(
        not torch.isclose(got, others),
        "You spread the tenth over the *other* tokens only. As in the paper's code, all V tokens get an equal part.",
    )
    demand(torch.isclose(got, smooth, atol=1e-5), f"With smoothing .1 the loss is {smooth:.3f}, yours is {got:.3f}.")
    certain = 100.0 * torch.nn.functional.one_hot(torch.cat([labels.clamp(min=0), ids[:, :1]], dim=1), 10)
    demand(ask(0.0, certain) < 1e-3, "A model that is certain and right has a loss of 0 without smoothing.")
    for kind, other in (("float64", logits.double()), ("a transposed tensor", logits.mT.contiguous().mT)):
        demand(
            torch.isclose(ask(0.1, other), smooth, atol=1e-4), f"Right so far, but wrong for logits that are {kind}."
        )
    one = loss(labels[:1], logits[:1, :-1], 0.1)
    demand(torch.isclose(ask(0.1, rows=slice(1)), one, atol=1e-4), "Right so far, but wrong for a batch of one.")
    learned = logits.clone().requires_grad_()
    demand_gradients(ask(0.1, learned), loss(labels, learned[:, :-1], 0.1), logits=learned)
    print("ok: the next token, including the closing one, no padding, and smoothing over all tokens.")
