"""The guard: a problem that does not reproduce the log is refused before anything is computed from it (design §2)."""

import math

import torch
from torch import Tensor

from dit_fast.errors import UnsupportedError, explained
from dit_fast.problem import Evaluator, Params
from dit_fast.replay import CAUSES, Replay, advance, gradient_noise, rounding_of

# a step must be met within this share of its length, beside the rounding of the parameters themselves
STEP_TOLERANCE = 1e-4
# parameters of the log looked at to find the largest step
NUMBERS_LOOKED_AT = 1 << 27


def check_problem(ev: Evaluator, last: int, replay: Replay) -> None:
    """Replay a few steps before `last` through the problem; ValueError where one is missed.

    They are the first, the middle, the last, and the one whose step was the largest for its rate, the first that clipping
    would have shortened.

    Raises UnsupportedError for a per-sample loss that depends on the rest of its batch.
    """
    _check_samples_are_independent(ev)
    for t in sorted({0, last // 2, last - 1, *_largest_step(ev, last)}):
        replayed = [s for s in (t, t + 1) if not ev.trajectory.has_params(s)]
        if replayed:
            replay.at(replayed[0])  # the replay of the whole segment is checked, with the rounding of all its steps
            continue
        point = replay.at(t)
        params, logged = point.params, ev.params(t + 1)
        gradient = ev.batch_gradient(t, params)
        predicted = advance(ev, t, point, gradient).params
        error = _norm({name: predicted[name] - logged[name] for name in logged})
        step = _norm({name: logged[name] - params[name] for name in logged})
        rounding = rounding_of(ev, params) + gradient_noise(ev, t, point, gradient)
        if not error <= rounding + STEP_TOLERANCE * step:
            cause = _likely_cause(ev, t, params, predicted, logged)
            raise ValueError(
                f"the problem does not reproduce step {t} of the log: its step is off by {error:.2g} where "
                f"{rounding + STEP_TOLERANCE * step:.2g} is rounding and the step's length is {step:.2g}. {cause} "
                "(check=False skips this test, at the price of scores of another run)"
            )


def _largest_step(ev: Evaluator, last: int) -> list[int]:
    """The step with the largest ‖θ[t+1] − θ[t]‖/η, of at most so many as are read quickly; none for a log with gaps."""
    if ev.trajectory.every > 1:
        return []
    stride = max(1, last * ev.num_parameters // NUMBERS_LOOKED_AT)
    lengths = {}
    for t in range(0, last, stride):
        before, after = ev.trajectory.rows(t, t + 2).double()
        rate = max(settings["lr"] for settings in ev.trajectory.settings(t))
        lengths[t] = float((after - before).norm()) / rate if rate else 0.0
    return [max(lengths, key=lambda t: lengths[t])]


def _check_samples_are_independent(ev: Evaluator) -> None:
    params, whole = ev.params(0), ev.batches(0)[0]
    with torch.no_grad(), explained("the problem's model or per_sample_loss fails on the first batch of the log"):
        losses = ev.losses(params, whole)
    half = len(whole.ids) // 2
    if not half or whole.rng is not None:  # half a batch would draw other masks
        return
    part = ev.part(whole, slice(half))
    with torch.no_grad():
        alone = ev.losses(params, part)
    together = losses[:half]
    scale = together.abs().max().clamp_min(1e-6)
    if not (together - alone).abs().max() <= (1e-3 if ev.dtype == torch.float32 else 1e-8) * scale:
        raise UnsupportedError(
            "the per-sample losses depend on the other samples of the batch, or on chance (dropout by function: use "
            "torch.nn.Dropout, whose masks are logged): use a loss and a model that treat every sample alone"
        )


def _likely_cause(ev: Evaluator, t: int, params: Params, predicted: Params, logged: Params) -> str:
    moved, expected = _flat(logged, params), _flat(predicted, params)
    error, theta = expected - moved, _flat(params)
    size = ev.trajectory.batch_ids(t).numel()
    if not torch.isfinite(expected).all():
        return "The problem's gradient holds NaN or infinity."
    if _cosine(moved, expected) > 0.9999:
        ratio = float(moved.norm() / expected.norm())
        guess = "the learning rate, the loss's scale or clipping of gradients (Recorder(clip_norm=...) tells of it)"
        if math.isclose(ratio, size, rel_tol=1e-2) or math.isclose(ratio, 1 / size, rel_tol=1e-2):
            guess = f"sum or mean ({size} samples in the batch): the Recorder's reduction"
        elif ratio < 1:
            guess = "gradients clipped before the step and the Recorder not told (clip_norm=, clip_value=), or the loss's scale"
        return f"The logged step has the same direction and is {ratio:.6g} times as long: likely {guess}."
    if abs(_cosine(error, theta)) > 0.999:
        rate = float(ev.trajectory.settings(t)[0]["lr"])
        missing = float(error @ theta / (theta @ theta)) / rate / float(ev.trajectory.coefficients(t).sum())
        l2 = ev.l2 + missing if abs(ev.l2 + missing) > 1e-3 * ev.l2 else 0.0
        return f"The difference is proportional to the parameters: likely l2={l2:.3g} where it is {ev.l2:.3g}."
    return CAUSES


def _flat(values: Params, minus: Params | None = None) -> Tensor:
    return torch.cat([(v if minus is None else v - minus[n]).flatten().double() for n, v in values.items()])


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))


def _norm(values: Params) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))
