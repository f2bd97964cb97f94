"""Lesson 05's checks: the solution passes, typical wrong answers fail with the message meant for them."""

import pytest
import torch
import torch.nn.functional as F

from minivlp.lessons import blip
from minivlp.lessons.check import NotYet


def nucleus(logits, p, keep=lambda reached, own, p: reached - own < p, descending=True, outside=-torch.inf):
    probabilities, order = logits.softmax(-1).sort(-1, descending=descending)
    kept = keep(probabilities.cumsum(-1), probabilities, p)
    inside = torch.zeros_like(kept).scatter(-1, order, kept)
    return torch.where(inside, logits, outside)


def nucleus_in_order(logits, p):
    ordered = logits.sort(-1, descending=True).values
    probabilities = ordered.softmax(-1)
    return torch.where(probabilities.cumsum(-1) - probabilities < p, ordered, -torch.inf)


def top_two(logits, p):
    return torch.where(logits >= logits.topk(2).values[:, -1:], logits, -torch.inf)


def one_more(logits, p):
    return nucleus(logits, p, lambda reached, own, p: F.pad(reached - own < p, (1, -1), value=True))


def of_the_first_row(logits, p):
    """Right for one row; the others get its nucleus."""
    inside = nucleus(logits, p).isfinite()
    if len(logits) > 1:
        sizes = inside.sum(1, keepdim=True)
        inside = torch.where(sizes > 3, torch.roll(inside, 1, 1), inside)
    return torch.where(inside, logits, -torch.inf)


def never_alone(logits, p):
    """Right except where one token reaches p by itself."""
    return nucleus(logits, p, lambda reached, own, p: (reached - own < p) & (own < 0.9))


def loss(logits, ids, mask, smoothing, at=slice(None, -1), of=slice(1, None), reduction="mean", pad=False):
    labels = ids if pad else ids.masked_fill(~mask, -100)
    return F.cross_entropy(logits[:, at].flatten(0, 1), labels[:, of].flatten(), label_smoothing=smoothing,
                           reduction=reduction)  # fmt: skip


def loss_by_hand(logits, ids, mask, smoothing, over=1.0, text_first=False, stop=True):
    asked = mask[:, 1:] & ((ids[:, 1:] != 2) | stop)
    words = logits.shape[-1]
    truth = F.one_hot(ids[:, 1:], words)
    target = (1 - smoothing) * truth + smoothing * ((1 - truth) / (words - 1) if over == "others" else 1 / words)
    cost = -(target * logits[:, :-1].log_softmax(-1)).sum(-1) * asked
    if text_first:
        return (cost.sum(1) / asked.sum(1)).mean()
    return cost.sum() / (cost.numel() if over == "all positions" else asked.sum())


def quality(scores, clean, threshold):
    kept = scores >= threshold
    return (kept & clean).sum() / max(1, kept.sum()), (kept & clean).sum() / clean.sum()


def nucleus_in_place(logits, p):
    outside = nucleus(logits, p).isinf()
    logits[outside] = -torch.inf
    return logits


def loss_in_place(logits, ids, mask, smoothing):
    ids[~mask] = -100
    logits *= 1
    return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], label_smoothing=smoothing)


def loss_of_positions(logits, ids, mask, smoothing, asked):
    """Where `asked` (B, L-1) is True, the next token is predicted."""
    return F.cross_entropy(logits[:, :-1][asked], ids[:, 1:][asked], label_smoothing=smoothing)


def quality_in_place(scores, clean, threshold):
    scores -= threshold
    found = quality(scores, clean, 0)
    clean[:] = False
    return found


RIGHT = [
    (blip.check_nucleus, nucleus),
    (blip.check_nucleus, nucleus_in_place),
    (blip.check_caption_loss, loss_in_place),
    (blip.check_filter, quality_in_place),
    (blip.check_caption_loss, loss),
    (blip.check_caption_loss, loss_by_hand),
    (blip.check_filter, quality),
]


@pytest.mark.parametrize("check, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


def test_answers_may_be_of_another_type(capsys):
    blip.check_nucleus(lambda logits, p: nucleus(logits.double(), p).float())
    blip.check_caption_loss(lambda logits, *rest: loss(logits.double(), *rest))
    blip.check_filter(lambda *given: [float(x) for x in quality(*given)])
    assert capsys.readouterr().out.count("ok:") == 3


def stub(*arguments):
    raise NotImplementedError("your turn")


WRONG = [
    (blip.check_nucleus, stub, "Nothing written yet"),
    (blip.check_nucleus, lambda logits, p: None, "`return` missing"),
    (blip.check_nucleus, lambda logits, p: nucleus(logits, p)[0], "As many logits"),
    (blip.check_nucleus, lambda logits, p: nucleus(logits, p).softmax(-1), "These are probabilities"),
    (blip.check_nucleus, lambda logits, p: nucleus(logits, p, outside=0.0), "only -inf"),
    (blip.check_nucleus, nucleus_in_order, "sorted by probability"),
    (blip.check_nucleus, lambda logits, p: nucleus(logits, p, lambda r, o, p: r <= p), "crosses p stays in"),
    (
        blip.check_nucleus,
        lambda logits, p: torch.where(logits.softmax(-1) >= p, logits, -torch.inf),
        "No token is left",
    ),
    (blip.check_nucleus, lambda logits, p: nucleus(logits, p, descending=False), "least"),
    (blip.check_nucleus, one_more, "sum \\*before\\* each token"),
    (blip.check_nucleus, lambda logits, p: nucleus(logits, 0.95), "tokens 1 and 3"),
    (blip.check_nucleus, lambda logits, p: nucleus(logits, p) - 1, "must not change"),
    (blip.check_nucleus, never_alone, "always stays"),
    (blip.check_nucleus, top_two, "top-k sampling"),
    (blip.check_nucleus, of_the_first_row, "its own nucleus"),
    (blip.check_caption_loss, stub, "Nothing written yet"),
    (blip.check_caption_loss, lambda *a: loss(*a, reduction="none"), "one number"),
    (blip.check_caption_loss, lambda *a: loss(*a, at=slice(None), of=slice(None)), "just read"),
    (blip.check_caption_loss, lambda *a: loss(*a, at=slice(None), of=slice(None), pad=True), "just read"),
    (blip.check_caption_loss, lambda *a: loss(*a, at=slice(1, None), of=slice(None, -1)), "before"),
    (blip.check_caption_loss, lambda *a: loss(*a, pad=True), "Padding counts"),
    (blip.check_caption_loss, lambda *a: loss_by_hand(*a, over="all positions"), "divide by all positions"),
    (blip.check_caption_loss, lambda *a: loss(*a, reduction="sum"), "That is the sum"),
    (blip.check_caption_loss, lambda *a: loss_by_hand(*a, stop=False), "closing token"),
    (blip.check_caption_loss, lambda *a: loss_by_hand(*a, text_first=True), "average each text first"),
    (blip.check_caption_loss, lambda *a: 2 * loss(*a), "Without smoothing"),
    (blip.check_caption_loss, lambda logits, ids, mask, s: loss(logits, ids, mask, 0.0), "changes nothing"),
    (blip.check_caption_loss, lambda *a: loss_by_hand(*a, over="others"), "other"),
    (blip.check_caption_loss, lambda logits, ids, mask, s: loss(logits, ids, mask, 2 * s), "With smoothing"),
    (blip.check_nucleus, lambda logits, p: nucleus(logits, p)[:, :2], "As many logits"),
    (
        blip.check_caption_loss,
        lambda logits, ids, mask, s: loss_of_positions(logits, ids, mask, s, mask[:, :-1]),
        r"`mask\[:, :-1\]`, the tokens that are",
    ),
    (
        blip.check_caption_loss,
        lambda logits, ids, mask, s: loss_of_positions(logits, ids, mask, s, mask[:, 1:] & (ids[:, 1:] != 0)),
        "token with id 0",
    ),
    (
        blip.check_caption_loss,
        lambda logits, ids, mask, s: loss_of_positions(logits, ids, mask, s, ids[:, 1:] != 0),
        "token with id 0",
    ),
    (blip.check_caption_loss, lambda logits, *rest: loss(logits.detach(), *rest), "has no gradient"),
    (blip.check_caption_loss, lambda *a: loss(*a).item(), "has no gradient"),
    (blip.check_caption_loss, lambda *a: loss(*a).detach() + 0 * a[0].sum(), "gives `logits` no gradient"),
    (blip.check_filter, stub, "Nothing written yet"),
    (blip.check_filter, lambda s, c, t: quality(s, c, t)[0], "two numbers"),
    (blip.check_filter, lambda s, c, t: quality(s, c, t)[::-1], "swapped"),
    (blip.check_filter, lambda s, c, t: tuple(100 * x for x in quality(s, c, t)), "percent"),
    (blip.check_filter, lambda s, c, t: (quality(s, c, t)[0], ((s >= t) & c).float().mean()), "not of all"),
    (blip.check_filter, lambda s, c, t: (quality(s, c, t)[0], (s >= t).float().mean()), "share that is kept"),
    (blip.check_filter, lambda s, c, t: (((s >= t) == c).float().mean(), quality(s, c, t)[1]), "accuracy"),
    (blip.check_filter, lambda s, c, t: quality(-s, ~c, -t), "removed captions"),
    (blip.check_filter, lambda s, c, t: (0.5, 0.5), "0.67 and 0.33"),
    (blip.check_filter, lambda s, c, t: quality(s, c, t + 1e-6), "exactly the threshold"),
    (blip.check_filter, lambda s, c, t: (((s >= t) & c).sum() / (s >= t).sum(), quality(s, c, t)[1]), "NaN"),
    (blip.check_filter, lambda s, c, t: quality(s, c, t) if (s >= t).any() else (1.0, 0.0), "return 0 for both"),
    (blip.check_filter, lambda s, c, t: quality(s, c, max(t, 0.15)), "recall is 1"),
]


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(check, answer, message):
    with pytest.raises(NotYet, match=message):
        check(answer)
