"""Compiled retraining against the slow literal one and the generic path, and when it steps back for the latter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, relative_error, schedule, standard_run, train
from mlp_cases import ACTIVATIONS, LOSSES, make_case, make_run
from torch import nn
from torch.nn import functional as F

import dit_fast
from dit_fast import native, ops, queries, reference

WINDOWS = [(0, 7), (2, 5), (0, 3)]
NEVER_VISITED = 11  # by make_run


def loss(run):
    return queries.loss(run.case.x_val, run.case.y_val)


def assert_native(run, windows=WINDOWS, tolerance=1e-11, query=None, problem=None, trajectory=None, **options):
    """backend="auto" chooses the compiled path, and gives the reference's numbers."""
    trajectory = trajectory or run.trajectory()
    arguments = (query or loss(run), windows)
    fast = dit_fast.leave_one_out(trajectory, problem or run.problem(), *arguments, **options)
    assert fast.meta["backend"] == "native", fast.meta["why"]
    options.pop("memory_budget", None)
    slow = reference.leave_one_out(trajectory, run.problem(), *arguments, **options)
    error = (fast.scores - slow.scores).abs().max() / slow.scores.abs().max()
    assert error < tolerance, float(error)
    assert fast.retrained.all()
    return fast


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_loss(activation, loss):
    assert_native(make_run((5, 4, 3), activation, loss))


@pytest.mark.parametrize("widths", [(5, 3), (5, 1), (4, 6, 3), (3, 5, 4, 3), (1, 1, 1, 2), (4, 3, 5, 3, 2), (6, 20, 17, 3)])
def test_every_depth_with_both_penalties(widths):
    loss = "cross_entropy" if widths[-1] > 1 else "bce_logits"
    assert_native(make_run(widths, "gelu", loss, options={"weight_decay": 0.02, "l2": 0.03}))


@pytest.mark.parametrize("weight_decay", [0, 0.02])
def test_more_inputs_than_samples(weight_decay, monkeypatch):
    """The first layer is then retrained by the samples' inner products."""
    made, inner = [], native.inner_products
    monkeypatch.setattr(native, "GRAM_SHARE", float("inf"))  # it does not pay for so few steps
    monkeypatch.setattr(native, "inner_products", lambda *a: made.append(inner(*a)) or made[-1])
    for widths, loss in (((90, 4, 3), "cross_entropy"), ((90, 1), "bce_logits")):
        assert_native(make_run(widths, "tanh", loss, options={"weight_decay": weight_decay}))
        assert made.pop() is not None
        assert_native(make_run(widths, "tanh", loss, options={"weight_decay": weight_decay, "l2": 0.03}))
        assert made.pop() is None


def test_a_sample_that_no_step_took_may_hold_anything(monkeypatch):
    monkeypatch.setattr(native, "GRAM_SHARE", float("inf"))
    run = make_run((90, 4, 3))
    clean = assert_native(run).scores
    run.case.x[NEVER_VISITED] = float("nan")
    for method in (dit_fast.leave_one_out, dit_fast.score):
        result = method(run.trajectory(), run.problem(), loss(run), WINDOWS)
        assert result.meta["backend"] == "native" and result.scores.isfinite().all()
    assert torch.equal(dit_fast.leave_one_out(run.trajectory(), run.problem(), loss(run), WINDOWS).scores != 0, clean != 0)


def test_no_bias_and_an_activation_behind_the_last_layer():
    assert_native(make_run((5, 4, 3), bias=False, options={"l2": 0.1}))
    assert_native(make_run((5, 4, 3), "sigmoid", "squared_error", last=True))


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.05}, {"momentum": 0.7, "nesterov": True}],
    ids=["momentum", "dampened", "nesterov"],
)
@pytest.mark.parametrize("by_inner_products", [False, True])
def test_momentum(options, by_inner_products, monkeypatch):
    l2 = 0.0 if by_inner_products else 0.03
    if by_inner_products:
        monkeypatch.setattr(native, "GRAM_SHARE", float("inf"))
    case = make_case((5, 4, 3))
    batches, coefficients, lr = schedule(len(case.x), 7)
    model, history = case.model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **options)
    for ids, a, rate in zip(batches, coefficients, lr, strict=True):
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        penalty = 0.5 * l2 * sum(p.square().sum() for p in model.parameters())
        (a * (case.loss(model(case.x[ids]), case.y[ids]) + penalty)).sum().backward()
        optimizer.step()
    history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    params = {name: torch.stack([row[name] for row in history]) for name in history[0]}
    run = train(case, batches, coefficients, lr, l2=l2)
    trajectory = run.trajectory(params=params, optimizer=dit_fast.SGD(**options))
    assert_native(run, trajectory=trajectory)
    plain = dit_fast.leave_one_out(run.trajectory(), run.problem(), loss(run), WINDOWS).scores
    fast = dit_fast.leave_one_out(trajectory, run.problem(), loss(run), WINDOWS).scores
    assert relative_error(plain, fast) > 1e-3  # momentum is seen


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("blas", [True, False])
def test_threads_and_both_products(threads, blas):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ops.use_blas(blas)
    try:
        assert_native(make_run((5, 70, 30, 3), "tanh", options={"l2": 0.02}))
    finally:
        ops.use_blas(True)
        torch.set_num_threads(before)


def test_one_model_one_step_and_chunks():
    run = make_run((5, 4, 3))
    assert_native(run, sample_ids=[4])
    assert_native(make_run((5, 4, 3), steps=1), [(0, 1)])
    chunked = assert_native(run, memory_budget="7 KiB")
    assert 1 < chunked.meta["models_at_once"] < 10


def test_samples_not_visited_before_the_windows_end_score_exactly_zero():
    run = make_run((5, 4, 3))
    result = assert_native(run)
    visited = {int(i) for ids in run.batches for i in ids}
    early = {int(i) for ids in run.batches[:3] for i in ids}
    assert NEVER_VISITED not in visited
    assert {int(j) for j in result.scores[0, 0].nonzero()} == visited
    assert {int(j) for j in result.scores[2, 0].nonzero()} == early


def test_groups_are_removed_together():
    run = make_run((5, 8, 3), options={"l2": 0.03})
    result = assert_native(run, groups=[[0, 3, 4], [5], [10, 8, 10], [11], [], list(range(12))])
    assert not result.scores[..., 3:5].any()
    alone = dit_fast.leave_one_out(run.trajectory(), run.problem(), loss(run), WINDOWS, sample_ids=[0, 3, 4]).scores
    assert (result.scores[..., 0] - alone.sum(-1)).abs().max() > 1e-4


def test_micro_batches_a_dataset_and_other_queries():
    run = make_run((5, 4, 3), options={"micro_batches": [[2, 2], [3], [5], [1], [3, 1], [2], [6]]})
    items = list(zip(run.case.x, run.case.y, strict=True))
    problem = dit_fast.Problem(run.case.model(), run.case.loss, items)
    asked = [loss(run), queries.logit(run.case.x_val, 1), queries.parameter("0.bias")]
    assert_native(run, problem=problem, query=asked)


def test_a_query_of_more_rows_than_go_through_at_once():
    run = make_run((5, 4, 3))
    assert_native(run, query=queries.loss(run.case.x.repeat(20, 1), run.case.y.repeat(20)))


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


@pytest.mark.parametrize("wrong", ["lr", "coefficients", "targets"])
def test_negative_control(wrong):
    run = make_run((5, 4, 3))
    truth = reference.leave_one_out(run.trajectory(), run.problem(), loss(run)).scores
    changes = {"lr": [rate * 1.01 for rate in run.lr], "coefficients": None}
    trajectory = run.trajectory(**({wrong: changes[wrong]} if wrong in changes else {}))
    data = (run.case.x, (run.case.y + 1) % 3) if wrong == "targets" else (run.case.x, run.case.y)
    problem = dit_fast.Problem(run.case.model(), run.case.loss, data)
    result = dit_fast.leave_one_out(trajectory, problem, loss(run), check=False, backend="native").scores
    assert relative_error(result, truth) > 1e-4


def test_a_hundred_random_nets():
    rng = np.random.default_rng(0)
    for seed in range(100):
        widths = tuple(int(n) for n in rng.integers(1, 9, size=rng.integers(2, 6)))
        kind = str(rng.choice([name for name in LOSSES if widths[-1] > 1 or name != "cross_entropy"]))
        options = {"l2": float(rng.choice([0, 0.05])), "weight_decay": float(rng.choice([0, 0.03]))}
        run = make_run(
            widths, str(rng.choice(list(ACTIVATIONS))), kind, bool(rng.integers(2)),
            seed=seed, steps=int(rng.integers(2, 8)), last=bool(rng.integers(5) == 0), options=options,
        )  # fmt: skip
        arguments = (run.trajectory(), run.problem(), loss(run))
        fast = dit_fast.leave_one_out(*arguments, backend="native").scores
        slow = dit_fast.leave_one_out(*arguments, backend="generic").scores
        # the rounding of two losses of about 1 is in every difference
        assert (fast - slow).abs().max() <= 1e-10 * slow.abs().max() + 1e-15, seed


def test_float32_on_adult():
    data = np.load(Path(__file__).parent / "data" / "adult_logreg.npz")
    x, y = (torch.tensor(data[name])[:64] for name in ("x_train", "y_train"))
    binary = lambda z, t: F.binary_cross_entropy_with_logits(z.squeeze(1), t, reduction="none")  # noqa: E731

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(x.shape[1], 8), nn.ReLU(), nn.Linear(8, 1)).double()

    case = Case(build, binary, x.double(), y.double(), x[:16].double(), y[:16].double())
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randperm(64, generator=generator)[:32] for _ in range(20)]
    run = train(case, batches, [torch.full((32,), 1 / 32, dtype=torch.float64)] * 20, [0.1] * 20)
    arguments = (run.trajectory(), run.problem(), loss(run), [(0, 20), (7, 20), (13, 14)])
    fast = dit_fast.leave_one_out(*arguments, dtype=torch.float32, backend="native").scores
    slow = dit_fast.leave_one_out(*arguments, dtype=torch.float32, backend="generic").scores
    assert relative_error(fast, slow) < 1e-4
    assert (fast - slow).abs().max() > 0


FALLS_BACK = {
    "asked": ({}, {"backend": "generic"}, "backend='generic' was asked for"),
    "an absent parameter": (
        {"optimizer": dit_fast.SGD(momentum=0.9), "absent": [["0.bias"]] + [[]] * 6}, {}, "without a gradient in some step",
    ),
    "Adam": ({"optimizer": dit_fast.Adam()}, {}, "Adam is not compiled"),
    "clip": ({"clip_norm": 0.1}, {}, "clipped gradients are not compiled"),
}  # fmt: skip


@pytest.mark.parametrize("case", FALLS_BACK)
def test_falls_back_and_says_so(case):
    changes, options, why = FALLS_BACK[case]
    run = make_run((5, 4, 3))
    arguments = (run.trajectory(**changes), run.problem(), loss(run))
    result = dit_fast.leave_one_out(*arguments, check=False, **options)
    assert result.meta["backend"] == "generic" and why in result.meta["why"]
    generic = dit_fast.leave_one_out(*arguments, check=False, backend="generic")
    assert relative_error(result.scores, generic.scores) < 1e-12
    if not options:
        with pytest.raises(ValueError, match=f"backend='native' cannot be used: .*{why}"):
            dit_fast.leave_one_out(*arguments, check=False, backend="native")


def test_a_path_that_does_not_agree_is_not_used(monkeypatch):
    run = make_run((5, 4, 3))
    retrain = ops.MlpRetrain.run

    def wrong(self, start, stop):
        retrain(self, start, stop)
        self._kept[0][-1].mul_(1.001)

    monkeypatch.setattr(ops.MlpRetrain, "run", wrong)
    result = dit_fast.leave_one_out(run.trajectory(), run.problem(), loss(run))
    assert result.meta["backend"] == "generic" and "do not agree" in result.meta["why"]


# ---- through score() -----------------------------------------------------------------------------------------------------


def test_score_hands_its_backend_on():
    run = standard_run("mlp")
    for backend, used in (("auto", "native"), ("native", "native"), ("generic", "generic"), ("factors", "native")):
        result = dit_fast.score(run.trajectory(), run.problem(), loss(run), method="retrain", backend=backend)
        assert result.meta["backend"] == used
    true = reference.leave_one_out(run.trajectory(), run.problem(), loss(run)).scores
    for backend in ("generic", "native"):
        refined = dit_fast.score(run.trajectory(), run.problem(), loss(run), refine=3, backend=backend)
        chosen = refined.retrained
        assert int(chosen.sum()) == 3
        torch.testing.assert_close(refined.scores[chosen], true[chosen], rtol=1e-10, atol=0)


def test_method_auto_takes_what_is_cheaper():
    run = standard_run("mlp")
    many = [(a, b) for a in range(7) for b in range(a + 1, 8)]
    arguments = (run.trajectory(), run.problem(), loss(run))
    few = dit_fast.score(*arguments, many, sample_ids=[0, 3], method="auto")
    assert few.meta["method"] == "retrain" and few.retrained.all()
    assert few.meta["why_method"].startswith("adjoint takes ")
    one = dit_fast.score(*arguments, method="auto")
    assert one.meta["method"] == "adjoint" and not one.retrained.any()
    assert "retrain takes" in one.meta["why_method"]
    torch.testing.assert_close(one.scores, dit_fast.score(*arguments).scores)
    true = reference.leave_one_out(*arguments, many, sample_ids=[0, 3])
    assert relative_error(few.scores, true.scores) < 1e-10


@pytest.mark.parametrize("case", ["final", "gradients"])
def test_method_auto_where_nothing_can_be_retrained(case):
    run = standard_run("mlp")
    size = sum(value[0].numel() for value in run.params.values())
    query = queries.gradients({7: torch.ones(1, size)}) if case == "gradients" else loss(run)
    query_at = "final" if case == "final" else "endpoint"
    result = dit_fast.score(run.trajectory(), run.problem(), query, query_at=query_at, sample_ids=[0], method="auto")
    assert result.meta["method"] == "adjoint" and "cannot be retrained" in result.meta["why_method"]
