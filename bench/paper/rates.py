"""Chooses the learning rate of every run by training accuracy alone, before any score is computed.

    python -m bench.paper.rates

Rule: the smallest rate of RATES whose training accuracy after 21 epochs, on clean labels, mean over the seeds, is within
five points of the best, which keeps away from rates that fit label noise or hardly converge. All other scripts read
results/rates.json.
"""

import time
from typing import Any

import torch

from . import nets, tables
from .datasets import load
from .runs import EPOCHS, backward, batches_of

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
NUM_VAL = 256
# data, nets, training samples
RUNS = [
    ("adult", ("logreg", "mlp", "mlp-gelu"), 256),
    ("news", ("logreg", "mlp", "mlp-gelu"), 256),
    ("mnist", nets.NETS, 256),
    ("emnist", nets.NETS, 256),
    ("mnist", ("mlp", "cnn"), 768),
    ("emnist", ("mlp", "cnn"), 768),
    ("cifar", ("mlp", "cnn"), 768),
]


def training_accuracy(data: str, net: str, num_train: int, rate: float, seed: int, epochs: int = EPOCHS) -> float:
    """On the training samples, after a run without a log."""
    split = load(data, seed, num_train, min(num_train, NUM_VAL))
    model = nets.build(net, split.x.shape[1:], seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for batches in batches_of(num_train, seed, epochs):
        for ids in batches:
            backward(model, optimizer, split, ids)
            optimizer.step()
    return float(nets.accuracy(model, split.x, split.y))


def choose(means: dict[float, float]) -> float:
    """The smallest rate within five points of the best."""
    return min(rate for rate, mean in means.items() if mean >= max(means.values()) - 0.05)


def report(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The table."""
    rates = list(rows[0]["accuracy"])
    lines = [
        [row["data"], row["net"], str(row["samples"]), *(f"{row['accuracy'][r]:.1%}" for r in rates), f"{row['chosen']:g}"]
        for row in rows
    ]
    return {"Training accuracy by learning rate": tables.markdown(["data", "net", "samples", *rates, "chosen"], lines)}


def main() -> None:
    arguments = tables.parser(__doc__, "two rates on digits, written nowhere").parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rates = (0.03, 0.3) if arguments.quick else RATES
    rows: list[dict[str, Any]] = []
    for data, names, samples in [("digits", nets.NETS, 64)] if arguments.quick else RUNS:
        for net in names:
            found = {r: [training_accuracy(data, net, samples, r, s) for s in range(arguments.seeds)] for r in rates}
            means = {rate: sum(values) / len(values) for rate, values in found.items()}
            rows.append(
                {
                    "data": data,
                    "net": net,
                    "samples": samples,
                    "chosen": choose(means),
                    "accuracy": {f"{r:g}": m for r, m in means.items()},
                }
            )
            print(rows[-1], flush=True)
    tables.finish("rates", began, arguments, rows, report)


if __name__ == "__main__":
    main()
