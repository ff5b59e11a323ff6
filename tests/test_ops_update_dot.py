"""update_dot, rows per sample and grouped layers, against pencil, literal sums in float64, the two ops and itself."""

import random

import pytest
import torch
from ops_cases import THREADS, built_in_product, num_threads, relative_error, to, tolerance

from dit_fast import ops, ops_torch

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# K, (B, R, S) of the update, (B, R, S) of the dots, O, I; R of 0 stands for a delta without R
CASES = [
    (1, (1, 0, 1), (1, 0, 1), 1, 1),
    (2, (5, 0, 1), (3, 0, 2), 4, 7),
    (3, (7, 2, 3), (4, 3, 2), 5, 9),
    (21, (64, 0, 1), (60, 0, 1), 8, 62),
    (21, (16, 1, 1), (16, 1, 1), 1, 8),
    (4, (33, 0, 2), (3, 0, 70), 65, 31),
    (1, (6, 10, 1), (5, 10, 3), 10, 130),
    (2, (70, 0, 1), (65, 2, 1), 300, 530),
    (3, (2, 0, 520), (520, 0, 1), 350, 3),
    (200, (2, 1, 2), (3, 0, 1), 3, 5),
]


def operands(case, dtype, *, flat=False, bias=True, seed=0):
    """weight, bias, coefficients, delta, activations, dots, dot_delta, dot_activations of random numbers; `flat`: U and v are
    slices of one flat [K, P] block, and no other operand is contiguous either."""
    K, update, dot, O, I = case
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def samples(B, R, S):
        delta, per_sample = (draw(B, S, O), (K, B)) if R == 0 else (draw(B, R, S, O), (K, B, R))
        activations, table = draw(B, S, I), draw(*per_sample, dtype=torch.float64)
        if flat:
            delta = delta.transpose(0, 1).contiguous().transpose(0, 1)
            activations = torch.cat([activations, activations], dim=2)[:, :, :I]
            table = torch.cat([table, table], dim=-1)[..., : table.shape[-1]]
        return table, delta, activations

    weight, v = draw(K, O, I), draw(K, O)
    if flat:
        block = torch.cat([torch.zeros(K, 3, dtype=dtype), weight.flatten(1), v], dim=1)
        weight, v = block[:, 3 : 3 + O * I].view(K, O, I), block[:, 3 + O * I :]
    return [weight, v if bias else None, *samples(*update), *samples(*dot)]


def literal(weight, bias, coefficients, delta, activations, dots, dot_delta, dot_activations, alpha):
    """weight, bias and dots afterwards, in float64, sample by sample, row by row and position by position."""
    weight, dots = weight.double().clone() * alpha, dots.clone()
    bias = None if bias is None else bias.double() * alpha

    def rows(tensor):
        return tensor.double() if tensor.ndim == 4 else tensor.double().unsqueeze(1)

    def per_row(tensor):
        return tensor if tensor.ndim == 3 else tensor.unsqueeze(2)

    c, delta, activations = per_row(coefficients), rows(delta), activations.double()
    for b, r, s in torch.cartesian_prod(*map(torch.arange, delta.shape[:3])).tolist():
        d = c[:, b, r, None] * delta[b, r, s]
        weight += d[:, :, None] * activations[b, s]
        if bias is not None:
            bias += d
    table, dot_delta, dot_activations = per_row(dots), rows(dot_delta), dot_activations.double()
    for b, s in torch.cartesian_prod(*map(torch.arange, dot_activations.shape[:2])).tolist():
        z = weight @ dot_activations[b, s]
        z = z if bias is None else z + bias
        table[:, b] += z @ dot_delta[b, :, s].T
    return weight, bias, dots


def copies(args, device="cpu"):
    """Fresh copies with the strides kept."""
    return to(
        device,
        [
            None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
            for x in args
        ],
    )


def check(args, alpha, limit, device="cpu"):
    expected = literal(*args, alpha)
    args = copies(args, device)
    ops.update_dot(*args, alpha)
    for value, end in zip((args[0], args[1], args[5]), expected, strict=True):
        if value is not None and value.numel():
            # all is 0 where alpha is 0 and there are no samples
            assert torch.equal(value.cpu().double(), end) or relative_error(value.cpu().double(), end) <= limit


def test_by_hand(device):
    # α = 2, U = (1, 1), v = 5, c = 3, δ = 10, a = (1, 2): U = (2, 2) + 30·(1, 2) = (32, 62), v = 10 + 30 = 40
    # δ' = (1, 0.5) for the two rows, a' = (1, −1): z = 32 − 62 + 40 = 10
    def tensor(*values):
        return torch.tensor(values, dtype=torch.float64, device=device)

    weight, bias, dots = tensor(1, 1).view(1, 1, 2), tensor(5).view(1, 1), tensor(100, 200).view(1, 1, 2)
    sample = tensor(3).view(1, 1), tensor(10).view(1, 1, 1), tensor(1, 2).view(1, 1, 2)
    ops.update_dot(weight, bias, *sample, dots, tensor(1, 0.5).view(1, 2, 1, 1), tensor(1, -1).view(1, 1, 2), alpha=2)
    assert weight.flatten().tolist() == [32, 62] and bias.item() == 40
    assert dots.flatten().tolist() == [110, 205]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("flat", [False, True], ids=["contiguous", "flat"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_literal_sums(device, case, bias, flat, dtype):
    check(operands(case, dtype, flat=flat, bias=bias), 0.75, tolerance(dtype), device)


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    rng = random.Random(seed)
    update, dot = ((rng.randint(0, 9), rng.randint(0, 4), rng.choice([0, 1, 1, 2, 7])) for _ in range(2))
    case = (rng.randint(1, 9), update, dot, rng.randint(1, 70), rng.choice([0, 1, 2, 15, 16, 33, 64]))
    args = operands(case, torch.float64, flat=rng.random() < 0.5, bias=rng.random() < 0.7, seed=seed)
    with built_in_product(rng.random() < 0.3):
        check(args, rng.choice([0.0, 1.0, -1.5]), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_two_ops_and_the_twin(device, case, dtype):
    args = copies(operands(case, dtype), device)
    results = []
    for name in ("fused", "two", "twin"):
        weight, bias, c, delta, a, dots, dot_delta, dot_a = copies(args)
        if name == "fused":
            ops.update_dot(weight, bias, c, delta, a, dots, dot_delta, dot_a, 0.9)
        elif name == "two":
            ops.lowrank_update(weight, bias, c, delta, a, 0.9)
            ops.grad_dot(dots, dot_delta, dot_a, weight, bias)
        else:
            ops_torch.update_dot(weight, bias, c, delta, a, dots, dot_delta, dot_a, 0.9)
        results.append((weight, bias, dots))
    for other in results[1:]:
        for value, expected in zip(results[0], other, strict=True):
            assert relative_error(value, expected) <= tolerance(dtype)


def test_rows_are_samples_of_their_own_that_share_inputs(device):
    weight, bias, c, delta, a, dots, dot_delta, dot_a = to(device, operands((3, (5, 4, 3), (6, 2, 2), 7, 9), torch.float64))
    apart = [weight.clone(), bias.clone(), dots.flatten(1).clone()]
    ops.update_dot(weight, bias, c, delta, a, dots, dot_delta, dot_a)
    spread, dot_spread = a.repeat_interleave(4, 0), dot_a.repeat_interleave(2, 0)
    ops.lowrank_update(*apart[:2], c.flatten(1), delta.flatten(0, 1), spread)
    ops.grad_dot(apart[2], dot_delta.flatten(0, 1), dot_spread, *apart[:2])
    for value, expected in zip((weight, bias, dots.flatten(1)), apart, strict=True):
        assert relative_error(value, expected) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [0, 3])
def test_grouped_layers_are_the_layers_one_by_one(device, rows, dtype):
    # more layers than one launch takes on a GPU
    shapes = [(1, 5, 7), (2, 1, 3), (1, 70, 33), (3, 4, 0), (1, 10, 66)] * 6
    layers, c, dots = [], None, None
    for number, (S, O, I) in enumerate(shapes):
        case = (3, (6, rows, S), (4, rows, S + 1), O, I)
        weight, bias, c, delta, a, dots, dot_delta, dot_a = to(
            device, operands(case, dtype, bias=number % 2 == 0, seed=number, flat=number % 3 == 0)
        )
        layers.append((weight, bias, delta, a, dot_delta, dot_a))

    def run(grouped, name):
        mine, total = [tuple(copies(layer)) for layer in layers], dots.clone()
        table = {"grad_dot": (2, 3, 0, 1), "lowrank_update": (0, 1, 2, 3), "update_dot": (0, 1, 2, 3, 4, 5)}[name]
        chosen = [tuple(layer[i] for i in table) for layer in mine]
        if name == "grad_dot":
            total = total.new_zeros(3, 6, *dots.shape[2:])
        if grouped:
            head = {"grad_dot": (total,), "lowrank_update": (c,), "update_dot": (c, total)}[name]
            getattr(ops, f"{name}_layers")(*head, chosen)
        else:
            for layer in chosen:
                head = {"grad_dot": (total,), "lowrank_update": (), "update_dot": ()}[name]
                middle = {"grad_dot": (), "lowrank_update": (c,), "update_dot": (c,)}[name]
                tail = (total, *layer[4:]) if name == "update_dot" else ()
                split = len(layer) if name == "grad_dot" else 2
                getattr(ops, name)(*head, *layer[:split], *middle, *layer[split:4], *tail)
        return [total, *(x for layer in mine for x in layer[:2] if x is not None and x.numel())]

    for name in ("grad_dot", "lowrank_update", "update_dot"):
        for value, expected in zip(run(True, name), run(False, name), strict=True):
            assert torch.equal(value, expected) if device == "cpu" else relative_error(value, expected) <= 1e-5


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("built_in", [False, True], ids=["blas", "built_in"])
def test_any_number_of_threads_and_bit_equal_on_repeat(threads, built_in):
    # large enough for every parallel region
    args = operands((3, (5, 2, 111), (4, 0, 150), 150, 40), torch.float64)
    with num_threads(threads), built_in_product(built_in):
        check(args, 0.5, 1e-12)
        results = []
        for _ in range(2):
            mine = copies(args)
            ops.update_dot(*mine, 0.5)
            results.append(mine)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_alpha_of_zero_overwrites_and_no_samples_leave_the_scaled_directions(device):
    args = to(device, operands((2, (0, 0, 3), (4, 0, 2), 5, 6), torch.float64))
    before, bias_before = args[0].clone(), args[1].clone()
    ops.update_dot(*args, alpha=0.5)
    assert torch.equal(args[0], before / 2) and torch.equal(args[1], bias_before / 2)
    for batch in ((0, 0, 3), (2, 0, 0), (3, 0, 2), (3, 2, 1)):
        weight, bias, *rest = to(device, operands((2, batch, (4, 0, 2), 5, 6), torch.float64))
        weight.fill_(float("nan"))
        bias.fill_(float("inf"))
        ops.lowrank_update(weight, bias, *rest[:3], alpha=0.0)
        assert torch.isfinite(weight).all() and torch.isfinite(bias).all()


def test_negative_control():
    args = operands((2, (3, 0, 2), (3, 0, 1), 4, 5), torch.float64)
    _, _, dots = literal(*args, 1.0)
    ops.grad_dot(args[5], args[6], args[7], args[0], args[1])  # the directions before the update
    assert relative_error(args[5], dots) > 1e-3


def test_elements_outside_the_views_stay(device):
    block = torch.full((3, 5, 8), 7.0, device=device)
    weight = block[:, 1:4, 2:6]
    _, *rest = to(device, operands((3, (6, 0, 2), (5, 0, 1), 3, 4), torch.float32))
    ops.update_dot(weight, *rest)
    outside = torch.ones_like(block, dtype=torch.bool)
    outside[:, 1:4, 2:6] = False
    assert (block[outside] == 7).all() and (weight != 7).all()


def test_autograd_notices_the_writes():
    args = operands((2, (3, 0, 1), (3, 0, 1), 4, 5), torch.float64)
    written = args[0], args[1], args[5]
    versions = [x._version for x in written]
    ops.update_dot(*args)
    assert all(x._version > version for x, version in zip(written, versions, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_obeys_streams_and_graph_capture(device):
    args = to(device, operands((3, (33, 0, 2), (20, 0, 1), 65, 31), torch.float64))
    start = args[5].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.update_dot(*args, alpha=0.0)
    torch.cuda.current_stream().wait_stream(stream)
    once, weight = args[5] - start, args[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.update_dot(*args, alpha=0.0)
    assert torch.equal(args[5] - start, once)  # capture runs nothing
    graph.replay()
    graph.replay()
    assert torch.equal(args[0], weight) and relative_error(args[5] - start, 3 * once) <= 1e-12


NAMES = ("weight", "bias", "coefficients", "delta", "activations", "dots", "dot_delta", "dot_activations")
BAD = {
    "dot_delta is no tensor": (TypeError, "dot_delta must be a tensor", lambda x: x.update(dot_delta=None)),
    "dot_delta has other O": (ValueError, "dot_delta .* O = 4", lambda x: x.update(dot_delta=x["dot_delta"][..., :3])),
    "dot_activations has other S": (
        ValueError,
        "dot_activations must have shape",
        lambda x: x.update(dot_activations=x["dot_activations"][:, :1]),
    ),
    "dots lacks R": (ValueError, r"dots must have shape \[K, B, R\] = \[2, 5, 3\]", lambda x: x.update(dots=x["dots"][..., 0])),
    "coefficients has R": (
        ValueError,
        r"coefficients must have shape \[K, B\] = \[2, 3\]",
        lambda x: x.update(coefficients=x["coefficients"][..., None]),
    ),
    "dots is float32": (TypeError, "dots must be float64", lambda x: x.update(dots=x["dots"].float())),
    "dots is expanded": (
        ValueError,
        "dots is written to",
        lambda x: x.update(dots=x["dots"][:1].expand(2, 5, 3)),
    ),
    "weight is expanded": (
        ValueError,
        "weight is written to",
        lambda x: x.update(weight=x["weight"][:1].expand(2, 4, 5)),
    ),
    "delta is float32": (TypeError, "delta must be float64 as weight is", lambda x: x.update(delta=x["delta"].float())),
    "alpha is text": (ValueError, "could not convert", lambda x: x.update(alpha="half")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_raise_and_name_the_argument(case):
    error, message, spoil = BAD[case]
    args = dict(zip(NAMES, operands((2, (3, 0, 2), (5, 3, 2), 4, 5), torch.float64), strict=True))
    spoil(args)
    with pytest.raises(error, match=message):
        ops.update_dot(**args)


BAD_LAYERS = {
    "another K": (ValueError, "layer 1: weight must have K = 2 as in layer 0, got 3", (3, (4, 0, 1), 5, 6), torch.float64),
    "another B": (ValueError, r"layer 1: delta must have B = \[4\] as in layer 0", (2, (3, 0, 1), 5, 6), torch.float64),
    "an R": (ValueError, "layer 1: delta must have B", (2, (4, 2, 1), 5, 6), torch.float64),
    "another dtype": (TypeError, "layer 1: weight must be float64 as in layer 0", (2, (4, 0, 1), 5, 6), torch.float32),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_layers_that_do_not_belong_together_are_named(case):
    error, message, (K, batch, O, I), dtype = BAD_LAYERS[case]

    def layer(K, batch, O, I, dtype):
        weight, bias, c, delta, a, *_ = operands((K, batch, batch, O, I), dtype)
        return c, (weight, bias, delta, a)

    c, first = layer(2, (4, 0, 2), 3, 7, torch.float64)
    _, second = layer(K, batch, O, I, dtype)
    with pytest.raises(error, match=message):
        ops.lowrank_update_layers(c, [first, second])
    assert first[0].isfinite().all()


def test_no_layers_change_nothing_and_a_layer_of_other_length_is_refused():
    dots = torch.ones(2, 3, dtype=torch.float64)
    ops.grad_dot_layers(dots, [])
    ops.lowrank_update_layers(dots, [])
    ops.update_dot_layers(dots, dots, [])
    assert (dots == 1).all()
    with pytest.raises(TypeError, match=r"layer 0 must be a tuple \(delta, activations, weight, bias\)"):
        ops.grad_dot_layers(dots, [(dots, dots)])
