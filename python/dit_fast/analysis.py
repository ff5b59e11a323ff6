"""What scores are good for, in numbers: finding corrupted labels, agreeing with retraining."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def suspicion(scores: Any) -> Array:
    """How much each sample speaks for being inspected [N]: minus its score on a loss, so the most harmful come first."""
    return -np.asarray(scores, dtype=float)


def found_fraction(ranking: Any, corrupted: Any, inspected: float) -> float:
    """The share of the corrupted samples among the `inspected` share of all samples with the largest `ranking` [N].

    corrupted: bool [N]. Equal values are taken in the order of the samples. Random ranking finds `inspected` on average.
    """
    ranking, corrupted = np.asarray(ranking, dtype=float), np.asarray(corrupted, dtype=bool)
    if ranking.shape != corrupted.shape or ranking.ndim != 1:
        raise ValueError(f"ranking {ranking.shape} and corrupted {corrupted.shape} must both be [N]")
    if not corrupted.any():
        raise ValueError("no sample is marked as corrupted: there is nothing to find")
    count = round(inspected * len(ranking))
    leading = np.argsort(-ranking, kind="stable")[:count]
    return float(corrupted[leading].sum() / corrupted.sum())


def detection_curve(ranking: Any, corrupted: Any) -> tuple[Array, Array]:
    """(inspected, found): shares of samples inspected in order of `ranking` [N] and of the corrupted found, from 0."""
    corrupted = np.asarray(corrupted, dtype=bool)
    order = np.argsort(-np.asarray(ranking, dtype=float), kind="stable")
    found = np.concatenate([[0.0], np.cumsum(corrupted[order]) / max(corrupted.sum(), 1)])
    return np.linspace(0.0, 1.0, len(found)), found


def agreement(scores: Any, truth: Any) -> dict[str, float]:
    """Pearson and Spearman correlation of scores [N] with true changes [N]; NaN where either is constant (needs scipy)."""
    from scipy import stats

    a, b = np.asarray(scores, dtype=float), np.asarray(truth, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"scores {a.shape} and truth {b.shape} must both be [N] with at least two samples")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"pearson": float("nan"), "spearman": float("nan")}
    return {"pearson": float(stats.pearsonr(a, b)[0]), "spearman": float(stats.spearmanr(a, b)[0])}
