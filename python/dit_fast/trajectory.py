"""A training run as scores see it: parameters, batches and settings of every step, from a log or from arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dit_fast.arrays import has_length, integer, read_arrays
from dit_fast.errors import LogError
from dit_fast.factored import Factors, Layout
from dit_fast.log import Header, Step, from_tree
from dit_fast.log_reader import LogReader
from dit_fast.optimizers import Clip, Rule, State

if TYPE_CHECKING:
    from dit_fast.index import Index


@dataclass(frozen=True)
class Window:
    """The steps start ≤ t < stop of a run."""

    name: str
    start: int
    stop: int


class _Source(Protocol):
    """Where a trajectory's numbers are; t is in range when it is asked."""

    header: Header
    num_samples: int
    marks: dict[str, int]

    @property
    def path(self) -> Path | None: ...
    @property
    def complete(self) -> bool: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def digest(self) -> str: ...
    def params(self, t: int) -> dict[str, Tensor] | None: ...
    def rows(self, start: int, stop: int) -> Tensor: ...
    def state(self, t: int) -> dict[str, State] | None: ...
    def counts(self, t: int) -> Tensor: ...
    def segment(self, t: int) -> tuple[int, int]: ...
    def step(self, t: int) -> Step: ...
    def verify(self) -> None: ...
    @property
    def factor_layout(self) -> Layout | None: ...
    def factors(self, t: int) -> list[Factors]: ...
    def marked_queries(self) -> dict[int, tuple[list[str], dict[str, Tensor]]]: ...


class Trajectory:
    """A logged run of T steps: θ[0] … θ[T], and what each step t in 0 … T−1 was made of.

    Made by `Trajectory.open` or `Trajectory.from_arrays`. Logs are read lazily, memory-mapped; each chunk is checked
    against its sha256 the first time it is touched, so any method that takes a step can raise LogError.
    """

    def __init__(self, source: _Source) -> None:
        self._source = source

    @classmethod
    def open(cls, path: str | Path) -> "Trajectory":
        """The log a Recorder wrote to `path`; of a killed run, its finished chunks. LogError for anything damaged."""
        return cls(LogReader(path))

    @classmethod
    def from_arrays(
        cls,
        params: Mapping[str, Any],
        batch_ids: Any,
        lr: Any,
        optimizer: Rule | Sequence[Rule] | None = None,
        *,
        coefficients: Any = None,
        marks: Mapping[str, int] | Sequence[int] | None = None,
        num_samples: int | None = None,
        micro_batches: Sequence[Sequence[int]] | None = None,
        groups: Mapping[str, int] | None = None,
        absent: Sequence[Sequence[str]] | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> "Trajectory":
        """A run whose numbers are at hand, numpy or torch; they are copied.

        params: name → [T+1, *shape] float32 or float64, the parameters before each step and after the last.
        batch_ids: T arrays [B] of sample ids (B may differ), or [T, B]. An id may occur several times in a batch.
        lr: the rate, a number, [T] or [T, groups].
        optimizer: the rule of all parameter groups, or one per group, with settings that stay; default `SGD()`.
        coefficients: T arrays [B], the a_b of g_t = Σ_b a_b ∇ℓ_b; default 1/B, the mean.
        marks: {name: step} with the number of steps done at the mark, or such numbers alone, named "step <number>".
        num_samples: N; default 1 + the largest id.
        micro_batches: T lists of sizes that sum to B, where a step's gradient came from several forward passes.
        groups: name → index of its parameter group; default all 0.
        absent: T lists of the names of parameters that had no gradient in a step (None), which torch's optimizers skip.
        clip_norm, clip_value: the limit where gradients were clipped before each step, as in `Recorder`.

        The optimizer's state is taken to be zero before the first step.

        Raises TypeError or ValueError naming the step and the argument.
        """
        clip = Clip(clip_norm, clip_value)
        return cls(
            read_arrays(params, batch_ids, lr, optimizer, coefficients, marks, num_samples, micro_batches, groups, absent, clip)
        )

    @property
    def num_steps(self) -> int:
        """T, the number of steps logged."""
        return self._source.num_steps

    @property
    def num_samples(self) -> int:
        """N as given when the run was logged, else 1 + the largest id seen."""
        return self._source.num_samples

    @property
    def parameters(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """name → (shape, dtype) of the trained parameters, tied ones once."""
        return dict(self._source.header.parameters)

    @property
    def groups(self) -> dict[str, int]:
        """Parameter name → index of its parameter group."""
        return dict(self._source.header.groups)

    @property
    def optimizer(self) -> tuple[Rule, ...]:
        """The optimizer's rule for each parameter group, with the settings it started with."""
        return self._source.header.optimizer

    @property
    def clip(self) -> Clip:
        """How gradients were clipped before each step."""
        return self._source.header.clip

    @property
    def every(self) -> int:
        """k: parameters are stored before every k-th step; those between are replayed (replay.py)."""
        return self._source.header.every

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state tensors the optimizer keeps per parameter; none for SGD without momentum."""
        return self._source.header.slots

    @property
    def log_dtype(self) -> torch.dtype:
        """The dtype in which parameters are stored."""
        return self._source.header.row_dtype

    @property
    def marks(self) -> dict[str, int]:
        """Name of a mark → number of steps done when it was set."""
        return dict(self._source.marks)

    @property
    def training_flags(self) -> dict[str, bool] | None:
        """Module name → its `training` flag during the run; None where not known."""
        return self._source.header.training_flags

    @property
    def constants(self) -> dict[str, Tensor] | None:
        """Buffer name → its value during the run; None where not known."""
        return self._source.header.constants

    @property
    def frozen_digests(self) -> dict[str, str] | None:
        """Name → sha256 of the parameters that were not trained; None where not known."""
        return self._source.header.frozen_digests

    @property
    def digest(self) -> str:
        """sha256 of the whole run: same digest, same run."""
        return self._source.digest

    @property
    def path(self) -> Path | None:
        """The log's directory; None for a run made from arrays."""
        return self._source.path

    @property
    def num_bytes(self) -> int:
        """Size on disk of the log's steps; 0 for a run made from arrays."""
        return 0 if self.path is None else sum(file.stat().st_size for file in self.path.glob("chunk-*.safetensors"))

    @property
    def is_complete(self) -> bool:
        """Whether the run was ended by its Recorder; False while it goes on, and for one that was killed."""
        return self._source.complete

    def params(self, t: int) -> dict[str, Tensor]:
        """θ[t], 0 ≤ t ≤ T: name → tensor of its own shape and dtype, on the CPU; not to be written to.

        LogError between snapshots of a log written with every=k: those parameters are replayed by `score` as it needs them.
        """
        params = self._source.params(self._checked(t, self.num_steps))
        if params is None:
            start, stop = self.segment(t)
            raise LogError(
                f"the parameters before step {t} are not stored: this log holds every {self.every}th step "
                f"({start} and {stop} around it)"
            )
        return params

    def has_params(self, t: int) -> bool:
        """Whether θ[t] is stored, 0 ≤ t ≤ T."""
        return self.every == 1 or t == self.num_steps or self._source.params(self._checked(t, self.num_steps)) is not None

    def state(self, t: int) -> dict[str, State] | None:
        """The optimizer's state before step t, name → one tensor per slot; None where no segment begins at t."""
        return self._source.state(self._checked(t, self.num_steps - 1))

    def counts(self, t: int) -> dict[str, int]:
        """How often each parameter's optimizer state was updated before step t, 0 ≤ t ≤ T."""
        return dict(zip(self.parameters, self._source.counts(self._checked(t, self.num_steps)).tolist(), strict=True))

    def segment(self, t: int) -> tuple[int, int]:
        """(start, stop) of the steps, t among them, that are replayed from the parameters and the state stored at start."""
        return self._source.segment(self._checked(t, self.num_steps - 1))

    def absent(self, t: int) -> set[str]:
        """Names of the parameters that had no gradient in step t and were left alone by the optimizer."""
        names = list(self.parameters)
        return {names[position] for position in self._step(t).absent}

    def rows(self, start: int, stop: int) -> Tensor:
        """θ[start] … θ[stop − 1], 0 ≤ start ≤ stop ≤ T + 1: [n, P], flat in the order of `parameters`, in `log_dtype`.

        For runs that store every step (`every` = 1) only. A view of the log where its chunks allow; not to be written to.
        """
        first, last = (self._checked(t, self.num_steps + 1) for t in (start, stop))
        if first > last:
            raise ValueError(f"rows {first}..{last} are reversed")
        if self.every > 1:
            raise LogError(f"rows of every step are not stored: this log holds every {self.every}th step")
        return self._source.rows(first, last)

    def steps(self, start: int, stop: int) -> list[Step]:
        """What the steps start ≤ t < stop were made of: ids, coefficients, micro-batches, settings."""
        first, last = (self._checked(t, self.num_steps) for t in (start, stop))
        return [self._source.step(t) for t in range(first, last)]

    def batch_ids(self, t: int) -> Tensor:
        """S_t, the sample ids of step t: int64 [B]."""
        return self._step(t).ids

    def coefficients(self, t: int) -> Tensor:
        """a, the weight of each sample's loss in step t: float64 [B]."""
        return self._step(t).coefficients

    def micro_batches(self, t: int) -> list[slice]:
        """The parts of `batch_ids(t)` that went through the model together; one for an ordinary step."""
        return [slice(*ends) for ends in pairwise(accumulate(self._step(t).micro_sizes, initial=0))]

    def settings(self, t: int) -> tuple[dict[str, float], ...]:
        """The optimizer's settings in step t, one dict {"lr", "weight_decay", …} per parameter group."""
        values = self._step(t).settings
        return tuple(dict(zip(rule.setting_names, row, strict=True)) for rule, row in zip(self.optimizer, values, strict=True))

    @property
    def rng(self) -> str | None:
        """The device type of the random generator whose states are logged, for dropout; None where they are not."""
        return self._source.header.rng

    @property
    def stores_batches(self) -> bool:
        """Whether the batches themselves are in the log, so that a Problem needs no data."""
        return self._source.header.batch_tree is not None

    @property
    def factor_layout(self) -> Layout | None:
        """What is the same in the per-sample gradients of all steps, where they are logged (`Recorder(..., factors=True)`):
        the parameters covered and the shapes they are projected to, curvature, l2, projections, dtype; else None.

        LogError where the projections cannot be made again as they were.
        """
        return self._source.factor_layout

    def factors(self, t: int) -> list[Factors]:
        """The per-sample gradients of step t in factors, one per micro-batch, on the CPU in the dtype they are stored in.

        LogError where the log holds none, or where they are damaged.
        """
        return self._source.factors(self._checked(t, self.num_steps - 1))

    @property
    def marked_queries(self) -> dict[int, tuple[list[str], dict[str, Tensor]]]:
        """step → (a label for each of Q values, q [Q, *shape] per parameter) of the queries stored by `recorder.mark(name,
        query=...)` when so many steps were done, in the shapes of `factor_layout`; read anew at each use.

        LogError where a file is missing or damaged.
        """
        return self._source.marked_queries()

    def rng_states(self, t: int) -> tuple[Tensor, ...]:
        """The random generator's state before each micro-batch of step t; empty where not logged."""
        return self._step(t).rng

    def stored_batches(self, t: int) -> list[Any]:
        """The micro-batches of step t as the model saw them, in the layout they were given in; empty where not stored."""
        return [from_tree(self._source.header.batch_tree, tensors) for tensors in self._step(t).batches]

    def index(self, windows: Any = None, **options: Any) -> "Index":
        """The changes of the parameters by every sample at the ends of `windows`, by one pass over a log with factors, after
        which `index.score(query)` takes milliseconds. `index.save(path)` and `Index.load(path, trajectory)` keep it.

        windows: those that will be asked for, as in `score`. Options: hessian="fisher" ("ggn", "none"), dtype, device, check
        and show_progress as in `score`; memory_budget: bytes or "2GiB" for the index and the pass. Without a budget an index
        larger than the log (and than 64 MiB) is refused. Raises ValueError there, with the sizes, and as `score`.
        """
        from dit_fast.index import build_index

        return build_index(self, windows, **options)

    def verify(self) -> None:
        """Read everything and check it: every chunk's sha256, shapes, and that all parameters are finite; else LogError."""
        self._source.verify()

    def windows(self, spec: Any = None) -> list[Window]:
        """The windows of steps that `spec` means.

        spec: None = the whole run · "epochs" = between marks, each named by the mark that ends it, steps after the last
        one forming a last window · (t1, t2) = the steps t1 ≤ t < t2 · a list of such pairs · {name: (t1, t2)}.

        Raises ValueError (TypeError for what is no pair of integers) naming the window and the run's length.
        """
        if not self.num_steps:
            raise ValueError("the run has no steps, so it has no windows; if its Recorder is still open, close() or flush() it")
        if spec is None:
            return [Window("whole run", 0, self.num_steps)]
        if isinstance(spec, str):
            return self._between_marks(spec)
        if isinstance(spec, Mapping):
            named: list[tuple[str | None, Any]] = [(str(name), pair) for name, pair in spec.items()]
        elif isinstance(spec, Sequence | np.ndarray | Tensor):
            pairs = [spec] if len(spec) and not has_length(spec[0]) else list(spec)
            named = [(None, pair) for pair in pairs]
        else:
            raise TypeError(f'windows must be None, "epochs", (t1, t2), a list of these or a dict, got {spec!r}')
        if not named:
            raise ValueError("windows is empty; None means the whole run")
        return [self._window(name, pair) for name, pair in named]

    def _window(self, name: str | None, pair: Any) -> Window:
        what = f"window {pair!r}" if name is None else f"window '{name}' {pair!r}"
        if not has_length(pair) or len(pair) != 2:
            raise TypeError(f"{what} must be a pair of steps (t1, t2)")
        start, stop = (integer(end, what) for end in pair)
        if start < 0 or stop > self.num_steps:
            raise ValueError(f"{what} is outside the run, which has {self.num_steps} steps: 0 ≤ t1 < t2 ≤ {self.num_steps}")
        if start >= stop:
            raise ValueError(f"{what} is empty or reversed: 0 ≤ t1 < t2 ≤ {self.num_steps} (the run's number of steps)")
        return Window(name or f"{start}-{stop}", start, stop)

    def _between_marks(self, spec: str) -> list[Window]:
        if spec != "epochs":
            known = self._between_marks("epochs") if self.marks else []
            named = next((f"; {spec!r} is windows=({w.start}, {w.stop})" for w in known if w.name == spec), "")
            raise ValueError(f'windows="{spec}" is not known; the only word is "epochs", the windows between marks{named}')
        if not self.marks:
            raise ValueError('windows="epochs" needs marks: call recorder.mark("epoch 0") after each epoch, or give steps')
        marks = sorted(self.marks.items(), key=lambda mark: mark[1])
        ends = [*marks, (f"after {marks[-1][0]}", self.num_steps)]
        starts = [0, *(step for _, step in marks)]
        return [Window(name, a, b) for a, (name, b) in zip(starts, ends, strict=True) if a < b]

    def _step(self, t: int) -> Step:
        return self._source.step(self._checked(t, self.num_steps - 1))

    def _checked(self, t: int, last: int) -> int:
        step = integer(t, "the step")
        if not 0 <= step <= last:
            raise ValueError(f"step {step} is outside the run, which has {self.num_steps} steps")
        return step

    def __repr__(self) -> str:
        size = sum(shape.numel() for shape, _ in self.parameters.values())
        where = "arrays" if self.path is None else f"'{self.path}'"
        return (
            f"Trajectory({where}, {self.num_steps:,} steps, {size:,} parameters, {self.num_samples:,} samples, "
            f"{self.optimizer[0].kind}, {len(self.marks)} marks)"
        )
