"""score() and leave_one_out() through the one-launch ops, run by the CPU's threads and on a GPU where there is one."""

import pytest
import torch
from cases import relative_error
from mlp_cases import LOSSES, make_run

import dit_fast
from dit_fast import mlp_gemm, mlp_team, native, native_team, ops, queries

WINDOWS = [(0, 7), (2, 5), (5, 6)]


@pytest.fixture
def teams(device, monkeypatch):
    monkeypatch.setattr(native, "uses_teams", lambda ev: True)
    called = []
    for engine in (mlp_team.TeamSweep, mlp_team.TeamRetrain):
        run = engine.run
        monkeypatch.setattr(engine, "run", lambda self, *a, run=run: called.append(type(self).__name__) or run(self, *a))
    for engine in (ops.MlpSweep, ops.MlpRetrain):
        monkeypatch.setattr(engine, "run", lambda *a: pytest.fail("the CPU's op was called"))
    return device, called


def score(run, device, windows=WINDOWS, **options):
    result = dit_fast.score(run.trajectory(), run.problem(), loss(run), windows, device=device, **options)
    assert result.meta["backend"] == "native", result.meta["why"]
    return result.scores


def loss(run):
    return queries.loss(run.case.x_val, run.case.y_val)


def truth(run, windows=WINDOWS, **options):
    return dit_fast.reference.score(run.trajectory(), run.problem(), loss(run), windows, **options).scores


def endpoints(run, windows, **options):
    ends = sorted({t for w in windows for t in w} - {0})
    at = truth(run, [(0, t) for t in ends], **options).abs().amax(-1)
    size = dict(zip([0, *ends], [torch.zeros(1).double(), *at], strict=True))
    return torch.stack([size[a] + size[b] for a, b in windows])


@pytest.mark.parametrize("hessian", ["exact", "ggn", "none"])
@pytest.mark.parametrize("windows", [WINDOWS, [(1, 4), (2, 6)], [(0, 3), (3, 7), (0, 7), (3, 6), (6, 7)]])
def test_scores_are_the_references(teams, windows, hessian):
    run = make_run((5, 4, 3), "gelu", options={"l2": 0.03, "weight_decay": 0.02})
    scores = score(run, teams[0], windows, hessian=hessian)
    assert relative_error(scores, truth(run, windows, hessian=hessian), endpoints(run, windows, hessian=hessian)) < 1e-10
    assert set(teams[1]) == {"TeamSweep"}


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss(teams, kind):
    run = make_run((5, 4, 3), "silu", kind, steps=3)
    assert relative_error(score(run, teams[0], [(1, 3)]), truth(run, [(1, 3)]), endpoints(run, [(1, 3)])) < 1e-10


def test_momentum_slices_of_the_log_and_query_at_final(teams, monkeypatch):
    monkeypatch.setattr(native, "SLICE_NUMBERS", 100)
    sgd = dit_fast.SGD(momentum=0.9, dampening=0.2)
    run = make_run((5, 4, 3))
    arguments = (run.trajectory(optimizer=sgd), run.problem(), loss(run), WINDOWS)
    for query_at in ("endpoint", "final"):
        ours = dit_fast.score(*arguments, query_at=query_at, device=teams[0], check=False)
        theirs = dit_fast.score(*arguments, query_at=query_at, backend="generic", check=False)
        assert ours.meta["backend"] == "native"
        assert relative_error(ours.scores, theirs.scores) < 1e-9
    # one call compares, the others take a slice each
    assert teams[1].count("TeamSweep") > 6


def test_leave_one_out_is_the_references(teams):
    run = make_run((5, 4, 3), "gelu", options={"l2": 0.03, "weight_decay": 0.02})
    arguments = (run.trajectory(), run.problem(), loss(run), WINDOWS)
    ours = dit_fast.leave_one_out(*arguments, device=teams[0])
    assert ours.meta["backend"] == "native" and set(teams[1]) == {"TeamRetrain"}
    theirs = dit_fast.reference.leave_one_out(*arguments).scores
    assert (ours.scores - theirs).abs().max() <= 1e-10 * theirs.abs().max() + 1e-15
    groups = [[0, 3], [5], [1, 2, 7]]
    ours, theirs = (dit_fast.leave_one_out(*arguments, groups=groups, backend=b) for b in ("native", "generic"))
    assert (ours.scores - theirs.scores).abs().max() <= 1e-10 * theirs.scores.abs().max() + 1e-15


@pytest.mark.parametrize("hessian", ["exact", "ggn", "none"])
def test_a_net_that_does_not_fit_goes_through_gemms(teams, monkeypatch, hessian):
    monkeypatch.setattr(mlp_team, "plan", lambda *a, **k: None)
    monkeypatch.setattr(native, "SLICE_NUMBERS", 100)
    run = make_run((5, 4, 3), "gelu", options={"l2": 0.03, "weight_decay": 0.02})
    scores = score(run, teams[0], hessian=hessian)
    assert relative_error(scores, truth(run, hessian=hessian), endpoints(run, WINDOWS, hessian=hessian)) < 1e-10
    assert teams[1] == []
    monkeypatch.setattr(mlp_gemm.GemmSweep, "bad_step", lambda self: 1)
    with pytest.raises(dit_fast.LogError, match="step 6: a score is NaN"):
        score(run, teams[0], hessian=hessian)


def test_a_net_that_does_not_fit_is_retrained_by_the_generic_path(teams, monkeypatch):
    monkeypatch.setattr(mlp_team, "plan", lambda *a, **k: None)
    run = make_run((5, 4, 3))
    retrained = dit_fast.leave_one_out(run.trajectory(), run.problem(), loss(run), device=teams[0])
    assert retrained.meta["backend"] == "generic" and "does not fit the shared memory" in retrained.meta["why"]


def test_a_path_that_does_not_agree_is_not_used(teams, monkeypatch):
    run = make_run((5, 4, 3))
    sweep = mlp_team.TeamSweep.run

    def wrong(self):
        sweep(self)
        self._kept[0][-1].mul_(1.001)

    monkeypatch.setattr(mlp_team.TeamSweep, "run", wrong)
    result = dit_fast.score(run.trajectory(), run.problem(), loss(run), device=teams[0])
    assert result.meta["backend"] != "native" and "does not agree" in result.meta["why"]


def test_scores_that_are_not_finite_name_the_step(teams, monkeypatch):
    run = make_run((5, 4, 3))
    monkeypatch.setattr(mlp_team.TeamSweep, "bad_step", lambda self: 2)
    with pytest.raises(dit_fast.LogError, match="step 2: a score is NaN"):
        score(run, teams[0])
    assert native_team.__doc__
