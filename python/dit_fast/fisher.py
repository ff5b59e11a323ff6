"""Whether a run's steps were small enough for the empirical Fisher in the place of the Hessian.

A change of the parameters goes through a step of SGD as (I − ηF) d. Where training converges ηH is small, but F is another
matrix: where ηF has eigenvalues above 1 a step turns what it ought to shrink, above 2 it makes it grow. On the nets of
`bench/bench_fidelity.py` scores were good where this was 0.4 and 0.7, meaningless late in the runs where it was 1.8 and 3.8.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dit_fast.problem import Params
from dit_fast.replay import Run
from dit_fast.sweep import Linearizer

LIMIT = 1.0
# steps looked at: one in so many, and at most so many
SPACING, MOST = 16, 8
# products with the Fisher to find its largest eigenvalue; fewer make it smaller, never larger
ITERATIONS = 6


def fisher_step(run: Run, largest: Callable[[int], float], stop: int) -> float | None:
    """The largest eigenvalue of rate times Fisher that a quarter of the steps looked at before `stop` reach, η as in `rates`.

    largest(t): that of step t. None for other optimizers and clipped gradients.
    """
    trajectory = run.trajectory
    if trajectory.clip or not all(rule.is_linear for rule in trajectory.optimizer):
        return None
    size = min(MOST, 1 + stop // SPACING)
    # in the order of the sweep, in which replayed steps are cheapest
    steps = [stop * (i + 1) // size - 1 for i in reversed(range(size))]
    found = sorted((largest(t) for t in steps), reverse=True)
    return found[(len(found) - 1) // 4]


def warn_where_it_overshoots(meta: Mapping[str, Any], stacklevel: int) -> None:
    """One RuntimeWarning where `meta["fisher_step"]` is above 1; stacklevel 1 is the caller."""
    found = meta.get("fisher_step")
    if found is not None and found > LIMIT:
        warnings.warn(
            f"hessian='fisher' overshoots: the rate times its largest eigenvalue is {found:.3g}, above 1 (from 2 on scores "
            "grow without bound); do not trust windows late in the run, or take hessian='ggn' or 'exact'",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )


def largest_eigenvalue(run: Run, linearize: Linearizer, params_at: Callable[[int], Params], t: int) -> float:
    """Of D^½ F D^½ for the rates D, by power iteration: its Rayleigh quotient, which is never above the eigenvalue.

    linearize: with the Fisher, its l2 part included. params_at(t): θ[t].
    """
    roots = {name: rate**0.5 for name, rate in rates(run, t).items()}
    params = params_at(t)
    pulls = [linearize(params, batch)[1] for batch in run.batches(t)]
    generator = torch.Generator().manual_seed(0)
    u: Params = {n: torch.randn(1, *shape, generator=generator).to(run.device, run.dtype) for n, shape in run.shapes.items()}
    found = 0.0
    for _ in range(ITERATIONS):
        size = sum(float(value.double().square().sum()) for value in u.values()) ** 0.5
        if not 0 < size < float("inf"):
            return found
        u = {name: value / size for name, value in u.items()}
        direction = {name: value * roots[name] for name, value in u.items()}
        products = [pull(direction)[1] for pull in pulls]
        after = {name: sum(product[name] for product in products) * roots[name] for name in u}
        found = sum(float((after[name] * u[name]).double().sum()) for name in u)
        u = after
    return found


def rates(run: Run, t: int) -> dict[str, float]:
    """Per parameter, the rate of plain SGD that becomes unstable at the same curvature; 0 where no step was taken.

    With momentum μ that is η / (1 + μ), under Nesterov's rule η (1 + 2μ) / (1 + μ) (O'Donoghue & Candès 2015, §4).
    """
    settings, groups, absent = run.trajectory.settings(t), run.trajectory.groups, run.trajectory.absent(t)
    found = {}
    for name in run.shapes:
        values = settings[groups[name]]
        momentum = values["momentum"]
        rate = values["lr"] / (1 + momentum) * (1 - values["dampening"] if momentum else 1.0)
        found[name] = 0.0 if name in absent else rate * (1 + 2 * momentum if values["nesterov"] else 1.0)
    return found
