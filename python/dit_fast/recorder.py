"""Recorder: logs a training run from the optimizer's own step hooks (the format: log.py)."""

import atexit
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_fast import directory, modules, optimizers, resumption
from dit_fast.byte_sizes import parse_bytes
from dit_fast.capture import Capture
from dit_fast.errors import LogError, UnsupportedError
from dit_fast.factor_options import FactorOptions, read_factor_options
from dit_fast.log import Step, StoredQuery
from dit_fast.log_reader import LogReader
from dit_fast.log_size import LOG_DTYPES, DiskBudget
from dit_fast.marked_queries import query_gradients
from dit_fast.named_batches import Batches, ForwardPasses, Named
from dit_fast.queries import Query
from dit_fast.ranks import Ranks
from dit_fast.recording import Recording, Source, Watch, header_of

_recorded_optimizers: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()
_recorders: "weakref.WeakSet[Recorder]" = weakref.WeakSet()
_recorded_paths: set[Path] = set()


class Recorder:
    """Logs every step of a training run: parameters, the samples of each batch, and the optimizer's settings.

        with Recorder("runs/mine", model, optimizer) as recorder:
            for ids, x, y in loader:
                optimizer.zero_grad(); loss_fn(model(x), y).mean().backward()
                with recorder.step(ids):
                    optimizer.step()

    It listens through the optimizer's step hooks; `step` and `batch` only name the samples, and an optimizer.step()
    without named samples is an error. One rule holds for both: optimizer.step() logs the samples named since the step
    before. `with recorder.step(ids)` names one batch and checks that exactly one step follows; for gradient accumulation
    call `batch(ids, scale=1/M)` once per backward and then optimizer.step(), by itself or within `with recorder.step():`.

    path: a directory, made if need be. An existing log there is refused; overwrite=True deletes it (its own files only),
        resume=True goes on with it. A file `.lock` in it keeps other processes from writing there at the same time.
    model: its trainable parameters that `optimizer` holds are logged, float32 or float64, on the CPU or one GPU. Its
        buffers are logged once, of its other parameters a hash; both must stay as they are.
    optimizer: torch.optim.SGD, Adam or AdamW, any number of parameter groups, any schedule of their settings.
    reduction: how the loss given to backward() was reduced over the batch: "mean", a_b = scale / B, or "sum", a_b = scale.
    num_samples: N; ids at or above it are refused. None = not known.
    every: k; parameters are stored before every k-th step only and those between replayed when scores are computed, which
        costs about one training run more and needs the problem to reproduce the run to rounding. "auto": the smallest k
        with which the log of `total_steps` steps fits `disk_budget`, found at the first step, whose batch size is taken
        for that of all steps; ValueError there where none fits. `estimate_log` says what a run would take.
    disk_budget, total_steps: for every="auto": bytes or a string such as "2GiB", and the number of steps of the run. A
        longer run takes more than the budget; the samples of other processes do not count.
    clip_norm, clip_value: the limit where you clip gradients before each step, by torch.nn.utils.clip_grad_norm_ (Euclidean,
        over all parameters logged) or clip_grad_value_. The Recorder does not clip; it has to be told.
    store_batches: keep the batches themselves, given as `step(ids, batch=(x, y))`, so that scores need no data: for random
        augmentation, or data that will not be there.
    factors: True or FactorOptions(...) to log the gradients of single samples as well, so that scores need neither model nor
        data nor parameters. They come from the forward and backward passes of the training itself: what goes into a linear,
        convolutional (groups=1) or embedding layer and what comes back; of other layers the rows of their parameters, by
        their backward pass once more where need be. The smallest form is kept. Each named batch must be one forward pass of
        the model, as model(x), and one backward(), in this order. At a chunk's first step they are added up and compared with
        the gradient: LogError where they are another's (on a GPU this is the one moment that waits for it). A tied,
        parametrized or otherwise used parameter is refused by name; FactorOptions(layers=...) leaves it out, chooses dtype,
        curvature and projection. A chunk also ends where its factors reach chunk_bytes. With a large `every`, such as 512,
        parameters are stored only at both ends of each chunk. Not under DistributedDataParallel, torch.compile, closures or
        every="auto".
    log_dtype: "bfloat16" or "float16" to halve the log of float32 parameters, at a cost in accuracy (README).
    chunk_bytes: size of a chunk on disk and of its buffer in memory, ids and stored batches not counted; with every=1 a chunk
        has 4 to 512 steps in any case, with every=k a multiple of k, at least k, and at most 512 where k is not larger.
    queue_chunks: full chunks that may wait for the disk; when there are more, the training loop waits. The Recorder holds
        queue_chunks + 1 buffers, pinned where the parameters are on a GPU. Where waiting takes more than a tenth of the run,
        one RuntimeWarning names the MB/s needed, those reached and an `every` that would do.
    overwrite: see path.
    resume: go on with the log at path, where there is one (else a new one begins). Load model and optimizer from a checkpoint
        first: the Recorder finds the last stored step that has the model's parameters bit for bit, as rounded to log_dtype
        (`num_steps` is then this step), and with the first step, or with close(), cuts the log after it. LogError where there
        is no such step (a killed run's log ends with its last finished chunk, and with every=k only every k-th step and the
        last of a chunk are stored, so call `flush()` before you save a checkpoint), where the optimizer's state, as far as it
        is stored, is not that of the step, or where the log is of another model, kind of optimizer or options.

    Where a dropout module is active, the random generator's state before each forward pass of the model with gradients is
    logged (5 kB on the CPU), and scores replay the masks. Each named batch must then be one such pass. A forward pass under
    autocast is refused. So is a number of ids that is not that of the rows of the model's input, unless coefficients are given.

    Under DistributedDataParallel every process makes a Recorder, and names the samples of its own batches; the process of
    rank 0 writes and is the only one to touch path. What is named is gathered in front of each optimizer.step(), coefficients
    are divided by the number of processes, as the gradients are, and each process's batches stay micro-batches of their own,
    in the order of ranks. An error in one process is raised in all. FSDP is refused, and so is a second optimizer on a model.

    Nothing of the training is touched: no random numbers, gradients, flags. What can be seen of what score() would refuse is
    refused at the first step: UnsupportedError for models and optimizers, ValueError and TypeError for arguments, LogError
    for what happened to the run or to the disk; all name the step. Errors of the writing thread are raised by the next
    call. In any case the finished steps are written on exit. A killed run leaves a log of its finished chunks; a run without
    a step leaves none.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        reduction: str = "mean",
        num_samples: int | None = None,
        every: int | Literal["auto"] = 1,
        disk_budget: int | float | str | None = None,
        total_steps: int | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        store_batches: bool = False,
        factors: bool | FactorOptions = False,
        log_dtype: str | None = None,
        chunk_bytes: int = 64 << 20,
        queue_chunks: int = 2,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
        if overwrite and resume:
            raise ValueError("resume=True goes on with a log and overwrite=True deletes it; give one of them")
        self._every, self._disk_budget = _read_every(every, disk_budget, total_steps)
        sizes = {"chunk_bytes": chunk_bytes, "queue_chunks": queue_chunks, "num_samples": num_samples, "every": self._every}
        sizes["total_steps"] = total_steps
        for name, value in sizes.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if log_dtype not in LOG_DTYPES:
            raise ValueError(f'log_dtype must be "bfloat16", "float16" or None, got {log_dtype!r}')
        self._clip = optimizers.Clip(clip_norm, clip_value)
        self._total_steps, self._log_dtype = total_steps, LOG_DTYPES[log_dtype]
        self._rules = optimizers.from_torch(optimizer)
        if optimizer in _recorded_optimizers:
            raise LogError("this optimizer is being recorded already; close() the other Recorder first")
        modules.refuse_sharded(model)
        self._ranks = Ranks(modules.data_parallel_wrapper(model))
        if self._ranks.size == 1 and _num_processes() > 1:
            raise UnsupportedError(
                "training in several processes is logged where the model is in DistributedDataParallel alone"
            )
        self._model, self._optimizer = modules.inner_module(model), optimizer
        self._reduction, self._num_samples = reduction, num_samples
        self._chunk_bytes, self._queue_chunks = chunk_bytes, queue_chunks
        self._held = _held_parameters(optimizer)
        self._params = modules.trainable_parameters(model, self._held)
        _check_parameters(self._model, self._params, self._held)
        self._capture = self._make_capture(model, read_factor_options(factors))

        self.path = Path(path)
        self._pending: list[Named] = []
        capture = self._capture
        self._batches = Batches(
            reduction, num_samples, store_batches, capture is not None and capture.may_take_batch,
            capture is not None and capture.needs_batch,
        )  # fmt: skip
        self._passes = ForwardPasses()
        self._claim: directory.Claim | None = None
        self._point: resumption.Point | None = None
        try:
            places = self._ranks.gather(lambda: self._open(overwrite, resume))
            if any(place.digests != places[0].digests for place in places):
                raise LogError("the model's parameters are not the same in all processes")
        except BaseException:
            self._release()
            raise
        self._num_steps, self._marks = places[0].step, dict(places[0].marks)
        # a run that goes on may set again what it set just before it was stopped
        self._repeatable = {name for name, step in self._marks.items() if step == self._num_steps}
        known: list[tuple[str, int]] = [] if self._point is None else self._point.log.queries
        self._query_steps = {step: name for name, step in known if step <= self._num_steps}
        self._asked: dict[str, StoredQuery] = {}
        self._is_asking = False
        self._scope: _StepScope | None = None
        self._parts: list[_Part] | None = None
        self._recording: Watch | None = None
        self._pid, self._closed = os.getpid(), False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            *([] if self._capture is None else self._capture.hooks()),
        ]
        _recorded_optimizers.add(optimizer)
        _recorders.add(self)
        self._at_exit = _closer(weakref.ref(self))
        atexit.register(self._at_exit)

    @property
    def num_steps(self) -> int:
        """Steps logged so far, those still in memory included."""
        return self._num_steps

    @property
    def every(self) -> int | None:
        """k; with every="auto" None until the first step."""
        return self._every if self._recording is None else self._recording.every

    def step(self, ids: Any = None, coefficients: Any = None, batch: Any = None) -> "_StepScope":
        """`with recorder.step(ids): optimizer.step()`: exactly one step, made from these samples.

        ids: integers [B], a tensor on any device (on the CPU there is nothing to wait for), array or list; an id may
            occur several times. None: the samples named by `batch` before.
        coefficients: a_b [B], the factor of each sample's loss in the loss given to backward(); None: by `reduction`.
        batch: with store_batches, or with factors that need it, what the problem's `unpack` takes, such as (x, y), as the
            model saw it.
        """
        self._check_open()
        if ids is None and not (coefficients is None and batch is None):
            raise ValueError(f"step {self._num_steps}: coefficients or a batch without ids")
        return _StepScope(self, None if ids is None else self._read(ids, 1.0, coefficients, batch))

    def batch(self, ids: Any, scale: float = 1.0, coefficients: Any = None, batch: Any = None) -> None:
        """Name the samples of one backward() of the next step; call it once for each where gradients are accumulated.

        scale: the factor of this batch's loss, 1/M for M micro-batches whose losses are divided by M.
        ids, coefficients, batch: as in `step`; coefficients are multiplied by scale.
        """
        self._check_open()
        self._pending.append(self._read(ids, scale, coefficients, batch))
        self._collect()

    def mark(self, name: str, query: Query | Sequence[Query] | None = None) -> None:
        """Name this moment, such as the end of an epoch: `windows="epochs"` are the steps between marks.

        query: one of dit_fast.queries or a list of them, whose gradients at the parameters as they are now are stored, so
            that scores of windows that end here need no model. In a log with factors only, in its layers and projection;
            the model runs in eval mode and is left as it was. `queries.loss` needs FactorOptions(per_sample_loss=...).

        After resume=True a mark at the step gone on from may be set once more: a kill just after it may have lost it.
        """
        self._check_open()
        if not isinstance(name, str) or not name:
            raise TypeError(f"a mark's name must be a non-empty string, got {name!r}")
        if name in self._marks and not (name in self._repeatable and self._marks[name] == self._num_steps):
            raise ValueError(f"mark '{name}' was set before, at step {self._marks[name]}; names must differ")
        stored = None if query is None else self._ask(name, query)
        if self._num_steps == 0:
            warnings.warn(
                f"mark '{name}' before the first step: a mark ends the window of the steps before it, so set it after them",
                RuntimeWarning,
                stacklevel=2,
            )
        self._marks[name] = self._num_steps
        if stored is not None and self._recording is not None:
            self._recording.put_query(stored, self._marks)
        elif stored is not None:
            self._asked[name] = stored
        elif self._recording is not None:
            self._recording.put_marks(self._marks)

    def _ask(self, name: str, query: Query | Sequence[Query]) -> StoredQuery:
        """The gradients of a query as it is now."""
        if self._capture is None:
            raise ValueError(f"mark '{name}': a query is stored in a log with factors: Recorder(..., factors=True)")
        before = self._query_steps.get(self._num_steps)
        if before not in (None, name):
            raise ValueError(f"mark '{name}': a query was stored at step {self._num_steps} by mark '{before}'; one is enough")
        header = header_of(replace(self._source(), has_dropout=modules.has_active_dropout(self._model), disk_budget=None))
        self._is_asking = True
        try:
            with self._capture.paused():
                labels, block = query_gradients(
                    self._model, self._params, header, self._capture.options, query, self._num_steps
                )
        except (ValueError, LogError, UnsupportedError, TypeError) as error:
            raise type(error)(f"mark '{name}': {error}") from error
        finally:
            self._is_asking = False
        gradients = {key: value.cpu() for key, value in self._capture.project(block).items()}
        self._query_steps[self._num_steps] = name
        return StoredQuery(name, self._num_steps, labels, gradients)

    def flush(self) -> None:
        """Write every step so far and wait until it is on disk: call it before saving a checkpoint to resume from.

        The chunk ends here, so do not call it at every step. LogError where the disk failed.
        """
        self._check_open()
        if self._recording is not None:
            self._recording.flush(self._marks)

    def close(self) -> None:
        """Write what is left and end the log; LogError if parameters changed since the last step or the disk failed."""
        self._finish(complete=True)

    def __enter__(self) -> "Recorder":
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._finish(complete=error is None)
        except LogError as own:
            if error is None:
                raise
            if str(own) != str(error):  # the user's exception goes on, ours beside it
                error.add_note(f"dit_fast.Recorder: {own}")

    def _read(self, ids: Any, scale: float, coefficients: Any, batch: Any) -> Named:
        return self._batches.read(f"step {self._num_steps}", ids, scale, coefficients, batch)

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._elsewhere() and not self._is_asking:
            self._passes.note(f"step {self._num_steps}", model, args, kwargs, next(iter(self._params.values())).device)

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._elsewhere():
            return
        self._parts = None
        # a closure computes the gradients within the step, and may name its batches there
        has_closure = any(callable(arg) for arg in (*args[1:], *kwargs.values()))
        parts = self._ranks.gather(lambda: self._prepare(has_closure))
        if any((part.settings, part.absent) != (parts[0].settings, parts[0].absent) for part in parts):
            raise LogError(f"step {self._num_steps}: the optimizer's settings or gradients are not the same in all processes")
        self._parts = parts

    def _prepare(self, has_closure: bool) -> "_Part":
        """Check everything in front of a step, and say what this process adds to it."""
        step, recording, absent = self._num_steps, self._recording, None
        if recording is not None:
            recording.check_writer()
        if self._scope is not None and self._scope.done:
            raise LogError(f"step {step}: a second optimizer.step() within one recorder.step()")
        if not has_closure:
            self._check_named()
            absent = self._check_gradients()
            self._collect(is_last=True)
        elif self._capture is not None:
            raise UnsupportedError(f"step {step}: factors are not logged where optimizer.step(closure) computes the gradients")
        elif self._ranks.size > 1:
            raise UnsupportedError(f"step {step}: optimizer.step(closure) is not supported under DistributedDataParallel")
        self._check_optimizer()
        if recording is not None:
            recording.check(step)
        elif self._ranks.writes:
            self._recording = Recording(
                self.path, self._source(has_closure), self._chunk_bytes, self._queue_chunks, self._point, self._marks
            )
            for stored in self._asked.values():
                self._recording.put_query(stored, self._marks)
        else:
            self._recording = Watch(self._source(has_closure))
        return _Part(self._pending, tuple(self._passes.rng), optimizers.group_settings(self._optimizer, self._rules), absent)

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parts, self._parts = self._parts, None
        if self._elsewhere() or parts is None or self._recording is None:
            return
        self._check_named()
        absent = self._check_gradients()
        size, own, own_rng = self._ranks.size, self._pending, self._passes.take()
        pending = own if size == 1 else [named for part in parts for named in part.batches]
        rng = own_rng if size == 1 else tuple(state for part in parts for state in part.rng)
        self._pending = []
        if bool(rng) != self._recording.has_dropout:
            raise UnsupportedError(f"step {self._num_steps}: dropout must be active in all steps of a log or in none")
        # DistributedDataParallel takes the mean of the processes' gradients
        coefficients = torch.cat([named.coefficients for named in pending]) / size
        sizes = tuple(len(named.ids) for named in pending)
        batches = tuple(named.stored.tensors for named in pending if named.stored is not None)
        factors = () if self._capture is None else self._capture.take()
        ids = torch.cat([named.ids for named in pending])
        step = Step(ids, coefficients, sizes, parts[0].settings, absent, rng, batches, factors)
        if self._scope is not None:
            self._scope.done = True
        self._recording.add(step, self._marks)
        self._num_steps += 1

    def _open(self, overwrite: bool, resume: bool) -> "_Place":
        """Claim the path and find where to go on, in the process that writes; what must be the same in all of them."""
        for other in _recorders:
            shares = set(self._held) & set(other._model.parameters()) or set(other._held) & set(self._model.parameters())
            if not other._closed and shares and self.path.resolve() != other.path.resolve():
                raise UnsupportedError(
                    f"more than one optimizer on one model is not supported: its parameters are being recorded to {other.path}"
                )
        if self._ranks.writes:
            if self.path.resolve() in _recorded_paths:
                raise LogError(f"another Recorder writes to {self.path}; close() it first or choose another path")
            self._claim = directory.Claim(self.path)
            _recorded_paths.add(self.path.resolve())
            if directory.prepare(self.path, overwrite, resume):
                self._point = self._find_point()
            if resume and self._point is None and resumption.update_counts(self._params, self._optimizer).any():
                warnings.warn(
                    f"resume=True found no steps at {self.path} to go on with, though the optimizer has made some: the log "
                    "begins here, without them (call flush() before saving a checkpoint)",
                    RuntimeWarning,
                    stacklevel=4,
                )
        if self._point is not None:
            self._rules = self._point.log.header.optimizer
            if self._capture is not None and self._point.log.header.factors is not None:
                self._capture.adopt(self._point.log.header.factors)
        digests = None
        if self._ranks.size > 1:
            digests = {name: modules.tensor_digest(p) for name, p in self._params.items()}
        if self._point is None:
            return _Place(0, {}, digests)
        return _Place(self._point.step, self._point.marks(), digests)

    def _release(self) -> None:
        """Give the directory back."""
        if self._claim is not None:
            _recorded_paths.discard(self.path.resolve())
            self._claim.release()
            self._claim = None

    def _find_point(self) -> resumption.Point | None:
        """Where the log at `path` is gone on from; None for a log without steps, which is deleted."""
        log = LogReader(self.path)
        if not log.num_steps:
            directory.prepare(self.path, overwrite=True, resume=False)
            return None
        if self._every is None:  # "auto": as it was chosen when the run began
            self._every, self._disk_budget = log.header.every, None
        resumption.check_same(log, header_of(self._source()), with_flags=False)
        point = resumption.find_point(log, self._params, self._optimizer)
        if point.step == 0:
            raise LogError(
                f"the model stands before step 0 of the log at {self.path}, so that all its {log.num_steps} steps would be "
                "cut: load the checkpoint, model and optimizer, before making the Recorder, or begin anew with overwrite=True"
            )
        return point

    def _cut(self) -> None:
        """End a log that was gone on with at the step where the model stands, no step having followed."""
        assert self._point is not None
        self._point.check_params(self._params)
        try:
            log = resumption.cut(self._point, self._marks)
            for stored in self._asked.values():
                log.add_query(stored)
            log.update(self._marks, complete=True)
        except OSError as error:
            raise LogError(f"cannot write the log at {self.path}: {error.strerror or error}") from error

    def _source(self, passes_follow: bool = False) -> Source:
        has_dropout = bool(self._passes.rng) or (passes_follow and modules.has_active_dropout(self._model))
        groups = {name: self._held[p] for name, p in self._params.items()}
        return Source(
            self._model, self._params, groups, self._optimizer, self._rules, self._reduction, self._num_samples,
            self._clip, self._every or 1, self._log_dtype, has_dropout, self._batches.layout, self._budget(),
            None if self._capture is None else self._capture.spec,
        )  # fmt: skip

    def _make_capture(self, model: nn.Module, options: FactorOptions | None) -> Capture | None:
        if options is None:
            return None
        if self._ranks.size > 1:
            raise UnsupportedError("factors are not logged under DistributedDataParallel")
        if modules.is_compiled(model):
            raise UnsupportedError("factors are not logged under torch.compile, which does not run hooks as they are; "
                                   "give factors=False or train the model uncompiled")  # fmt: skip
        if options.project is not None and not all(rule.is_linear for rule in self._rules):
            raise UnsupportedError("projected factors are for SGD: Adam and AdamW work element by element; leave out project=")
        if options.project is not None and (self._clip.norm or self._clip.value):
            raise UnsupportedError(
                "projected factors cannot say how gradients were clipped; leave out project= or the clipping"
            )
        if self._every is None:
            raise ValueError('every="auto" does not count the bytes of factors; give every=512 or another number')
        return Capture(self._model, self._params, options, self._clip)

    def _collect(self, is_last: bool = False) -> None:
        """Factors of the backward passes so far whose samples are named."""
        if self._capture is not None:
            starts_chunk = self._recording is None or self._recording.starts_chunk
            self._capture.collect(f"step {self._num_steps}", self._pending, starts_chunk, is_last)

    def _budget(self) -> DiskBudget | None:
        if self._disk_budget is None or self._total_steps is None:
            return None
        self._check_named()  # the batch's size counts, so a closure is too late to name it
        stored = [tensor for named in self._pending if named.stored is not None for tensor in named.stored.tensors]
        other = sum(tensor.numel() * tensor.element_size() for tensor in [*self._passes.rng, *stored])
        return DiskBudget(self._disk_budget, self._total_steps, sum(len(named.ids) for named in self._pending), other)

    def _check_named(self) -> None:
        if not self._pending:
            raise LogError(
                f"step {self._num_steps}: optimizer.step() without ids; call it within `with recorder.step(ids):` "
                "or after recorder.batch(ids)"
            )
        self._passes.check(f"step {self._num_steps}", self._pending)

    def _check_gradients(self) -> tuple[int, ...]:
        """Positions of the parameters without a gradient, which the optimizer leaves alone."""
        for name, p in self._params.items():
            if p.grad is not None and p.grad.layout != torch.strided:
                raise UnsupportedError(f"step {self._num_steps}: parameter '{name}' has a sparse gradient; use sparse=False")
        return tuple(i for i, p in enumerate(self._params.values()) if p.grad is None)

    def _check_optimizer(self) -> None:
        if _held_parameters(self._optimizer) != self._held:
            raise LogError(f"step {self._num_steps}: the optimizer's parameters are not those it had when recording began")
        try:
            rules = optimizers.from_torch(self._optimizer)
        except UnsupportedError as error:
            raise UnsupportedError(f"step {self._num_steps}: {error}") from error
        if [rule.slots for rule in rules] != [rule.slots for rule in self._rules] and any(
            set(now.slots) - set(then.slots) for now, then in zip(rules, self._rules, strict=True)
        ):
            raise UnsupportedError(
                f"step {self._num_steps}: momentum was 0 when recording began and is not any more; "
                "begin with a momentum above 0 where a schedule brings it in"
            )

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise LogError(f"this Recorder belongs to process {self._pid}; it does not write from a forked one")
        if self._closed:
            raise LogError(f"the Recorder of {self.path} is closed")
        if self._recording is not None:
            self._recording.check_writer()

    def _elsewhere(self) -> bool:
        return self._closed or os.getpid() != self._pid

    def _finish(self, complete: bool) -> None:
        if self._elsewhere():
            return
        self._closed = True
        if complete and self._pending:
            warnings.warn(
                f"step {self._num_steps}: {len(self._pending)} batches were named and no optimizer.step() followed; they are "
                "not in the log",
                RuntimeWarning,
                stacklevel=3,
            )
        for hook in self._hooks:
            hook.remove()
        atexit.unregister(self._at_exit)
        _recorded_optimizers.discard(self._optimizer)
        _recorders.discard(self)
        try:
            if self._recording is not None:
                self._recording.finish(self._num_steps, self._marks, complete)
            elif self._point is not None and complete:
                self._cut()
        finally:
            self._release()


@dataclass(frozen=True)
class _Part:
    """What one process adds to a step; absent is None where a closure has yet to compute the gradients."""

    batches: list[Named]
    rng: tuple[Tensor, ...]
    settings: list[list[float]]
    absent: tuple[int, ...] | None


@dataclass(frozen=True)
class _Place:
    """Where a process begins: the steps and marks of the log it goes on with, and digests of its parameters."""

    step: int
    marks: dict[str, int]
    digests: dict[str, str] | None


class _StepScope:
    """`with recorder.step(...)`: names its batch on entry, and wants exactly one step by the time it is left."""

    def __init__(self, recorder: Recorder, batch: Named | None) -> None:
        self._recorder, self._batch = recorder, batch
        self.done = False

    def __enter__(self) -> None:
        recorder = self._recorder
        recorder._check_open()
        if recorder._scope is not None:
            raise LogError(f"step {recorder.num_steps}: recorder.step() within another one")
        if self._batch is not None:
            if recorder._pending:
                raise LogError(
                    f"step {recorder.num_steps}: samples were named by recorder.batch() and again by recorder.step(ids); "
                    "after batch() use `with recorder.step():`"
                )
            recorder._pending = [self._batch]
        recorder._scope = self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        recorder = self._recorder
        recorder._scope = None
        if not self.done:
            recorder._pending = []
            if recorder._capture is not None:
                recorder._capture.drop()
            if error is None:
                raise LogError(f"step {recorder.num_steps}: recorder.step() ended without optimizer.step(); nothing was logged")


def _read_every(every: Any, disk_budget: Any, total_steps: Any) -> tuple[int | None, int | None]:
    """(every, disk_budget in bytes), one of them None; ValueError where they do not go together."""
    if every != "auto":
        if disk_budget is not None or total_steps is not None:
            raise ValueError('disk_budget and total_steps are for every="auto"')
        if every is None:
            raise ValueError('every must be a positive integer or "auto", got None')
        return every, None
    if disk_budget is None or total_steps is None:
        raise ValueError('every="auto" needs disk_budget (bytes or "2GiB") and total_steps, the number of steps of the run')
    return None, parse_bytes(disk_budget, "disk_budget")


def _num_processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _held_parameters(optimizer: torch.optim.Optimizer) -> dict[Tensor, int]:
    """The optimizer's parameters → index of their group."""
    return {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}


def _check_parameters(model: nn.Module, params: dict[str, nn.Parameter], held: dict[Tensor, int]) -> None:
    if not params:
        raise ValueError("the optimizer holds no trainable parameter of the model")
    own = set(model.parameters())
    for p, group in held.items():
        if p not in own:
            raise ValueError(
                f"the optimizer's parameter group {group} holds a parameter of shape {tuple(p.shape)} that is not the model's"
            )
    for name, p in params.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise UnsupportedError(f"parameter '{name}' is {p.dtype}; float32 and float64 are supported")


def _closer(recorder: "weakref.ref[Recorder]") -> Callable[[], None]:
    """For the end of a program that forgot close(): what is finished is written, the log is not called complete."""

    def close() -> None:
        alive = recorder()
        if alive is not None:
            alive._finish(complete=False)

    return close
