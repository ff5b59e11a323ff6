"""score() of logs with factors, in every form, against the literal estimator; what is refused and how."""

from dataclasses import replace

import pytest
import torch
from cases import relative_error
from factor_cases import (
    FactorTrajectory,
    factor_run,
    layout_of,
    loss,
    random_projections,
    ready_gradients,
    with_factors,
)

import dit_fast
from dit_fast import queries, reference
from dit_fast.logged import score_logged

WINDOWS = [(0, 7), (2, 5), (5, 6)]
ENDS = (2, 5, 6, 7)
NETS = ("mlp", "cnn", "tokens")
MICRO = [[2, 2], [3], [5], [1], [3, 1], [2], [6]]


@pytest.fixture(scope="module")
def runs():
    return {name: factor_run(name, weight_decay=0.02, micro_batches=MICRO) for name in NETS}


@pytest.mark.parametrize("hessian", ["fisher", "ggn", "none"])
@pytest.mark.parametrize("net", NETS)
def test_every_form_of_logged_factors_is_the_reference(runs, net, hessian):
    run = runs[net]
    query = ready_gradients(run, ENDS)
    trajectory = with_factors(run, "ggn" if hessian == "ggn" else "fisher")
    slow = reference.score(run.trajectory(), run.problem(), query, WINDOWS, hessian=hessian)
    scale = slow.scores[0].abs().amax(-1)
    for form in ("sweep", "fused", "gram"):
        fast = score_logged(trajectory, None, query, WINDOWS, hessian=hessian, form=form)
        assert fast.meta["form"] == form
        assert relative_error(fast.scores, slow.scores, scale) < 1e-12, form
        assert not fast.scores[..., 11].any()  # never visited
    whole = dit_fast.score(trajectory, None, query, WINDOWS, hessian=hessian)
    assert relative_error(whole.scores, slow.scores, scale) < 1e-12
    assert (whole.meta["backend"], whole.meta["factors"]) == ("factors", "logged")
    if hessian != "none":  # the negative control
        other = dit_fast.score(trajectory, None, query, WINDOWS, hessian="none")
        assert relative_error(other.scores, slow.scores, scale) > 1e-3


@pytest.mark.parametrize("hessian", ["fisher", "none"])
def test_rows_of_outputs_give_the_fisher_too(runs, hessian):
    run, query = runs["mlp"], ready_gradients(runs["mlp"], ENDS)
    slow = reference.score(run.trajectory(), run.problem(), query, WINDOWS, hessian=hessian)
    fast = dit_fast.score(with_factors(run, "ggn"), None, query, WINDOWS, hessian=hessian)
    assert relative_error(fast.scores, slow.scores, slow.scores[0].abs().amax(-1)) < 1e-12


def test_sampled_rows_are_gauss_newton_with_one_label_each():
    """Against a sweep written out with H = Σ a ∇ℓ(sampled)∇ℓ(sampled)ᵀ, dense."""
    run = factor_run("mlp")
    query, trajectory = ready_gradients(run, (7,)), with_factors(run, "sampled ggn")
    labels = torch.arange(12) * 5 % 3
    u = query.by_step[7].clone()
    scores = torch.zeros(2, 12, dtype=torch.float64)
    for t in reversed(range(7)):
        model = run.case.model()
        model.load_state_dict({name: value[t] for name, value in run.params.items()})
        params = list(model.parameters())

        def flat(value, params=params):
            return torch.cat([g.flatten() for g in torch.autograd.grad(value, params)])

        hvp = torch.zeros_like(u)
        for j, a in zip(run.batches[t].tolist(), run.coefficients[t], strict=True):
            own = flat(run.case.loss(model(run.case.x[j : j + 1]), run.case.y[j : j + 1])[0])
            drawn = flat(run.case.loss(model(run.case.x[j : j + 1]), labels[j : j + 1])[0])
            scores[:, j] += run.lr[t] * a * (u @ own)
            hvp += a * torch.outer(u @ drawn, drawn)
        u -= run.lr[t] * hvp
    for form in ("sweep", "gram"):
        result = score_logged(trajectory, None, query, hessian="ggn", form=form)
        assert result.meta["curvature"] == "sampled ggn"
        assert relative_error(result.scores[0], scores) < 1e-12


def test_l2_in_the_losses_takes_the_logged_parameters():
    run = factor_run("tokens", l2=0.03, weight_decay=0.02)
    query, trajectory = ready_gradients(run, ENDS), with_factors(run)
    for hessian in ("fisher", "none"):
        slow = reference.score(run.trajectory(), run.problem(), query, WINDOWS, hessian=hessian)
        fast = dit_fast.score(trajectory, None, query, WINDOWS, hessian=hessian)
        assert relative_error(fast.scores, slow.scores, slow.scores[0].abs().amax(-1)) < 1e-12
    forgotten = with_factors(run, layout=layout_of(run, l2=0.0))
    with pytest.raises(dit_fast.LogError, match=r"step 0: the step that the logged factors give is off by .* was l2 not told"):
        dit_fast.score(forgotten, None, query, WINDOWS, hessian="fisher")
    wrong = dit_fast.score(forgotten, None, query, WINDOWS, hessian="fisher", check=False)
    assert relative_error(wrong.scores, slow.scores, slow.scores[0].abs().amax(-1)) > 1e-3


def test_a_problem_is_asked_for_the_query_alone(runs):
    run, trajectory = runs["cnn"], with_factors(runs["cnn"])
    asked = [loss(run), queries.logit(run.case.x_val[:2], 1)]
    slow = reference.score(run.trajectory(), run.problem(), asked, WINDOWS, hessian="fisher")
    fast = dit_fast.score(trajectory, run.problem(), asked, WINDOWS, hessian="fisher", backend="factors")
    assert fast.meta["factors"] == "logged"
    assert fast.queries == slow.queries
    assert relative_error(fast.scores, slow.scores, slow.scores[0].abs().amax(-1)) < 1e-12
    with pytest.raises(ValueError, match=r"the problem has l2=0.5, the log's factors were recorded with l2=0"):
        dit_fast.score(trajectory, run.problem(l2=0.5), asked, hessian="fisher", backend="factors", check=False)


def test_queries_marked_in_the_log(runs):
    run = runs["mlp"]
    marked = ready_gradients(run, (2, 5, 7))
    trajectory = with_factors(run, marked=marked, marks={"early": 2, "late": 5, "end": 7})
    found = dit_fast.score(trajectory, windows="epochs", hessian="fisher")
    given = dit_fast.score(trajectory, None, marked, [(0, 2), (2, 5), (5, 7)], hessian="fisher")
    assert torch.equal(found.scores, given.scores)
    assert [window.name for window in found.windows] == ["early", "late", "end"]
    with pytest.raises(
        ValueError, match=r"no query was marked at step 6, an end of a window: .* 2 \('early'\), 5 \('late'\), 7"
    ):
        dit_fast.score(trajectory, windows=(0, 6), hessian="fisher")


@pytest.mark.parametrize("hessian", ["fisher", "none"])
def test_projected_factors_are_the_sweep_in_the_projected_space(runs, hessian):
    """Against a dense sweep of projected per-sample gradients."""
    run = runs["mlp"]
    projections = random_projections(run, {"0.weight": (3, 4), "2.weight": (2, 3)})
    trajectory, query = with_factors(run, projections=projections), ready_gradients(run, ENDS)

    def project(flat):
        pieces = flat.split([value[0].numel() for value in run.params.values()], 1)
        named = zip(run.params.items(), pieces, strict=True)
        blocks = [(n, p.view(-1, *v.shape[1:])) for (n, v), p in named]
        return torch.cat([(projections[n](p) if n in projections else p).flatten(1) for n, p in blocks], 1)

    gradients = {t: project(query.by_step[t]) for t in ENDS}
    scores = {0: torch.zeros(2, 12, dtype=torch.float64)}
    for end in ENDS:
        u, scores[end] = gradients[end].clone(), torch.zeros(2, 12, dtype=torch.float64)
        for t in reversed(range(end)):
            model = run.case.model()
            model.load_state_dict({name: value[t] for name, value in run.params.items()})
            losses = run.case.loss(model(run.case.x[run.batches[t]]), run.case.y[run.batches[t]])
            rows = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in losses]
            rows = project(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
            dots, a, rate = u @ rows.T, run.coefficients[t], run.lr[t]
            scores[end].index_add_(1, run.batches[t], rate * a * dots)
            u = (1 - rate * 0.02) * u - (rate * (a * dots) @ rows if hessian == "fisher" else 0)
    truth = torch.stack([scores[b] - scores[a] for a, b in WINDOWS])
    for asked in (query, queries.gradients(gradients)):
        for form in ("sweep", "fused", "gram"):
            result = score_logged(trajectory, None, asked, WINDOWS, hessian=hessian, form=form)
            assert relative_error(result.scores, truth, truth[0].abs().amax(-1)) < 1e-12
    assert result.meta["factors"] == "logged, projected"


def test_what_is_not_covered_must_not_be_asked(runs):
    run = runs["mlp"]
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    keep = lambda part: part.weight in names  # noqa: E731
    trajectory = with_factors(run, layout=layout_of(run, names=names), keep=keep)
    query = ready_gradients(run, (7,))
    with pytest.raises(ValueError, match=r"query 'gradients' depends on parameter '4.weight', which the logged factors do not"):
        dit_fast.score(trajectory, None, query, hessian="fisher")
    pieces = query.by_step[7].split([value[0].numel() for value in run.params.values()], 1)
    named = {n: p.view(-1, *v.shape[1:]) for (n, v), p in zip(run.params.items(), pieces, strict=True) if n in names}
    result = dit_fast.score(trajectory, None, queries.gradients({7: named}), hessian="none")
    assert result.meta["uncovered"] == ["4.weight", "4.bias"]
    # without curvature the missing parameters' part is nothing but missing: asking 0 of them is the same
    flat = torch.cat([piece if n in names else 0 * piece for n, piece in zip(run.params, pieces, strict=True)], 1)
    slow = reference.score(run.trajectory(), run.problem(), queries.gradients({7: flat}), hessian="none")
    assert relative_error(result.scores, slow.scores) < 1e-12


def test_float32_and_half_precision_factors(runs):
    run, query = runs["tokens"], ready_gradients(runs["tokens"], ENDS)
    double = dit_fast.score(with_factors(run), None, query, WINDOWS, hessian="fisher")
    scale = double.scores[0].abs().amax(-1)
    single = dit_fast.score(with_factors(run), None, query, WINDOWS, hessian="fisher", dtype=torch.float32)
    assert single.meta["dtype"] == "float32"
    assert 0 < relative_error(single.scores, double.scores, scale) < 1e-5
    trajectory = with_factors(run)
    half = [[replace(f, parts=tuple(rounded(p) for p in f.parts)) for f in step] for step in trajectory._factors]
    layout = replace(layout_of(run), dtype=torch.bfloat16)
    stored = FactorTrajectory(trajectory._source, half, layout)
    rough = dit_fast.score(stored, None, query, WINDOWS, hessian="fisher")
    assert rough.meta["factors_dtype"] == "bfloat16"
    assert 0 < relative_error(rough.scores, double.scores, scale) < 3e-2


def rounded(part):
    values = {n: v.bfloat16() for n, v in vars(part).items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return replace(part, **values)


def test_results_do_not_depend_on_the_memory_they_are_given(runs):
    run, query = runs["mlp"], ready_gradients(runs["mlp"], ENDS)
    trajectory = with_factors(run)
    for form in ("sweep", "fused", "gram"):
        whole = score_logged(trajectory, None, query, WINDOWS, form=form)
        pieces = score_logged(trajectory, None, query, WINDOWS, form=form, memory_budget=20_000)
        assert pieces.meta["sweeps"] > 1
        assert relative_error(pieces.scores, whole.scores, whole.scores[0].abs().amax(-1)) < 1e-12


def spoiled(run, change, **options):
    trajectory = with_factors(run, **options)
    trajectory._factors[3] = [change(f) for f in trajectory._factors[3]]
    return trajectory


BROKEN = {
    "a layer is missing": (
        lambda f: replace(f, parts=f.parts[:-1]),
        "step 3: the log holds no factors of parameter '4.weight'",
    ),
    "a layer twice": (lambda f: replace(f, parts=(*f.parts, f.parts[0])), "step 3: the log holds 2 sets of factors of .*'0.w"),
    "other samples": (lambda f: replace(f, ids=f.ids + 1), "step 3: the logged factors are of other samples"),
    "another shape": (
        lambda f: replace(f, parts=(replace(f.parts[0], inputs=f.parts[0].inputs[..., :2]), *f.parts[1:])),
        "step 3: the logged factors of '0.weight' do not fit its shape",
    ),
    "not finite": (
        lambda f: replace(f, parts=(replace(f.parts[0], deltas=f.parts[0].deltas * torch.nan), *f.parts[1:])),
        "step 3: the logged factors hold NaN or infinity",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_damaged_factors_are_refused(what):
    change, message = BROKEN[what]
    run = factor_run("mlp")
    with pytest.raises(dit_fast.LogError, match=message):
        dit_fast.score(spoiled(run, change), None, ready_gradients(run, (7,)), hessian="fisher", check=False)


def test_factors_of_another_run_or_model_are_refused(runs):
    run, query = runs["mlp"], ready_gradients(runs["mlp"], (7,))
    other = spoiled(run, lambda f: replace(f, parts=(replace(f.parts[0], deltas=f.parts[0].deltas * 2), *f.parts[1:])))
    with pytest.raises(dit_fast.LogError, match="step 3: the step that the logged factors give is off by"):
        dit_fast.score(other, None, query, hessian="fisher")
    for name, shape, message in (
        ("3.weight", (2, 2), "of parameter '3.weight', which is not in the log"),
        ("0.weight", (6, 4), r"of parameter '0.weight' are \(6, 4\), the parameter is \(6, 5\): are they of another model"),
    ):
        layout = layout_of(run)
        layout = replace(layout, shapes=dict(layout.shapes) | {name: torch.Size(shape)})
        with pytest.raises(dit_fast.LogError, match=message):
            dit_fast.score(with_factors(run, layout=layout), None, query, hessian="fisher")


REFUSED = {
    "exact": ({"hessian": "exact"}, "hessian='exact' needs the problem"),
    "ggn of fisher rows": ({"hessian": "ggn"}, "hessian='ggn' needs rows of the model's outputs"),
    "retrain": ({"method": "retrain"}, "without a problem only the log's factors can be scored"),
    "refine": ({"refine": 1}, "without a problem only the log's factors can be scored"),
    "native": ({"backend": "native"}, "without a problem only the log's factors can be scored"),
    "dtype": ({"dtype": torch.bfloat16}, "dtype must be torch.float32 or torch.float64"),
    "sample": ({"sample_ids": [99]}, r"sample_ids must lie in 0..11"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_options_without_a_problem(runs, what):
    options, message = REFUSED[what]
    run = runs["mlp"]
    with pytest.raises(ValueError, match=message):
        dit_fast.score(with_factors(run), None, ready_gradients(run, (7,)), **({"hessian": "fisher"} | options))


def test_queries_that_do_not_fit(runs):
    run = runs["mlp"]
    trajectory = with_factors(run)
    for query, message in (
        (loss(run), "query 'loss' needs the problem: give it"),
        (ready_gradients(run, (5,)), "queries.gradients has no gradient for step 7, an end of a window"),
        (queries.gradients({7: torch.ones(1, 5)}), "has 5 numbers at step 7; the log has 79 parameters"),
        (queries.gradients({7: {"0.weight": torch.ones(1, 2, 2)}}), r"has shape \(2, 2\) for parameter '0.weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            dit_fast.score(trajectory, None, query, hessian="fisher")
    with pytest.raises(ValueError, match=r"the log holds no factors, so it cannot be scored without a problem"):
        dit_fast.score(run.trajectory(), None, ready_gradients(run, (7,)), hessian="fisher")


def test_projected_factors_refuse_what_they_cannot_follow(runs):
    run, query = runs["mlp"], ready_gradients(runs["mlp"], (7,))
    projections = random_projections(run, {"0.weight": (3, 4)})
    for changes, message in (
        ({"optimizer": dit_fast.Adam()}, "Adam works element by element"),
        ({"clip_norm": 1.0}, "clipped gradients cannot be followed in projected factors"),
    ):
        with pytest.raises(ValueError, match=message):
            dit_fast.score(with_factors(run, projections=projections, **changes), None, query, hessian="fisher")
