"""leave_one_out: true retraining on the logged batches, all counterfactual models advancing together.

Model j repeats the run without sample j: the same batches in the same order and every other sample's coefficient kept.
What is carried is d_j = θ_{−j} − θ[t], advanced by the difference of two gradients taken in one call; float32 models whose
losses were subtracted at the end would lose two digits more (design §1).
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast import native_retrain, plan, queries
from dit_fast.byte_sizes import format_bytes
from dit_fast.data import as_ids
from dit_fast.guard import check_problem
from dit_fast.native import Native
from dit_fast.problem import Batch, Evaluator, Params, Problem
from dit_fast.progress import progress_bar
from dit_fast.queries import Query
from dit_fast.recognize import NotCompiled
from dit_fast.replay import Point, Replay
from dit_fast.result import Influence
from dit_fast.trajectory import Trajectory

# more models at once than this are no faster on the CPU: their blocks no longer stay in cache (`bench/bench_retrain.py`)
MODELS_AT_ONCE = 256
# steps whose sample ids are read together
STEPS_AT_ONCE = 4096

BACKENDS = ("auto", "generic", "native")


def leave_one_out(
    trajectory: Trajectory,
    problem: Problem,
    query: Query | Sequence[Query],
    windows: Any = None,
    *,
    sample_ids: Any = None,
    groups: Sequence[Any] | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_budget: int | float | str | None = None,
    check: bool = True,
    show_progress: bool | None = None,
) -> Influence:
    """The true change of every query value when a sample is left out of the logged run, for any windows at once.

    With Δ_j(t) = query(θ_{−j}[t]) − query(θ[t]), the score of [t1, t2) is Δ_j(t2) − Δ_j(t1); Δ_j(0) = 0. Sign and unit as in
    `score`, of which this is the truth without any linearisation. Query values are taken in float64.

    sample_ids: the samples left out, one model each; None = all. groups: lists of ids left out together, one model each;
        result.groups then names them and the sample axis counts them.
    backend: "native" for feed-forward nets trained by SGD, compiled, on the CPU and for small nets on CUDA; "generic" for
        any; "auto" = the first that fits. `meta["why"]` says why.
    A model that runs away without its sample has scores that are NaN or infinite, with a warning.
    The other arguments, the errors and the result are those of `score`. Optimizer, clipping and dropout's masks are the run's.
    """
    began = time.perf_counter()
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    ev = Evaluator.create(problem, trajectory, device, dtype)
    spans = trajectory.windows(windows)
    asked = queries.as_list(query)
    removed = _removed(ev, sample_ids, groups)
    ends = sorted({t for window in spans for t in (window.start, window.stop)} - {0})
    with ev.session():
        budget = plan.memory_budget(memory_budget, ev.device)
        replay = Replay(ev, not all(rule.is_linear for rule in trajectory.optimizer), int(plan.REPLAY_SHARE * budget), check)
        if check:
            check_problem(ev, ends[-1], Replay(ev, True, int(plan.REPLAY_SHARE * budget)))
        sizes = queries.sizes(ev, asked)
        changes, meta = _changes(ev, asked, sizes, removed, ends, backend, replay, budget, show_progress)
    changes[0] = torch.zeros(sum(sizes), len(removed), dtype=torch.float64)
    scores = torch.stack([changes[window.stop] - changes[window.start] for window in spans])
    lost = (~scores.isfinite()).flatten(0, 1).any(0).nonzero().flatten().tolist()
    if lost:
        first = f"group {lost[0]}" if groups is not None else f"sample {int(removed[lost[0]])}"
        warnings.warn(
            f"{len(lost)} of {len(removed)} retrained models ran away, the first without {first}: "
            "their scores are NaN or infinite",
            stacklevel=2,
        )
    return Influence(
        scores=scores,
        windows=spans,
        queries=queries.names(asked, sizes),
        sample_ids=torch.arange(len(removed)) if groups is not None else torch.cat(removed or [torch.arange(0)]),
        retrained=torch.ones(len(spans), sum(sizes), len(removed), dtype=torch.bool),
        groups=None if groups is None else [ids.tolist() for ids in removed],
        meta=ev.describe() | {"method": "retrain"} | meta | {"seconds": time.perf_counter() - began},
    )


def _removed(ev: Evaluator, sample_ids: Any, groups: Sequence[Any] | None) -> list[Tensor]:
    if groups is None:
        return [ids[None] for ids in ev.select(sample_ids)]  # split(1) would make one piece of no ids
    if sample_ids is not None:
        raise ValueError("give sample_ids or groups, not both")
    return [ev.select(as_ids(group, "groups")).unique() for group in groups]


def _changes(
    ev: Evaluator,
    asked: list[Query],
    sizes: list[int],
    removed: list[Tensor],
    ends: list[int],
    backend: str,
    replay: Replay,
    budget: int,
    show_progress: bool | None,
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Δ(t) [Q, n] float64 on the CPU for every end t."""
    changes = {t: torch.zeros(sum(sizes), len(removed), dtype=torch.float64) for t in ends}
    first = _first_visits(ev, removed, ends[-1])
    # a model whose samples were never visited has changed nothing, exactly
    order = sorted((j for j in range(len(removed)) if first[j] < ends[-1]), key=lambda j: first[j])
    if not order:
        return changes, {"models": 0}
    mapper = _Mapper(ev.trajectory.rng is None and not _convolves_much(ev))
    compiled, why = choose_backend(ev, backend, mapper)
    size = models_at_once(ev, budget)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    exact = Evaluator(ev.problem, ev.trajectory, ev.device, torch.float64)
    generic_query: native_retrain.QueryChanges = partial(_query_changes, exact, mapper)
    ask = [generic_query] * len(asked)
    if compiled is not None:
        theta = {name: value.double() for name, value in ev.params(ends[0]).items()}
        ask = [native_retrain.query_changes(exact, compiled, query, theta, generic_query) for query in asked]
    with progress_bar(len(chunks) * ends[-1], "retraining", show_progress) as bar:
        for chunk in chunks:
            arguments = ([removed[j] for j in chunk], [first[j] for j in chunk], ends, bar.update)

            def fill(advanced: Iterator[tuple[int, Params]], chunk: list[int] = chunk) -> None:
                for t, shifts in advanced:
                    params = replay.params(t)
                    found = torch.cat([fn(params, query, shifts) for fn, query in zip(ask, asked, strict=True)]).cpu()
                    found[:, [first[j] >= t for j in chunk]] = 0
                    changes[t][:, chunk] = found

            if compiled is not None:
                try:
                    fill(native_retrain.advance(ev, compiled, *arguments))
                    continue
                except NotCompiled as reason:  # something on the way was not as the first batch showed it
                    if backend == "native":
                        raise ValueError(f"backend='native' cannot be used: {reason}") from reason
                    compiled, why = None, f"not native: {reason}"
            fill(_generic(ev, replay, mapper, *arguments))
    meta = {"models": len(order), "models_at_once": size, "backend": "native" if compiled else "generic", "why": why}
    return changes, meta if compiled else meta | {"vmapped": mapper.vmapped}


def choose_backend(ev: Evaluator, backend: str, mapper: "_Mapper") -> tuple[Native | None, str]:
    """The compiled path, None for the generic one, and why."""
    if backend == "generic":
        return None, "backend='generic' was asked for"
    try:
        compiled = native_retrain.prepare(ev, lambda batch, models, removed: _gradients(ev, [batch], models, removed, mapper))
    except NotCompiled as reason:
        if backend == "native":
            raise ValueError(f"backend='native' cannot be used: {reason}") from reason
        return None, f"not native: {reason}"
    return compiled, f"compiled: {compiled.recognized.description}; agrees with the generic path on the first batch"


def chosen_backend(ev: Evaluator) -> tuple[str, str]:
    """The backend that "auto" means for this problem, and why; nothing is retrained."""
    compiled, why = choose_backend(ev, "auto", _Mapper(ev.trajectory.rng is None and not _convolves_much(ev)))
    return "native" if compiled else "generic", why


def _generic(
    ev: Evaluator,
    replay: Replay,
    mapper: "_Mapper",
    removed: list[Tensor],
    first: list[int],
    ends: list[int],
    progress: Callable[..., object],
) -> Iterator[tuple[int, Params]]:
    """(t, d [n, *shape]) at every end t, as `native_retrain.advance` gives them."""
    num_blocks = 1 + len(ev.trajectory.slots)
    block = {
        name: [torch.zeros(len(removed), *shape, dtype=ev.dtype, device=ev.device) for _ in range(num_blocks)]
        for name, shape in ev.shapes.items()
    }
    joined = 0
    for t in range(ends[-1]):
        # models join when their first sample is about to be visited: before, d_j = 0
        active = sum(visit <= t for visit in first)
        if active:
            point = replay.at(t)
            _join(ev, point, block, slice(joined, active))
            joined = active
            advancing = {name: [value[:active] for value in blocks] for name, blocks in block.items()}
            _advance(ev, t, point, advancing, removed[:active], mapper)
        if t + 1 in ends:
            yield t + 1, {name: blocks[0] for name, blocks in block.items()}
        progress()


def _advance(
    ev: Evaluator, t: int, point: Point, block: dict[str, list[Tensor]], removed: list[Tensor], mapper: "_Mapper"
) -> None:
    """(d_j, optimizer state)[t] → [t+1] in place, for every row of `block`.

    The state is each model's own, or for linear rules, which need no more, its difference from the logged one.
    """
    trajectory = ev.trajectory
    # row 0 is the logged model itself, so that its gradient comes out of the same call
    models = {name: torch.cat([value[None], value + block[name][0]]) for name, value in point.params.items()}
    nobody = removed[0][:0]
    settings, groups, absent = trajectory.settings(t), trajectory.groups, trajectory.absent(t)
    gradient = _gradients(ev, ev.batches(t), models, [nobody, *removed], mapper)
    # a parameter without a gradient has no part in the norm
    gradient = trajectory.clip.forward({n: value for n, value in gradient.items() if n not in absent}, stacked=True)
    for name, blocks in block.items():
        if name in absent:
            continue
        rule, values, count = trajectory.optimizer[groups[name]], settings[groups[name]], point.counts[name]
        if rule.is_linear:
            # the difference of two models obeys the rule too
            change, state = rule.forward(blocks[0], gradient[name][1:] - gradient[name][0], tuple(blocks[1:]), count, values)
        else:
            states = tuple(torch.cat([s[None], own]) for s, own in zip(point.state[name], blocks[1:], strict=True))
            theta, states = rule.forward(models[name], gradient[name], states, count, values)
            change, state = theta[1:] - theta[0], tuple(slot[1:] for slot in states)
        for value, new in zip(blocks, (change, *state), strict=True):
            value.copy_(new)


def _join(ev: Evaluator, point: Point, block: dict[str, list[Tensor]], rows: slice) -> None:
    """Models that join begin with the logged optimizer state, or with no difference from it where the rule is linear."""
    for name, state in point.state.items():
        if ev.trajectory.optimizer[ev.trajectory.groups[name]].is_linear:
            continue
        for value, slot in zip(block[name][1:], state, strict=True):
            value[rows] = slot


def _gradients(ev: Evaluator, batches: list[Batch], models: Params, removed: Sequence[Tensor], mapper: "_Mapper") -> Params:
    """The gradients [n, *shape] of a step's batches for n models, each without its samples."""
    total = {name: torch.zeros_like(value) for name, value in models.items()}
    for batch in batches:
        weights = torch.stack([~torch.isin(batch.ids, ids) for ids in removed])
        weights = weights.to(ev.device, ev.dtype) * batch.coefficients

        def gradient(model: Params, weight: Tensor, batch: Batch = batch) -> Params:
            if batch.rng is not None:  # under torch.func some modules draw their masks in another order
                leaves = {name: value.detach().requires_grad_() for name, value in model.items()}
                total = (weight * ev.losses(leaves, batch)).sum()
                flat = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
                return dict(zip(leaves, flat, strict=True))
            return torch.func.grad(lambda point: (weight * ev.losses(point, batch)).sum())(model)

        gradients = mapper(gradient, models, weights)
        for name, value in total.items():
            value += gradients[name]
            if ev.l2:
                value += ev.l2 * weights.sum(1).view(-1, *[1] * (value.ndim - 1)) * models[name]
    return total


def _query_changes(ev: Evaluator, mapper: "_Mapper", params: Params, query: Query, block: Params) -> Tensor:
    """query(θ + d_j) − query(θ) [Q, n] in float64, θ = `params`."""
    with ev.session(), torch.no_grad(), ev.eval_mode():
        params = {name: value.double() for name, value in params.items()}

        def values(shift: Params) -> Tensor:
            point = {name: value + shift[name] for name, value in params.items()}
            return queries.values(ev, point, query)

        moved = {name: torch.cat([torch.zeros_like(value[:1]), value]).double() for name, value in block.items()}
        results = mapper(values, moved)
        return (results[1:] - results[0]).T


class _Mapper:
    """vmap, or a plain loop from the first call on that vmap cannot take; a loop too where dropout draws masks, which come
    out in another order under vmap."""

    def __init__(self, vmapped: bool) -> None:
        self.vmapped = vmapped

    def __call__(self, function: Callable[..., Any], *stacked: Any) -> Any:
        if self.vmapped:
            try:
                return torch.func.vmap(function)(*stacked)
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.vmapped = False
        size = len(stacked[-1]) if isinstance(stacked[-1], Tensor) else len(next(iter(stacked[-1].values())))
        rows = [function(*(_row(tree, i) for tree in stacked)) for i in range(size)]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _row(tree: Any, i: int) -> Any:
    return tree[i] if isinstance(tree, Tensor) else {name: value[i] for name, value in tree.items()}


def _first_visits(ev: Evaluator, removed: list[Tensor], last: int) -> list[int]:
    """The first step each model differs in; `last` where there is none."""
    first = torch.full((ev.num_samples,), last)
    for start in range(0, last, STEPS_AT_ONCE):
        ids = [step.ids for step in ev.trajectory.steps(start, min(start + STEPS_AT_ONCE, last))]
        sizes = torch.tensor([len(own) for own in ids])
        visited, step = torch.cat(ids), torch.arange(start, start + len(ids)).repeat_interleave(sizes)
        known = visited < ev.num_samples
        first.scatter_reduce_(0, visited[known], step[known], "amin")
    models = torch.repeat_interleave(torch.arange(len(removed)), torch.tensor([len(ids) for ids in removed], dtype=torch.int64))
    visits = first[torch.cat([*removed, torch.zeros(0, dtype=torch.int64)])]
    return torch.full((len(removed),), last).scatter_reduce(0, models, visits, "amin").tolist()


def _convolves_much(ev: Evaluator) -> bool:
    """Whether models are faster one by one: torch turns the convolutions of several models into grouped ones, which on the
    CPU took twice the time where a batch fills the caches by itself (28×28, 8 channels, batch 64), and a fortieth where it
    does not (8×8, batch 16)."""
    convolutions = any(isinstance(module, nn.modules.conv._ConvNd) for module in ev.problem.model.modules())
    return convolutions and ev.device.type == "cpu" and _saved_bytes(ev) > plan.CACHED_GRAPH_BYTES


def models_at_once(ev: Evaluator, budget: int) -> int:
    """Models that advance together; ValueError where not one fits."""
    one = bytes_per_model(ev)
    if one > budget:
        raise ValueError(f"one model needs {format_bytes(one)}, more than memory_budget = {format_bytes(budget)}")
    return budget // one if ev.device.type == "cuda" else min(MODELS_AT_ONCE, budget // one)


def bytes_per_model(ev: Evaluator) -> int:
    """What a model advancing takes: its parameters, changes, gradients, and the activations of one batch."""
    # d, θ + d, gradient and its difference; the saved activations and as much again on the way back
    return (4 + 3 * len(ev.trajectory.slots)) * ev.num_parameters * ev.dtype.itemsize + 2 * _saved_bytes(ev)


def _saved_bytes(ev: Evaluator) -> int:
    """The activations that one batch's graph keeps for its backward pass."""
    params, batch = ev.params(0), ev.batches(0)[0]
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ev.losses({name: value.detach().requires_grad_() for name, value in params.items()}, batch)
    return saved
