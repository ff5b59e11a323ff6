"""A run of 12 steps on 24 pictures of 4×4, and functions that the command line can name; some of them wrong on purpose."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dit_fast as dit

EPOCHS, SAMPLES, CLASSES = 4, 24, 3

_random = torch.Generator().manual_seed(0)
x, y = torch.rand(SAMPLES, 4, 4, generator=_random), torch.randint(CLASSES, (SAMPLES,), generator=_random)
x_val, y_val = torch.rand(10, 4, 4, generator=_random), torch.randint(CLASSES, (10,), generator=_random)
model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.GELU(), nn.Linear(5, CLASSES))
not_callable = 3


def make_problem() -> dit.Problem:
    return dit.Problem(model, nn.CrossEntropyLoss(reduction="none"), (x, y))


def make_query() -> dit.queries.Query:
    return dit.queries.loss(x_val, y_val)


def make_two_queries() -> list[dit.queries.Query]:
    return [dit.queries.loss(x_val, y_val), dit.queries.logit(x_val[:1], 0)]


def make_none() -> None:
    return None


def make_failure() -> None:
    raise KeyError("a key\nof two lines")


def record(path: Path) -> None:
    """Train from the same parameters as ever, logging at `path`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in (model[1], model[3]):
            layer.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    loader = DataLoader(dit.with_ids(TensorDataset(x, y)), 8, shuffle=True, generator=torch.Generator().manual_seed(0))
    with dit.Recorder(path, model, optimizer) as recorder:
        for epoch in range(EPOCHS):
            for ids, x_batch, y_batch in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x_batch), y_batch).backward()
                with recorder.step(ids):
                    optimizer.step()
            recorder.mark(f"epoch {epoch + 1}")


def scored(path: Path) -> dit.Influence:
    """The scores of the run logged at `path`, every epoch and the whole run."""
    run = dit.Trajectory.open(path)
    windows = {w.name: (w.start, w.stop) for w in run.windows("epochs")} | {"whole run": (0, run.num_steps)}
    return dit.score(run, make_problem(), make_query(), windows)
