"""Figures of scores. matplotlib is loaded here and nowhere else."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from dit_fast.analysis import detection_curve
from dit_fast.result import Influence


def heatmap(result: Influence, query: int = 0) -> Figure:
    """Windows × samples of one query, samples sorted by the sum of their scores; red helps a loss, blue harms it."""
    scores = result.scores[:, query].numpy()
    order = np.argsort(scores.sum(0), kind="stable")
    limit = float(np.abs(scores).max()) or 1.0
    figure = Figure(figsize=(9, 1.6 + 0.28 * len(scores)), layout="constrained")
    axes = figure.subplots()
    norm = SymLogNorm(linthresh=limit / 100, vmin=-limit, vmax=limit)
    image = axes.imshow(scores[:, order], aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(scores)), [window.name for window in result.windows])
    axes.set_xlabel("training samples, from most harmful to most helpful over all windows shown")
    axes.set_title(f"Influence on {result.queries[query]}: change when the sample is removed")
    figure.colorbar(image, ax=axes, label="score (unit of the query)")
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
    figure = Figure(figsize=(4 * len(pairs), 4), layout="constrained")
    for axes, (name, (scores, truth)) in zip(np.atleast_1d(figure.subplots(1, len(pairs))), pairs.items(), strict=True):
        scores, truth = np.asarray(scores), np.asarray(truth)
        ends = [min(scores.min(), truth.min()), max(scores.max(), truth.max())]
        axes.plot(ends, ends, color="0.6", linestyle=":")
        axes.scatter(truth, scores, s=14, alpha=0.8)
        axes.set(xlabel="true change by retraining", ylabel="score", title=name)
        axes.ticklabel_format(style="sci", scilimits=(-2, 2))
        axes.grid(alpha=0.3)
    return figure
