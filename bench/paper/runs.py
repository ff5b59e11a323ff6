"""One logged training run, as every script here makes it: SGD, batch 64, 21 epochs, mean loss, a constant rate."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import dit_fast as dit

from . import nets, tables
from .datasets import Split

EPOCHS, BATCH = 21, 64


@dataclass(frozen=True)
class Run:
    """A finished run and what it is asked: the mean loss on the validation samples."""

    split: Split
    model: nn.Module
    trajectory: dit.Trajectory
    problem: dit.Problem
    query: dit.queries.Query

    @property
    def epochs(self) -> list[int]:
        """The steps at which an epoch begins, and the end of the run."""
        spans = self.trajectory.windows("epochs")
        return [0, *(span.stop for span in spans)]

    def stages(self) -> dict[str, tuple[int, int]]:
        """The first, middle and last third of the epochs, and the whole run, in steps."""
        ends = self.epochs
        num_epochs = len(ends) - 1
        cut = [ends[round(part * num_epochs / 3)] for part in range(4)]
        thirds = dict(zip(("first third", "middle third", "last third"), pairwise(cut), strict=True))
        return {**thirds, "whole run": (0, ends[-1])}


@contextmanager
def logged(split: Split, net: str, rate: float, seed: int, epochs: int = EPOCHS) -> Iterator[Run]:
    """Trains and logs in a temporary folder that lives as long as the `with` block."""
    model = nets.build(net, split.x.shape[1:], seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with tempfile.TemporaryDirectory() as folder:
        with dit.Recorder(Path(folder) / "log", model, optimizer, num_samples=len(split.y)) as recorder:
            for epoch, batches in enumerate(batches_of(len(split.y), seed, epochs)):
                for ids in batches:
                    backward(model, optimizer, split, ids)
                    with recorder.step(ids):
                        optimizer.step()
                recorder.mark(f"epoch {epoch + 1}")
        trajectory = dit.Trajectory.open(Path(folder) / "log")
        problem = dit.Problem(model, nets.bce, (split.x, split.y))
        yield Run(split, model, trajectory, problem, dit.queries.loss(split.x_val, split.y_val))


def batches_of(num_samples: int, seed: int, epochs: int) -> Iterator[tuple[Tensor, ...]]:
    """For each epoch its batches of sample ids, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield torch.randperm(num_samples, generator=generator).split(BATCH)


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, split: Split, ids: Tensor) -> None:
    """The gradient of the mean loss of a batch."""
    optimizer.zero_grad()
    nets.bce(model(split.x[ids]), split.y[ids]).mean().backward()


def chosen_rate(data: str, net: str, num_train: int) -> float:
    """The rate that `rates.py` chose by training accuracy, before any score was computed."""
    for row in tables.read("rates")["rows"]:
        if (row["data"], row["net"], row["samples"]) == (data, net, num_train):
            return float(row["chosen"])
    raise ValueError(f"no rate for {data} {net} with {num_train} samples: run python -m bench.paper.rates")
