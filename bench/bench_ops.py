"""The low-rank ops against the same work in in-place torch, one CPU thread, results compared before anything is timed.

    pytest bench/bench_ops.py --benchmark-only --benchmark-group-by=group

extra_info of each op: ratio (torch's best time over the op's; above 1 the op is faster), gflops and the share of the
sgemm/dgemm rate that this machine reached in the same run (4·B·S·K·P FLOP for an update with dots), megabytes (what
must move: operands read once, U read and, by an update, written) and the share of the rate of a copy; fused_gain of
update_dot, the time of the two ops apart over its own.
"""

import functools
import itertools
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_fast import ops

# K, B, S and the features of a net's layers, first to last
SHAPES = {
    "W1": (21, 64, 1, (62, 8, 1)),
    "W3": (1, 128, 1, (784, 1024, 1024, 10)),
    "W3_8_columns": (8, 128, 1, (784, 1024, 1024, 10)),
    "sequence": (4, 8, 64, (96, 64)),
}
OPS = ["grad_dot", "lowrank_update", "update_dot"]
DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-10}
ALPHA = 0.999


class Net:
    """Seeded directions of a net's layers, two batches of their factors, coefficients and dots."""

    def __init__(self, shape: tuple[int, int, int, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.K, self.B, self.S, features = shape
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=dtype)

        self.pairs = list(itertools.pairwise(features))
        self.directions = [(draw(self.K, O, I), draw(self.K, O)) for I, O in self.pairs]
        self.batches = [[(draw(self.B, self.S, O), draw(self.B, self.S, I)) for I, O in self.pairs] for _ in range(2)]
        self.dots = draw(self.K, self.B, dtype=torch.float64)
        # so small that an update repeated for as long as is timed leaves U in bounds
        self.coefficients = 1e-3 * draw(self.K, self.B, dtype=torch.float64)

    def written(self, op: str) -> list[Tensor]:
        directions = [x for pair in self.directions for x in pair]
        return {"grad_dot": [self.dots], "lowrank_update": directions, "update_dot": [self.dots, *directions]}[op]

    def flops(self, op: str) -> int:
        product = 2 * self.K * self.B * self.S * sum(O * I for I, O in self.pairs)
        return product * (2 if op == "update_dot" else 1)

    def bytes(self, op: str) -> int:
        size = self.directions[0][0].element_size()
        num_u = self.K * sum(O * (I + 1) for I, O in self.pairs) * (1 if op == "grad_dot" else 2)
        num_factors = self.B * self.S * sum(O + I for I, O in self.pairs) * (2 if op == "update_dot" else 1)
        return size * (num_u + num_factors)


def ours(op: str, net: Net) -> Callable[[], None]:
    first, second = net.batches
    if op == "grad_dot":
        layers = [(*second[i], *u) for i, u in enumerate(net.directions)]
        return lambda: ops.grad_dot_layers(net.dots, layers)
    if op == "lowrank_update":
        updated = [(*u, *first[i]) for i, u in enumerate(net.directions)]
        return lambda: ops.lowrank_update_layers(net.coefficients, updated, ALPHA)
    both = [(*u, *first[i], *second[i]) for i, u in enumerate(net.directions)]
    return lambda: ops.update_dot_layers(net.coefficients, net.dots, both, ALPHA)


def torchs(op: str, net: Net) -> Callable[[], None]:
    """What a torch user would write with buffers kept and products accumulated in place."""
    K, B, S = net.K, net.B, net.S
    buffers = [torch.empty(B * S, K * O, dtype=net.directions[0][0].dtype) for _, O in net.pairs]

    def update() -> None:
        for (I, O), (weight, bias), (delta, a), buffer in zip(net.pairs, net.directions, net.batches[0], buffers, strict=True):
            c = net.coefficients.to(delta.dtype).T[:, None, :, None]
            w = torch.mul(c, delta[:, :, None], out=buffer.view(B, S, K, O))
            weight.view(-1, I).addmm_(buffer.T, a.view(-1, I), beta=ALPHA)
            bias.mul_(ALPHA).add_(w.sum((0, 1)))

    def dot() -> None:
        for (I, O), (weight, bias), (delta, a), buffer in zip(net.pairs, net.directions, net.batches[1], buffers, strict=True):
            torch.addmm(bias.view(-1), a.view(-1, I), weight.view(-1, I).T, out=buffer)
            z = buffer.view(B, S, K, O).mul_(delta[:, :, None])
            net.dots.add_(z.sum((1, 3), dtype=torch.float64).T)

    def both() -> None:
        update()
        dot()

    return {"grad_dot": dot, "lowrank_update": update, "update_dot": both}[op]


def best_seconds(call: Callable[[], object], budget: float = 0.2) -> float:
    """Of this thread, so that a busy machine counts for less. At least three calls, the first of which warms up."""
    call()
    best, end, calls = float("inf"), time.perf_counter() + budget, 0
    while calls < 2 or time.perf_counter() < end:
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
        calls += 1
    return best


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a 768³ product on one thread."""
    a, b = torch.randn(2, 768, 768, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * 768**3 / best_seconds(lambda: torch.mm(a, b, out=out), budget=0.5)


@functools.cache
def copy_rate() -> float:
    """Bytes/s read and written by a copy of 128 MiB on one thread."""
    source = torch.ones(2**24, dtype=torch.float64)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), budget=0.5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rival", ["dit_fast", "torch"])
def bench_op(request, benchmark, rival, op, shape, dtype):
    timed = not request.config.getoption("benchmark_disable")
    if not timed:  # a check that the code still runs; small is enough
        K, B, S, features = shape
        shape = (min(K, 3), min(B, 6), min(S, 5), tuple(min(n, 40) for n in features))
    nets = {"dit_fast": Net(shape, dtype), "torch": Net(shape, dtype)}
    calls = {"dit_fast": ours(op, nets["dit_fast"]), "torch": torchs(op, nets["torch"])}
    for call in calls.values():
        call()
    for mine, theirs in zip(*(net.written(op) for net in nets.values()), strict=True):
        assert (mine - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()

    benchmark.group = f"{op} {shape} {str(dtype).removeprefix('torch.')}"
    benchmark(calls[rival])
    if not timed or rival == "torch":
        return
    seconds = {name: best_seconds(call) for name, call in calls.items()}
    net, own = nets["dit_fast"], seconds["dit_fast"]
    rate, moved = net.flops(op) / own, net.bytes(op)
    benchmark.extra_info.update(
        ratio=round(seconds["torch"] / own, 2),
        gflops=round(rate / 1e9, 2),
        gemm_share=round(rate / gemm_rate(dtype), 3),
        megabytes=round(moved / 1e6, 2),
        bandwidth_share=round(moved / own / copy_rate(), 3),
        blas=ops.build_info()["blas"],
    )
    if op == "update_dot":
        apart = sum(best_seconds(ours(name, net)) for name in ("lowrank_update", "grad_dot"))
        benchmark.extra_info["fused_gain"] = round(apart / own, 2)
