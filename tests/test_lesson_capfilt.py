"""Lesson 06's checks: the solution passes, typical wrong answers fail with the message meant for them."""

import pytest
import torch

from minivlp.lessons import capfilt
from minivlp.lessons.check import NotYet


def quality(scores, clean, threshold):
    kept = scores >= threshold
    return (kept & clean).sum() / max(1, kept.sum()), (kept & clean).sum() / clean.sum()


def quality_in_place(scores, clean, threshold):
    scores -= threshold
    found = quality(scores, clean, 0)
    clean[:] = False
    return found


def auc(scores, clean, tie=0.5, over=None):
    good, bad = scores[clean][:, None], scores[~clean]
    won = ((good > bad) + tie * (good == bad)).sum()
    return float(won / (good.numel() * bad.numel() if over is None else over(scores)))


def auc_by_ranks(scores, clean):
    """From the mean ranks of the clean captions."""
    ranks = (scores[:, None] > scores).sum(1) + 0.5 * ((scores[:, None] == scores).sum(1) + 1)
    good, bad = clean.sum(), (~clean).sum()
    return (ranks[clean].sum() - good * (good + 1) / 2) / (good * bad)


def auc_in_place(scores, clean):
    scores *= 10
    return auc(scores, clean)


def one_round(web, write, score, threshold, sources=("web", "new"), keep=None, once=True, empty=False, turned=False):
    kept = {}
    for row in range(len(web)):
        texts = (web.captions(row) if "web" in sources else []) + ([write(row)] if "new" in sources else [])
        for text in texts[::-1] if turned else texts:
            fits = score(row, text) >= threshold if keep is None else keep(score(row, text), threshold)
            if fits and (text or empty) and not (once and text in kept.get(row, [])):
                kept.setdefault(row, []).append(text)
    return kept


def writes_twice(web, write, score, threshold):
    [write(row) for row in range(len(web))]
    return one_round(web, write, score, threshold)


def writes_always(web, write, *rest, **options):
    """Asks for new captions and leaves them out."""
    [write(row) for row in range(len(web))]
    return one_round(web, write, *rest, sources=("web",))


def best_of_each(web, write, score, threshold):
    kept = one_round(web, write, score, threshold)
    return {row: [max(texts, key=lambda text: score(row, text))] for row, texts in kept.items()}


def with_all_rows(web, *rest):
    """Rows without captions may be there, with an empty list."""
    return {row: [] for row in range(len(web))} | one_round(web, *rest)


remembered = {}


def remembers(web, write, score, threshold):
    for row, texts in one_round(web, write, score, threshold).items():
        remembered.setdefault(row, [])
        remembered[row] += [text for text in texts if text not in remembered[row]]
    return {row: list(texts) for row, texts in remembered.items()}


def stub(*arguments):
    raise NotImplementedError("your turn")


RIGHT = [
    (capfilt.check_filter, quality),
    (capfilt.check_filter, quality_in_place),
    (capfilt.check_auc, auc),
    (capfilt.check_auc, auc_by_ranks),
    (capfilt.check_auc, auc_in_place),
    (capfilt.check_round, one_round),
    (capfilt.check_round, with_all_rows),
]


@pytest.mark.parametrize("check, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


def test_answers_may_be_of_another_type(capsys):
    capfilt.check_filter(lambda *given: [float(x) for x in quality(*given)])
    capfilt.check_auc(lambda *given: torch.tensor(auc(*given)))
    assert capsys.readouterr().out.count("ok:") == 2


WRONG = [
    (capfilt.check_filter, stub, "Nothing written yet"),
    (capfilt.check_filter, lambda s, c, t: quality(s, c, t)[0], "two numbers"),
    (capfilt.check_filter, lambda s, c, t: quality(s, c, t)[::-1], "swapped"),
    (capfilt.check_filter, lambda s, c, t: tuple(100 * x for x in quality(s, c, t)), "percent"),
    (capfilt.check_filter, lambda s, c, t: (quality(s, c, t)[0], ((s >= t) & c).float().mean()), "not of all"),
    (capfilt.check_filter, lambda s, c, t: (quality(s, c, t)[0], (s >= t).float().mean()), "share that is kept"),
    (capfilt.check_filter, lambda s, c, t: (((s >= t) == c).float().mean(), quality(s, c, t)[1]), "accuracy"),
    (capfilt.check_filter, lambda s, c, t: quality(-s, ~c, -t), "removed captions"),
    (capfilt.check_filter, lambda s, c, t: (0.5, 0.5), "0.67 and 0.33"),
    (capfilt.check_filter, lambda s, c, t: quality(s, c, t + 1e-6), "exactly the threshold"),
    (capfilt.check_filter, lambda s, c, t: (((s >= t) & c).sum() / (s >= t).sum(), quality(s, c, t)[1]), "NaN"),
    (capfilt.check_filter, lambda s, c, t: quality(s, c, t) if (s >= t).any() else (1.0, 0.0), "return 0 for both"),
    (capfilt.check_filter, lambda s, c, t: quality(s, c, max(t, 0.15)), "recall is 1"),
    (capfilt.check_auc, stub, "Nothing written yet"),
    (capfilt.check_auc, lambda s, c: auc(-s, c), "the other way round"),
    (capfilt.check_auc, lambda s, c: auc(s, c, over=lambda s: 1), "number of pairs that are in order"),
    (capfilt.check_auc, lambda s, c: auc(s, c, tie=0), "a tie counts half"),
    (capfilt.check_auc, lambda s, c: auc(s, c, tie=1), "a tie counts half"),
    (capfilt.check_auc, lambda s, c: ((s >= 0.5) == c).float().mean(), "the area is 0.5, yours"),
    (capfilt.check_auc, lambda s, c: auc(s, c, over=lambda s: len(s) ** 2), "the area is 1, yours"),
    (capfilt.check_auc, lambda s, c: auc(s, c) if len(s) < 9 else auc(s[:30], c[:30]), "Here the area"),
    (capfilt.check_auc, lambda s, c: float("nan"), "NaN"),
    (capfilt.check_round, stub, "Nothing written yet"),
    (capfilt.check_round, lambda *a: list(one_round(*a).items()), "Return a dict"),
    (capfilt.check_round, lambda *a: {r: t[0] for r, t in one_round(*a).items()}, "lists of captions"),
    (capfilt.check_round, writes_twice, "one caption for each image"),
    (capfilt.check_round, lambda *a: one_round(*a, sources=("web",)), "one caption for each image"),
    (capfilt.check_round, lambda *a: one_round(*a, keep=lambda *_: True), "Nothing is removed"),
    (capfilt.check_round, writes_always, "new captions are missing"),
    (capfilt.check_round, lambda *a: one_round(*a, sources=("new",)), "web captions are missing"),
    (capfilt.check_round, lambda *a: one_round(*a, empty=True), "empty caption"),
    (capfilt.check_round, lambda *a: one_round(*a, once=False), "twice"),
    (capfilt.check_round, lambda *a: one_round(*a, keep=lambda s, t: s > t), "exactly the threshold"),
    (capfilt.check_round, lambda *a: one_round(*a, keep=lambda s, t: s < t), "for image"),
    (capfilt.check_round, best_of_each, "for image"),
    (capfilt.check_round, lambda *a: one_round(*a, turned=True), "another order"),
    (capfilt.check_round, lambda *a: one_round(*a[:3], 0.5), "Nothing reaches the threshold"),
    (capfilt.check_round, remembers, "Nothing reaches the threshold"),
]


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(check, answer, message):
    with pytest.raises(NotYet, match=message):
        check(answer)
