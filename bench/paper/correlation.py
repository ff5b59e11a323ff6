"""Claim 1: scores against true retraining, for each data set, net and window, beside what else there is.

    python -m bench.paper.correlation

256 training and 256 validation samples, batch 64, 21 epochs, SGD: the sizes of the paper's code. Truth: retraining without
each sample (CNN: without each of 64 at random). Windows: thirds of the run, the whole, and single epochs as in that code.
"""

import time
from typing import Any

import torch

from dit_fast import leave_one_out
from dit_fast.analysis import agreement

from . import rivals, tables
from .datasets import load
from .runs import Run, chosen_rate, logged

SAMPLES = 256
RETRAINED_CNN = 64
RUNS = [
    *((data, net) for data in ("adult", "news") for net in ("logreg", "mlp", "mlp-gelu")),
    *((data, net) for data in ("mnist", "emnist") for net in ("logreg", "mlp", "mlp-gelu", "cnn")),
]
METHODS = [*rivals.WINDOWED, *(f"influence function, damping {damping:g}" for damping in rivals.DAMPING)]
SHOWN = ("first third", "middle third", "last third", "whole run")


def windows_of(run: Run) -> dict[str, tuple[int, int]]:
    """Thirds, the whole, and the first, the middle and the last epoch."""
    ends = run.epochs
    number = len(ends) - 1
    epochs = {"first epoch": 0, "middle epoch": number // 2, "last epoch": number - 1}
    return {**run.stages(), **{name: (ends[i], ends[i + 1]) for name, i in epochs.items()}}


def measure(data: str, net: str, seed: int, rate: float, samples: int = SAMPLES, **options: int) -> list[dict[str, Any]]:
    """Agreement with retraining of every method in every window of one run."""
    rows = []
    with logged(load(data, seed, samples, samples), net, rate, seed, **options) as run:
        windows = windows_of(run)
        number = min(samples, RETRAINED_CNN) if net == "cnn" else samples
        chosen = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))[:number].sort().values
        true = leave_one_out(run.trajectory, run.problem, run.query, windows, sample_ids=chosen, show_progress=False)
        found = {name: method(run, windows) for name, method in rivals.WINDOWED.items()}
        for damping in rivals.DAMPING:  # the same for all windows
            scores = rivals.influence_function(run, damping)
            found[f"influence function, damping {damping:g}"] = scores.expand(len(windows), -1)
        for method, scores in found.items():
            for i, window in enumerate(windows):
                values = agreement(scores[i, chosen].numpy(), true.scores[i, 0].numpy())
                kept = {key: values[key] for key in ("pearson", "spearman")}
                rows.append({"data": data, "net": net, "seed": seed, "method": method, "window": window, **kept})
    return rows


def report(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The tables: Pearson and Spearman in the thirds and the whole, and Pearson in single epochs."""
    epochs = ("first epoch", "middle epoch", "last epoch")
    return {
        "Pearson correlation with retraining by net: mean over data sets (lowest – highest mean of one)": by_net(rows),
        "Pearson correlation with retraining": table(rows, "pearson", SHOWN),
        "Spearman correlation with retraining": table(rows, "spearman", SHOWN),
        "Pearson correlation with retraining, single epochs": table(rows, "pearson", epochs),
    }


def table(rows: list[dict[str, Any]], key: str, windows: tuple[str, ...]) -> str:
    """A line for each run and method; of the influence function the damping that does best over the whole run."""
    lines = []
    for data, net in dict.fromkeys((row["data"], row["net"]) for row in rows):
        of_run = [row for row in rows if (row["data"], row["net"]) == (data, net)]
        for method in (*rivals.WINDOWED, best_damping(of_run, key)):
            cells = [[r[key] for r in of_run if (r["method"], r["window"]) == (method, window)] for window in windows]
            lines.append([data, net, method, *map(tables.spread, cells)])
    return tables.markdown(["data", "net", "method", *windows], lines)


def by_net(rows: list[dict[str, Any]]) -> str:
    """A line for each net and method, of means over seeds."""
    lines = []
    for net in dict.fromkeys(row["net"] for row in rows):
        of_net = [row for row in rows if row["net"] == net]
        runs = [[row for row in of_net if row["data"] == data] for data in dict.fromkeys(row["data"] for row in of_net)]
        for method in (*rivals.WINDOWED, "influence function"):
            cells = []
            for window in SHOWN:
                means = []
                for of_run in runs:
                    name = best_damping(of_run, "pearson") if method == "influence function" else method
                    means.append(tables.mean([r["pearson"] for r in of_run if (r["method"], r["window"]) == (name, window)]))
                cells.append(f"{sum(means) / len(means):.2f} ({min(means):.2f} – {max(means):.2f})")
            lines.append([net, method, *cells])
    return tables.markdown(["net", "method", *SHOWN], lines)


def best_damping(rows: list[dict[str, Any]], key: str) -> str:
    """The influence function that does best over the whole run."""
    return max(METHODS[-len(rivals.DAMPING) :], key=lambda method: total(rows, method, key))


def total(rows: list[dict[str, Any]], method: str, key: str) -> float:
    """The sum over seeds in the whole run, NaN as 0."""
    values = [row[key] for row in rows if (row["method"], row["window"]) == (method, "whole run")]
    return sum(value for value in values if value is not None and value == value)


def main() -> None:
    arguments = tables.parser(__doc__, "digits, 32 samples, three epochs; written nowhere").parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for data, net in [("digits", "mlp"), ("digits", "cnn")] if arguments.quick else RUNS:
        for seed in range(arguments.seeds):
            if arguments.quick:
                rows += measure(data, net, seed, rate=0.3, samples=32, epochs=3)
            else:
                rows += measure(data, net, seed, chosen_rate(data, net, SAMPLES))
        print(f"{time.perf_counter() - began:6.0f} s  {data} {net}", flush=True)
    tables.finish("correlation", began, arguments, rows, report)


if __name__ == "__main__":
    main()
