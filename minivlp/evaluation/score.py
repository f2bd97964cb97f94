"""A measured value with its confidence interval and the value of guessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """One measure of one model.

    `value` is the measure, `low` and `high` its 95 % bootstrap interval, `chance` the value of guessing without the
    image, `n` how many questions were asked. All but `n` are in the unit of the measure (a share in 0..1 or a rank).
    """

    value: float
    low: float
    high: float
    chance: float
    n: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        value, low, high, chance = (short(x) for x in (self.value, self.low, self.high, self.chance))
        return f"{value} [{low} .. {high}], chance {chance}, n = {self.n}"


class Scores(dict[str, Score]):
    """Scores by name: a dict that a notebook shows as a table."""

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=0)
        return "\n".join(f"{name:<{width}}  {score}" for name, score in self.items())

    def _repr_markdown_(self) -> str:
        return table(self)


def short(x: float) -> str:
    """A number for tables: two decimals, none from 10 on, and one significant digit below 0.01."""
    if x != 0 and abs(x) < 0.01:
        return f"{x:.1g}"
    return f"{x:.2f}" if abs(x) < 10 else f"{x:.0f}"


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    """The weighted mean of `values` (n,)."""
    return float(values @ weights / weights.sum())


def median(values: np.ndarray, weights: np.ndarray) -> float:
    """The weighted median of sorted `values` (n,); with equal weights it is numpy's."""
    reached = np.cumsum(weights)
    half = reached[-1] / 2
    below, above = np.searchsorted(reached, half, "left"), np.searchsorted(reached, half, "right")
    return float((values[below] + values[min(above, len(values) - 1)]) / 2)


def bootstrap(
    values: Sequence[float] | np.ndarray,
    chance: float,
    seed: int = 0,
    *,
    images: Sequence[int] | np.ndarray | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
    statistic: Callable[[np.ndarray, np.ndarray], float] = mean,
) -> Score:
    """The statistic of `values` (n,) with its 95 % percentile interval.

    Images are resampled, not rows: rows with the same number in `images` (n,) are drawn together, because five captions
    of one image are not independent. Without `images`, every row is an image of its own. `weights` (n,) are the rows'
    weights in `statistic(values, weights)`, which is `mean` or `median`. `n` of the result counts the rows.
    Source: Efron, "Bootstrap methods: another look at the jackknife" (1979).

    Raises ValueError if there is nothing to average or a value is not finite.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"Nothing to score: expected a list of numbers, got shape {values.shape}.")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"Value {bad} is {values[bad]}: the model's output is not finite; check its training loss.")
    images = np.arange(len(values)) if images is None else np.asarray(images)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    if not len(values) == len(images) == len(weights):
        raise ValueError(
            f"{len(values)} values, {len(images)} images, {len(weights)} weights: the numbers must be equal."
        )
    order = np.argsort(values, kind="stable")  # once, so that the median need not sort in every round
    values, images, weights = values[order], images[order], weights[order]
    distinct, group = np.unique(images, return_inverse=True)
    rng = np.random.default_rng(seed)
    rounds = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(len(distinct), size=len(distinct)), minlength=len(distinct))
        rounds.append(statistic(values, weights * times[group]))
    low, high = np.percentile(rounds, [2.5, 97.5])
    return Score(float(statistic(values, weights)), float(low), float(high), float(chance), len(values))


def bootstrap_counts(
    counts: np.ndarray, measure: Callable[[np.ndarray], float], chance: float, n: int | None = None
) -> Score:
    """`bootstrap` of a measure that is computed from counts over all images together, such as BLEU.

    counts: (images, ...). measure: counts of this shape -> value; the counts of an image that is drawn twice are
    doubled. n: how many questions were asked, if it is not the number of images.
    """
    shape = (-1, *[1] * (counts.ndim - 1))

    def statistic(rows: np.ndarray, times: np.ndarray) -> float:
        return measure(counts[rows.astype(int)] * times.reshape(shape))

    score = bootstrap(np.arange(len(counts)), chance, statistic=statistic)
    return score if n is None else replace(score, n=n)


def table(scores: Mapping[str, Score]) -> str:
    """The scores as a markdown table, with chance next to each value."""
    lines = ["| measure | value | 95 % interval | chance | n |", "|---|---:|---:|---:|---:|"]
    for name, s in scores.items():
        lines.append(f"| {name} | {short(s.value)} | {short(s.low)} .. {short(s.high)} | {short(s.chance)} | {s.n} |")
    return "\n".join(lines)


def spread(runs: Sequence[Mapping[str, Score]]) -> dict[str, str]:
    """The range over seeds, by measure: "0.79 .. 0.83 over 3 seeds". `runs` holds one dict of scores per seed.

    Raises ValueError if there is no run, or if the runs have different measures.
    """
    if not runs:
        raise ValueError("No runs to compare: give one dict of scores per seed.")
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError("The runs have different measures; evaluate every seed in the same way.")
    seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
    found = {name: [run[name].value for run in runs] for name in runs[0]}
    return {name: f"{short(min(v))} .. {short(max(v))} over {seeds}" for name, v in found.items()}
