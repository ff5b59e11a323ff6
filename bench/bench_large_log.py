"""A log of a net of 10 million parameters over 1,000 steps that stays under 2 GB: factors projected to 16, no parameters but
at the ends of chunks. Then scores from the log alone, and an index of it.

    OMP_NUM_THREADS=1 pytest bench/bench_large_log.py --benchmark-only

extra_info: parameters, steps, bytes of the log, bytes that the parameters of every step would have taken, bytes per step,
seconds of training with and without logging, and of a score of 4 windows (the benchmark's own time).
"""

import time

import pytest
import torch
from torch import nn

import dit_fast as dit


def net(width):
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


class Run:
    """The same training, logged or not."""

    def __init__(self, width, steps, batch):
        generator = torch.Generator().manual_seed(0)
        self.width, self.steps, self.num_samples = width, steps, 4 * batch
        self.x = torch.randn(self.num_samples, 784, generator=generator)
        self.y = (self.x[:, :10] + 0.1 * torch.randn(self.num_samples, 10, generator=generator)).argmax(1)
        self.batches = [torch.randint(self.num_samples, (batch,), generator=generator) for _ in range(steps)]

    def train(self, path=None):
        """(model, seconds)"""
        torch.manual_seed(0)
        model = net(self.width)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        factors = dit.FactorOptions(project=16, per_sample_loss=nn.CrossEntropyLoss(reduction="none"))
        query = dit.queries.loss(self.x[:16], self.y[:16])
        began = time.perf_counter()
        recorder = path and dit.Recorder(path, model, optimizer, num_samples=self.num_samples, factors=factors, every=512)
        for step, ids in enumerate(self.batches):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(self.x[ids]), self.y[ids]).backward()
            if recorder:
                with recorder.step(ids):
                    optimizer.step()
                if (step + 1) % (self.steps // 4) == 0:
                    recorder.mark(f"quarter {4 * (step + 1) // self.steps}", query=query)
            else:
                optimizer.step()
        if recorder:
            recorder.close()
        return model, time.perf_counter() - began


@pytest.mark.benchmark(group="a log of 10 million parameters")
def bench_score_of_a_large_log(benchmark, tmp_path):
    is_timed = benchmark.enabled
    run = Run(2000, 1000, 32) if is_timed else Run(64, 8, 4)
    model, plain = run.train()
    _, logging = run.train(tmp_path / "log")
    size = sum(file.stat().st_size for file in (tmp_path / "log").iterdir())
    num_parameters = sum(p.numel() for p in model.parameters())
    trajectory = dit.Trajectory.open(tmp_path / "log")
    result = benchmark.pedantic(
        lambda: dit.score(trajectory, hessian="fisher", windows="epochs", show_progress=False), rounds=3 if is_timed else 1
    )
    assert result.scores.shape == (4, 1, run.num_samples) and (result.scores != 0).any()
    index = trajectory.index("epochs", hessian="fisher")
    began = time.perf_counter()
    again = index.score()
    seconds = time.perf_counter() - began
    assert (again.scores - result.scores).abs().max() <= 1e-4 * result.scores.abs().max()
    if is_timed:
        assert num_parameters > 9.5e6 and size < 2e9
    benchmark.extra_info.update(
        parameters=num_parameters,
        steps=run.steps,
        log_bytes=size,
        all_parameters_bytes=4 * num_parameters * (run.steps + 1),
        bytes_per_step=size // run.steps,
        training_seconds=round(plain, 2),
        logged_training_seconds=round(logging, 2),
        query_from_index_seconds=round(seconds, 5),
    )
