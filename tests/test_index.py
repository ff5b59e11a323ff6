"""The index: the same scores as the sweep's, forward and backward, and when it is refused."""

import pytest
import torch
from cases import relative_error
from factor_cases import factor_run, random_projections, ready_gradients, with_factors
from test_factor_optimizers import logged
from test_record_factors import made, record

import dit_fast
from dit_fast import index
from dit_fast.logged import score_logged

WINDOWS = [(0, 7), (2, 5), (5, 6)]
ENDS = (2, 5, 6, 7)


def compare(trajectory, query, windows, **options):
    made = trajectory.index(windows, **options)
    found = made.score(query)
    swept = score_logged(trajectory, None, query, windows, **({"hessian": "fisher"} | options))
    assert relative_error(found.scores, swept.scores, swept.scores[0].abs().amax(-1)) < 1e-11
    return made


@pytest.mark.parametrize("hessian", ["fisher", "ggn", "none"])
@pytest.mark.parametrize("net", ["mlp", "cnn", "tokens"])
def test_index_is_the_sweep(net, hessian):
    run = factor_run(
        net, l2=0.03 if net == "tokens" else 0.0, weight_decay=0.02, micro_batches=[[2, 2], *[[n] for n in (3, 5, 1, 4, 2, 6)]]
    )
    made = compare(with_factors(run, "ggn"), ready_gradients(run, ENDS), WINDOWS, hessian=hessian)
    assert made.meta["index"] == "forward"
    assert sorted(made.changes) == list(ENDS)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("dampening and decay", "forward"),
        ("nesterov", "forward"),
        ("maximize", "forward"),
        ("skipped parameter", "forward"),
        ("momentum in one group", "forward"),
        ("adamw", "backward: AdamW is not linear"),
        ("clip by norm", "backward: clipping is not"),
    ],
)
def test_index_follows_the_optimizer(name, way, tmp_path):
    _, run, trajectory = logged(name, tmp_path / "log")
    made = compare(trajectory, ready_gradients(run, (3, 8)), [(0, 8), (3, 8)])
    assert made.meta["index"].startswith(way)


def test_few_numbers_are_swept_backward():
    run = factor_run("mlp", weight_decay=0.02)
    trajectory = with_factors(
        run, projections=random_projections(run, {"0.weight": (1, 2), "2.weight": (1, 1), "4.weight": (1, 2)})
    )
    query = ready_gradients(run, ENDS)
    made = compare(trajectory, query, (0, 7))
    assert made.meta["index"].startswith("backward: 56 columns and steps against 84")
    assert made.num_bytes == 12 * 8 * 8


def test_other_queries_windows_and_samples():
    run = factor_run("mlp")
    trajectory = with_factors(run, marked=ready_gradients(run, (5, 7)), marks={"early": 5, "late": 7})
    made = trajectory.index("epochs")
    assert repr(made) == "Index(2 steps, 12 samples, 79 numbers each: 14.8 KiB)"
    found = made.score()
    assert [window.name for window in found.windows] == ["early", "late"]
    assert found.meta["method"] == "index"
    part = made.score(windows=(5, 7), sample_ids=[4, 2])
    assert part.sample_ids.tolist() == [4, 2]
    assert relative_error(part.scores, found.scores[1:, :, [4, 2]]) < 1e-12
    problem = made.score(dit_fast.queries.losses(run.case.x_val[:2], run.case.y_val[:2]), problem=run.problem())
    assert relative_error(problem.scores, found.scores) < 1e-12
    with pytest.raises(ValueError, match=r"the index has no step 6, an end of a window; it has \[5, 7\]"):
        made.score(windows=(5, 6))


def test_results_do_not_depend_on_the_memory():
    run = factor_run("mlp")
    trajectory, query = with_factors(run), ready_gradients(run, (7,))
    whole, pieces = trajectory.index(), trajectory.index(memory_budget=17_000)
    assert relative_error(pieces.score(query).scores, whole.score(query).scores) < 1e-12


def test_an_index_larger_than_its_log_is_refused(tmp_path, monkeypatch):
    model, x, y = made("mlp")
    trajectory = record(tmp_path / "log", model, x, y)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "log").glob("chunk-*"))
    # 79 numbers of float64 for every sample, at both ends of the window
    size = 2 * trajectory.num_samples * 79 * 8
    assert trajectory.num_bytes == on_disk < size
    small = trajectory.index([(1, 4)])
    assert (small.meta["index_bytes"], small.meta["log_bytes"]) == (size, on_disk)
    monkeypatch.setattr(index, "SMALL_INDEX", 0)
    with pytest.raises(ValueError, match=r"takes 28.4 KiB, more than the log itself, [\d.]+ KiB \(memory_budget=... allows"):
        trajectory.index([(1, 4)])
    assert trajectory.index([(1, 4)], memory_budget="1MiB").num_bytes == size


def test_an_index_is_kept_on_disk_for_its_own_run(tmp_path):
    run = factor_run("mlp")
    trajectory, query = with_factors(run), ready_gradients(run, (2, 7))
    kept = trajectory.index((2, 7))
    kept.save(tmp_path / "kept.safetensors")
    read = dit_fast.Index.load(tmp_path / "kept.safetensors", trajectory)
    assert torch.equal(read.score(query).scores, kept.score(query).scores)
    assert (read.windows, repr(read), read.meta) == (kept.windows, repr(kept), kept.meta)
    with pytest.raises(ValueError, match="is an index of another run"):
        dit_fast.Index.load(tmp_path / "kept.safetensors", with_factors(factor_run("tokens")))
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a file of a dit_fast index"):
        dit_fast.Index.load(tmp_path / "other.safetensors", trajectory)


def test_refusals():
    run = factor_run("mlp")
    trajectory = with_factors(run)
    with pytest.raises(
        ValueError, match=r"an index of 1 steps, 12 samples and 79 numbers each takes 7.41 KiB, more than memory"
    ):
        trajectory.index(memory_budget=5_000)
    with pytest.raises(ValueError, match="the log holds no factors"):
        run.trajectory().index()
    with pytest.raises(ValueError, match="hessian='exact' needs the problem"):
        index.build_index(trajectory, hessian="exact")
