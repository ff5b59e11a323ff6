"""What holds for every score (design §5), by hand-written numbers and by asking the same in different ways."""

import pytest
import torch
from cases import relative_error, standard_run
from torch import Tensor, nn

import dit_fast
from dit_fast import plan, queries
from dit_fast.linearize import linearize
from dit_fast.problem import Evaluator

NEVER_VISITED = [7, 11]  # by standard_run
PAIRS = [(a, b) for b in range(1, 8) for a in range(1, b)]  # all 21 over the endpoints 1 … 7
COLUMN_BYTES = 3 * 79 * 8 + 8 * 12  # U, its cotangent and the product of the 79-parameter mlp in float64, and 12 scores


@pytest.fixture(scope="module")
def run():
    return standard_run("mlp", weight_decay=0.02, l2=0.03)


def loss(run):
    return queries.loss(run.case.x_val, run.case.y_val)


def score(run, windows=None, query=None, **options):
    return dit_fast.score(run.trajectory(), run.problem(), query or loss(run), windows, **options)


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output.squeeze(1) - target).square()


def regression(batches, lr, params, coefficients=None):
    """ℓ = ½(θx − y)² with x = 1, 2, 3 and y = 2, 1, 5."""
    x, y = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64), torch.tensor([2.0, 1.0, 5.0], dtype=torch.float64)
    weight = torch.tensor(params, dtype=torch.float64).view(-1, 1, 1)
    trajectory = dit_fast.Trajectory.from_arrays({"weight": weight}, batches, lr, coefficients=coefficients, num_samples=3)
    return trajectory, dit_fast.Problem(nn.Linear(1, 1, bias=False).double(), half_square, (x, y))


# θ[0] = 0
# step 0, η = 1/2, batch {0}:    ∇ℓ₀ = 1·(0 − 2) = −2                                      θ[1] = 1
# step 1, η = 1/8, batch {1}:    ∇ℓ₁ = 2·(2 − 1) = 2                          H = 4        θ[2] = 3/4
# step 2, η = 1/2, batch {0, 1}: ∇ℓ₀ = 3/4 − 2 = −5/4, ∇ℓ₁ = 2·(3/2 − 1) = 1  H = 5/2      θ[3] = 3/4 + 1/2·1/8 = 13/16
PENCIL = [[0], [1], [0, 1]], [0.5, 0.125, 0.5], [0, 1, 0.75, 0.8125]
# d₀: d[1] = 1/2·(−2) = −1, d[2] = (1 − 1/8·4)·(−1) = −1/2, d[3] = (1 − 1/2·5/2)·(−1/2) + 1/2·1/2·(−5/4) = −3/16
# d₁: d[1] = 0,             d[2] = 1/8·2 = 1/4,             d[3] = −1/4·1/4 + 1/2·1/2·1 = 3/16
PENCIL_D = {0: [0, 0, 0], 1: [-1, 0, 0], 2: [-0.5, 0.25, 0], 3: [-0.1875, 0.1875, 0]}
WINDOWS = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]


def test_pencil_scores_of_the_parameter_itself():
    result = dit_fast.score(*regression(*PENCIL), queries.parameter("weight", (0, 0)), WINDOWS)
    expected = [[b - a for a, b in zip(PENCIL_D[start], PENCIL_D[stop], strict=True)] for start, stop in WINDOWS]
    assert result.scores[:, 0].tolist() == expected


def test_pencil_scores_of_a_loss_at_the_endpoints_and_frozen_at_the_end():
    # validation loss ½(θ − 1)²: q(t) = θ[t] − 1 = −1, 0, −1/4, −3/16
    query = queries.loss(torch.ones(1, 1), torch.ones(1))
    result = dit_fast.score(*regression(*PENCIL), query, [(1, 3), (2, 3)])
    # q(3)·d[3] − q(1)·d[1] = 9/256 − 0 and q(3)·d[3] − q(2)·d[2] = 9/256 − 1/8; sample 1: −9/256 and −9/256 + 1/16
    assert result.scores[:, 0].tolist() == [[9 / 256, -9 / 256, 0], [9 / 256 - 1 / 8, -9 / 256 + 1 / 16, 0]]
    final = dit_fast.score(*regression(*PENCIL), query, (2, 3), query_at="final")
    # −3/16·(d[3] − d[2]) = −3/16·5/16 and −3/16·(−1/16)
    assert final.scores[0, 0].tolist() == [-15 / 256, 3 / 256, 0]


def test_pencil_scores_without_curvature_add_up_the_gradients():
    result = dit_fast.score(*regression(*PENCIL), queries.parameter("weight", (0, 0)), hessian="none")
    # Σ η a ∇ℓ: sample 0: 1/2·(−2) + 1/4·(−5/4); sample 1: 1/8·2 + 1/4·1
    assert result.scores[0, 0].tolist() == [-1.3125, 0.5, 0]


def test_an_id_twice_in_a_batch_is_removed_twice():
    # a = 1/4, 1/2 for the two occurrences of 0, 1/4 for 1; ∇ℓ₀(0) = −2, ∇ℓ₁(0) = 2·(0 − 1) = −2; g = −2, η = 1/2, θ[1] = 1
    batches, coefficients = [[0, 0, 1]], [[0.25, 0.5, 0.25]]
    trajectory, problem = regression(batches, [0.5], [0, 1], coefficients)
    for method in ("adjoint", "retrain"):
        result = dit_fast.score(trajectory, problem, queries.parameter("weight", (0, 0)), method=method)
        assert result.scores[0, 0].tolist() == [0.5 * 0.75 * -2, 0.5 * 0.25 * -2, 0], method


@pytest.mark.parametrize("hessian", ["exact", "ggn", "fisher", "none"])
def test_a_sample_never_visited_scores_exactly_zero(run, hessian):
    result = score(run, [(0, 7), (2, 5)], hessian=hessian)
    assert not result.scores[..., NEVER_VISITED].any()
    assert result.scores.any(dim=(0, 1)).sum() == 10


def test_a_sample_not_yet_visited_scores_exactly_zero(run):
    visited = {int(i) for ids in run.batches[:3] for i in ids}
    result = score(run, [(0, 3), (1, 3)])
    assert {int(j) for j in result.scores.any(dim=(0, 1)).nonzero()} == visited


@pytest.mark.parametrize("query_at", ["endpoint", "final"])
def test_windows_add_up(run, query_at):
    left, right, whole = score(run, [(1, 4), (4, 6), (1, 6)], query_at=query_at).scores
    assert (left + right - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_all_pairs_of_endpoints_travel_as_one_column_per_endpoint(run):
    together = score(run, PAIRS)
    assert together.meta["columns"] == 7
    one_by_one = torch.cat([score(run, pair, check=False).scores for pair in PAIRS])
    assert relative_error(together.scores, one_by_one, together.scores.abs().amax()) < 1e-12


def test_few_windows_travel_as_one_column_each(run):
    windows = [(1, 2), (3, 4), (5, 6), (5, 6)]
    result = score(run, windows[:3], queries.losses(run.case.x_val, run.case.y_val))
    assert result.meta["columns"] == 3 * len(run.case.x_val)
    again = score(run, windows)
    assert torch.equal(again.scores[2], again.scores[3])


@pytest.mark.parametrize("windows", [PAIRS, [(1, 3), (2, 5), (4, 7), (0, 6)]], ids=["endpoints", "windows"])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_a_small_memory_budget_takes_more_sweeps_and_changes_nothing(run, windows, columns):
    whole = score(run, windows)
    assert whole.meta["sweeps"] == 1
    cut = score(run, windows, memory_budget=(columns + 0.01) * COLUMN_BYTES / plan.BLOCK_SHARE)
    assert cut.meta["columns"] == whole.meta["columns"]
    assert cut.meta["sweeps"] == -(-whole.meta["columns"] // columns) > 1
    assert relative_error(cut.scores, whole.scores, whole.scores.abs().amax()) < 1e-12


@pytest.mark.parametrize("hessian", ["exact", "ggn", "fisher", "none"])
def test_columns_per_pull_change_nothing(run, hessian, monkeypatch):
    windows = [(0, t) for t in range(1, 8)]
    whole = score(run, windows, hessian=hessian, backend="generic")
    assert whole.meta["columns_per_pull"] == 7
    for limit in (1, 3):
        monkeypatch.setattr(plan, "columns_per_pull", lambda *_, limit=limit: limit)
        cut = score(run, windows, hessian=hessian, backend="generic")
        assert cut.meta["columns_per_pull"] == limit
        assert relative_error(cut.scores, whole.scores, whole.scores.abs().amax()) < 1e-12


def test_the_same_call_is_bit_equal(run):
    first, second = score(run, PAIRS), score(run, PAIRS)
    assert torch.equal(first.scores, second.scores)


@pytest.mark.parametrize("net", ["mlp", "cnn", "transformer"])
@pytest.mark.parametrize(
    ("hessian", "mode"),
    [
        ("exact", "double_backward"),
        ("exact", "forward_over_reverse"),
        ("ggn", "double_backward"),
        ("fisher", "double_backward"),
    ],
)
def test_curvature_is_symmetric(net, hessian, mode):
    run = standard_run(net, l2=0.03)
    ev = Evaluator.create(run.problem(), run.trajectory(), None, None)
    with ev.session():
        params, generator = ev.params(3), torch.Generator().manual_seed(0)
        block = {n: torch.randn(2, *v.shape, generator=generator, dtype=v.dtype) for n, v in params.items()}
        hvp = linearize(ev, params, ev.batches(2)[0], hessian, mode)[1](block)[1]
    u_hv = sum(float((block[n][0] * hvp[n][1]).sum()) for n in block)
    v_hu = sum(float((block[n][1] * hvp[n][0]).sum()) for n in block)
    assert abs(u_hv) > 1e-3
    assert abs(u_hv - v_hu) < 1e-12 * sum(float(value.abs().sum()) for value in hvp.values())


@pytest.mark.parametrize("method", ["adjoint", "retrain"])
def test_sample_ids_select_in_the_order_given(run, method):
    wanted = [5, 2, 11, 5, 0]
    result, everyone = score(run, (2, 7), sample_ids=wanted, method=method), score(run, (2, 7), method=method)
    assert result.sample_ids.tolist() == wanted
    assert relative_error(result.scores, everyone.scores[..., wanted]) < 1e-12


def test_a_list_of_queries_joins_along_q(run):
    pieces = [loss(run), queries.losses(run.case.x_val[:2], run.case.y_val[:2]), queries.parameter("0.bias", 1)]
    joined = score(run, [(0, 7), (2, 5)], pieces)
    assert joined.queries == ["loss", "loss[0]", "loss[1]", "0.bias[1]"]
    separate = torch.cat([score(run, [(0, 7), (2, 5)], piece).scores for piece in pieces], dim=1)
    assert relative_error(joined.scores, separate) < 1e-12


def test_method_retrain_is_leave_one_out(run):
    options = {"sample_ids": [3, 0, 9], "dtype": torch.float64}
    result = score(run, [(0, 7), (2, 5)], method="retrain", **options)
    truth = dit_fast.leave_one_out(run.trajectory(), run.problem(), loss(run), [(0, 7), (2, 5)], **options)
    assert torch.equal(result.scores, truth.scores)
    assert result.retrained.all()
    assert result.meta["method"] == "retrain"


@pytest.mark.parametrize(("k", "marked"), [(1, 1), (3, 3), (40, 12)])
def test_refine_marks_exactly_k_and_takes_the_truth_there(run, k, marked):
    windows, query = [(0, 7), (2, 5)], queries.losses(run.case.x_val[:3], run.case.y_val[:3])
    result, plain = score(run, windows, query, refine=k), score(run, windows, query)
    truth = dit_fast.leave_one_out(run.trajectory(), run.problem(), query, windows)
    assert (result.retrained.sum(-1) == marked).all()
    assert torch.equal(result.retrained, plain.largest(k))
    assert relative_error(result.scores, torch.where(result.retrained, truth.scores, plain.scores)) < 1e-12
    assert (result.scores - plain.scores)[result.retrained].abs().max() > 1e-6
    assert result.meta["refined"] == 2 * 3 * marked


def test_refine_within_the_samples_asked_for(run):
    wanted = [9, 4, 0, 5]
    result = score(run, (0, 7), sample_ids=wanted, refine=2)
    truth = dit_fast.leave_one_out(run.trajectory(), run.problem(), loss(run), (0, 7), sample_ids=wanted)
    assert result.sample_ids.tolist() == wanted
    assert int(result.retrained.sum()) == 2
    assert relative_error(result.scores[result.retrained], truth.scores[result.retrained]) < 1e-12


@pytest.mark.parametrize("hessian", ["exact", "ggn", "fisher", "none"])
@pytest.mark.parametrize("net", ["mlp", "cnn", "transformer"])
def test_float32_agrees_with_float64_on_a_float32_log(net, hessian):
    run = standard_run(net)
    trajectory = run.trajectory(params={name: value.float() for name, value in run.params.items()})
    windows = [(0, 2), (0, 5), (0, 7), (2, 7), (5, 7)]
    single, double = (
        dit_fast.score(trajectory, run.problem(), loss(run), windows, hessian=hessian, dtype=dtype)
        for dtype in (None, torch.float64)
    )
    assert (single.meta["dtype"], double.meta["dtype"]) == ("float32", "float64")
    end = dict(zip((2, 5, 7), double.scores[:3, 0].abs().amax(-1), strict=True))
    scale = torch.stack([end[2], end[5], end[7], end[2] + end[7], end[5] + end[7]])
    error = relative_error(single.scores[:, 0], double.scores[:, 0], scale)
    assert 0 < error < 1e-5


REFUSED = {
    "hessian": ({"hessian": "gauss"}, ValueError, "hessian='gauss' is not one of 'exact', 'ggn', 'fisher', 'none'"),
    "query_at": ({"query_at": "start"}, ValueError, "query_at='start' is not one of 'endpoint', 'final'"),
    "method": ({"method": "loo"}, ValueError, "method='loo' is not one of"),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu' is not one of"),
    "negative refine": ({"refine": -1}, ValueError, "refine must be a number of samples, 0 or more, got -1"),
    "half refine": ({"refine": 1.5}, ValueError, "refine must be a number of samples, 0 or more, got 1.5"),
    "refine at the end": ({"refine": 2, "query_at": "final"}, ValueError, "query_at='final' cannot be retrained"),
    "retrain at the end": ({"method": "retrain", "query_at": "final"}, ValueError, "query_at='final' cannot be retrained"),
    "budget in words": ({"memory_budget": "two GiB"}, ValueError, "memory_budget 'two GiB' is not understood"),
    "unknown unit": ({"memory_budget": "2 PiB"}, ValueError, "memory_budget '2 PiB' is not understood"),
    "no budget": ({"memory_budget": 0}, ValueError, "memory_budget must be positive, got 0"),
    "small budget": ({"memory_budget": 100}, ValueError, "one column needs 1.95 KiB, more than memory_budget = 100 B"),
    "small budget, retrain": ({"memory_budget": "500 B", "method": "retrain"}, ValueError, "one model needs .* 500 B"),
    "dtype": ({"dtype": torch.float16}, ValueError, "dtype must be torch.float32 or torch.float64, got torch.float16"),
    "window outside": ({"windows": (0, 8)}, ValueError, r"window \(0, 8\) is outside the run, which has 7 steps"),
    "window reversed": ({"windows": (5, 2)}, ValueError, r"window \(5, 2\) is empty or reversed"),
    "window empty": ({"windows": [(0, 7), (3, 3)]}, ValueError, r"window \(3, 3\) is empty or reversed"),
    "no windows": ({"windows": []}, ValueError, "windows is empty"),
    "ids outside": ({"sample_ids": [0, 12]}, ValueError, r"sample_ids must lie in 0..11, got 0..12"),
    "ids negative": ({"sample_ids": [-1]}, ValueError, "sample_ids must lie in 0..11"),
    "ids no integers": ({"sample_ids": [0.0]}, TypeError, "sample_ids must be integers"),
    "trajectory": ({"trajectory": "runs/adult"}, TypeError, "trajectory must be a dit_fast.Trajectory, got str"),
    "problem": ({"problem": nn.Linear(1, 1)}, TypeError, "problem must be a dit_fast.Problem, got Linear"),
    "query": ({"query": torch.zeros(3)}, TypeError, "query must be one of dit_fast.queries"),
    "no query": ({"query": []}, TypeError, "query must be one of dit_fast.queries"),
    "another l2": ({"l2": 0.5}, ValueError, r"does not reproduce step 0 of the log.*likely l2=0.03 where it is 0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_one_line(run, case):
    changes, error, message = REFUSED[case]
    changes = dict(changes)
    problem = run.problem(l2=changes.pop("l2", run.l2))
    arguments = {"trajectory": run.trajectory(), "problem": problem, "query": loss(run)} | changes
    with pytest.raises(error, match=message) as caught:
        dit_fast.score(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", ["1GiB", "1 gib", "1.5 MB", "800k", 2**30, 1e9])
def test_memory_budgets_that_are_understood(run, budget):
    assert score(run, (0, 2), memory_budget=budget).meta["sweeps"] == 1
