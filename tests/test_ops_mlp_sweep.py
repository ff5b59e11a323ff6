"""ops.MlpSweep and mlp_gradient against their plain-torch twins and against autograd through a whole run."""

import pytest
import torch
from mlp_cases import SETTINGS, copies, op_case
from torch.nn import functional as F

from dit_fast import mlp, ops, ops_torch


def assert_op(case, tolerance=1e-10, visits=None, **options):
    results, n = [], len(case[1].theta)
    for op in (ops.MlpSweep, ops_torch.MlpSweep):
        net, steps, blocks, momenta, scores = case[0], case[1], copies(case[2]), copies(case[3]), case[4].clone()
        engine = op(net, steps, blocks, momenta, scores, visits, **options)
        for start, stop in ((n // 2, n), (0, n // 2)):
            assert engine.run(start, stop) is None
        results.append([*blocks, *momenta, scores])
    assert_close(results, tolerance)


def assert_close(results, tolerance):
    for ours, theirs in zip(*results, strict=True):
        if ours is not None:
            error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
            assert error < tolerance, float(error)


@pytest.mark.parametrize("hessian", mlp.CURVATURES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_op_matches_its_twin(settings, hessian):
    assert_op(op_case((4, 5, 3), "gelu", "cross_entropy", settings), hessian=hessian, l2=0.1)
    assert_op(op_case((4, 2), "gelu", "bce_logits", settings, K=5, bias=False), hessian=hessian)
    assert_op(op_case((3, 4, 4, 1), "leaky_relu", "squared_error", settings, K=1, seed=2), hessian=hessian, l2=0.2)


def test_op_in_float32():
    assert_op(op_case((4, 5, 3), "silu", "cross_entropy", SETTINGS["nesterov"], dtype=torch.float32), 1e-5)


def visits_of(case, joins, leaves, seed=0):
    """Columns that join with random numbers, in blocks that were zero before; those beyond are never there."""
    g = torch.Generator().manual_seed(seed)
    theta, K = case[1].theta, len(joins)
    joining, leaving = (torch.randint(4, (K,), generator=g) for _ in range(2))
    for block in (*case[2], *case[3]):
        if block is not None:
            block.zero_()
    gradients = torch.randn(4, theta.shape[1], generator=g, dtype=torch.float64).to(theta.dtype)
    return mlp.MlpVisits(torch.tensor(joins), torch.tensor(leaves), joining, leaving, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(4, 5, 3), (7, 1), (6, 8, 1), (3, 16, 2)])
@pytest.mark.parametrize("settings", ["plain", "decay", "dampened"])
def test_op_lets_columns_join_and_leave(settings, widths, dtype):
    """Some of the columns that have not joined are taken along where they fill a line: they must stay zero."""
    loss = "bce_logits" if widths[-1] == 1 else "cross_entropy"
    case = op_case(widths, "tanh", loss, SETTINGS[settings], K=8, n=7, dtype=dtype)
    visits = visits_of(case, [7, 7, 5, 4, 1], [0, 6, 2, 0, 0])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert_op(case, tolerance, visits, l2=0.1)
    assert_op(case, tolerance, visits, hessian="ggn")


@pytest.mark.parametrize("hessian", mlp.CURVATURES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_op_by_inner_products_of_samples(settings, hessian):
    """With gram the first block holds X u: as if X u were made of u before and after each run."""
    for widths, K, bias in (((4, 5, 3), 3, True), ((30, 1), 5, False), ((21, 8, 1), 2, True)):
        loss = "cross_entropy" if widths[-1] > 1 else "bce_logits"
        case = op_case(widths, "gelu", loss, settings, K=K, n=6, bias=bias)
        visits = visits_of(case, [6, 6, 4, 3, 1][:K], [0, 5, 1, 0, 0][:K])
        results = []
        for gram in (None, case[1].x @ case[1].x.T):
            net, steps, blocks, momenta, scores = case[0], case[1], copies(case[2]), copies(case[3]), case[4].clone()
            if gram is not None:
                blocks[0], momenta[0] = (mlp.mlp_block(K, (widths[1], len(gram)), gram.dtype, True) for _ in range(2))
            engine = ops.MlpSweep(net, steps, blocks, momenta, scores, visits, gram=gram, hessian=hessian)
            assert engine.run(3, 6) is None and engine.run(0, 3) is None
            if gram is None:
                blocks[0], momenta[0] = blocks[0] @ steps.x.T, momenta[0] @ steps.x.T
            results.append([*blocks, *momenta, scores])
        assert_close(results[::-1], 1e-11)


@pytest.mark.parametrize("visiting", [False, True])
@pytest.mark.parametrize("blas", [True, False])
def test_op_shares_its_columns_among_threads(blas, visiting):
    """Work enough for a parallel region; the sums' order may differ with the shapes of the products."""
    case = op_case((64, 64, 10), "tanh", "cross_entropy", SETTINGS["momentum"], K=7, n=3, sizes=[200, 150, 250])
    visits = visits_of(case, [3, 3, 3, 2, 2], [0, 1, 2, 0, 1]) if visiting else None
    before, results = torch.get_num_threads(), []
    ops.use_blas(blas)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            net, steps, blocks, momenta, scores = case[0], case[1], copies(case[2]), copies(case[3]), case[4].clone()
            assert ops.MlpSweep(net, steps, blocks, momenta, scores, visits, l2=0.1).run(0, 3) is None
            results.append([*blocks, *momenta, scores])
    finally:
        torch.set_num_threads(before)
        ops.use_blas(True)
    for one, three in zip(*results, strict=True):
        assert (one - three).abs().max() <= 1e-12 * one.abs().max()


def test_op_with_a_step_without_samples():
    case = op_case((4, 5, 3), "silu", "cross_entropy", SETTINGS["dampened"], sizes=[2, 0, 3, 0])
    for hessian in mlp.CURVATURES:
        assert_op(case, l2=0.1, hessian=hessian)


def test_op_with_layers_too_large_to_be_turned():
    assert_op(op_case((6, 80, 70, 65, 3), "relu", "cross_entropy", SETTINGS["momentum"], n=2))


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.4}, {"momentum": 0.7, "nesterov": True}],
    ids=["plain", "momentum", "dampened", "nesterov"],
)
def test_op_is_the_derivative_through_the_whole_training(options):
    """d q(θ[T]) / d w_j of runs by torch's rule, w_j the weight of sample j's loss: removing j changes q by −that."""
    g = torch.Generator().manual_seed(0)
    x, y, wd, lr = torch.randn(6, 3, generator=g).double(), torch.randint(2, (6,), generator=g), 0.1, 0.3
    batches = [torch.randint(6, (4,), generator=g) for _ in range(5)]
    weights = torch.ones(6, dtype=torch.float64, requires_grad=True)
    theta, buffer, rows = torch.randn(8, generator=g).double().requires_grad_(), None, []
    momentum, dampening = options.get("momentum", 0), options.get("dampening", 0)

    def losses(point, ids):
        return F.cross_entropy(x[ids] @ point[:6].view(2, 3).T + point[6:], y[ids], reduction="none")

    for ids in batches:
        rows.append(theta.detach())
        loss = (weights[ids] * losses(theta, ids)).mean()
        d = torch.autograd.grad(loss, theta, create_graph=True)[0] + wd * theta
        if momentum:
            buffer = d if buffer is None else momentum * buffer + (1 - dampening) * d
            d = d + momentum * buffer if options.get("nesterov") else buffer
        theta = theta - lr * d
    end = theta.detach().requires_grad_()
    q = torch.autograd.grad(losses(end, torch.arange(6)).sum(), end)[0]
    truth = -torch.autograd.grad(theta, weights, q)[0]

    table = torch.tensor([lr, wd, momentum, dampening, float(options.get("nesterov", 0)), 0.0], dtype=torch.float64)
    settings = table.expand(5, 2, 6).clone()
    settings[0, :, -1] = 1
    steps = mlp.MlpSteps(
        torch.stack(rows), x, y, torch.cat(batches), torch.cat(batches), torch.full((20,), 0.25).double(),
        torch.arange(0, 21, 4), settings,
    )  # fmt: skip
    blocks = [mlp.mlp_block(1, (2, 3), q.dtype, True).copy_(q[:6].view(1, 2, 3)), q[None, 6:].clone()]
    momenta, scores = [torch.zeros_like(b) for b in blocks], torch.zeros(1, 6).double()
    net = mlp.Mlp((mlp.MlpLayer(2, 3, 0, 6),), "cross_entropy")
    ops.MlpSweep(net, steps, blocks, momenta, scores).run(0, 5)
    assert (scores[0] - truth).abs().max() <= 1e-12 * truth.abs().max()


@pytest.mark.parametrize("loss", mlp.LOSSES)
def test_gradient_op_matches_its_twin(loss):
    net, steps, *_ = op_case((4, 5, 3), "gelu", loss, SETTINGS["plain"])
    weights = torch.rand(len(steps.x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = (torch.ones_like(steps.theta) for _ in range(2))
    ops.mlp_gradient(net, steps.theta, steps.x, steps.targets, weights, ours)
    ops_torch.mlp_gradient(net, steps.theta, steps.x, steps.targets, weights, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_op_names_the_step_that_is_not_finite():
    net, steps, blocks, momenta, scores = op_case((4, 5, 3), "tanh", "cross_entropy", SETTINGS["plain"])
    steps.theta[2, 5] = float("nan")
    assert ops.MlpSweep(net, steps, blocks, momenta, scores).run(0, 4) == 2


def test_op_by_inner_products_in_float32():
    case = op_case((37, 6, 1), "relu", "bce_logits", SETTINGS["decay"], K=3, n=6, dtype=torch.float32)
    net, steps, blocks, _, scores = case
    own = [mlp.mlp_block(3, (6, 9), torch.float32, True).copy_(blocks[0] @ steps.x.T), *copies(blocks[1:])]
    results = [[*own, scores.clone()], [*copies(blocks), scores.clone()]]
    assert ops.MlpSweep(net, steps, results[0][:-1], None, results[0][-1], gram=steps.x @ steps.x.T).run(0, 6) is None
    assert ops.MlpSweep(net, steps, results[1][:-1], None, results[1][-1]).run(0, 6) is None
    results[1][0] = results[1][0] @ steps.x.T
    assert_close(results, 1e-5)


def wide(blocks):
    return [mlp.mlp_block(3, (5, 9), torch.float64, True), *blocks[1:]]


def visit(arguments, **changes):
    n = len(changes.get("joins", [0] * 3))
    fields = {"joins": [0] * n, "leaves": [0] * n, "joining": [0] * n, "leaving": [0] * n, "gradients": arguments["theta"][:2]}
    return mlp.MlpVisits(**{name: torch.as_tensor(value) for name, value in (fields | changes).items()})


def broken(change):
    net, steps, blocks, momenta, scores = op_case((4, 5, 3), "tanh", "cross_entropy", SETTINGS["momentum"])
    arguments = {"net": net, "blocks": blocks, "momenta": momenta, "scores": scores} | steps.__dict__
    arguments |= change(arguments)
    fields = {name: arguments.pop(name) for name in steps.__dict__}
    return ops.MlpSweep(arguments.pop("net"), mlp.MlpSteps(**fields), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"x": a["x"].float()}, "x must be float64"),
        (lambda a: {"x": a["x"][:, :3]}, "x must have shape"),
        (lambda a: {"theta": a["theta"][:, :20]}, "beyond the row of 20"),
        (lambda a: {"ids": a["ids"] + 3}, "ids must lie in 0..5"),
        (lambda a: {"rows": a["rows"] - 1}, "rows must lie in 0..8"),
        (lambda a: {"targets": a["targets"] + 1}, "targets must lie in 0..2"),
        (lambda a: {"offsets": a["offsets"].flip(0)}, "offsets must rise"),
        (lambda a: {"momenta": None}, "momenta must be given"),
        (lambda a: {"blocks": a["blocks"][:3]}, "blocks must hold"),
        (lambda a: {"blocks": [*a["blocks"][:3], None]}, "must be a tensor"),
        (lambda a: {"blocks": [a["blocks"][0].contiguous(), *a["blocks"][1:]]}, "as mlp_block makes it"),
        (lambda a: {"scores": a["scores"].float()}, "scores must be float64"),
        (lambda a: {"settings": a["settings"][..., :5]}, "settings must have shape"),
        (lambda a: {"gram": a["x"]}, r"blocks\[0\] must have shape \[3, 5, 9\]"),
        (lambda a: {"gram": a["x"], "blocks": wide(a["blocks"]), "momenta": wide(a["momenta"])}, "gram must have shape"),
        (
            lambda a: {"gram": a["x"] @ a["x"].T, "blocks": wide(a["blocks"]), "momenta": wide(a["momenta"]), "l2": 0.1},
            "gram cannot be used with l2",
        ),
        (lambda a: {"visits": visit(a, joins=[1, 2, 2])}, "joins must fall"),
        (lambda a: {"visits": visit(a, joins=[3, 2, 2, 1])}, "joins names 4 columns, the blocks hold 3"),
        (lambda a: {"visits": visit(a, joining=[0, 2, 0])}, r"joining must lie in 0..1, got 0..2"),
        (lambda a: {"visits": visit(a, leaves=[0.0, 0.0, 0.0])}, "leaves must be int64"),
        (lambda a: {"visits": visit(a, gradients=a["theta"][:2, :-1])}, "gradients must have shape"),
    ],
)
def test_op_refuses_what_does_not_fit(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        broken(change)
