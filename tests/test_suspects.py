"""Self-influence against one slow score per sample, losses and confidence against an ordinary forward pass."""

import math

import numpy as np
import pytest
import torch
from cases import standard_run
from torch import nn

import dit_fast
from dit_fast import analysis, queries, reference
from dit_fast.suspects import class_logits

WINDOWS = [(0, 7), (2, 5)]


@pytest.fixture(scope="module")
def run():
    return standard_run("mlp", weight_decay=0.02, l2=0.03)


@pytest.fixture(scope="module")
def truth(run):
    """[W, N]: every sample's loss as a query of its own, by the slow twin."""
    x, y = run.case.x, run.case.y
    slow = [
        reference.score(run.trajectory(), run.problem(), queries.losses(x[j : j + 1], y[j : j + 1]), WINDOWS, sample_ids=[j])
        for j in range(len(x))
    ]
    return torch.cat([one.scores[:, 0] for one in slow], 1)


@pytest.mark.parametrize("chunk", [5, 64])
def test_self_influence_is_each_sample_asked_of_itself(run, truth, chunk):
    found = analysis.self_influence(run.trajectory(), run.problem(), WINDOWS, chunk=chunk)
    assert found.scores.shape == (2, 1, 12) and (found.scores[:, 0] - truth).abs().max() < 1e-12
    assert truth.abs().max() > 1e-2 and not found.scores[..., [7, 11]].any()  # never visited
    assert found.queries == ["the sample's own loss"] and found.sample_ids.tolist() == list(range(12))


def test_self_influence_of_some_samples_and_by_retraining(run, truth):
    arguments = (run.trajectory(), run.problem(), WINDOWS)
    some = analysis.self_influence(*arguments, sample_ids=[9, 2], chunk=1)
    assert some.sample_ids.tolist() == [9, 2] and (some.scores[:, 0] - truth[:, [9, 2]]).abs().max() < 1e-12
    true = analysis.self_influence(*arguments, sample_ids=[9, 2], method="retrain")
    query = queries.losses(run.case.x[[2]], run.case.y[[2]])
    slow = reference.leave_one_out(run.trajectory(), run.problem(), query, WINDOWS, sample_ids=[2])
    assert true.retrained.all() and (true.scores[:, 0, 1] - slow.scores[:, 0, 0]).abs().max() < 1e-12


def test_self_influence_refuses(run):
    with pytest.raises(ValueError, match="chunk must be 1 or more"):
        analysis.self_influence(run.trajectory(), run.problem(), chunk=0)
    with pytest.raises(ValueError, match="sample_ids is empty"):
        analysis.self_influence(run.trajectory(), run.problem(), sample_ids=[])
    nothing = dit_fast.Problem(run.case.model(), run.case.loss)
    with pytest.raises(ValueError, match="no data to ask single samples of"):
        analysis.self_influence(run.trajectory(), nothing)


def losses_and_probabilities(run, steps):
    model, losses, probabilities = run.case.model(), 0, 0
    for t in steps:
        model.load_state_dict({name: rows[t] for name, rows in run.params.items()})
        with torch.no_grad():
            z = model(run.case.x)
        losses = losses + run.case.loss(z, run.case.y) / len(steps)
        probabilities = probabilities + z.softmax(1)[torch.arange(12), run.case.y] / len(steps)
    return losses.numpy(), probabilities.numpy()


def test_losses_and_confidence_are_those_of_a_forward_pass(run):
    losses, probabilities = losses_and_probabilities(run, [7])
    np.testing.assert_allclose(analysis.sample_losses(run.trajectory(), run.problem()), losses, rtol=1e-12)
    np.testing.assert_allclose(analysis.confidence(run.trajectory(), run.problem(), 7), probabilities, rtol=1e-12)
    losses, probabilities = losses_and_probabilities(run, [2, 5])
    np.testing.assert_allclose(analysis.sample_losses(run.trajectory(), run.problem(), [5, 2]), losses, rtol=1e-12)
    np.testing.assert_allclose(analysis.confidence(run.trajectory(), run.problem(), [2, 5]), probabilities, rtol=1e-12)


def test_baselines_ask_at_the_ends_of_epochs_and_within_the_last(run):
    trajectory = run.trajectory(marks={"a": 2, "b": 5, "c": 7})
    found = analysis.baselines(trajectory, run.problem())
    assert list(found) == ["loss at the end", "mean loss over epochs", "low confidence, last epoch"]
    np.testing.assert_allclose(found["mean loss over epochs"], losses_and_probabilities(run, [2, 5, 7])[0], rtol=1e-12)
    np.testing.assert_allclose(found["low confidence, last epoch"], 1 - losses_and_probabilities(run, [6, 7])[1], rtol=1e-12)
    assert list(analysis.baselines(run.trajectory(), run.problem())) == ["loss at the end", "low confidence, last epoch"]


def test_baselines_without_classes_leave_confidence_out(run):
    problem = dit_fast.Problem(run.case.model(), lambda z, y: (z - y).square().sum(1), (run.case.x, torch.ones(12, 3)))
    assert list(analysis.baselines(run.trajectory(), problem)) == ["loss at the end"]
    with pytest.raises(ValueError, match=r"output \(12, 3\) and a target \(12, 3\) are no logits"):
        analysis.confidence(run.trajectory(), problem)


def test_class_logits():
    z = torch.tensor([0.5, -2.0])
    for output in (z, z[:, None]):
        assert class_logits(output, torch.tensor([1.0, 0.0])).tolist() == [[0, 0.5], [0, -2]]
    for target in ([0, 3], [-1, 0], [0.5, 1]):
        with pytest.raises(ValueError, match="are no numbers of the model's 3 classes"):
            class_logits(torch.zeros(2, 3), torch.tensor(target))


@pytest.mark.parametrize("steps", [8, -1, []])
def test_steps_outside_the_run_are_refused(run, steps):
    with pytest.raises(ValueError, match=r"must lie in 0\.\.7"):
        analysis.sample_losses(run.trajectory(), run.problem(), steps)
    with pytest.raises(TypeError, match="unknown option 'chunk'"):
        analysis.sample_losses(run.trajectory(), run.problem(), chunk=3)


def test_losses_between_snapshots_are_replayed(run, tmp_path):
    model = run.case.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = []
    with dit_fast.Recorder(tmp_path / "log", model, optimizer, every=4, num_samples=12, reduction="sum") as recorder:
        for ids in run.batches:
            optimizer.zero_grad()
            run.case.loss(model(run.case.x[ids]), run.case.y[ids]).sum().backward()
            with recorder.step(ids):
                optimizer.step()
            with torch.no_grad():
                seen.append(run.case.loss(model(run.case.x), run.case.y).numpy())
    problem = dit_fast.Problem(nn.Sequential(*model), run.case.loss, (run.case.x, run.case.y))
    found = analysis.sample_losses(dit_fast.Trajectory.open(tmp_path / "log"), problem, [2, 6])
    np.testing.assert_allclose(found, (seen[1] + seen[5]) / 2, rtol=1e-9)


def test_linear_datamodeling_score_draws_retrains_and_compares(run):
    query = queries.loss(run.case.x_val, run.case.y_val)
    options = {"num_groups": 8, "removed": 0.25, "seed": 2, "bootstrap": 50}
    found = analysis.linear_datamodeling_score(run.trajectory(), run.problem(), query, WINDOWS, **options)
    groups = analysis.draw_groups(12, 8, 0.25, seed=2)
    truth = reference.leave_one_out(run.trajectory(), run.problem(), query, WINDOWS, groups=groups).scores[:, 0]
    scores = reference.score(run.trajectory(), run.problem(), query, WINDOWS).scores[:, 0]
    sums = torch.stack([scores[:, group].sum(1) for group in groups], 1)
    for w in range(2):
        a, b = (values.argsort().argsort().double() for values in (sums[w], truth[w]))
        assert found.values[w] == pytest.approx(1 - 6 * float((a - b).square().sum()) / (8 * 63))
    assert found.values.min() > 0.5 and not math.isnan(found.interval.sum())
    wrong = dit_fast.score(run.trajectory(), run.problem(), query, WINDOWS)
    wrong = dit_fast.Influence(-wrong.scores, wrong.windows, wrong.queries, wrong.sample_ids)
    turned = analysis.linear_datamodeling_score(run.trajectory(), run.problem(), query, WINDOWS, scores=wrong, **options)
    np.testing.assert_allclose(turned.values, -found.values)
