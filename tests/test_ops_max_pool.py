"""The compiled pooling against torch's own, its derivatives against autograd, in float64; the twin against both."""

import re

import pytest
import torch
from ops_cases import num_threads
from torch.nn import functional as F

from dit_fast import ops_torch, pooling
from dit_fast.pooling import PoolWindow, max_pool, pool_tangent, pool_transposed

# [B, C, *spatial], kernel, stride, padding, dilation, ceil_mode
CASES = {
    "halves": ((2, 3, 8, 32), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "halves, odd": ((3, 2, 7, 23), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "halves, short rows": ((2, 2, 5, 13), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "halves, tiny": ((1, 1, 2, 3), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "halves, ceil": ((2, 2, 7, 11), (2, 2), (2, 2), (0, 0), (1, 1), True),
    "overlap": ((2, 3, 9, 10), (3, 3), (2, 2), (1, 1), (1, 1), False),
    "stride 1": ((1, 2, 6, 40), (3, 2), (1, 1), (1, 0), (1, 1), False),
    "stride 3, dilated": ((2, 1, 9, 14), (2, 3), (3, 3), (1, 1), (2, 2), True),
    "long rows": ((1, 1, 2, 600), (1, 3), (1, 2), (0, 1), (1, 1), False),
    "wide": ((2, 2, 18, 17), (16, 16), (1, 1), (2, 0), (1, 1), False),
    "one dimension": ((2, 3, 11), (3,), (2,), (1,), (1,), True),
    "one number": ((1, 1, 1), (1,), (1,), (0,), (1,), False),
}


def case(name, dtype=torch.float64):
    shape, *window = CASES[name]
    # few values, so that there are ties
    x = torch.randn(shape, dtype=torch.float64).mul(4).round().div(4).to(dtype)
    return x, PoolWindow(*window)


def torch_pool(window, slope):
    """F.leaky_relu would have the slope at 0 as ours; F.max_pool is torch's."""
    pool = F.max_pool1d if len(window.kernel) == 1 else F.max_pool2d
    arguments = {"stride": window.stride, "padding": window.padding, "dilation": window.dilation, "ceil_mode": window.ceil_mode}
    return lambda x: (
        F.leaky_relu(pool(x, window.kernel, **arguments), slope) if slope != 1 else pool(x, window.kernel, **arguments)
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("slope", [1.0, 0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_torchs(name, dtype, slope, device):
    x, window = case(name, dtype)
    y, places = max_pool(x.to(device), window, slope)
    f = torch_pool(window, slope)
    limit = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert torch.equal(y.cpu(), f(x)) if slope in (0, 1) else (y.cpu() - f(x)).abs().max() <= limit * x.abs().max()
    kept = None if slope == 1 else y
    K = 3
    tangents, deltas = torch.randn(len(x), K, *x.shape[1:], dtype=dtype), torch.randn(len(x), K, *y.shape[1:], dtype=dtype)
    found = pool_tangent(window, places, tangents.to(device), kept, slope).cpu()
    back = pool_transposed(window, places, deltas.to(device), x.shape[2:], kept, slope).cpu()
    point = x.double().requires_grad_()
    out = f(point)
    for k in range(K):
        (expected,) = torch.autograd.grad(out, point, deltas[:, k].double(), retain_graph=True)
        assert (back[:, k] - expected).abs().max() <= 10 * limit * deltas.abs().max()
        # ⟨δ, J ẋ⟩ of single outputs is ⟨Jᵀ δ, ẋ⟩: with δ of ones and zeros every output is seen
        mask = torch.randint(2, out.shape, dtype=torch.float64)
        (pulled,) = torch.autograd.grad(out, point, mask, retain_graph=True)
        size = tangents.abs().sum()
        assert ((found[:, k] * mask).sum() - (pulled * tangents[:, k]).sum()).abs() <= 10 * limit * size
    expected_jvp = torch.func.jvp(f, (x.double(),), (tangents[:, 0].double(),))[1]
    assert (found[:, 0] - expected_jvp).abs().max() <= 10 * limit * tangents.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_the_twin_gives_the_same(name):
    x, window = case(name)
    for slope in (1.0, 0.2):
        (y, places), (twin_y, twin_places) = max_pool(x, window, slope), ops_torch.max_pool(x, window, slope)
        assert torch.equal(y, twin_y) and torch.equal(places, twin_places) and places.dtype == twin_places.dtype
        kept = None if slope == 1 else y
        tangents, deltas = torch.randn(len(x), 2, *x.shape[1:]).double(), torch.randn(len(x), 2, *y.shape[1:]).double()
        ours = pool_tangent(window, places, tangents, kept, slope)
        theirs = ops_torch.pool_tangent(window, places, tangents, kept, slope)
        assert torch.equal(ours, theirs)
        ours = pool_transposed(window, places, deltas, x.shape[2:], kept, slope)
        theirs = ops_torch.pool_transposed(window, places, deltas, x.shape[2:], kept, slope)
        assert (ours - theirs).abs().max() <= 1e-14 * deltas.abs().max() * 9


def test_by_hand(device):
    # windows (1 7 | 7 2), (−3 −1 | −2 −5) and a column and row that belong to none
    x = torch.tensor([[1.0, 7, -3, -1, 9], [7, 2, -2, -5, 9], [9, 9, 9, 9, 9]], device=device)[None, None]
    window = PoolWindow((2, 2), (2, 2), (0, 0), (1, 1))
    y, places = max_pool(x, window, 0.5)
    assert y.tolist() == [[[[7.0, -0.5]]]]
    assert places.tolist() == [[[[1, 1]]]] and places.dtype == torch.uint8
    tangent = torch.arange(15.0, device=device).view(1, 1, 1, 3, 5)
    assert pool_tangent(window, places, tangent, y, 0.5).flatten().tolist() == [1.0, 1.5]
    back = pool_transposed(window, places, torch.tensor([10.0, 20.0], device=device).view(1, 1, 1, 1, 2), (3, 5), y, 0.5)
    assert back.flatten().tolist() == [0.0, 10, 0, 10, 0] + [0.0] * 10


@pytest.mark.parametrize("spatial", [(4, 20), (4, 9), (4, 6)])
def test_nan_and_infinities_are_seen_as_torch_sees_them(spatial):
    for window in (PoolWindow((2, 2), (2, 2), (0, 0), (1, 1)), PoolWindow((3, 3), (1, 1), (1, 1), (1, 1))):
        x = torch.randn(1, 2, *spatial)
        x[0, 0, 0, :3], x[0, 1, 3, 1], x[0, 1, :2, 2:4] = torch.nan, torch.inf, -torch.inf
        y, places = max_pool(x, window)
        expected, flat = F.max_pool2d(x, window.kernel, window.stride, window.padding, return_indices=True)
        assert torch.equal(y.nan_to_num(5), expected.nan_to_num(5))
        assert torch.equal(places, ops_torch.max_pool(x, window)[1])
        picked = pool_tangent(window, places, torch.arange(x[0].numel()).view(1, 1, *x.shape[1:]).double())
        assert torch.equal(picked[0, 0, 0], flat[0, 0].double())


def test_what_is_not_contiguous_and_threads_change_nothing():
    x, window = torch.randn(40, 6, 30, 30), PoolWindow((2, 2), (2, 2), (0, 0), (1, 1))
    with num_threads(1):
        y, places = max_pool(x, window)
    with num_threads(3):
        again, same = max_pool(x.to(memory_format=torch.channels_last), window)
        tangent = torch.randn(40, 1, 6, 30, 30).expand(-1, 2, -1, -1, -1)
        found = pool_tangent(window, places, tangent)
    assert torch.equal(y, again) and torch.equal(places, same)
    assert torch.equal(found, ops_torch.pool_tangent(window, places, tangent))


def test_what_does_not_fit_is_refused():
    window, x = PoolWindow((2, 2), (2, 2), (0, 0), (1, 1)), torch.randn(1, 2, 4, 4)
    y, places = max_pool(x, window)
    for call, error, message in (
        (lambda: max_pool(x.int(), window), TypeError, "x must be float32 or float64, got torch.int32"),
        (lambda: max_pool(x, window, -0.1), ValueError, "slope must be 0 or more, got -0.1"),
        (lambda: max_pool(x[..., :1], window), ValueError, "a window of 2 (stride 2, padding 0, dilation 1) does not fit 1"),
        (lambda: max_pool(x[0, 0], window), ValueError, "a pooling over 2 dimensions does not fit 0 spatial ones"),
        (lambda: max_pool(x, window._replace(padding=(4, 0))), ValueError, "lies in the padding of 4 numbers"),
        (lambda: pool_tangent(window, places, x[:, None, :1]), ValueError, "do not belong to this pooling"),
        (lambda: pool_tangent(window, places, x[:, None].half()), TypeError, "tangents must be float32 or float64"),
        (lambda: pool_tangent(window, places.int(), x[:, None]), TypeError, "places must be as max_pool gave them"),
        (lambda: pool_tangent(window, places, x[:, None], y.double(), 0.0), ValueError, "y must be as max_pool gave it"),
        (lambda: pool_transposed(window, places, y[:, None], (5, 6)), ValueError, "do not belong to this pooling"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_torchs(name):
    x, window = case(name)
    assert pooling.pooled_size(window, x.shape[2:]) == list(torch_pool(window, 1.0)(x).shape[2:])
