"""Which way of computing a score fits a model, and why the others do not: what `score` would choose, without running it."""

from dataclasses import dataclass
from typing import Any

import torch

from dit_fast import modules, plan, retrain
from dit_fast.linearize import HESSIANS, Hessian
from dit_fast.optimizers import SGD
from dit_fast.problem import Evaluator, Problem
from dit_fast.replay import Replay
from dit_fast.score import BACKENDS, choose_sweep
from dit_fast.trajectory import Trajectory

ASSUMED_BATCH = 32


@dataclass(frozen=True)
class Explanation:
    """What `score` and `leave_one_out` would choose for a problem.

    backend, why: as `result.meta` will say. details: mode, columns_per_pull, samples_per_pull, where the backend has them.
    backends: every backend → why it can or cannot be used when asked for by name.
    usable: the backends that can. retrain_backend, why_retrain: the same for true retraining.
    """

    backend: str
    why: str
    details: dict[str, Any]
    backends: dict[str, str]
    usable: list[str]
    retrain_backend: str
    why_retrain: str


def explain(
    trajectory: Trajectory,
    problem: Problem,
    *,
    hessian: Hessian = "exact",
    columns: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_budget: int | float | str | None = None,
) -> Explanation:
    """What `score` with these arguments would choose, and why; every backend is tried on the log's first batch.

    columns: adjoint columns, about windows × query values. The other arguments and the errors are those of `score`.
    """
    if hessian not in HESSIANS:
        raise ValueError(f"hessian={hessian!r} is not one of {', '.join(map(repr, HESSIANS))}")
    ev = Evaluator.create(problem, trajectory, device, dtype)
    backends, usable = {}, []
    with ev.session():
        budget = plan.memory_budget(memory_budget, ev.device)

        def chosen(backend: str) -> dict[str, Any]:
            return choose_sweep(ev, hessian, backend, columns, Replay(ev, False, 0), budget, [])[1]

        meta = chosen("auto")
        for name in BACKENDS[1:]:
            try:
                reason = chosen(name)["why"]
                usable.append(name)
            except ValueError as error:
                reason = str(error).removeprefix(f"backend={name!r} cannot be used: ")
            backends[name] = "any module, by torch" if name == "generic" else reason
        retrain_backend, why_retrain = retrain.chosen_backend(ev)
    details = {name: value for name, value in meta.items() if name not in ("backend", "why")}
    return Explanation(meta["backend"], meta["why"], details, backends, usable, retrain_backend, why_retrain)


def assumed_run(problem: Problem) -> Trajectory:
    """A run of one step of plain SGD on the problem's first samples, for asking before anything has been logged.

    Raises ValueError where the problem has no data or its model nothing to train.
    """
    if not problem.num_samples:
        raise ValueError("the problem has no data, so its batches are in the log: name the log too")
    trained = modules.trainable_parameters(problem.model)
    if not trained:
        raise ValueError("the model has no parameters that require a gradient")
    params = {name: torch.stack([value.detach().cpu()] * 2) for name, value in trained.items()}
    ids = [list(range(min(ASSUMED_BATCH, problem.num_samples)))]
    return Trajectory.from_arrays(params, ids, lr=0.1, optimizer=SGD(), num_samples=problem.num_samples)
