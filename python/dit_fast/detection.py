"""Finding corrupted samples: how many a ranking finds for how many that are inspected."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_fast.result import Influence

Array = npt.NDArray[Any]

RANDOM = "random (expected)"


def suspicion(scores: Any, window: int | str = -1, query: int | str = 0) -> Array:
    """How much each sample speaks for being inspected [N]: minus its score on a loss, so the most harmful come first.

    scores: an array [N], or an Influence, of which `window` and `query` are taken. Never visited samples score 0.
    Not for self-influence, where the largest are the suspects: rank by those scores themselves.
    """
    if isinstance(scores, Influence):
        scores = scores.scores[scores.window_index(window), scores.query_index(query)]
    return -np.asarray(scores, dtype=float)


def found_fraction(ranking: Any, corrupted: Any, inspected: float) -> float:
    """The share of the corrupted samples among the `inspected` share of all samples with the largest `ranking` [N].

    corrupted: bool [N]. `inspected` of N is rounded to whole samples. Equal values: what is found on average over their
    orders. Random ranking finds `inspected` on average. Errors: those of `detection_curve`, and ValueError where no sample
    is corrupted.
    """
    if not 0 <= inspected <= 1:
        raise ValueError(f"inspected must be a share between 0 and 1, got {inspected!r}")
    _, found = _checked_curve(ranking, corrupted)
    return float(found[round(inspected * (len(found) - 1))])


def detection_curve(ranking: Any, corrupted: Any) -> tuple[Array, Array]:
    """(inspected, found) [N + 1]: shares of samples inspected in order of `ranking` [N] and of the corrupted found, from 0.

    ranking: largest first. corrupted: bool [N]; where there is none, nothing is found. Equal values, such as the 0 of
    samples never visited: what is found on average over their orders, so the order of the data plays no part.
    Raises ValueError for NaN (infinity is allowed: give −inf to whatever should come last) and other shapes.
    """
    values, truth = _checked(ranking, corrupted)
    order = np.argsort(-values, kind="stable")
    # the last place of each run of equal values; in between, the average over orders is a straight line
    ends = np.flatnonzero(np.append(values[order][1:] != values[order][:-1], True)) + 1 if len(order) else np.empty(0, int)
    at_ends = np.cumsum(truth[order])[ends - 1]
    places = np.arange(len(values) + 1)
    found = np.interp(places, np.append(0, ends), np.append(0, at_ends)) / max(truth.sum(), 1)
    return places / max(len(values), 1), found


def detection_auc(ranking: Any, corrupted: Any) -> float:
    """The chance that a corrupted sample is ranked above a clean one, a tie counting half: the area under the ROC curve.

    0.5 for random ranking, 1 for a perfect one. The area under `detection_curve` is (1 − p)·AUC + p/2, p the share that is
    corrupted. ValueError as `found_fraction`, and where every sample is corrupted.
    """
    inspected, found = _checked_curve(ranking, corrupted)
    share = float(np.asarray(corrupted, dtype=bool).mean())
    if share == 1:
        raise ValueError("every sample is marked as corrupted: there is nothing to tell apart")
    area = float(((found[1:] + found[:-1]) / 2 * np.diff(inspected)).sum())
    return (area - share / 2) / (1 - share)


def average_precision(ranking: Any, corrupted: Any) -> float:
    """The mean, over the corrupted samples, of the share that is corrupted among all ranked down to it.

    Equal values: the exact average over their orders. So of a constant ranking it is what random ranking gets.
    ValueError as `found_fraction`.
    """
    values, truth = _checked(ranking, corrupted)
    _refuse_none(truth)
    order = np.argsort(-values, kind="stable")
    starts = np.flatnonzero(np.append(True, values[order][1:] != values[order][:-1]))
    sizes = np.diff(np.append(starts, len(order)))
    corrupt = np.add.reduceat(truth[order].astype(int), starts)
    # at place i (from 0) of a tie of n with c corrupted: c/n that it is one, then i·(c−1)/(n−1) others of the tie before it
    slope = np.repeat((corrupt - 1) / np.maximum(sizes - 1, 1), sizes)
    places = np.arange(len(order))
    ahead = np.repeat(np.cumsum(corrupt) - corrupt, sizes) + 1 + (places - np.repeat(starts, sizes)) * slope
    return float((np.repeat(corrupt / sizes, sizes) * ahead / (places + 1)).sum() / truth.sum())


def detection_table(
    rankings: Mapping[str, Any], corrupted: Any, inspected: Sequence[float] = (0.05, 0.1, 0.2)
) -> list[dict[str, Any]]:
    """A row for each ranking [N], and one for random: ranking, auc, average_precision, found {inspected: share}.

    The last row, "random (expected)", is the average over all orders of the samples. Errors: those of `detection_auc`.
    """
    size = len(np.asarray(corrupted))
    rows = [*rankings.items(), (RANDOM, np.zeros(size))]
    return [
        {
            "ranking": name,
            "auc": detection_auc(ranking, corrupted),
            "average_precision": average_precision(ranking, corrupted),
            "found": {share: found_fraction(ranking, corrupted, share) for share in inspected},
        }
        for name, ranking in rows
    ]


def checked_ranking(ranking: Any) -> Array:
    """`ranking` as float64 [N]; ValueError for another shape and for NaN."""
    if hasattr(ranking, "scores"):
        raise TypeError("ranking must be [N] numbers of one window and query: suspicion(result), or result.scores[0, 0]")
    values = np.asarray(ranking, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"ranking must be [N], got shape {values.shape}")
    bad = np.isnan(values)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        many = f"{int(bad.sum()):,} sample{'s' * int(bad.sum() > 1)}"
        raise ValueError(f"ranking: NaN for {many}, the one at place {first} first; give −inf for what should come last")
    return values


def _checked(ranking: Any, corrupted: Any) -> tuple[Array, Array]:
    truth = np.asarray(corrupted)
    shape = np.shape(ranking)
    if shape != truth.shape or truth.ndim != 1:
        raise ValueError(f"ranking {shape} and corrupted {truth.shape} must both be [N]")
    if truth.dtype != bool and not np.isin(truth, (0, 1)).all():
        raise ValueError("corrupted must be bool [N], True for each corrupted sample; ids of samples are not taken")
    return checked_ranking(ranking), truth.astype(bool)


def _checked_curve(ranking: Any, corrupted: Any) -> tuple[Array, Array]:
    _refuse_none(_checked(ranking, corrupted)[1])
    return detection_curve(ranking, corrupted)


def _refuse_none(truth: Array) -> None:
    if not truth.any():
        raise ValueError("no sample is marked as corrupted: there is nothing to find")
