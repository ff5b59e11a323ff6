"""The scripts of bench/paper run on a few digits, their rivals agree with literal twins, their tables with their figures."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.paper import (  # noqa: E402
    cleaning,
    correlation,
    datasets,
    detection,
    figures,
    nets,
    rates,
    rivals,
    runs,
    stages,
    tables,
    verdicts,
)  # fmt: skip

RESULTS = {"rates": rates, "correlation": correlation, "stages": stages, "detection": detection, "cleaning": cleaning}


@pytest.fixture(scope="module", params=["logreg", "mlp-gelu"])
def run(request):
    split = datasets.load("digits", seed=0, num_train=96, num_val=32)
    with runs.logged(split, request.param, rate=0.3, seed=0, epochs=2) as logged:
        yield logged


def as_float64(run, t):
    return {name: value.double() for name, value in run.trajectory.params(t).items()}


def gradients(run, params, x, y):
    """The model in float64 at these parameters, and ∇ℓ of each row, one backward each [n, P]."""
    run.model.load_state_dict(params)
    rows = []
    for sample, label in zip(x.double(), y.double(), strict=True):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(run.model(sample[None])[0, 0], label)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(run.model.parameters()))]))
    return torch.stack(rows)


@pytest.fixture
def in_float64(run):
    run.model.double()
    yield run
    run.model.float()


def test_the_influence_function_solves_the_dense_system(in_float64):
    run, damping = in_float64, 0.01
    params = as_float64(run, run.trajectory.num_steps)
    of_samples = gradients(run, params, run.split.x, run.split.y)
    query = gradients(run, params, run.split.x_val, run.split.y_val).mean(0)
    # Σ (p(1−p)/N) ∇z ∇zᵀ, with ∇ℓ = (p − y) ∇z
    p = torch.sigmoid(run.model(run.split.x.double()).squeeze(1)).detach()
    outputs = of_samples / (p - run.split.y)[:, None]
    dense = torch.einsum("n,np,nq->pq", p * (1 - p) / len(p), outputs, outputs)
    expected = of_samples @ torch.linalg.solve(dense + damping * torch.eye(len(dense), dtype=torch.float64), query) / len(p)
    found = rivals.influence_function(run, damping)
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
    assert (rivals.influence_function(run, 2 * damping) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_the_matrix_is_the_hessian_for_logistic_regression():
    x, y = torch.randn(20, 3, dtype=torch.float64), (torch.arange(20) % 2).double()
    weights = torch.randn(3, dtype=torch.float64)

    def loss(w):
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y)

    p = torch.sigmoid(x @ weights)
    gauss_newton = torch.einsum("n,np,nq->pq", p * (1 - p) / 20, x, x)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, weights), gauss_newton)


def test_tracin_is_the_sum_over_epoch_ends_in_the_window(in_float64):
    run = in_float64
    ends = run.epochs[1:]
    windows = {"first": (0, ends[0]), "second": (ends[0], ends[1]), "whole": (0, ends[1])}
    expected = []
    for end in ends:
        params = as_float64(run, end)
        query = gradients(run, params, run.split.x_val, run.split.y_val).mean(0)
        expected.append(0.3 / 64 * gradients(run, params, run.split.x, run.split.y) @ query)
    found = rivals.tracin(run, windows)
    for row, twin in zip(found, [*expected, expected[0] + expected[1]], strict=True):
        assert (row - twin).abs().max() < 1e-5 * twin.abs().max()  # the log is in float32
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * expected[0].abs().max()


def test_queries_at_the_end_of_the_run_differ_in_early_windows_alone(run):
    windows = {"early": (0, run.epochs[1]), "whole": (0, run.epochs[-1])}
    exact, official = rivals.exact(run, windows), rivals.official(run, windows)
    torch.testing.assert_close(exact[1], official[1], rtol=1e-5, atol=1e-9)
    assert (exact[0] - official[0]).abs().max() > 1e-3 * exact[0].abs().max()


def test_correlation():
    rows = correlation.measure("digits", "logreg", 0, rate=0.3, samples=32, epochs=3)
    assert len(rows) == 7 * (3 + len(rivals.DAMPING))
    exact = {row["window"]: row["pearson"] for row in rows if row["method"] == "DIT, exact"}
    assert min(exact.values()) > 0.8
    text = correlation.report(rows)["Pearson correlation with retraining"]
    assert f"| DIT, exact | {exact['first third']:.2f} ± 0.00 |" in text


def test_stages():
    row = stages.measure("digits", "mlp", 0, rate=0.3, samples=32, epochs=3)
    assert sum(row["patterns"].values()) == pytest.approx(1)
    assert {key for key, value in row.items() if isinstance(value, dict)} == {
        *stages.KINDS,
        "spearman of retraining",
        "patterns",
    }
    assert all(-1 <= value <= 1 for kind in stages.KINDS for value in row[kind].values())
    assert len(stages.report([row])) == 5


def test_detection():
    rows = detection.measure("digits", "cnn", 3, 0.25, 0, rate=0.3, samples=64)
    by_name = {row["ranking"]: row for row in rows}
    assert set(detection.SHOWN) <= set(by_name)
    assert by_name["random (expected)"]["found at 1×"] == pytest.approx(0.25)
    assert by_name["DIT, whole run"]["auc"] > 0.7
    assert by_name["DIT, best window"]["found at 1×"] >= by_name["DIT, last third"]["found at 1×"]
    assert len(detection.report(rows)) == 5


def test_cleaning_accuracy_is_that_of_a_loop_without_the_dropped():
    rows = {row["dropped"]: row for row in cleaning.measure("digits", "mlp", 0.25, 0, rate=0.3, samples=64, epochs=8)}
    assert rows["true flips"]["flipped among them"] == 1
    split, flipped = datasets.load("digits", 0, 64, 64).with_flips(0.25, 0)
    for name, kept in {"nothing": torch.ones(64), "true flips": 1.0 - flipped.float()}.items():
        model = nets.build("mlp", split.x.shape[1:], 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for (ids,) in runs.batches_of(64, 0, 8):
            optimizer.zero_grad()
            (kept[ids] * nets.bce(model(split.x[ids]), split.y[ids])).sum().div(len(ids)).backward()
            optimizer.step()
        assert rows[name]["accuracy"] == pytest.approx(float(nets.accuracy(model, split.x_test, split.y_test)))
    assert rows["true flips"]["accuracy"] != rows["nothing"]["accuracy"]


def test_the_rate_is_the_smallest_within_five_points():
    assert rates.choose({0.01: 0.80, 0.03: 0.951, 0.1: 0.99, 0.3: 1.0, 1.0: 0.5}) == 0.03
    with pytest.raises(ValueError, match=r"run python -m bench\.paper\.rates"):
        runs.chosen_rate("digits", "mlp", 5)


def test_spread():
    assert tables.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert tables.spread([1.0, float("nan"), 3.0]) == "2.00 ± 1.41 (2 of 3)"
    assert tables.spread([None]) == "–"
    assert tables.percent([0.5, 0.75], 1) == "62.5 ± 17.7"


@pytest.mark.parametrize("name", RESULTS)
def test_the_tables_say_what_the_figures_say(name):
    folder = ROOT / "bench" / "paper"
    record = tables.read(name)
    text = tables.section(record, RESULTS[name].report(record["rows"]))
    assert (folder / "results" / f"{name}.md").read_text("utf-8") == text
    assert f"<!-- {name} -->\n\n{text}\n<!-- /{name} -->" in (folder / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", verdicts.PARTS)
def test_the_sentences_say_what_the_figures_say(name):
    text = " ".join((ROOT / "bench" / "paper" / "README.md").read_text("utf-8").replace("**", "").split())
    assert [phrase for phrase in verdicts.phrases(name) if phrase not in text] == []


def test_sentences_follow_the_figures():
    rows = [
        {"data": "d", "net": net, "seed": 0, "method": method, "window": window, "pearson": value}
        for net in ("logreg", "mlp-gelu")
        for window in correlation.SHOWN
        for method, value in {**dict.fromkeys(correlation.METHODS, 0.5), "DIT, exact": 0.4 if net == "logreg" else 0.9}.items()
    ]
    said = verdicts.claim_1(rows)
    assert "in 4 of the 8 cases" in said[0] and "reaches .90" in said[1] and "is .15 over" in said[2]
    assert (verdicts.short(-0.134), verdicts.short(-0.001), verdicts.short(1.25, 1)) == ("−.13", ".00", "1.2")


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_show_a_point_for_every_case(name):
    make, results = figures.FIGURES[name]
    points = [line for line in make(tables.read(results)["rows"]).axes[0].lines if line.get_marker() == "o"]
    expected = {"claim-1": [14 * 4] * 4, "claim-2": [14 * 5, 12 * 5], "claim-3": [36] * 2}[name]
    assert [len(line.get_xdata()) for line in points] == expected
    assert all(np.isfinite(np.asarray([*line.get_xdata(), *line.get_ydata()], dtype=float)).all() for line in points)
    path = ROOT / "bench" / "paper" / "results" / f"{name}.png"
    assert path.stat().st_size < 60_000
    assert f"](results/{name}.png)" in (ROOT / "bench" / "paper" / "README.md").read_text("utf-8")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "shape", "file"),
    [
        ("adult", (108,), "adult-training.csv.gz"),
        ("news", (1000,), "20news_ibm_mac.json.gz"),
        ("mnist", (1, 28, 28), "mnist.npz"),
        ("emnist", (1, 28, 28), "emnist_letters_ab.npz"),
        ("cifar", (3, 32, 32), "cifar10_plane_car_extra.npz"),
    ],
)
def test_real_data(name, shape, file, monkeypatch):
    monkeypatch.setattr(datasets, "FOLDER", data_file(file).parent)
    split = datasets.load(name, 0, 500, 256)
    assert split.x.shape == (500, *shape)
    assert split.x_val.shape == (256, *shape)
    assert 0.1 < float(split.y.mean()) < 0.9
    known = {row.numpy().tobytes() for row in split.x}
    assert len(known) > 480
    assert np.mean([row.numpy().tobytes() in known for row in split.x_val]) < 0.05
