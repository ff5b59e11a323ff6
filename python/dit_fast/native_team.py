"""The compiled sweep of `native.py` on a GPU: all columns and a slice of the log in one launch of `mlp_team.TeamSweep`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_fast import mlp_team, native
from dit_fast.errors import LogError
from dit_fast.linearize import Hessian
from dit_fast.native import Native
from dit_fast.plan import Column
from dit_fast.problem import Evaluator, Params
from dit_fast.sweep import QueryGradients


def sweep(
    ev: Evaluator,
    columns: Sequence[Column],
    compiled: Native,
    hessian: Hessian,
    query_gradients: QueryGradients,
    num_samples: int,
    progress: Callable[..., object],
) -> Tensor:
    """Scores [K, N] float64 on the device, as `sweep.sweep` gives them; progress(n) is called after every n steps.

    The query's gradients are taken first, so that columns join and leave inside the launch. Raises NotCompiled as
    `native_sweep.sweep`.
    """
    K, last = len(columns), columns[0].stop
    scores = torch.zeros(K, num_samples, dtype=torch.float64, device=ev.device)
    blocks, left = _query_blocks(ev, columns, compiled, query_gradients)
    momenta = native.make_blocks(ev, compiled, K) if compiled.momentum else None
    names, net = compiled.recognized.parameters, compiled.recognized.net
    own, own_momenta, own_left = (
        None if b is None else [None if name is None else b[name] for name in names] for b in (blocks, momenta, left)
    )
    assert own is not None
    stops = torch.tensor([column.stop for column in columns], device=ev.device)
    starts = torch.tensor([column.start or 0 for column in columns], device=ev.device)
    team = compiled.team(ev, K, hessian)
    t = last
    while t > 0:
        loaded = range(max(0, t - native.steps_per_slice(ev, compiled, t - 1)), t)
        steps = native.load_steps(ev, compiled, loaded)
        joins, leaves = stops - loaded.start, starts - loaded.start
        engine = mlp_team.TeamSweep(
            net, steps, own, own_momenta, scores, joins, leaves, own_left, team, l2=ev.l2, hessian=hessian
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


def _query_blocks(
    ev: Evaluator, columns: Sequence[Column], compiled: Native, query_gradients: QueryGradients
) -> tuple[Params, Params | None]:
    """q(stop) of every column, and q(start) where any has one."""
    points = sorted({t for column in columns for t in (column.start, column.stop) if t}, reverse=True)
    taken = [query_gradients(t) for t in points]
    num_queries = len(next(iter(taken[0].values())))
    # together in one tensor per parameter: copies column by column would be thousands of launches
    stacked = {name: torch.cat([gradients[name] for gradients in taken]) for name in ev.shapes}
    place = {t: num_queries * i for i, t in enumerate(points)}

    def blocks(ends: Sequence[int | None]) -> Params:
        rows = [place[t] + column.query if t else 0 for t, column in zip(ends, columns, strict=True)]
        index = torch.tensor(rows, device=ev.device)
        made = native.make_blocks(ev, compiled, len(columns))
        for name, block in made.items():
            block.copy_(stacked[name][index])
        return made

    starts = [column.start for column in columns]
    return blocks([column.stop for column in columns]), blocks(starts) if any(starts) else None
