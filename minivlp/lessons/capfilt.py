"""Checks of lesson 06's exercises: one round of CapFilt, precision and recall, and the area under the curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minivlp.evaluation.filtering import filter_quality
from minivlp.lessons.check import attempt, attempt_with, demand
from minivlp.training.capfilt import candidates, judged, merge


def check_filter(student: Callable[[Tensor, Tensor, float], tuple[float, float]]) -> None:
    """Exercise 2: `student(scores, is_clean, threshold)`, (N,), (N,) bool -> precision and recall of what is kept."""
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


def check_auc(student: Callable[[Tensor, Tensor], float]) -> None:
    """Exercise 3: `student(scores, is_clean)`, (N,), (N,) bool -> the area under the ROC curve."""

    def ask(scores: Tensor, clean: Tensor) -> float:
        got = float(attempt(student, scores, clean))
        demand(got == got, "Your area is NaN.")
        return got

    def right(scores: Tensor, clean: Tensor) -> float:
        return filter_quality(scores.tolist(), clean.tolist())["AUC"].value

    perfect = torch.tensor([0.9, 0.8, 0.2, 0.1]), torch.tensor([True, True, False, False])
    got = ask(*perfect)
    demand(got != 0.0, "Every true caption scores above every false one, and yours is 0: compare the other way round.")
    demand(got != 4.0, "That is the number of pairs that are in order. Divide by the number of all pairs.")
    demand(got == 1.0, f"Every true caption scores above every false one: the area is 1, yours is {got:.3f}.")
    ties = torch.full((6,), 0.5), torch.tensor([True, False, True, False, False, False])
    got = ask(*ties)
    demand(got not in (0.0, 1.0), f"All scores are equal: a tie counts half, so the area is 0.5; yours is {got:.1f}.")
    demand(got == 0.5, f"All scores are equal: the area is 0.5, yours is {got:.3f}.")
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(60, generator=generator) * 8).round() / 8  # with ties
    clean = torch.rand(60, generator=generator) < 0.6 * scores + 0.2
    wanted, got = right(scores, clean), ask(scores, clean)
    all_pairs = wanted * int(clean.sum()) * int((~clean).sum()) / len(scores) ** 2
    demand(
        abs(got - all_pairs) > 1e-6,
        "You divide by all pairs of captions. Only pairs of a true and a false caption are compared.",
    )
    share = float(((scores >= 0.5) == clean).float().mean())
    demand(abs(got - share) > 1e-6, "That is the accuracy at one half. The area needs no threshold: compare in pairs.")
    demand(abs(got - wanted) < 1e-4, f"Here the area is {wanted:.4f}, yours is {got:.4f}.")
    many = scores[::2].double(), clean[::2]
    demand(abs(ask(*many) - right(*many)) < 1e-4, "Right so far, but wrong for float64 scores with strides.")
    print("ok: how often a true caption scores above a false one, ties counted half.")


class _Web:
    """Captions of a few images, as `NoisyCaptions` has them."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def captions(self, row: int) -> list[str]:
        return list(self.texts[row])


WEB = [["a red heart", "there is a red heart"], ["IMG_2034.jpg"], ["a dog"], ["two bees", "two bees"], ["a blue car"]]
NEW = ["a red heart", "a cup", "", "three bees", "a car"]
FITS = {
    "a red heart": 0.9,
    "there is a red heart": 0.5,
    "a cup": 0.7,
    "a dog": 0.2,
    "two bees": 0.8,
    "three bees": 0.6,
    "a blue car": 0.5,
}


def check_round(student: Callable[..., dict[int, list[str]]]) -> None:
    """Exercise 1: `student(web, write, score, threshold)` -> the captions that are kept, by row, as `CapFilt` has them.

    `web.captions(row)` and `len(web)`; `write(row)` is the new caption of an image, `score(row, caption)` how well a
    caption fits it.
    """
    written: list[int] = []

    def write(row: int) -> str:
        written.append(row)
        return NEW[row]

    def score(row: int, caption: str) -> float:
        return FITS.get(caption, 0.9 if caption == "" else 0.1)

    def ask(threshold: float, texts: Sequence[Sequence[str]] = WEB) -> dict[int, list[str]]:
        written.clear()
        got = attempt_with(student, _Web(texts), write, score, threshold)
        demand(isinstance(got, dict), "Return a dict: row -> list of the captions that are kept.")
        demand(
            all(isinstance(kept, list) for kept in got.values()),
            "The values of the dict are lists of captions.",
        )
        demand(
            sorted(written) == list(range(len(texts))),
            f"The captioner writes one caption for each image; yours wrote for the images {sorted(written)}.",
        )
        return {row: kept for row, kept in got.items() if kept}

    def right(threshold: float, **change: Any) -> dict[int, list[str]]:
        lines = change.get("lines") or candidates(_Web(WEB), NEW)
        lines = judged(lines, [score(line["row"], line["caption"]) for line in lines], threshold)
        kept = [line for line in lines if line["kept"] or change.get("unfiltered")]
        return {row: texts for row, texts in merge(kept).items() if texts}

    got, wanted = ask(0.5), right(0.5)
    both = candidates(_Web(WEB), NEW)
    demand(got != right(0.5, unfiltered=True), "Nothing is removed in yours: keep what scores at least the threshold.")
    demand(
        got != right(0.5, lines=[line for line in both if line["source"] == "web"]),
        "The new captions are missing: the filter judges old and new ones alike, and both kinds may stay.",
    )
    demand(
        got != right(0.5, lines=[line for line in both if line["source"] == "synthetic"]),
        "The web captions are missing: those that fit stay, next to the new ones.",
    )
    demand(
        "" not in sum(got.values(), []),
        "An empty caption is kept. A captioner may write nothing: such a text teaches nothing.",
    )
    demand(
        all(len(set(kept)) == len(kept) for kept in got.values()),
        "A caption is there twice for one image. Keep each only once, or it counts double in training.",
    )
    demand(got != right(0.5 + 1e-9), "A caption that scores exactly the threshold is kept.")
    other = {row: kept for row, kept in got.items() if sorted(kept) != sorted(wanted.get(row, []))}
    demand(
        not other,
        f"Threshold .5: for image {min(other, default=0)} {wanted.get(min(other, default=0), [])} are kept, "
        f"yours are {other.get(min(other, default=0))}.",
    )
    demand(got.keys() == wanted.keys(), f"Captions are kept for the images {sorted(wanted)}, yours for {sorted(got)}.")
    demand(got == wanted, "The same captions, but in another order: the web captions of an image, then the new one.")
    demand(ask(2.0) == {}, "Nothing reaches the threshold: no caption is kept, and no row has captions.")
    demand(ask(0.5) == wanted, "The second call gives another result: begin each call with an empty dict.")
    demand(ask(0.5, WEB[:1]) == {0: wanted[0]}, "Right so far, but wrong for a single image.")
    print("ok: one new caption per image, what fits is kept, each caption once: a round of CapFilt.")
