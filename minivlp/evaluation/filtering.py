"""How well a score separates true captions from false ones, where the truth is known (`data.noise`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minivlp.evaluation.score import Scores, bootstrap


def filter_quality(scores: Sequence[float], is_clean: Sequence[bool], threshold: float = 0.5) -> Scores:
    """How well a score separates the captions that are true (`is_clean`) from the others.

    A caption is kept if its score is at least `threshold`. AUC: how often a clean caption scores above a noisy one; a
    tie counts half. Precision: the share of clean captions among those kept; 0 if none is kept. Recall: the share of
    the clean captions that is kept. `kept`: the share of all captions that is kept. Chance is a filter that keeps as
    many captions at random. Raises ValueError if all captions are clean, or none.
    """
    scores, clean = np.asarray(scores, dtype=float), np.asarray(is_clean, dtype=bool)
    if clean.all() or not clean.any():
        raise ValueError("All captions are clean, or none is: the measure needs both.")
    kept, level = scores >= threshold, np.unique(scores, return_inverse=True)[1]

    def auc(rows: np.ndarray, times: np.ndarray) -> float:
        rows = rows.astype(int)
        noisy = np.bincount(level[rows], times * ~clean[rows])  # by score, from the lowest
        good = np.bincount(level[rows], times * clean[rows])
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
    """The ROC curve: the shares of the noisy and of the clean captions that are kept at each threshold, (T,) each.

    The thresholds go from the highest, which keeps nothing, to the lowest, which keeps everything. Captions of equal
    score are kept together.
    """
    scores, clean = np.asarray(scores, dtype=float), np.asarray(is_clean, dtype=bool)
    thresholds = np.unique(scores)[::-1]
    kept = [scores >= threshold for threshold in thresholds]
    noisy_kept, clean_kept = ([0.0, *((k & of).sum() / of.sum() for k in kept)] for of in (~clean, clean))
    return np.array(noisy_kept), np.array(clean_kept)
