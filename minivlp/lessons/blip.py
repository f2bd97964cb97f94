"""Checks of lesson 05's exercises. One certain token, several texts at once, padding, and filters that keep nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minivlp.data.batch import Text
from minivlp.layers.generation import nucleus
from minivlp.lessons.check import attempt, demand, demand_gradients
from minivlp.objectives.captioning import caption_loss, next_tokens
from minivlp.objectives.masking import IGNORE


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_nucleus(student: Callable[[Tensor, float], Tensor]) -> None:
    """Exercise 1: `student(logits, p)`, (B, V) -> the logits, -inf except for the most likely tokens that reach p."""
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


def check_filter(student: Callable[[Tensor, Tensor, float], tuple[float, float]]) -> None:
    """Exercise 3: `student(scores, is_clean, threshold)`, (N,), (N,) bool -> precision and recall of what is kept."""
    scores = torch.tensor([0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1])
    clean = torch.tensor([True, False, True, True, True, True, True, False])

    def ask(threshold: float, scores: Tensor = scores, clean: Tensor = clean) -> tuple[float, float]:
        answer = attempt(student, scores, clean, threshold)
        demand(isinstance(answer, tuple | list) and len(answer) == 2, "Return two numbers: precision, recall.")
        return float(answer[0]), float(answer[1])

    def near(*wanted: float) -> bool:
        return all(abs(a - b) < 1e-4 for a, b in zip(got, wanted, strict=True))

    got = ask(0.6)  # three are kept, two of them clean; six are clean
    demand(not near(2 / 6, 2 / 3), "Precision and recall are swapped.")
    demand(not near(200 / 3, 200 / 6), "Return shares between 0 and 1, not percent.")
    demand(not near(2 / 3, 2 / 8), "Recall is the share of the *clean* captions that are kept, not of all of them.")
    demand(
        not near(2 / 3, 3 / 8),
        "Your second number is the share that is kept. Recall is the share of the clean ones that are kept.",
    )
    demand(
        not near(3 / 8, 2 / 6),
        "Your first number is accuracy, or the share that is kept. Precision is the share of the kept that are clean.",
    )
    demand(
        not near(1 / 5, 1 / 2),
        "You evaluate the removed captions. Precision and recall are about the kept, clean ones.",
    )
    demand(
        near(2 / 3, 2 / 6),
        "Of 3 kept captions 2 are clean, of 6 clean ones 2 are kept: 0.67 and 0.33, not "
        f"{got[0]:.2f} and {got[1]:.2f}.",
    )
    got = ask(0.5)
    demand(near(3 / 4, 3 / 6), "A caption that scores exactly the threshold is kept.")
    got = ask(0.95)
    demand(got[0] == got[0], "Nothing is kept, and your precision is NaN, 0 / 0. Return 0.")
    demand(near(0, 0), "If nothing is kept, return 0 for both.")
    got = ask(0.0)
    demand(near(6 / 8, 1), "If all captions are kept, precision is the share of clean captions, and recall is 1.")
    got = ask(0.5, scores[:1].double(), clean[:1])
    demand(near(1, 1), "Right so far, but wrong for a single caption, which is clean and kept: 1 and 1.")
    print("ok: precision of the kept captions, recall of the clean ones, and no division by zero.")
