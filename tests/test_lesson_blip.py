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


def mask_of(real, later=lambda place: place <= place[:, None]):
    place = torch.arange(real.shape[1])
    return real[:, None, None, :] & later(place)


def mask_in_place(real):
    allowed = torch.ones(*real.shape, real.shape[1], dtype=torch.bool).tril_()
    allowed &= real[:, None, :]
    real[:] = False
    return allowed[:, None]


def mask_by_loops(real):
    allowed = torch.zeros(len(real), 1, real.shape[1], real.shape[1], dtype=torch.bool)
    for b in range(len(real)):
        for query in range(real.shape[1]):
            for key in range(query + 1):
                allowed[b, 0, query, key] = real[b, key]
    return allowed


def greedy(next_logits, start, stop, pad, longest, axis=-1, read=lambda ids: ids, until=torch.all, fill=True, extra=0):
    ids, ended = start, torch.zeros(len(start), dtype=torch.bool)
    while ids.shape[1] < longest + extra and not until(ended):
        new = next_logits(read(ids)).argmax(dim=axis)[: len(ids)]
        new = new.masked_fill(ended, pad) if fill else new
        ids, ended = torch.cat([ids, new[:, None]], dim=1), ended | (new == stop)
    return ids


def greedy_in_place(next_logits, start, stop, pad, longest):
    ids = torch.full((len(start), longest), pad)
    ids[:, : start.shape[1]] = start
    length, ended = start.shape[1], torch.zeros(len(start), dtype=torch.bool)
    start[:] = -1
    while length < longest and not ended.all():
        ids[~ended, length] = next_logits(ids[:, :length])[~ended].argmax(-1)
        ended |= ids[:, length] == stop
        length += 1
    return ids[:, :length]


def sampled(next_logits, start, stop, pad, longest):
    torch.manual_seed(0)
    return greedy(lambda ids: next_logits(ids).softmax(-1).clamp(max=0.2) + torch.rand(23), start, stop, pad, longest)


RIGHT = [
    (blip.check_causal_mask, mask_of),
    (blip.check_causal_mask, mask_in_place),
    (blip.check_causal_mask, mask_by_loops),
    (blip.check_greedy, greedy),
    (blip.check_greedy, greedy_in_place),
    (blip.check_nucleus, nucleus),
    (blip.check_nucleus, nucleus_in_place),
    (blip.check_caption_loss, loss_in_place),
    (blip.check_caption_loss, loss),
    (blip.check_caption_loss, loss_by_hand),
]


@pytest.mark.parametrize("check, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


def test_answers_may_be_of_another_type(capsys):
    blip.check_nucleus(lambda logits, p: nucleus(logits.double(), p).float())
    blip.check_caption_loss(lambda logits, *rest: loss(logits.double(), *rest))
    assert capsys.readouterr().out.count("ok:") == 2


def stub(*arguments):
    raise NotImplementedError("your turn")


WRONG = [
    (blip.check_causal_mask, stub, "Nothing written yet"),
    (blip.check_causal_mask, lambda real: mask_of(real).float(), "must be boolean"),
    (blip.check_causal_mask, lambda real: mask_of(real)[:, 0], "queries, keys"),
    (blip.check_causal_mask, lambda real: mask_of(real)[:1], "has shape"),
    (blip.check_causal_mask, lambda real: mask_of(real).mT, "Transposed"),
    (blip.check_causal_mask, lambda real: mask_of(real, lambda p: p >= p[:, None]), "a later one"),
    (blip.check_causal_mask, lambda real: mask_of(real, lambda p: p <= p[:, None] + 1), "a later one"),
    (blip.check_causal_mask, lambda real: mask_of(real, lambda p: p < p[:, None]), "attend to itself"),
    (blip.check_causal_mask, lambda real: mask_of(torch.ones_like(real)), "Padding is attended to"),
    (blip.check_causal_mask, lambda real: mask_of(real) & real[:, None, :, None], "rows\\* of padding"),
    (blip.check_causal_mask, lambda real: mask_of(real, lambda p: p == p[:, None]), "all of them"),
    (blip.check_greedy, stub, "Nothing written yet"),
    (blip.check_greedy, lambda *a: greedy(*a)[0], "return ids"),
    (blip.check_greedy, lambda f, start, *a: greedy(f, start, *a)[:, start.shape[1] :], "begin with `start`"),
    (blip.check_greedy, lambda *a: greedy(*a, fill=False), "goes on after its closing token"),
    (blip.check_greedy, lambda *a: greedy(*a, until=torch.any), "not all texts have ended"),
    (blip.check_greedy, lambda *a: greedy(*a, until=lambda ended: False), "all texts have ended"),
    (blip.check_greedy, lambda *a: greedy(*a, extra=1), "at most 6"),
    (blip.check_greedy, lambda *a: greedy(*a, read=lambda ids: ids[:, -1:]), "all\\* tokens"),
    (blip.check_greedy, sampled, "the argmax"),
    (blip.check_greedy, lambda f, *a: greedy(lambda ids: f(ids) + 0 * f(ids), *a), "you ask"),
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
]


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(check, answer, message):
    with pytest.raises(NotYet, match=message):
        check(answer)
