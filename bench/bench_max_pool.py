"""Maximum pooling with a ReLU behind it, its tangent and its cotangent for K columns, against the same in torch, one thread.

    pytest bench/bench_max_pool.py --benchmark-only --benchmark-group-by=group

extra_info: ratio, torch's best time over ours in the same run. Torch is given its faster layout, channels last, for the
values, and the places as it takes them.
"""

import pytest
import torch
from timing import best_seconds
from torch.nn import functional as F

from dit_fast.pooling import PoolWindow, max_pool, pool_tangent, pool_transposed

# side of the planes, channels, columns
SIZES = [(28, 32, 1), (28, 32, 4), (14, 64, 4)]
WINDOWS = {"2 by 2": (2, 2, 0), "3 by 3": (3, 2, 1)}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("op", ["max_pool", "tangent", "transposed"])
@pytest.mark.parametrize(("side", "channels", "columns"), SIZES)
def bench_max_pool(benchmark, op, side, channels, columns, window):
    size, stride, padding = WINDOWS[window]
    batch = 2 if benchmark.disabled else 64
    x = torch.randn(batch, channels, side, side)
    how = PoolWindow((size, size), (stride, stride), (padding, padding), (1, 1))
    y, places = max_pool(x, how, 0.0)
    _, flat = F.max_pool2d(x, size, stride, padding, return_indices=True)
    tangents, deltas = torch.randn(batch, columns, *x.shape[1:]), torch.randn(batch, columns, *y.shape[1:])
    at, first = flat.flatten(2)[:, None].expand(-1, columns, -1, -1), (y > 0).float()[:, None]
    last = x.to(memory_format=torch.channels_last)

    def scattered():
        to = deltas.new_zeros(batch, columns, channels, side * side)
        return to.scatter_add_(3, at, (first * deltas).flatten(3)).view_as(tangents)

    ours, theirs = {
        "max_pool": (
            lambda: max_pool(x, how, 0.0)[0],
            lambda: F.max_pool2d(last, size, stride, padding, return_indices=True)[0].relu(),
        ),
        "tangent": (
            lambda: pool_tangent(how, places, tangents, y, 0.0),
            lambda: first * tangents.flatten(3).gather(3, at).view_as(deltas),
        ),
        "transposed": (lambda: pool_transposed(how, places, deltas, x.shape[2:], y, 0.0), scattered),
    }[op]
    assert (ours() - theirs()).abs().max() <= 1e-5
    benchmark.group = f"{op} {window}"
    benchmark(ours)
    if not benchmark.disabled:
        best = best_seconds({"ours": ours, "torch": theirs}, budget=0.5)
        benchmark.extra_info["ratio"] = round(best["torch"] / best["ours"], 2)
