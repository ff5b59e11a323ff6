"""From the Recorder's hooks to scores without a problem: what users do, against the literal estimator on the same log."""

from dataclasses import replace

import pytest
import torch
from cases import make_case, relative_error, schedule
from factor_cases import FactorTrajectory, factor_case

import dit_fast
from dit_fast import FactorOptions, reference
from dit_fast.logged import score_logged

STEPS = 8
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, weight_decay=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}


def record(path, net, optimizer, factors, every=1, ask=None):
    case = factor_case(net) if net == "tokens" else make_case(net)
    model = case.model()
    made = OPTIMIZERS[optimizer](model.parameters())
    query = ask or dit_fast.queries.losses(case.x_val[:3], case.y_val[:3])
    batches, _, _ = schedule(len(case.x), STEPS)
    with dit_fast.Recorder(path, model, made, num_samples=12, factors=factors, every=every) as recorder:
        for t, ids in enumerate(batches):
            made.zero_grad()
            case.loss(model(case.x[ids]), case.y[ids]).mean().backward()
            with recorder.step(ids, batch=(case.x[ids], case.y[ids])):
                made.step()
            if t in (3, 7):
                recorder.mark(f"epoch {t // 4}", query=query)
    return case, query, dit_fast.Trajectory.open(path), dit_fast.Problem(case.model(), case.loss, (case.x, case.y))


@pytest.mark.parametrize(
    ("net", "hessian", "optimizer", "every"),
    [
        ("mlp", "fisher", "sgd", 1),
        ("mlp", "none", "adamw", 1),
        ("mlp", "fisher", "momentum", 4),
        ("cnn", "ggn", "momentum", 1),
        ("tokens", "fisher", "adamw", 4),
    ],
)
def test_a_recorded_run_is_scored_without_its_problem(net, hessian, optimizer, every, tmp_path):
    case = factor_case(net) if net == "tokens" else make_case(net)
    options = FactorOptions(curvature="ggn" if hessian == "ggn" else "fisher", per_sample_loss=case.loss)
    case, query, trajectory, problem = record(tmp_path / "log", net, optimizer, options, every)
    slow = reference.score(trajectory, problem, query, "epochs", hessian=hessian)
    scale = slow.scores[0].abs().amax(-1) + slow.scores.sum(0).abs().amax(-1)
    alone = dit_fast.score(trajectory, windows="epochs", hessian=hessian)
    assert relative_error(alone.scores, slow.scores, scale) < 1e-10
    assert alone.queries == slow.queries
    made = trajectory.index("epochs", hessian=hessian)
    assert relative_error(made.score().scores, slow.scores, scale) < 1e-10
    if optimizer == "momentum":
        gram = score_logged(trajectory, None, None, "epochs", hessian=hessian, form="gram")
        assert relative_error(gram.scores, slow.scores, scale) < 1e-10
        # the query's own factors, made from the problem, in the forms that the log has chosen
        live = score_logged(trajectory, problem, query, "epochs", hessian=hessian, form="gram")
        assert relative_error(live.scores, slow.scores, scale) < 1e-10


def test_factors_of_another_loss_are_met_between_snapshots(tmp_path):
    case = make_case("mlp")
    _, _, trajectory, _ = record(tmp_path / "log", "mlp", "sgd", FactorOptions(per_sample_loss=case.loss), every=4)
    twice = [[replace(f, slopes=2 * f.slopes) for f in trajectory.factors(t)] for t in range(trajectory.num_steps)]
    other = FactorTrajectory(trajectory._source, twice, trajectory.factor_layout)
    options = {"windows": "epochs", "hessian": "fisher"}
    query = dit_fast.queries.gradients({t: value[1] for t, value in trajectory.marked_queries.items()})
    with pytest.raises(dit_fast.LogError, match="the replay misses the parameters stored before step 4"):
        dit_fast.score(other, None, query, **options)
    dit_fast.score(trajectory, None, query, **options)
