"""The linear datamodeling score: do summed scores tell what happens when whole groups of samples are removed?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_fast.correlation import is_constant, ranks, spearman
from dit_fast.curves import finite
from dit_fast.problem import Problem
from dit_fast.queries import Query
from dit_fast.result import Influence
from dit_fast.retrain import leave_one_out
from dit_fast.score import score
from dit_fast.trajectory import Trajectory

Array = npt.NDArray[Any]

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class LDS:
    """Linear datamodeling scores; what `lds` returns.

    values: float64 [W], the mean over query values of Spearman's correlation over groups; interval: [W, 2], the bootstrap
        interval of `level`, groups and (where there are several) query values drawn with replacement.
    per_query: [W, Q]; NaN, and not in the mean, where the truth or the summed scores are the same for all groups.
    """

    values: Array
    interval: Array
    per_query: Array
    windows: list[str]
    num_groups: int
    level: float

    def __repr__(self) -> str:
        missing = int(np.isnan(self.per_query).sum())
        lines = [
            f"LDS over {self.num_groups} groups, mean over {self.per_query.shape[1]} query values, {self.level:.0%} interval"
        ]
        for name, value, (low, high) in zip(self.windows, self.values, self.interval, strict=True):
            lines.append(f"  {name}: {value:.3f} [{low:.3f}, {high:.3f}]")
        if missing:
            lines.append(f"  {missing} of {self.per_query.size} correlations are left out: the same for all groups")
        return "\n".join(lines)


def lds(scores: Influence, truth: Influence, *, bootstrap: int = 1000, level: float = 0.95, seed: int = 0) -> LDS:
    """How well sums of scores predict the removal of groups (LDS of Park et al. 2023, TRAK, arXiv 2303.14186, eq. 3).

    For each window (by steps) and query value that both have: Spearman's correlation, over groups, of Σ_{j in group} score_j
    with the true change when the group is removed; averaged over query values. 1 is best.

    scores: of single samples, every member of a group among them. truth: of `leave_one_out(groups=...)`, with the same
    query values. bootstrap: draws for the interval; 0 = none (NaN).

    Raises ValueError where the two do not fit, for fewer than three groups, and for NaN and infinity.
    """
    if scores.groups is not None or truth.groups is None:
        raise ValueError("lds needs scores of single samples and a truth of groups: leave_one_out(..., groups=[[...], ...])")
    if len(truth.groups) < 3:
        raise ValueError(f"lds needs at least three groups, got {len(truth.groups)}")
    if scores.queries != truth.queries:
        raise ValueError(f"scores of {scores.queries[:3]} and truth of {truth.queries[:3]} must be of the same queries")
    spans = {(w.start, w.stop): i for i, w in reversed(list(enumerate(truth.windows)))}
    both = [(i, spans[w.start, w.stop]) for i, w in enumerate(scores.windows) if (w.start, w.stop) in spans]
    if not both:
        raise ValueError("the scores and the truth have no window in common: nothing to compare")
    members = _members(scores, truth.groups)
    ours, theirs = (list(column) for column in zip(*both, strict=True))
    predicted = finite(scores.scores.numpy()[ours], "lds: scores", scores.sample_ids.numpy()) @ members.T
    true = finite(truth.scores.numpy()[theirs], "lds: the truth")
    per_query = np.array([[spearman(p, t) for p, t in zip(*rows, strict=True)] for rows in zip(predicted, true, strict=True)])
    generator = np.random.default_rng(seed)
    intervals = [_interval(p, t, bootstrap, level, generator) for p, t in zip(predicted, true, strict=True)]
    values = np.array([_mean(row) for row in per_query])
    names = [scores.windows[i].name for i in ours]
    return LDS(values, np.array(intervals), per_query, names, len(truth.groups), level)


def linear_datamodeling_score(
    trajectory: Trajectory,
    problem: Problem,
    query: Query | Sequence[Query],
    windows: Any = None,
    *,
    scores: Influence | None = None,
    num_groups: int = 50,
    removed: float = 0.1,
    seed: int = 0,
    bootstrap: int = 1000,
    level: float = 0.95,
    **options: Any,
) -> LDS:
    """Draws groups, retrains without each, and compares: the LDS of `lds` in one call.

    scores: what is judged, of all samples; None = `score` with the same windows and options. removed: the share of the
    samples that each of the `num_groups` random groups takes away (TRAK removes half; first-order scores are for less).
    options: device, dtype, memory_budget, check, show_progress, for score and retraining alike. Costs `num_groups`
    retrainings. Batches and initialisation are the run's, so that there is no noise of retraining in it.
    """
    groups = draw_groups(problem.num_samples or trajectory.num_samples, num_groups, removed, seed)
    if scores is None:
        scores = score(trajectory, problem, query, windows, **options)
    truth = leave_one_out(trajectory, problem, query, windows, groups=groups, **options)
    return lds(scores, truth, bootstrap=bootstrap, level=level, seed=seed)


def draw_groups(num_samples: int, num_groups: int, removed: float, seed: int = 0) -> list[list[int]]:
    """`num_groups` random groups of round(removed · num_samples) different ids each, in order; the same for the same seed."""
    size = round(removed * num_samples)
    if not 0 < removed < 1 or not 0 < size < num_samples:
        raise ValueError(f"removed={removed!r} of {num_samples} samples is {size}: it must leave some in and take some out")
    generator = np.random.default_rng(seed)
    return [np.sort(generator.choice(num_samples, size, replace=False)).tolist() for _ in range(num_groups)]


def _members(scores: Influence, groups: list[list[int]]) -> Array:
    """1 where a sample is in a group [G, N]."""
    place = {int(j): i for i, j in enumerate(scores.sample_ids)}
    members = np.zeros((len(groups), len(place)))
    for g, group in enumerate(groups):
        missing = [j for j in group if j not in place]
        if missing:
            raise ValueError(f"sample {missing[0]} of group {g} has no score: score all samples, or those of the groups")
        members[g, [place[j] for j in group]] = 1
    return members


def _interval(predicted: Array, true: Array, draws: int, level: float, generator: np.random.Generator) -> tuple[float, float]:
    """The bootstrap interval of the mean over queries of Spearman's correlation over groups; both are [Q, G]."""
    num_queries, num_groups = predicted.shape
    if not draws:
        return NAN, NAN
    counts = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), draws).astype(float)
    found = np.full((draws, num_queries), NAN)
    for q in range(num_queries):
        if not (is_constant(predicted[q]) or is_constant(true[q])):
            found[:, q] = _weighted_spearman(predicted[q], true[q], counts)
    chosen = generator.integers(num_queries, size=(draws, num_queries))
    means = [_mean(row) for row in np.take_along_axis(found, chosen, 1)]
    known = np.array(means)[~np.isnan(means)]
    if not len(known):
        return NAN, NAN
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _weighted_spearman(a: Array, b: Array, counts: Array) -> Array:
    """Spearman's correlation of a [G] and b [G] with group g counted counts[d, g] times: [D]; NaN where constant."""
    found = []
    for values in (a, b):
        whole = ranks(values)
        # the rank of g: those counted below it, and half of those equal
        below = (whole[:, None] < whole) + 0.5 * (whole[:, None] == whole)
        rank = counts @ below
        found.append(rank - (counts * rank).sum(1, keepdims=True) / counts.sum(1, keepdims=True))
    x, y = found
    norm = np.sqrt((counts * x**2).sum(1) * (counts * y**2).sum(1))
    return np.where(norm > 1e-9, (counts * x * y).sum(1) / np.where(norm > 1e-9, norm, 1.0), NAN)


def _mean(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else NAN
