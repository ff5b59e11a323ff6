"""ops.MlpSweep and mlp_gradient against their plain-torch twins and against autograd through a whole run."""

import pytest
import torch
from mlp_cases import SETTINGS, copies, op_case
from torch.nn import functional as F

from dit_fast import mlp, ops, ops_torch


def assert_op(case, tolerance=1e-10, K=None, **options):
    results = []
    for op in (ops.MlpSweep, ops_torch.MlpSweep):
        net, steps, blocks, momenta, scores = case[0], case[1], copies(case[2]), copies(case[3]), case[4].clone()
        assert op(net, steps, blocks, momenta, scores, **options).run(0, len(steps.theta), K or len(scores)) is None
        results.append([*blocks, *momenta, scores])
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


def test_op_in_float32_and_for_the_first_columns_alone():
    case = op_case((4, 5, 3), "silu", "cross_entropy", SETTINGS["nesterov"], dtype=torch.float32)
    assert_op(case, 1e-5)
    assert_op(case, 1e-5, K=2)


@pytest.mark.parametrize("blas", [True, False])
def test_op_shares_its_columns_among_threads(blas):
    """Work enough for a parallel region; the sums' order may differ with the shapes of the products."""
    case = op_case((64, 64, 10), "tanh", "cross_entropy", SETTINGS["momentum"], K=7, n=3, sizes=[200, 150, 250])
    before, results = torch.get_num_threads(), []
    ops.use_blas(blas)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            net, steps, blocks, momenta, scores = case[0], case[1], copies(case[2]), copies(case[3]), case[4].clone()
            assert ops.MlpSweep(net, steps, blocks, momenta, scores, l2=0.1).run(0, 3, 7) is None
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
    ops.MlpSweep(net, steps, blocks, momenta, scores).run(0, 5, 1)
    assert (scores[0] - truth).abs().max() <= 1e-12 * truth.abs().max()


@pytest.mark.parametrize("loss", mlp.LOSSES)
def test_gradient_op_matches_its_twin(loss):
    net, steps, *_ = op_case((4, 5, 3), "gelu", loss, SETTINGS["plain"])
    weights = torch.rand(len(steps.x), dtype=torch.float64)
    ours, theirs = (torch.ones_like(steps.theta) for _ in range(2))
    ops.mlp_gradient(net, steps.theta, steps.x, steps.targets, weights, ours)
    ops_torch.mlp_gradient(net, steps.theta, steps.x, steps.targets, weights, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_op_names_the_step_that_is_not_finite():
    net, steps, blocks, momenta, scores = op_case((4, 5, 3), "tanh", "cross_entropy", SETTINGS["plain"])
    steps.theta[2, 5] = float("nan")
    assert ops.MlpSweep(net, steps, blocks, momenta, scores).run(0, 4, 3) == 2


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
    ],
)
def test_op_refuses_what_does_not_fit(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        broken(change)
