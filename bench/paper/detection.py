"""Claim 3: flipped labels found by inspecting the samples with the lowest scores first, window by window.

    python -m bench.paper.detection

768 training samples of which 4, 10, 20 or 30 % have a flipped label, 256 clean validation samples, batch 64, 21 epochs;
the MLP also trains five times as long, to be further in its convergence. Beside DIT with the query at each window's ends
and, as in the paper's code, at the end of the run: TracIn, and the training loss at the end of the run. "best window" is
the best of three thirds and, for the MLP, six sixths, chosen knowing the flips: a bound.
"""

import time
from itertools import pairwise
from typing import Any

import torch

from dit_fast.analysis import detection_table, suspicion

from . import nets, rivals, tables
from .datasets import load
from .runs import EPOCHS, Run, chosen_rate, logged

SAMPLES, NUM_VAL = 768, 256
FLIPS = (0.04, 0.1, 0.2, 0.3)
RUNS = [
    (data, net, epochs)
    for data in ("mnist", "emnist", "cifar")
    for net, epochs in (("mlp", EPOCHS), ("mlp", 5 * EPOCHS), ("cnn", EPOCHS))
]
SHOWN = {
    "DIT, first third": "first third",
    "DIT, middle third": "middle third",
    "DIT, last third": "last third",
    "DIT, whole run": "whole run",
    "DIT, best window": "best window",
    "official, last third": "official: last third",
    "TracIn, whole run": "TracIn: whole run",
    "training loss": "training loss",
    "random (expected)": "random",
}


def rankings_of(run: Run, sixths: bool = True) -> dict[str, Any]:
    """Samples to be inspected, the largest values first; windows of a sixth of the run where `sixths`."""
    stages, ends = run.stages(), run.epochs
    cut = [ends[round(part * (len(ends) - 1) / 6)] for part in range(7)] if sixths else []
    parts = {f"sixth {i + 1}": span for i, span in enumerate(pairwise(cut)) if span[0] < span[1]}
    found = {}
    for name, method, windows in (
        ("DIT", rivals.exact, stages | parts),
        ("official", rivals.official, {"last third": stages["last third"]}),  # of the whole run it is the same
        ("TracIn", rivals.tracin, {"whole run": stages["whole run"]}),
    ):
        scores = method(run, windows)
        found |= {f"{name}, {window}": suspicion(scores[i]) for i, window in enumerate(windows)}
    end = run.trajectory.params(run.trajectory.num_steps)
    with torch.no_grad():
        found["training loss"] = rivals.losses(run, end, run.split.x, run.split.y).numpy()
    return found


def measure(
    data: str, net: str, epochs: int, flips: float, seed: int, rate: float, samples: int = SAMPLES
) -> list[dict[str, Any]]:
    """How well every ranking finds the flipped labels of one run."""
    split, flipped = load(data, seed, samples, min(samples, NUM_VAL)).with_flips(flips, seed)
    with logged(split, net, rate, seed, epochs) as run:
        found = detection_table(rankings_of(run, sixths=net != "cnn"), flipped.numpy(), inspected=(flips, 2 * flips))
        fitted = float(fitted_share(run))
    rows = [
        {
            "ranking": row["ranking"],
            "found at 1×": row["found"][flips],
            "found at 2×": row["found"][2 * flips],
            "auc": row["auc"],
            "average precision": row["average_precision"],
        }
        for row in found
    ]
    windows = [row for row in rows if row["ranking"].startswith("DIT") and "whole" not in row["ranking"]]
    rows.append(max(windows, key=lambda row: row["found at 1×"]) | {"ranking": "DIT, best window"})
    same = {"data": data, "net": net, "epochs": epochs, "flips": flips, "seed": seed, "fitted": fitted}
    return [same | row for row in rows if row["ranking"] in SHOWN]


def fitted_share(run: Run) -> torch.Tensor:
    """The share of training labels, flipped ones included, that the model has at the end of the run."""
    run.model.load_state_dict(run.trajectory.params(run.trajectory.num_steps))
    return nets.accuracy(run.model, run.split.x, run.split.y)


def report(rows: list[dict[str, Any]]) -> dict[str, str]:
    """A table for each figure."""
    return {
        "Flipped labels found when as many samples are inspected as were flipped, mean over shares and seeds": by_run(rows),
        "Flipped labels found when as many samples are inspected as were flipped, in per cent": table(rows, "found at 1×"),
        "Flipped labels found when twice as many are inspected, in per cent": table(rows, "found at 2×"),
        "Area under the ROC curve, in per cent": table(rows, "auc"),
        "Average precision, in per cent": table(rows, "average precision"),
    }


def table(rows: list[dict[str, Any]], key: str) -> str:
    """A line for each run and share of flips, a column for each ranking."""
    lines = []
    for case in dict.fromkeys(case_of(row) for row in rows):
        of_run = [row for row in rows if case_of(row) == case]
        data, net, epochs, flips = case
        fitted = tables.percent([row["fitted"] for row in of_run if row["ranking"] == "training loss"])
        cells = [tables.percent([row[key] for row in of_run if row["ranking"] == ranking]) for ranking in SHOWN]
        lines.append([data, net, str(epochs), f"{flips:.0%}", fitted, *cells])
    return tables.markdown(["data", "net", "epochs", "flipped", "fitted", *SHOWN.values()], lines)


def by_run(rows: list[dict[str, Any]]) -> str:
    """A line for each data set and net, in per cent."""
    lines = []
    for case in dict.fromkeys(case_of(row)[:3] for row in rows):
        of_run = [row for row in rows if case_of(row)[:3] == case]
        means = [tables.mean([row["found at 1×"] for row in of_run if row["ranking"] == ranking]) for ranking in SHOWN]
        lines.append([*map(str, case), *(f"{100 * mean:.0f}" for mean in means)])
    return tables.markdown(["data", "net", "epochs", *SHOWN.values()], lines)


def case_of(row: dict[str, Any]) -> tuple[str, str, int, float]:
    """What is the same for all seeds and rankings."""
    return row["data"], row["net"], row["epochs"], row["flips"]


def main() -> None:
    arguments = tables.parser(__doc__, "digits, 64 samples, three epochs; written nowhere").parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for data, net, epochs in [("digits", "mlp", 3), ("digits", "cnn", 3)] if arguments.quick else RUNS:
        for flips in FLIPS[1::2] if arguments.quick else FLIPS:
            for seed in range(arguments.seeds):
                if arguments.quick:
                    rows += measure(data, net, epochs, flips, seed, rate=0.3, samples=64)
                else:
                    rows += measure(data, net, epochs, flips, seed, chosen_rate(data, net, SAMPLES))
        print(f"{time.perf_counter() - began:6.0f} s  {data} {net} {epochs}", flush=True)
    tables.finish("detection", began, arguments, rows, report)


if __name__ == "__main__":
    main()
