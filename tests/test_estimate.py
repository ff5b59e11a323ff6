"""Costs stated before a score, against hand counts, counts of what really runs, and what result.meta says afterwards."""

import re
from itertools import pairwise

import pytest
import torch
from cases import cross_entropy, standard_run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dit_fast as dit
from dit_fast import layerwise
from dit_fast.estimate import (
    PER_COLUMN,
    PER_COLUMN_LAYERWISE,
    SHARED,
    SHARED_LAYERWISE,
    SHARED_LAYERWISE_WITH_GRADIENT,
    count_flops,
)
from dit_fast.linearize import linearize
from dit_fast.problem import Evaluator

B, STEPS, N = 8, 6, 20
WINDOWS = [(0, 3), (3, 6), (2, 6)]


def run_of(model, features, classes, steps=STEPS):
    """A plain SGD run of equal batches, its problem and validation data."""
    torch.manual_seed(1)
    x, y = torch.randn(N, features), torch.randint(classes, (N,))
    named = dict(model.named_parameters())
    params = {name: torch.stack([p.detach().clone() * (1 - 0.01 * t) for t in range(steps + 1)]) for name, p in named.items()}
    ids = [torch.randperm(N)[:B] for _ in range(steps)]
    trajectory = dit.Trajectory.from_arrays(params, ids, 0.1, num_samples=N)
    return trajectory, dit.Problem(model, cross_entropy, (x, y)), (torch.randn(5, features), torch.randint(classes, (5,)))


def linear_net(*sizes):
    return nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(sizes)))


@pytest.mark.parametrize(
    ("backend", "hessian", "shared", "per_column"),
    [
        ("generic", "exact", 3, 6),
        ("generic", "ggn", 5, 4),
        ("native", "exact", 2, 6),
        ("native", "none", 2, 1),
        ("layerwise", "exact", 2, 6),
        ("layerwise", "ggn", 1, 4),
    ],
)
def test_flops_of_a_linear_net_by_hand(backend, hessian, shared, per_column):
    trajectory, problem, validation = run_of(linear_net(7, 5, 3), 7, 3)
    query = dit.queries.loss(*validation)
    found = dit.estimate_score(trajectory, problem, query, WINDOWS, hessian=hessian, backend=backend, check=False)
    F = 2 * B * (7 * 5 + 5 * 3)
    assert found.forward_flops == F
    # three columns: one ends at step 3, two at step 6
    assert found.sweep_flops == 6 * shared * F + (3 + 6 + 6) * per_column * F
    # the query at steps 2, 3 and 6: forward and backward over five samples
    assert found.query_flops == 3 * 3 * 2 * 5 * (7 * 5 + 5 * 3)
    assert found.replay_flops == 0
    assert found.flops == found.sweep_flops + found.query_flops
    # N models and the logged one: forward and backward in each step, the query's value at each end
    assert found.retraining.flops == (N + 1) * (6 * 3 * F + 3 * 2 * 5 * (7 * 5 + 5 * 3))
    assert found.read_bytes == 0


def test_flops_of_the_guard_and_of_several_values():
    trajectory, problem, (x, _) = run_of(linear_net(7, 3), 7, 3)
    found = dit.estimate_score(trajectory, problem, dit.queries.logit(x, 1))
    assert found.columns == 5
    assert found.query_flops == (1 + 2 * 5) * 2 * 5 * 7 * 3
    assert found.replay_flops == 3 * 3 * 2 * B * 7 * 3  # the guard's three steps


@pytest.mark.parametrize("hessian", ["exact", "fisher", "none"])
def test_the_factors_are_those_of_the_generic_path(hessian):
    """On a net whose first layer is small, so that its savings are; the count of what really runs, products only."""
    trajectory, problem, _ = run_of(linear_net(1, 64, 64, 64, 64, 3), 1, 3)
    ev = Evaluator.create(problem, trajectory, None, None)
    with ev.session():
        params, batch = ev.params(0), ev.batches(0)[0]
        forward, _ = count_flops(lambda: ev.losses(params, batch))
        shared, (_, pull) = count_flops(lambda: linearize(ev, params, batch, hessian))
        column, _ = count_flops(lambda: pull({name: torch.ones(1, *value.shape) for name, value in params.items()}))
    assert shared / forward == pytest.approx(SHARED[hessian], rel=0.05)
    assert column / forward == pytest.approx(PER_COLUMN[hessian], rel=0.05)


@pytest.mark.parametrize("hessian", ["exact", "ggn", "none"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_factors_are_those_of_the_layerwise_path(hessian, with_gradient):
    trajectory, problem, _ = run_of(linear_net(1, 64, 64, 64, 64, 3), 1, 3)
    ev = Evaluator.create(problem, trajectory, None, None)
    with ev.session():
        net, params, batch = layerwise.prepare(ev, hessian), ev.params(0), ev.batches(0)[0]
        forward, _ = count_flops(lambda: ev.losses(params, batch))
        run = layerwise.linearizer(ev, net, hessian, 1, with_gradient)
        shared, (_, pull) = count_flops(lambda: run(params, batch))
        column, _ = count_flops(lambda: pull({name: torch.ones(1, *value.shape) for name, value in params.items()}))
    expected = SHARED_LAYERWISE_WITH_GRADIENT if with_gradient else SHARED_LAYERWISE[hessian]
    # without the gradient everything waits for the columns
    assert (shared > 0) == with_gradient
    assert (shared + column) / forward == pytest.approx(expected + PER_COLUMN_LAYERWISE[hessian], rel=0.05)


QUERIES = {
    "loss": lambda run: dit.queries.loss(run.case.x_val, run.case.y_val),
    "losses": lambda run: dit.queries.losses(run.case.x_val, run.case.y_val),
    "custom": lambda run: dit.queries.custom(lambda m: torch.stack([p.sum() for p in m.parameters()][:2])),
    "list": lambda run: [dit.queries.loss(run.case.x_val, run.case.y_val), dit.queries.logit(run.case.x_val[:2], 1)],
}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("windows", [None, [(0, 3), (3, 7), (2, 5)], [(a, b) for a in range(4) for b in range(a + 1, 5)]])
@pytest.mark.parametrize("budget", [None, "40kB"])
@pytest.mark.parametrize(("name", "hessian"), [("mlp", "exact"), ("mlp", "fisher"), ("cnn", "exact"), ("mlp", "ggn")])
def test_columns_and_sweeps_are_those_of_the_score(name, hessian, windows, budget, query):
    run = standard_run(name)
    arguments = (run.trajectory(), run.problem(), QUERIES[query](run), windows)
    options = {"hessian": hessian, "memory_budget": budget}
    found = dit.estimate_score(*arguments, **options)
    meta = dit.score(*arguments, **options).meta
    assert (found.columns, found.sweeps, found.backend) == (meta["columns"], meta["sweeps"], meta["backend"])
    assert found.columns_per_pull == meta.get("columns_per_pull")
    assert not (budget and query == "losses" and windows) or found.sweeps > 1
    if query == "loss" and windows is None:
        truth = dit.leave_one_out(*arguments, memory_budget=budget).meta
        assert found.retraining.models_at_once == truth["models_at_once"]
        assert found.retraining.models == len(run.case.x) >= truth["models"]  # those visited


def test_an_attention_net_and_a_feature_query_are_counted():
    run = standard_run("transformer")
    found = dit.estimate_score(run.trajectory(), run.problem(), dit.queries.loss(run.case.x_val, run.case.y_val))
    assert found.forward_flops > 0
    mlp = standard_run("mlp")
    asked = [dit.queries.feature(mlp.case.x_val, 1, 2), dit.queries.loss(mlp.case.x_val, mlp.case.y_val)]
    feature, loss = (dit.estimate_score(mlp.trajectory(), mlp.problem(), query).query_flops for query in asked)
    assert feature > loss


def test_what_the_counter_counts_is_what_torch_counts():
    model = linear_net(4, 5)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 4))
    assert count_flops(lambda: model(torch.randn(3, 4)))[0] == counter.get_total_flops() == 2 * 3 * 4 * 5


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("every", [1, 3])
def test_replay_and_bytes_read_of_a_log(tmp_path, optimizer, every):
    torch.manual_seed(0)
    model = linear_net(7, 3)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    made = kind(model.parameters(), lr=0.01)
    x, y = torch.randn(N, 7), torch.randint(3, (N,))
    with dit.Recorder(tmp_path / "log", model, made, every=every) as recorder:
        for _ in range(12):
            ids = torch.randperm(N)[:B]
            made.zero_grad()
            nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
            with recorder.step(ids):
                made.step()
    trajectory = dit.Trajectory.open(tmp_path / "log")
    problem = dit.Problem(model, cross_entropy, (x, y))
    arguments = (trajectory, problem, dit.queries.loss(x, y))
    found = dit.estimate_score(*arguments, check=False)
    F = 2 * B * 7 * 3
    assert found.replay_flops == (12 * 3 * F if every > 1 or optimizer == "adam" else 0)
    size = (tmp_path / "log/chunk-000000.safetensors").stat().st_size
    assert found.read_bytes == 2 * size and found.retraining.read_bytes == 2 * size
    assert found.retraining.flops > (N + 1) * 12 * 3 * F + found.replay_flops
    meta = dit.score(*arguments).meta
    assert ("replayed" in meta) == (found.replay_flops > 0)
    # with a budget of two points per segment the segment is passed over twice
    if every == 1 and optimizer == "adam":
        small = dit.estimate_score(*arguments, check=False, memory_budget="5kB")
        assert small.replay_flops == 2 * found.replay_flops * small.sweeps


def test_the_guard_replays_segments_too(tmp_path):
    run = standard_run("mlp")
    plain = dit.estimate_score(run.trajectory(), run.problem(), dit.queries.parameter("0.bias"))
    unchecked = dit.estimate_score(run.trajectory(), run.problem(), dit.queries.parameter("0.bias"), check=False)
    assert plain.replay_flops - unchecked.replay_flops == 3 * 3 * plain.forward_flops


def peak_memory(run):
    """The most that tensors made in run() took at one time, by torch's own record of allocations on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("columns", [1, 12])
def test_memory_is_what_the_score_takes(columns):
    trajectory, problem, (x, _) = run_of(linear_net(100, 200, 200, 12), 100, 12, steps=3)
    query = dit.queries.custom(lambda model: model(x)[0, :columns])
    found = dit.estimate_score(trajectory, problem, query)
    measured = peak_memory(lambda: dit.score(trajectory, problem, query, check=False))
    assert measured / 1.5 < found.memory_bytes < 2.5 * measured


def test_memory_of_retraining():
    trajectory, problem, (x, y) = run_of(linear_net(100, 200, 200, 12), 100, 12, steps=3)
    arguments = (trajectory, problem, dit.queries.loss(x, y))
    measured = peak_memory(lambda: dit.leave_one_out(*arguments, check=False, sample_ids=range(N)))
    found = dit.estimate_score(*arguments).retraining
    assert measured / 2 < found.memory_bytes < 2.5 * measured


def test_it_reads_as_a_sentence():
    trajectory, problem, validation = run_of(linear_net(7, 3), 7, 3)
    found = dit.estimate_score(trajectory, problem, dit.queries.loss(*validation), backend="generic")
    cost = r"[\d.]+ [kMG]FLOP, \S+ \w?i?B of memory, 0 B read"
    assert re.fullmatch(
        rf"ScoreEstimate\(1 columns, 1 sweeps, generic: {cost}; RetrainEstimate\(20 models, 1 passes: {cost}\)\)", repr(found)
    )


def test_refusals_are_those_of_the_score():
    run = standard_run("mlp")
    query = dit.queries.loss(run.case.x_val, run.case.y_val)
    with pytest.raises(ValueError, match="hessian='no' is not one of"):
        dit.estimate_score(run.trajectory(), run.problem(), query, hessian="no")
    with pytest.raises(ValueError, match="query_at='now' is not one of"):
        dit.estimate_score(run.trajectory(), run.problem(), query, query_at="now")
    with pytest.raises(ValueError, match="one column needs"):
        dit.estimate_score(run.trajectory(), run.problem(), query, memory_budget=100)
    with pytest.raises(ValueError, match=r"sample_ids must lie in 0\.\.11"):
        dit.estimate_score(run.trajectory(), run.problem(), query, sample_ids=[40])
    ready = dit.queries.gradients({7: torch.zeros(1, sum(v[0].numel() for v in run.params.values()))})
    found = dit.estimate_score(run.trajectory(), run.problem(), ready)
    assert found.retraining is None and "cannot be retrained" in found.retraining_refused
    assert found.query_flops == 0 and "cannot be retrained" in repr(found)


def test_nothing_is_left_behind():
    run = standard_run("mlp")
    problem = run.problem()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    random = torch.get_rng_state()
    dit.estimate_score(run.trajectory(), problem, dit.queries.loss(run.case.x_val, run.case.y_val))
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
    assert all(p.grad is None for p in problem.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in problem.model.modules())
