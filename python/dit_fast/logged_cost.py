"""What a score by logged factors will cost: FLOPs and memory from the factors of the first step, without sweeping."""

from collections.abc import Sequence
from typing import Any

from dit_fast import factor_products, gram, plan
from dit_fast.factor_run import FactorRun
from dit_fast.trajectory import Window


def logged_cost(
    run: FactorRun, windows: Sequence[Window], num_queries: int, budget: int, check: bool, by_rows: bool
) -> dict[str, Any]:
    """Fields of `ScoreEstimate` for the form that `score` would choose, but for those of the query; every step taken to be as
    the first. by_rows: whether the queries' gradients are at hand in factors.
    """
    trajectory = run.trajectory
    ends = sorted({t for window in windows for t in (window.start, window.stop)} - {0})
    made, _ = plan.columns(windows, num_queries)
    form, _ = gram.choose(run, windows, num_queries, budget, "auto", by_rows)
    in_samples, in_parameters, size = gram.costs(run, windows, num_queries, by_rows)
    gradient = gram.gradient_flops(run)
    if form == "gram":
        made, _ = plan.columns_by_endpoint(windows, num_queries)
        per_sweep, swept, memory = gram.columns_per_sweep(run, made, budget, by_rows), in_samples, size
    else:
        blocks = 1 + len(trajectory.slots)
        per_sweep = plan.columns_per_sweep(budget, run.num_parameters, run.num_samples, run.dtype.itemsize, blocks)
        swept = in_parameters
        # plain SGD updates its blocks in place
        beside = 0 if form == "fused" else plan.BLOCKS_PER_COLUMN
        together = min(per_sweep, len(made))
        memory = together * ((blocks + beside) * run.num_parameters * run.dtype.itemsize + 8 * run.num_samples)
        memory += 8 * len(made) * run.num_samples
    sweeps = -(-len(made) // per_sweep)
    is_linear = all(rule.is_linear for rule in trajectory.optimizer)
    if not is_linear or trajectory.clip:
        swept += sweeps * ends[-1] * gradient
    # the optimizer's state, and parameters for the l2 part, lie at the beginnings of segments
    needs_replay = not is_linear or (bool(run.l2) and trajectory.every > 1)
    replayed = sweeps * ends[-1] * gradient if needs_replay else 0
    checked = min(len({0, ends[-1] // 2, ends[-1] - 1}), ends[-1]) if trajectory.every == 1 else trajectory.segment(0)[1]
    # a step, and the one before it
    memory += 2 * sum(factor_products.num_bytes(factors) for factors in run.batches(0))
    return {
        "columns": len(made),
        "sweeps": sweeps,
        "backend": "factors",
        "columns_per_pull": None,
        "form": form,
        "sweep_flops": round(swept),
        "replay_flops": round(replayed + (checked * gradient if check and run.is_lossless else 0)),
        "memory_bytes": round(memory),
        "read_bytes": round(trajectory.num_bytes * ends[-1] / trajectory.num_steps) * (1 + sweeps),
    }
