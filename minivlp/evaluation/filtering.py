"""Does a score tell true captions from false ones? Asked where the truth is known, as with `data.noise`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minivlp.evaluation.score import Scores, bootstrap


def filter_quality(scores: Sequence[float], is_clean: Sequence[bool], threshold: float = 0.5) -> Scores:
    """How well a score tells captions that are true (`is_clean`) from such that are not.

    AUC: how often a clean caption scores above a noisy one, a tie counting half. Precision: how many of those kept
    (score at least `threshold`) are clean; 0 if none is kept. Recall: how many of the clean are kept. `kept`: how many
    of all. Chance is a filter that keeps as many, blindly. Raises ValueError where all captions are of one sort.
    """
    scores, clean = np.asarray(scores, dtype=float), np.asarray(is_clean, dtype=bool)
    if clean.all() or not clean.any():
        raise ValueError("All captions are of one sort: a filter needs clean and noisy ones to be judged by.")
    kept, place = scores >= threshold, np.unique(scores, return_inverse=True)[1]

    def auc(rows: np.ndarray, times: np.ndarray) -> float:
        rows = rows.astype(int)
        noisy = np.bincount(place[rows], times * ~clean[rows])  # by score, from the lowest
        good = np.bincount(place[rows], times * clean[rows])
        pairs = noisy.sum() * good.sum()
        return float(good @ (noisy.cumsum() - noisy / 2) / pairs) if pairs else 0.5

    def share(of: np.ndarray, among: np.ndarray) -> Callable[[np.ndarray, np.ndarray], float]:
        def statistic(rows: np.ndarray, times: np.ndarray) -> float:
            rows = rows.astype(int)
            return float(times @ (of & among)[rows] / max(1, times @ among[rows]))

        return statistic

    every = np.ones_like(clean)
    measures = {
        "AUC": (auc, 0.5),
        "precision": (share(clean, kept), clean.mean()),
        "recall": (share(kept, clean), kept.mean()),
        "kept": (share(kept, every), kept.mean()),
    }
    return Scores({n: bootstrap(np.arange(len(scores)), chance, statistic=m) for n, (m, chance) in measures.items()})


def roc(scores: Sequence[float], is_clean: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """The filter's whole choice: how many of the noisy, and how many of the clean, are kept at each threshold.

    From the strictest, which keeps nothing, to the one that keeps all; equal scores fall together.
    """
    scores, clean = np.asarray(scores, dtype=float), np.asarray(is_clean, dtype=bool)
    thresholds = np.unique(scores)[::-1]
    kept = [scores >= threshold for threshold in thresholds]
    noisy_kept, clean_kept = ([0.0, *((k & sort).sum() / sort.sum() for k in kept)] for sort in (~clean, clean))
    return np.array(noisy_kept), np.array(clean_kept)
