"""Logged factors under every optimizer and option, against the literal estimator with the empirical Fisher."""

import pytest
import torch
from cases import Run, relative_error
from factor_cases import FactorTrajectory, factor_run, layout_of, literal_factors, ready_gradients, with_factors
from test_optimizers import SETTINGS, WINDOWS, log_run

import dit_fast
from dit_fast import reference
from dit_fast.logged import score_logged

ENDS = (1, 2, 4, 6, 8, 9)
CHOSEN = (
    "dampening and decay", "nesterov", "momentum in one group", "one cycle of momentum", "adam with decay and eps", "adamw",
    "clip by norm and momentum", "clip by value and adam", "skipped parameter", "accumulation and clipping",
    "every third step", "every fourth step and adam",
)  # fmt: skip
# what is the same number for all parameters in every step
SAMPLE_SPACE = ("dampening and decay", "one cycle of momentum", "every third step")


def logged(name, path):
    setting = SETTINGS[name]
    made = log_run("mlp", setting, path)
    params = {n: torch.stack([row[n] for row in made.history]) for n in made.history[0]}
    run = Run(made.case, made.batches, made.coefficients, [], params, l2=setting.l2)
    trajectory = made.trajectory
    factors = [
        [literal_factors(run, t, part=part) for part in trajectory.micro_batches(t)] for t in range(trajectory.num_steps)
    ]
    return made, run, FactorTrajectory(trajectory._source, factors, layout_of(run))


@pytest.mark.parametrize("name", CHOSEN)
def test_factors_follow_the_optimizer(name, tmp_path):
    made, run, trajectory = logged(name, tmp_path / "log")
    query = ready_gradients(run, ENDS)
    slow = reference.score(made.trajectory, made.problem(), query, WINDOWS, hessian="fisher")
    scale = slow.scores[0].abs().amax(-1)
    fast = score_logged(trajectory, None, query, WINDOWS, form="sweep")
    # Adam divides by √v, so that rounding of the factors' own gradients shows
    tolerance = 1e-11 if "adam" in name else 1e-12
    assert relative_error(fast.scores, slow.scores, scale) < tolerance
    if name in SAMPLE_SPACE:
        gram = score_logged(trajectory, None, query, WINDOWS, form="gram")
        assert relative_error(gram.scores, slow.scores, scale) < 1e-12
    else:
        with pytest.raises(ValueError, match="form='gram' cannot be used: "):
            score_logged(trajectory, None, query, WINDOWS, form="gram")
    flat = score_logged(trajectory, None, query, WINDOWS, hessian="none")
    assert relative_error(flat.scores, slow.scores, scale) > 1e-4


@pytest.mark.parametrize("maximize", [False, True])
def test_plain_sgd_with_groups_of_their_own(maximize):
    """Rates and decays by group, a layer's weight and bias in two of them, a parameter that is skipped at times."""
    run = factor_run("mlp")
    optimizer = [dit_fast.SGD(weight_decay=0.1, maximize=maximize), dit_fast.SGD(weight_decay=0.0, maximize=maximize)]
    changes = {
        "optimizer": optimizer,
        "lr": torch.tensor([[rate, rate / 3] for rate in run.lr]),
        "groups": {name: int(name.endswith("bias") or name == "4.weight") for name in run.params},
        "absent": [["2.weight"] if t in (1, 4) else [] for t in range(7)],
    }
    query, trajectory = ready_gradients(run, (3, 6)), with_factors(run, **changes)
    windows = [(0, 6), (3, 6)]
    # the run itself was another: what is compared is the rule
    options = {"hessian": "fisher", "check": False}
    slow = reference.score(run.trajectory(**changes), run.problem(), query, windows, **options)
    for form in ("sweep", "fused"):
        fast = score_logged(trajectory, None, query, windows, form=form, **options)
        assert relative_error(fast.scores, slow.scores, slow.scores[0].abs().amax(-1)) < 1e-12, form
    chosen = dit_fast.score(trajectory, None, query, windows, **options)
    assert (chosen.meta["form"], chosen.meta["why"]) == (
        "fused",
        "not in sample space: a parameter was without a gradient in some step",
    )
