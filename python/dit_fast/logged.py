"""score() of a log with factors: no model, no data, and no parameters where the optimizer's rule asks for none."""

import math
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_fast import factor_products, factors, fused, gram, numerics, plan, queries
from dit_fast.errors import UnsupportedError
from dit_fast.factor_run import BarePoints, FactorRun, check_factors, points
from dit_fast.factored import Factors
from dit_fast.fisher import fisher_step, largest_eigenvalue, rates
from dit_fast.linearize import Hessian
from dit_fast.problem import Batch, Evaluator, Params, Problem, default_dtype
from dit_fast.progress import progress_bar
from dit_fast.queries import Query
from dit_fast.replay import Replay
from dit_fast.result import Influence
from dit_fast.sweep import QueryGradients, sweep
from dit_fast.trajectory import Trajectory, Window


def score_logged(
    trajectory: Trajectory,
    problem: Problem | None,
    query: Query | Sequence[Query] | None,
    windows: Any = None,
    *,
    sample_ids: Any = None,
    hessian: Hessian = "fisher",
    query_at: str = "endpoint",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_budget: int | float | str | None = None,
    check: bool = True,
    show_progress: bool | None = None,
    form: str = "auto",
) -> Influence:
    """`score` by the factors in the log; a problem, where there is one, is asked for the query's gradients alone.

    form: "sweep", "fused" (plain SGD), "gram" (sample space, gram.py), or "auto" = the cheapest that fits.
    """
    began = time.perf_counter()
    spans = trajectory.windows(windows)
    run = open_run(trajectory, hessian, device, dtype)
    ids = run.select(sample_ids)
    with numerics.full_precision(), torch.inference_mode(False), torch.no_grad():
        budget = plan.memory_budget(memory_budget, run.device)
        if check:
            check_factors(run, max(window.stop for window in spans), int(plan.REPLAY_SHARE * budget))
        asked = Asked(run, problem, query, query_at, spans, budget)
        scores, meta = swept(run, spans, asked, asked.size, budget, check, show_progress, form, asked.rows)
        if hessian == "fisher":
            meta["fisher_step"] = fisher_step_of(run, max(window.stop for window in spans))
    return Influence(
        scores=scores[..., ids],
        windows=spans,
        queries=asked.names,
        sample_ids=ids,
        meta=run.describe()
        | {"method": "adjoint", "hessian": hessian, "query_at": query_at, "backend": "factors"}
        | meta
        | {"seconds": time.perf_counter() - began},
    )


def open_run(
    trajectory: Trajectory, hessian: Hessian, device: torch.device | str | None, dtype: torch.dtype | None
) -> FactorRun:
    """The factors of a log on a device (None: the CPU) and in a dtype (None: that of `default_dtype`).

    ValueError where the log has none.
    """
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"trajectory must be a dit_fast.Trajectory, got {type(trajectory).__name__}")
    layout = trajectory.factor_layout
    if layout is None:
        raise ValueError(
            "the log holds no factors, so it cannot be scored without a problem: give Problem(model, loss, data), or log "
            "the run with Recorder(factors=True)"
        )
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    return FactorRun(trajectory, layout, hessian, torch.device(device or "cpu"), dtype or default_dtype(trajectory))


def has_factors(trajectory: Trajectory) -> bool:
    """Whether the log holds factors."""
    return trajectory.factor_layout is not None


class Asked:
    """The queries of a score by factors: their names, and q(t) as one block of the factors' shapes.

    query None: those that were marked in the log.
    """

    def __init__(
        self,
        run: FactorRun,
        problem: Problem | None,
        query: Query | Sequence[Query] | None,
        query_at: str,
        windows: Sequence[Window],
        budget: int,
    ) -> None:
        self._run, self._query_at = run, query_at
        trajectory = run.trajectory
        ends = sorted({t for window in windows for t in (window.start, window.stop)} - {0})
        needed = ends if query_at == "endpoint" else [trajectory.num_steps]
        labels: list[str] | None = None
        if query is None:
            found, labels = marked(trajectory, needed)
            self._queries = [found]
        else:
            self._queries = queries.as_list(query)
        self._ev: Evaluator | None = None
        live = [query for query in self._queries if query.by_step is None]
        if live:
            if problem is None:
                raise ValueError(
                    f"query {live[0].label!r} needs the problem: give it, or queries.gradients({{step: ...}}), "
                    "or mark it while training: recorder.mark(name, query=query)"
                )
            self._ev = Evaluator.create(problem, trajectory, run.device, run.dtype)
            if self._ev.l2 != run.l2:
                raise ValueError(f"the problem has l2={self._ev.l2:g}, the log's factors were recorded with l2={run.l2:g}")
            self._replay = Replay(self._ev, False, int(plan.REPLAY_SHARE * budget))
        for query in self._queries:
            for t in needed if query.by_step is not None else []:
                queries.ready_at(query.by_step or {}, t)
        self.rows: gram.QueryRows | None = None
        if self._ev is not None and len(self._queries) == 1 and query_at == "endpoint":
            self.rows = query_rows(run, self._ev, self._replay, self._queries[0])
        sizes = [query.size or 0 for query in self._queries]
        if self._ev is not None:
            with self._ev.session():
                sizes = queries.sizes(self._ev, self._queries)
        self.size = sum(sizes)
        self.names = labels or queries.names(self._queries, sizes)
        self._at = lru_cache(maxsize=1)(self._gradients_at)

    def __call__(self, t: int) -> Params:
        """q(t), one block [Q, *shape] per parameter covered."""
        return self._at(t if self._query_at == "endpoint" else self._run.trajectory.num_steps)

    def _gradients_at(self, t: int) -> Params:
        blocks = [self._gradient(t, query) for query in self._queries]
        return {name: torch.cat([block[name] for block in blocks]) for name in self._run.shapes}

    def _gradient(self, t: int, query: Query) -> Params:
        what = f"query {query.label!r}"
        if query.by_step is None:
            assert self._ev is not None
            with self._ev.session():
                found = queries.gradients_at(self._ev, t, self._replay.params(t), [query])
            return self._run.block_of(found, what)
        ready = queries.ready_at(query.by_step, t)
        return self._run.block_of(ready if isinstance(ready, Mapping) else self._named(t, ready), what)

    def _named(self, t: int, flat: Tensor) -> Params:
        """A flat gradient by parameter: of all in the log, or of those covered in their projected shapes."""
        own = {name: shape for name, (shape, _) in self._run.trajectory.parameters.items()}
        covered = dict(self._run.layout.shapes)
        for shapes in (own, covered):
            if flat.shape[1] == sum(shape.numel() for shape in shapes.values()):
                pieces = flat.split([shape.numel() for shape in shapes.values()], dim=1)
                return {n: piece.reshape(-1, *shape) for (n, shape), piece in zip(shapes.items(), pieces, strict=True)}
        sizes = [sum(shape.numel() for shape in shapes.values()) for shapes in (own, covered)]
        raise ValueError(
            f"queries.gradients has {flat.shape[1]} numbers at step {t}; the log has {sizes[0]} parameters, its factors "
            f"cover {sizes[1]} numbers"
        )


def fisher_step_of(run: FactorRun, stop: int) -> float | None:
    """`fisher_step` of a run's factors: by the inner products of a step's samples where one rate serves all parameters."""
    by_products = factor_products.linearizer(run.shapes, run.l2, True, False)

    def largest(t: int) -> float:
        batches, found = run.batches(t), set(rates(run, t).values())
        if len(batches) != 1 or len(found) != 1:
            # curvature does not depend on where the l2 part is taken
            return largest_eigenvalue(run, by_products, lambda t: BarePoints(run).at(t).params, t)
        roots = batches[0].coefficients.sqrt()
        products = gram.inner_products(run, batches[0]).double() * roots[:, None] * roots
        own = float(torch.linalg.eigvalsh(products)[-1]) if bool(torch.isfinite(products).all()) else math.inf
        return found.pop() * (own + run.l2 * float(batches[0].coefficients.sum()))

    return fisher_step(run, largest, stop)


def query_rows(run: FactorRun, ev: Evaluator, replay: Replay, query: Query) -> gram.QueryRows | None:
    """t → the gradients of `queries.losses` at θ[t] in factors like those of the log; None where they cannot be had so."""
    if query.each is None or run.layout.projections or run.uncovered:
        return None
    args, kwargs, target = ev.unpack(query.each)
    size = query.size or 0
    batch = Batch(-1, torch.arange(size), torch.ones(size, device=ev.device, dtype=ev.dtype), args, kwargs, target)
    try:
        layers = factors.layers_of(ev)
    except (UnsupportedError, ValueError):
        return None

    def at(t: int) -> Factors:
        params = replay.params(t)
        with ev.session(), ev.eval_mode():
            rows = factors.capture(ev, params, batch, layers, "fisher")
            whole = queries.query_gradient(ev, t, params, queries.loss(query.each))
        own = factor_products.batch_gradient(rows, run.shapes)
        scale = max(float(value.abs().max()) for value in whole.values()) * size
        worst = max(float((own[name] - size * whole[name][0]).abs().max()) for name in own)
        if not worst <= factors.AGREEMENT[ev.dtype] * scale:
            raise gram.NotGram("the query's samples do not add up to their loss by layers")
        alike = factor_products.in_parts_of(rows, run.batches(0)[0])
        if alike is None:
            raise gram.NotGram("the query's samples have other factors than those of the log")
        return alike

    return at


def marked(trajectory: Trajectory, needed: Sequence[int]) -> tuple[Query, list[str]]:
    """The query that was marked in the log, with its gradients, and its labels.

    ValueError where one is missing at a step that is needed, or is another query than at the others.
    """
    at = trajectory.marked_queries
    for t in needed:
        if t not in at:
            names = {step: name for name, step in trajectory.marks.items()}
            have = ", ".join(f"{step} ('{names[step]}')" if step in names else str(step) for step in sorted(at)) or "none"
            raise ValueError(
                f"no query was marked at step {t}, an end of a window: queries are marked at {have}; give "
                "query=queries.gradients({step: ...}), or other windows"
            )
    labels = at[needed[0]][0]
    for t in needed:
        if at[t][0] != labels:
            raise ValueError(f"step {t} was marked with query {at[t][0][0]!r}, step {needed[0]} with {labels[0]!r}")
    return queries.gradients({t: at[t][1] for t in needed}, "marked"), list(labels)


def swept(
    run: FactorRun,
    windows: Sequence[Window],
    gradients: QueryGradients,
    num_queries: int,
    budget: int,
    check: bool,
    show_progress: bool | None,
    form: str = "auto",
    rows: gram.QueryRows | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Scores [W, Q, N] on the CPU, and what was chosen on the way; rows: the queries' gradients in factors."""
    chosen, why = gram.choose(run, windows, num_queries, budget, form, rows is not None)
    starts = points(run, int(plan.REPLAY_SHARE * budget), check)
    try:
        found = _in_form(chosen, run, windows, num_queries, gradients, budget, starts, show_progress, rows)
    except gram.NotGram as reason:
        if form == "gram":
            raise
        chosen, why = "fused" if fused.fits(run) else "sweep", f"not in sample space: {reason}"
        found = _in_form(chosen, run, windows, num_queries, gradients, budget, starts, show_progress)
    scores, meta = found
    meta |= {"form": chosen, "why": why}
    if isinstance(starts, Replay) and starts.is_needed:
        meta |= {"replayed": "parameters" if run.trajectory.every > 1 else "optimizer state", "replay_drift": starts.drift}
    return scores, meta


def _in_form(
    form: str,
    run: FactorRun,
    windows: Sequence[Window],
    num_queries: int,
    gradients: QueryGradients,
    budget: int,
    starts: BarePoints | Replay,
    show_progress: bool | None,
    rows: gram.QueryRows | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    size = run.num_samples
    if form == "gram":
        made, mix = plan.columns_by_endpoint(windows, num_queries)
        per_sweep = gram.columns_per_sweep(run, made, budget, rows is not None)
    else:
        made, mix = plan.columns(windows, num_queries)
        blocks = 1 + len(run.trajectory.slots)
        per_sweep = plan.columns_per_sweep(budget, run.num_parameters, size, run.dtype.itemsize, blocks)
    chunks = [made[start : start + per_sweep] for start in range(0, len(made), per_sweep)]
    needs_gradient = bool(run.trajectory.clip) or not all(rule.is_linear for rule in run.trajectory.optimizer)
    linearize = factor_products.linearizer(run.shapes, run.l2, run.has_curvature, needs_gradient)
    found = []
    with progress_bar(sum(chunk[0].stop for chunk in chunks), "sweep", show_progress) as bar:
        for chunk in chunks:
            if form == "sweep":
                scores = sweep(run, chunk, linearize, starts, gradients, size, bar.update)
            elif form == "fused":
                scores = fused.sweep(run, chunk, gradients, size, bar.update)
            else:
                scores = gram.sweep(run, chunk, gradients, size, bar.update, rows)
            found.append(scores.cpu())
    return (mix @ torch.cat(found)).reshape(len(windows), num_queries, size), {"columns": len(made), "sweeps": len(chunks)}
