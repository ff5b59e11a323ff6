"""The one-launch kernels and the GEMM sweep on a GPU, against the generic path there and the CPU's compiled ops.

    pytest bench/bench_cuda.py --benchmark-only --benchmark-group-by=group

    W1      62-8-1 ReLU net, BCE, batch 64, 84 steps, 21 endpoint windows: one launch of TeamSweep
    retrain 10,000 counterfactuals of W1 (each its own pair of samples): one launch sequence of TeamRetrain
    W3      784-1024-1024-10, cross entropy, batch 128, 8 windows: GemmSweep, captured in CUDA graphs

Skipped without a GPU (DIT_FAST_REQUIRE_CUDA=1 makes that a failure). Each is checked against the CPU's op in float64 before
it is timed in float32. extra_info: seconds of the call alone between CUDA events, of the same work on the CPU (one thread),
and of the generic path on the same card.
"""

import os
import time
from collections.abc import Callable

import pytest
import torch
from settings import CASES, Setting, Workload, binary
from torch import Tensor, nn

import dit_fast
from dit_fast import mlp_gemm, native, ops


def cuda_missing() -> str:
    """Why CUDA cannot be timed here; empty where it can."""
    if not ops.cuda_compiled():
        return "the CUDA part of dit_fast is not compiled"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


@pytest.fixture
def card() -> None:
    reason = cuda_missing()
    if reason and os.environ.get("DIT_FAST_REQUIRE_CUDA") == "1":
        pytest.fail(f"DIT_FAST_REQUIRE_CUDA=1, but {reason}")
    if reason:
        pytest.skip(f"CUDA NOT TIMED: {reason}")


def seconds_of(call: Callable[[], object], rounds: int = 5) -> float:
    """Best of a few, from start to a synchronised end."""
    best = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def score_on(made: Setting, device: str, backend: str = "native", dtype: torch.dtype | None = None) -> Tensor:
    result = dit_fast.score(
        made.trajectory, made.problem, made.query, made.windows, check=False, backend=backend, device=device, dtype=dtype
    )
    return result.scores[:, 0].cpu()


@pytest.mark.parametrize("name", ["W1 62-8-1, 21 windows", "W3 784-1024-1024-10, 8 windows"])
def bench_sweep(benchmark, card, name):
    work = CASES[name].work
    if benchmark.disabled:
        work = Workload(tuple(min(n, 512) for n in work.widths), 8, 3, 16, min(work.windows, 3), 3)
    made = Setting(work)
    exact, ours = (score_on(made, device, dtype=torch.float64) for device in ("cpu", "cuda"))
    size = made.sizes(exact)
    assert ((ours - exact).abs().amax(-1) <= 1e-12 * size).all()
    assert ((score_on(made, "cuda") - exact).abs().amax(-1) <= 1e-4 * size).all()
    benchmark.group = f"CUDA {name}"
    benchmark(score_on, made, "cuda")
    if benchmark.stats is None:
        return
    taken = launches(made)
    benchmark.extra_info.update(
        {"kernel_seconds": taken, "device": torch.cuda.get_device_name()}
        | {"cpu_seconds": seconds_of(lambda: score_on(made, "cpu"))}
        | {"generic_seconds": seconds_of(lambda: score_on(made, "cuda", "generic"))}
        | {"tflops": made.flops() / taken / 1e12}
    )


def launches(made: Setting) -> float:
    """Seconds of the sweep's work on the card, between two events around each call of an engine."""
    from dit_fast import mlp_team

    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    originals = {cls: cls.run for cls in (mlp_team.TeamSweep, mlp_gemm.GemmSweep)}
    for cls, run in originals.items():

        def timed(self, *arguments, run=run):
            ends = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            ends[0].record()
            run(self, *arguments)
            ends[1].record()
            spans.append(ends)

        cls.run = timed
    try:
        score_on(made, "cuda")
    finally:
        for cls, run in originals.items():
            cls.run = run
    torch.cuda.synchronize()
    # the first one compares with the generic path on one batch
    return sum(a.elapsed_time(b) for a, b in spans[1:]) / 1e3


def bench_retrain(benchmark, card):
    """10,000 counterfactual models of W1."""
    steps, models = (4, 32) if benchmark.disabled else (84, 10_000)
    made = Setting(Workload((62, 8, 1), 64, steps, 10_000, 1))
    visited = torch.cat(made.batches).unique()
    problem = dit_fast.Problem(nn.Sequential(nn.Linear(62, 8), nn.ReLU(), nn.Linear(8, 1)), binary, (made.x, made.y))
    # 84 batches of 64 visit fewer than 10,000 samples: two are left out together, in as many pairs
    pairs = [torch.stack([visited, visited.roll(shift)], 1) for shift in (1, 2)]
    groups = torch.cat(pairs)[:models].tolist()

    def ours(device: str, dtype: torch.dtype = torch.float32, backend: str = "native") -> Tensor:
        result = dit_fast.leave_one_out(
            made.trajectory, problem, made.query, groups=groups, check=False, device=device, dtype=dtype, backend=backend
        )
        assert result.meta["backend"] == backend
        return result.scores[0, 0].cpu()

    exact = ours("cpu", torch.float64)
    assert (ours("cuda", torch.float64) - exact).abs().max() <= 1e-12 * exact.abs().max()
    assert ((ours("cuda") - exact).abs() / exact.abs().max()).median() <= 1e-5
    benchmark.group = f"CUDA {models} counterfactuals of W1"
    benchmark.pedantic(ours, args=("cuda",), rounds=1 if benchmark.disabled else 5)
    if benchmark.stats is not None:
        benchmark.extra_info.update(
            {"cpu_seconds": seconds_of(lambda: ours("cpu"), 1), "device": torch.cuda.get_device_name()}
            | {"generic_seconds": seconds_of(lambda: ours("cuda", backend="generic"), 2)}
        )


def test_the_workloads_run_here(monkeypatch):
    """What is timed on a card, small and on the CPU: one-launch ops by threads, GEMMs by torch."""
    monkeypatch.setattr(native, "uses_teams", lambda ev: True)
    made = Setting(Workload((62, 8, 1), 8, 3, 16, 3, 3))
    ours = score_on(made, "cpu", dtype=torch.float64)
    generic = score_on(made, "cpu", "generic", torch.float64)
    assert ((ours - generic).abs().amax(-1) <= 1e-10 * made.sizes(generic)).all()
