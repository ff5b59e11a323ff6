"""Influence over time: one curve per sample over windows that follow one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_fast.result import Influence
from dit_fast.trajectory import Window

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Curves:
    """One query's influence over time, a column per sample; what `curves` returns.

    values: float64 [W, N] in the query's unit, sign as in `score`; of each window, or where `cumulative`, of everything up
        to its end (the score of [first start, its stop)). A sample that was not seen before a window's end is exactly 0
        there. NaN stays NaN.
    windows: W windows, each beginning where the one before ends. sample_ids: int64 [N].
    """

    values: Array
    windows: list[Window]
    sample_ids: Array
    query: str
    cumulative: bool = False

    @property
    def midpoints(self) -> Array:
        """The middle of each window in steps, float64 [W]."""
        return np.array([(window.start + window.stop) / 2 for window in self.windows])

    @property
    def positions(self) -> Array:
        """Where on the axis of steps each value belongs [W]: the window's middle, or where `cumulative` its end."""
        return np.array([float(window.stop) for window in self.windows]) if self.cumulative else self.midpoints

    @property
    def lengths(self) -> Array:
        """The number of steps in each window, float64 [W]."""
        return np.array([float(window.stop - window.start) for window in self.windows])

    def of(self, sample_id: int) -> Array:
        """The curve of one sample [W]; ValueError for an id that is not there."""
        places = np.flatnonzero(self.sample_ids == sample_id)
        if not len(places):
            raise ValueError(f"sample {sample_id} has no curve: it is not among the {len(self.sample_ids):,} scored")
        return self.values[:, places[0]]

    def __repr__(self) -> str:
        num_windows, num_samples = self.values.shape
        kind = "cumulative curves" if self.cumulative else "curves"
        steps = f"[{self.windows[0].start}, {self.windows[-1].stop})"
        return f"Curves({num_samples:,} {kind} of {self.query} over {num_windows:,} windows of steps {steps})"


def curves(scores: Any, query: int | str = 0, *, cumulative: bool = False, windows: Any = None) -> Curves:
    """The influence of every sample on one query value in each of W windows that follow one another.

    scores: an Influence, or an array [W, N]. query: which of the Influence's query values, by number or label.
    cumulative: the running sum over windows, which is the score from the first window's start to each one's end.
    windows: for an array, W pairs (start, stop) in steps; None = W steps, one each.

    Raises ValueError where a window does not begin where the one before ends: such scores overlap or leave steps out.
    `stages` takes those that do from a result.
    """
    values, spans, ids, name = table(scores, query, windows)
    for before, after in pairwise(spans):
        if before.stop != after.start:
            how = "overlaps" if after.start < before.stop else "leaves a gap"
            raise ValueError(
                f"window {after.name!r} [{after.start}, {after.stop}) {how} after {before.name!r} [{before.start}, "
                f'{before.stop}): curves need windows that follow one another, such as windows="epochs"; '
                "analysis.stages(result) takes them out of a result, result.select(windows=...) those you name"
            )
    return Curves(np.cumsum(values, 0) if cumulative else values, spans, ids, name, cumulative)


def stages(result: Influence) -> Influence:
    """The result with its longest chain of windows that follow one another alone, in order.

    Of chains with the same number of windows, the one that covers most steps, then the one that begins first. So
    "epochs" beside a whole run gives the epochs. A result whose windows are one chain already comes back as it is.
    """
    order = sorted(range(len(result.windows)), key=lambda i: (result.windows[i].start, result.windows[i].stop, i))
    best: dict[int, tuple[int, int, list[int]]] = {}  # where a chain ends → (windows, steps, which)
    for i in order:
        window = result.windows[i]
        count, steps, chain = best.get(window.start, (0, 0, []))
        longer = (count + 1, steps + window.stop - window.start, [*chain, i])
        if longer[:2] > best.get(window.stop, (0, 0, []))[:2]:
            best[window.stop] = longer
    chosen = max(best.values(), key=lambda found: found[:2])[2]
    return result if chosen == list(range(len(result.windows))) else result.select(windows=chosen)


def table(scores: Any, query: int | str = 0, windows: Any = None) -> tuple[Array, list[Window], Array, str]:
    """(scores [W, N] float64, W windows, ids [N], the query's label) of an Influence's query or of an array [W, N] or [N].

    Raises ValueError for other shapes and for windows that do not fit.
    """
    if isinstance(scores, Influence):
        if windows is not None:
            raise ValueError("an Influence has its own windows: choose among them with result.select(windows=...)")
        place = scores.query_index(query)
        return scores.scores[:, place].numpy(), scores.windows, scores.sample_ids.numpy(), scores.queries[place]
    values = np.atleast_2d(np.asarray(scores, dtype=float))
    if values.ndim != 2 or not values.shape[0]:
        raise ValueError(f"scores must be an Influence or an array [W, N], got shape {values.shape}; of [W, Q, N] take [:, q]")
    return values, _spans(windows, len(values)), np.arange(values.shape[1]), "query"


def finite(values: Array, what: str, ids: Array | None = None) -> Array:
    """`values` [..., N] as they are; ValueError that names the first sample with NaN or infinity."""
    bad = ~np.isfinite(values).all(axis=tuple(range(values.ndim - 1)))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        name = first if ids is None else int(ids[first])
        many = "s" * int(bad.sum() > 1)
        raise ValueError(f"{what}: NaN or infinity for {int(bad.sum()):,} sample{many}, sample {name} first; leave them out")
    return values


def _spans(windows: Any, size: int) -> list[Window]:
    if windows is None:
        return [Window(f"window {i}", i, i + 1) for i in range(size)]
    spans = [w if isinstance(w, Window) else _window(w) for w in windows]
    if len(spans) != size:
        raise ValueError(f"{len(spans)} windows for scores of {size}")
    return spans


def _window(pair: Sequence[int]) -> Window:
    start, stop = pair
    if start >= stop:
        raise ValueError(f"window ({start}, {stop}) is empty or reversed")
    return Window(f"{start}-{stop}", int(start), int(stop))
