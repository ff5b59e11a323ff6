"""Figures of scores. matplotlib is loaded here and nowhere else."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from dit_fast.analysis import detection_curve
from dit_fast.result import Influence

# of a heat map; the figure is about twice as many pixels wide
MAX_COLUMNS = 400


def heatmap(result: Influence, query: int = 0) -> Figure:
    """Windows × samples of one query, samples sorted by the sum of their scores; red helps a loss, blue harms it."""
    scores = result.scores[:, query].numpy()
    num_windows, num_samples = scores.shape
    order = np.argsort(scores.sum(0), kind="stable")
    # never more columns than pixels, which would show some samples and hide others
    edges = np.linspace(0, num_samples, min(num_samples, MAX_COLUMNS) + 1).astype(int)
    shown = np.add.reduceat(scores[:, order], edges[:-1], axis=1) / np.diff(edges)
    limit = float(np.abs(shown).max()) or 1.0
    figure = Figure(figsize=(9, 1.6 + 0.28 * num_windows), layout="constrained")
    axes = figure.subplots()
    norm = SymLogNorm(linthresh=limit / 100, vmin=-limit, vmax=limit)
    image = axes.pcolormesh(edges, np.arange(num_windows + 1) - 0.5, shown, cmap="RdBu_r", norm=norm)
    axes.invert_yaxis()
    axes.set_yticks(range(num_windows), [window.name for window in result.windows])
    mean = "" if len(edges) > num_samples else f"; a column is the mean of {np.diff(edges).max()} or fewer"
    if num_samples <= 24:
        axes.set_xticks(np.arange(num_samples) + 0.5, [str(int(result.sample_ids[j])) for j in order])
    unit = "samples" if result.groups is None else "groups"
    axes.set_xlabel(f"{num_samples} {unit}, lowest to highest sum of the rows{mean}")
    axes.set_title(f"Change of {result.queries[query]} when a sample is removed")
    # the ticks that the norm would choose overlap around 0
    decades = [10.0**k for k in range(math.ceil(math.log10(limit / 100)), math.floor(math.log10(limit)) + 1)]
    ticks = [*(-value for value in reversed(decades)), 0.0, *decades]
    bar = figure.colorbar(image, ax=axes, label="score (unit of the query)")
    bar.set_ticks(ticks, labels=[f"{value:.0e}" if value else "0" for value in ticks])
    bar.minorticks_off()
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
