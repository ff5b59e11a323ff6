"""The compiled sweep against the slow literal estimator and the generic path; the op against its plain-torch twin."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, relative_error, train
from mlp_cases import ACTIVATIONS, LOSSES, SETTINGS, copies, make_case, make_run, op_case
from torch import nn
from torch.nn import functional as F

import dit_fast
from dit_fast import mlp, ops, ops_torch, queries

WINDOWS = [(0, 7), (2, 5), (5, 6)]


def assert_native(run, windows=WINDOWS, tolerance=1e-10, truth=dit_fast.reference.score, problem=None, **options):
    """backend="native" against the reference, and "auto" chooses it."""
    query = queries.loss(run.case.x_val, run.case.y_val)
    fast_options = {name: options.pop(name) for name in ("memory_budget", "dtype") if name in options}
    problem = problem or run.problem()
    fast = dit_fast.score(run.trajectory(), problem, query, windows, backend="auto", **fast_options, **options)
    assert fast.meta["backend"] == "native", fast.meta["why"]
    slow = truth(run.trajectory(), run.problem(), query, windows, **options)
    ends = sorted({t for w in windows for t in w} - {0})
    at = truth(run.trajectory(), run.problem(), query, [(0, t) for t in ends], **options).scores.abs().amax(-1)
    size = dict(zip([0, *ends], [torch.zeros(1).double(), *at], strict=True))
    scale = torch.stack([size[a] + size[b] for a, b in windows])
    error = relative_error(fast.scores, slow.scores, scale)
    assert error < tolerance, error
    return fast


@pytest.mark.parametrize("hessian", ["exact", "ggn", "none"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_loss_and_curvature(activation, loss, hessian):
    assert_native(make_run((5, 4, 3), activation, loss, steps=6), [(0, 6), (2, 5)], hessian=hessian)


@pytest.mark.parametrize("hessian", ["exact", "ggn", "none"])
@pytest.mark.parametrize("widths", [(5, 3), (5, 1), (4, 6, 3), (3, 5, 4, 3), (1, 1, 1, 2), (4, 3, 5, 3, 2)])
def test_every_depth_with_both_penalties(widths, hessian):
    options = {"weight_decay": 0.02, "l2": 0.03}
    loss = "cross_entropy" if widths[-1] > 1 else "bce_logits"
    assert_native(make_run(widths, "gelu", loss, options=options), hessian=hessian)


def test_layers_without_bias():
    assert_native(make_run((5, 4, 3), bias=False, options={"l2": 0.1}))


def test_an_activation_behind_the_last_layer():
    for hessian in ("exact", "ggn", "none"):
        assert_native(make_run((5, 4, 3), "sigmoid", "squared_error", last=True), hessian=hessian)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("blas", [True, False])
def test_threads_and_both_products(threads, blas):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ops.use_blas(blas)
    try:
        assert_native(make_run((5, 6, 4, 3), "silu"))
        assert_native(make_run((5, 70, 70, 3), "relu", steps=4), [(0, 4), (1, 3), (2, 3)])
    finally:
        ops.use_blas(True)
        torch.set_num_threads(before)


def test_one_step_and_one_sample():
    assert_native(make_run((5, 4, 3), steps=1), [(0, 1)])
    run = make_run((5, 1, 1), loss="squared_error", num_samples=2)
    assert_native(run)


def test_micro_batches_query_at_final_and_column_chunks():
    sizes = [[2, 2], [3], [5], [1], [3, 1], [2], [6]]
    run = make_run((5, 4, 3), options={"micro_batches": sizes})
    assert_native(run)
    assert_native(run, query_at="final")
    size = sum(p.numel() for p in run.case.model().parameters())
    chunked = assert_native(run, memory_budget=2.1 * (3 * size * 8 + 8 * 12))
    assert chunked.meta["sweeps"] > 1


class Items(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def test_a_dataset_and_an_unpack_of_the_users_own():
    run = make_run((5, 4, 3))
    unpack = lambda batch: ((batch[0],), {}, batch[1])  # noqa: E731
    problem = dit_fast.Problem(run.case.model(), run.case.loss, Items(run.case.x, run.case.y), unpack=unpack)
    assert_native(run, problem=problem)


def test_targets_that_turn_up_later_and_are_not_the_losss_own_fall_back():
    """Class 39 is in no batch but the last, and in no probe; the loss treats it as class 38."""
    loss = lambda z, t: F.cross_entropy(z, t.clamp(max=38), reduction="none")  # noqa: E731
    case = make_case((5, 4, 40))
    case.loss, case.y = loss, torch.arange(12) % 2
    case.y[7] = 39
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3, 4]), torch.tensor([7, 5])]
    run = train(case, batches, [torch.full((len(b),), 0.3, dtype=torch.float64) for b in batches], [0.1] * 3)
    query = queries.loss(case.x_val, case.y_val)
    truth = dit_fast.score(run.trajectory(), run.problem(), query, backend="generic").scores
    for data in ((case.x, case.y), Items(case.x, case.y)):
        problem = dit_fast.Problem(case.model(), loss, data)
        result = dit_fast.score(run.trajectory(), problem, query)
        assert result.meta["backend"] == "generic" and "not cross_entropy for every target" in result.meta["why"]
        torch.testing.assert_close(result.scores, truth, rtol=1e-10, atol=0)


def test_one_column_per_window_and_one_per_endpoint():
    """Two windows with three ends join and subtract in the middle; five with three ends are differences."""
    run = make_run((5, 4, 3))
    for windows in ([(1, 4), (2, 6)], [(0, 3), (3, 7), (0, 7), (3, 6), (6, 7)]):
        assert_native(run, windows)


def test_a_sample_never_seen_scores_zero_and_windows_add_up():
    result = assert_native(make_run((5, 4, 3)), [(0, 3), (3, 7), (0, 7)])
    assert (result.scores[..., 11] == 0).all()
    torch.testing.assert_close(result.scores[0] + result.scores[1], result.scores[2], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("wrong", ["lr", "coefficients", "targets"])
def test_negative_control(wrong):
    run = make_run((5, 4, 3))
    query = queries.loss(run.case.x_val, run.case.y_val)
    truth = dit_fast.reference.score(run.trajectory(), run.problem(), query).scores
    changes = {"lr": [rate * 1.01 for rate in run.lr], "coefficients": None, "targets": None}
    trajectory = run.trajectory(**({} if wrong == "targets" else {wrong: changes[wrong]}))
    data = (run.case.x, (run.case.y + 1) % 3) if wrong == "targets" else (run.case.x, run.case.y)
    problem = dit_fast.Problem(run.case.model(), run.case.loss, data)
    result = dit_fast.score(trajectory, problem, query, check=False, backend="native").scores
    assert relative_error(result, truth) > 1e-4


def test_a_hundred_random_nets():
    rng = np.random.default_rng(0)
    for seed in range(100):
        widths = tuple(int(n) for n in rng.integers(1, 9, size=rng.integers(2, 6)))
        loss = str(rng.choice([name for name in LOSSES if widths[-1] > 1 or name != "cross_entropy"]))
        options = {"l2": float(rng.choice([0, 0.05])), "weight_decay": float(rng.choice([0, 0.03]))}
        run = make_run(
            widths, str(rng.choice(list(ACTIVATIONS))), loss, bool(rng.integers(2)),
            seed=seed, steps=int(rng.integers(2, 8)), last=bool(rng.integers(5) == 0), options=options,
        )  # fmt: skip
        T = len(run.batches)
        ends = sorted(rng.choice(T + 1, size=2, replace=False).tolist())
        assert_native(
            run, [(0, T), tuple(ends)], hessian=str(rng.choice(["exact", "ggn", "none"])),
            truth=dit_fast.reference.score if seed % 4 == 0 else generic_score,
        )  # fmt: skip


def generic_score(*arguments, **options):
    return dit_fast.score(*arguments, backend="generic", **options)


def test_float32_on_adult():
    data = np.load(Path(__file__).parent / "data" / "adult_logreg.npz")
    x, y = torch.tensor(data["x_train"])[:64], torch.tensor(data["y_train"])[:64].double()
    case = Case(
        lambda: _seeded(lambda: nn.Sequential(nn.Linear(x.shape[1], 8), nn.ReLU(), nn.Linear(8, 1))).double(),
        lambda z, t: F.binary_cross_entropy_with_logits(z.squeeze(1), t, reduction="none"),
        x.double(), y, x[:16].double(), y[:16],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randperm(64, generator=generator)[:32] for _ in range(20)]
    run = train(case, batches, [torch.full((32,), 1 / 32, dtype=torch.float64)] * 20, [0.1] * 20)
    assert_native(run, [(0, 20), (7, 20), (13, 14)], 1e-5, generic_score, dtype=torch.float32)


def _seeded(build):
    torch.manual_seed(0)
    return build()


# ---- the op itself -------------------------------------------------------------------------------------------------------


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


class Contrary(nn.Module):
    """Another net in eval mode than in training."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x) if self.training else -self.layer(x).tanh()


def test_queries_are_asked_in_eval_mode():
    run = make_run((5, 3))
    run.case.model = lambda: Contrary().double()
    run.params = {name.replace("0.", "layer."): value for name, value in run.params.items()}
    assert_native(run)


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
