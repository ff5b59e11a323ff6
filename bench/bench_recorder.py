"""What logging costs the training loop: a 1-million-parameter MLP at batch 512 on one thread, with and without a Recorder.

    OMP_NUM_THREADS=1 pytest bench/bench_recorder.py --benchmark-only

extra_info of each `every`: the time a step is held up (what `with recorder.step(ids)` adds to optimizer.step()), as a share
of the plain step too; bytes per step; the MB/s the run needs and those of the disk, measured in between. A share above
ALLOWED fails: of all steps together where the disk is fast enough, of the median step where it is not.
"""

import os
import shutil
import statistics
import time
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import dit_fast as dit

STEPS, ROUNDS = 64, 3
ALLOWED = 0.10


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

    def run(self, recorder=None):
        """Seconds of the whole loop, and of each step's optimizer.step() with what is around it."""
        held = []
        begin = time.perf_counter()
        for ids in self.batches:
            self.backward(ids)
            start = time.perf_counter()
            if recorder is None:
                self.optimizer.step()
            else:
                with recorder.step(ids):
                    self.optimizer.step()
            held.append(time.perf_counter() - start)
        return time.perf_counter() - begin, held


@pytest.fixture
def loop(benchmark):
    return Loop(quick=benchmark.disabled)


@pytest.mark.benchmark(group="recorder")
def bench_plain_loop(benchmark, loop):
    benchmark.pedantic(loop.run, rounds=1 if benchmark.disabled else ROUNDS, warmup_rounds=0 if benchmark.disabled else 1)
    benchmark.extra_info["steps"] = loop.steps


@pytest.mark.benchmark(group="recorder")
@pytest.mark.parametrize("every", [1, 10])
def bench_recorded_loop(benchmark, loop, tmp_path, every):
    """The same loop, in turns with the plain one and the disk; closing the log, which waits for the disk, is apart."""
    path, rounds = tmp_path / "log", 1 if benchmark.disabled else ROUNDS
    plain, plain_held, held, close, disk = [], [], [], [], []
    loop.run()

    def setup():
        if path.exists():
            settle()
        return (dit.Recorder(path, loop.model, loop.optimizer, every=every, overwrite=True),), {}

    def recorded(recorder):
        recorders.append(recorder)
        recorder_times.append(loop.run(recorder))

    def settle():
        """After a recorded loop: the log is finished, the disk and the plain loop are timed."""
        start = time.perf_counter()
        recorders[-1].close()
        close.append(time.perf_counter() - start)
        held.extend(recorder_times[-1][1][1:])  # the first step makes the buffers
        disk.append(disk_speed(tmp_path, max(chunk_sizes(path))))
        seconds, times = loop.run()
        plain.append(seconds / loop.steps)
        plain_held.extend(times[1:])

    recorders, recorder_times = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        benchmark.pedantic(recorded, setup=setup, rounds=rounds)
    live = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    recorders[-1].close()
    run = dit.Trajectory.open(path)  # right first, fast second
    run.verify()
    assert run.num_steps == loop.steps
    assert all(torch.equal(value, live[name]) for name, value in run.params(loop.steps).items())
    size = sum(chunk_sizes(path))
    settle()
    shutil.rmtree(path)

    step = statistics.median(plain)
    mean = statistics.mean(held) - statistics.mean(plain_held)
    median = statistics.median(held) - statistics.median(plain_held)
    need = size / loop.steps / step / 1e6
    benchmark.extra_info |= {
        "steps": loop.steps,
        "parameters": sum(p.numel() for p in live.values()),
        "plain step, ms": round(step * 1e3, 2),
        "held up per step, mean ms": round(mean * 1e3, 3),
        "held up per step, median ms": round(median * 1e3, 3),
        "held up per step, worst ms": round((max(held) - statistics.median(plain_held)) * 1e3, 3),
        "share of the step, mean": round(mean / step, 4),
        "share of the step, median": round(median / step, 4),
        "recorded loop / plain loop": round(statistics.median(s for s, _ in recorder_times) / loop.steps / step, 3),
        "close, ms": round(statistics.median(close) * 1e3, 1),
        "bytes per step": size // loop.steps,
        "MB/s needed": round(need, 1),
        "MB/s of the disk": round(statistics.median(disk), 1),
        "warnings": [str(warning.message) for warning in caught],
    }
    if not benchmark.disabled:
        share = (mean if statistics.median(disk) > 1.25 * need else median) / step
        assert share <= ALLOWED, benchmark.extra_info


NETS = {"W3": ((784, 1024, 1024, 10), 128), "small": ((64, 32, 10), 64)}
FACTORS = {
    "parameters alone": False,
    "factors": True,
    "factors in bfloat16": dit.FactorOptions(dtype="bfloat16"),
    "factors projected to 32": dit.FactorOptions(project=32),
    "sampled ggn": dit.FactorOptions(
        curvature="sampled ggn", per_sample_loss=lambda z, y: nn.functional.cross_entropy(z, y, reduction="none")
    ),
}


@pytest.mark.benchmark(group="factors")
@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("net", NETS)
def bench_recorded_factors(benchmark, tmp_path, net, kind):
    """What factors add to a whole training step, forward and backward hooks included; parameters with every=512."""
    widths, batch = NETS[net]
    if benchmark.disabled:
        widths, batch = (12, 8, 3), 4
    torch.manual_seed(0)
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = torch.randn(2048, widths[0]), torch.randint(widths[-1], (2048,))
    batches = torch.randint(2048, (4 if benchmark.disabled else 100, batch))
    takes_batch = getattr(FACTORS[kind], "curvature", "fisher") != "fisher"

    def loop(recorder=None):
        start = time.perf_counter()
        for ids in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
            if recorder is None:
                optimizer.step()
            else:
                with recorder.step(ids, batch=(x[ids], y[ids]) if takes_batch else None):
                    optimizer.step()
        return (time.perf_counter() - start) / len(batches)

    plain, recorded = [], []
    loop()

    def both():
        with dit.Recorder(tmp_path / "log", model, optimizer, every=512, factors=FACTORS[kind], overwrite=True) as recorder:
            recorded.append(loop(recorder))
        plain.append(loop())

    benchmark.pedantic(both, rounds=1 if benchmark.disabled else 5)
    run = dit.Trajectory.open(tmp_path / "log")
    run.verify()
    assert run.num_steps == len(batches) and (run.factor_layout is None) == (FACTORS[kind] is False)
    kept = sum(step.factor_bytes for step in run.steps(0, run.num_steps))
    step = statistics.median(plain)
    benchmark.extra_info |= {
        "plain step, ms": round(step * 1e3, 3),
        "recorded step, ms": round(statistics.median(recorded) * 1e3, 3),
        "added, share of the step": round(statistics.median(recorded) / step - 1, 3),
        "bytes of factors per step": kept // len(batches),
        "bytes of parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def chunk_sizes(path):
    return [file.stat().st_size for file in path.glob("chunk-*")]


def disk_speed(folder, size):
    """MB/s of writing and syncing files as large as a chunk, by themselves."""
    data = torch.randint(256, (size,), dtype=torch.uint8).numpy()
    start = time.perf_counter()
    for _ in range(4):
        with open(folder / "probe", "wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
    return 4 * size / 1e6 / (time.perf_counter() - start)
