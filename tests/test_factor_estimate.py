"""What scores by logged factors and their logs will cost, against hand counts and what is then done."""

import pytest
import torch
from factor_cases import factor_run, ready_gradients, with_factors
from safetensors.torch import load_file
from test_record_factors import each_loss, made, record

import dit_fast as dit

# 5-6-4-3: products of one sample's rows with one block of weights
WEIGHTS = 5 * 6 + 6 * 4 + 4 * 3


def test_flops_and_memory_of_a_plain_sweep_by_hand(tmp_path):
    model, x, y = made("mlp")
    trajectory = record(tmp_path / "log", model, x, y)
    query = dit.queries.gradients({t: torch.randn(2, 79, generator=torch.Generator().manual_seed(t)) for t in (2, 4)})
    found = dit.estimate_score(trajectory, query=query, windows=[(0, 4), (2, 4)], hessian="none")
    scored = dit.score(trajectory, query=query, windows=[(0, 4), (2, 4)], hessian="none")
    assert (found.columns, found.sweeps, found.backend, found.form) == (4, 1, "factors", "fused")
    assert (scored.meta["columns"], scored.meta["sweeps"], scored.meta["form"]) == (4, 1, "fused")
    # five samples a step, two queries, both windows or both of their ends to go through
    one = 5 * 2 * WEIGHTS
    assert found.sweep_flops == 2 * (4 + 4) * one
    assert found.replay_flops == 3 * one  # the check's steps
    assert (found.forward_flops, found.query_flops) == (0, 0)
    N, factors = trajectory.num_samples, 5 * 8 * ((5 + 6) + (6 + 4) + (4 + 3))
    assert found.memory_bytes == 4 * (79 * 8 + 8 * N) + 8 * 4 * N + 2 * factors
    assert found.read_bytes == 2 * sum(file.stat().st_size for file in (tmp_path / "log").glob("chunk-*"))
    assert (found.retraining, found.retraining_refused) == (None, "retraining needs a problem")
    assert "4 columns, 1 sweeps, factors (fused)" in repr(found)
    unchecked = dit.estimate_score(trajectory, query=query, windows=(0, 4), hessian="fisher", check=False)
    assert (unchecked.sweep_flops, unchecked.replay_flops) == (2 * 2 * 4 * one, 0)


@pytest.mark.parametrize("budget", [None, 2_000_000])
def test_the_form_is_that_of_the_score(budget):
    run = factor_run("mlp")
    query = ready_gradients(run, (7,), rows=4)
    arguments = {"query": query, "hessian": "fisher", "memory_budget": budget}
    found, scored = (f(with_factors(run), **arguments) for f in (dit.estimate_score, dit.score))
    assert (found.form, found.columns, found.sweeps) == tuple(scored.meta[k] for k in ("form", "columns", "sweeps"))


def test_small_budgets_take_more_sweeps():
    run = factor_run("mlp")
    options = {"query": ready_gradients(run, (7,), rows=4), "hessian": "none", "memory_budget": 10_000}
    found, scored = (f(with_factors(run), **options) for f in (dit.estimate_score, dit.score))
    assert found.sweeps == scored.meta["sweeps"] > 1
    assert found.columns == scored.meta["columns"] == 4


def test_with_a_problem_its_query_and_retraining_are_counted():
    run = factor_run("mlp")
    query = dit.queries.loss(run.case.x_val, run.case.y_val)
    options = {"hessian": "fisher", "check": False}
    alone = dit.estimate_score(with_factors(run), query=ready_gradients(run, (7,), rows=1), **options)
    both = dit.estimate_score(with_factors(run), run.problem(), query, backend="factors", **options)
    generic = dit.estimate_score(with_factors(run), run.problem(), query, backend="generic", **options)
    assert (both.sweep_flops, both.form) == (alone.sweep_flops, alone.form)
    assert both.query_flops == generic.query_flops > 0
    assert both.forward_flops == generic.forward_flops > 0
    assert both.retraining == generic.retraining
    assert generic.form is None
    scored = dit.score(with_factors(run), run.problem(), query, method="auto", backend="factors", **options)
    assert scored.meta["why_method"].startswith("adjoint takes")
    assert scored.meta["factors"] == "logged"


def test_what_cannot_be_estimated_is_said():
    run = factor_run("mlp")
    with pytest.raises(ValueError, match="the log holds no factors"):
        dit.estimate_score(run.trajectory(), hessian="fisher")
    with pytest.raises(ValueError, match="backend='native' needs a problem"):
        dit.estimate_score(with_factors(run), hessian="fisher", backend="native")
    with pytest.raises(ValueError, match="hessian='exact' needs the problem"):
        dit.estimate_score(with_factors(run))


FORMS = [
    ("mlp", {}),
    ("cnn", {"dtype": "bfloat16"}),
    ("net", {"curvature": "ggn", "per_sample_loss": each_loss}),
    ("net", {"project": 3}),
    ("net", {"curvature": "sampled ggn", "per_sample_loss": each_loss, "layers": ["embed", "head", "norm"]}),
]


@pytest.mark.parametrize(("name", "options"), FORMS)
@pytest.mark.parametrize("every", [1, 64])
def test_the_log_is_as_large_as_was_said(tmp_path, name, options, every):
    model, x, y = made(name)
    factors, before = dit.FactorOptions(**options), torch.random.get_rng_state()
    model.train()
    found = dit.estimate_log(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        steps=40,
        batch_size=5,
        every=every,
        factors=factors,
        batch=(x[:3], y),
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    record(tmp_path / "log", model, x, y, steps=40, factors=factors, every=every, with_batch="curvature" in options)
    stored = [tensor for file in (tmp_path / "log").glob("chunk-*") for n, tensor in load_file(file).items() if "factor" in n]
    assert 40 * found.factor_bytes_per_step == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "log").iterdir())
    # the manifest and the heads of files name the factors as well
    assert on_disk - 6000 < found.disk_bytes < on_disk
    without = dit.estimate_log(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=40, batch_size=5, every=every)
    assert found.disk_bytes - without.disk_bytes == pytest.approx(40 * found.factor_bytes_per_step, abs=1)
    assert "of factors)" in repr(found)
    assert "factors" not in repr(without)


def test_bytes_of_a_wide_layer_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(784, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"steps": 1000, "batch_size": 128, "every": 512, "batch": (torch.randn(2, 784), torch.zeros(2))}
    found = dit.estimate_log(model, optimizer, factors=True, **arguments)
    # inputs and output gradients of both layers; two dimensions of shapes more than [B, S, I] and [B, R, S, O] have each
    assert found.factor_bytes_per_step == 4 * 128 * (784 + 1024 + 1024 + 10) + 8 * 2 * (3 + 4)
    # a chunk ends where factors fill 64 MiB
    assert found.steps_per_chunk == -(-(64 << 20) // int(found.factor_bytes_per_step))
    half = dit.estimate_log(model, optimizer, factors=dit.FactorOptions(dtype="bfloat16"), **arguments)
    assert half.factor_bytes_per_step - 8 * 14 == (found.factor_bytes_per_step - 8 * 14) / 2


def test_factors_need_a_batch():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"give one batch, estimate_log\(..., batch=\(x, y\)\)"):
        dit.estimate_log(model, optimizer, steps=4, batch_size=2, factors=True)
