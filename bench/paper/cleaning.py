"""What finding flipped labels is worth: drop the leading suspects, train again, look at the test accuracy.

    python -m bench.paper.cleaning

Runs of `detection`, of 21 epochs. As many samples are dropped as were flipped. Retraining repeats the log's own
batches and keeps every other sample's weight in them (`leave_one_out(groups=...)`). "random" drops as many at random, "true
flips" exactly the flipped ones: what can be had.
"""

import time
from typing import Any

import torch

import dit_fast as dit
from dit_fast.analysis import suspicion

from . import rivals, tables
from .datasets import load
from .detection import NUM_VAL, SAMPLES
from .runs import Run, chosen_rate, logged

FLIPS = (0.1, 0.2, 0.3)
RUNS = [("mnist", "mlp"), ("emnist", "mlp"), ("cifar", "mlp"), ("cifar", "cnn")]
DROPPED = ("nothing", "DIT, last third", "DIT, whole run", "training loss", "random", "true flips")


def groups_of(run: Run, flipped: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """The ids dropped by each rule, as many as were flipped."""
    number = int(flipped.sum())
    windows = {name: run.stages()[name] for name in ("last third", "whole run")}
    scores = rivals.exact(run, windows)
    with torch.no_grad():
        losses = rivals.losses(run, run.trajectory.params(run.trajectory.num_steps), run.split.x, run.split.y)
    rankings = {f"DIT, {name}": torch.from_numpy(suspicion(scores[i])) for i, name in enumerate(windows)}
    rankings |= {"training loss": losses, "random": torch.rand(len(flipped), generator=torch.Generator().manual_seed(seed))}
    found = {name: ranking.argsort(descending=True, stable=True)[:number] for name, ranking in rankings.items()}
    return found | {"true flips": flipped.nonzero()[:, 0]}


def measure(
    data: str, net: str, flips: float, seed: int, rate: float, samples: int = SAMPLES, **options: int
) -> list[dict[str, Any]]:
    """Test accuracy of one run after each way of cleaning, and the share of the dropped that was flipped."""
    split, flipped = load(data, seed, samples, min(samples, NUM_VAL)).with_flips(flips, seed)
    with logged(split, net, rate, seed, **options) as run:
        dropped = groups_of(run, flipped, seed)
        query = dit.queries.margin(split.x_test, split.y_test)  # above 0: the right side
        groups = list(dropped.values())
        found = dit.leave_one_out(run.trajectory, run.problem, query, groups=groups, show_progress=False)
        end = {name: value.double() for name, value in run.trajectory.params(run.trajectory.num_steps).items()}
        with torch.no_grad():
            outputs = torch.func.functional_call(run.model, end, (split.x_test.double(),)).squeeze(1)
    margins = (2 * split.y_test.double() - 1) * outputs
    after = margins[:, None] + found.scores[0]
    accuracy = {"nothing": margins > 0} | dict(zip(dropped, (after > 0).T, strict=True))
    same = {"data": data, "net": net, "flips": flips, "seed": seed}
    return [
        {
            **same,
            "dropped": name,
            "accuracy": float(right.double().mean()),
            "flipped among them": float(flipped[dropped[name]].double().mean()) if name in dropped else float("nan"),
        }
        for name, right in accuracy.items()
    ]


def report(rows: list[dict[str, Any]]) -> dict[str, str]:
    """A table for each figure."""
    return {
        "Test accuracy after dropping as many samples as were flipped, in per cent": table(rows, "accuracy", DROPPED, 1),
        "Flipped labels among the dropped, in per cent": table(rows, "flipped among them", DROPPED[1:], 0),
    }


def table(rows: list[dict[str, Any]], key: str, columns: tuple[str, ...], digits: int) -> str:
    """A line for each run and share of flips, a column for each way of cleaning."""
    lines = []
    for data, net, flips in dict.fromkeys((row["data"], row["net"], row["flips"]) for row in rows):
        of_run = [row for row in rows if (row["data"], row["net"], row["flips"]) == (data, net, flips)]
        cells = [tables.percent([row[key] for row in of_run if row["dropped"] == name], digits) for name in columns]
        lines.append([data, net, f"{flips:.0%}", *cells])
    return tables.markdown(["data", "net", "flipped", *columns], lines)


def main() -> None:
    arguments = tables.parser(__doc__, "digits, 64 samples, three epochs; written nowhere").parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for data, net in [("digits", "mlp"), ("digits", "cnn")] if arguments.quick else RUNS:
        for flips in FLIPS[-1:] if arguments.quick else FLIPS:
            for seed in range(arguments.seeds):
                if arguments.quick:
                    rows += measure(data, net, flips, seed, rate=0.3, samples=64, epochs=3)
                else:
                    rows += measure(data, net, flips, seed, chosen_rate(data, net, SAMPLES))
        print(f"{time.perf_counter() - began:6.0f} s  {data} {net}", flush=True)
    tables.finish("cleaning", began, arguments, rows, report)


if __name__ == "__main__":
    main()
