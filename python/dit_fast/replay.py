"""Steps between snapshots: parameters and optimizer state at any step, by the problem's gradients and the optimizer's rule.

A log may hold parameters at every k-th step only, and it holds the optimizer's state at the beginning of each segment only.
What lies between is replayed from there. Each segment must meet what is stored at its end, and every parameter stored in
between, or the log is refused: its problem is another one (design §4).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dit_fast.errors import LogError
from dit_fast.optimizers import State
from dit_fast.problem import Params
from dit_fast.trajectory import Trajectory

# a replayed segment must end within this share of the distance travelled, beside the rounding of the parameters themselves
DRIFT_TOLERANCE = 1e-3
# a share that only Adam's steps from gradients that are all rounding can explain, and that they seldom reach
DOUBTFUL_DRIFT = 0.1
CAUSES = (
    "Likely: gradients clipped and the Recorder not told (clip_norm=, clip_value=), or told and not clipped; another model, "
    "loss or l2; ids in another order or of another data set, or not all batches named; gradients kept from the step before "
    "(zero_grad); random augmentation (store_batches=True keeps the batches); dropout by function (use torch.nn.Dropout); "
    "autocast."
)
# a gradient's elements are rounded to about this many units in the last place of its largest
GRADIENT_ROUNDING = 4


class Run(Protocol):
    """A run that can be gone through again: a problem on its log (`problem.Evaluator`), or factors (`logged.FactorRun`)."""

    trajectory: Trajectory
    device: torch.device
    dtype: torch.dtype
    shapes: dict[str, torch.Size]

    def params(self, t: int) -> Params:
        """θ[t] where it is stored."""

    def batches(self, t: int) -> Sequence[Any]:
        """The micro-batches of step t, with ids and coefficients."""

    def batch_gradient(self, t: int, params: Params) -> Params:
        """g_t = Σ_b a_b ∇ℓ_b(θ), the l2 part included, over the micro-batches of step t."""


@dataclass(frozen=True)
class Point:
    """Everything a step starts from: θ, the optimizer's state and its update counts before the step."""

    params: Params
    state: dict[str, State]
    counts: dict[str, int]

    def num_bytes(self) -> int:
        """Memory it holds."""
        tensors = [*self.params.values(), *(slot for slots in self.state.values() for slot in slots)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Replay:
    """`at(t)`: the point before any step; cheapest when asked in order, up or down.

    with_state: whether the optimizer's state is wanted, where the log does not hold it at every step. budget: bytes for
    points kept; where a segment does not fit, it is passed over once more with √-spaced checkpoints. check: raise LogError
    where a segment misses what is stored.
    is_needed: whether anything is replayed at all.
    drift: the largest distance by which a segment missed a stored one, as a share of the distance travelled.
    """

    def __init__(self, ev: Run, with_state: bool, budget: int, check: bool = True) -> None:
        self._ev, self._trajectory = ev, ev.trajectory
        self._with_state = with_state and bool(ev.trajectory.slots)
        self.is_needed = self._with_state or ev.trajectory.every > 1
        self._budget, self._is_checked = budget, check
        self._segment = range(0)
        self._checkpoints: dict[int, Point] = {}
        self._points: dict[int, Point] = {}
        self.drift, self._has_warned = 0.0, False

    def at(self, t: int) -> Point:
        """The point before step t, or after the last for t = T (there without state)."""
        if not self.is_needed or t == self._trajectory.num_steps:
            return Point(self._ev.params(t), {}, self._trajectory.counts(t))
        if t not in self._segment:
            segment = range(*self._trajectory.segment(t))
            if t == segment.start:
                return self._stored(t)
            self._enter(segment)
        if t not in self._points:
            start = max(s for s in self._checkpoints if s <= t)
            stop = min((s for s in self._checkpoints if s > t), default=self._segment.stop)
            self._points = self._run(start, stop, 1)
        return self._points[t]

    def params(self, t: int) -> Params:
        """θ[t] alone, stored or replayed."""
        return self._ev.params(t) if self._trajectory.has_params(t) else self.at(t).params

    def _enter(self, segment: range) -> None:
        """Pass over a segment once, keeping every point where they fit and √-spaced ones where not."""
        first = self._stored(segment.start)
        self._segment, self._points, self._checkpoints = segment, {}, {segment.start: first}
        room = max(self._budget // max(first.num_bytes(), 1), 2)
        if len(segment) <= room:
            self._points = self._run(segment.start, segment.stop, 1, check=True)
        else:
            self._checkpoints = self._run(segment.start, segment.stop, max(math.isqrt(len(segment)), 1), check=True)

    def _stored(self, t: int) -> Point:
        state = self._trajectory.state(t)
        if state is None:
            raise LogError(f"step {t}: no segment of the log begins here")
        placed = {name: tuple(slot.to(self._ev.device, self._ev.dtype) for slot in slots) for name, slots in state.items()}
        return Point(self._ev.params(t), placed, self._trajectory.counts(t))

    def _run(self, start: int, stop: int, spacing: int, check: bool = False) -> dict[int, Point]:
        """The points at every `spacing`-th step from `start` on, which is a checkpoint; up to `stop`."""
        point, kept = self._checkpoints[start], {}
        travelled = noise = 0.0
        for t in range(start, stop):
            if (t - start) % spacing == 0:
                kept[t] = point
            if t + 1 == stop and not check:
                break
            gradient = self._ev.batch_gradient(t, point.params)
            after = advance(self._ev, t, point, gradient)
            travelled += _distance(after.params, point.params)
            noise += gradient_noise(self._ev, t, point, gradient) if check else 0.0
            if self._trajectory.has_params(t + 1):
                stored = self._ev.params(t + 1)
                if check:
                    self._check(t + 1, after.params, stored, travelled, noise)
                after = Point(stored, after.state, after.counts)
                travelled = noise = 0.0
            point = after
        return kept

    def _check(self, t: int, replayed: Params, stored: Params, travelled: float, noise: float) -> None:
        error = _distance(replayed, stored)
        own = rounding_of(self._ev, stored)
        rounding = own + noise
        self.drift = max(self.drift, error / max(travelled, rounding, 1e-300))
        if not self._is_checked:
            return
        if not error <= 2 * rounding + DRIFT_TOLERANCE * travelled:
            raise LogError(
                f"the replay misses the parameters stored before step {t} by {error:.2g}, where {rounding:.2g} is rounding and "
                f"{travelled:.2g} the distance travelled since the last stored ones. {CAUSES} Or the run itself is unstable: "
                "log it with a smaller every=."
            )
        if error > 2 * own + DOUBTFUL_DRIFT * travelled and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the replay misses the parameters stored before step {t} by {error / travelled:.2g} of the distance "
                "travelled. The optimizer may have made this of gradients that are all rounding; if not, the scores are of "
                f"another run: compare a few with leave_one_out. {CAUSES}",
                RuntimeWarning,
                stacklevel=2,
            )


def advance(ev: Run, t: int, point: Point, gradient: Params) -> Point:
    """The point after step t, by the raw batch gradient, clipping and the optimizer's rule."""
    trajectory = ev.trajectory
    settings, groups, absent = trajectory.settings(t), trajectory.groups, trajectory.absent(t)
    # a parameter without a gradient has no part in the norm
    gradient = trajectory.clip.forward({name: value for name, value in gradient.items() if name not in absent})
    params, state, counts = dict(point.params), dict(point.state), dict(point.counts)
    for name, theta in point.params.items():
        if name in absent:
            continue
        rule, values = trajectory.optimizer[groups[name]], settings[groups[name]]
        params[name], state[name] = rule.forward(theta, gradient[name], point.state.get(name, ()), counts[name], values)
        counts[name] += rule.counted(values)
    return Point(params, state, counts)


def gradient_noise(ev: Run, t: int, point: Point, gradient: Params) -> float:
    """How far step t may be off, ‖Δθ‖, because the run's own gradient was rounded in the parameters' dtype.

    Nothing for linear rules, where it stays within the rounding of θ. Adam turns even a gradient that is all rounding, such
    as that of an attention's key bias, into a step of the rate's size.
    """
    if all(rule.is_linear for rule in ev.trajectory.optimizer):
        return 0.0
    dtypes = {dtype for _, dtype in ev.trajectory.parameters.values()}
    largest = max(float(value.abs().max()) for value in gradient.values() if value.numel())
    delta = GRADIENT_ROUNDING * max(torch.finfo(dtype).eps for dtype in dtypes) * largest
    ends = [advance(ev, t, point, {n: g + sign * delta for n, g in gradient.items()}).params for sign in (1, -1)]
    return _distance(*ends)


def rounding_of(ev: Run, params: Params) -> float:
    """‖ulp(θ)‖ in the dtype the log stores."""
    total = 0.0
    for value in params.values():
        size = value.abs().to(ev.trajectory.log_dtype)
        ulp = torch.nextafter(size, torch.full_like(size, torch.inf)).double() - size.double()
        total += float(ulp.square().sum())
    return math.sqrt(total)


def _distance(a: Params, b: Params) -> float:
    return math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in a))
