"""An index of a run: the change of the parameters by every sample, at chosen steps, so that any query is one product away.

    score of j in [t1, t2) = ⟨q(t2), d_j[t2]⟩ − ⟨q(t1), d_j[t1]⟩,      d_j[t] = θ without j − θ, to first order, before step t

What is kept are the d_j themselves at the windows' ends, in the space of the factors, which projection makes small. The
propagators of the windows would need the changes made within each window beside them, for every sample, which is as much.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_fast import factor_products, numerics, plan
from dit_fast.byte_sizes import format_bytes
from dit_fast.errors import LogError
from dit_fast.factor_run import FactorRun, check_factors, points
from dit_fast.fisher import warn_where_it_overshoots
from dit_fast.linearize import Hessian
from dit_fast.logged import Asked, fisher_step_of, open_run, swept
from dit_fast.problem import Params, Problem
from dit_fast.progress import progress_bar
from dit_fast.queries import Query
from dit_fast.replay import Point
from dit_fast.result import Influence
from dit_fast.trajectory import Trajectory, Window

# blocks of a sample that travel forward, beside its state: d and its batch gradient's change, and one in making
BLOCKS_PER_SAMPLE = 3
# an index larger than its log is refused without a memory_budget, but never one so small
SMALL_INDEX = 64 << 20
FORMAT = "dit_fast index 1"


@dataclass(frozen=True, repr=False)
class Index:
    """The changes d_j of all samples at chosen steps of a run; what `Trajectory.index` returns.

    changes: step → d_j [N, numbers], θ without sample j less θ to first order, flat in the order of the covered parameters,
        projected where the log is. windows: those it was made for. meta: as of `score`, with index ("forward" or "backward":
        how it was made), index_bytes, log_bytes (the run's on disk) and index_seconds. run: the factors it is of.
    """

    changes: dict[int, Tensor]
    windows: list[Window]
    meta: dict[str, Any]
    run: FactorRun

    @property
    def num_bytes(self) -> int:
        """Memory it holds."""
        return sum(change.numel() * change.element_size() for change in self.changes.values())

    def score(
        self,
        query: Query | Sequence[Query] | None = None,
        windows: Any = None,
        *,
        problem: Problem | None = None,
        sample_ids: Any = None,
    ) -> Influence:
        """What `score` of the run's factors returns for this query, by one product for each end of a window.

        query: `queries.gradients`, or None = the one marked in the log; others take a problem. windows: None = those the
        index was made for; others must end where they do, or at 0. sample_ids: None = all.

        Raises ValueError for windows that end elsewhere, and as `score`.
        """
        began = time.perf_counter()
        spans = self.windows if windows is None else self.run.trajectory.windows(windows)
        for t in sorted({t for window in spans for t in (window.start, window.stop)} - {0, *self.changes}):
            raise ValueError(f"the index has no step {t}, an end of a window; it has {sorted(self.changes)}")
        ids = self.run.select(sample_ids)
        with numerics.full_precision(), torch.inference_mode(False), torch.no_grad():
            asked = Asked(self.run, problem, query, "endpoint", spans, plan.memory_budget(None, self.run.device))
            at: dict[int, Tensor] = {}
            for t in sorted({t for window in spans for t in (window.start, window.stop)} - {0}):
                block = asked(t)
                flat = torch.cat([block[name].flatten(1) for name in self.run.shapes], 1)
                change = self.changes[t] if sample_ids is None else self.changes[t][ids.to(flat.device)]
                at[t] = (flat @ change.T).double().cpu()
        scores = torch.stack([at[w.stop] - at[w.start] if w.start else at[w.stop] for w in spans])
        meta = self.meta | {"seconds": time.perf_counter() - began}
        return Influence(scores=scores, windows=spans, queries=asked.names, sample_ids=ids, meta=meta)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, for `load`; whole or not at all."""
        windows = [[w.name, w.start, w.stop] for w in self.windows]
        header = {"format": FORMAT, "digest": self.run.trajectory.digest, "windows": windows, "meta": self.meta}
        target = Path(path)
        aside = target.with_name(f".{target.name}.partial")
        try:
            save_file(
                {str(t): change.cpu().contiguous() for t, change in self.changes.items()},
                aside,
                metadata={"dit_fast": json.dumps(header)},
            )
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], trajectory: Trajectory, *, device: torch.device | str | None = None) -> "Index":
        """Read what `save` wrote; trajectory: the run it was made of. device: None = the CPU.

        Raises ValueError for any other file, and for an index of another run.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["dit_fast"])
                if header["format"] != FORMAT:
                    raise ValueError(f"format {header['format']!r}")
                changes = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            windows = [Window(name, start, stop) for name, start, stop in header["windows"]]
            meta, digest = header["meta"], header["digest"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of a dit_fast index, or is damaged: {error}") from error
        if digest != trajectory.digest:
            raise ValueError(f"{path} is an index of another run than {trajectory!r}, or the run has changed: make it anew")
        run = open_run(trajectory, meta["hessian"], device, next(iter(changes.values())).dtype)
        return cls({t: changes[t].to(run.device) for t in sorted(changes)}, windows, meta, run)

    def __repr__(self) -> str:
        return (
            f"Index({len(self.changes)} steps, {self.run.num_samples:,} samples, {self.run.num_parameters:,} numbers each: "
            f"{format_bytes(self.num_bytes)})"
        )


def build_index(
    trajectory: Trajectory,
    windows: Any = None,
    *,
    hessian: Hessian = "fisher",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_budget: int | float | str | None = None,
    check: bool = True,
    show_progress: bool | None = None,
) -> Index:
    """`Trajectory.index`: one pass over a log with factors, after which scores of any query take milliseconds.

    windows: those that will be asked for, as in `score`; None = the whole run. hessian, dtype, device, check: as in `score`.
    memory_budget: bytes or "2GiB" for the index and the pass; None = 0.6 of what is free, and the index no larger than the
        log on disk or 64 MiB, whichever is more: a larger one is seldom worth keeping, as a sweep reads less.

    Under SGD the samples' changes go forward through the run together, by the optimizer's own rule; Adam and clipped
    gradients, and runs of many samples in few numbers, are swept backward from every number at every step kept.

    Raises ValueError where the index is larger than allowed, with the numbers, and as `score`.
    """
    began = time.perf_counter()
    spans = trajectory.windows(windows)
    run = open_run(trajectory, hessian, device, dtype)
    ends = sorted({t for window in spans for t in (window.start, window.stop)} - {0})
    budget = plan.memory_budget(memory_budget, run.device)
    size, log_bytes = len(ends) * run.num_samples * run.num_parameters * run.dtype.itemsize, trajectory.num_bytes
    too_large = _too_large(size, log_bytes, budget, memory_budget is None)
    if too_large:
        raise ValueError(
            f"an index of {len(ends)} steps, {run.num_samples:,} samples and {run.num_parameters:,} numbers each takes "
            f"{format_bytes(size)}, more than {too_large}: log projected factors "
            "(Recorder(factors=FactorOptions(project=r))), or ask for fewer windows"
        )
    with numerics.full_precision(), torch.inference_mode(False), torch.no_grad():
        if check:
            check_factors(run, ends[-1], int(plan.REPLAY_SHARE * budget))
        refused = _not_forward(run, ends)
        if refused is None:
            changes, why = _forward(run, ends, budget, check, show_progress), "forward"
        else:
            changes, why = _backward(run, ends, budget, check, show_progress), f"backward: {refused}"
        overshoot = {"fisher_step": fisher_step_of(run, ends[-1])} if hessian == "fisher" else {}
    for t, change in changes.items():
        if not torch.isfinite(change).all():
            raise LogError(f"the changes before step {t} are NaN or infinite (try dtype=torch.float64)")
    meta = run.describe() | {"method": "index", "hessian": hessian, "query_at": "endpoint", "backend": "factors"} | overshoot
    warn_where_it_overshoots(meta, 3)
    meta |= {"index": why, "index_bytes": size, "log_bytes": log_bytes}
    meta |= {"index_seconds": time.perf_counter() - began}
    return Index(changes, spans, meta, run)


def _too_large(size: int, log_bytes: int, budget: int, is_default: bool) -> str | None:
    """The limit that an index of this size passes; None where it does not."""
    if size > budget:
        return f"memory_budget = {format_bytes(budget)}"
    if is_default and log_bytes and size > max(log_bytes, SMALL_INDEX):
        return f"the log itself, {format_bytes(log_bytes)} (memory_budget=... allows it)"
    return None


def _not_forward(run: FactorRun, ends: list[int]) -> str | None:
    trajectory = run.trajectory
    if not all(rule.is_linear for rule in trajectory.optimizer):
        return f"{trajectory.optimizer[0].kind} is not linear in the gradient"
    if trajectory.clip:
        return "clipping is not linear in the gradient"
    forward, backward = run.num_samples * ends[-1], run.num_parameters * sum(ends)
    return None if forward <= backward else f"{backward:,} columns and steps against {forward:,} samples and steps forward"


def _backward(run: FactorRun, ends: list[int], budget: int, check: bool, show_progress: bool | None) -> dict[int, Tensor]:
    """d_j[t] number by number: the scores of the queries q = e_p."""
    numbers = run.num_parameters
    identity = torch.eye(numbers, dtype=run.dtype, device=run.device)
    pieces = identity.split([shape.numel() for shape in run.shapes.values()], 1)
    block = {n: p.reshape(numbers, *shape) for (n, shape), p in zip(run.shapes.items(), pieces, strict=True)}
    windows = [Window(str(t), 0, t) for t in ends]
    scores, _ = swept(run, windows, lambda t: block, numbers, budget, check, show_progress)
    return {t: score.T.to(run.device, run.dtype).contiguous() for t, score in zip(ends, scores, strict=True)}


def _forward(run: FactorRun, ends: list[int], budget: int, check: bool, show_progress: bool | None) -> dict[int, Tensor]:
    """d_j[t] of all samples, so many at a time as fit."""
    num_samples, numbers = run.num_samples, run.num_parameters
    one = (BLOCKS_PER_SAMPLE + len(run.trajectory.slots)) * numbers * run.dtype.itemsize
    together = max(1, int(plan.BLOCK_SHARE * budget) // one)
    chunks = [range(start, min(start + together, num_samples)) for start in range(0, num_samples, together)]
    starts = points(run, int(plan.REPLAY_SHARE * budget), check)
    changes = {t: torch.zeros(num_samples, numbers, dtype=run.dtype, device=run.device) for t in ends}
    with progress_bar(len(chunks) * ends[-1], "index", show_progress) as bar:
        for chunk in chunks:
            blocks = {n: torch.zeros(len(chunk), *shape, dtype=run.dtype, device=run.device) for n, shape in run.shapes.items()}
            state = {name: tuple(torch.zeros_like(value) for _ in run.trajectory.slots) for name, value in blocks.items()}
            for t in range(ends[-1]):
                _advance(run, t, starts.at, blocks, state, chunk)
                if t + 1 in changes:
                    changes[t + 1][chunk.start : chunk.stop] = torch.cat([value.flatten(1) for value in blocks.values()], 1)
                bar.update()
    return changes


def _advance(
    run: FactorRun,
    t: int,
    start: Callable[[int], Point],
    blocks: Params,
    state: dict[str, tuple[Tensor, ...]],
    chunk: range,
) -> None:
    """d [n, *shape] of the samples of `chunk` over step t: the rule, which is linear, of the change of the batch gradient,

    H d_j − Σ_{b=j} a_b ∇ℓ_b.
    """
    trajectory = run.trajectory
    point = start(t)
    change = {name: torch.zeros_like(value) for name, value in blocks.items()}
    for factors in run.batches(t):
        weights = torch.zeros(len(chunk), *factors.slopes.shape, dtype=torch.float64, device=run.device)
        if run.has_curvature:
            weights = factor_products.curvature_weights(factors, factor_products.row_dots(factors, blocks))
        where = ((factors.ids >= chunk.start) & (factors.ids < chunk.stop)).nonzero()[:, 0]
        removed = factors.coefficients[where, None] * factors.slopes[where]
        own = factors.ids[where] - chunk.start
        weights[own, where] -= removed
        factor_products.add_rows(factors, weights, change)
        if run.l2:
            strength = run.l2 * float(factors.coefficients.sum()) if run.has_curvature else 0.0
            for name, value in change.items():
                value.add_(blocks[name], alpha=strength)
                scaled = run.l2 * factors.coefficients[where].to(value).view(-1, *[1] * (value.ndim - 1))
                value.index_add_(0, own, scaled * point.params[name], alpha=-1)
    settings, groups, absent = trajectory.settings(t), trajectory.groups, trajectory.absent(t)
    for name in run.shapes:
        if name not in absent:
            rule, values = trajectory.optimizer[groups[name]], settings[groups[name]]
            # a group without momentum has no state, whatever the log keeps for others
            blocks[name], after = rule.forward(blocks[name], change[name], state[name], point.counts[name], values)
            state[name] = after
