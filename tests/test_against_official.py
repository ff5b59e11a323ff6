"""Against a run of the official research code: UCI Adult, logistic regression, 256 samples, 84 steps (tests/data)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import relative_error
from torch import nn

import dit_fast

DATA = Path(__file__).parent / "data" / "adult_logreg.npz"


def bce(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), target, reduction="none")


@pytest.fixture(scope="module")
def adult() -> dict:
    with np.load(DATA) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def run(adult):
    params = {key.removeprefix("param:model."): value for key, value in adult.items() if key.startswith("param:")}
    trajectory = dit_fast.Trajectory.from_arrays(params=params, batch_ids=adult["batch_ids"], lr=adult["lr"], num_samples=256)
    problem = dit_fast.Problem(nn.Linear(62, 1), bce, (adult["x_train"], adult["y_train"]), l2=float(adult["alpha"]))
    query = dit_fast.queries.loss(torch.from_numpy(adult["x_val"]), torch.from_numpy(adult["y_val"]))
    return trajectory, problem, query


WINDOWS = {f"to epoch {e}": (0, 4 * e) for e in range(1, 22)}


def test_every_endpoint_matches_the_official_scores(run, adult):
    result = dit_fast.score(*run, WINDOWS, query_at="final")
    assert result.meta["dtype"] == "float32"
    official = torch.from_numpy(adult["dit_endpoint_scores"][1:])
    assert not adult["dit_endpoint_scores"][0].any()
    assert relative_error(result.scores[:, 0], official) < 1e-5


def test_the_official_scores_are_not_matched_without_curvature_or_with_the_endpoint_query(run, adult):
    official = torch.from_numpy(adult["dit_endpoint_scores"][1:])
    for options in ({"hessian": "none", "query_at": "final"}, {"query_at": "endpoint"}):
        assert relative_error(dit_fast.score(*run, WINDOWS, **options).scores[:, 0], official) > 1e-2


def test_correlation_with_true_retraining_per_window(run, adult):
    spans = [(0, 5), (5, 10), (10, 21), (20, 21), (0, 21)]
    result = dit_fast.score(*run, [(4 * a, 4 * b) for a, b in spans])
    truth = adult["loo_endpoint_loss_change"]
    for i, (a, b) in enumerate(spans):
        pearson = np.corrcoef(result.scores[i, 0], truth[b] - truth[a])[0, 1]
        print(f"epochs {a}-{b}: Pearson with retraining {pearson:.4f}")
        assert pearson > 0.99


def test_leave_one_out_matches_the_official_retraining(run, adult):
    result = dit_fast.leave_one_out(*run, WINDOWS, dtype=torch.float64)
    truth = torch.from_numpy(adult["loo_endpoint_loss_change"][1:])
    # the official losses were subtracted in float32
    assert relative_error(result.scores[:, 0], truth) < 5e-3


def test_refine_puts_true_values_where_it_says(run):
    result = dit_fast.score(*run, [(0, 40), (40, 84)], refine=5)
    truth = dit_fast.leave_one_out(*run, [(0, 40), (40, 84)])
    plain = dit_fast.score(*run, [(0, 40), (40, 84)])
    assert result.retrained.sum(-1).tolist() == [[5], [5]]
    assert torch.equal(result.retrained, plain.largest(5))
    torch.testing.assert_close(result.scores[result.retrained], truth.scores[result.retrained], rtol=1e-6, atol=1e-12)
    assert torch.equal(result.scores[~result.retrained], plain.scores[~result.retrained])
