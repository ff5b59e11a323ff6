"""The query's gradients at all ends of the windows, as the compiled sweep takes them: compiled too where they can be."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_fast import ops
from dit_fast.native import AGREEMENT, SLICE_NUMBERS, Native
from dit_fast.plan import Column
from dit_fast.problem import Evaluator
from dit_fast.queries import CHUNK, Query
from dit_fast.sweep import QueryGradients


def ends(columns: Sequence[Column]) -> list[int]:
    """The steps at which columns join or leave, latest first."""
    return sorted({t for column in columns for t in (column.start, column.stop) if t}, reverse=True)


def places(columns: Sequence[Column], num_rows: int) -> tuple[list[int], list[int]]:
    """For each column the rows of its query's gradients at its stop and at its start, among those at all `ends`; 0 for none."""
    points = ends(columns)
    first = {t: i * num_rows // len(points) for i, t in enumerate(points)}
    stops = [first[column.stop] + column.query for column in columns]
    return stops, [first[column.start] + column.query if column.start else 0 for column in columns]


def gradients(
    ev: Evaluator, compiled: Native, asked: Sequence[Query], points: Sequence[int], generic: QueryGradients
) -> Tensor:
    """q(t) at the points t, which fall, for Q queries, as rows [n·Q, P] laid out as θ.

    Compiled, all at once, where the query is a loss over a set of samples and the device the CPU. One of the points is then
    compared with the generic gradient: queries run in eval mode, of which the net was not read. Else `generic`.
    """
    flat = _compiled(ev, compiled, asked, points)
    if flat is None:
        return rows(ev, points, generic)
    # that of the latest point is likely at hand, but may be all rounding where the run has converged
    for i in (0, len(points) - 1):
        theirs = rows(ev, points[i : i + 1], generic)[0]
        if bool((flat[i] - theirs).abs().max() <= AGREEMENT[ev.dtype] * theirs.abs().max()):
            return flat
    return rows(ev, points, generic)


def rows(ev: Evaluator, points: Sequence[int], generic: QueryGradients) -> Tensor:
    """The same by generic(t), one point at a time, so that only one is there twice."""
    made = []
    for t in points:
        taken = generic(t)
        made.append(torch.cat([taken[name].flatten(1) for name in ev.shapes], 1))
    return torch.cat(made)


def _compiled(ev: Evaluator, compiled: Native, asked: Sequence[Query], points: Sequence[int]) -> Tensor | None:
    if compiled.engine != "cpu" or len(asked) != 1 or len(points) < 2 or len(points) * ev.num_parameters > SLICE_NUMBERS:
        return None
    if asked[0].batch is None:
        return None
    theta = _thetas(ev, points)
    args, kwargs, target = ev.unpack(asked[0].batch)
    recognized = compiled.recognized
    try:
        x, targets = recognized.inputs(*args, **kwargs), recognized.targets(target, ev.dtype)
        flat = torch.zeros_like(theta, memory_format=torch.contiguous_format)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            weights = torch.full((len(x[part]),), 1 / len(x), dtype=torch.float64)
            ops.mlp_gradient(recognized.net, theta, x[part], targets[part], weights, flat)
    except (TypeError, ValueError, RuntimeError):  # not the inputs or targets of this net
        return None
    return flat


def _thetas(ev: Evaluator, points: Sequence[int]) -> Tensor:
    """θ[t] for these t, falling, as rows [n, P]; from one piece of the log where they lie close together."""
    last, first = points[0], points[-1]
    if last - first < 4 * len(points):
        return ev.trajectory.rows(first, last + 1)[[t - first for t in points]].to(ev.dtype)
    return torch.cat([ev.trajectory.rows(t, t + 1) for t in points]).to(ev.dtype)
