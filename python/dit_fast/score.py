"""score(): validates, guards, sweeps once, assembles."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_fast import factors, layerwise, logged, native, native_queries, native_sweep, native_team, plan, queries
from dit_fast.fisher import fisher_step, largest_eigenvalue, warn_where_it_overshoots
from dit_fast.guard import check_problem
from dit_fast.linearize import HESSIANS, Hessian, choose_mode, linearize
from dit_fast.problem import Batch, Evaluator, Params, Problem
from dit_fast.progress import progress_bar
from dit_fast.queries import Query
from dit_fast.recognize import NotCompiled
from dit_fast.replay import Replay
from dit_fast.result import Influence
from dit_fast.retrain import leave_one_out
from dit_fast.sweep import Linearizer, QueryGradients, sweep
from dit_fast.trajectory import Trajectory, Window

Sweep = Callable[[list[plan.Column], QueryGradients, Callable[..., object]], Tensor]

METHODS = ("adjoint", "retrain", "auto")
BACKENDS = ("auto", "generic", "layerwise", "native", "factors")


def score(
    trajectory: Trajectory,
    problem: Problem | None = None,
    query: Query | Sequence[Query] | None = None,
    windows: Any = None,
    *,
    sample_ids: Any = None,
    hessian: Hessian = "exact",
    query_at: str = "endpoint",
    method: str = "adjoint",
    refine: int = 0,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_budget: int | float | str | None = None,
    check: bool = True,
    show_progress: bool | None = None,
) -> Influence:
    """The influence of every training sample on every query value in every window of a logged run, in one sweep.

    The score of sample j in [t1, t2) is ⟨q(t2), d_j[t2]⟩ − ⟨q(t1), d_j[t1]⟩, with d_j[t] the first-order change of the
    parameters before step t when j is left out of all batches (every other sample's coefficient kept) and q(t) the
    query's gradient there (Xu & Wu 2025, arXiv 2502.10793; with q at each end's own parameters instead of the final ones).
    Unit: the query's. Sign: a score above 0 means that removing the sample raises the query's value, so for a loss the
    sample helped.

    trajectory: the logged run. problem: model, per-sample loss and data it was trained with; None for a log with factors
        (`Recorder(factors=True)`), which is scored without model, data and, but for l2 and Adam, parameters.
    query: one of `dit_fast.queries`, or a list, joined along Q; without a problem, `queries.gradients`, or None = the query
        marked in the log at the windows' ends (`Recorder.mark(name, query=...)`).
    windows: None = the whole run; "epochs" = between marks; (t1, t2), a list of them, or {name: (t1, t2)}, in steps.
    sample_ids: the samples wanted; None = all N of the data.
    hessian: "exact"; "ggn" (generalised Gauss–Newton); "fisher" (empirical, Σ a_b ∇ℓ_b ∇ℓ_bᵀ); "none" (H = 0, that of
        l2 included: under plain SGD, TracIn at every step). "ggn" and "fisher" approximate the data's part only, that of l2
        stays exact. With "fisher", `meta["fisher_step"]` is the largest eigenvalue of rate times Fisher that a quarter of up
        to eight steps reach (under SGD, over 1 + momentum); above 1 a RuntimeWarning says that it overshoots.
    query_at: "endpoint" = q at each window end's own parameters; "final" = at the end of the run, as the official code does.
    method: "adjoint"; "retrain" = every score by true retraining (`leave_one_out`), which has no use for hessian and refine;
        "auto" = the one of fewer FLOPs (`estimate_score`). `meta["why_method"]` says which they were.
    refine: this many samples per window and query, those of largest |score|, get their true score by retraining;
        `result.retrained` marks them.
    backend: "native" for feed-forward nets under SGD, compiled, on CPU and CUDA; "factors" for hessian "fisher", "ggn" and
        "none", by the factors in the log where it has them (the problem is then asked for the query's gradients alone), else by
        those it makes anew from the problem; "layerwise" for convolutional nets; "generic" for any module; "auto" = the first
        of these that fits, factors of the log without a problem only. `meta["backend"]` says which it was, `meta["why"]` why.
        ValueError where the one asked for cannot be used.
    dtype, device: of the computation; None = the widest dtype of the parameters, but float64 for Adam and AdamW, and the
        model's device.
    memory_budget: bytes or "2GiB"; columns that do not fit travel in several sweeps. None = 0.6 of what is free.
    check: replay a few steps first and refuse a problem that does not reproduce them (ValueError with the likely cause), and
        refuse a replayed segment that misses what is stored at its end (LogError).
    show_progress: None = a bar on a terminal once the work has taken two seconds.

    Returns Influence with scores [W, Q, N] float64. Raises ValueError or TypeError for arguments, LogError for the log,
    UnsupportedError for the model. The model, its gradients, flags and hooks, the random generators and torch's settings
    are left as they were.
    """
    began = time.perf_counter()
    chosen_because: dict[str, Any] = {}
    check_options(hessian, query_at, method, backend, refine)
    given: Any = query
    common: dict[str, Any] = {"dtype": dtype, "device": device, "memory_budget": memory_budget}
    options = common | {"sample_ids": sample_ids, "hessian": hessian, "query_at": query_at, "check": check}
    options |= {"show_progress": show_progress}
    if problem is None:
        if method != "adjoint" or refine or backend not in ("auto", "factors"):
            raise ValueError(
                "without a problem only the log's factors can be scored: method='adjoint', backend='auto', refine=0"
            )
        influence = logged.score_logged(trajectory, None, query, windows, **options)
        warn_where_it_overshoots(influence.meta, 2)
        return influence
    if method == "auto":
        from dit_fast.estimate import choose_method

        method, why = choose_method(
            trajectory,
            problem,
            given,
            windows,
            sample_ids=sample_ids,
            hessian=hessian,
            query_at=query_at,
            refine=refine,
            backend=backend,
            **common,
        )
        chosen_because = {"why_method": why}
    if (method == "retrain" or refine) and query_at == "final":
        raise ValueError("query_at='final' cannot be retrained: retraining asks the query itself at each end of a window")
    # factors retrain nothing
    retraining = common | {"backend": "auto" if backend == "factors" else backend, "show_progress": show_progress}
    if method == "retrain":
        true = leave_one_out(trajectory, problem, given, windows, sample_ids=sample_ids, check=check, **retraining)
        return replace(true, meta={**true.meta, **chosen_because, "seconds": time.perf_counter() - began})
    if backend == "factors" and logged.has_factors(trajectory):
        influence = logged.score_logged(trajectory, problem, query, windows, **options)
    else:
        influence = _score_problem(trajectory, problem, given, windows, backend=backend, **options)
    warn_where_it_overshoots(influence.meta, 2)
    influence = replace(influence, meta={**influence.meta, **chosen_because, "seconds": time.perf_counter() - began})
    if refine:
        chosen = influence.largest(refine)
        union = influence.sample_ids[chosen.any(dim=(0, 1))]
        true = leave_one_out(trajectory, problem, given, windows, sample_ids=union, check=False, **retraining)
        influence = influence.refined_by(true, chosen)
    return influence


def _score_problem(
    trajectory: Trajectory,
    problem: Problem,
    query: Any,
    windows: Any,
    *,
    backend: str,
    sample_ids: Any,
    hessian: Hessian,
    query_at: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    memory_budget: int | float | str | None,
    check: bool,
    show_progress: bool | None,
) -> Influence:
    """The adjoint scores of a problem, by its own losses."""
    ev = Evaluator.create(problem, trajectory, device, dtype)
    spans = trajectory.windows(windows)
    ids = ev.select(sample_ids)
    asked = queries.as_list(query)
    with ev.session():
        budget = plan.memory_budget(memory_budget, ev.device)
        # a linear rule's adjoint needs no state, but to check its steps the guard does
        replay = Replay(ev, not all(rule.is_linear for rule in trajectory.optimizer), int(plan.REPLAY_SHARE * budget), check)
        if check:
            check_problem(ev, max(window.stop for window in spans), Replay(ev, True, int(plan.REPLAY_SHARE * budget)))
        last = trajectory.num_steps
        gradients: dict[int, Params] = {}
        if query_at == "final" or any(window.stop == last for window in spans):
            sizes, gradients[last] = queries.sizes_and_gradients(ev, asked)
        else:
            sizes = queries.sizes(ev, asked)
        num_queries = sum(sizes)
        scores, meta = _adjoint_scores(
            ev, spans, asked, num_queries, gradients, hessian, query_at, backend, replay, budget, show_progress
        )
    return Influence(
        scores=scores[..., ids],
        windows=spans,
        queries=queries.names(asked, sizes),
        sample_ids=ids,
        meta=ev.describe() | {"method": "adjoint", "hessian": hessian, "query_at": query_at} | meta,
    )


def _adjoint_scores(
    ev: Evaluator,
    windows: list[Window],
    asked: list[Query],
    num_queries: int,
    known: dict[int, Params],
    hessian: Hessian,
    query_at: str,
    backend: str,
    replay: Replay,
    budget: int,
    show_progress: bool | None,
) -> tuple[Tensor, dict[str, Any]]:
    """Scores [W, Q, N] on the CPU, and what was chosen on the way. known: the queries' gradients at the last point asked."""
    num_samples = ev.num_samples
    made, mix = plan.columns(windows, num_queries)
    blocks = 1 + len(ev.trajectory.slots)
    per_sweep = plan.columns_per_sweep(budget, ev.num_parameters, num_samples, ev.dtype.itemsize, blocks)
    chunks = [made[start : start + per_sweep] for start in range(0, len(made), per_sweep)]
    at_ends = asked if query_at == "endpoint" else []
    run, meta = choose_sweep(ev, hessian, backend, min(per_sweep, len(made)), replay, budget, at_ends)

    def gradients(t: int) -> Params:
        point = t if query_at == "endpoint" else ev.trajectory.num_steps
        if point not in known:
            known.clear()  # one block of all queries at a time
            known[point] = queries.gradients_at(ev, point, replay.params(point), asked)
        return known[point]

    swept = []
    steps = sum(chunk[0].stop for chunk in chunks)
    with progress_bar(steps, "sweep", show_progress) as bar:
        for chunk in chunks:
            try:
                swept.append(run(chunk, gradients, bar.update).cpu())
            except NotCompiled as reason:  # something on the way was not as the first batch showed it
                run, meta = choose_sweep(ev, hessian, backend, min(per_sweep, len(made)), replay, budget, at_ends, str(reason))
                swept.append(run(chunk, gradients, bar.update).cpu())
    scores = (mix @ torch.cat(swept)).reshape(len(windows), num_queries, num_samples)
    if hessian == "fisher":
        is_made = meta["backend"] == "factors"
        fisher = factors.linearizer(ev, hessian, False) if is_made else partial(linearize, ev, hessian=hessian)
        meta["fisher_step"] = fisher_step(ev, partial(largest_eigenvalue, ev, fisher, replay.params), made[0].stop)
    if replay.is_needed:
        meta = meta | {"replayed": "parameters" if ev.trajectory.every > 1 else "optimizer state", "replay_drift": replay.drift}
    return scores, meta | {"columns": len(made), "sweeps": len(chunks)}


def choose_sweep(
    ev: Evaluator,
    hessian: Hessian,
    backend: str,
    num_columns: int,
    replay: Replay,
    budget: int,
    asked: Sequence[Query],
    refused: str = "",
) -> tuple[Sweep, dict[str, Any]]:
    """The sweep of a chunk of columns, and what it is and why; refused: why it is not to be the compiled one.

    asked: the queries where they are asked at each end of a window, so that their gradients can be taken together.
    """
    num_samples = ev.num_samples
    if backend in ("auto", "native"):
        try:
            if refused:
                raise NotCompiled(refused)
            compiled = native.prepare(ev, hessian)
        except NotCompiled as reason:
            if backend == "native":
                raise ValueError(f"backend='native' cannot be used: {reason}") from reason
            refused = f"not native: {reason}"
        else:
            why = f"compiled: {compiled.recognized.description}; agrees with the generic path on the first batch"

            def run(columns: list[plan.Column], gradients: QueryGradients, progress: Callable[..., object]) -> Tensor:
                rows = native_queries.gradients(ev, compiled, asked, native_queries.ends(columns), gradients)
                take = native_team.sweep if compiled.engine == "team" else native_sweep.sweep
                return take(ev, columns, compiled, hessian, rows, num_samples, progress)

            return run, {"backend": "native", "why": why}
    linearizer, meta = choose_linearizer(ev, hessian, backend, num_columns, budget)
    meta["why"] = "; ".join(filter(None, [refused, meta["why"]])) or f"backend={backend!r} was asked for"
    return (
        lambda columns, gradients, progress: sweep(ev, columns, linearizer, replay, gradients, num_samples, progress),
        meta,
    )


def choose_linearizer(
    ev: Evaluator, hessian: Hessian, backend: str, num_columns: int, budget: int
) -> tuple[Linearizer, dict[str, Any]]:
    """The primitive for this net and curvature, and what it is."""
    params, batch = ev.params(0), ev.batches(0)[0]
    refused = []
    if backend in ("auto", "factors"):
        refusal = factors.refusal(ev, params, batch, hessian, only_linear=backend == "auto")
        if refusal is None:
            rules = ev.trajectory.optimizer
            needs_gradient = bool(ev.trajectory.clip) or not all(rule.is_linear for rule in rules)
            why = "a net of linear layers" if backend == "auto" else ""
            meta = {"backend": "factors", "factors": "recomputed", "why": why}
            return factors.linearizer(ev, hessian, needs_gradient), meta
        if backend == "factors":
            raise ValueError(f"backend='factors' cannot be used: {refusal}")
        refused.append(f"not factors: {refusal}")
    if backend in ("auto", "layerwise"):
        try:
            net = layerwise.prepare(ev, hessian)
            if backend == "auto" and not net.has_convolution:
                raise NotCompiled("the net has no convolution")
        except NotCompiled as reason:
            if backend == "layerwise":
                raise ValueError(f"backend='layerwise' cannot be used: {reason}") from reason
            refused.append(f"not layerwise: {reason}")
        else:
            needs_gradient = bool(ev.trajectory.clip) or not all(rule.is_linear for rule in ev.trajectory.optimizer)
            columns, samples = layerwise.sizes(ev, net, num_columns)
            why = "; ".join([*refused, "layer by layer; agrees with the generic path on the first batch"])
            return layerwise.linearizer(ev, net, hessian, num_columns, needs_gradient), {
                "backend": "layerwise",
                "why": why,
                "columns_per_pull": columns,
                "samples_per_pull": min(samples, len(batch.ids)),
            }
    mode, together = choose_mode(ev, params, batch, hessian)
    limit = plan.columns_per_pull(budget, ev, params, batch, hessian, mode) if together else 1

    def generic(params: Params, batch: Batch) -> Any:
        return linearize(ev, params, batch, hessian, mode, limit)

    return generic, {"backend": "generic", "why": "; ".join(refused), "mode": mode, "columns_per_pull": min(limit, num_columns)}


def check_options(hessian: str, query_at: str, method: str, backend: str, refine: int) -> None:
    """ValueError for an option that there is not."""
    for name, value, allowed in (
        ("hessian", hessian, HESSIANS),
        ("query_at", query_at, ("endpoint", "final")),
        ("method", method, METHODS),
        ("backend", backend, BACKENDS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
    if not isinstance(refine, int) or refine < 0:
        raise ValueError(f"refine must be a number of samples, 0 or more, got {refine!r}")
