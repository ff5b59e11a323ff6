"""clean(): the altered run against an ordinary training loop, and accuracy on flipped labels."""

import math

import numpy as np
import pytest
import torch
from cases import make_case, schedule, standard_run, train
from torch import nn

import dit_fast
from dit_fast import analysis, cleaning

# by standard_run: 7 and 11 are never visited
RANKING = np.array([0.0, 5, 1, 1, 4, 0, 0, 3, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def run():
    return standard_run("mlp", weight_decay=0.02, l2=0.03)


def probe(model):
    return sum((i + 1) * p.double().sin().sum() for i, p in enumerate(model.parameters()))


def measured(model):
    with torch.no_grad():
        return float(probe(model))


def ended(run):
    """`probe` of the run's last parameters."""
    model = run.case.model()
    model.load_state_dict({name: rows[-1] for name, rows in run.params.items()})
    return measured(model)


def again(run, case=None, batches=None, coefficients=None):
    case, batches = case or run.case, batches or run.batches
    return train(case, batches, coefficients or run.coefficients, run.lr, weight_decay=run.weight_decay, l2=run.l2)


def clean(run, fraction=0.25, **options):
    options = {"evaluate": probe, "seeds": [0]} | options
    return analysis.clean(run.trajectory(), run.problem(), RANKING, fraction=fraction, **options)


def without(run, suspects, rescaled):
    changed = []
    for ids, a in zip(run.batches, run.coefficients, strict=True):
        kept = a * torch.tensor([float(j not in suspects) for j in ids.tolist()], dtype=a.dtype)
        changed.append(kept * (a.sum() / kept.sum() if rescaled and kept.sum() else 1))
    return again(run, coefficients=changed)


@pytest.mark.parametrize("coefficients", ["keep", "rescale"])
def test_dropping_is_a_run_without_the_suspects(run, coefficients):
    result = clean(run, coefficients=coefficients)
    assert result.suspects.tolist() == [1, 4, 7] and result.num_never_visited == 1
    assert result.before.tolist() == pytest.approx([ended(run)], abs=1e-12)
    after = ended(without(run, [1, 4, 7], coefficients == "rescale"))
    other = ended(without(run, [1, 4, 7], coefficients != "rescale"))
    assert result.after.tolist() == pytest.approx([after], abs=1e-12) and abs(after - other) > 1e-3
    assert abs(after - ended(run)) > 1e-3


def test_keeping_coefficients_is_what_leave_one_out_does(run):
    query = dit_fast.queries.custom(probe)
    truth = dit_fast.leave_one_out(run.trajectory(), run.problem(), query, groups=[[1, 4, 7]])
    assert clean(run, coefficients="keep").gain[0] == pytest.approx(float(truth.scores), abs=1e-12)


def test_equal_values_are_taken_in_the_order_of_samples(run):
    assert clean(run, fraction=4 / 12).suspects.tolist() == [1, 4, 7, 2]


@pytest.mark.parametrize("as_mapping", [True, False])
def test_relabelling_is_a_run_with_other_labels(run, as_mapping):
    labels = (run.case.y + 1) % 3
    changed = make_case("mlp")
    changed.y[[1, 4, 7]] = labels[[1, 4, 7]]
    result = clean(run, how="relabel", labels={j: labels[j] for j in (1, 4, 7)} if as_mapping else labels)
    assert result.after.tolist() == pytest.approx([ended(again(run, changed))], abs=1e-12)
    assert abs(result.gain[0]) > 1e-3


def test_relabelling_by_the_prediction(run):
    model = run.case.model()
    model.load_state_dict({name: rows[-1] for name, rows in run.params.items()})
    predicted = model(run.case.x).argmax(1)
    assert (predicted != run.case.y)[[1, 4, 7]].any()
    result, named = clean(run, how="relabel", labels="predicted"), clean(run, how="relabel", labels=predicted)
    assert result.after.tolist() == named.after.tolist()


def test_another_seed_is_another_start_and_other_samples_by_the_same_schedule(run):
    def fill(model):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.randn(p.shape, dtype=p.dtype) / (i + 2))

    result = clean(run, seeds=[3], initialize=fill)
    exchange = cleaning._exchange(12, torch.cat(run.batches).unique(), 3)
    case = make_case("mlp")

    def start():
        torch.manual_seed(3)
        model = make_case("mlp").model()
        torch.manual_seed(3)
        fill(model)
        return model

    case.model = start
    literal = again(run, case, batches=[exchange[ids] for ids in run.batches])
    assert result.before.tolist() == pytest.approx([ended(literal)], abs=1e-12)
    assert result.after.tolist() == pytest.approx([ended(without(literal, [1, 4, 7], True))], abs=1e-12)


def test_the_exchange_keeps_the_never_visited_out():
    visited = torch.tensor([0, 2, 3, 5, 8])
    exchange = cleaning._exchange(9, visited, 1)
    assert sorted(exchange[visited].tolist()) == visited.tolist() and exchange.tolist() != list(range(9))
    assert exchange[[1, 4, 6, 7]].tolist() == [1, 4, 6, 7]
    assert exchange.tolist() == cleaning._exchange(9, visited, 1).tolist() != cleaning._exchange(9, visited, 2).tolist()


def test_new_seeds_draw_the_modules_own_initialisation(run):
    a, b = clean(run, seeds=[1, 2]), clean(run, seeds=[2])
    assert a.before[1] == b.before[0] and a.after[1] == b.after[0] and a.before[0] != a.before[1]
    assert a.spread[0] == pytest.approx(abs(a.before[0] - a.before[1]) / math.sqrt(2)) and math.isnan(b.spread[2])
    assert a.mean[2] == pytest.approx(float((a.after - a.before).mean()))


def test_a_parameter_that_no_module_draws_needs_initialize():
    run = standard_run("transformer")
    with pytest.raises(ValueError, match="no module draws parameter 'position' anew"):
        analysis.clean(run.trajectory(), run.problem(), RANKING, evaluate=probe, seeds=[1])
    assert math.isfinite(analysis.clean(run.trajectory(), run.problem(), RANKING, evaluate=probe, seeds=[0]).after[0])


def test_adam_with_clipping_and_micro_batches(run, tmp_path):
    batches, _, _ = schedule(12)

    def fit(recorder_path=None, left_out=(), batches=batches):
        model = run.case.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
        recorder = recorder_path and dit_fast.Recorder(recorder_path, model, optimizer, num_samples=12, clip_norm=0.5, every=3)
        for ids in batches:
            optimizer.zero_grad()
            halves = [half for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :]) if len(half)]
            kept = sum(j not in left_out for j in ids.tolist())
            for half in halves:
                weight = torch.tensor([float(j not in left_out) for j in half.tolist()], dtype=torch.float64) / max(kept, 1)
                (weight * run.case.loss(model(run.case.x[half]), run.case.y[half])).sum().backward()
                if recorder:
                    recorder.batch(half, scale=len(half) / len(ids))
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        if recorder:
            recorder.close()
        return measured(model)

    before = fit(tmp_path / "log")
    result = analysis.clean(
        dit_fast.Trajectory.open(tmp_path / "log"), run.problem(l2=0.0), RANKING, evaluate=probe, fraction=0.25, seeds=[0]
    )
    assert result.before[0] == pytest.approx(before, abs=1e-9)
    assert result.after[0] == pytest.approx(fit(left_out=[1, 4, 7]), abs=1e-9) and abs(result.gain[0]) > 1e-2

    def start(model):
        model.load_state_dict(run.case.model().state_dict())

    exchange = cleaning._exchange(12, torch.cat(batches).unique(), 2)
    trajectory = dit_fast.Trajectory.open(tmp_path / "log")
    options = {"evaluate": probe, "fraction": 0.25, "seeds": [2], "initialize": start}
    other = analysis.clean(trajectory, run.problem(l2=0.0), RANKING, **options)
    assert other.before[0] == pytest.approx(fit(batches=[exchange[ids] for ids in batches]), abs=1e-9)


def test_nothing_outside_is_changed(run):
    problem = run.problem()
    problem.model.train()
    values = {name: p.clone() for name, p in problem.model.named_parameters()}
    y, state = run.case.y.clone(), torch.get_rng_state()
    analysis.clean(run.trajectory(), problem, RANKING, evaluate=probe, seeds=[0, 1], how="relabel", labels=(y + 1) % 3)
    assert all(torch.equal(p, values[name]) and p.grad is None for name, p in problem.model.named_parameters())
    assert problem.model.training and torch.equal(run.case.y, y) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "delete"}, "how='delete' is not one of 'drop', 'relabel'"),
        ({"how": "relabel"}, "how='relabel' needs labels="),
        ({"labels": [0] * 12}, "how='drop' takes none"),
        ({"how": "relabel", "labels": "true"}, "or 'predicted'"),
        ({"how": "relabel", "labels": [0, 1]}, r"labels must be \[N\]"),
        ({"how": "relabel", "labels": {1: 0}}, r"none for suspect 4 \(2 of 3 are missing\)"),
        ({"how": "relabel", "labels": torch.zeros(12, 2)}, r"labels of shape \(2,\) for targets of \(\) each"),
        ({"fraction": 0.01}, "nothing to clean"),
        ({"fraction": 1.0}, "between 0 and 1, got 1.0"),
        ({"seeds": []}, "seeds must be different numbers"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"coefficients": "mean"}, "coefficients='mean' is not one of"),
    ],
)
def test_clean_refuses(run, options, message):
    with pytest.raises(ValueError, match=message):
        clean(run, **options)


def test_clean_refuses_rankings_and_measures(run):
    arguments = (run.trajectory(), run.problem())
    with pytest.raises(ValueError, match="ranking has 3 values, the data 12 samples"):
        analysis.clean(*arguments, [1, 2, 3], evaluate=probe)
    with pytest.raises(ValueError, match="NaN for 1 sample, the one at place 2 first"):
        analysis.clean(*arguments, np.where(np.arange(12) == 2, np.nan, 0), evaluate=probe)
    with pytest.raises(TypeError, match=r"evaluate must be \(x, y\)"):
        analysis.clean(*arguments, RANKING, evaluate=None)
    with pytest.raises(ValueError, match="the problem does not"):
        analysis.clean(run.trajectory(), run.problem(l2=0.5), RANKING, evaluate=probe)


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    """A small net on digits with a fifth of the labels flipped, logged: (trajectory, problem, flipped [N], x_val, y_val, y)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, true = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    generator = torch.Generator().manual_seed(0)
    is_flipped = torch.zeros(300, dtype=torch.bool)
    is_flipped[torch.randperm(300, generator=generator)[:60]] = True
    y = torch.where(is_flipped, (true[:300] + torch.randint(1, 10, (300,), generator=generator)) % 10, true[:300])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.8)
    path = tmp_path_factory.mktemp("cleaning") / "log"
    with dit_fast.Recorder(path, model, optimizer, num_samples=300) as recorder:
        for _ in range(10):
            for ids in torch.randperm(300, generator=generator).split(30):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
                with recorder.step(ids):
                    optimizer.step()
    problem = dit_fast.Problem(model, nn.CrossEntropyLoss(reduction="none"), (x[:300], y))
    return dit_fast.Trajectory.open(path), problem, is_flipped.numpy(), x[300:], true[300:], true[:300]


def test_cleaning_flipped_labels_raises_accuracy_and_cleaning_good_ones_does_not(flipped):
    trajectory, problem, is_flipped, x_val, y_val, true = flipped
    options = {"evaluate": (x_val, y_val), "fraction": 0.2, "seeds": (0, 1, 2)}
    dropped = analysis.clean(trajectory, problem, is_flipped.astype(float), **options)
    relabelled = analysis.clean(trajectory, problem, is_flipped.astype(float), how="relabel", labels=true, **options)
    control = analysis.clean(trajectory, problem, 1 - is_flipped.astype(float), **options)
    assert sorted(dropped.suspects.tolist()) == np.flatnonzero(is_flipped).tolist()
    assert (dropped.gain > 0.02).all() and (relabelled.gain > 0.02).all()
    assert control.mean[2] < 0 < dropped.mean[2] - dropped.spread[2]
    model = problem.model  # at the run's end
    with torch.no_grad():
        accuracy = float((model(x_val).argmax(1) == y_val).float().mean())
    assert dropped.before[0] == pytest.approx(accuracy, abs=2 / len(y_val))
    lines = repr(dropped).splitlines()
    assert lines[0] == "Cleaning: 60 of 300 samples dropped, 3 runs" and lines[3].startswith("  accuracy gain   +0.")


def test_suspects_found_by_the_run_itself_are_worth_cleaning(flipped):
    trajectory, problem, is_flipped, x_val, y_val, _ = flipped
    rankings = analysis.baselines(trajectory, problem)
    assert analysis.detection_auc(rankings["loss at the end"], is_flipped) > 0.8
    result = analysis.clean(
        trajectory, problem, rankings["loss at the end"], evaluate=(x_val, y_val), fraction=0.2, seeds=(0, 1)
    )
    assert result.mean[2] > 0.01
