"""Against the derivative of the whole training with respect to the sample coefficients: by autograd, and by retraining."""

import pytest
import torch
from cases import Run, relative_error, standard_run, train
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_fast

NETS = ("mlp", "cnn", "transformer")
OPTIONS = {
    "plain": {},
    "weight decay and l2": {"weight_decay": 0.03, "l2": 0.05},
    "micro-batches": {"micro_batches": [[2, 2], [3], [1, 4], [1], [2, 1, 1], [2], [3, 3]]},
}
WINDOWS = [(0, 7), (0, 3), (3, 7), (2, 5), (5, 6), (0, 1)]


def query(run: Run) -> dit_fast.queries.Query:
    return dit_fast.queries.loss(run.case.x_val, run.case.y_val)


def query_value(run: Run, params: dict[str, Tensor]) -> Tensor:
    model = run.case.model().eval()
    return run.case.loss(torch.func.functional_call(model, params, (run.case.x_val,)), run.case.y_val).mean()


# the oracle differentiates attention twice too, which the flash kernel cannot
@sdpa_kernel(SDPBackend.MATH)
def unrolled_endpoint_scores(run: Run, ends: list[int]) -> dict[int, Tensor]:
    """S_j(t) = −∂query(θ[t])/∂w_j at w = 1, through the unrolled steps."""
    model = run.case.model()
    params = {name: rows[0].clone().requires_grad_() for name, rows in run.params.items()}
    w = torch.ones(len(run.case.x), dtype=torch.float64, requires_grad=True)
    scores = {0: torch.zeros(len(w), dtype=torch.float64)}
    for t, (ids, a, lr) in enumerate(zip(run.batches, run.coefficients, run.lr, strict=True)):
        outputs = torch.func.functional_call(model, params, (run.case.x[ids],))
        losses = run.case.loss(outputs, run.case.y[ids]) + 0.5 * run.l2 * sum(p.square().sum() for p in params.values())
        gradient = torch.autograd.grad((w[ids] * a * losses).sum(), list(params.values()), create_graph=True)
        params = {n: p - lr * (g + run.weight_decay * p) for (n, p), g in zip(params.items(), gradient, strict=True)}
        if t + 1 in ends:
            scores[t + 1] = -torch.autograd.grad(query_value(run, params), w, retain_graph=True)[0]
    return scores


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("net", NETS)
def test_scores_are_the_derivative_of_the_unrolled_training(net, options):
    run = standard_run(net, **options)
    truth = unrolled_endpoint_scores(run, sorted({t for w in WINDOWS for t in w}))
    result = dit_fast.score(run.trajectory(), run.problem(), query(run), WINDOWS)
    for row, (start, stop) in zip(result.scores[:, 0], WINDOWS, strict=True):
        scale = truth[start].abs().max() + truth[stop].abs().max()
        assert relative_error(row, truth[stop] - truth[start], scale) < 1e-10


@pytest.mark.parametrize("net", NETS)
def test_negative_controls_are_far_from_the_derivative(net):
    run = standard_run(net)
    truth = unrolled_endpoint_scores(run, [3, 7])
    expected, scale = truth[7] - truth[3], truth[7].abs().max() + truth[3].abs().max()
    mean = [torch.full((len(ids),), 1 / len(ids), dtype=torch.float64) for ids in run.batches]
    wrong = {
        "no Hessian": dit_fast.score(run.trajectory(), run.problem(), query(run), (3, 7), hessian="none"),
        "sweep stopped at t1": dit_fast.score(run.trajectory(), run.problem(), query(run), [(0, 7), (0, 3)]),
        "coefficients forgotten": dit_fast.score(
            run.trajectory(coefficients=mean), run.problem(), query(run), (3, 7), check=False
        ),
        "query at the end": dit_fast.score(run.trajectory(), run.problem(), query(run), (0, 3), query_at="final"),
    }
    for what, result in wrong.items():
        assert relative_error(result.scores[0, 0], expected, scale) > 1e-3, what


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("net", NETS)
def test_scores_are_central_differences_of_retraining(net, options):
    run = standard_run(net, **options)
    windows = [(0, 7), (3, 7)]
    result = dit_fast.score(run.trajectory(), run.problem(), query(run), windows)
    truth = torch.zeros(2, len(run.case.x), dtype=torch.float64)
    ends = torch.zeros(2, len(run.case.x), dtype=torch.float64)
    for j in range(len(run.case.x)):
        values = []
        for sign in (1, -1):
            w = torch.ones(len(run.case.x), dtype=torch.float64)
            w[j] += sign * 1e-5
            again = train(
                run.case, run.batches, run.coefficients, run.lr,
                weight_decay=run.weight_decay, l2=run.l2, sample_weights=w,
            )  # fmt: skip
            at = [query_value(run, {n: rows[t] for n, rows in again.params.items()}) for t in (3, 7)]
            values.append(torch.stack(at).detach())
        ends[:, j] = -(values[0] - values[1]) / 2e-5
    truth[0], truth[1] = ends[1], ends[1] - ends[0]
    scale = torch.stack([ends[1].abs().max(), ends.abs().amax(1).sum()])
    assert relative_error(result.scores[:, 0], truth, scale) < 1e-8


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("net", NETS)
def test_leave_one_out_is_the_ordinary_loop_without_the_sample(net, options):
    run = standard_run(net, **options)
    result = dit_fast.leave_one_out(run.trajectory(), run.problem(), query(run), WINDOWS)
    for j in range(len(run.case.x)):
        without = _without(run, j)
        change = {
            t: query_value(run, {n: rows[t] for n, rows in without.params.items()})
            - query_value(run, {n: rows[t] for n, rows in run.params.items()})
            for t in range(8)
        }
        for row, (start, stop) in zip(result.scores[:, 0, j], WINDOWS, strict=True):
            assert abs(float(row - (change[stop] - change[start]))) < 1e-12


def _without(run: Run, j: int) -> Run:
    w = torch.ones(len(run.case.x), dtype=torch.float64)
    w[j] = 0
    return train(run.case, run.batches, run.coefficients, run.lr, weight_decay=run.weight_decay, l2=run.l2, sample_weights=w)
