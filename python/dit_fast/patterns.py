"""When a sample matters: the patterns of influence over time, by a rule with thresholds of its own."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_fast.curves import Curves, curves, finite

Array = npt.NDArray[Any]

PATTERNS = ("early", "late", "stable", "fluctuating", "negligible")


@dataclass(frozen=True)
class PatternRule:
    """The thresholds by which `patterns` sorts curves; all are shares or ratios, so a query's unit does not matter.

    With s_w the score in window w of L_w steps, and Σ over windows:
    negligible: Σ|s_w| at most this share of its mean over all samples. 0 leaves only samples that are 0 everywhere, as
        those that were never visited are.
    early, late: at least this share of Σ|s_w| lies in the first, the last third of the steps; a window across the border
        counts by its steps on either side. Even influence has 1/3 in each.
    sign_changes: at least this share of the W − 1 passages from one window to the next change the sign (zeros are skipped).
        Signs drawn at random change at half of them.
    variation: at least this ratio of the standard deviation of |s_w|/L_w over the steps to its mean.
    """

    negligible: float = 0.01
    early: float = 0.5
    late: float = 0.5
    sign_changes: float = 0.5
    variation: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            upper = float("inf") if name in ("variation", "negligible") else 1.0
            if not 0 <= value <= upper:
                raise ValueError(f"PatternRule({name}={value!r}) must lie between 0 and {upper:g}")


@dataclass(frozen=True, eq=False)
class Patterns:
    """Each sample's pattern of influence over time; what `patterns` returns.

    labels: [N] of str, one of PATTERNS each. curves: what was sorted. rule: by which thresholds.
    magnitude: Σ|s_w| [N], in the query's unit. first_third, last_third: shares of it [N], NaN where it is 0.
    sign_changes, variation: as in PatternRule [N]; 0 where the magnitude is 0.
    """

    labels: Array
    curves: Curves
    rule: PatternRule
    magnitude: Array
    first_third: Array
    last_third: Array
    sign_changes: Array
    variation: Array

    @property
    def sample_ids(self) -> Array:
        """int64 [N]."""
        return self.curves.sample_ids

    @property
    def counts(self) -> dict[str, int]:
        """Pattern → number of samples, in the order of PATTERNS."""
        return {name: int((self.labels == name).sum()) for name in PATTERNS}

    @property
    def shares(self) -> dict[str, float]:
        """Pattern → share of all N samples; they sum to 1. NaN where there are no samples."""
        size = len(self.labels)
        return {name: count / size if size else float("nan") for name, count in self.counts.items()}

    def of(self, pattern: str) -> Array:
        """The ids of the samples with this pattern, of largest magnitude first; equal ones in the samples' order."""
        if pattern not in PATTERNS:
            raise ValueError(f"pattern {pattern!r} is not one of {', '.join(PATTERNS)}")
        places = np.flatnonzero(self.labels == pattern)
        return self.sample_ids[places[np.argsort(-self.magnitude[places], kind="stable")]]

    def examples(self, k: int = 3) -> dict[str, list[int]]:
        """Pattern → the ids of its k samples of largest magnitude; fewer where there are fewer."""
        return {name: self.of(name)[:k].tolist() for name in PATTERNS}

    def mean_curves(self) -> dict[str, Array]:
        """Pattern → mean over its samples of |s_w| / Σ|s_w| [W]: where in time their influence lies. NaN without samples.

        Samples that are 0 everywhere have no share in it.
        """
        shares = np.abs(self.curves.values) / np.where(self.magnitude > 0, self.magnitude, np.nan)
        found = {}
        for name in PATTERNS:
            chosen = (self.labels == name) & (self.magnitude > 0)
            found[name] = shares[:, chosen].mean(1) if chosen.any() else np.full(len(shares), np.nan)
        return found

    def __repr__(self) -> str:
        lines = [f"Patterns of {len(self.labels):,} samples over {len(self.curves.windows):,} windows of {self.curves.query}"]
        examples, counts = self.examples(), self.counts
        for name, share in self.shares.items():
            such = f"   such as {', '.join(map(str, examples[name]))}" if counts[name] else ""
            lines.append(f"  {name:<12}{share:>7.1%}{counts[name]:>9,}{such}")
        return "\n".join(lines)


def patterns(scores: Any, query: int | str = 0, *, rule: PatternRule | None = None, windows: Any = None) -> Patterns:
    """Sort every sample into one pattern of influence over time: early, late, stable, fluctuating, or negligible.

    The first four are the patterns of Xu & Wu 2025 (arXiv 2502.10793); the rule is ours. In this order, by the thresholds of
    `rule` (default `PatternRule()`):
    1. negligible: hardly any influence, or none: never visited before the last window's end;
    2. early or late: most of |influence| lies in the first or in the last third of the steps, in the one that has more;
    3. fluctuating: the sign changes as often as by chance, or |influence| per step varies much;
    4. stable: all others, of one sign for most of the time. So is every sample with influence where there is one window.

    The classes depend on the windows: finer ones show more fluctuation. Scaling all scores changes nothing.

    scores, query, windows: as in `curves`, whose errors it has. Raises ValueError for NaN and infinity.
    """
    found = curves(scores, query, windows=windows)
    rule = rule or PatternRule()
    values, lengths = finite(found.values, "patterns", found.sample_ids), found.lengths
    magnitude = np.abs(values).sum(0)
    largest = np.abs(values).max(0, initial=0.0)
    # by the largest of each sample, so that tiny scores do not underflow when squared
    unit = values / np.where(largest > 0, largest, 1.0)
    total = np.abs(unit).sum(0)
    with np.errstate(invalid="ignore"):
        first, last = (np.abs(unit).T @ share / total for share in _thirds(found))
    changes, variation = _sign_changes(unit), _variation(unit, lengths)
    is_negligible = (magnitude == 0) | (magnitude <= rule.negligible * (magnitude.mean() if magnitude.size else 0.0))
    labels = np.select(
        [
            is_negligible,
            (first >= rule.early) & (first > last),
            (last >= rule.late) & (last > first),
            (changes >= rule.sign_changes) & (changes > 0) | (variation >= rule.variation),
        ],
        ["negligible", "early", "late", "fluctuating"],
        "stable",
    )
    return Patterns(labels, found, rule, magnitude, first, last, changes, variation)


def _thirds(found: Curves) -> tuple[Array, Array]:
    """The share of each window's steps in the first and in the last third of all steps [W]."""
    begin, end = found.windows[0].start, found.windows[-1].stop
    starts = np.array([window.start for window in found.windows], dtype=float)
    stops = starts + found.lengths
    first = np.clip(begin + (end - begin) / 3 - starts, 0, found.lengths) / found.lengths
    last = np.clip(stops - (end - (end - begin) / 3), 0, found.lengths) / found.lengths
    return first, last


def _sign_changes(values: Array) -> Array:
    """The share of the W − 1 passages between windows at which the sign changes [N]; a zero keeps the sign before it."""
    signs = np.sign(values)
    for w in range(1, len(signs)):
        signs[w] = np.where(signs[w] == 0, signs[w - 1], signs[w])
    return (signs[1:] * signs[:-1] < 0).sum(0) / max(len(signs) - 1, 1)


def _variation(values: Array, lengths: Array) -> Array:
    """Standard deviation of |s_w|/L_w over the steps, in units of its mean [N]; 0 where all are 0."""
    rates, weights = np.abs(values) / lengths[:, None], lengths / lengths.sum()
    mean = weights @ rates
    return np.sqrt(weights @ (rates - mean) ** 2) / np.where(mean > 0, mean, 1.0)
