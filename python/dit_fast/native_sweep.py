"""The compiled sweep of `native.py` by steps: all columns and a slice of the log in few calls of a compiled op."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit_fast import mlp, mlp_gemm, native, native_queries, ops
from dit_fast.errors import LogError
from dit_fast.linearize import Hessian
from dit_fast.native import Native
from dit_fast.plan import Column
from dit_fast.problem import Evaluator

# numbers of float32 in a vector register: rows of the first layer's block begin on cache lines
LINE = 16


def sweep(
    ev: Evaluator,
    columns: Sequence[Column],
    compiled: Native,
    hessian: Hessian,
    gradients: Tensor,
    num_samples: int,
    progress: Callable[..., object],
) -> Tensor:
    """Scores [K, N] float64, as `sweep.sweep` gives them; progress(n) is called after every n steps.

    gradients: of the queries at the columns' ends, [n·Q, P] (`native_queries`), taken first so that columns join and leave
    inside a call. Raises NotCompiled where data that is fetched on the way turns out to have targets of another kind.
    """
    K, last, net = len(columns), columns[0].stop, compiled.recognized.net
    visits = _visits(columns, gradients)
    gram = None
    if hessian != "none":  # first order costs half
        visited = K + sum(column.start is not None for column in columns)
        gram = native.inner_products(ev, compiled, sum(column.stop for column in columns), visited)
    O = net.layers[0].outputs
    per_line = LINE // O if LINE % O == 0 and K * O > 1 else 1
    capacity = -(-K // per_line) * per_line
    scores = torch.zeros(capacity, num_samples, dtype=torch.float64, device=ev.device)
    blocks = native.blocks(ev, compiled, capacity, gram)
    momenta = native.blocks(ev, compiled, capacity, gram) if compiled.momentum else None
    flops = native.flops_per_column(ev, compiled) * sum(column.stop for column in columns) / last
    t = last
    while t > 0:
        loaded = range(max(0, t - native.steps_per_slice(ev, compiled, t - 1)), t)
        engine = _engine(ev, compiled, hessian, loaded, blocks, momenta, scores, visits, gram)
        while t > loaded.start:
            start = max(loaded.start, t - max(1, int(native.CALL_FLOPS / flops)))
            bad = engine.run(start - loaded.start, t - loaded.start)
            if isinstance(engine, mlp_gemm.GemmSweep) and start == loaded.start:  # once a slice: it waits for the GPU
                bad = engine.bad_step()
            if bad is not None:
                bad += loaded.start
                raise LogError(
                    f"step {bad}: a score is NaN or infinite; the sweep cannot pass this step (try dtype=torch.float64)"
                )
            progress(t - start)
            t = start
    if not torch.isfinite(scores).all():
        raise LogError("some scores are NaN or infinite (try dtype=torch.float64, or check=True to test the log)")
    return scores[:K]


def _visits(columns: Sequence[Column], gradients: Tensor) -> mlp.MlpVisits:
    """When the columns join and leave, by steps of the log."""
    joins, leaves = torch.tensor([column.stop for column in columns]), torch.tensor([column.start or 0 for column in columns])
    joining, leaving = map(torch.tensor, native_queries.places(columns, len(gradients)))
    return mlp.MlpVisits(joins, leaves, joining, leaving, gradients)


def _engine(
    ev: Evaluator,
    compiled: Native,
    hessian: Hessian,
    loaded: range,
    blocks: Sequence[Tensor | None],
    momenta: Sequence[Tensor | None] | None,
    scores: Tensor,
    visits: mlp.MlpVisits,
    gram: Tensor | None,
) -> ops.MlpSweep | mlp_gemm.GemmSweep:
    steps, net = native.load_steps(ev, compiled, loaded), compiled.recognized.net
    own = replace(visits, joins=visits.joins - loaded.start, leaves=visits.leaves - loaded.start)
    options: dict[str, Any] = {"l2": ev.l2, "hessian": hessian}
    if compiled.engine == "gemm":
        return mlp_gemm.GemmSweep(net, steps, blocks, momenta, scores, own, **options)
    return ops.MlpSweep(net, steps, blocks, momenta, scores, own, gram=gram, **options)
