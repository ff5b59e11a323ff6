"""The numbers a report shows, ready for JSON: scores, order, curves, correlations, detection, costs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_fast import analysis
from dit_fast.byte_sizes import format_bytes
from dit_fast.result import Influence
from dit_fast.trajectory import Window

Array = npt.NDArray[Any]

# above this many samples the heat map shows means over bins of samples, and only listed samples have curves
MAX_COLUMNS = 2000
BINS = 1000
# samples listed of either sign in every window
LISTED = 20
# Kendall's τ of every pair of windows takes about a second per this many (pairs × samples)
MAX_KENDALL = 4_000_000
CURVE_POINTS = 61
NO_NUMBER = "no number"


def score_table(result: Influence, query: int) -> dict[str, Any]:
    """The page's scores: samples that have curves, their patterns, the lists of every window, and the heat map."""
    values = result.scores[:, query].numpy()
    ids = result.sample_ids.numpy()
    stages = analysis.stages(result)
    spans = {(w.start, w.stop): i for i, w in reversed(list(enumerate(result.windows)))}
    stage_places = [spans[w.start, w.stop] for w in stages.windows]
    labels = _patterns(values[stage_places], stages.windows)
    leading = [_leading(row) for row in values]
    num_samples = len(ids)
    if num_samples <= MAX_COLUMNS:
        kept = np.arange(num_samples)
    else:
        kept = np.unique(np.concatenate([np.concatenate([helps, harms]) for helps, harms in leading])).astype(int)
    place = {int(j): i for i, j in enumerate(kept)}
    order, groups = _order(values, labels)
    return {
        "ids": ids[kept].tolist(),
        "scores": [_rounded(row) for row in values[:, kept]],
        "patterns": [labels[j] for j in kept],
        "retrained": result.retrained[:, query].numpy()[:, kept].astype(int).tolist() if result.retrained.any() else None,
        "listed": [[[place[int(j)] for j in side] for side in sides] for sides in leading],
        "stages": stage_places,
        "heat": _heat(values, ids, order, groups, place),
        "limit": _number(np.nanmax(np.abs(values), initial=0.0) if np.isfinite(values).any() else 0.0),
        "noNumber": int((~np.isfinite(values)).any(0).sum()),
        "unvisited": int((values == 0).all(0).sum()),
    }


def pattern_facts(result: Influence, query: int) -> dict[str, Any] | None:
    """Shares, examples and the rule of the patterns; None where windows do not follow one another."""
    stages = analysis.stages(result)
    values = stages.scores[:, query].numpy()
    finite = np.isfinite(values).all(0)
    if len(stages.windows) < 2 or not finite.any():
        return None
    found = analysis.patterns(values[:, finite], windows=stages.windows)
    ids = result.sample_ids.numpy()[finite]
    rule = found.rule
    says = {
        "early": f"at least {rule.early:.0%} of the influence lies in the first third of the steps",
        "late": f"at least {rule.late:.0%} of it lies in the last third",
        "stable": "none of the others: about the same all the time",
        "fluctuating": f"the sign changes in {rule.sign_changes:.0%} of the windows, or the size varies by "
        f"{rule.variation:g} times its mean",
        "negligible": f"at most {rule.negligible:.0%} of the mean influence, or none",
    }
    rows = [
        {
            "name": name,
            "count": found.counts[name],
            "share": _number(found.shares[name]),
            "rule": says[name],
            "examples": [int(ids[j]) for j in found.of(name)[:3]],
            "curve": _rounded(found.mean_curves()[name]),
        }
        for name in analysis.PATTERNS
    ]
    return {"rows": rows, "windows": [w.name for w in stages.windows], "steps": [[w.start, w.stop] for w in stages.windows]}


def stage_facts(result: Influence, query: int) -> dict[str, Any] | None:
    """Correlation matrices of the windows by kind; None for fewer than two windows."""
    values = result.scores[:, query].numpy()
    finite = np.isfinite(values).all(0)
    size = len(values)
    if size < 2 or finite.sum() < 2:
        return None
    kinds: dict[str, Any] = {}
    left_out = 0
    for kind in ("kendall", "spearman", "pearson", "jaccard"):
        if kind == "kendall" and size * size / 2 * finite.sum() > MAX_KENDALL:
            continue
        try:
            found = analysis.stage_correlation(values[:, finite], kind)
        except ImportError:
            continue
        left_out = found.num_left_out
        kinds[kind] = {"matrix": [_rounded(row) for row in found.matrix], "mean": _number(found.mean), "k": found.k}
    return {"names": [w.name for w in result.windows], "kinds": kinds, "leftOut": left_out + int((~finite).sum())}


def detection_facts(result: Influence, query: int, corrupted: Any) -> dict[str, Any]:
    """Detection curves of every window's scores, most harmful first; corrupted: ids, or bool [N] in the result's order."""
    marked = _marked(result, corrupted)
    if not marked.any() or marked.all():
        raise ValueError("corrupted marks none or all of the samples scored: there is nothing to find")
    rows = []
    for window, row in zip(result.windows, result.scores[:, query].numpy(), strict=True):
        ranking = np.where(np.isfinite(row), analysis.suspicion(row), -np.inf)
        inspected, found = analysis.detection_curve(ranking, marked)
        at = np.linspace(0, 1, CURVE_POINTS)
        rows.append(
            {
                "name": window.name,
                "points": [[_number(x), _number(y)] for x, y in zip(at, np.interp(at, inspected, found), strict=True)],
                "auc": _number(analysis.detection_auc(ranking, marked)),
                "precision": _number(analysis.average_precision(ranking, marked)),
                "found": [_number(analysis.found_fraction(ranking, marked, share)) for share in (0.1, 0.2)],
            }
        )
    return {
        "count": int(marked.sum()),
        "share": _number(marked.mean()),
        "rows": rows,
        "ids": result.sample_ids.numpy()[marked].tolist(),
    }


def agreement_facts(result: Influence, retrained: Influence, query: int | str) -> list[dict[str, Any]]:
    """Agreement with true retraining, window by window."""
    rows = analysis.compare(result, retrained, query)
    names = ("window", "samples", "pearson", "spearman", "kendall", "top")
    return [{name: _number(row[name]) if isinstance(row[name], float) else row[name] for name in names} for row in rows]


def cost_facts(meta: Mapping[str, Any]) -> list[list[str]]:
    """Names and values of what the scores took and how they were made, as far as the result says."""
    rows: list[list[str]] = []

    def add(name: str, value: Any) -> None:
        if value is not None and value != "":
            rows.append([name, str(value)])

    add("time", f"{meta['seconds']:.3g} s" if "seconds" in meta else None)
    add("peak memory of the process", format_bytes(meta["peak_memory"]) if meta.get("peak_memory") else None)
    add("method", meta.get("method"))
    add("why this method", meta.get("why_method"))
    add("curvature (hessian)", meta.get("hessian"))
    add("query taken at", {"endpoint": "each window's ends", "final": "the end of the run"}.get(str(meta.get("query_at"))))
    add("backend", meta.get("backend"))
    add("why this backend", meta.get("why"))
    add("columns", meta.get("columns"))
    add("sweeps over the log", meta.get("sweeps"))
    add("models retrained", meta.get("models"))
    add("scores by true retraining", meta.get("refined"))
    add("time of these", f"{meta['refine_seconds']:.3g} s" if "refine_seconds" in meta else None)
    add("replayed", meta.get("replayed"))
    add("device and dtype", " ".join(str(meta[name]) for name in ("device", "dtype") if name in meta))
    add("versions", ", ".join(f"{name} {version}" for name, version in dict(meta.get("versions", {})).items()))
    add("log (sha256)", meta.get("log"))
    return rows


def _patterns(values: Array, windows: Sequence[Window]) -> list[str | None]:
    finite: Array = np.asarray(np.isfinite(values).all(axis=0))
    if len(windows) < 2:
        return [None if ok else NO_NUMBER for ok in finite]
    labels: Array = np.array([NO_NUMBER] * len(finite), dtype=object)
    labels[finite] = analysis.patterns(values[:, finite], windows=windows).labels
    return [str(label) for label in labels]


def _leading(row: Array) -> tuple[Array, Array]:
    """Places of the samples with the largest scores above 0 and with the smallest below, best first."""
    usable = np.nan_to_num(row, nan=0.0)
    helps = np.argsort(-usable, kind="stable")[:LISTED]
    harms = np.argsort(usable, kind="stable")[:LISTED]
    return helps[usable[helps] > 0], harms[usable[harms] < 0]


def _order(values: Array, labels: Sequence[str | None]) -> tuple[Array, list[dict[str, Any]]]:
    """Samples by pattern, and within one by the sum of their scores; the groups in that order."""
    totals = np.nansum(values, 0)
    names = [*analysis.PATTERNS, NO_NUMBER, None]
    rank = np.array([names.index(label) for label in labels], dtype=int)
    order = np.lexsort((totals, rank))
    groups = [{"name": name, "count": int((rank == i).sum())} for i, name in enumerate(names) if (rank == i).any()]
    return order, groups


def _heat(values: Array, ids: Array, order: Array, groups: list[dict[str, Any]], place: Mapping[int, int]) -> dict[str, Any]:
    if len(ids) <= MAX_COLUMNS:
        return {"groups": groups, "order": [place[int(j)] for j in order]}
    edges = np.linspace(0, len(order), BINS + 1).astype(int)
    ordered = values[:, order]
    # a bin shows its mean, and names the sample that stands out in it
    means, standouts = [], []
    for row in ordered:
        bins = [row[a:b] for a, b in pairwise(edges)]
        means.append(
            _rounded(np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in bins]))
        )
        largest = [a + int(np.argmax(np.nan_to_num(np.abs(part)))) for a, part in zip(edges, bins, strict=False)]
        standouts.append([[int(ids[order[i]]), _number(row[i])] for i in largest])
    return {"groups": groups, "edges": edges.tolist(), "means": means, "standouts": standouts}


def _marked(result: Influence, corrupted: Any) -> Array:
    given = np.asarray(corrupted)
    if given.dtype == bool:
        if given.shape != (len(result.sample_ids),):
            raise ValueError(
                f"corrupted must be ids, or bool [{len(result.sample_ids)}] in the order of the result's sample_ids"
            )
        return given
    unknown = sorted(set(given.tolist()) - set(result.sample_ids.tolist()))
    if unknown:
        raise ValueError(f"corrupted names sample {unknown[0]}, which was not scored")
    return np.isin(result.sample_ids.numpy(), given)


def _rounded(values: Array) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    """Four digits; None for NaN and infinity, which JSON has not."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
