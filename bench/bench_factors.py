"""Scores from logged factors against the exact sweep and against making the factors anew, one CPU thread.

    pytest bench/bench_factors.py --benchmark-only --benchmark-group-by=group

W3 of bench_score.py: 784-1024-1024-10, cross entropy, batch 128, 8 steps, random seeded data. All at hand alike: the run in
memory, the query's gradients ready. Checked against each other before they are timed:

    exact       the compiled sweep with the exact Hessian, `engine` of bench_score.py
    engine      the fused sweep over logged factors (empirical Fisher) alone, u updated in place
    fused       the same as score() calls it, with its checks
    sweep       the same by cotangents and Hessian products, as momentum and Adam need it
    gram        the same in sample space
    recomputed  score(problem, hessian="fisher", backend="factors"): a forward and a backward pass for the factors of a step

extra_info: how many times faster than the others (best times of this run), gflops by the formula 2·B·ΣIO for dots and as
much for an update, their share of the sgemm rate measured in the same run, bytes of a step's factors and of its parameters,
bytes of a column.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_score import Setting, Workload
from torch import Tensor, nn
from torch.func import functional_call

import dit_fast
from dit_fast import fused, plan, queries
from dit_fast.factored import Factors, Layout, Outer
from dit_fast.logged import open_run, score_logged
from dit_fast.trajectory import Trajectory

WORKLOADS = {
    "W3, 1 window": Workload((784, 1024, 1024, 10), 128, 8, 1024, 1, 1),
    "W3, 8 windows": Workload((784, 1024, 1024, 10), 128, 8, 1024, 8, 1),
}
SMALL = {"batch": 8, "steps": 4, "samples": 16}
RIVALS = ["engine", "fused", "sweep", "gram", "recomputed", "exact"]


class FactorTrajectory(Trajectory):
    """A run with its factors in memory."""

    def __init__(self, run: Trajectory, factors: list[Factors], layout: Layout) -> None:
        super().__init__(run._source)
        self._factors, self._layout = factors, layout

    @property
    def factor_layout(self) -> Layout:
        return self._layout

    def factors(self, t: int) -> list[Factors]:
        return [self._factors[t]]


def swallow() -> None:
    """In the place of a progress bar."""


class FactorSetting(Setting):
    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        shapes = {name: rows.shape[1:] for name, rows in self.params.items()}
        layout = Layout(shapes, "fisher", 0.0, {}, torch.float32)
        self.logged = FactorTrajectory(self.trajectory, [self.factors(t) for t in range(work.steps)], layout)
        flat = {t: torch.cat([g.flatten() for g in gradient.values()])[None] for t, gradient in self.gradients.items()}
        self.ready = queries.gradients(flat)

    def factors(self, t: int) -> Factors:
        seen: list[tuple[str, Tensor, Tensor]] = []
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        handles = [m.register_forward_hook(lambda m, x, z, n=n: seen.append((n, x[0], z))) for n, m in layers.items()]
        theta = {name: value.requires_grad_() for name, value in self.theta(t).items()}
        losses = self.loss(functional_call(self.model, theta, (self.x[self.batches[t]],)), self.y[self.batches[t]])
        for handle in handles:
            handle.remove()
        deltas = torch.autograd.grad(losses.sum(), [z for _, _, z in seen])
        parts = tuple(
            Outer(f"{n}.weight", f"{n}.bias", a.detach()[:, None], d[:, None, None])
            for (n, a, _), d in zip(seen, deltas, strict=True)
        )
        B = len(losses)
        ones = torch.ones(B, 1, 1, dtype=torch.float64)
        return Factors(t, self.batches[t], torch.full((B,), 1 / B, dtype=torch.float64), ones[..., 0], ones, parts)

    def _by(self, form: str) -> Tensor:
        return score_logged(self.logged, None, self.ready, self.windows, form=form, check=False).scores[:, 0]

    def fused(self) -> Tensor:
        return self._by("fused")

    def sweep(self) -> Tensor:
        return self._by("sweep")

    def gram(self) -> Tensor:
        return self._by("gram")

    def recomputed(self) -> Tensor:
        options: dict[str, Any] = {"hessian": "fisher", "backend": "factors", "check": False}
        return dit_fast.score(self.trajectory, self.problem, self.ready, self.windows, **options).scores[:, 0]

    def exact(self) -> Tensor:
        return self.exact_engine()

    # `engine` of bench_score.py
    exact_engine = functools.cached_property(Setting.engine.func)

    @functools.cached_property
    def engine(self) -> Callable[[], Tensor]:
        run = open_run(self.logged, "fisher", None, None)
        columns, mix = plan.columns(self.trajectory.windows(self.windows), 1)
        at = {t: {n: g[None] for n, g in gradient.items()} for t, gradient in self.gradients.items()}
        return lambda: mix @ fused.sweep(run, columns, at.__getitem__, self.work.samples, swallow)

    def flops(self) -> float:
        """Of dots and updates, which the last step to be reached needs not."""
        weights = sum(i * o for i, o in itertools.pairwise(self.work.widths))
        columns, _ = plan.columns(self.trajectory.windows(self.windows), 1)
        return 2.0 * self.work.batch * weights * sum(2 * column.stop - 1 for column in columns)

    def check(self) -> None:
        truth = self.recomputed()
        size = self.sizes(truth)
        for rival in ("engine", "fused", "sweep", "gram"):
            assert ((getattr(self, rival)() - truth).abs().amax(-1) <= 1e-5 * size).all(), rival
        assert ((self.exact() - truth).abs().amax(-1) > 1e-4 * size).any()  # another curvature

    def sizes_in_bytes(self) -> dict[str, int]:
        factors = sum(p.inputs.nbytes + p.deltas.nbytes for p in self.logged.factors(0)[0].parts)
        parameters = 4 * sum(value[0].numel() for value in self.params.values())
        return {
            "factor_bytes_per_step": factors,
            "parameter_bytes_per_step": parameters,
            # u alone; its cotangent and the Hessian product; the query's gradient and a number for every row of the log
            "bytes_per_column_fused": parameters,
            "bytes_per_column_sweep": 3 * parameters,
            "bytes_per_column_gram": parameters + 4 * self.work.batch * self.work.steps,
        }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def setting(name: str) -> FactorSetting:
    made = FactorSetting(WORKLOADS[name])
    made.check()
    return made


@functools.cache
def rival_seconds(name: str, budget: float = 10.0) -> dict[str, float]:
    """Best times of the rivals and of a 1024³ float32 product, in turn: a slow spell of the machine meets them all."""
    made, (a, b) = setting(name), torch.randn(2, 1024, 1024)
    calls: dict[str, Callable[[], Any]] = {rival: getattr(made, rival) for rival in RIVALS} | {"gemm": lambda: a @ b}
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + budget
    for turn in itertools.count():
        if turn >= 3 and time.perf_counter() > end:
            return best
        for rival, call in calls.items():
            start = time.perf_counter()
            call()
            best[rival] = min(best[rival], time.perf_counter() - start)
    raise AssertionError


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("name", WORKLOADS)
def bench_factors(benchmark, name, rival):
    if benchmark.disabled:
        work = WORKLOADS[name]
        small = FactorSetting(Workload(tuple(min(n, 32) for n in work.widths), **SMALL, windows=min(work.windows, 3)))
        small.check()
        benchmark(getattr(small, rival))
        return
    made = setting(name)
    benchmark.group = name
    benchmark(getattr(made, rival))
    seconds = rival_seconds(name)
    own, gemm_rate = seconds[rival], 2 * 1024**3 / seconds["gemm"]
    benchmark.extra_info.update(
        {f"times_{other}": round(seconds[other] / own, 2) for other in RIVALS if other != rival}
        | {"milliseconds": round(own * 1e3, 3), "gemm_gflops": round(gemm_rate / 1e9, 1)}
        | made.sizes_in_bytes()
    )
    if rival in ("engine", "fused", "sweep"):
        gflops = made.flops() / own / 1e9
        benchmark.extra_info.update({"gflops": round(gflops, 1), "gemm_share": round(gflops * 1e9 / gemm_rate, 3)})
