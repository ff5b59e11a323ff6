"""A run as its logged factors have it: gradients and curvature without a model, and parameters only where they are needed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit_fast import factor_products, problem
from dit_fast.errors import LogError
from dit_fast.factored import Factors, Layout, Lookup, Outer, Part
from dit_fast.linearize import Hessian
from dit_fast.problem import Params
from dit_fast.replay import Point, Replay, advance, gradient_noise, rounding_of
from dit_fast.trajectory import Trajectory

# share of a step's length by which the step that the factors give may miss the logged one, beside rounding
STEP_TOLERANCE = 1e-3


class FactorRun:
    """The factors of a log, on one device and in one dtype (`replay.Run`). A micro-batch is a `Factors`.

    shapes: the parameters covered, in the log's order, with the shapes of their blocks, projected where the log is.
    uncovered: the other parameters of the log.

    Raises ValueError where this curvature is not in the log or the run cannot be gone through by factors alone, LogError
    where the factors do not belong to the log's parameters.
    """

    def __init__(
        self, trajectory: Trajectory, layout: Layout, hessian: Hessian, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.trajectory, self.layout, self.device, self.dtype = trajectory, layout, device, dtype
        self.l2 = layout.l2
        _check_layout(trajectory, layout)
        self.shapes = {name: torch.Size(layout.shapes[name]) for name in trajectory.parameters if name in layout.shapes}
        self.uncovered = [name for name in trajectory.parameters if name not in layout.shapes]
        self.hessian = hessian
        if (refused := _refusal(self)) is not None:
            raise ValueError(refused)
        self._held: dict[int, list[Factors]] = {}

    @property
    def num_samples(self) -> int:
        """N of the log."""
        return self.trajectory.num_samples

    @property
    def num_parameters(self) -> int:
        """Numbers in a column: the parameters covered, projected where they are."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def has_curvature(self) -> bool:
        """Whether H is not 0."""
        return self.hessian != "none"

    @property
    def is_lossless(self) -> bool:
        """Whether nothing was projected or rounded below float32."""
        return not self.layout.projections and self.layout.dtype in (torch.float32, torch.float64)

    def describe(self) -> dict[str, Any]:
        """For result.meta: as `Evaluator.describe`, and what the factors hold."""
        about: dict[str, Any] = {
            "curvature": self.layout.curvature,
            "factors_dtype": str(self.layout.dtype).removeprefix("torch."),
            "factors": "logged, projected" if self.layout.projections else "logged",
        }
        if self.uncovered:
            about["uncovered"] = list(self.uncovered)
        return problem.description(self.trajectory, self.l2, self.device, self.dtype) | about

    def select(self, sample_ids: Any) -> Tensor:
        """The ids asked for [n] int64, all where None."""
        return problem.selected(sample_ids, self.num_samples)

    def params(self, t: int) -> Params:
        """θ[t] of the covered parameters, projected as the factors are."""
        stored = self.trajectory.params(t)
        placed = {name: stored[name].to(self.device, self.dtype) for name in self.shapes}
        for name, projection in self.layout.projections.items():
            placed[name] = projection(placed[name][None])[0]
        return placed

    def batches(self, t: int) -> list[Factors]:
        """The micro-batches of step t; one row per sample where the curvature is not made of more."""
        if t not in self._held:
            found = [factor_products.placed(f, self.device, self.dtype) for f in self.trajectory.factors(t)]
            _check_step(self, t, found)
            # a step and the one before it are asked for in turn
            self._held = {s: held for s, held in self._held.items() if abs(s - t) == 1}
            self._held[t] = found if self.hessian == "ggn" else [factor_products.gradients_alone(f) for f in found]
        return self._held[t]

    def batch_gradient(self, t: int, params: Params) -> Params:
        """g_t from the factors; params are used where l2 is not 0."""
        total = {name: torch.zeros(shape, dtype=self.dtype, device=self.device) for name, shape in self.shapes.items()}
        for factors in self.batches(t):
            for name, value in factor_products.batch_gradient(factors, self.shapes).items():
                total[name] += value
                if self.l2:
                    total[name].add_(params[name], alpha=self.l2 * float(factors.coefficients.sum()))
        return total

    def block_of(self, gradient: Mapping[str, Tensor], what: str) -> Params:
        """A query's gradient [Q, *own shape] (or [Q, *projected shape]) by name as one block, projected where the log is.

        ValueError where it has a part, not 0, in parameters that the factors do not cover: it would be left out.
        """
        for name in self.uncovered:
            if name in gradient and bool(gradient[name].any()):
                raise ValueError(
                    f"{what} depends on parameter '{name}', which the logged factors do not cover: score it with a problem and "
                    "another backend, or give queries.gradients({step: {name: gradient}}) of the covered parameters alone"
                )
        some = next(iter(gradient.values()))
        block = {}
        for name, shape in self.shapes.items():
            if name not in gradient:
                block[name] = torch.zeros(len(some), *shape, dtype=self.dtype, device=self.device)
                continue
            value = gradient[name].to(self.device, self.dtype)
            own = self.trajectory.parameters[name][0]
            if name in self.layout.projections and value.shape[1:] == own:
                value = self.layout.projections[name](value)
            if value.shape[1:] != shape:
                raise ValueError(
                    f"{what} has shape {tuple(value.shape[1:])} for parameter '{name}', which is {tuple(own)} in the log"
                    + (f" and {tuple(shape)} in its factors" if shape != own else "")
                )
            block[name] = value.contiguous()
        return block


class BarePoints:
    """Where steps start from when no step needs parameters or state: update counts alone."""

    is_needed = False

    def __init__(self, run: FactorRun) -> None:
        self._run = run
        self._params = {name: torch.zeros((), dtype=run.dtype).expand(shape) for name, shape in run.shapes.items()}

    def at(self, t: int) -> Point:
        """The point before step t, without numbers."""
        return Point(self._params, {}, self._run.trajectory.counts(t))


def points(run: FactorRun, budget: int, check: bool) -> BarePoints | Replay:
    """What the sweep needs to know where each step starts: nothing under SGD without l2."""
    is_linear = all(rule.is_linear for rule in run.trajectory.optimizer)
    if is_linear and not run.l2:
        return BarePoints(run)
    return Replay(run, not is_linear, budget, check and run.is_lossless)


def check_factors(run: FactorRun, last: int, budget: int) -> None:
    """Take a few steps before `last` by the factors; LogError where one is not the step that was logged.

    Between snapshots it is a whole segment that must meet the next one, within `budget` bytes.
    """
    trajectory = run.trajectory
    if not run.is_lossless:
        return
    if trajectory.every > 1 and min(last, trajectory.segment(0)[1]) > 1:
        Replay(run, True, budget).at(1)
    for t in sorted({0, last // 2, last - 1}):
        state = trajectory.state(t) if trajectory.slots else {}
        if not (trajectory.has_params(t) and trajectory.has_params(t + 1)) or state is None:
            continue
        placed = {n: tuple(slot.to(run.device, run.dtype) for slot in slots) for n, slots in state.items()}
        point = Point(run.params(t), placed, trajectory.counts(t))
        gradient = run.batch_gradient(t, point.params)
        predicted, logged = advance(run, t, point, gradient).params, run.params(t + 1)
        error, step = _distance(predicted, logged), _distance(point.params, logged)
        if not error <= 2 * rounding_of(run, point.params) + gradient_noise(run, t, point, gradient) + STEP_TOLERANCE * step:
            raise LogError(
                f"step {t}: the step that the logged factors give is off by {error:.2g}, the step's length is {step:.2g}: "
                "are they of another run, of a loss scaled otherwise, or was l2 not told to the Recorder? (check=False skips "
                "this test)"
            )


def _refusal(run: FactorRun) -> str | None:
    trajectory, layout, hessian = run.trajectory, run.layout, run.hessian
    if hessian == "exact":
        return (
            "hessian='exact' needs the problem: score(trajectory, Problem(model, loss, data), query); logged factors give "
            "'fisher' and 'none'" + (", and 'ggn'" if layout.curvature != "fisher" else "")
        )
    if hessian == "ggn" and layout.curvature == "fisher":
        return (
            "hessian='ggn' needs rows of the model's outputs, and this log's factors are those of the Fisher: 'fisher', 'none'"
        )
    is_linear = all(rule.is_linear for rule in trajectory.optimizer)
    if layout.projections:
        if not is_linear:
            return f"{trajectory.optimizer[0].kind} works element by element and cannot be followed in projected factors"
        if trajectory.clip:
            return "clipped gradients cannot be followed in projected factors"
        if run.l2 and trajectory.every > 1:
            return "l2 in projected factors needs the parameters of every step, and this log was written with every > 1"
    if trajectory.clip.norm is not None and run.uncovered:
        return (
            f"gradients were clipped by their norm, in which parameter '{run.uncovered[0]}' has a part that the logged "
            "factors do not cover"
        )
    return None


def _check_layout(trajectory: Trajectory, layout: Layout) -> None:
    for name, shape in layout.shapes.items():
        if name not in trajectory.parameters:
            raise LogError(f"the logged factors are of parameter '{name}', which is not in the log: are they of another model?")
        own = trajectory.parameters[name][0]
        if name not in layout.projections and tuple(shape) != tuple(own):
            raise LogError(
                f"the logged factors of parameter '{name}' are {tuple(shape)}, the parameter is {tuple(own)}: are they of "
                "another model?"
            )


def _check_step(run: FactorRun, t: int, found: list[Factors]) -> None:
    """LogError where the factors of a step do not cover the layout's parameters, or are of other samples."""
    ids = run.trajectory.batch_ids(t)
    logged = torch.cat([f.ids for f in found]).cpu() if found else ids[:0]
    if not torch.equal(logged, ids):
        raise LogError(f"step {t}: the logged factors are of other samples than the batch")
    for factors in found:
        covered = [name for part in factors.parts for name in factor_products.names(part)]
        for name in run.shapes:
            if covered.count(name) != 1:
                what = "no factors" if name not in covered else f"{covered.count(name)} sets of factors"
                raise LogError(f"step {t}: the log holds {what} of parameter '{name}'")
        for part in factors.parts:
            for name, shape in _part_shapes(part, run.shapes).items():
                if name not in run.shapes or tuple(shape) != tuple(run.shapes[name]):
                    raise LogError(f"step {t}: the logged factors of '{name}' do not fit its shape: are they of another model?")
        if run.device.type == "cpu" and not all(_is_finite(factor_products.rows_of(p)) for p in factors.parts):
            raise LogError(f"step {t}: the logged factors hold NaN or infinity; score a window that ends before it")


def _is_finite(rows: Tensor) -> bool:
    # a sum is one pass and no copy; it may overflow itself
    return bool(torch.isfinite(rows.sum())) or bool(torch.isfinite(rows).all())


def _part_shapes(part: Part, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    """The shapes of a part's parameters as its factors have them; a weight's as the layout has it where the sizes agree."""
    if isinstance(part, Outer):
        outputs, inputs = part.deltas.shape[-1], part.inputs.shape[-1]
        own = shapes.get(part.weight)
        fits = own is not None and len(own) > 1 and own[0] == outputs and own.numel() == outputs * inputs
        found: dict[str, tuple[int, ...]] = {part.weight: tuple(own) if fits and own is not None else (outputs, inputs)}
        return found if part.bias is None else found | {part.bias: (outputs,)}
    if isinstance(part, Lookup):
        own = shapes.get(part.weight)
        return {part.weight: (own[0] if own else 0, part.deltas.shape[-1])}
    return {part.name: tuple(part.rows.shape[2:])}


def _distance(a: Params, b: Params) -> float:
    return float(sum(float((a[name] - b[name]).double().square().sum()) for name in a)) ** 0.5
