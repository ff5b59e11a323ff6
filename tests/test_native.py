"""The compiled sweep against the slow literal estimator and the generic path."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, relative_error, train
from mlp_cases import ACTIVATIONS, LOSSES, make_case, make_run
from torch import nn
from torch.nn import functional as F

import dit_fast
from dit_fast import native, ops, queries
from dit_fast.problem import Evaluator

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


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.02}, {"l2": 0.02}])
@pytest.mark.parametrize("hessian", ["exact", "ggn", "none"])
def test_more_inputs_than_samples(monkeypatch, hessian, options):
    """The first layer is then swept by the samples' inner products, unless the columns themselves are needed."""
    made = []
    monkeypatch.setattr(native, "GRAM_SHARE", 100)  # it does not pay for so few steps
    inner = native.inner_products
    monkeypatch.setattr(native, "inner_products", lambda *a: made.append(inner(*a)) or made[-1])
    for widths, loss in (((90, 4, 3), "cross_entropy"), ((90, 1), "bce_logits")):
        fast = assert_native(make_run(widths, "tanh", loss, options=options), hessian=hessian)
        assert any(x is not None for x in made) == (hessian != "none" and "l2" not in options)
        made.clear()
        assert fast.meta["columns"] == 3 and not made
        assert_native(make_run(widths, "tanh", loss, options=options), [(0, 7), (2, 7)], hessian=hessian)
        made.clear()


@pytest.mark.parametrize(
    ("widths", "windows", "capacity"),
    [
        ((5, 16, 2), 1, 1),
        ((5, 32, 2), 1, 1),
        ((5, 8, 2), 1, 2),
        ((5, 1), 1, 1),
        ((5, 1), 3, 16),
        ((5, 3), 3, 3),
        ((5, 8, 2), 3, 4),
    ],
)
def test_columns_are_padded_to_a_line_and_no_further(monkeypatch, widths, windows, capacity):
    made, blocks = [], native.blocks
    monkeypatch.setattr(native, "blocks", lambda *a, **k: made.append(a[2]) or blocks(*a, **k))
    loss = "cross_entropy" if widths[-1] > 1 else "bce_logits"
    assert_native(make_run(widths, "tanh", loss), [(0, 7), (0, 5), (0, 6)][:windows])
    assert made == [1, capacity]  # one to compare, one to sweep


def test_inner_products_are_of_all_pairs_and_left_where_they_do_not_pay():
    """In blocks of 64, of which the upper ones are copies."""
    run = make_run((300, 4, 3), num_samples=150)
    ev = Evaluator.create(run.problem(), run.trajectory(), None, None)
    with ev.session():
        compiled = native.prepare(ev, "exact")
        gram = native.inner_products(ev, compiled, 10_000, 1)
        assert native.inner_products(ev, compiled, 1, 1) is None
    assert (gram - run.case.x @ run.case.x.T).abs().max() <= 1e-12 * gram.abs().max()


def test_the_querys_gradients_are_compiled_but_for_the_one_they_are_compared_with(monkeypatch):
    asked, generic = [], queries.query_gradient
    monkeypatch.setattr(queries, "query_gradient", lambda ev, t, *rest: asked.append(t) or generic(ev, t, *rest))
    assert_native(make_run((5, 4, 3)), [(t, t + 1) for t in range(7)])
    assert asked == [7]


def test_more_inputs_than_samples_with_momentum_in_slices(monkeypatch):
    monkeypatch.setattr(native, "GRAM_SHARE", 100)
    monkeypatch.setattr(native, "SLICE_NUMBERS", 3 * 380)  # three steps at a time
    run = make_run((90, 4, 3))
    query = queries.loss(run.case.x_val, run.case.y_val)
    sgd = dit_fast.SGD(momentum=0.9, dampening=0.2, weight_decay=0.01)
    arguments = (run.trajectory(optimizer=sgd), run.problem(), query, [(0, 7), (2, 5), (5, 6)])
    ours, theirs = (dit_fast.score(*arguments, backend=b, check=False) for b in ("native", "generic"))
    assert (ours.scores - theirs.scores).abs().max() <= 1e-10 * theirs.scores.abs().max()


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
