"""grad_dot against pencil, twin and itself."""

import pytest
import torch
from ops_cases import SHAPES, THREADS, built_in_product, num_threads, relative_error, to, tolerance

from dit_fast import ops, ops_torch


def operands(shape, dtype, *, layout="contiguous", bias=True, seed=0):
    """dots, delta, activations, weight, bias of random numbers; `flat`: U and v are slices of one flat [K, P] block."""
    K, B, S, O, I = shape
    generator = torch.Generator().manual_seed(seed)
    delta, activations, weight, v = (
        torch.randn(*n, generator=generator, dtype=dtype) for n in ((B, S, O), (B, S, I), (K, O, I), (K, O))
    )
    dots = torch.randn(K, B, generator=generator, dtype=torch.float64)
    if layout == "flat":
        block = torch.cat([torch.zeros(K, 3, dtype=dtype), weight.flatten(1), v], dim=1)
        weight, v = block[:, 3 : 3 + O * I].view(K, O, I), block[:, 3 + O * I :]
        delta = delta.transpose(0, 1).contiguous().transpose(0, 1)
        activations = torch.cat([activations, activations], dim=2)[:, :, :I]
        dots = torch.cat([dots, dots], dim=1)[:, :B]
    return dots, delta, activations, weight, v if bias else None


def check(args, limit):
    dots, delta, activations, weight, bias = args
    expected = dots.cpu().clone()
    before = expected.clone()
    wide = [None if x is None else x.cpu().double() for x in (delta, activations, weight, bias)]
    ops_torch.grad_dot(expected, *wide)
    ops.grad_dot(dots, delta, activations, weight, bias)
    assert relative_error(dots.cpu() - before, expected - before) <= limit


def test_by_hand(device):
    # one column, one sample, one position: δ = (1, 2), a = (3, 4), U = ((1, 10), (100, 1000)), v = (5, 7)
    #   U a = (43, 4300), δ·(U a) = 43 + 8600 = 8643, δ·v = 5 + 14 = 19
    dots = torch.tensor([[0.5]], dtype=torch.float64, device=device)
    delta, activations = torch.tensor([[[1.0, 2.0]]], device=device), torch.tensor([[[3.0, 4.0]]], device=device)
    weight, bias = torch.tensor([[[1.0, 10.0], [100.0, 1000.0]]], device=device), torch.tensor([[5.0, 7.0]], device=device)
    ops.grad_dot(dots, delta, activations, weight)
    assert dots.item() == 0.5 + 8643
    ops.grad_dot(dots, delta, activations, weight, bias)
    assert dots.item() == 0.5 + 8643 + 8643 + 19


def test_by_hand_sums_positions_and_keeps_samples_and_columns_apart(device):
    # O = I = 1: δ·a per position, sample 0: 1·1 + 2·10 = 21 (Σδ = 3), sample 1: 3·100 + 4·1000 = 4300 (Σδ = 7)
    delta = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]], dtype=torch.float64, device=device)
    activations = torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]], dtype=torch.float64, device=device)
    weight = torch.tensor([[[1.0]], [[2.0]]], dtype=torch.float64, device=device)
    bias = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device=device)
    dots = torch.zeros(2, 2, dtype=torch.float64, device=device)
    ops.grad_dot(dots, delta, activations, weight, bias)
    assert dots.tolist() == [[21, 4300], [2 * 21 + 3, 2 * 4300 + 7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "flat"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_twin(device, shape, bias, layout, dtype):
    check(to(device, operands(shape, dtype, layout=layout, bias=bias)), tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "flat"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_built_in_product_agrees_with_twin(shape, layout, dtype):
    with built_in_product():
        check(operands(shape, dtype, layout=layout), tolerance(dtype))


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("built_in", [False, True], ids=["blas", "built_in"])
def test_any_number_of_threads(threads, built_in):
    # large enough for every parallel region; several samples share one tile of rows, one sample spans two
    args = operands((3, 5, 211, 150, 40), torch.float64)
    with num_threads(threads), built_in_product(built_in):
        check(args, 1e-12)
        results = []
        for _ in range(2):
            dots = torch.zeros(3, 5, dtype=torch.float64)
            ops.grad_dot(dots, *args[1:])
            results.append(dots)
    assert torch.equal(*results)


def test_expanded_and_overlapping_inputs_are_read_right(device):
    dots, _, activations, weight, bias = to(device, operands((2, 4, 3, 5, 6), torch.float64))
    delta = torch.randn(1, 1, 5, dtype=torch.float64, device=device).expand(4, 3, 5)
    check((dots, delta, activations, weight, bias), 1e-12)
    windows = torch.randn(4, 8, dtype=torch.float64, device=device).unfold(1, 6, 1)
    check((dots, delta, windows, weight[:1].expand(2, 5, 6), bias), 1e-12)
    check((dots, delta, windows, torch.randn(2, 10, dtype=torch.float64).to(device).unfold(1, 6, 1), bias), 1e-12)


@pytest.mark.parametrize("built_in", [False, True], ids=["blas", "built_in"])
def test_nan_stays_in_its_column(built_in):
    dots, delta, activations, weight, _ = operands((3, 4, 2, 5, 6), torch.float64, layout="flat")
    weight[1, 2, 3] = float("nan")
    with built_in_product(built_in):
        ops.grad_dot(dots, delta, activations, weight)
    assert dots.isnan().all(dim=1).tolist() == [False, True, False] and not dots[[0, 2]].isnan().any()


def test_strides_beyond_32_bits(tmp_path):
    # a sparse file: 8 GiB of addresses, two pages of disk
    dots, delta, activations, weight, bias = operands((1, 3, 2, 2, 5), torch.float32)
    far = torch.from_file(str(tmp_path / "weight"), shared=True, size=2**31 + 16, dtype=torch.float32)
    wide = far.as_strided(weight.shape, (0, 2**31 + 1, 1)).copy_(weight)
    check((dots, delta, activations, wide, bias), 1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 0, 5)], ids=str)
def test_empty_changes_nothing(device, shape):
    dots, *rest = to(device, operands(shape, torch.float32))
    before = dots.clone()
    ops.grad_dot(dots, *rest)
    assert torch.equal(dots, before)


def test_no_inputs_leave_the_bias_part(device):
    check(to(device, operands((2, 3, 4, 5, 0), torch.float64)), 1e-12)
    dots, *rest = to(device, operands((2, 3, 4, 5, 0), torch.float64, bias=False))
    before = dots.clone()
    ops.grad_dot(dots, *rest)
    assert torch.equal(dots, before)


def test_negative_control():
    dots, delta, activations, weight, bias = operands((2, 3, 4, 5, 6), torch.float64)
    expected = dots.clone()
    ops_torch.grad_dot(expected, delta, activations, weight)
    ops.grad_dot(dots, delta, activations, weight, bias)
    assert relative_error(dots, expected) > 1e-3


def test_float32_dots_are_summed_in_double():
    # 2^24 + 1 is no float32: δ·z is 2^12 · 2^12 for one output, 1 for the other
    dots = torch.zeros(1, 1, dtype=torch.float64)
    weight = torch.tensor([[[4096.0], [1.0]]])
    ops.grad_dot(dots, torch.tensor([[[4096.0, 1.0]]]), torch.ones(1, 1, 1), weight)
    assert dots.item() == 2**24 + 1


def test_autograd_notices_the_write():
    dots, *rest = operands((2, 3, 1, 4, 5), torch.float64)
    version = dots._version
    ops.grad_dot(dots, *rest)
    assert dots._version > version


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_obeys_streams_and_graph_capture(device):
    dots, *rest = to(device, operands((3, 33, 2, 65, 31), torch.float64))
    start = dots.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.grad_dot(dots, *rest)
    torch.cuda.current_stream().wait_stream(stream)
    once = dots - start
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.grad_dot(dots, *rest)
    assert torch.equal(dots - start, once)  # capture runs nothing
    graph.replay()
    graph.replay()
    assert relative_error(dots - start, 3 * once) <= 1e-12


BAD = {
    "delta is no tensor": (TypeError, "delta must be a tensor", lambda x: x.update(delta=[1.0])),
    "weight is flat": (ValueError, r"weight must have shape \[K, O, I\]", lambda x: x.update(weight=x["weight"].flatten(1))),
    "delta lacks S": (ValueError, r"delta must have shape \[B, S, O\] or", lambda x: x.update(delta=x["delta"][:, 0])),
    "delta has other O": (ValueError, "delta .* with O = 4", lambda x: x.update(delta=x["delta"][..., :3])),
    "activations has other I": (ValueError, "activations must", lambda x: x.update(activations=x["activations"][..., :4])),
    "activations is no tensor": (TypeError, "activations must be a tensor", lambda x: x.update(activations=None)),
    "dots has other B": (ValueError, r"dots must have shape \[K, B\] = \[2, 3\]", lambda x: x.update(dots=x["dots"][:, :2])),
    "dots is float32": (TypeError, "dots must be float64, got float32", lambda x: x.update(dots=x["dots"].float())),
    "dots is expanded": (
        ValueError,
        "dots is written to and must not overlap",
        lambda x: x.update(dots=x["dots"][:1].expand(2, 3)),
    ),
    "bias has other O": (ValueError, "bias must have shape", lambda x: x.update(bias=x["bias"][:, :3])),
    "delta is float32": (TypeError, "delta must be float64 as weight is", lambda x: x.update(delta=x["delta"].float())),
    "bias is float32": (TypeError, "bias must be float64 as weight is", lambda x: x.update(bias=x["bias"].float())),
    "all half": (
        TypeError,
        "weight must be float32 or float64, got float16",
        lambda x: x.update({n: x[n].half() for n in ("delta", "activations", "weight", "bias")}),
    ),
    "weight is transposed": (
        ValueError,
        "weight must be contiguous in its last dimension",
        lambda x: x.update(weight=x["weight"].transpose(1, 2).contiguous().transpose(1, 2)),
    ),
    "delta on meta": (ValueError, "delta must be on cpu", lambda x: x.update(delta=x["delta"].to("meta"))),
    "all on meta": (
        ValueError,
        "weight must be on a cpu or cuda device",
        lambda x: x.update({n: v.to("meta") for n, v in x.items()}),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_raise_and_name_the_argument(case):
    error, message, spoil = BAD[case]
    names = ("dots", "delta", "activations", "weight", "bias")
    args = dict(zip(names, operands((2, 3, 2, 4, 5), torch.float64), strict=True))
    spoil(args)
    with pytest.raises(error, match=message):
        ops.grad_dot(**args)
