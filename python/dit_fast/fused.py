"""The sweep over factors under plain SGD: no momentum, no clipping, no l2 in the losses.

c = ∓η u is then u itself but for a number, so no cotangent and no Hessian product are made: the dots of a step are taken
of u as it is, and the step's update goes straight into u.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_fast import factor_products
from dit_fast.errors import LogError
from dit_fast.factor_run import FactorRun
from dit_fast.plan import Column
from dit_fast.sweep import QueryGradients, join_and_leave


def fits(run: FactorRun) -> bool:
    """Whether the run was plain SGD at every step."""
    trajectory = run.trajectory
    return not trajectory.slots and not run.l2 and not trajectory.clip and all(rule.is_linear for rule in trajectory.optimizer)


def sweep(
    run: FactorRun,
    columns: Sequence[Column],
    query_gradients: QueryGradients,
    num_samples: int,
    progress: Callable[[], object],
) -> Tensor:
    """Scores [K, N] float64, as `sweep.sweep` gives them."""
    scores = torch.zeros(len(columns), num_samples, dtype=torch.float64, device=run.device)
    u = {n: torch.zeros(len(columns), *shape, dtype=run.dtype, device=run.device) for n, shape in run.shapes.items()}
    ends = {t for column in columns for t in (column.start, column.stop) if t}
    active = 0
    ready: Tensor | None = None  # ⟨u, J⟩ of the step at hand, out of the update before
    for t in reversed(range(columns[0].stop)):
        if t + 1 in ends:
            active = join_and_leave(t + 1, columns, u, query_gradients(t + 1))
        travelling = {name: block[:active] for name, block in u.items()}
        rates, decays = _rates(run, t)
        batches = run.batches(t)
        if ready is None:
            along = [factor_products.row_dots(factors, travelling, rates) for factors in batches]
        else:
            along = [ready.mul_(next(iter(rates.values())))]
        for factors, row_dots in zip(batches, along, strict=True):
            dots = factor_products.sample_dots(factors, row_dots)
            scores[:active].index_add_(1, factors.ids, dots * factors.coefficients, alpha=-1)
            if run.device.type == "cpu" and not torch.isfinite(dots).all():
                raise LogError(
                    f"step {t}: a score is NaN or infinite; the sweep cannot pass this step (try dtype=torch.float64)"
                )
        ready = _update(run, t, travelling, decays, along, t in ends) if t else None
        progress()
    if not torch.isfinite(scores).all():
        raise LogError("some scores are NaN or infinite (try dtype=torch.float64)")
    return scores


def _update(
    run: FactorRun, t: int, u: dict[str, Tensor], decays: dict[str, float], along: list[Tensor], is_end: bool
) -> Tensor | None:
    """u over step t in place, from the row dots of c; those of u with step t − 1 where one pass gives both."""
    batches = run.batches(t)
    alike = set(decays.values())
    if not run.has_curvature or len(alike) > 1:
        for name, decay in decays.items():
            if decay != 1:
                u[name].mul_(decay)
        alike = {1.0}
    if not run.has_curvature:
        return None
    alpha = alike.pop()
    weights = [factor_products.curvature_weights(f, dots) for f, dots in zip(batches, along, strict=True)]
    before = run.batches(t - 1)
    can_share = len(batches) == len(before) == 1 and len(set(_rates(run, t - 1)[0].values())) == 1
    if can_share and not is_end and factor_products.are_alike(batches[0], before[0]):
        return factor_products.add_rows_and_dot(batches[0], weights[0], before[0], u, alpha)
    for factors, own in zip(batches, weights, strict=True):
        factor_products.add_rows(factors, own, u, alpha)
        alpha = 1.0
    return None


def _rates(run: FactorRun, t: int) -> tuple[dict[str, float], dict[str, float]]:
    """For every parameter the numbers that make c of u, ∓η, and that the decay leaves of u, 1 − η·wd."""
    trajectory = run.trajectory
    settings, groups, absent = trajectory.settings(t), trajectory.groups, trajectory.absent(t)
    rates, decays = {}, {}
    for name in run.shapes:
        values = settings[groups[name]]
        is_absent = name in absent
        rates[name] = 0.0 if is_absent else values["lr"] if values["maximize"] else -values["lr"]
        decays[name] = 1.0 if is_absent else 1 - values["lr"] * values["weight_decay"]
    return rates, decays
