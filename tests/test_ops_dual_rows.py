"""The compiled duals of activations and losses against autograd in float64 and numbers by hand; the twins against both."""

import math
import re

import pytest
import torch
from ops_cases import num_threads
from torch.nn import functional as F

from dit_fast import ops_torch
from dit_fast.dual_rows import SMOOTH, activation_columns, activation_values, loss_columns

FUNCTIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
# what is in front of them, B, and what is behind, K = 3 columns between: single numbers, odd rows, more than a block
SHAPES = [(1, 1), (5,), (7, 3), (3, 17), (2, 5, 3), (3, 4, 5, 6), (2, 3, 41, 53), (2, 0), (0, 4)]
LIMITS = {torch.float32: 5e-6, torch.float64: 1e-13}
K = 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def last(value):
    """With channels last, [B, C, H, W] or [B, K, C, H, W]."""
    order = (0, *range(2, value.ndim), 1) if value.ndim == 4 else (0, 1, 3, 4, 2)
    back = (0, 3, 1, 2) if value.ndim == 4 else (0, 1, 4, 2, 3)
    return value.permute(order).contiguous().permute(back)


def stacked(value):
    """[B, K, C, H, W] as a convolution with K·C channels, these last, leaves it."""
    return value.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


def by_autograd(f, x):
    point = x.double().requires_grad_()
    y = f(point)
    (first,) = torch.autograd.grad(y.sum(), point, create_graph=True)
    return y.detach(), first.detach(), torch.autograd.grad(first.sum(), point)[0]


def test_every_smooth_activation_is_tested():
    assert tuple(FUNCTIONS) == SMOOTH


@DTYPES
@pytest.mark.parametrize("name", SMOOTH)
def test_values_are_autograds(name, dtype, device):
    # over all magnitudes, where gelu has its own care, and far out
    x = torch.cat([torch.randn(400) * 3, torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e-31, -1e-20, 1e-5, 9.0, -9.0, 30.0, -30.0])])
    x = x.to(dtype)
    for found, expected in zip(activation_values(name, x.to(device)), by_autograd(FUNCTIONS[name], x), strict=True):
        assert (found.cpu().double() - expected).abs().max() <= LIMITS[dtype]
        assert found.dtype == dtype
    for found, expected in zip(activation_values(name, x.to(device)), ops_torch.activation_values(name, x), strict=True):
        assert (found.cpu() - expected).abs().max() <= LIMITS[dtype]


def test_values_by_hand():
    y, first, second = activation_values("silu", torch.tensor([0.0], dtype=torch.float64))
    assert (y.item(), first.item(), second.item()) == (0.0, 0.5, 0.5)
    y, first, second = activation_values("tanh", torch.tensor([math.atanh(0.5)], dtype=torch.float64))
    assert [round(v.item(), 12) for v in (y, first, second)] == [0.5, 0.75, -0.75]
    # Φ(0) = ½, φ(0) = 1/√(2π)
    y, first, second = activation_values("gelu", torch.tensor([0.0], dtype=torch.float64))
    assert (y.item(), first.item()) == (0.0, 0.5) and second.item() == pytest.approx(2 / math.sqrt(2 * math.pi), rel=1e-15)


def test_nan_stays_nan_and_nothing_else_becomes_it():
    for name in SMOOTH:
        for found in activation_values(name, torch.tensor([1.0, torch.nan, -2.0])):
            assert found.isnan().tolist() == [False, True, False]
    gate, value = torch.tensor([[1.0, torch.nan, -1.0]]), torch.tensor([[[2.0, 3.0, torch.nan]]])
    assert activation_columns(gate, value)[0, 0].isnan().tolist() == [False, True, True]
    # where x is NaN or 0 the slope is that of the left side
    zeros = torch.tensor([[0.0, -0.0]])
    for columns in (activation_columns, ops_torch.activation_columns):
        assert columns(zeros, torch.ones(1, 1, 2), slope=0.5).tolist() == [[[0.5, 0.5]]]
    assert activation_columns(gate, torch.ones(1, 1, 3), slope=0.5).tolist() == [[[1.0, 0.5, 0.5]]]


@pytest.mark.parametrize("name", SMOOTH)
def test_values_of_any_layout(name):
    x = torch.randn(3, 4, 5, 6)
    expected = activation_values(name, x)
    for other in (last(x), torch.randn(3, 8, 5, 6)[:, ::2].copy_(x), x.transpose(2, 3).contiguous().transpose(2, 3)):
        for found, value in zip(activation_values(name, other), expected, strict=True):
            assert (found - value).abs().max() <= 1e-6


def operands(shape, dtype=torch.float64, columns=K):
    """gate, value, curve, tangent"""
    wide = (shape[0], columns, *shape[1:])
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in (shape, wide, shape, wide)]


def by_loops(gate, value, curve, tangent):
    expected = torch.zeros(value.shape, dtype=torch.float64)
    for b in range(value.shape[0]):
        for k in range(value.shape[1]):
            expected[b, k] = gate[b].double() * value[b, k].double()
            if curve is not None:
                expected[b, k] += curve[b].double() * tangent[b, k].double()
    return expected


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns_are_what_the_formula_says(shape, dtype, device):
    gate, value, curve, tangent = operands(shape, dtype)
    factor = torch.full_like(gate, 0.3).masked_fill(gate > 0, 1)
    for given, slope, expected in (
        ((gate, value, curve, tangent), None, by_loops(gate, value, curve, tangent)),
        ((gate, value), None, by_loops(gate, value, None, None)),
        ((gate, value), 0.3, by_loops(factor, value, None, None)),
    ):
        found = activation_columns(*[v.to(device) for v in given], slope=slope).cpu()
        assert found.shape == value.shape and found.dtype == dtype
        assert torch.allclose(found.double(), expected, rtol=0, atol=LIMITS[dtype] * 5)
        twin = ops_torch.activation_columns(*given, slope=slope)
        assert torch.allclose(found, twin, rtol=0, atol=LIMITS[dtype] * 5)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_tangent_of_a_cotangent_is_autograds(name):
    x, dx, delta, ddelta = (torch.randn(4, 6, dtype=torch.float64) for _ in range(4))
    f = FUNCTIONS[name]

    def backward(x, delta):
        return torch.func.vjp(f, x)[1](delta)[0]

    expected = torch.func.jvp(backward, (x, delta), (dx, ddelta))[1]
    _, first, second = activation_values(name, x)
    found = activation_columns(first, ddelta[:, None], second * delta, dx[:, None])[:, 0]
    assert (found - expected).abs().max() <= 1e-13
    assert (activation_columns(first, dx[:, None])[:, 0] - torch.func.jvp(f, (x,), (dx,))[1]).abs().max() <= 1e-13


@pytest.mark.parametrize("layout", [torch.clone, last, stacked])
@pytest.mark.parametrize("shared", [torch.clone, last])
@pytest.mark.parametrize("other", [torch.clone, last, stacked])
def test_any_layout_gives_the_same(layout, shared, other):
    gate, value, curve, tangent = operands((3, 4, 5, 6))
    expected = activation_columns(gate, value, curve, tangent)
    found = activation_columns(shared(gate), layout(value), shared(curve), other(tangent))
    assert torch.equal(found, expected)
    mixed = activation_columns(shared(gate), layout(value), curve, other(tangent))
    assert torch.equal(mixed, expected)
    if (layout is torch.clone) == (shared is torch.clone):
        assert found.stride() == layout(value).stride()
    again = activation_columns(shared(gate), layout(value), slope=0.2)
    assert torch.equal(again, activation_columns(gate, value, slope=0.2))


def test_what_is_not_contiguous_and_threads_change_nothing():
    gate, value, curve, tangent = operands((40, 6, 30, 31), torch.float32, 2)
    with num_threads(1):
        expected = activation_columns(gate, value, curve, tangent)
        values = activation_values("gelu", gate)
    with num_threads(3):
        found = activation_columns(gate, value, curve, tangent)
        again = activation_values("gelu", gate)
        wide = value[:, :1].expand(-1, 2, -1, -1, -1)
        spread = activation_columns(gate[:, :, ::2], wide[..., ::2, :], curve[:, :, ::2], tangent[..., ::2, :])
    assert torch.equal(found, expected) and all(map(torch.equal, values, again))
    assert torch.allclose(spread, (gate[:, None] * wide + curve[:, None] * tangent)[..., ::2, :], atol=1e-5)


def test_in_place_overwrites_the_value_alone():
    gate, value, curve, tangent = operands((3, 50))
    kept = [v.clone() for v in (gate, curve, tangent)]
    expected = activation_columns(gate, value, curve, tangent)
    before = value.clone()
    assert activation_columns(gate, value, curve, tangent) is not value and torch.equal(value, before)
    found = activation_columns(gate, value, curve, tangent, in_place=True)
    assert found.data_ptr() == value.data_ptr() and torch.equal(found, expected)
    assert all(map(torch.equal, (gate, curve, tangent), kept))
    twin = before.clone()
    assert ops_torch.activation_columns(gate, twin, curve, tangent, in_place=True) is twin
    assert torch.allclose(twin, expected)
    # one that is spread is copied
    one = torch.ones(1, 1, 50, dtype=torch.float64)
    activation_columns(gate, one.expand(3, 2, 50), in_place=True)
    assert torch.equal(one, torch.ones_like(one))


LOSSES = {
    "cross_entropy": lambda z, target: F.cross_entropy(z, target, reduction="none"),
    "bce_logits": lambda z, target: F.binary_cross_entropy_with_logits(z, target, reduction="none").sum(1),
    "squared_error": lambda z, target: (z - target).square().sum(1),
}


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 10), (3, 1, 7), (2, 4, 1), (0, 2, 3), (70, 200, 10)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_curvatures_of_losses_are_autograds(loss, sizes, dtype, device):
    B, K, O = sizes
    z, tangent = torch.randn(B, O, dtype=dtype) * 3, torch.randn(B, K, O, dtype=dtype)
    target = torch.randint(O, (B,)) if loss == "cross_entropy" else torch.rand(B, O, dtype=torch.float64)
    a, scale = torch.randn(B).double(), 0.4
    p = {"cross_entropy": z.softmax(1), "bce_logits": z.sigmoid(), "squared_error": None}[loss]
    with num_threads(2):
        found = loss_columns(loss, scale, None if p is None else p.to(device), a.to(device), tangent.to(device)).cpu()
    assert found.dtype == dtype
    point = z.double().requires_grad_()
    (slope,) = torch.autograd.grad((a * scale * LOSSES[loss](point, target)).sum(), point, create_graph=True)
    for k in range(0, K, 37):
        (expected,) = torch.autograd.grad(slope, point, tangent[:, k].double(), retain_graph=True)
        assert torch.allclose(found[:, k].double(), expected, rtol=0, atol=LIMITS[dtype] * 5)
    assert torch.allclose(found, ops_torch.loss_columns(loss, scale, p, a, tangent), rtol=0, atol=LIMITS[dtype] * 5)


def test_cross_entropy_by_hand():
    # p ∘ v − p ⟨p, v⟩ with ⟨p, v⟩ = 2, twice a = 3
    p, v = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[[1.0, 2.0, 4.0]]])
    assert loss_columns("cross_entropy", 2.0, p, torch.tensor([3.0]), v).tolist() == [[[-3.0, 0.0, 3.0]]]


def test_what_does_not_fit_is_refused():
    gate, value, curve, tangent = operands((2, 4))
    p, a = torch.rand(2, 4).double(), torch.ones(2)
    for call, error, message in (
        (lambda: activation_values("relu", gate), ValueError, "activation must be one of tanh, sigmoid, silu, gelu"),
        (lambda: activation_values("tanh", gate.half()), TypeError, "x must be float32 or float64, got torch.float16"),
        (lambda: activation_columns(gate, value.int()), TypeError, "value must be float32 or float64, got torch.int32"),
        (lambda: activation_columns(gate, value[0, 0]), ValueError, "value must be [B, K, ...], got [4]"),
        (lambda: activation_columns(gate[:1], value), ValueError, "gate must be [2, 4] torch.float64, got [1, 4]"),
        (lambda: activation_columns(gate.float(), value), ValueError, "torch.float64, got [2, 4] torch.float32"),
        (lambda: activation_columns(gate, value, curve), ValueError, "curve and tangent come together, and not with a slope"),
        (lambda: activation_columns(gate, value, curve, tangent, slope=0.0), ValueError, "curve and tangent come together"),
        (lambda: activation_columns(gate, value, curve, tangent[:, :1]), ValueError, "tangent must be [2, 3, 4]"),
        (lambda: activation_columns(gate, value, curve[:1], tangent), ValueError, "curve must be [2, 4]"),
        (lambda: loss_columns("hinge", 1.0, p, a, value), ValueError, "loss must be one of cross_entropy, bce_logits"),
        (lambda: loss_columns("bce_logits", 1.0, p, a, value.half()), TypeError, "tangents must be float32 or float64"),
        (lambda: loss_columns("bce_logits", 1.0, p, a, value[0]), ValueError, "tangents must be [B, K, O], got [3, 4]"),
        (lambda: loss_columns("bce_logits", 1.0, p, a[:1], value), ValueError, "coefficients must be [2], got [1]"),
        (lambda: loss_columns("bce_logits", 1.0, None, a, value), ValueError, "probabilities belong to cross_entropy and bce"),
        (lambda: loss_columns("squared_error", 1.0, p, a, value), ValueError, "probabilities belong to cross_entropy and bce"),
        (lambda: loss_columns("cross_entropy", 1.0, p[:1], a, value), ValueError, "probabilities must be [2, 4] torch.float64"),
        (lambda: activation_columns(gate.to("meta"), value), ValueError, "all tensors must be on cpu, as the tangents are"),
        (lambda: activation_values("tanh", gate.to("meta")), ValueError, "dual numbers are compiled for the CPU and CUDA"),
    ):  # fmt: skip
        with pytest.raises(error, match=re.escape(message)):
            call()
