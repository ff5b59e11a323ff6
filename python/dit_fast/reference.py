"""Slow truth: the estimator and the retraining taken literally, one sample, one step, one endpoint at a time.

Nothing here shares code with the fast paths. A copy of the user's module holds the parameters of each step; gradients come
from plain backward passes over single samples. Use it to check, not to work.
"""

import copy
import time
from collections.abc import Mapping, Sequence
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
    for name, value, allowed in (
        ("hessian", hessian, ("exact", "ggn", "fisher", "none")),
        ("query_at", query_at, ("endpoint", "final")),
        ("method", method, ("adjoint", "retrain")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
    if method == "retrain":
        return leave_one_out(
            trajectory, problem, query, windows, sample_ids=sample_ids, dtype=dtype, device=device, check=check,
            show_progress=show_progress,
        )  # fmt: skip
    began = time.perf_counter()
    spans = trajectory.windows(windows)
    literal = _Literal(problem, trajectory, device, dtype)
    asked = queries.as_list(query)
    ids = literal.ev.select(sample_ids)
    ends = sorted({t for window in spans for t in (window.start, window.stop)} - {0})
    with literal.ev.session():
        if check:
            literal.check(ends[-1])
        sizes = queries.sizes(literal.ev, asked)
        endpoint_scores = {0: torch.zeros(sum(sizes), literal.ev.num_samples, dtype=torch.float64)}
        with progress_bar(sum(ends) * sum(sizes), "reference", show_progress) as bar:
            literal.retrace(ends[-1] if query_at == "endpoint" else trajectory.num_steps)
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
    check: bool = True,
    show_progress: bool | None = None,
) -> Influence:
    """What `dit_fast.leave_one_out` returns, by retraining one ordinary module after the other from the logged start."""
    began = time.perf_counter()
    spans = trajectory.windows(windows)
    literal = _Literal(problem, trajectory, device, dtype)
    asked = queries.as_list(query)
    removed = [[int(j)] for j in literal.ev.select(sample_ids)] if groups is None else [[int(j) for j in g] for g in groups]
    ends = {t for window in spans for t in (window.start, window.stop)} - {0}
    with literal.ev.session():
        if check:
            literal.check(max(ends))
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
        # θ and the optimizer's state before each step, where the log does not hold them all
        self.points: dict[int, tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]] = {}

    def load(self, t: int) -> None:
        self.step = t
        stored = self.points[t][0] if t in self.points else self.trajectory.params(t)
        for name, value in stored.items():
            self.parameters[name].data = value.to(self.ev.device, self.ev.dtype, copy=True)

    def retrace(self, last: int) -> None:
        """Repeat the steps before `last` by torch's optimizer, from the start and through every stored θ[t], and keep all."""
        if self.trajectory.every == 1 and not self.trajectory.slots:
            return
        self.load(0)
        optimizer = self.make_optimizer()
        for t in range(last + 1):
            if self.trajectory.has_params(t):
                self.load(t)
            params = {name: p.detach().clone() for name, p in self.parameters.items()}
            state = {
                name: {key: torch.as_tensor(v).clone() for key, v in optimizer.state[p].items() if v is not None}
                for name, p in self.parameters.items()
            }
            self.points[t] = (params, state)
            if t < last:
                self.take_step(optimizer, t, [])

    def make_optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer, one group per parameter, in the state it had before the first step."""
        rules, groups, stored = self.trajectory.optimizer, self.trajectory.groups, self.trajectory.state(0) or {}
        kinds = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
        optimizer = kinds[rules[0].kind]([{"params": [p]} for p in self.parameters.values()], lr=0.0)
        counts = self.trajectory.counts(0)
        for name, p in self.parameters.items():
            slots = rules[groups[name]].slots
            if counts[name] and slots:
                tensors = zip(slots, stored[name], strict=False)
                optimizer.state[p] = {slot: v.to(self.ev.device, self.ev.dtype, copy=True) for slot, v in tensors}
                if rules[0].kind != "SGD":
                    optimizer.state[p]["step"] = torch.tensor(float(counts[name]))
        return optimizer

    def take_step(self, optimizer: torch.optim.Optimizer, t: int, left_out: list[int]) -> None:
        """Step t as in training, without some samples: backward() per micro-batch, clipping, optimizer.step()."""
        for group, name in zip(optimizer.param_groups, self.parameters, strict=True):
            settings = self._settings(t, name)
            if "beta1" in settings:
                settings["betas"] = (settings.pop("beta1"), settings.pop("beta2"))  # type: ignore[assignment]
            group.update({key: bool(v) if key in ("nesterov", "maximize") else v for key, v in settings.items()})
            if self.trajectory.optimizer[0].kind != "SGD":
                kind = self.trajectory.optimizer[self.trajectory.groups[name]].kind
                group["decoupled_weight_decay"] = kind == "AdamW"
        optimizer.zero_grad()
        for batch in self.ev.batches(t):
            self.ev.seed(batch)
            output = self.model(*batch.args, **batch.kwargs)
            losses = self.problem.per_sample_loss(output, batch.target) + self._penalty()
            kept = torch.tensor([float(i not in left_out) for i in batch.ids.tolist()]).to(losses)
            (losses * (kept * batch.coefficients)).sum().backward()
        absent = self.trajectory.absent(t)
        for name, p in self.parameters.items():
            if name in absent:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
        clip = self.trajectory.clip
        if clip.norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), clip.norm)
        if clip.value is not None:
            torch.nn.utils.clip_grad_value_(self.parameters.values(), clip.value)
        optimizer.step()

    def loss(self, position: int) -> Tensor:
        """ℓ_b(θ) of the sample at one position of the step's batch, the l2 part included, from a batch of its own."""
        return self._data_loss(position)[0] + self._penalty()

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
                ready = query.by_step[at]
                if isinstance(ready, Mapping):
                    raise ValueError("reference.score takes gradients as {step: [Q, P]} only")
                shapes = [p.shape for p in self.parameters.values()]
                for row in ready.to(self.ev.dtype):
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
        scores = torch.zeros(self.ev.num_samples, dtype=torch.float64)
        names = list(self.parameters)
        # behind u, the cotangents of the optimizer's state
        states = {name: [torch.zeros_like(p) for _ in self.trajectory.slots] for name, p in self.parameters.items()}
        for t in reversed(range(end)):
            self.load(t)
            ids, coefficients = self.trajectory.batch_ids(t).tolist(), self.trajectory.coefficients(t).tolist()
            g = self.gradient(sum((a * self.loss(b) for b, a in enumerate(coefficients)), torch.zeros(())))
            u, c = self._step_backward(t, names, g, u, states)
            for b, (sample, a) in enumerate(zip(ids, coefficients, strict=True)):
                scores[sample] -= a * _inner(c, self.gradient(self.loss(b)))
            u = [piece + h for piece, h in zip(u, self._curvature(hessian, coefficients, c), strict=True)]
            progress()
        return scores

    def _step_backward(
        self, t: int, names: list[str], g: Vector, u: Vector, states: dict[str, Vector]
    ) -> tuple[Vector, Vector]:
        """autograd through the optimizer's step at fixed g: the cotangents of θ and of g; `states` is carried in place."""
        theta = [self.parameters[name].detach().requires_grad_() for name in names]
        g = [piece.detach().requires_grad_() for piece in g]
        before = [self._state_leaves(t, name) for name in names]
        counts, absent = self.trajectory.counts(t), self.trajectory.absent(t)
        seen = [piece * 0 if name in absent else piece for name, piece in zip(names, g, strict=True)]
        clipped = _clipped(seen, self.trajectory.clip.norm, self.trajectory.clip.value)
        after, cotangents = [], []
        for i, name in enumerate(names):
            if name in absent:
                new = [theta[i] * 1, *before[i]]
            else:
                kind = self.trajectory.optimizer[self.trajectory.groups[name]].kind
                new = _literal_step(kind, theta[i], clipped[i], before[i], counts[name], self._settings(t, name))
            after += new
            cotangents += [u[i], *states[name]]
        pairs = [(x, y) for x, y in zip(after, cotangents, strict=True) if x.requires_grad]
        inputs = [*theta, *g, *(slot for slots in before for slot in slots)]
        flat = torch.autograd.grad([x for x, _ in pairs], inputs, [y for _, y in pairs], allow_unused=True)
        flat = tuple(torch.zeros_like(x) if f is None else f for x, f in zip(inputs, flat, strict=True))
        n, rest = len(names), list(flat[2 * len(names) :])
        for name in names:
            states[name] = [rest.pop(0) for _ in self.trajectory.slots]
        return list(flat[:n]), list(flat[n : 2 * n])

    def _state_leaves(self, t: int, name: str) -> Vector:
        state = self.points[t][1][name] if t in self.points else {}
        p = self.parameters[name]
        return [state.get(slot, torch.zeros_like(p)).detach().to(p).clone().requires_grad_() for slot in self.trajectory.slots]

    def retrain(self, left_out: list[int], ends: set[int], asked: Sequence[Query]) -> dict[int, Tensor]:
        """Query values [Q] at every end of the run without these samples, by torch's own optimizer."""
        self.load(0)
        optimizer, values = self.make_optimizer(), {}
        for t in range(max(ends)):
            self.take_step(optimizer, t, left_out)
            if t + 1 in ends:
                with torch.no_grad():
                    values[t + 1] = torch.cat([self._values(query) for query in asked]).double().cpu()
        return values

    def check(self, last: int) -> None:
        """The steps the guard looks at, taken literally, where θ is stored before and after them."""
        for t in sorted({0, last // 2, last - 1}):
            if self.trajectory.slots or not (self.trajectory.has_params(t) and self.trajectory.has_params(t + 1)):
                continue
            self.load(t)
            before = {name: p.detach().clone() for name, p in self.parameters.items()}
            self.take_step(self.make_optimizer(), t, [])
            after = {n: v.to(self.ev.device, self.ev.dtype) for n, v in self.trajectory.params(t + 1).items()}
            off = moved = size = 0.0
            for name, p in self.parameters.items():
                off += float((p.detach() - after[name]).square().sum())
                moved += float((after[name] - before[name]).square().sum())
                size += float(before[name].square().sum())
            unit = torch.finfo(self.trajectory.log_dtype).eps
            if not off**0.5 <= unit * size**0.5 + 1e-4 * moved**0.5:
                raise ValueError(f"the problem does not reproduce step {t} of the log (off by {off**0.5:.2g})")

    def _settings(self, t: int, name: str) -> dict[str, float]:
        return dict(self.trajectory.settings(t)[self.trajectory.groups[name]])

    def _data_loss(self, position: int) -> tuple[Tensor, Any, Any, int]:
        """Loss, output, target and row of one sample alone; with dropout, whose masks a batch draws together, in its batch."""
        for batch in self.ev.batches(self.step):
            if position < len(batch.ids):
                break
            position -= len(batch.ids)
        if batch.rng is None:
            batch, position = self.ev.part(batch, slice(position, position + 1)), 0
        self.ev.seed(batch)
        output = self.model(*batch.args, **batch.kwargs)
        return self.problem.per_sample_loss(output, batch.target)[position], output, batch.target, position

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

    def _curvature(self, hessian: str, coefficients: list[float], c: Vector) -> Vector:
        """H c with H the exact or approximated second derivative of Σ_b a_b ℓ_b; l2·Σa·I exact, but 0 for "none"."""
        if hessian == "exact":
            total = sum((a * self.loss(b) for b, a in enumerate(coefficients)), torch.zeros(()))
            g = self.gradient(total, create_graph=True)
            along = sum((piece * cc).sum() for piece, cc in zip(g, c, strict=True))
            return self.gradient(along) if along.requires_grad else [torch.zeros_like(cc) for cc in c]  # type: ignore
        if hessian == "none":
            return [torch.zeros_like(cc) for cc in c]
        product = [self.problem.l2 * sum(coefficients) * cc for cc in c]
        for b, a in enumerate(coefficients):
            loss, output, target, place = self._data_loss(b)
            if hessian == "fisher":
                g = self.gradient(loss)
                weight = a * _inner(g, c)
                product = [piece + weight * gg for piece, gg in zip(product, g, strict=True)]
            elif hessian == "ggn":
                outputs = [z for z in leaves(output) if z.requires_grad]
                rows = [self.gradient(element) for z in outputs for element in z.reshape(-1)]
                curvature = self._output_hessian(output, outputs, target, place)
                tangent = torch.tensor([_inner(row, c) for row in rows], dtype=curvature.dtype, device=curvature.device)
                weights = a * (curvature @ tangent)
                for weight, row in zip(weights, rows, strict=True):
                    product = [piece + weight * r for piece, r in zip(product, row, strict=True)]
        return product

    def _output_hessian(self, output: Any, outputs: Vector, target: Any, place: int) -> Tensor:
        """∂²ℓ/∂z² of one sample over all elements z of its output tensors, dense."""
        sizes = [z.numel() for z in outputs]

        def loss(flat: Tensor) -> Tensor:
            pieces = iter(piece.reshape(z.shape) for piece, z in zip(flat.split(sizes), outputs, strict=True))
            replaced = {id(z): piece for z, piece in zip(outputs, pieces, strict=True)}
            tree = map_tensors(output, lambda z: replaced.get(id(z), z))
            return self.problem.per_sample_loss(tree, target)[place]

        return torch.autograd.functional.hessian(loss, torch.cat([z.detach().flatten() for z in outputs]))


def _inner(a: Vector, b: Vector) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def _clipped(g: Vector, norm: float | None, value: float | None) -> Vector:
    if value is not None:
        return [piece.clamp(-value, value) for piece in g]
    if norm is None:
        return g
    size = torch.stack([piece.square().sum() for piece in g]).sum().sqrt()
    return [piece * (norm / (size + 1e-6)) if size + 1e-6 > norm else piece for piece in g]


def _literal_step(kind: str, theta: Tensor, g: Tensor, state: Vector, count: int, s: dict[str, float]) -> Vector:
    """θ and the state after one step, written as in torch's documentation of SGD, Adam and AdamW."""
    if s["maximize"]:
        g = -g
    if kind == "AdamW":
        theta = theta - s["lr"] * s["weight_decay"] * theta
    else:
        g = g + s["weight_decay"] * theta
    if kind == "SGD":
        if not s["momentum"]:
            return [theta - s["lr"] * g, *state]
        b = s["momentum"] * state[0] + (1 - s["dampening"]) * g if count else g
        return [theta - s["lr"] * (g + s["momentum"] * b if s["nesterov"] else b), b]
    m = s["beta1"] * state[0] + (1 - s["beta1"]) * g
    v = s["beta2"] * state[1] + (1 - s["beta2"]) * g**2
    m_hat, v_hat = m / (1 - s["beta1"] ** (count + 1)), v / (1 - s["beta2"] ** (count + 1))
    seen = v_hat > 0  # where nothing was ever seen the root has no derivative, and m is 0
    root = torch.where(seen, torch.where(seen, v_hat, 1.0).sqrt(), 0.0)
    return [theta - s["lr"] * m_hat / (root + s["eps"]), m, v]
