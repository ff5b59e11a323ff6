"""Claim 2: how alike the influence of early, middle and late training is, and which samples matter when.

    python -m bench.paper.stages

The runs of `correlation`. Between windows: Spearman, Kendall's τ-b, and Jaccard of the tenth with the largest |score|. The
same Spearman from true retraining shows what belongs to the samples rather than to the estimate. Patterns over 21 epochs.
"""

import time
from typing import Any

import torch

import dit_fast as dit
from dit_fast.analysis import PATTERNS, patterns, stage_correlation

from . import tables
from .correlation import RUNS, SAMPLES, windows_of
from .datasets import load
from .runs import chosen_rate, logged

KINDS = ("spearman", "kendall", "jaccard")
PAIRS = [
    ("first third", "middle third"),
    ("middle third", "last third"),
    ("first third", "last third"),
    ("middle third", "whole run"),
    ("first epoch", "last epoch"),
]


def measure(data: str, net: str, seed: int, rate: float, samples: int = SAMPLES, **options: int) -> dict[str, Any]:
    """All correlations between stages and the share of each pattern in one run."""
    with logged(load(data, seed, samples, samples), net, rate, seed, **options) as run:
        windows = windows_of(run)
        arguments = (run.trajectory, run.problem, run.query)
        result = dit.score(*arguments, windows, show_progress=False)
        by_epoch = dit.score(*arguments, "epochs", show_progress=False)
        alike = {kind: stage_correlation(result, kind).matrix for kind in KINDS}
        if net != "cnn":  # whose retraining is not compiled
            true = dit.leave_one_out(*arguments, windows, show_progress=False)
            alike["spearman of retraining"] = stage_correlation(true, "spearman").matrix
        places = {name: i for i, name in enumerate(windows)}
        return {
            "data": data,
            "net": net,
            "seed": seed,
            "spearman of retraining": None,
            **{kind: {join(a, b): float(m[places[a], places[b]]) for a, b in PAIRS} for kind, m in alike.items()},
            "patterns": patterns(by_epoch).shares,
        }


def join(a: str, b: str) -> str:
    """The name of a pair of windows."""
    return f"{a} – {b}"


def report(rows: list[dict[str, Any]]) -> dict[str, str]:
    """A table for each kind of correlation, and the pattern shares."""
    pairs = [join(a, b) for a, b in PAIRS]
    titles = {
        "spearman": "Spearman correlation of DIT scores between stages",
        "spearman of retraining": "The same of true retraining without each sample",
        "kendall": "Kendall's τ-b of DIT scores between stages",
        "jaccard": "Jaccard of the top tenths by |score| (random: 0.05)",
    }
    found = {title: table(rows, kind, pairs) for kind, title in titles.items()}
    return found | {"Shares of patterns, in per cent": table(rows, "patterns", list(PATTERNS), tables.percent)}


def table(rows: list[dict[str, Any]], kind: str, columns: list[str], cell: Any = tables.spread) -> str:
    """A line for each run that has this kind of figure."""
    lines = []
    for data, net in dict.fromkeys((row["data"], row["net"]) for row in rows if row[kind]):
        of_run = [row[kind] for row in rows if (row["data"], row["net"]) == (data, net)]
        lines.append([data, net, *(cell([values[column] for values in of_run]) for column in columns)])
    return tables.markdown(["data", "net", *columns], lines)


def main() -> None:
    arguments = tables.parser(__doc__, "digits, 32 samples, three epochs; written nowhere").parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for data, net in [("digits", "mlp"), ("digits", "cnn")] if arguments.quick else RUNS:
        for seed in range(arguments.seeds):
            if arguments.quick:
                rows.append(measure(data, net, seed, rate=0.3, samples=32, epochs=3))
            else:
                rows.append(measure(data, net, seed, chosen_rate(data, net, SAMPLES)))
        print(f"{time.perf_counter() - began:6.0f} s  {data} {net}", flush=True)
    tables.finish("stages", began, arguments, rows, report)


if __name__ == "__main__":
    main()
