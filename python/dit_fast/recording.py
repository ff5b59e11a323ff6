"""A run being recorded, from its first step on: what must stay as it is, and the parameters' way into chunks."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast import modules, resumption
from dit_fast.background import (
    BackgroundWriter,
    ChunkBuffer,
    DeviceRows,
    HostRows,
    changed_message,
    nonfinite_message,
)
from dit_fast.errors import LogError, UnsupportedError
from dit_fast.factor_log import FactorSpec
from dit_fast.log import MANIFEST, Header, LogWriter, Step, StoredQuery, update_counts
from dit_fast.log_size import DiskBudget, choose_every, steps_per_chunk
from dit_fast.optimizers import Clip, Rule


class _Fixed:
    """A tensor of the model that must not change: a buffer or a parameter that is not trained."""

    def __init__(self, name: str, owner: Mapping[str, Tensor | None], key: str, is_buffer: bool) -> None:
        self.name, self._owner, self._key = name, owner, key
        tensor = owner[key]
        assert tensor is not None
        self.what = "buffer" if is_buffer else "frozen parameter"
        self.value = tensor.detach().cpu().clone(memory_format=torch.contiguous_format) if is_buffer else None
        self.digest = modules.tensor_digest(tensor)
        self._seen = self._state(tensor)

    def has_changed(self, by_value: bool = False) -> bool:
        """Compared by value where its version moved or another tensor took its place, or on request."""
        tensor = self._owner.get(self._key)
        if tensor is None:
            return True
        state = self._state(tensor)
        if state == self._seen and not by_value:
            return False
        self._seen = state
        return modules.tensor_digest(tensor) != self.digest

    @staticmethod
    def _state(tensor: Tensor) -> tuple[int, int]:
        return id(tensor), 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Source:
    """What is recorded: the user's module, its logged parameters and the parameter group of each, and what is known of
    the run before it starts. disk_budget: choose `every` from it."""

    model: nn.Module
    params: dict[str, nn.Parameter]
    groups: dict[str, int]
    optimizer: torch.optim.Optimizer
    rules: tuple[Rule, ...]
    reduction: str
    num_samples: int | None
    clip: Clip
    every: int
    log_dtype: torch.dtype | None
    has_dropout: bool
    batch_tree: Any
    disk_budget: DiskBudget | None = None
    factors: FactorSpec | None = None


class Watch:
    """A run watched by a process that does not write its log: modules, flags and fixed tensors. Made in front of the first
    step; raises what the Recorder documents."""

    def __init__(self, source: Source) -> None:
        modules.refuse_unsupported(source.model, masks_are_logged=source.has_dropout)
        self.every, self.has_dropout = source.every, source.has_dropout
        self._params = source.params
        self._modules = dict(source.model.named_modules())
        self._flags = modules.training_flags(source.model)
        self._fixed = _fixed_tensors(source.model, source.params)

    def check(self, step: int) -> None:
        """LogError where a flag or a fixed tensor is not what it was at the first step."""
        for name, module in self._modules.items():
            if module.training != self._flags[name]:
                raise LogError(
                    f"step {step}: module '{name}' ({type(module).__name__}) was in {_mode(self._flags[name])} mode at the "
                    f"first step and is in {_mode(module.training)} mode now; one log holds one mode"
                )
        self._check_fixed(step)

    def check_writer(self) -> None:
        """LogError where the log could not be written."""

    @property
    def starts_chunk(self) -> bool:
        """Whether the next step is a chunk's first; there are none here."""
        return False

    def add(self, step: Step, marks: Mapping[str, int]) -> None:
        """The step just done."""

    def put_marks(self, marks: Mapping[str, int]) -> None:
        """Marks set since the last step."""

    def put_query(self, query: StoredQuery, marks: Mapping[str, int]) -> None:
        """A query's gradients at a mark."""

    def flush(self, marks: Mapping[str, int]) -> None:
        """Everything so far onto the disk."""

    def finish(self, step: int, marks: Mapping[str, int], complete: bool) -> None:
        """The end of the run."""
        self._check_fixed(step, by_value=True)

    def _check_fixed(self, step: int, by_value: bool = False) -> None:
        for fixed in self._fixed:
            if fixed.has_changed(by_value):
                raise LogError(
                    f"step {step}: {fixed.what} '{fixed.name}' changed since the first step; the log holds it once, "
                    "so it must stay as it is"
                )


class Recording(Watch):
    """A run whose log is written: the parameters at the first step become row 0 of a chunk; a log that is gone on with
    (`point`) is cut then."""

    def __init__(
        self,
        path: Path,
        source: Source,
        chunk_bytes: int,
        queue_chunks: int,
        point: resumption.Point | None = None,
        marks: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(source)
        header = _header(source, self._fixed)
        if source.disk_budget is not None:
            header = replace(header, every=choose_every(header, source.disk_budget, chunk_bytes))
        if point is not None:
            point.check_params(source.params)
            resumption.check_same(point.log, header, with_flags=True)
            header = point.log.header
        self._header, self.every, self._chunk_bytes = header, header.every, chunk_bytes
        self._optimizer = source.optimizer
        self._counts = resumption.update_counts(source.params, source.optimizer) if point is None else point.counts
        self._device = _common_device(source.params)
        params = list(source.params.values())
        rows = self._rows = HostRows(header, params) if self._device.type == "cpu" else DeviceRows(header, params)
        capacity = steps_per_chunk(header, chunk_bytes)
        if point is None and (path / MANIFEST).exists():
            raise LogError(f"{path} holds a log by now: does another Recorder write there? choose another path")
        try:
            log = LogWriter(path, header) if point is None else resumption.cut(point, marks or {})
        except OSError as error:
            raise LogError(f"cannot write the log at {path}: {error.strerror or error}") from error
        # one buffer is being filled while the others are written or wait for it
        self.writer = BackgroundWriter(log, header, lambda: self._make_buffer(capacity), queue_chunks + 1)
        try:
            self._buffer = self.writer.take()
        except LogError:
            self.writer.join()
            raise
        rows.copy(self._buffer, 0)
        self._copy_state(0)

    def check(self, step: int) -> None:
        """LogError where the flags, a fixed tensor or a parameter is not what it was after the step before."""
        self.writer.warn_if_slow()
        super().check(step)
        self._check_params(step)

    def check_writer(self) -> None:
        """LogError where the log could not be written."""
        self.writer.check()

    def put_marks(self, marks: Mapping[str, int]) -> None:
        """Marks set since the last step, into the manifest."""
        self.writer.put_marks(marks)

    def put_query(self, query: StoredQuery, marks: Mapping[str, int]) -> None:
        """A query's gradients at a mark, into a file of their own."""
        self.writer.put_query(query, marks)

    def add(self, step: Step, marks: Mapping[str, int]) -> None:
        """The step just done; waits only where every buffer is full."""
        buffer, every = self._buffer, self._header.every
        buffer.steps.append(step)
        number = len(buffer.steps)
        self._counts = update_counts(self._header, self._counts, [step])[1]
        self._rows.copy(buffer, None if number % every else number // every)
        buffer.factor_bytes += step.factor_bytes
        if number == buffer.capacity:
            self._next_chunk(marks)
        elif buffer.factor_bytes >= self._chunk_bytes:  # factors are kept beside the buffer, which is not full yet
            self._end_chunk(marks)
        elif every > 1 and number % every == 0:
            self._copy_state(number // every)

    def flush(self, marks: Mapping[str, int]) -> None:
        """End the chunk here and wait until it is on disk."""
        if self._buffer.steps:
            self._end_chunk(marks)
        self.writer.drain()

    @property
    def starts_chunk(self) -> bool:
        """Whether the next step is a chunk's first."""
        return not self._buffer.steps

    def _end_chunk(self, marks: Mapping[str, int]) -> None:
        """The last row where the last step left it, and the next chunk."""
        self._rows.copy_last(self._buffer, self._header.num_rows(len(self._buffer.steps)) - 1)
        self._next_chunk(marks)

    def _next_chunk(self, marks: Mapping[str, int]) -> None:
        """Hand the chunk to the writer and begin another with its last row and the state as it is now."""
        full, self._buffer = self._buffer, self.writer.take()
        self._rows.copy_last(self._buffer, 0)
        self._copy_state(0)
        self._rows.seal(full)
        self.writer.put(full, marks)

    def finish(self, step: int, marks: Mapping[str, int], complete: bool) -> None:
        """Write everything; LogError for what is not as the last step left it, or for what the disk refused."""
        problem = None
        try:
            self.writer.check()
            self._check_fixed(step, by_value=True)
            self._check_params(step)
        except LogError as error:
            problem = error
        if number := len(self._buffer.steps):
            self._rows.copy_last(self._buffer, self._header.num_rows(number) - 1)
        self._rows.seal(self._buffer)
        self.writer.put(self._buffer, marks)
        self.writer.put_marks(marks, complete and problem is None)
        self.writer.join()
        if problem is not None:
            raise problem
        self.writer.check()

    def _copy_state(self, segment: int) -> None:
        """The optimizer's state and its counts as they are now begin a segment."""
        self._buffer.counts[segment] = self._counts
        if self._header.slots:
            slots = [
                [resumption.slot_of(self._optimizer, p, slot) for p in self._params.values()] for slot in self._header.slots
            ]
            self._rows.copy_state(self._buffer, segment, slots)

    def _make_buffer(self, capacity: int) -> ChunkBuffer:
        # pinning takes a CUDA context, and in the writer's thread that would be device 0
        with torch.cuda.device(self._device) if self._rows.pinned else nullcontext():
            return ChunkBuffer(self._header, capacity, self._rows.pinned)

    def _check_params(self, step: int) -> None:
        for name, p in self._params.items():
            if (p.shape, p.dtype) != self._header.parameters[name] or p.device != self._device:
                raise LogError(changed_message(step, name))
        number = self._rows.first_changed(self._buffer, len(self._buffer.steps))
        if number is not None:
            name = list(self._params)[number]
            is_finite = self._rows.was_finite(number)
            raise LogError(changed_message(step, name) if is_finite else nonfinite_message(step - 1, name))


def header_of(source: Source) -> Header:
    """What is known of a run that starts as things are now."""
    return _header(source, _fixed_tensors(source.model, source.params))


def _header(source: Source, fixed: list[_Fixed]) -> Header:
    return Header(
        parameters={name: (p.shape, p.dtype) for name, p in source.params.items()},
        groups=source.groups,
        optimizer=source.rules,
        num_samples=source.num_samples,
        training_flags=modules.training_flags(source.model),
        constants={f.name: f.value for f in fixed if f.value is not None},
        frozen_digests={f.name: f.digest for f in fixed if f.value is None},
        reduction=source.reduction,
        clip=source.clip,
        every=source.every,
        log_dtype=source.log_dtype,
        rng=next(iter(source.params.values())).device.type if source.has_dropout else None,
        batch_tree=source.batch_tree,
        factors=source.factors,
    )


def _fixed_tensors(model: nn.Module, params: Mapping[str, nn.Parameter]) -> list[_Fixed]:
    fixed, seen = [], {id(p) for p in params.values()}
    for prefix, module in model.named_modules():
        for owner, is_buffer in ((module._buffers, True), (module._parameters, False)):
            for key, tensor in owner.items():
                if tensor is not None and id(tensor) not in seen:  # tied ones once, as torch names them
                    seen.add(id(tensor))
                    fixed.append(_Fixed(f"{prefix}.{key}" if prefix else key, owner, key, is_buffer))
    return fixed


def _common_device(params: Mapping[str, nn.Parameter]) -> torch.device:
    devices = {p.device for p in params.values()}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise UnsupportedError(f"parameters on {sorted(map(str, devices))}: they must all be on the CPU or on one CUDA device")
    return devices.pop()


def _mode(training: bool) -> str:
    return "train" if training else "eval"
