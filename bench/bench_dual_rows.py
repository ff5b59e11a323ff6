"""Duals of activations and of the cross entropy for K columns against the same in torch, one thread.

    pytest bench/bench_dual_rows.py --benchmark-only --benchmark-group-by=group

extra_info: ratio, torch's best time over ours in the same run. Torch is given what layerwise would use without these ops:
autograd for φ′ and φ″, a product with φ′ for tangents, product and addcmul_, not in place, for cotangents,
autograd by columns for the loss.
"""

import pytest
import torch
from timing import best_seconds
from torch.nn import functional as F

from dit_fast.dual_rows import activation_columns, activation_values, loss_columns

FUNCTIONS = {"gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
SHAPES = {"32 of 28 x 28": (32, 28, 28), "64 of 14 x 14": (64, 14, 14), "512": (512,)}
# just below the largest that glibc heeds: memory that is freed is used again, as layerwise has it
ALLOCATION = 31 * 2**20


def by_autograd(f, x):
    point = x.detach().requires_grad_()
    y = f(point)
    (first,) = torch.autograd.grad(y.sum(), point, create_graph=True)
    return y.detach(), first.detach(), torch.autograd.grad(first.sum(), point)[0]


def samples(benchmark, shape, columns):
    """As many as layerwise takes at once, where not all of 64."""
    return 2 if benchmark.disabled else min(64, (1 << 21) // (columns * torch.Size(SHAPES[shape]).numel()))


def compare(benchmark, group, ours, theirs, fresh=lambda: None):
    fresh()
    mine = [v.clone() for v in ours()]
    fresh()
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(mine, theirs(), strict=True))
    torch.empty(ALLOCATION, dtype=torch.uint8)
    benchmark.group = group
    benchmark(ours)
    if not benchmark.disabled:
        best = best_seconds({"ours": ours, "torch": theirs}, budget=0.5)
        benchmark.extra_info["ratio"] = round(best["torch"] / best["ours"], 2)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_activation_values(benchmark, shape, name):
    x, f = torch.randn(2 if benchmark.disabled else 64, *SHAPES[shape]), FUNCTIONS[name]
    compare(benchmark, f"values of {name}, {shape}", lambda: activation_values(name, x), lambda: by_autograd(f, x))


@pytest.mark.parametrize("columns", [1, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def bench_relu(benchmark, shape, columns):
    """All that a layer does: value, δ, a tangent and a cotangent, these in place for both."""
    x, delta = torch.randn(2, samples(benchmark, shape, columns), *SHAPES[shape])
    tangent, cotangent = torch.randn(2, len(x), columns, *x.shape[1:])

    def ours():
        return (
            x.relu(),
            activation_columns(x, delta[:, None], slope=0.0)[:, 0],
            activation_columns(x, tangent, slope=0.0),
            activation_columns(x, cotangent, slope=0.0, in_place=True),
        )

    def theirs():
        first = (x > 0).to(x.dtype)
        return x.relu(), first * delta, first[:, None] * tangent, cotangent.mul_(first[:, None])

    compare(benchmark, f"relu, {columns} columns, {shape}", ours, theirs)


@pytest.mark.parametrize("op", ["tangent", "cotangent", "cotangent in place"])
@pytest.mark.parametrize("columns", [1, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def bench_activation_columns(benchmark, shape, columns, op):
    x, curve = torch.randn(2, samples(benchmark, shape, columns), *SHAPES[shape])
    tangent, delta = torch.randn(2, len(x), columns, *x.shape[1:])
    first, in_place = x.sigmoid(), "in place" in op
    more = () if op == "tangent" else (curve, tangent)

    def theirs():
        to = first[:, None] * delta
        return (to.addcmul_(curve[:, None], tangent) if more else to,)

    def ours():
        return (activation_columns(first, delta, *more, in_place=in_place),)

    start = delta.clone()
    group = f"{op}, {columns} columns, {shape}"
    # in place the numbers grow less and less: |φ′| ≤ 1
    compare(benchmark, group, ours, theirs, lambda: delta.copy_(start))


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("columns", [1, 4, 8])
def bench_loss_columns(benchmark, columns, classes):
    batch = 2 if benchmark.disabled else 64
    z, a, target = torch.randn(batch, classes), torch.rand(batch), torch.randint(classes, (batch,))
    tangent = torch.randn(batch, columns, classes)
    point = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(point, target, reduction="sum"), point, create_graph=True)

    def theirs():
        columns = [torch.autograd.grad(slope, point, one, retain_graph=True)[0] for one in tangent.unbind(1)]
        return (torch.stack(columns, 1) * a[:, None, None],)

    p = z.softmax(1)
    compare(
        benchmark,
        f"cross entropy of {classes}, {columns} columns",
        lambda: (loss_columns("cross_entropy", 1.0, p, a, tangent),),
        theirs,
    )
