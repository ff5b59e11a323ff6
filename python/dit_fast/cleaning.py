"""clean(): take the top suspects out of a run, or relabel them, train again as the log says, and see what it did."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dit_fast import numerics, plan
from dit_fast.data import as_ids, leaves, map_tensors
from dit_fast.detection import checked_ranking
from dit_fast.guard import check_problem
from dit_fast.problem import Batch, Evaluator, Params, Problem
from dit_fast.progress import progress_bar
from dit_fast.replay import Point, Replay, advance, batch_gradient
from dit_fast.suspects import CHUNK, class_logits, data_batches, output_of
from dit_fast.trajectory import Trajectory

Array = npt.NDArray[Any]

HOW = ("drop", "relabel")


@dataclass(frozen=True, eq=False)
class Cleaning:
    """What cleaning did; what `clean` returns.

    suspects: the ids dropped or relabelled, int64 [k], most suspicious first; num_never_visited of them were in no batch
        of the log, so that nothing could change for them in the run of seed 0.
    seeds: the runs. before, after: the measure of each, float64 [S].
    """

    how: str
    measure: str
    suspects: Array
    num_samples: int
    num_never_visited: int
    seeds: list[int]
    before: Array
    after: Array

    @property
    def gain(self) -> Array:
        """after − before of each run [S]."""
        return self.after - self.before

    @property
    def mean(self) -> tuple[float, float, float]:
        """The means over runs of before, after and gain."""
        return float(self.before.mean()), float(self.after.mean()), float(self.gain.mean())

    @property
    def spread(self) -> tuple[float, float, float]:
        """The standard deviations over runs (n − 1) of before, after and gain; NaN for one run."""
        if len(self.seeds) < 2:
            return math.nan, math.nan, math.nan
        return float(self.before.std(ddof=1)), float(self.after.std(ddof=1)), float(self.gain.std(ddof=1))

    def __repr__(self) -> str:
        verb = {"drop": "dropped", "relabel": "relabelled"}[self.how]
        unseen = f" ({self.num_never_visited:,} never visited)" if self.num_never_visited else ""
        lines = [
            f"Cleaning: {len(self.suspects):,} of {self.num_samples:,} samples {verb}{unseen}, "
            f"{len(self.seeds)} run{'s' * (len(self.seeds) != 1)}"
        ]
        for name, mean, spread in zip(("before", "after", "gain"), self.mean, self.spread, strict=True):
            sign = "+" if name == "gain" else ""
            around = "" if math.isnan(spread) else f" ± {spread:.4f}"
            lines.append(f"  {self.measure} {name:<7}{mean:{sign}.4f}{around}")
        return "\n".join(lines)


def clean(
    trajectory: Trajectory,
    problem: Problem,
    ranking: Any,
    *,
    evaluate: Any,
    fraction: float = 0.1,
    how: str = "drop",
    labels: Any = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    coefficients: str = "rescale",
    initialize: Callable[[nn.Module], object] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    check: bool = True,
    show_progress: bool | None = None,
) -> Cleaning:
    """Drop or relabel the most suspicious samples, retrain by the log's own schedule, and measure before and after.

    ranking: [N], largest first, such as `suspicion(result)` or the scores of `self_influence`; the first round(fraction · N)
        are the suspects. Equal values are taken in the order of samples. NaN is refused.
    evaluate: (x, y), for the accuracy on them (a share, in eval mode), or a function of the model that returns a number.
    how: "drop" = they leave every batch; "relabel" = they stay, with `labels`: [N], of which those of the suspects are
        used, or {id: label}, or "predicted" = the class that the logged run's last parameters give them.
    coefficients: of the others in a batch that lost samples: "rescale" = so that they sum to what the batch's summed to, a
        mean staying a mean; "keep" = as they were, as in `leave_one_out`. A batch that lost all has no gradient; momentum
        and decay act on.
    seeds: one pair of runs each. 0 is the logged run itself: its start, its batches. Any other is a new run by the same
        schedule: parameters from every module's `reset_parameters` (or from `initialize(model)`, which is given a copy to
        fill in place), optimizer state zero, and in each batch other samples: a random exchange of the ids that the run
        visited. Learning rates, sizes, coefficients and all settings are those of the log, step by step.

    Nothing outside is changed: neither problem, model nor log. Every run is one training run in torch, of any optimizer that
    can be logged. Raises ValueError or TypeError for arguments, LogError and UnsupportedError as `score`.
    """
    _check_options(how, labels, coefficients, fraction, seeds)
    ev = _Altered.create(problem, trajectory, device, dtype)
    assert isinstance(ev, _Altered)
    values = checked_ranking(ranking)
    if len(values) != ev.num_samples:
        raise ValueError(f"ranking has {len(values)} values, the data {ev.num_samples} samples: it must rank all of them")
    suspects = torch.from_numpy(np.argsort(-values, kind="stable")[: round(fraction * len(values))].copy())
    if not len(suspects):
        raise ValueError(f"fraction={fraction!r} of {len(values)} samples is none: nothing to clean")
    if problem.samples is None and (how == "relabel" or any(seeds)):
        raise ValueError("the problem has no data, and the log's own batches serve how='drop' with seeds=(0,) alone")
    visited = torch.cat([trajectory.batch_ids(t) for t in range(trajectory.num_steps)]).unique()
    ev.rescales = coefficients == "rescale"
    measure, name = _measure(ev, evaluate)
    before, after = [], []
    default = torch.get_default_dtype()
    with ev.session(), progress_bar(2 * len(seeds) * trajectory.num_steps, "cleaning", show_progress) as bar:
        budget = int(plan.REPLAY_SHARE * plan.memory_budget(None, ev.device))
        if check:
            check_problem(ev, trajectory.num_steps, Replay(ev, True, budget))
        new_labels = _new_labels(ev, suspects, labels) if how == "relabel" else None
        for seed in seeds:
            ev.restore()
            start = _start(ev, seed, initialize, default)
            if seed:
                ev.exchange = _exchange(ev.num_samples, visited, seed)
            before.append(measure(_train(ev, start, seed, bar.update)))
            ev.take_out(suspects) if new_labels is None else ev.relabel(suspects, new_labels)
            after.append(measure(_train(ev, start, seed, bar.update)))
    unseen = int((~torch.isin(suspects, visited)).sum())
    found = (np.array(before, dtype=float), np.array(after, dtype=float))
    return Cleaning(how, name, suspects.numpy(), ev.num_samples, unseen, [int(s) for s in seeds], *found)


class _Altered(Evaluator):
    """The run with other samples in its batches, some left out, or some labels changed; at first as it was."""

    rescales = True
    exchange: Tensor | None = None
    _left_out: Tensor | None = None
    _labels: tuple[Tensor, Tensor] | None = None

    def restore(self) -> None:
        """As the run was."""
        self.exchange = self._left_out = self._labels = None

    def take_out(self, ids: Tensor) -> None:
        """Leave these samples out of every batch."""
        self._left_out = ids

    def relabel(self, ids: Tensor, labels: Tensor) -> None:
        """Give these samples these labels [k, ...]."""
        place = torch.full((self.num_samples,), -1)
        place[ids] = torch.arange(len(ids))
        self._labels = place, self.place(labels)

    def batches(self, t: int) -> list[Batch]:
        """The altered micro-batches of step t; those left out stay in them with coefficient 0, so that masks fit."""
        if self.exchange is None:
            found = super().batches(t)
        else:
            ids, weights = self.exchange[self.trajectory.batch_ids(t)], self.trajectory.coefficients(t)
            found = [self.batch(t, ids[part], weights[part]) for part in self.trajectory.micro_batches(t)]
        if self._left_out is not None:
            kept = [batch.coefficients * ~torch.isin(batch.ids, self._left_out).to(self.device) for batch in found]
            whole, rest = (sum(float(a.double().sum()) for a in some) for some in ([b.coefficients for b in found], kept))
            scale = whole / rest if self.rescales and rest else 1.0
            found = [_with(batch, coefficients=a * scale) for batch, a in zip(found, kept, strict=True)]
        if self._labels is not None:
            found = [_with(batch, target=self._relabelled(batch)) for batch in found]
        return found

    def _relabelled(self, batch: Batch) -> Tensor:
        assert self._labels is not None
        place, labels = self._labels
        target = batch.target
        if not isinstance(target, Tensor) or target.ndim == 0 or len(target) != len(batch.ids):
            raise ValueError("relabelling needs a target that is one tensor with a row per sample")
        places = place[batch.ids].to(target.device)
        rows = (places >= 0).nonzero().flatten()
        if labels.shape[1:] != target.shape[1:]:
            raise ValueError(f"labels of shape {tuple(labels.shape[1:])} for targets of {tuple(target.shape[1:])} each")
        return target.index_copy(0, rows, labels[places[rows]].to(target.dtype))


def _with(batch: Batch, **changes: Any) -> Batch:
    return Batch(**{**vars(batch), **changes})


def _train(ev: Evaluator, start: Point, seed: int, progress: Callable[[int], object]) -> Params:
    """The parameters after all steps from `start`; the random generators of a new run begin at its seed."""
    torch.manual_seed(seed)
    point = start
    for t in range(ev.trajectory.num_steps):
        point = advance(ev, t, point, batch_gradient(ev, t, point.params))
        progress(1)
    return point.params


def _start(ev: Evaluator, seed: int, initialize: Callable[[nn.Module], object] | None, default: torch.dtype) -> Point:
    """The log's own start for seed 0, else new parameters and an optimizer that has done nothing.

    default: torch's default dtype outside, in which `initialize` is to make its numbers.
    """
    trajectory = ev.trajectory
    state = {name: tuple(slot.to(ev.device, ev.dtype) for slot in slots) for name, slots in (trajectory.state(0) or {}).items()}
    if not seed:
        return Point(ev.params(0), state, trajectory.counts(0))
    model = copy.deepcopy(ev.problem.model)
    with numerics.preserved_state(default):
        torch.manual_seed(seed)
        initialize(model) if initialize is not None else _reset(model, list(ev.shapes))
    own = dict(model.named_parameters())
    params = {name: own[name].detach().to(ev.device, ev.dtype, copy=True) for name in ev.shapes}
    zeros = {name: tuple(torch.zeros_like(slot) for slot in slots) for name, slots in state.items()}
    return Point(params, zeros, dict.fromkeys(trajectory.counts(0), 0))


def _reset(model: nn.Module, names: list[str]) -> None:
    """Every module's own initialisation, in place; ValueError where it leaves a trained parameter as it was."""
    drawn = set()
    for module in reversed(list(model.modules())):  # inner ones first, as an outer one may know better
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
            drawn |= {id(parameter) for parameter in module.parameters(recurse=False)}
    own = dict(model.named_parameters())
    missing = [name for name in names if id(own[name]) not in drawn]
    if missing:
        raise ValueError(
            f"no module draws parameter '{missing[0]}' anew (reset_parameters): give initialize=, a function that fills a "
            "model in place, or seeds=(0,)"
        )


def _exchange(num_samples: int, visited: Tensor, seed: int) -> Tensor:
    """id → the id that takes its place [N]: the visited ones shuffled, the others themselves."""
    exchange = torch.arange(num_samples)
    order = torch.randperm(len(visited), generator=torch.Generator().manual_seed(seed))
    exchange[visited] = visited[order]
    return exchange


def _new_labels(ev: Evaluator, suspects: Tensor, labels: Any) -> Tensor:
    """The suspects' labels [k, ...]."""
    if isinstance(labels, str):
        params = ev.params(ev.trajectory.num_steps)
        with ev.eval_mode():
            found = [
                class_logits(output_of(ev, params, batch), batch.target).argmax(1).reshape(batch.target.shape)
                for batch in data_batches(ev, suspects)
            ]
        return torch.cat(found)
    if isinstance(labels, Mapping):
        missing = [int(j) for j in suspects if int(j) not in labels]
        if missing:
            raise ValueError(f"labels has none for suspect {missing[0]} ({len(missing)} of {len(suspects)} are missing)")
        return torch.stack([torch.as_tensor(labels[int(j)]) for j in suspects])
    tensor = torch.as_tensor(labels)
    if tensor.ndim == 0 or len(tensor) != ev.num_samples:
        raise ValueError(f"labels must be [N], one for each of {ev.num_samples} samples, got shape {tuple(tensor.shape)}")
    return tensor[suspects.to(tensor.device)]


def _measure(ev: Evaluator, evaluate: Any) -> tuple[Callable[[Params], float], str]:
    """What is measured of parameters, in eval mode, and its name."""

    def in_eval_mode(value: Callable[[Params], Any]) -> Callable[[Params], float]:
        def measured(params: Params) -> float:
            with ev.eval_mode(), torch.no_grad():
                return float(value(params))

        return measured

    if callable(evaluate):
        name = getattr(evaluate, "__name__", "value")
        return in_eval_mode(lambda params: ev.call(params, evaluate)), "value" if name == "<lambda>" else name
    sizes = [len(leaf) for leaf in leaves(evaluate) if leaf.ndim]
    if not sizes or not sizes[0]:
        raise TypeError("evaluate must be (x, y) with at least one row, or a function of the model that returns a number")

    def accuracy(params: Params) -> float:
        right = 0
        for start in range(0, sizes[0], CHUNK):
            args, kwargs, target = ev.unpack(map_tensors(evaluate, lambda leaf: leaf[start : start + CHUNK]))  # noqa: B023
            output = ev.call(params, lambda model: model(*args, **kwargs))  # noqa: B023
            right += int((class_logits(output, target).argmax(1) == target.reshape(-1)).sum())
        return right / sizes[0]

    return in_eval_mode(accuracy), "accuracy"


def _check_options(how: str, labels: Any, coefficients: str, fraction: float, seeds: Sequence[int]) -> None:
    for name, value, allowed in (("how", how, HOW), ("coefficients", coefficients, ("rescale", "keep"))):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
    if (labels is None) == (how == "relabel"):
        raise ValueError("how='relabel' needs labels=, and how='drop' takes none")
    if isinstance(labels, str) and labels != "predicted":
        raise ValueError(f"labels={labels!r} must be labels of the samples or 'predicted'")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction!r}")
    if not len(seeds) or len(as_ids(seeds, "seeds").unique()) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different numbers from 0 on, at least one, got {list(seeds)!r}")
