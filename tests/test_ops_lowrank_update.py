"""lowrank_update against pencil, twin and itself."""

import pytest
import torch
from ops_cases import SHAPES, THREADS, built_in_product, num_threads, relative_error, to, tolerance

from dit_fast import ops, ops_torch

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def operands(shape, dtype, *, layout="contiguous", bias=True, seed=0):
    """weight, bias, coefficients, delta, activations; `flat`: U and v are slices of one flat [K, P] block."""
    K, B, S, O, I = shape
    generator = torch.Generator().manual_seed(seed)
    delta, activations, weight, v = (
        torch.randn(*n, generator=generator, dtype=dtype) for n in ((B, S, O), (B, S, I), (K, O, I), (K, O))
    )
    coefficients = torch.randn(K, B, generator=generator, dtype=torch.float64)
    if layout == "flat":
        block = torch.cat([torch.zeros(K, 3, dtype=dtype), weight.flatten(1), v], dim=1)
        weight, v = block[:, 3 : 3 + O * I].view(K, O, I), block[:, 3 + O * I :]
        delta = delta.transpose(0, 1).contiguous().transpose(0, 1)
        activations = torch.cat([activations, activations], dim=2)[:, :, :I]
        coefficients = torch.cat([coefficients, coefficients], dim=1)[:, :B]
    return weight, v if bias else None, coefficients, delta, activations


def check(args, limit):
    """The change of U and v, each against the float64 twin started from the same values."""
    before = [None if x is None else x.detach().cpu().double().clone() for x in args[:2]]
    expected = [None if x is None else x.clone() for x in before]
    ops_torch.lowrank_update(*expected, *(x.cpu().double() for x in args[2:]))
    ops.lowrank_update(*args)
    for value, start, end in zip(args[:2], before, expected, strict=True):
        if value is not None and value.numel():
            change = value.cpu().double() - start
            assert relative_error(change, end - start) <= limit


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_by_hand(device, dtype):
    # c = 2, δ = (1, 10), a = (3, 4): c δ aᵀ = ((6, 8), (60, 80)), c δ = (2, 20)
    weight = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]], dtype=dtype, device=device)
    bias = torch.tensor([[5.0, 5.0]], dtype=dtype, device=device)
    coefficients = torch.tensor([[2.0]], dtype=torch.float64, device=device)
    delta = torch.tensor([[[1.0, 10.0]]], dtype=dtype, device=device)
    activations = torch.tensor([[[3.0, 4.0]]], dtype=dtype, device=device)
    ops.lowrank_update(weight, bias, coefficients, delta, activations)
    assert weight.tolist() == [[[7, 9], [61, 81]]]
    assert bias.tolist() == [[7, 25]]
    ops.lowrank_update(weight, None, coefficients, delta, activations)
    assert weight.tolist() == [[[13, 17], [121, 161]]]


def test_by_hand_sums_positions_and_weighs_samples_and_columns(device):
    # O = I = 1: Σ_s δ·a is 1·1 + 2·10 = 21 and 3·100 + 4·1000 = 4300; Σ_s δ is 3 and 7
    delta = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]], dtype=torch.float64, device=device)
    activations = torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]], dtype=torch.float64, device=device)
    coefficients = torch.tensor([[1.0, 0.0], [-2.0, 3.0]], dtype=torch.float64, device=device)
    weight, bias = (torch.zeros(2, *n, dtype=torch.float64, device=device) for n in ((1, 1), (1,)))
    ops.lowrank_update(weight, bias, coefficients, delta, activations)
    assert weight.flatten().tolist() == [21, -2 * 21 + 3 * 4300]
    assert bias.flatten().tolist() == [3, -2 * 3 + 3 * 7]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "flat"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_twin(device, shape, bias, layout, dtype):
    check(to(device, operands(shape, dtype, layout=layout, bias=bias)), tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "flat"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_built_in_product_agrees_with_twin(shape, layout, dtype):
    with built_in_product():
        check(operands(shape, dtype, layout=layout), tolerance(dtype))


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("built_in", [False, True], ids=["blas", "built_in"])
def test_any_number_of_threads(threads, built_in):
    # large enough for every parallel region; several samples share one tile of rows, one sample spans two
    weight, bias, *rest = operands((3, 5, 211, 150, 40), torch.float64)
    with num_threads(threads), built_in_product(built_in):
        results = []
        for _ in range(2):
            results.append((weight.clone(), bias.clone()))
            check((*results[-1], *rest), 1e-12)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_elements_outside_the_views_stay(device):
    block = torch.full((3, 5, 8), 7.0, device=device)
    weight = block[:, 1:4, 2:6]
    args = to(device, operands((3, 6, 2, 3, 4), torch.float32))
    check((weight, *args[1:]), 1e-5)
    outside = torch.ones_like(block, dtype=torch.bool)
    outside[:, 1:4, 2:6] = False
    assert (block[outside] == 7).all()


def test_columns_may_be_interleaved(device):
    # k the fast dimension of the rows: outputs farther apart than columns
    weight = to(device, [torch.randn(4, 3, 5, dtype=torch.float64)])[0].transpose(0, 1)
    args = to(device, operands((3, 6, 2, 4, 5), torch.float64))
    check((weight, *args[1:]), 1e-12)
    with built_in_product():
        check((weight, *args[1:]), 1e-12)


def test_expanded_and_overlapping_inputs_are_read_right(device):
    weight, bias, coefficients, _, _ = to(device, operands((2, 4, 3, 5, 6), torch.float64))
    delta = torch.randn(1, 1, 5, dtype=torch.float64, device=device).expand(4, 3, 5)
    windows = torch.randn(4, 8, dtype=torch.float64, device=device).unfold(1, 6, 1)
    check((weight, bias, coefficients, delta, windows), 1e-12)


def test_strides_beyond_32_bits(tmp_path):
    # a sparse file: 8 GiB of addresses, two pages of disk
    weight, *rest = operands((1, 3, 2, 2, 5), torch.float32)
    far = torch.from_file(str(tmp_path / "weight"), shared=True, size=2**31 + 16, dtype=torch.float32)
    check((far.as_strided(weight.shape, (0, 2**31 + 1, 1)).copy_(weight), *rest), 1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 0, 5)], ids=str)
def test_empty_changes_nothing(device, shape):
    weight, bias, *rest = to(device, operands(shape, torch.float32))
    before = weight.clone(), bias.clone()
    ops.lowrank_update(weight, bias, *rest)
    assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])


def test_no_inputs_leave_the_bias_part(device):
    check(to(device, operands((2, 3, 4, 5, 0), torch.float64)), 1e-12)


def test_negative_control():
    weight, bias, coefficients, delta, activations = operands((2, 3, 4, 5, 6), torch.float64)
    expected = weight.clone()
    ops_torch.lowrank_update(expected, None, coefficients.flip(1), delta, activations)
    ops.lowrank_update(weight, bias, coefficients, delta, activations)
    assert relative_error(weight, expected) > 1e-3


def test_is_the_transpose_of_grad_dot(device):
    # ⟨U', Σ_b c_b ∇ℓ_b⟩ = Σ_b c_b ⟨U', ∇ℓ_b⟩
    weight, bias, coefficients, delta, activations = to(device, operands((2, 7, 3, 5, 6), torch.float64))
    dots = torch.zeros_like(coefficients)
    ops.grad_dot(dots, delta, activations, weight, bias)
    change, bias_change = torch.zeros_like(weight), torch.zeros_like(bias)
    ops.lowrank_update(change, bias_change, coefficients, delta, activations)
    left = (change * weight).sum((1, 2)) + (bias_change * bias).sum(1)
    assert relative_error(left, (coefficients * dots).sum(1)) <= 1e-12


def test_autograd_notices_the_writes():
    weight, bias, *rest = operands((2, 3, 1, 4, 5), torch.float64)
    versions = weight._version, bias._version
    ops.lowrank_update(weight, bias, *rest)
    assert weight._version > versions[0] and bias._version > versions[1]


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_obeys_streams_and_graph_capture(device):
    weight, bias, *rest = to(device, operands((3, 33, 2, 65, 31), torch.float64))
    weight.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.lowrank_update(weight, bias, *rest)
    torch.cuda.current_stream().wait_stream(stream)
    once = weight.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.lowrank_update(weight, bias, *rest)
    assert torch.equal(weight, once)  # capture runs nothing
    graph.replay()
    graph.replay()
    assert relative_error(weight, 3 * once) <= 1e-12


BAD = {
    "weight is no tensor": (TypeError, "weight must be a tensor", lambda x: x.update(weight=None)),
    "delta is flat": (ValueError, r"delta must have shape \[B, S, O\]", lambda x: x.update(delta=x["delta"].flatten(1))),
    "delta has other O": (ValueError, "delta .* with O = 4", lambda x: x.update(delta=x["delta"][..., :3])),
    "activations has other S": (ValueError, "activations must", lambda x: x.update(activations=x["activations"][:, :1])),
    "coefficients has other B": (
        ValueError,
        r"coefficients must have shape \[K, B\] = \[2, 3\]",
        lambda x: x.update(coefficients=x["coefficients"][:, :2]),
    ),
    "coefficients is float32": (
        TypeError,
        "coefficients must be float64, got float32",
        lambda x: x.update(coefficients=x["coefficients"].float()),
    ),
    "coefficients is no tensor": (
        TypeError,
        "coefficients must be a tensor",
        lambda x: x.update(coefficients=[[1.0] * 3] * 2),
    ),
    "bias has other O": (ValueError, "bias must have shape", lambda x: x.update(bias=x["bias"][:, :3])),
    "bias is expanded": (
        ValueError,
        "bias is written to and must not overlap",
        lambda x: x.update(bias=x["bias"][:1].expand(2, 4)),
    ),
    "weight is expanded": (
        ValueError,
        "weight is written to and must not overlap",
        lambda x: x.update(weight=x["weight"][:1].expand(2, 4, 5)),
    ),
    "delta is float32": (TypeError, "delta must be float64 as weight is", lambda x: x.update(delta=x["delta"].float())),
    "delta is transposed": (
        ValueError,
        "delta must be contiguous in its last dimension",
        lambda x: x.update(delta=x["delta"].transpose(1, 2).contiguous().transpose(1, 2)),
    ),
    "activations on meta": (
        ValueError,
        "activations must be on cpu",
        lambda x: x.update(activations=x["activations"].to("meta")),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_raise_and_name_the_argument(case):
    error, message, spoil = BAD[case]
    names = ("weight", "bias", "coefficients", "delta", "activations")
    args = dict(zip(names, operands((2, 3, 2, 4, 5), torch.float64), strict=True))
    spoil(args)
    with pytest.raises(error, match=message):
        ops.lowrank_update(**args)
