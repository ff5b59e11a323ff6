"""How alike two sets of scores are: between stages of a run, and between scores and retraining."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_fast.curves import finite, table
from dit_fast.patterns import PATTERNS, Patterns
from dit_fast.result import Influence

Array = npt.NDArray[Any]

NAN = float("nan")
TOP = 0.1


def pearson(a: Array, b: Array) -> float:
    """Pearson's correlation of two [N]; NaN where either is constant or has fewer than two entries."""
    # by the largest, so that tiny scores do not underflow when squared
    a, b = (x / (np.abs(x).max(initial=0.0) or 1.0) for x in (np.asarray(a, dtype=float), np.asarray(b, dtype=float)))
    if is_constant(a) or is_constant(b):
        return NAN
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def spearman(a: Array, b: Array) -> float:
    """Pearson's correlation of the ranks, equal values sharing their mean rank; NaN as `pearson`."""
    return pearson(ranks(a), ranks(b))


def kendall(a: Array, b: Array) -> float:
    """Kendall's τ-b, which allows for ties: (concordant − discordant pairs) / √(pairs untied in a · in b); NaN as `pearson`.

    Needs scipy: ImportError says which extra brings it.
    """
    try:
        from scipy.stats import kendalltau
    except ImportError as error:
        raise ImportError("Kendall's τ needs scipy: pip install 'dit_fast[demo]', or choose another kind") from error
    return NAN if is_constant(a) or is_constant(b) else float(kendalltau(a, b).statistic)


def jaccard(a: Array, b: Array, k: int) -> float:
    """|A ∩ B| / |A ∪ B| of the k samples of largest |a| and of largest |b|; NaN as `top_overlap`."""
    first, second = _leading(a, k), _leading(b, k)
    if not (first.any() and second.any()):
        return NAN
    return float((first & second).sum() / (first | second).sum())


def top_overlap(a: Array, b: Array, k: int) -> float:
    """The share of the k samples of largest |b| that are among those of largest |a|; NaN where either is 0 everywhere.

    Equal values are taken in the order of samples; samples at 0 are never among them.
    """
    first, second = _leading(a, k), _leading(b, k)
    return float((first & second).sum() / second.sum()) if first.any() and second.any() else NAN


def ranks(values: Array) -> Array:
    """Ranks from 1 [N], equal values sharing their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def is_constant(values: Array) -> bool:
    """Whether there are not two different values."""
    return len(values) < 2 or bool((values == values[0]).all())


def top_size(k: int | None, size: int) -> int:
    """k, or a tenth of `size`, rounded up, where it is None; ValueError where it is not 1 … size."""
    if k is None:
        return max(1, -(-size // round(1 / TOP)))
    if not 1 <= k <= max(size, 1):
        raise ValueError(f"k must be between 1 and the number of samples, {size}, got {k}")
    return int(k)


KINDS: dict[str, Callable[[Array, Array], float]] = {"kendall": kendall, "spearman": spearman, "pearson": pearson}


@dataclass(frozen=True, eq=False)
class StageCorrelation:
    """How alike the scores of any two windows are; what `stage_correlation` returns.

    matrix: float64 [W, W], symmetric, 1 on the diagonal; NaN in the rows and columns of `constant` windows.
    kind: "kendall", "spearman", "pearson" or "jaccard". names: the windows'. k: the size of the top sets, for "jaccard".
    num_samples: those compared. num_left_out: those that are 0 in every window, as the never visited are.
    constant: the names of windows whose scores are all equal (for "jaccard" all 0), which nothing correlates with.
    """

    matrix: Array
    kind: str
    names: list[str]
    num_samples: int
    num_left_out: int
    constant: list[str]
    k: int | None = None

    @property
    def mean(self) -> float:
        """The mean over pairs of different windows, NaN left out; NaN where there are none."""
        pairs = self.matrix[np.triu_indices(len(self.matrix), 1)]
        known = pairs[~np.isnan(pairs)]
        return float(known.mean()) if len(known) else NAN

    def __repr__(self) -> str:
        kind = f"top-{self.k} {self.kind}" if self.k is not None else self.kind
        ends = f"; first with last {self.matrix[0, -1]:.3f}" if len(self.names) > 1 else ""
        constant = f"; constant, so NaN: {', '.join(self.constant)}" if self.constant else ""
        left_out = f"; {self.num_left_out:,} left out that are 0 everywhere" if self.num_left_out else ""
        return (
            f"StageCorrelation({kind} of {len(self.names)} windows over {self.num_samples:,} samples: "
            f"mean {self.mean:.3f}{ends}{left_out}{constant})"
        )


def stage_correlation(
    scores: Any, kind: str = "spearman", query: int | str = 0, *, k: int | None = None, windows: Any = None
) -> StageCorrelation:
    """The correlation of the samples' scores between every two windows, as a matrix [W, W].

    scores: an Influence, or an array [W, N]; windows of any kind, overlapping ones too. query: as in `curves`.
    kind: "kendall" (τ-b, needs scipy), "spearman", "pearson", or "jaccard": |A ∩ B| / |A ∪ B| of the `k` samples of largest
        |score| (default a tenth of the samples compared, rounded up; equal ones in the order of samples; those at 0 never
        among them).

    Samples that are 0 in every window, as the never visited are, are left out: they would make any two stages look alike.
    Raises ValueError for NaN and infinity, and for another kind.
    """
    values, spans, ids, _ = table(scores, query, windows)
    finite(values, "stage_correlation", ids)
    if kind not in (*KINDS, "jaccard"):
        raise ValueError(f"kind={kind!r} is not one of {', '.join(map(repr, (*KINDS, 'jaccard')))}")
    visited = (values != 0).any(0)
    kept, size = values[:, visited], len(values)
    number = top_size(k, kept.shape[1]) if kind == "jaccard" else None
    constant = [not row.any() if kind == "jaccard" else is_constant(row) for row in kept]
    rows = [ranks(row) for row in kept] if kind == "spearman" else list(kept)
    matrix = np.full((size, size), NAN)
    for i in range(size):
        for j in range(i, size):
            if constant[i] or constant[j]:
                continue
            if i == j:
                matrix[i, i] = 1.0
            elif number is not None:
                matrix[i, j] = matrix[j, i] = jaccard(rows[i], rows[j], number)
            else:
                measure = pearson if kind == "spearman" else KINDS[kind]
                matrix[i, j] = matrix[j, i] = measure(rows[i], rows[j])
    names = [window.name for window in spans]
    without = [name for name, flat in zip(names, constant, strict=True) if flat]
    return StageCorrelation(matrix, kind, names, int(visited.sum()), int((~visited).sum()), without, number)


def agreement(scores: Any, truth: Any) -> dict[str, float]:
    """How well scores [N] agree with the true changes [N] of `leave_one_out`: pearson, spearman, kendall, top.

    top: the share of the tenth (rounded up) of samples of largest |truth| that are in that of largest |score|. Every value
    is NaN where either side is constant. Kendall's τ-b is NaN where scipy is not installed. Samples that are 0 on both
    sides count: both say that they did nothing.

    Raises ValueError for shapes other than [N], fewer than two samples, NaN and infinity.
    """
    a, b = np.asarray(scores, dtype=float), np.asarray(truth, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"scores {a.shape} and truth {b.shape} must both be [N] with at least two samples")
    finite(a, "scores"), finite(b, "truth")
    return _measures(a, b)


def agreement_by_pattern(scores: Any, truth: Any, patterns: Patterns | Any) -> dict[str, dict[str, float]]:
    """`agreement` of scores [N] with the truth [N] over all samples and within each pattern.

    patterns: a Patterns, or labels [N]. Returns {"all": …, "early": …, …}, each with `samples`, their number; NaN where a
    pattern has fewer than two samples or is constant.
    """
    a, b = np.asarray(scores, dtype=float), np.asarray(truth, dtype=float)
    labels = patterns.labels if isinstance(patterns, Patterns) else np.asarray(patterns)
    if labels.shape != a.shape:
        raise ValueError(f"patterns of {labels.shape} samples for scores {a.shape}: both must be [N] of the same samples")
    found = {"all": {"samples": float(len(a))} | agreement(a, b)}
    names = PATTERNS if set(labels.tolist()) <= set(PATTERNS) else sorted(set(labels.tolist()))
    for name in names:
        chosen = labels == name
        found[name] = {"samples": float(chosen.sum())} | _measures(a[chosen], b[chosen])
    return found


def compare(
    scores: Influence, truth: Influence, query: int | str = 0, *, patterns: Patterns | None = None
) -> list[dict[str, Any]]:
    """`agreement` of two results window by window, on the windows (by steps) and samples that both have.

    truth: what `leave_one_out` returned, or another score. patterns: adds a row for each pattern.
    Returns rows with window, pattern ("all" for all samples), samples, pearson, spearman, kendall, top.
    Raises ValueError where they have no window or fewer than two samples in common, or where either is of groups (`lds`).
    """
    if scores.groups is not None or truth.groups is not None:
        raise ValueError("compare needs scores of single samples; groups are for analysis.lds")
    place = {int(j): i for i, j in enumerate(scores.sample_ids)}
    shared = [(place[int(j)], i) for i, j in enumerate(truth.sample_ids) if int(j) in place]
    spans = {(w.start, w.stop): i for i, w in reversed(list(enumerate(truth.windows)))}
    both = [(i, spans[w.start, w.stop]) for i, w in enumerate(scores.windows) if (w.start, w.stop) in spans]
    if not both or len(shared) < 2:
        raise ValueError(f"the results have {len(both)} windows and {len(shared)} samples in common: nothing to compare")
    ours, theirs = (list(column) for column in zip(*shared, strict=True))
    of_theirs = query if isinstance(query, int) else truth.query_index(query)
    labels = None
    if patterns is not None:
        known = dict(zip(patterns.sample_ids.tolist(), patterns.labels.tolist(), strict=True))
        missing = [int(scores.sample_ids[i]) for i in ours if int(scores.sample_ids[i]) not in known]
        if missing:
            raise ValueError(f"patterns has no sample {missing[0]}, which the results have")
        labels = np.array([known[int(scores.sample_ids[i])] for i in ours])
    rows: list[dict[str, Any]] = []
    for i, j in both:
        a = scores.scores[i, scores.query_index(query)].numpy()[ours]
        b = truth.scores[j, truth.query_index(of_theirs)].numpy()[theirs]
        found = {"all": {"samples": len(a)} | agreement(a, b)} if labels is None else agreement_by_pattern(a, b, labels)
        for name, measures in found.items():
            rows.append({"window": scores.windows[i].name, "pattern": name} | measures | {"samples": int(measures["samples"])})
    return rows


def _measures(a: Array, b: Array) -> dict[str, float]:
    if is_constant(a) or is_constant(b):
        return dict.fromkeys(("pearson", "spearman", "kendall", "top"), NAN)
    try:
        tau = kendall(a, b)
    except ImportError:
        tau = NAN
    top = top_overlap(a, b, top_size(None, len(a)))
    return {"pearson": pearson(a, b), "spearman": spearman(a, b), "kendall": tau, "top": top}


def _leading(values: Array, k: int) -> Array:
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-np.abs(values), kind="stable")[:k]] = True
    return chosen & (values != 0)
