"""True retraining without each of 256 samples, against the loop one would write: the Adult run of tests/data, one thread.

    pytest bench/bench_retrain.py --benchmark-only

The plain loop is timed on NUM_PLAIN samples of the 256 and scaled. extra_info: ratio (its time over that of leave_one_out)
and both times for 256 samples; a ratio below REQUIRED_RATIO fails.
"""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dit_fast

DATA = Path(__file__).parents[1] / "tests" / "data" / "adult_logreg.npz"
NUM_PLAIN = 8
REQUIRED_RATIO = 5


class Adult:
    """The logged run, and the loop that repeats it without one sample."""

    def __init__(self, num_steps: int | None) -> None:
        with np.load(DATA) as file:
            arrays = {key: file[key] for key in file.files}
        self.x, self.y, self.x_val, self.y_val = (
            torch.from_numpy(arrays[key]) for key in ("x_train", "y_train", "x_val", "y_val")
        )
        self.batches = [torch.from_numpy(ids) for ids in arrays["batch_ids"][:num_steps]]
        self.lr, self.l2 = arrays["lr"][:num_steps].tolist(), float(arrays["alpha"])
        rows = {key.removeprefix("param:model."): value for key, value in arrays.items() if key.startswith("param:")}
        params = {name: value[: len(self.batches) + 1] for name, value in rows.items()}
        self.start = {name: torch.from_numpy(value[0]) for name, value in params.items()}
        self.trajectory = dit_fast.Trajectory.from_arrays(params, self.batches, self.lr, num_samples=256)
        self.problem = dit_fast.Problem(nn.Linear(62, 1), bce, (self.x, self.y), l2=self.l2)
        self.query = dit_fast.queries.loss(self.x_val, self.y_val)

    def all_at_once(self, sample_ids: list[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        result = dit_fast.leave_one_out(
            self.trajectory, self.problem, self.query, sample_ids=sample_ids, dtype=dtype, show_progress=False
        )
        return result.scores[0, 0]

    def plain_loss(self, left_out: int | None, dtype: torch.dtype = torch.float32) -> float:
        """Validation loss after training without a sample, every other one keeping its weight in the mean."""
        x, y = self.x.to(dtype), self.y.to(dtype)
        model = nn.Linear(62, 1).to(dtype)
        model.load_state_dict(self.start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for ids, lr in zip(self.batches, self.lr, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            kept = ids[ids != left_out] if left_out is not None else ids
            optimizer.zero_grad()
            penalty = 0.5 * self.l2 * sum(p.square().sum() for p in model.parameters())
            loss = (bce(model(x[kept]), y[kept]).sum() + len(kept) * penalty) / len(ids)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return float(bce(model(self.x_val.to(dtype)), self.y_val.to(dtype)).mean())

    def one_by_one(self, sample_ids: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        base = self.plain_loss(None, dtype)
        return torch.tensor([self.plain_loss(j, dtype) - base for j in sample_ids], dtype=torch.float64)


def bce(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), target, reduction="none")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bench_leave_one_out_of_adult(benchmark, one_thread):
    adult = Adult(num_steps=4 if benchmark.disabled else None)
    chosen = torch.cat(adult.batches).unique()[:: 256 // NUM_PLAIN][:NUM_PLAIN].tolist()
    expected = adult.one_by_one(chosen, torch.float64)
    assert expected.all()
    # one is the neighbour of the float32 run that was logged, the other of a float64 run from the same start
    assert (adult.all_at_once(chosen, torch.float64) - expected).abs().max() <= 1e-6 * expected.abs().max()
    # two float32 losses of 0.5 that are subtracted keep seven digits after the point
    assert (adult.all_at_once(chosen) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (adult.one_by_one(chosen) - expected).abs().max() <= 1e-6

    plain = []
    for _ in range(1 if benchmark.disabled else 3):
        start = time.perf_counter()
        adult.one_by_one(chosen)
        plain.append(time.perf_counter() - start)
    benchmark.pedantic(adult.all_at_once, rounds=1 if benchmark.disabled else 3)
    if benchmark.stats is None:  # --benchmark-disable: nothing was timed
        return
    # one_by_one trains the undisturbed model too
    plain_seconds = min(plain) / (NUM_PLAIN + 1) * 257
    ratio = plain_seconds / benchmark.stats.stats.min
    benchmark.extra_info.update(
        ratio=round(ratio, 1), seconds=round(benchmark.stats.stats.min, 3), plain_seconds=round(plain_seconds, 2)
    )
    assert ratio >= REQUIRED_RATIO
