"""What each sample says of itself: self-influence, loss and confidence, to rank samples that may be corrupted."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dit_fast import plan, queries
from dit_fast.data import Samples
from dit_fast.problem import Batch, Evaluator, Params, Problem
from dit_fast.progress import progress_bar
from dit_fast.replay import Replay
from dit_fast.result import Influence
from dit_fast.score import score
from dit_fast.trajectory import Trajectory

Array = npt.NDArray[Any]

# samples that go through the model at once
CHUNK = 1024
# places in the last epoch at which confidence is asked
POINTS = 5


def self_influence(
    trajectory: Trajectory,
    problem: Problem,
    windows: Any = None,
    *,
    sample_ids: Any = None,
    chunk: int = 64,
    show_progress: bool | None = None,
    **options: Any,
) -> Influence:
    """The influence of each sample on its own loss: scores [W, 1, N], in the loss's unit.

    High where the loss of a sample rests on having seen it, as with memorised and mislabelled ones: a ranking of suspects,
    largest first. Without the l2 part. A sample not visited before a window's end is exactly 0.

    Each sample is a query of its own. `chunk` of them are answered in one sweep, of which only their own scores are kept,
    so the cost is that of one sweep with `chunk` query values for every chunk.
    windows, sample_ids, options: as in `score`, whose errors it has. ValueError where the problem has no data.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more samples, got {chunk}")
    samples = _samples(problem)
    ids = Evaluator.create(problem, trajectory, options.get("device"), options.get("dtype")).select(sample_ids)
    if not len(ids):
        raise ValueError("sample_ids is empty: self-influence needs at least one sample")
    scores, retrained, seconds = [], [], 0.0
    with progress_bar(len(ids), "self-influence", show_progress) as bar:
        for some in ids.split(chunk):
            asked = queries.losses(samples.batch(some))
            found = score(trajectory, problem, asked, windows, sample_ids=some, show_progress=False, **options)
            options["check"] = False  # once is enough
            scores.append(found.scores.diagonal(dim1=1, dim2=2))
            retrained.append(found.retrained.diagonal(dim1=1, dim2=2))
            seconds += found.meta["seconds"]
            bar.update(len(some))
    return Influence(
        scores=torch.cat(scores, 1)[:, None],
        windows=found.windows,
        queries=["the sample's own loss"],
        sample_ids=ids,
        retrained=torch.cat(retrained, 1)[:, None],
        meta={**found.meta, "seconds": seconds, "sweeps": len(scores) * found.meta.get("sweeps", 0)},
    )


def sample_losses(trajectory: Trajectory, problem: Problem, steps: Any = None, **options: Any) -> Array:
    """The loss of every sample of the data, without the l2 part, averaged over θ[t] at some steps: float64 [N].

    steps: a step t or several, 0 ≤ t ≤ T; None = the end of the run. In eval mode. options: device, dtype.
    A ranking of suspects, largest first. Samples never visited have a loss too. ValueError where the problem has no data.
    """
    return _mean_over(trajectory, problem, steps, lambda ev, batch, output: _losses(ev, batch, output), options)


def confidence(trajectory: Trajectory, problem: Problem, steps: Any = None, **options: Any) -> Array:
    """The model's probability of every sample's given label, averaged over θ[t] at some steps: float64 [N].

    steps: as in `sample_losses`; None = five places of the last epoch (the last window between marks; without marks the last
    tenth of the run), its end among them. Low for suspects: rank by 1 − confidence. It is the confidence of Swayamdipta et
    al. 2020 (dataset cartography), over one epoch.

    Targets are class numbers [n]; a model with one output per sample is binary, with targets 0 and 1. ValueError otherwise.
    """
    steps = _last_epoch(trajectory) if steps is None else steps
    return _mean_over(trajectory, problem, steps, lambda ev, batch, output: _label_probability(batch, output), options)


def baselines(trajectory: Trajectory, problem: Problem, **options: Any) -> dict[str, Array]:
    """Rankings of suspects [N], largest first, that need no influence: name → values, ready for `detection_table`.

    "loss at the end"; "mean loss over epochs" (at the ends of epochs, where the run has marks); "low confidence, last epoch"
    (1 − `confidence`; left out where the targets are no class numbers). Random ranking needs no run: `detection_table` adds it.
    """
    found = {"loss at the end": sample_losses(trajectory, problem, **options)}
    if trajectory.marks:
        ends = [window.stop for window in trajectory.windows("epochs")]
        found["mean loss over epochs"] = sample_losses(trajectory, problem, ends, **options)
    with suppress(NotClasses):
        found["low confidence, last epoch"] = 1 - confidence(trajectory, problem, **options)
    return found


class NotClasses(ValueError):
    """Targets that are no class numbers, or outputs that are no logits of classes."""


def data_batches(ev: Evaluator, ids: Tensor) -> list[Batch]:
    """The samples `ids` of the problem's data in pieces that go through the model at once."""
    pieces = ids.split(CHUNK) if len(ids) else ()
    return [ev.batch(ev.trajectory.num_steps, piece, torch.ones(len(piece))) for piece in pieces]


def output_of(ev: Evaluator, params: Params, batch: Batch) -> Any:
    """The model's output at `params`, without a graph. The caller has the model in eval mode."""
    with torch.no_grad():
        return ev.call(params, lambda model: model(*batch.args, **batch.kwargs))


def class_logits(output: Any, target: Any) -> Tensor:
    """Logits [n, C] float64 of the classes that `target` [n] counts; one output z per sample becomes (0, z).

    NotClasses for other outputs and targets.
    """
    z = queries.logits_of(output).double()
    if z.ndim == 2 and z.shape[1] == 1:
        z = z[:, 0]
    if z.ndim == 1:
        z = torch.stack([torch.zeros_like(z), z], 1)
    labels = target.reshape(len(target), -1) if isinstance(target, Tensor) and target.ndim else None
    if z.ndim != 2 or labels is None or labels.shape != (len(z), 1):
        shape = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise NotClasses(f"an output {tuple(z.shape)} and a target {shape} are no logits [n, C] and class numbers [n]")
    if (labels != labels.round()).any() or labels.min() < 0 or labels.max() >= z.shape[1]:
        raise NotClasses(f"targets {labels.min():g}..{labels.max():g} are no numbers of the model's {z.shape[1]} classes")
    return z


def _mean_over(
    trajectory: Trajectory,
    problem: Problem,
    steps: Any,
    measure: Callable[[Evaluator, Batch, Any], Tensor],
    options: dict[str, Any],
) -> Array:
    """The mean over steps of measure(evaluator, batch, output) [n] of every sample: float64 [N]."""
    _samples(problem)
    ev = Evaluator.create(problem, trajectory, options.pop("device", None), options.pop("dtype", None))
    if options:
        raise TypeError(f"unknown option {next(iter(options))!r}: there are device and dtype")
    asked = _steps(trajectory, steps)
    total = torch.zeros(ev.num_samples, dtype=torch.float64)
    with ev.session():
        budget = int(plan.REPLAY_SHARE * plan.memory_budget(None, ev.device))
        replay = Replay(ev, not all(rule.is_linear for rule in trajectory.optimizer), budget)
        for t in asked:
            params = replay.params(t)
            with ev.eval_mode():
                for batch in data_batches(ev, torch.arange(ev.num_samples)):
                    total[batch.ids] += measure(ev, batch, output_of(ev, params, batch)).double().cpu()
    return (total / len(asked)).numpy()


def _losses(ev: Evaluator, batch: Batch, output: Any) -> Tensor:
    with torch.no_grad():
        return ev.losses_of(output, batch.target, len(batch.ids))


def _label_probability(batch: Batch, output: Any) -> Tensor:
    z = class_logits(output, batch.target)
    return torch.softmax(z, 1).gather(1, batch.target.reshape(-1, 1).long())[:, 0]


def _steps(trajectory: Trajectory, steps: Any) -> list[int]:
    last = trajectory.num_steps
    asked = [last] if steps is None else [int(t) for t in np.atleast_1d(np.asarray(steps))]
    if not asked or min(asked) < 0 or max(asked) > last:
        raise ValueError(f"steps {steps!r} must lie in 0..{last}, the run's steps, at least one")
    return sorted(asked)


def _last_epoch(trajectory: Trajectory) -> Sequence[int]:
    last = trajectory.num_steps
    start = trajectory.windows("epochs")[-1].start if trajectory.marks else last - max(last // 10, 1)
    return sorted({last - (last - start) * i // POINTS for i in range(POINTS)})


def _samples(problem: Problem) -> Samples:
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a dit_fast.Problem, got {type(problem).__name__}")
    if problem.samples is None:
        raise ValueError("the problem has no data to ask single samples of: give Problem(model, loss, data)")
    return problem.samples
