"""What logging costs the training loop: a 1-million-parameter MLP at batch 512 on one thread, with and without a Recorder."""

import json
import os
import shutil
import statistics
import time

import pytest
import torch
from torch import nn

import dit_fast as dit

STEPS = 48


class Loop:
    """The plain training loop, each step in front of whatever logs it."""

    def __init__(self, quick):
        torch.manual_seed(0)
        width = 64 if quick else 776
        self.steps = 6 if quick else STEPS
        self.model = nn.Sequential(nn.Linear(500, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.x, self.y = torch.randn(4096, 500), torch.randint(10, (4096,))
        self.batches = torch.randint(4096, (self.steps, 32 if quick else 512))

    def backward(self, ids):
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x[ids]), self.y[ids]).backward()

    def plain(self):
        for ids in self.batches:
            self.backward(ids)
            self.optimizer.step()

    def recorded(self, recorder):
        for ids in self.batches:
            self.backward(ids)
            with recorder.step(ids):
                self.optimizer.step()

    def held_up(self, recorder):
        """Seconds per step, median and maximum, that `with recorder.step(ids)` adds to optimizer.step() itself."""
        with_log, alone = [], []
        for ids in self.batches:
            self.backward(ids)
            start = time.perf_counter()
            with recorder.step(ids):
                self.optimizer.step()
            with_log.append(time.perf_counter() - start)
        recorder.close()
        for ids in self.batches:
            self.backward(ids)
            start = time.perf_counter()
            self.optimizer.step()
            alone.append(time.perf_counter() - start)
        base = statistics.median(alone)
        return statistics.median(with_log[1:]) - base, max(with_log[1:]) - base


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def loop(one_thread, benchmark):
    return Loop(quick=benchmark.disabled)


@pytest.mark.benchmark(group="recorder")
def test_plain_loop(benchmark, loop):
    benchmark.pedantic(loop.plain, rounds=1 if benchmark.disabled else 5, warmup_rounds=0 if benchmark.disabled else 1)
    benchmark.extra_info["steps"] = loop.steps


@pytest.mark.benchmark(group="recorder")
def test_recorded_loop(benchmark, loop, tmp_path):
    """The same loop; closing the log, which waits for the disk, is timed apart."""
    path = tmp_path / "log"
    recorders, close = [], []

    def setup():
        for recorder in recorders[-1:]:
            start = time.perf_counter()
            recorder.close()
            close.append(time.perf_counter() - start)
        recorders.append(dit.Recorder(path, loop.model, loop.optimizer, overwrite=True))
        return (recorders[-1],), {}

    benchmark.pedantic(loop.recorded, setup=setup, rounds=1 if benchmark.disabled else 6)
    recorders[-1].close()
    run = dit.Trajectory.open(path)  # right first, fast second
    run.verify()
    live = dict(loop.model.named_parameters())
    assert run.num_steps == loop.steps
    assert all(torch.equal(value, live[name]) for name, value in run.params(loop.steps).items())
    shutil.rmtree(path)
    median, worst = loop.held_up(dit.Recorder(path, loop.model, loop.optimizer))
    size = sum(chunk["bytes"] for chunk in json.loads((path / "manifest.json").read_text())["chunks"])
    benchmark.extra_info |= {
        "steps": loop.steps,
        "parameters": sum(p.numel() for p in live.values()),
        "held up per step, median ms": round(median * 1e3, 3),
        "held up per step, worst ms": round(worst * 1e3, 3),
        "close ms": round(statistics.median(close or [0]) * 1e3, 1),
        "bytes per step": size // loop.steps,
        "disk MB/s": round(disk_speed(tmp_path, size), 1),
    }


def disk_speed(folder, size):
    """MB/s of writing and syncing as many bytes as the log has, by itself."""
    data = torch.randint(256, (size,), dtype=torch.uint8).numpy()
    start = time.perf_counter()
    with open(folder / "probe", "wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    return size / 1e6 / (time.perf_counter() - start)
