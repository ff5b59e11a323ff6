"""The compiled sweep of `native.py` on a GPU: all columns and a slice of the log in one launch of `mlp_team.TeamSweep`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_fast import mlp_team, native, native_queries
from dit_fast.errors import LogError
from dit_fast.linearize import Hessian
from dit_fast.native import Native
from dit_fast.plan import Column
from dit_fast.problem import Evaluator


def sweep(
    ev: Evaluator,
    columns: Sequence[Column],
    compiled: Native,
    hessian: Hessian,
    gradients: Tensor,
    num_samples: int,
    progress: Callable[..., object],
) -> Tensor:
    """Scores [K, N] float64 on the device, as `sweep.sweep` gives them; progress(n) is called after every n steps.

    gradients: of the queries at the columns' ends, [n·Q, P] (`native_queries`). Raises NotCompiled as `native_sweep.sweep`.
    """
    K, last = len(columns), columns[0].stop
    scores = torch.zeros(K, num_samples, dtype=torch.float64, device=ev.device)
    joining, leaving = native_queries.places(columns, len(gradients))
    blocks = _query_blocks(ev, compiled, gradients, joining)
    left = _query_blocks(ev, compiled, gradients, leaving) if any(column.start for column in columns) else None
    momenta = native.blocks(ev, compiled, K) if compiled.momentum else None
    stops = torch.tensor([column.stop for column in columns], device=ev.device)
    starts = torch.tensor([column.start or 0 for column in columns], device=ev.device)
    team = compiled.team(ev, K, hessian)
    t = last
    while t > 0:
        loaded = range(max(0, t - native.steps_per_slice(ev, compiled, t - 1)), t)
        steps = native.load_steps(ev, compiled, loaded)
        joins, leaves = stops - loaded.start, starts - loaded.start
        engine = mlp_team.TeamSweep(
            compiled.recognized.net, steps, blocks, momenta, scores, joins, leaves, left, team, l2=ev.l2, hessian=hessian
        )
        engine.run()
        bad = engine.bad_step()
        if bad is not None:
            bad += loaded.start
            raise LogError(f"step {bad}: a score is NaN or infinite; the sweep cannot pass this step (try dtype=torch.float64)")
        progress(len(loaded))
        t = loaded.start
    if not torch.isfinite(scores).all():
        raise LogError("some scores are NaN or infinite (try dtype=torch.float64, or check=True to test the log)")
    return scores


def _query_blocks(ev: Evaluator, compiled: Native, gradients: Tensor, places: Sequence[int]) -> list[Tensor | None]:
    """A column's block for each of these rows of the gradients."""
    blocks = native.blocks(ev, compiled, len(places))
    # all columns of a parameter at once: copies column by column would be thousands of launches
    rows = native.split(ev, gradients[torch.tensor(places, device=ev.device)])
    for name, block in native.by_name(ev, compiled, blocks).items():
        block.copy_(rows[name])
    return blocks
