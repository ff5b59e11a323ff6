"""Slow truth: the estimator and the retraining taken literally, one sample, one step, one endpoint at a time.

Nothing here shares code with the fast paths. A copy of the user's module holds the parameters of each step; gradients come
from plain backward passes over single samples. Use it to check, not to work.
"""

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast import queries
from dit_fast.data import leaves, map_tensors
from dit_fast.problem import Evaluator, Problem
from dit_fast.progress import progress_bar
from dit_fast.queries import Query
from dit_fast.result import Influence
from dit_fast.trajectory import Trajectory

Vector = list[Tensor]


def score(
    trajectory: Trajectory,
    problem: Problem,
    query: Query | Sequence[Query],
    windows: Any = None,
    *,
    sample_ids: Any = None,
    hessian: str = "exact",
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
    """What `dit_fast.score` returns, by one backward per sample and one double backward per step, a sweep per endpoint.

    Same arguments, result, sign and unit. `backend` and `memory_budget` have nothing to choose here; `refine` is refused.
    """
    if refine:
        raise ValueError("reference.score does not refine: use method='retrain'")
    if method == "retrain":
        return leave_one_out(
            trajectory, problem, query, windows, sample_ids=sample_ids, dtype=dtype, device=device, show_progress=show_progress
        )
    began = time.perf_counter()
    spans = trajectory.windows(windows)
    literal = _Literal(problem, trajectory, device, dtype)
    asked = queries.as_list(query)
    ids = problem.select(sample_ids)
    ends = sorted({t for window in spans for t in (window.start, window.stop)} - {0})
    with literal.ev.session():
        if check:
            literal.check(ends[-1])
        sizes = queries.sizes(literal.ev, asked)
        endpoint_scores = {0: torch.zeros(sum(sizes), problem.num_samples, dtype=torch.float64)}
        with progress_bar(sum(ends) * sum(sizes), "reference", show_progress) as bar:
            for end in ends:
                starts = literal.query_gradients(end, end if query_at == "endpoint" else trajectory.num_steps, asked, sizes)
                endpoint_scores[end] = torch.stack([literal.sweep(end, u, hessian, bar.update) for u in starts])
    return Influence(
        scores=torch.stack([endpoint_scores[w.stop] - endpoint_scores[w.start] for w in spans])[..., ids],
        windows=spans,
        queries=queries.names(asked, sizes),
        sample_ids=ids,
        meta=literal.ev.describe()
        | {"method": "reference", "hessian": hessian, "query_at": query_at, "seconds": time.perf_counter() - began},
    )


def leave_one_out(
    trajectory: Trajectory,
    problem: Problem,
    query: Query | Sequence[Query],
    windows: Any = None,
    *,
    sample_ids: Any = None,
    groups: Sequence[Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    show_progress: bool | None = None,
) -> Influence:
    """What `dit_fast.leave_one_out` returns, by retraining one ordinary module after the other from the logged start."""
    began = time.perf_counter()
    spans = trajectory.windows(windows)
    literal = _Literal(problem, trajectory, device, dtype)
    asked = queries.as_list(query)
    removed = [[int(j)] for j in problem.select(sample_ids)] if groups is None else [[int(j) for j in g] for g in groups]
    ends = {t for window in spans for t in (window.start, window.stop)} - {0}
    with literal.ev.session():
        sizes = queries.sizes(literal.ev, asked)
        with progress_bar(1 + len(removed), "reference", show_progress) as bar:
            base = literal.retrain([], ends, asked)
            changes = []
            for left_out in removed:
                run = literal.retrain(left_out, ends, asked)
                changes.append({0: torch.zeros(sum(sizes), dtype=torch.float64)} | {t: run[t] - base[t] for t in ends})
                bar.update()
    scores = torch.stack([torch.stack([c[w.stop] - c[w.start] for c in changes], dim=-1) for w in spans])
    return Influence(
        scores=scores,
        windows=spans,
        queries=queries.names(asked, sizes),
        sample_ids=torch.arange(len(removed)) if groups is not None else torch.tensor([g[0] for g in removed]),
        retrained=torch.ones(scores.shape, dtype=torch.bool),
        groups=None if groups is None else removed,
        meta=literal.ev.describe() | {"method": "reference retrain", "seconds": time.perf_counter() - began},
    )


class _Literal:
    """A copy of the module that is set to one step's parameters at a time."""

    def __init__(self, problem: Problem, trajectory: Trajectory, device: Any, dtype: torch.dtype | None) -> None:
        own = copy.deepcopy(problem)
        self.ev = Evaluator.create(own, trajectory, device, dtype)
        self.problem, self.trajectory = own, trajectory
        self.model = own.model.to(self.ev.device, self.ev.dtype)
        for name, value in (trajectory.constants or {}).items():
            dict(self.model.named_buffers())[name].copy_(value)
        self.parameters = {n: p for n, p in self.model.named_parameters() if n in trajectory.parameters}

    def load(self, t: int) -> None:
        for name, value in self.trajectory.params(t).items():
            self.parameters[name].data = value.to(self.ev.device, self.ev.dtype, copy=True)

    def loss(self, sample: int) -> Tensor:
        """ℓ_j(θ) of one sample, the l2 part included, from a batch of its own."""
        return self._data_loss(sample)[0] + self._penalty()

    def gradient(self, value: Tensor, create_graph: bool = False) -> Vector:
        flat = torch.autograd.grad(
            value, list(self.parameters.values()), create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(p) if f is None else f for p, f in zip(self.parameters.values(), flat, strict=True)]

    def query_gradients(self, end: int, at: int, asked: Sequence[Query], sizes: Sequence[int]) -> list[Vector]:
        self.load(at)
        found = []
        for query, size in zip(asked, sizes, strict=True):
            if query.by_step is not None:
                shapes = [p.shape for p in self.parameters.values()]
                for row in query.by_step[at].to(self.ev.dtype):
                    pieces = row.split([shape.numel() for shape in shapes])
                    found.append([piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)])
                continue
            values = self._values(query)
            constant = not values.requires_grad
            found += [
                [torch.zeros_like(p) for p in self.parameters.values()] if constant else self.gradient(values[i])
                for i in range(size)
            ]
        return found

    def sweep(self, end: int, u: Vector, hessian: str, progress: Any) -> Tensor:
        """Scores [N] of [0, end) for the query gradient u."""
        scores = torch.zeros(self.problem.num_samples, dtype=torch.float64)
        for t in reversed(range(end)):
            self.load(t)
            ids, coefficients = self.trajectory.batch_ids(t).tolist(), self.trajectory.coefficients(t).tolist()
            # c, the cotangent of the batch gradient in θ[t+1] = θ[t] − η (g + wd θ[t]); each group has its own η and wd
            settings = [self._settings(t, name) for name in self.parameters]
            c = [-s["lr"] * piece for s, piece in zip(settings, u, strict=True)]
            for sample, a in zip(ids, coefficients, strict=True):
                scores[sample] -= a * _inner(c, self.gradient(self.loss(sample)))
            product = self._curvature(hessian, ids, coefficients, c)
            u = [piece + s["weight_decay"] * cc + h for s, piece, cc, h in zip(settings, u, c, product, strict=True)]
            progress()
        return scores

    def retrain(self, left_out: list[int], ends: set[int], asked: Sequence[Query]) -> dict[int, Tensor]:
        """Query values [Q] at every end of the run without these samples, by torch.optim.SGD."""
        self.load(0)
        names = list(self.parameters)
        optimizer = torch.optim.SGD([{"params": [self.parameters[name]]} for name in names], lr=0.0)
        values = {}
        for t in range(max(ends)):
            for group, name in zip(optimizer.param_groups, names, strict=True):
                group.update(self._settings(t, name))
            optimizer.zero_grad()
            for part in self.trajectory.micro_batches(t):
                ids, coefficients = self.trajectory.batch_ids(t)[part], self.trajectory.coefficients(t)[part]
                args, kwargs, target = self.ev.unpack(self.problem.samples.batch(ids))
                losses = self.problem.per_sample_loss(self.model(*args, **kwargs), target) + self._penalty()
                kept = torch.tensor([float(i not in left_out) for i in ids.tolist()])
                (losses * (kept * coefficients).to(losses)).sum().backward()
            optimizer.step()
            if t + 1 in ends:
                with torch.no_grad():
                    values[t + 1] = torch.cat([self._values(query) for query in asked]).double().cpu()
        return values

    def check(self, last: int) -> None:
        """The steps the guard looks at, taken literally."""
        for t in sorted({0, last // 2, last - 1}):
            self.load(t)
            ids, coefficients = self.trajectory.batch_ids(t).tolist(), self.trajectory.coefficients(t).tolist()
            g = self.gradient(sum(a * self.loss(j) for j, a in zip(ids, coefficients, strict=True)))
            after = {n: v.to(self.ev.device, self.ev.dtype) for n, v in self.trajectory.params(t + 1).items()}
            off = moved = size = 0.0
            for (name, p), piece in zip(self.parameters.items(), g, strict=True):
                s = self._settings(t, name)
                theta = p.detach()
                off += float((theta - s["lr"] * (piece + s["weight_decay"] * theta) - after[name]).square().sum())
                moved += float((after[name] - theta).square().sum())
                size += float(theta.square().sum())
            unit = torch.finfo(next(iter(self.trajectory.params(0).values())).dtype).eps
            if not off**0.5 <= unit * size**0.5 + 1e-4 * moved**0.5:
                raise ValueError(f"the problem does not reproduce step {t} of the log (off by {off**0.5:.2g})")

    def _settings(self, t: int, name: str) -> dict[str, float]:
        return dict(self.trajectory.settings(t)[self.trajectory.groups[name]])

    def _data_loss(self, sample: int) -> tuple[Tensor, Any, Any]:
        args, kwargs, target = self.ev.unpack(self.problem.samples.batch(torch.tensor([sample])))
        output = self.model(*args, **kwargs)
        return self.problem.per_sample_loss(output, target)[0], output, target

    def _penalty(self) -> Tensor | float:
        if not self.problem.l2:
            return 0.0
        return 0.5 * self.problem.l2 * sum(p.square().sum() for p in self.parameters.values())

    def _values(self, query: Query) -> Tensor:
        with self.ev.eval_mode():
            pieces = [part.fn(self.model, self.ev) for part in query.parts]
        return pieces[0] if query.size in (None, len(pieces[0])) and len(pieces) == 1 else self._joined(query, pieces)

    @staticmethod
    def _joined(query: Query, pieces: list[Tensor]) -> Tensor:
        return sum(pieces) if query.size == 1 else torch.cat(pieces)  # type: ignore[return-value]

    def _curvature(self, hessian: str, ids: list[int], coefficients: list[float], c: Vector) -> Vector:
        """H c with H the exact or approximated second derivative of Σ_b a_b ℓ_b, l2·Σa·I always exact."""
        if hessian == "exact":
            total = sum(a * self.loss(sample) for sample, a in zip(ids, coefficients, strict=True))
            g = self.gradient(total, create_graph=True)  # type: ignore[arg-type]
            along = sum((piece * cc).sum() for piece, cc in zip(g, c, strict=True))
            return self.gradient(along) if along.requires_grad else [torch.zeros_like(cc) for cc in c]  # type: ignore
        product = [self.problem.l2 * sum(coefficients) * cc for cc in c]
        for sample, a in zip(ids, coefficients, strict=True):
            loss, output, target = self._data_loss(sample)
            if hessian == "fisher":
                g = self.gradient(loss)
                weight = a * _inner(g, c)
                product = [piece + weight * gg for piece, gg in zip(product, g, strict=True)]
            elif hessian == "ggn":
                outputs = [z for z in leaves(output) if z.requires_grad]
                rows = [self.gradient(element) for z in outputs for element in z.reshape(-1)]
                curvature = self._output_hessian(output, outputs, target)
                tangent = torch.tensor([_inner(row, c) for row in rows], dtype=curvature.dtype, device=curvature.device)
                weights = a * (curvature @ tangent)
                for weight, row in zip(weights, rows, strict=True):
                    product = [piece + weight * r for piece, r in zip(product, row, strict=True)]
        return product

    def _output_hessian(self, output: Any, outputs: Vector, target: Any) -> Tensor:
        """∂²ℓ/∂z² of one sample over all elements z of its output tensors, dense."""
        sizes = [z.numel() for z in outputs]

        def loss(flat: Tensor) -> Tensor:
            pieces = iter(piece.reshape(z.shape) for piece, z in zip(flat.split(sizes), outputs, strict=True))
            replaced = {id(z): piece for z, piece in zip(outputs, pieces, strict=True)}
            tree = map_tensors(output, lambda z: replaced.get(id(z), z))
            return self.problem.per_sample_loss(tree, target).sum()

        return torch.autograd.functional.hessian(loss, torch.cat([z.detach().flatten() for z in outputs]))


def _inner(a: Vector, b: Vector) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))
