"""A small convolutional net layer by layer against what a torch user would write, one CPU thread.

    pytest bench/bench_layerwise.py --benchmark-only --benchmark-group-by=group

W4: conv32-pool-conv64-pool-linear, 28×28, cross entropy, batch 64, random seeded data. The rivals are those of
bench_score.py (`engine` is the sweep alone, with the query gradients at hand, as torch_func and double have them), each
checked against the others before it is timed. extra_info has the ratios, and the memory that one more column takes here and
in vmapped torch.func (of tensors, by torch's record of allocations).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_score import RIVALS, Setting, Workload, best_seconds, compare
from torch import Tensor, nn

from dit_fast import layerwise, plan
from dit_fast.problem import Evaluator
from dit_fast.replay import Replay
from dit_fast.sweep import sweep

WORKLOADS = {
    "W4, 1 window": Workload((32, 64, 10), 64, 4, 128, 1, 1),
    "W4, 4 windows": Workload((32, 64, 10), 64, 4, 128, 4, 1),
}


class ConvSetting(Setting):
    backend = "layerwise"
    side = 28

    def build(self) -> tuple[nn.Module, tuple[int, ...]]:
        first, second, outputs = self.work.widths
        net = nn.Sequential(
            *(nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(second * (self.side // 4) ** 2, outputs)),
        )
        return net, (1, self.side, self.side)

    @functools.cached_property
    def engine(self) -> Callable[[], Tensor]:
        ev = Evaluator.create(self.problem, self.trajectory, None, None)
        columns, mix = plan.columns(self.trajectory.windows(self.windows), 1)
        at = {t: {n: g[None] for n, g in gradient.items()} for t, gradient in self.gradients.items()}
        with ev.session():
            net = layerwise.prepare(ev, "exact")
        made = layerwise.linearizer(ev, net, "exact", len(columns), with_gradient=False)

        def run() -> Tensor:
            with ev.session():
                return mix @ sweep(ev, columns, made, Replay(ev, False, 0), at.__getitem__, self.work.samples, lambda: None)

        return run

    def flops(self) -> float:
        first, second, outputs = self.work.widths
        pixels = self.side**2
        shares = [pixels * 9 * first, pixels // 4 * 9 * first * second, pixels // 16 * second * outputs]
        forward = 2.0 * self.work.batch * sum(shares)
        return self.work.steps * 2 * forward + sum(self.ends) * (6 * forward - 8.0 * self.work.batch * shares[0])

    def bytes_per_column(self) -> dict[str, int]:
        """The peak of a step with four columns, a quarter of it, here and in vmapped torch.func."""
        full = Evaluator.create(self.problem, self.trajectory, None, None)
        with full.session():
            net, params, batch = layerwise.prepare(full, "exact"), full.params(0), full.batches(0)[0]
            block = {n: torch.randn(4, *value.shape) for n, value in params.items()}
            ours = peak_memory(lambda: layerwise.linearizer(full, net, "exact", 4, False)(params, batch)[1](block))
            theirs = peak_memory(lambda: self._vmapped(0, block))
        return {"bytes_per_column": ours // 4, "bytes_per_column_torch_func": theirs // 4}


def peak_memory(run: Callable[[], Any]) -> int:
    """The most that tensors made in run() took at one time, by torch's record, beside what nothing touches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) != layerwise.ALLOCATION:
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def setting(name: str) -> ConvSetting:
    made = ConvSetting(WORKLOADS[name])
    made.check()
    return made


@functools.cache
def rival_seconds(name: str) -> dict[str, float]:
    return best_seconds(setting(name))


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("name", WORKLOADS)
def bench_layerwise(benchmark, name, rival, monkeypatch):
    if benchmark.disabled:
        monkeypatch.setattr(ConvSetting, "side", 8)
        small = ConvSetting(Workload((3, 4, 3), 4, 3, 8, WORKLOADS[name].windows, 3))
        small.check()
        benchmark(getattr(small, rival))
        return
    made = setting(name)
    benchmark.group = name
    benchmark(getattr(made, rival))
    if rival in ("engine", "ours"):
        benchmark.extra_info.update(compare(made, rival, rival_seconds(name)) | made.bytes_per_column())
