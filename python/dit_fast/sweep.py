"""The adjoint sweep: every column from its t2 down to step 0, and nothing else (design §1)."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_fast.errors import LogError
from dit_fast.plan import Column
from dit_fast.problem import Params
from dit_fast.replay import Point, Run

Pull = Callable[[Params], tuple[Tensor, Params]]
# of a micro-batch, of whatever kind the run has
Linearizer = Callable[[Params, Any], tuple[Params, Pull]]
QueryGradients = Callable[[int], Params]


class Points(Protocol):
    """Where steps start from (`replay.Replay`)."""

    def at(self, t: int) -> Point:
        """The point before step t."""


def sweep(
    ev: Run,
    columns: Sequence[Column],
    linearize: Linearizer,
    replay: Points,
    query_gradients: QueryGradients,
    num_samples: int,
    progress: Callable[[], object],
) -> Tensor:
    """Scores [K, N] float64 of all `columns`, which come latest stop first, in one pass over the log.

    query_gradients(t) → q(t) as one block [Q, *shape] per parameter; progress() is called after every step.
    """
    scores = torch.zeros(len(columns), num_samples, dtype=torch.float64, device=ev.device)
    # u: the cotangent of every parameter, and behind it those of its optimizer state, [K, *shape] each
    num_blocks = 1 + len(ev.trajectory.slots)
    u = {
        name: [torch.zeros(len(columns), *shape, dtype=ev.dtype, device=ev.device) for _ in range(num_blocks)]
        for name, shape in ev.shapes.items()
    }
    ends = {t for column in columns for t in (column.start, column.stop) if t}
    active = 0
    for t in reversed(range(columns[0].stop)):
        if t + 1 in ends:
            active = join_and_leave(t + 1, columns, {name: blocks[0] for name, blocks in u.items()}, query_gradients(t + 1))
        travelling = {name: [block[:active] for block in blocks] for name, blocks in u.items()}
        for batch, dots in _step(ev, t, replay.at(t), travelling, linearize):
            # score_j −= a_j ⟨c, ∇ℓ_j⟩; an id that occurs twice counts twice
            scores[:active].index_add_(1, batch.ids.to(ev.device), dots * batch.coefficients.double(), alpha=-1)
            if ev.device.type == "cpu" and not torch.isfinite(dots).all():
                raise LogError(
                    f"step {t}: a score is NaN or infinite; the sweep cannot pass this step (try dtype=torch.float64)"
                )
        progress()
    if not torch.isfinite(scores).all():
        raise LogError("some scores are NaN or infinite (try dtype=torch.float64, or check=True to test the log)")
    return scores


def _step(ev: Run, t: int, point: Point, u: dict[str, list[Tensor]], linearize: Linearizer) -> list[tuple[Any, Tensor]]:
    """Carries u over step t in place; the micro-batches with their dots [K, B] = ⟨c_k, ∇ℓ_b⟩."""
    trajectory = ev.trajectory
    batches = ev.batches(t)
    gradient: Params = {}
    pull: Pull | None = None
    if trajectory.clip or not all(rule.is_linear for rule in trajectory.optimizer):
        # the rule's derivative depends on the whole step's gradient, so it comes before any cotangent
        if len(batches) == 1:
            gradient, pull = linearize(point.params, batches[0])
        else:
            gradient = ev.batch_gradient(t, point.params)
    cotangent = _cotangent(ev, t, point, gradient, u)
    results = []
    for batch in batches:
        dots, hvp = (pull or linearize(point.params, batch)[1])(cotangent)
        pull = None  # frees the batch's graph before the next is built
        for name, value in hvp.items():
            u[name][0].add_(value)
        results.append((batch, dots))
    return results


def _cotangent(ev: Run, t: int, point: Point, gradient: Params, u: dict[str, list[Tensor]]) -> Params:
    """c [K, *shape], the cotangent of the raw batch gradient, by the optimizer's adjoint rule; u becomes u' in place."""
    trajectory = ev.trajectory
    settings, groups, absent = trajectory.settings(t), trajectory.groups, trajectory.absent(t)
    # a parameter without a gradient has no part in the norm
    gradient = {name: torch.zeros_like(value) if name in absent else value for name, value in gradient.items()}
    clipped = trajectory.clip.forward(gradient)
    cotangent = {}
    for name, theta in point.params.items():
        if name in absent:
            cotangent[name] = torch.zeros_like(u[name][0])
            continue
        rule, values = trajectory.optimizer[groups[name]], settings[groups[name]]
        cotangent[name] = rule.adjoint(
            u[name], theta, clipped.get(name, theta), point.state.get(name, ()), point.counts[name], values
        )
    return trajectory.clip.adjoint(cotangent, gradient)


def join_and_leave(t: int, columns: Sequence[Column], block: Params, gradients: Params) -> int:
    """Columns that start at t lose q(t), those that stop there begin with it; the number of columns then travelling."""
    leaving = [(k, column.query) for k, column in enumerate(columns) if column.start == t]
    joining = [(k, column.query) for k, column in enumerate(columns) if column.stop == t]
    for name, rows in gradients.items():
        for k, query in leaving:
            block[name][k].sub_(rows[query])
        for k, query in joining:
            block[name][k].copy_(rows[query])
    return sum(column.stop >= t for column in columns)
