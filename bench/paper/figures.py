"""A small figure for each claim, results/claim-N.png, drawn by `python -m bench.paper.verdicts` from results/*.json."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import tables
from .correlation import SHOWN, best_damping
from .rivals import WINDOWED
from .stages import PAIRS, join

Rows = list[dict[str, Any]]


def cases_of(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Rows]:
    """Rows that agree in `keys`, together."""
    cases: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        cases.setdefault(tuple(row[key] for key in keys), []).append(row)
    return cases


def claim_1(rows: Rows) -> Figure:
    """A point for each run: the mean over seeds of the correlation with retraining, by method and window."""
    figure, axes = _figure(7.2, 2.9)
    methods = (*WINDOWED, "influence function")
    for m, method in enumerate(methods):
        means: list[tuple[float, float]] = []
        for of_run in cases_of(rows, "data", "net").values():
            name = best_damping(of_run, "pearson") if method == "influence function" else method
            for w, window in enumerate(SHOWN):
                cells = [row["pearson"] for row in of_run if (row["method"], row["window"]) == (name, window)]
                means.append((w + 0.2 * (m - 1.5), tables.mean(cells)))
        axes.plot(*zip(*means, strict=True), "o", color=f"C{m}", alpha=0.6, markersize=4, label=method)
    axes.set_xticks(range(len(SHOWN)), SHOWN)
    axes.set_ylabel("Pearson with retraining")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def claim_2(rows: Rows) -> Figure:
    """A point for each run: the mean over seeds of Spearman between two windows' scores, and of the true changes."""
    figure, axes = _figure(7.2, 2.9)
    for place, (kind, name) in enumerate((("spearman", "DIT"), ("spearman of retraining", "retraining"))):
        runs = [of for of in cases_of(rows, "data", "net").values() if of[0][kind]]
        points = [
            (tables.mean([row[kind][join(*pair)] for row in of]), i + 0.2 * (place - 0.5))
            for of in runs
            for i, pair in enumerate(PAIRS)
        ]
        axes.plot(*zip(*points, strict=True), "o", color=f"C{place}", alpha=0.6, markersize=4, label=name)
    axes.set_yticks(range(len(PAIRS)), [join(*pair) for pair in PAIRS])
    axes.invert_yaxis()
    axes.set_xlim(-1.05, 1.05)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("Spearman between the scores of two windows")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def claim_3(rows: Rows) -> Figure:
    """A point for each case, mean over seeds: found by the last third and by the loss, against found by the whole run."""
    figure, axes = _figure(5.2, 3.6)
    cases = cases_of(rows, "data", "net", "epochs", "flips").values()

    def found(of: Rows, ranking: str) -> float:
        return 100 * tables.mean([row["found at 1×"] for row in of if row["ranking"] == ranking])

    for m, (ranking, name) in enumerate((("DIT, last third", "last third"), ("training loss", "training loss"))):
        points = [(found(of, "DIT, whole run"), found(of, ranking)) for of in cases]
        axes.plot(*zip(*points, strict=True), "o", color=f"C{m}", alpha=0.6, markersize=4, label=name)
    axes.plot([0, 100], [0, 100], color="0.7", linewidth=0.8, zorder=0)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_aspect("equal")
    axes.set_xlabel("% of flips found by the whole run's score")
    axes.set_ylabel("% found by …")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


FIGURES = {"claim-1": (claim_1, "correlation"), "claim-2": (claim_2, "stages"), "claim-3": (claim_3, "detection")}


def draw() -> None:
    """Write all of them."""
    for name, (make, results) in FIGURES.items():
        make(tables.read(results)["rows"]).savefig(
            tables.HERE / "results" / f"{name}.png", dpi=100, metadata={"Software": None}
        )


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
