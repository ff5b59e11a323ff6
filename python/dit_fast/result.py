"""Influence: scores with named axes, what they were computed from, and their way to disk and to tables."""

import csv
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dit_fast.trajectory import Window

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

FORMAT = "dit_fast influence 1"
ORDERS = ("magnitude", "helpful", "harmful")


@dataclass(frozen=True)
class Influence:
    """The influence of samples on query values in windows of a run; what `score` and `leave_one_out` return.

    scores: float64 [W, Q, N] on the CPU, axes ("window", "query", "sample"), in the query's unit. Above 0: removing the
        sample raises the query's value (for a loss: the sample helped).
    windows: W windows with name, start and stop (steps). queries: Q labels. sample_ids: int64 [N].
    retrained: bool [W, Q, N], True where the score is the true change by retraining rather than first order.
    groups: the ids removed together, where groups were asked of `leave_one_out`; N then counts groups.
    meta: the log's hash, options, versions, device, seconds, peak_memory (bytes, of the process or on the GPU, so far); of
        `score` also the backend, why it was chosen, and what was replayed.
    """

    scores: Tensor
    windows: list[Window]
    queries: list[str]
    sample_ids: Tensor
    retrained: Tensor = field(default=None)  # type: ignore[assignment]
    groups: list[list[int]] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    axes = ("window", "query", "sample")

    def __post_init__(self) -> None:
        if self.retrained is None:
            object.__setattr__(self, "retrained", torch.zeros(self.scores.shape, dtype=torch.bool))
        expected = (len(self.windows), len(self.queries), len(self.sample_ids))
        if tuple(self.scores.shape) != expected or tuple(self.retrained.shape) != expected:
            raise ValueError(f"scores {tuple(self.scores.shape)} do not fit {expected} windows, queries and samples")

    def window_index(self, window: int | str) -> int:
        """Position of a window by number (negative from the end) or name; ValueError where there is none."""
        if isinstance(window, str):
            named = [i for i, w in enumerate(self.windows) if w.name == window]
            if not named:
                raise ValueError(f"no window {window!r}; there are {', '.join(w.name for w in self.windows)}")
            return named[0]
        if not -len(self.windows) <= window < len(self.windows):
            raise ValueError(f"window {window} does not exist: there are {len(self.windows)}")
        return window % len(self.windows)

    def query_index(self, query: int | str) -> int:
        """Position of a query value by number (negative from the end) or label; ValueError where there is none."""
        if isinstance(query, str):
            if query not in self.queries:
                raise ValueError(
                    f"no query {query!r}; there are {', '.join(self.queries[:8])}{', …' * (len(self.queries) > 8)}"
                )
            return self.queries.index(query)
        if not -len(self.queries) <= query < len(self.queries):
            raise ValueError(f"query {query} does not exist: there are {len(self.queries)}")
        return query % len(self.queries)

    def top(
        self, k: int = 10, window: int | str = -1, query: int | str = 0, order: str = "magnitude"
    ) -> list[tuple[int, float]]:
        """The k leading samples of one window and query, best first, as (sample id, score).

        order: "magnitude" = largest |score|; "helpful" = largest score (removing it raises a loss); "harmful" = smallest.
        Equal scores keep the order of sample_ids.
        """
        if order not in ORDERS:
            raise ValueError(f"order={order!r} is not one of {', '.join(map(repr, ORDERS))}")
        row = self.scores[self.window_index(window), self.query_index(query)]
        key = {"magnitude": row.abs(), "helpful": row, "harmful": -row}[order]
        leading = torch.argsort(key, descending=True, stable=True)[:k]
        return [(int(self.sample_ids[i]), float(row[i])) for i in leading]

    def largest(self, k: int) -> Tensor:
        """bool [W, Q, N]: the k samples of largest |score| in every window and query."""
        leading = torch.argsort(self.scores.abs(), dim=-1, descending=True, stable=True)[..., :k]
        return torch.zeros(self.scores.shape, dtype=torch.bool).scatter_(-1, leading, True)

    def refined_by(self, true: "Influence", chosen: Tensor) -> "Influence":
        """The same with the scores at `chosen` [W, Q, N] taken from `true`, which holds their samples, and marked."""
        position = {int(j): i for i, j in enumerate(true.sample_ids)}
        columns = torch.tensor([position.get(int(j), -1) for j in self.sample_ids])
        known = torch.where(columns >= 0, true.scores[..., columns.clamp_min(0)], torch.nan)
        meta = {**self.meta, "refined": int(chosen.sum()), "refine_seconds": true.meta["seconds"]}
        scores = torch.where(chosen, known, self.scores)
        return replace(self, scores=scores, retrained=self.retrained | chosen, meta=meta)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per window, query and sample: window, start, stop, query, sample, score, retrained (needs pandas)."""
        import pandas

        num_windows, num_queries, num_samples = self.scores.shape
        inner = num_queries * num_samples
        return pandas.DataFrame(
            {
                "window": [w.name for w in self.windows for _ in range(inner)],
                "start": [w.start for w in self.windows for _ in range(inner)],
                "stop": [w.stop for w in self.windows for _ in range(inner)],
                "query": [name for _ in range(num_windows) for name in self.queries for _ in range(num_samples)],
                "sample": self.sample_ids.repeat(num_windows * num_queries).numpy(),
                "score": self.scores.flatten().numpy(),
                "retrained": self.retrained.flatten().numpy(),
            }
        )

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows of `to_pandas` as a table with a heading, without pandas; scores in full precision."""
        samples = self.sample_ids.tolist()
        with open(path, "w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("window", "start", "stop", "query", "sample", "score", "retrained"))
            for window, of_window, true_of_window in zip(self.windows, self.scores, self.retrained, strict=True):
                for query, scores, true in zip(self.queries, of_window.tolist(), true_of_window.tolist(), strict=True):
                    head = (window.name, window.start, window.stop, query)
                    rows.writerows((*head, *row) for row in zip(samples, scores, true, strict=True))

    def select(self, windows: Any = None, queries: Any = None) -> "Influence":
        """The same with some windows and query values alone, in the order asked for.

        windows, queries: a slice, or one or several numbers (negative from the end) or names; None = all. ValueError where
        there is none of that name or number, or nothing is left.
        """
        rows = _chosen(windows, len(self.windows), self.window_index, "windows")
        columns = _chosen(queries, len(self.queries), self.query_index, "queries")
        return replace(
            self,
            scores=self.scores[rows][:, columns],
            windows=[self.windows[i] for i in rows],
            queries=[self.queries[i] for i in columns],
            retrained=self.retrained[rows][:, columns],
        )

    @property
    def plot(self) -> "Plot":
        """Figures of this result: `plot.heatmap()`, `.curves()`, `.patterns()`, `.stages()`; `plot()` is the heat map."""
        return Plot(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with everything; whole or not at all."""
        header = {
            "format": FORMAT,
            "windows": [[w.name, w.start, w.stop] for w in self.windows],
            "queries": self.queries,
            "groups": self.groups,
            "meta": dict(self.meta),
        }
        tensors = {"scores": self.scores, "retrained": self.retrained, "sample_ids": self.sample_ids}
        data = save({k: v.contiguous() for k, v in tensors.items()}, metadata={"dit_fast": json.dumps(header)})
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"cannot save scores at {target}: there is no folder {target.parent}")
        aside = target.with_name(f".{target.name}.partial")
        try:
            aside.write_bytes(data)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Influence":
        """Read what `save` wrote; ValueError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                if "dit_fast" not in (file.metadata() or {}):
                    raise ValueError("it holds no scores")
                header = json.loads(file.metadata()["dit_fast"])
                tensors = {name: file.get_tensor(name) for name in ("scores", "retrained", "sample_ids")}
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']!r}")
            windows = [Window(name, start, stop) for name, start, stop in header["windows"]]
            return cls(windows=windows, queries=header["queries"], groups=header["groups"], meta=header["meta"], **tensors)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of dit_fast scores, or is damaged: {error}") from error

    def __repr__(self) -> str:
        num_windows, num_queries, num_samples = self.scores.shape
        unit, kind = ("samples", "") if self.groups is None else ("groups", "group ")
        lines = [
            f"Influence of {num_samples:,} {unit} on {num_queries:,} query value{'s' * (num_queries != 1)} in {num_windows:,} "
            f"window{'s' * (num_windows != 1)} ({', '.join(self._how())})"
        ]
        what = self.queries[0] if num_queries == 1 else f"{self.queries[0]} (the first of {num_queries})"
        shown = list(range(num_windows)) if num_windows <= 6 else [0, 1, 2, -2, -1]
        for i in shown if num_samples else []:
            window = self.windows[i]
            if i == -2:
                lines.append("  …")
            leading = ", ".join(f"{kind}{j}: {value:+.3g}" for j, value in self.top(3, window=i))
            steps = f"[{window.start}, {window.stop})"
            name = steps if window.name == steps else f"{window.name} {steps}"
            lines.append(f"  {name} {what}: largest {leading}")
        return "\n".join(lines)

    def _how(self) -> list[str]:
        how = [str(self.meta.get("method", "?"))]
        if "hessian" in self.meta:
            how.append(f"hessian={self.meta['hessian']}")
        if "refined" in self.meta:
            how.append(f"{self.meta['refined']} scores true by retraining")
        return how


@dataclass(frozen=True)
class Plot:
    """The figures of a result, each a matplotlib Figure (needs matplotlib): `figure.savefig("x.png")`, or ".svg"."""

    result: Influence

    def __call__(self, query: int | str = 0) -> "matplotlib.figure.Figure":
        """`heatmap`."""
        return self.heatmap(query)

    def heatmap(self, query: int | str = 0) -> "matplotlib.figure.Figure":
        """One query's scores, windows × samples, sorted by their total."""
        return _plots().heatmap(self.result, query)

    def curves(
        self, query: int | str = 0, k: int = 5, *, sample_ids: Any = None, cumulative: bool = False
    ) -> "matplotlib.figure.Figure":
        """The k most helpful and k most harmful samples (by the sum over windows), or `sample_ids`, over the steps of the run.

        The windows must follow one another, as in `analysis.curves`; `select` leaves others out.
        """
        return _plots().curves(self.result, query, k, sample_ids=sample_ids, cumulative=cumulative)

    def patterns(self, query: int | str = 0, *, rule: Any = None) -> "matplotlib.figure.Figure":
        """The share of each pattern, and where in time its samples' influence lies; rule: an `analysis.PatternRule`."""
        return _plots().patterns(self.result, query, rule=rule)

    def stages(self, kind: str = "kendall", query: int | str = 0, *, k: int | None = None) -> "matplotlib.figure.Figure":
        """The correlation between the scores of any two windows, as a matrix; kind and k as `analysis.stage_correlation`."""
        return _plots().stages(self.result, kind, query, k=k)


def _plots() -> Any:
    try:
        from dit_fast import plots
    except ImportError as error:
        raise ImportError(f"figures need matplotlib: pip install 'dit_fast[demo]' ({error})") from error
    return plots


def _chosen(asked: Any, size: int, index: Callable[[Any], int], what: str) -> list[int]:
    if asked is None or isinstance(asked, slice):
        found = list(range(size))[asked or slice(None)]
    else:
        found = [index(item) for item in ([asked] if isinstance(asked, int | str) else asked)]
    if not found:
        raise ValueError(f"{what}={asked!r} leaves nothing: there are {size}")
    return found
