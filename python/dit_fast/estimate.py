"""What a score and true retraining will cost, before either is run: FLOPs, memory and bytes read."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_fast import plan, queries
from dit_fast.byte_sizes import format_bytes
from dit_fast.linearize import Hessian, linearize
from dit_fast.logged import Asked, has_factors, open_run
from dit_fast.logged_cost import logged_cost
from dit_fast.problem import Evaluator, Params, Problem
from dit_fast.queries import Query
from dit_fast.replay import Replay
from dit_fast.retrain import bytes_per_model, models_at_once
from dit_fast.score import check_options, choose_sweep
from dit_fast.trajectory import Trajectory, Window

Result = TypeVar("Result")

# FLOPs of one batch's linearisation and of each column, as multiples of those of its forward pass F (design §1). The first
# layer that inputs go into takes less, since no gradient of the inputs is wanted: exact 2F, none 1F
SHARED = {"exact": 3, "ggn": 5, "fisher": 3, "none": 3}
PER_COLUMN = {"exact": 6, "ggn": 4, "fisher": 4, "none": 2}
PER_COLUMN_FACTORS = {"fisher": 2, "ggn": 2, "none": 1}
PER_COLUMN_FORWARD_OVER_REVERSE = 9
# the compiled sweep takes no weight gradient of its own: forward and backward once, then dual numbers per column
SHARED_NATIVE = 2
PER_COLUMN_NATIVE = {"exact": 6, "ggn": 4, "none": 1}
# layer by layer: forward, backward to the layers' outputs where H needs it; per column the tangents of both, and of the
# weight gradient. Adam and clipping want the gradient as well
SHARED_LAYERWISE = {"exact": 2, "ggn": 1, "none": 1}
SHARED_LAYERWISE_WITH_GRADIENT = 3
PER_COLUMN_LAYERWISE = {"exact": 6, "ggn": 4, "none": 2}
# a forward and a backward pass
GRADIENT = 3


@dataclass(frozen=True, repr=False)
class RetrainEstimate:
    """What `leave_one_out` will cost, every sample being visited from the first step on: at most this.

    models: one per sample, models_at_once of them advancing together, in so many passes over the run.
    flops, memory_bytes, read_bytes: as in `ScoreEstimate`.
    """

    models: int
    models_at_once: int
    passes: int
    flops: int
    memory_bytes: int
    read_bytes: int

    def __repr__(self) -> str:
        return f"RetrainEstimate({self.models:,} models, {self.passes} passes: {_cost(self)})"


@dataclass(frozen=True, repr=False)
class ScoreEstimate:
    """What `score` will cost. FLOPs count products and convolutions as torch's FlopCounterMode does (2 per multiplication
    with addition), every step taken to be as large as the first; memory and bytes read are in bytes.

    columns: adjoint columns, K. sweeps: passes over the log that they take within the memory budget.
    backend, columns_per_pull: as `result.meta` will say; None where the backend needs no choice. form: of the sweep over
        logged factors, "sweep", "fused" or "gram" (sample space), as `result.meta["form"]`; None where none are used.
    forward_flops: F, the forward pass of one step's batch; all else is a multiple of it. 0 without a problem.
    sweep_flops: linearisations and columns. replay_flops: the steps between snapshots, and the guard's.
    query_flops: the query's gradients at the ends of the windows. flops: all of these.
    memory_bytes: peak, beside the model and the data: blocks, one batch's graph, replayed points, scores; within a factor of
        two of what was measured.
    read_bytes: of the log: once for its checksums, once per sweep. 0 for a run made from arrays.
    retraining: the same for `leave_one_out` of all samples asked for; None where that is refused, its reason in
        retraining_refused.
    """

    columns: int
    sweeps: int
    backend: str
    columns_per_pull: int | None
    forward_flops: int
    sweep_flops: int
    replay_flops: int
    query_flops: int
    memory_bytes: int
    read_bytes: int
    retraining: RetrainEstimate | None
    retraining_refused: str | None = None
    form: str | None = None

    @property
    def flops(self) -> int:
        """Of everything."""
        return self.sweep_flops + self.replay_flops + self.query_flops

    def __repr__(self) -> str:
        return (
            f"ScoreEstimate({self.columns:,} columns, {self.sweeps} sweeps, {self.backend}"
            f"{f' ({self.form})' if self.form else ''}: {_cost(self)}; "
            f"{self.retraining or self.retraining_refused})"
        )


def estimate_score(
    trajectory: Trajectory,
    problem: Problem | None = None,
    query: Query | Sequence[Query] | None = None,
    windows: Any = None,
    *,
    sample_ids: Any = None,
    hessian: Hessian = "exact",
    query_at: str = "endpoint",
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_budget: int | float | str | None = None,
    check: bool = True,
) -> ScoreEstimate:
    """What `score` with these arguments will cost, and `leave_one_out` of the same samples beside it.

    One batch is linearised and the query is asked once; nothing is swept. Of a log a few chunks are read. Arguments are those
    of `score`, and so are errors, but for those of its check and its sweep. Of a log with factors, without a problem or with
    backend="factors", it is those that are counted; retraining then still needs the problem.
    """
    check_options(hessian, query_at, "adjoint", backend, 0)
    if problem is None and backend not in ("auto", "factors"):
        raise ValueError(f"backend={backend!r} needs a problem; without one the log's factors are scored")
    if problem is None or (backend == "factors" and has_factors(trajectory)):
        by_factors = _by_factors(
            trajectory, problem, query, windows, sample_ids, hessian, query_at, dtype, device, memory_budget, check
        )
        if problem is None:
            by_factors |= {"forward_flops": 0, "query_flops": 0}
            return ScoreEstimate(**by_factors, retraining=None, retraining_refused="retraining needs a problem")
    else:
        by_factors = {}
    ev = Evaluator.create(problem, trajectory, device, dtype)
    given: Any = query
    spans, ids, asked = trajectory.windows(windows), ev.select(sample_ids), queries.as_list(given)
    with ev.session():
        budget = plan.memory_budget(memory_budget, ev.device)
        cost = _Cost(ev, asked, spans, budget, check)
        adjoint = _adjoint(cost, hessian, backend) if not by_factors else cost.with_query(by_factors)
        try:
            retraining, refused = _retraining(cost, len(ids)), None
        except ValueError as error:
            retraining, refused = None, str(error)
    return ScoreEstimate(**adjoint, retraining=retraining, retraining_refused=refused)


def choose_method(
    trajectory: Trajectory,
    problem: Problem,
    query: Query | Sequence[Query],
    windows: Any,
    *,
    query_at: str,
    refine: int,
    **options: Any,
) -> tuple[str, str]:
    """ "adjoint" or "retrain", whichever takes fewer FLOPs for these arguments of `score`, and why."""
    if query_at == "final":
        return "adjoint", "query_at='final' cannot be retrained"
    cost = estimate_score(trajectory, problem, query, windows, query_at=query_at, check=False, **options)
    if cost.retraining is None:
        return "adjoint", str(cost.retraining_refused)
    names = {"adjoint": float(cost.flops), "retrain": float(cost.retraining.flops)}
    # the samples that are refined are at least so many
    names["adjoint"] += names["retrain"] * min(1, refine / max(cost.retraining.models, 1))
    chosen = min(names, key=lambda name: names[name])
    return chosen, " and ".join(f"{name} takes {_format_flops(flops)}" for name, flops in names.items())


def _by_factors(
    trajectory: Trajectory,
    problem: Problem | None,
    query: Any,
    windows: Any,
    sample_ids: Any,
    hessian: Hessian,
    query_at: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    memory_budget: int | float | str | None,
    check: bool,
) -> dict[str, Any]:
    """`logged_cost` of these arguments of `score`."""
    spans = trajectory.windows(windows)
    run = open_run(trajectory, hessian, device, dtype)
    run.select(sample_ids)
    with torch.inference_mode(False), torch.no_grad():
        budget = plan.memory_budget(memory_budget, run.device)
        asked = Asked(run, problem, query, query_at, spans, budget)
        return logged_cost(run, spans, asked.size, budget, check, asked.rows is not None)


class _Cost:
    """What both estimates need to know of the run, the query and the budget."""

    def __init__(self, ev: Evaluator, asked: list[Query], windows: list[Window], budget: int, check: bool) -> None:
        trajectory = ev.trajectory
        self.ev, self.asked, self.windows, self.budget = ev, asked, windows, budget
        self.ends = sorted({t for window in windows for t in (window.start, window.stop)} - {0})
        self.sizes = queries.sizes(ev, asked)
        params, batches = ev.params(0), ev.batches(0)
        with torch.no_grad():
            self.forward = sum(count_flops(partial(ev.losses, params, batch))[0] for batch in batches)
        # (forward pass, values it gives) of every part of every query
        self.query_parts = [part for query in asked for part in _query_parts(ev, params, query)]
        self.num_blocks = 1 + len(trajectory.slots)
        self.parameter_bytes = ev.num_parameters * ev.dtype.itemsize
        # the gradient that Adam and clipping need comes out of the linearisation, but for micro-batches
        self.needs_gradient = bool(trajectory.clip) or not all(rule.is_linear for rule in trajectory.optimizer)
        self.extra_gradient = GRADIENT * self.forward if self.needs_gradient and len(batches) > 1 else 0
        self.replay_is_needed = Replay(ev, not all(rule.is_linear for rule in trajectory.optimizer), 0).is_needed
        self.point_bytes = self.num_blocks * self.parameter_bytes
        self.room = max(int(plan.REPLAY_SHARE * budget) // max(self.point_bytes, 1), 2)
        self.guard = self._guard() if check else 0
        self.log_bytes = _log_bytes(trajectory, self.ends[-1])

    def replay(self, stop: int) -> int:
        """FLOPs of one pass over the steps before `stop` in which what is not stored is replayed."""
        if not self.replay_is_needed:
            return 0
        start, end = self.ev.trajectory.segment(0)
        # where a segment's points do not fit, it is passed over once more with checkpoints
        return stop * GRADIENT * self.forward * (1 if end - start <= self.room else 2)

    def replayed_bytes(self) -> int:
        """Points held at once."""
        if not self.replay_is_needed:
            return self.parameter_bytes
        start, end = self.ev.trajectory.segment(0)
        return self.point_bytes * (end - start if end - start <= self.room else 2 * math.isqrt(end - start) + 1)

    def query(self, per_value: int) -> int:
        """FLOPs of the query once, `per_value` forward passes for each of its values beside the forward pass itself."""
        return sum(forward * (1 + per_value * values) for forward, values in self.query_parts)

    def with_query(self, by_factors: dict[str, Any]) -> dict[str, Any]:
        """The cost of a score by logged factors, and that of the problem's query: its replay and its gradients."""
        asked = by_factors["sweeps"] * len(self.ends) * self.query(per_value=2)
        replayed = by_factors["replay_flops"] + (self.replay(self.ends[-1]) if self.ev.trajectory.every > 1 else 0)
        memory = by_factors["memory_bytes"] + self.replayed_bytes() + self.parameter_bytes * sum(self.sizes)
        mine = {"forward_flops": self.forward, "query_flops": asked, "replay_flops": replayed, "memory_bytes": memory}
        return by_factors | mine

    def _guard(self) -> int:
        last = self.ends[-1]
        steps = sorted({0, last // 2, last - 1})
        needs_replay = Replay(self.ev, True, 0).is_needed
        replayed = {self.ev.trajectory.segment(t) for t in steps if t} if needs_replay else set()
        return GRADIENT * self.forward * (len(steps) + sum(stop - start for start, stop in replayed))


def _adjoint(cost: _Cost, hessian: Hessian, backend: str) -> dict[str, Any]:
    ev, num_samples = cost.ev, cost.ev.num_samples
    made, mix = plan.columns(cost.windows, sum(cost.sizes))
    per_sweep = plan.columns_per_sweep(cost.budget, ev.num_parameters, num_samples, ev.dtype.itemsize, cost.num_blocks)
    chunks = [made[start : start + per_sweep] for start in range(0, len(made), per_sweep)]
    _, meta = choose_sweep(ev, hessian, backend, min(per_sweep, len(made)), Replay(ev, False, 0), cost.budget, [])
    shared, per_column = SHARED[hessian], PER_COLUMN[hessian]
    if meta["backend"] == "factors":
        per_column = PER_COLUMN_FACTORS[hessian]
    elif meta["backend"] == "native":
        shared, per_column = SHARED_NATIVE, PER_COLUMN_NATIVE[hessian]
    elif meta["backend"] == "layerwise":
        shared = SHARED_LAYERWISE_WITH_GRADIENT if cost.needs_gradient else SHARED_LAYERWISE[hessian]
        per_column = PER_COLUMN_LAYERWISE[hessian]
    elif meta["mode"] == "forward_over_reverse":
        per_column = PER_COLUMN_FORWARD_OVER_REVERSE
    swept = replayed = asked = 0
    for chunk in chunks:
        stop = chunk[0].stop
        # a column travels from its stop down to 0
        swept += stop * (shared * cost.forward + cost.extra_gradient) + per_column * cost.forward * sum(c.stop for c in chunk)
        replayed += cost.replay(stop)
        asked += len({t for c in chunk for t in (c.start, c.stop) if t}) * cost.query(per_value=2)
    together = min(per_sweep, len(made))
    pull = meta.get("columns_per_pull", together)
    params, batch = ev.params(0), ev.batches(0)[0]
    samples = meta.get("samples_per_pull", len(batch.ids))
    graph = plan.graph_bytes(lambda: linearize(ev, params, batch, hessian, meta.get("mode", "double_backward")))
    # the compiled sweep on the CPU makes a column's cotangent and product on the way, but keeps its query's gradient
    beside = 1 if meta["backend"] == "native" and ev.device.type == "cpu" else plan.BLOCKS_PER_COLUMN
    memory = (
        together * (cost.num_blocks + beside) * cost.parameter_bytes
        + graph
        + graph * plan.GRAPHS_PER_COLUMN * pull * samples // max(len(batch.ids), 1)
        + cost.parameter_bytes * (1 + sum(cost.sizes))
        + cost.replayed_bytes()
        + 8 * num_samples * (together + len(made) + mix.shape[0])
    )
    return {
        "columns": len(made),
        "sweeps": len(chunks),
        "backend": meta["backend"],
        "columns_per_pull": meta.get("columns_per_pull"),
        "forward_flops": cost.forward,
        "sweep_flops": swept,
        "replay_flops": replayed + cost.guard,
        "query_flops": asked,
        "memory_bytes": memory,
        "read_bytes": cost.log_bytes * (1 + len(chunks)),
    }


def _retraining(cost: _Cost, models: int) -> RetrainEstimate:
    if any(query.by_step is not None for query in cost.asked):
        raise ValueError("queries.gradients has no value, only gradients: it cannot be retrained")
    stop, at_once = cost.ends[-1], models_at_once(cost.ev, cost.budget)
    passes = math.ceil(models / at_once)
    # the logged model goes along in every pass
    flops = (models + passes) * (stop * GRADIENT * cost.forward + len(cost.ends) * cost.query(per_value=0))
    memory = bytes_per_model(cost.ev) * (min(models, at_once) + 1) + cost.replayed_bytes()
    memory += 8 * models * sum(cost.sizes) * (len(cost.ends) + len(cost.windows))
    return RetrainEstimate(
        models=models,
        models_at_once=at_once,
        passes=passes,
        flops=flops + passes * cost.replay(stop) + cost.guard,
        memory_bytes=memory,
        read_bytes=cost.log_bytes * (1 + passes),
    )


def count_flops(run: Callable[[], Result]) -> tuple[int, Result]:
    """FLOPs of the products, convolutions and attention in run() by torch's FlopCounterMode, and what it returned."""
    counter = FlopCounterMode(display=False)
    # its tracker of modules, which is not needed, forbids autograd.grad within a forward pass
    counter.mod_tracker = _NoTracker()  # type: ignore[assignment]
    with counter:
        result = run()
    return counter.get_total_flops(), result


class _NoTracker(nullcontext[None]):
    parents = frozenset({"Global"})


def _query_parts(ev: Evaluator, params: Params, query: Query) -> list[tuple[int, int]]:
    if query.by_step is not None:
        return []
    counted = []
    with ev.eval_mode():
        for part in query.parts:
            flops, values = count_flops(partial(queries.part_values, ev, params, part))
            counted.append((flops, len(values)))
    return counted


def _log_bytes(trajectory: Trajectory, stop: int) -> int:
    """Bytes of the chunks that hold the steps before `stop`, in proportion to all steps."""
    return round(trajectory.num_bytes * stop / trajectory.num_steps)


def _cost(estimate: ScoreEstimate | RetrainEstimate) -> str:
    return (
        f"{_format_flops(estimate.flops)}, {format_bytes(estimate.memory_bytes)} of memory, "
        f"{format_bytes(estimate.read_bytes)} read"
    )


def _format_flops(flops: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if flops < 999.5:
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops:.3g} EFLOP"
