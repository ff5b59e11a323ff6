"""leave_one_out, generic path: the same numbers whether models advance together or alone, many or few at a time."""

import pytest
import torch
from cases import make_case, schedule, standard_run, train
from torch import nn

import dit_fast
from dit_fast import plan, queries, reference

WINDOWS = [(0, 7), (2, 5), (0, 3)]
NEVER_VISITED = [7, 11]  # by standard_run


@pytest.fixture(scope="module")
def run():
    return standard_run("mlp", weight_decay=0.02, l2=0.03)


@pytest.fixture(scope="module")
def truth(run):
    return reference.leave_one_out(run.trajectory(), run.problem(), loss(run), WINDOWS)


def loss(run):
    return queries.loss(run.case.x_val, run.case.y_val)


def retrain(run, windows=WINDOWS, query=None, **options):
    options = {"backend": "generic"} | options
    return dit_fast.leave_one_out(run.trajectory(), run.problem(), query or loss(run), windows, **options)


def test_all_models_at_once(run, truth):
    result = retrain(run)
    assert (result.scores - truth.scores).abs().max() < 1e-12
    assert result.retrained.all()
    assert result.sample_ids.tolist() == list(range(12))
    assert (result.meta["vmapped"], result.meta["models"]) == (True, 10)


@pytest.mark.parametrize("net", ["cnn", "transformer"])
def test_other_nets(net):
    run = standard_run(net, l2=0.03)
    result, slow = retrain(run), reference.leave_one_out(run.trajectory(), run.problem(), loss(run), WINDOWS)
    assert (result.scores - slow.scores).abs().max() < 1e-12
    assert result.meta["vmapped"]


@pytest.mark.parametrize(("budget", "at_once"), [("6 KiB", 1), ("20 KiB", 3)])
def test_a_memory_budget_retrains_in_chunks(run, truth, budget, at_once):
    result = retrain(run, memory_budget=budget)
    assert result.meta["models_at_once"] == at_once
    assert (result.scores - truth.scores).abs().max() < 1e-12


def test_groups_are_removed_together(run):
    groups = [[0, 3, 4], [5], [10, 8, 10], [7, 11], []]
    result = retrain(run, groups=groups)
    slow = reference.leave_one_out(run.trajectory(), run.problem(), loss(run), WINDOWS, groups=groups)
    assert (result.scores - slow.scores).abs().max() < 1e-12
    assert result.groups == [[0, 3, 4], [5], [8, 10], [7, 11], []]
    assert result.sample_ids.tolist() == [0, 1, 2, 3, 4]
    assert not result.scores[..., 3:].any()
    alone = retrain(run, sample_ids=[0, 3, 4]).scores.sum(-1)
    assert (result.scores[..., 0] - alone).abs().max() > 1e-3  # together is not one by one


def test_samples_not_visited_before_the_windows_end_score_exactly_zero(run):
    result = retrain(run)
    visited = {int(i) for ids in run.batches for i in ids}
    early = {int(i) for ids in run.batches[:3] for i in ids}
    assert {int(j) for j in result.scores[0, 0].nonzero()} == visited
    assert {int(j) for j in result.scores[2, 0].nonzero()} == early


def test_nothing_to_retrain(run):
    result = retrain(run, sample_ids=NEVER_VISITED)
    assert not result.scores.any() and result.retrained.all()
    assert result.meta["models"] == 0
    assert retrain(run, sample_ids=[]).scores.shape == (3, 1, 0)


class Straight(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Branching(Straight):
    """The same function, but it asks for the value of an activation, which vmap cannot give."""

    def forward(self, x):
        z = self.first(x)
        return self.second(z.tanh() if z.abs().max().item() > 0 else z)


def run_of(module):
    case = make_case("mlp")

    def model():
        torch.manual_seed(3)
        return module().double()

    case.model = model
    return train(case, *schedule(len(case.x)))


def test_a_module_that_vmap_cannot_take_is_retrained_one_by_one():
    looped, vmapped = retrain(run_of(Branching)), retrain(run_of(Straight))
    assert (looped.meta["vmapped"], vmapped.meta["vmapped"]) == (False, True)
    assert (looped.scores - vmapped.scores).abs().max() < 1e-12
    chunked = retrain(run_of(Branching), memory_budget="6 KiB")
    assert chunked.meta["models_at_once"] < 10
    assert torch.equal(chunked.scores, looped.scores)


def test_a_query_that_vmap_cannot_take():
    run = run_of(Straight)
    query = queries.custom(lambda model: model(run.case.x_val).max() if model.first.weight.sum().item() < 1e9 else None)
    result = retrain(run, query=query)
    slow = reference.leave_one_out(run.trajectory(), run.problem(), query, WINDOWS)
    assert result.meta["vmapped"] is False
    assert (result.scores - slow.scores).abs().max() < 1e-12


def test_an_error_of_the_users_own_is_not_swallowed():
    def failing(output, target):
        raise RuntimeError("my own mistake")

    run = run_of(Straight)
    problem = dit_fast.Problem(run.case.model(), failing, (run.case.x, run.case.y))
    with pytest.raises(RuntimeError, match="my own mistake"):
        dit_fast.leave_one_out(run.trajectory(), problem, queries.parameter("first.bias"), check=False)


def test_repeated_and_unordered_ids_each_have_their_column(run):
    everyone = retrain(run)
    result = retrain(run, sample_ids=[5, 0, 5])
    assert result.sample_ids.tolist() == [5, 0, 5]
    assert (result.scores - everyone.scores[..., [5, 0, 5]]).abs().max() < 1e-12


REFUSED = {
    "groups and ids": ({"groups": [[1]], "sample_ids": [1]}, ValueError, "give sample_ids or groups, not both"),
    "a flat group": ({"groups": [1, 2]}, ValueError, "groups must be one-dimensional"),
    "a group outside": ({"groups": [[0], [1, 12]]}, ValueError, r"must lie in 0..11, got 1..12"),
    "a group of names": ({"groups": [[0.5]]}, TypeError, "groups must be integers"),
    "ids outside": ({"sample_ids": [12]}, ValueError, "sample_ids must lie in 0..11"),
    "backend": ({"backend": "factors"}, ValueError, "backend='factors' is not one of 'auto', 'generic', 'native'"),
    "budget": ({"memory_budget": 600}, ValueError, "one model needs .* more than memory_budget = 600 B"),
    "window": ({"windows": (3, 3)}, ValueError, "is empty or reversed"),
    "ready gradients": ({"query": queries.gradients({7: torch.zeros(1, 79)})}, ValueError, "cannot be retrained or refined"),
    "trajectory": ({"trajectory": None}, TypeError, "trajectory must be a dit_fast.Trajectory, got NoneType"),
    "problem": ({"problem": None}, TypeError, "problem must be a dit_fast.Problem, got NoneType"),
    "query": ({"query": "loss"}, TypeError, "query must be one of dit_fast.queries"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_one_line(run, case):
    changes, error, message = REFUSED[case]
    arguments = {"trajectory": run.trajectory(), "problem": run.problem(), "query": loss(run)} | changes
    with pytest.raises(error, match=message) as caught:
        dit_fast.leave_one_out(**arguments)
    assert "\n" not in str(caught.value)


def test_the_guard_stands_before_retraining_and_can_be_passed(run):
    with pytest.raises(ValueError, match="does not reproduce step 0"):
        dit_fast.leave_one_out(run.trajectory(), run.problem(l2=0.5), loss(run))
    dit_fast.leave_one_out(run.trajectory(), run.problem(l2=0.5), loss(run), sample_ids=[0], check=False)


def test_convolutions_of_large_batches_go_one_by_one(monkeypatch):
    run = standard_run("cnn")
    arguments = run.trajectory(), run.problem(), loss(run), [(0, 7), (3, 7)]
    together = dit_fast.leave_one_out(*arguments)
    monkeypatch.setattr(plan, "CACHED_GRAPH_BYTES", 0)
    alone = dit_fast.leave_one_out(*arguments)
    assert (together.meta["vmapped"], alone.meta["vmapped"]) == (True, False)
    assert (together.scores - alone.scores).abs().max() < 1e-13


@pytest.mark.parametrize("backend", ["native", "generic"])
def test_a_model_that_runs_away_is_told(backend):
    """y = w x with curvature 4 − 3 + ¼ and rate 1; without the second sample it is 4¼, and w − w* grows by −3¼ a step."""
    x, steps = torch.tensor([[2.0], [10.0], [0.5]]), 120
    made = {"lr": 1.0, "coefficients": [torch.tensor([1.0, -0.03, 1.0])] * steps, "num_samples": 3}
    trajectory = dit_fast.Trajectory.from_arrays({"weight": torch.full((steps + 1, 1, 1), 0.5)}, [[0, 1, 2]] * steps, **made)
    targets = torch.tensor([[1.0], [4.0], [0.3]])
    problem = dit_fast.Problem(nn.Linear(1, 1, bias=False), lambda z, y: 0.5 * (z - y).square().sum(1), (x, targets))
    query, options = dit_fast.queries.loss(x, x), {"backend": backend, "dtype": torch.float32, "check": False}
    with pytest.warns(UserWarning, match=r"1 of 2 retrained models ran away, the first without sample 1: .* NaN or infinite"):
        result = dit_fast.leave_one_out(trajectory, problem, query, [(0, steps)], sample_ids=[1, 2], **options)
    assert not result.scores[0, 0, 0].isfinite() and result.scores[0, 0, 1].isfinite()
    with pytest.warns(UserWarning, match="without group 1"):
        dit_fast.leave_one_out(trajectory, problem, query, [(0, steps)], groups=[[2], [1]], **options)
