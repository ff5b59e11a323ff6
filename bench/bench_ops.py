"""The ops against the same work in in-place torch, one CPU thread, results compared before anything is timed.

    pytest bench/bench_ops.py --benchmark-only --benchmark-group-by=group

extra_info of each op: ratio (torch's best time over the op's; above 1 the op is faster), gflops, and the share of the
sgemm/dgemm rate that this machine reached in the same run.
"""

import functools
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_fast import ops

# K, B, S, O, I
SHAPES = {
    "tiny": (1, 32, 1, 8, 14),
    "small": (8, 64, 1, 64, 100),
    "mnist": (1, 128, 1, 128, 784),
    "mnist_8_columns": (8, 128, 1, 128, 784),
    "sequence": (4, 8, 64, 64, 96),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}


class TorchRival:
    """What a torch user would write with buffers kept and products accumulated in place."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.K, self.B, self.S, self.O, self.I = K, B, S, O, _ = shape
        self.products = torch.empty(B * S, K * O, dtype=dtype)

    def grad_dot(self, dots: Tensor, delta: Tensor, activations: Tensor, weight: Tensor, bias: Tensor) -> None:
        torch.addmm(bias.view(-1), activations.view(-1, self.I), weight.view(-1, self.I).T, out=self.products)
        z = self.products.view(self.B, self.S, self.K, self.O).mul_(delta[:, :, None])
        dots.add_(z.sum((1, 3), dtype=torch.float64).T)

    def lowrank_update(self, weight: Tensor, bias: Tensor, coefficients: Tensor, delta: Tensor, activations: Tensor) -> None:
        c = coefficients.to(delta.dtype).T[:, None, :, None]
        w = torch.mul(c, delta[:, :, None], out=self.products.view(self.B, self.S, self.K, self.O))
        weight.view(-1, self.I).addmm_(self.products.T, activations.view(-1, self.I))
        bias.add_(w.sum((0, 1)))


def arguments(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Seeded operands, those written to first: dots for grad_dot, weight and bias for lowrank_update."""
    K, B, S, O, I = shape
    generator = torch.Generator().manual_seed(0)
    weight, bias, delta, activations = (
        torch.randn(*n, generator=generator, dtype=dtype) for n in ((K, O, I), (K, O), (B, S, O), (B, S, I))
    )
    per_sample = torch.randn(K, B, generator=generator, dtype=torch.float64)
    if op == "grad_dot":
        return [per_sample, delta, activations, weight, bias]
    return [weight, bias, per_sample, delta, activations]


def best_seconds(call: Callable[[], None], budget: float = 0.05) -> float:
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a 768³ product on one thread."""
    a, b = torch.randn(2, 768, 768, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * 768**3 / best_seconds(lambda: torch.mm(a, b, out=out), budget=0.2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("op", ["grad_dot", "lowrank_update"])
@pytest.mark.parametrize("rival", ["dit_fast", "torch"])
def bench_op(benchmark, rival, op, shape, dtype):
    calls = {"dit_fast": getattr(ops, op), "torch": getattr(TorchRival(shape, dtype), op)}
    num_written = 1 if op == "grad_dot" else 2
    results = []
    for call in calls.values():
        args = arguments(op, shape, dtype)
        call(*args)
        results.append(args[:num_written])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()

    benchmark.group = f"{op} {shape} {str(dtype).removeprefix('torch.')}"
    args = arguments(op, shape, dtype)
    benchmark(calls[rival], *args)
    if benchmark.stats is None or rival == "torch":  # --benchmark-disable: nothing was timed
        return
    K, B, S, O, I = shape
    seconds = {name: best_seconds(lambda call=call: call(*args)) for name, call in calls.items()}
    rate = 2 * K * B * S * O * I / seconds["dit_fast"]
    benchmark.extra_info.update(
        ratio=round(seconds["torch"] / seconds["dit_fast"], 2),
        gflops=round(rate / 1e9, 2),
        gemm_share=round(rate / gemm_rate(dtype), 3),
        blas=ops.build_info()["blas"],
    )
