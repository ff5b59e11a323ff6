"""The sweep in sample space: when it is chosen, its products written out, and that it gives the same numbers."""

import pytest
import torch
from cases import relative_error
from factor_cases import factor_run, literal_factors, ready_gradients, with_factors

import dit_fast
from dit_fast import gram
from dit_fast.factored import Lookup, Outer, Plain
from dit_fast.logged import open_run, score_logged


def dense_rows(factors, shapes):
    """J [B·R, P] by loops over samples, rows and positions."""
    B, R = factors.slopes.shape
    rows = torch.zeros(B, R, sum(shape.numel() for shape in shapes.values()), dtype=torch.float64)
    for b in range(B):
        for r in range(R):
            own = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
            for part in factors.parts:
                if isinstance(part, Plain):
                    own[part.name] += part.rows[b, r]
                    continue
                for s, delta in enumerate(part.deltas[b, r]):
                    if isinstance(part, Lookup):
                        own[part.weight][part.indices[b, s]] += delta
                        continue
                    own[part.weight] += torch.outer(delta, part.inputs[b, s]).view(shapes[part.weight])
                    if part.bias is not None:
                        own[part.bias] += delta
            rows[b, r] = torch.cat([value.flatten() for value in own.values()])
    return rows.flatten(0, 1)


@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
@pytest.mark.parametrize("net", ["mlp", "cnn", "tokens"])
@pytest.mark.parametrize("written_out", [False, True])
def test_products_of_rows(net, curvature, written_out, monkeypatch):
    """Positions and written out rows, several pieces at once."""
    own = gram._pair_flops
    outer = (1.0, 0.0) if written_out else (0.0, 1.0)
    monkeypatch.setattr(gram, "_pair_flops", lambda part: outer if isinstance(part, Outer) else own(part))
    monkeypatch.setattr(gram, "PIECE_NUMBERS", 500)
    run = factor_run(net)
    logged = with_factors(run, curvature)
    opened = open_run(logged, "fisher" if curvature == "fisher" else "ggn", None, None)
    history = gram._History(opened, 1, 100)
    steps = [literal_factors(run, t, curvature) for t in (2, 4, 6)]
    for factors in steps[:2]:
        history.append(factors, torch.zeros(1, *factors.slopes.shape))
    shapes = opened.shapes
    expected = dense_rows(steps[2], shapes) @ torch.cat([dense_rows(f, shapes) for f in steps[:2]]).T
    torch.testing.assert_close(history.products(steps[2]), expected, rtol=1e-12, atol=1e-14)


def test_it_is_chosen_where_it_takes_fewer_flops():
    run = factor_run("mlp")
    query = ready_gradients(run, (7,), rows=6)
    trajectory = with_factors(run)
    many = dit_fast.queries.gradients({7: query.by_step[7].repeat(40, 1)})
    one = dit_fast.queries.gradients({7: query.by_step[7][:1]})
    found = {name: dit_fast.score(trajectory, None, q, hessian="fisher") for name, q in (("many", many), ("one", one))}
    assert found["many"].meta["form"] == "gram"
    assert found["one"].meta["form"] == "fused"
    assert "GFLOP in sample space" in found["one"].meta["why"]
    assert relative_error(found["many"].scores[:, :1], found["one"].scores) < 1e-12
    little = dit_fast.score(trajectory, None, many, hessian="fisher", memory_budget=60_000)
    assert little.meta["form"] == "fused"
    assert "sample space would take" in little.meta["why"]
    assert relative_error(little.scores, found["many"].scores) < 1e-12
    with pytest.raises(ValueError, match=r"form='gram' needs .*, more than memory_budget = "):
        score_logged(trajectory, None, many, form="gram", memory_budget=60_000)


def test_sequences_of_several_lengths_are_swept_in_parameters():
    """The layers see 5 positions in some steps and 3 in others."""
    run = factor_run("tokens")
    whole = run.case.x
    trajectory = with_factors(run)
    run.case.x = whole[:, :3]
    trajectory._factors[2] = [literal_factors(run, 2)]
    run.case.x = whole
    query = dit_fast.queries.gradients({7: ready_gradients(run, (7,)).by_step[7].repeat(500, 1)})
    options = {"hessian": "fisher", "check": False}
    result = dit_fast.score(trajectory, None, query, **options)
    assert (result.meta["form"], result.meta["why"][:20]) == ("fused", "not in sample space:")
    swept = score_logged(trajectory, None, query, form="sweep", **options)
    assert relative_error(result.scores, swept.scores) < 1e-12
    with pytest.raises(ValueError, match="step 2: sequences of another length than in later steps"):
        score_logged(trajectory, None, query, form="gram", **options)


@pytest.mark.parametrize("net", ["mlp", "cnn", "tokens"])
def test_queries_of_single_samples_need_no_block_of_parameters(net, monkeypatch):
    """queries.losses, in factors made from the problem, against their dense gradients."""
    run = factor_run(net, weight_decay=0.02)
    trajectory = with_factors(run)
    query = dit_fast.queries.losses(run.case.x_val, run.case.y_val)
    windows = [(0, 7), (2, 5)]
    asked = {"hessian": "fisher", "backend": "factors"}
    slow = dit_fast.reference.score(run.trajectory(), run.problem(), query, windows, hessian="fisher")
    scale = slow.scores[0].abs().amax(-1)
    monkeypatch.setattr(gram._DenseQueries, "dots", lambda *_: pytest.fail("a dense query"))
    found = score_logged(trajectory, run.problem(), query, windows, form="gram")
    assert relative_error(found.scores, slow.scores, scale) < 1e-12
    monkeypatch.setattr(gram, "columns_per_sweep", lambda *_: 5)
    pieces = score_logged(trajectory, run.problem(), query, windows, form="gram")
    assert pieces.meta["sweeps"] > 1
    assert relative_error(pieces.scores, slow.scores, scale) < 1e-12
    monkeypatch.undo()
    chosen = dit_fast.score(trajectory, run.problem(), query, windows, **asked)
    assert relative_error(chosen.scores, slow.scores, scale) < 1e-12
