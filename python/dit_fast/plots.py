"""Figures of scores. matplotlib is loaded here and nowhere else."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from dit_fast import curves as over_time
from dit_fast.correlation import stage_correlation
from dit_fast.curves import Curves
from dit_fast.detection import detection_curve
from dit_fast.patterns import PatternRule
from dit_fast.patterns import patterns as sort_by_pattern
from dit_fast.result import Influence

# of a heat map; the figure is about twice as many pixels wide
MAX_COLUMNS = 400
# windows up to which points are marked, named on a matrix's side, and written into its cells
MARKED, MAX_NAMES, MAX_NUMBERS = 30, 30, 12
# of a heat map: inches of its rows together, and rows with a name
MAX_HEIGHT, MAX_ROWS = 9.0, 40
# of a legend beside a figure: lines in a column
LEGEND_LINES = 14
PATTERN_COLOURS = {"early": "C0", "late": "C1", "stable": "C2", "fluctuating": "C3", "negligible": "0.7"}


def heatmap(result: Influence, query: int | str = 0) -> Figure:
    """Windows × samples of one query, samples sorted by the sum of their scores; red helps a loss, blue harms it."""
    query = result.query_index(query)
    scores = result.scores[:, query].numpy()
    num_windows, num_samples = scores.shape
    order = np.argsort(scores.sum(0), kind="stable")
    # never more columns than pixels, which would show some samples and hide others
    edges = np.linspace(0, num_samples, min(num_samples, MAX_COLUMNS) + 1).astype(int)
    shown = np.add.reduceat(scores[:, order], edges[:-1], axis=1) / np.diff(edges)
    limit = float(np.abs(shown).max()) or 1.0
    figure = Figure(figsize=(9, 2.0 + min(0.28 * num_windows, MAX_HEIGHT)), layout="constrained")
    axes = figure.subplots()
    norm = SymLogNorm(linthresh=limit / 100, vmin=-limit, vmax=limit)
    image = axes.pcolormesh(edges, np.arange(num_windows + 1) - 0.5, shown, cmap="RdBu_r", norm=norm)
    axes.invert_yaxis()
    every = math.ceil(num_windows / MAX_ROWS)
    axes.set_yticks(range(0, num_windows, every), [window.name for window in result.windows[::every]])
    mean = "" if len(edges) > num_samples else f"; a column is the mean of {np.diff(edges).max()} or fewer"
    if num_samples <= 24:
        axes.set_xticks(np.arange(num_samples) + 0.5, [str(int(result.sample_ids[j])) for j in order])
    unit = "sample" if result.groups is None else "group"
    axes.set_xlabel(f"{_counted(num_samples, unit)}, lowest to highest sum of the rows{mean}")
    axes.set_title(f"Change of {result.queries[query]} when a sample is removed")
    # the ticks that the norm would choose overlap around 0
    decades = [10.0**k for k in range(math.ceil(math.log10(limit / 100)), math.floor(math.log10(limit)) + 1)]
    ticks = [*(-value for value in reversed(decades)), 0.0, *decades]
    bar = figure.colorbar(image, ax=axes, label="score (unit of the query)")
    bar.set_ticks(ticks, labels=[f"{value:.0e}" if value else "0" for value in ticks])
    bar.minorticks_off()
    return figure


def curves(result: Influence, query: int | str = 0, k: int = 5, *, sample_ids: Any = None, cumulative: bool = False) -> Figure:
    """The k most helpful (red) and k most harmful (blue) samples by the sum over windows, or `sample_ids`, over the steps."""
    found = over_time.curves(result, query, cumulative=cumulative)
    helpful, harmful = _chosen(found, k, sample_ids)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    marker = "o" if len(found.windows) <= MARKED else ""
    for ids, colours in ((helpful, "Reds"), (harmful, "Blues")):
        shades = colormaps[colours](np.linspace(0.9, 0.45, max(len(ids), 1)))
        for j, colour in zip(ids, shades, strict=False):
            axes.plot(found.positions, found.of(j), marker=marker, markersize=4, color=colour, label=str(j))
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set(xlabel="step", ylabel="score, summed up to there" if cumulative else "score in a window")
    axes.set_xlim(found.windows[0].start, found.windows[-1].stop)
    axes.set_title(f"Change of {found.query} when a sample is removed")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.grid(alpha=0.3)
    if helpful or harmful:
        columns = math.ceil(len(axes.get_legend_handles_labels()[0]) / LEGEND_LINES)
        unit = "sample" if result.groups is None else "group"
        axes.legend(title=unit, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, ncols=columns)
    else:
        axes.text(0.5, 0.6, "every score is 0", transform=axes.transAxes, ha="center", color="0.4")
    return figure


def patterns(result: Influence, query: int | str = 0, *, rule: PatternRule | None = None) -> Figure:
    """The share of each pattern of influence over time, and where in the run its samples' influence lies, on average."""
    found = sort_by_pattern(result, query, rule=rule)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    names = list(found.shares)
    bars = left.barh(names, [100 * share for share in found.shares.values()], color=[PATTERN_COLOURS[n] for n in names])
    left.bar_label(bars, [f"{share:.1%} ({found.counts[n]:,})" for n, share in found.shares.items()], padding=3)
    left.invert_yaxis()
    # room for the numbers behind the longest bar
    left.set(xlabel="share of samples (%)", xlim=(0, 180 * max(*found.shares.values(), 0.01)))
    left.set_xticks([tick for tick in left.get_xticks() if tick <= 100])
    left.set_title(_counted(len(found.labels), "sample" if result.groups is None else "group"))
    marker = "o" if len(found.curves.windows) <= MARKED else ""
    for name, curve in found.mean_curves().items():
        if found.counts[name] and name != "negligible":
            right.plot(found.curves.midpoints, 100 * curve, marker=marker, color=PATTERN_COLOURS[name], label=name)
    right.set_xlim(found.curves.windows[0].start, found.curves.windows[-1].stop)
    right.set(xlabel="step", ylabel="share of a sample's |influence| (%)", ylim=(0, None))
    right.set_title("When it matters, on average")
    right.grid(alpha=0.3)
    if right.lines:
        right.legend()
    figure.suptitle(f"Patterns of influence on {found.curves.query}")
    return figure


def stages(result: Influence, kind: str = "kendall", query: int | str = 0, *, k: int | None = None) -> Figure:
    """The correlation between the scores of any two windows, as a matrix; constant windows are left grey."""
    found = stage_correlation(result, kind, query, k=k)
    size = len(found.names)
    side = min(max(4.0, 0.42 * size + 2.4), 11.0)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    low = 0.0 if kind == "jaccard" else -1.0
    image = axes.imshow(found.matrix, vmin=low, vmax=1, cmap="viridis" if kind == "jaccard" else "RdBu_r")
    every = math.ceil(size / MAX_NAMES)
    places, names = range(0, size, every), found.names[::every]
    axes.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, names)
    if size <= MAX_NUMBERS:
        for (i, j), value in np.ndenumerate(found.matrix):
            dark = abs(value) > 0.6 if kind != "jaccard" else value < 0.5
            text = "–" if np.isnan(value) else f"{value:.2f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    label = {"kendall": "Kendall's τ", "spearman": "Spearman's ρ", "pearson": "Pearson's r"}.get(
        kind, f"Jaccard of top {found.k}"
    )
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    unit = "sample" if result.groups is None else "group"
    left_out = f", {found.num_left_out:,} left out that are 0 everywhere" if found.num_left_out else ""
    name = result.queries[result.query_index(query)]
    axes.set_title(f"Scores of {name}, window against window\n{_counted(found.num_samples, unit)}{left_out}", fontsize=11)
    return figure


def detection(rankings: Mapping[str, Any], corrupted: Any) -> Figure:
    """Share of the corrupted samples found against share inspected, one line per ranking, with the random diagonal."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, ranking in rankings.items():
        inspected, found = detection_curve(ranking, corrupted)
        axes.plot(100 * inspected, 100 * found, label=name)
    axes.plot([0, 100], [0, 100], color="0.6", linestyle=":", label="random (expected)")
    axes.set(xlabel="samples inspected (%)", ylabel="flipped labels found (%)", xlim=(0, 100), ylim=(0, 101))
    axes.set_title("Finding flipped labels")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def agreement(pairs: Mapping[str, tuple[Any, Any]]) -> Figure:
    """Score against the true change by retraining, one panel per window, with the line on which they are equal."""
    figure = Figure(figsize=(4 * len(pairs), 4.2), layout="constrained")
    for axes, (name, (scores, truth)) in zip(np.atleast_1d(figure.subplots(1, len(pairs))), pairs.items(), strict=True):
        scores, truth = np.asarray(scores), np.asarray(truth)
        ends = [min(scores.min(), truth.min()), max(scores.max(), truth.max())]
        axes.plot(ends, ends, color="0.6", linestyle=":", label="equal")
        axes.scatter(truth, scores, s=14, alpha=0.8)
        axes.set(xlabel="true change by retraining", ylabel="score", title=name, aspect="equal", box_aspect=1)
        axes.locator_params(nbins=5)
        axes.ticklabel_format(style="sci", scilimits=(-2, 2))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    return figure


def _chosen(found: Curves, k: int, sample_ids: Any) -> tuple[list[int], list[int]]:
    """The ids shown as helpful and as harmful, the largest of each first; a sum of 0 is neither, but shown if asked for."""
    last = found.values[-1] if found.cumulative else found.values.sum(0)
    places = np.arange(len(last))
    if sample_ids is not None:
        wanted = np.atleast_1d(np.asarray(sample_ids)).tolist()
        for j in wanted:
            found.of(j)
        places = np.flatnonzero(np.isin(found.sample_ids, wanted))
        k = len(places)
    is_helpful = last[places] >= 0 if sample_ids is not None else last[places] > 0
    helpful, harmful = places[is_helpful], places[last[places] < 0]
    helpful = helpful[np.argsort(-last[helpful], kind="stable")][:k]
    harmful = harmful[np.argsort(last[harmful], kind="stable")][:k]
    return found.sample_ids[helpful].tolist(), found.sample_ids[harmful].tolist()


def _counted(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'s' * (count != 1)}"
