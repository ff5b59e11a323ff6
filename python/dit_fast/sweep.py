"""The adjoint sweep: every column from its t2 down to step 0, and nothing else (design §1)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_fast.errors import LogError
from dit_fast.optimizers import SGD
from dit_fast.plan import Column
from dit_fast.problem import Batch, Evaluator, Params

Linearizer = Callable[[Params, Batch], tuple[Params, Callable[[Params], tuple[Tensor, Params]]]]
QueryGradients = Callable[[int], Params]


def sweep(
    ev: Evaluator,
    columns: Sequence[Column],
    linearize: Linearizer,
    query_gradients: QueryGradients,
    num_samples: int,
    progress: Callable[[], object],
) -> Tensor:
    """Scores [K, N] float64 of all `columns`, which come latest stop first, in one pass over the log.

    query_gradients(t) → q(t) as one block [Q, *shape] per parameter; progress() is called after every step.
    """
    trajectory = ev.trajectory
    scores = torch.zeros(len(columns), num_samples, dtype=torch.float64, device=ev.device)
    block = {name: torch.zeros(len(columns), *s, dtype=ev.dtype, device=ev.device) for name, s in ev.shapes.items()}
    ends = {t for column in columns for t in (column.start, column.stop) if t}
    active = 0
    for t in reversed(range(columns[0].stop)):
        if t + 1 in ends:
            active = join_and_leave(t + 1, columns, block, query_gradients(t + 1))
        params = ev.params(t)
        settings = trajectory.settings(t)
        travelling = {name: value[:active] for name, value in block.items()}
        # u becomes u' in place; H c of the step's batches is added below
        cotangent = {name: SGD.adjoint(travelling[name], settings[trajectory.groups[name]]) for name in travelling}  # c = −η u
        for batch in ev.batches(t):
            _, pull = linearize(params, batch)
            dots, hvp = pull(cotangent)
            del pull  # frees the batch's graph before the next is built
            for name, value in hvp.items():
                travelling[name].add_(value)
            # score_j −= a_j ⟨c, ∇ℓ_j⟩; an id that occurs twice counts twice
            scores[:active].index_add_(1, batch.ids.to(ev.device), dots * batch.coefficients.double(), alpha=-1)
        if ev.device.type == "cpu" and not torch.isfinite(dots).all():
            raise LogError(f"step {t}: a score is NaN or infinite; the sweep cannot pass this step (try dtype=torch.float64)")
        progress()
    if not torch.isfinite(scores).all():
        raise LogError("some scores are NaN or infinite (try dtype=torch.float64, or check=True to test the log)")
    return scores


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
