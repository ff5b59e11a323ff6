"""How large a log becomes, before the run: steps per chunk, bytes on disk, memory of the Recorder (the layout: log.py)."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dit_fast import modules, optimizers
from dit_fast.byte_sizes import format_bytes
from dit_fast.errors import UnsupportedError
from dit_fast.factor_options import FactorOptions, read_factor_options
from dit_fast.factor_size import factor_bytes
from dit_fast.log import Header, chunk_name, manifest_head, safetensors_head

LOG_DTYPES = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}

# a chunk repeats one row of its neighbour, so not too few; a killed run loses the chunk it was filling, so not too many
_MIN_STEPS, _MAX_STEPS = 4, 512
_DIGEST = "0" * 64


@dataclass(frozen=True, repr=False)
class LogEstimate:
    """What a log will take; all sizes in bytes.

    steps: T. every: k. num_parameters: P, those that are logged.
    disk_bytes: of the whole log when the run is done. bytes_per_step: disk_bytes / T. factor_bytes_per_step: those of them that
        are factors.
    num_chunks: files of parameters; steps_per_chunk: in a full one, which is what a killed run loses at most.
    memory_bytes: what the Recorder holds on the host during the run, all of its buffers filled.
    state_replayed: whether the optimizer has a state, stored where a segment begins only. For Adam and AdamW, scores replay it
        in between; for SGD only the check of a few steps does, or the replay of parameters. parameters_replayed: whether
        these are replayed, which is so with every > 1. Replay in scores costs about one training run more for each sweep.
    """

    steps: int
    every: int
    num_parameters: int
    disk_bytes: int
    bytes_per_step: float
    num_chunks: int
    steps_per_chunk: int
    memory_bytes: int
    state_replayed: bool
    parameters_replayed: bool
    factor_bytes_per_step: float = 0.0

    def __repr__(self) -> str:
        replayed = [w for w, is_so in (("parameters", self.parameters_replayed), ("state", self.state_replayed)) if is_so]
        return (
            f"LogEstimate({self.steps:,} steps of {self.num_parameters:,} parameters, every={self.every}: "
            f"{format_bytes(self.disk_bytes)} on disk, {format_bytes(self.bytes_per_step)} per step"
            f"{f' ({format_bytes(self.factor_bytes_per_step)} of factors)' if self.factor_bytes_per_step else ''}, "
            f"{self.num_chunks:,} chunks of up to {self.steps_per_chunk} steps, {format_bytes(self.memory_bytes)} of memory"
            f"{'; replayed: ' + ', '.join(replayed) if replayed else ''})"
        )


@dataclass(frozen=True)
class DiskBudget:
    """What a log of `steps` steps of `batch_size` samples each may take on disk; other_bytes: random states and stored
    batches of one step."""

    disk_bytes: int
    steps: int
    batch_size: float
    other_bytes: int = 0


def estimate_log(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch_size: float,
    every: int = 1,
    log_dtype: str | None = None,
    chunk_bytes: int = 64 << 20,
    queue_chunks: int = 2,
    factors: bool | FactorOptions | None = None,
    batch: Any = None,
) -> LogEstimate:
    """The size on disk and the memory of `Recorder(..., model, optimizer)` for a run of `steps` steps, before it is made.

    batch_size: samples per optimizer step, on average. The other arguments are those the Recorder will get. Exact but for
    marks, micro-batches and parameters without a gradient, which take some bytes per step where there are any. Not counted:
    batches kept by store_batches, and the random states of active dropout, 5 kB per forward pass on the CPU.

    factors: as for the Recorder. Their size depends on what goes through the layers, so they need `batch`: one batch as it
        would be given to `step(ids, batch=...)`, which goes through the model once, in eval mode and without a trace.

    Raises ValueError or TypeError for arguments, UnsupportedError for the model's dtypes and the optimizer.
    """
    sizes = {"steps": steps, "every": every, "chunk_bytes": chunk_bytes, "queue_chunks": queue_chunks}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if not batch_size > 0:
        raise ValueError(f"batch_size must be positive, got {batch_size!r}")
    if log_dtype not in LOG_DTYPES:
        raise ValueError(f'log_dtype must be "bfloat16", "float16" or None, got {log_dtype!r}')
    header = _header(model, optimizer, every, LOG_DTYPES[log_dtype])
    per_chunk = steps_per_chunk(header, chunk_bytes)
    options, inner, of_factors = read_factor_options(factors), modules.inner_module(model), 0.0
    if options is not None:
        if batch is None:
            raise ValueError("the size of factors depends on the inputs: give one batch, estimate_log(..., batch=(x, y))")
        own = dict(inner.named_parameters())
        per_sample, beside = factor_bytes(inner, {name: own[name] for name in header.parameters}, options, batch)
        of_factors = batch_size * per_sample + beside
        # a chunk ends where its factors fill it
        per_chunk = min(per_chunk, max(math.ceil(chunk_bytes / max(of_factors, 1)), 1))
    disk = log_bytes(header, steps, batch_size, chunk_bytes, per_chunk) + round(steps * of_factors)
    on_host = all(p.device.type == "cpu" for p in inner.parameters())
    memory = _memory_bytes(header, per_chunk, batch_size, queue_chunks + 1, on_host)
    return LogEstimate(
        steps=steps,
        every=every,
        num_parameters=header.row_size,
        disk_bytes=disk,
        bytes_per_step=disk / steps,
        num_chunks=math.ceil(steps / per_chunk),
        steps_per_chunk=per_chunk,
        memory_bytes=memory + round((queue_chunks + 1) * per_chunk * of_factors),
        state_replayed=bool(header.slots),
        parameters_replayed=every > 1,
        factor_bytes_per_step=of_factors,
    )


def steps_per_chunk(header: Header, chunk_bytes: int) -> int:
    """A multiple of `every` that fits chunk_bytes, within the limits above."""
    row_bytes = max(header.row_size * header.row_dtype.itemsize, 1)
    if header.every == 1:
        return min(max(chunk_bytes // row_bytes - 1, _MIN_STEPS), _MAX_STEPS)
    return header.every * min(max(chunk_bytes // segment_bytes(header), 1), max(_MAX_STEPS // header.every, 1))


def segment_bytes(header: Header) -> int:
    """Parameters and optimizer state at the beginning of one segment of a log with every > 1."""
    return max(header.row_size * (header.row_dtype.itemsize + len(header.slots) * header.state_dtype.itemsize), 1)


def log_bytes(header: Header, steps: int, batch_size: float, chunk_bytes: int, per_chunk: int | None = None) -> int:
    """Bytes on disk of a finished log of so many steps, its manifest and constants included, but for factors."""
    per_chunk = per_chunk or steps_per_chunk(header, chunk_bytes)
    full, rest = divmod(steps, per_chunk)
    chunks = full * _chunk_bytes(header, per_chunk, batch_size) + (_chunk_bytes(header, rest, batch_size) if rest else 0)
    constants = _file_bytes({n: (v.dtype, list(v.shape)) for n, v in (header.constants or {}).items()})
    return chunks + constants + _manifest_bytes(header, steps, full + bool(rest), chunks)


def choose_every(header: Header, budget: DiskBudget, chunk_bytes: int) -> int:
    """The smallest k whose log fits the budget, above 100 to within a hundredth; ValueError where none does."""

    def size(every: int) -> int:
        own = log_bytes(replace(header, every=every), budget.steps, budget.batch_size, chunk_bytes)
        return own + budget.steps * budget.other_bytes

    if size(1) <= budget.disk_bytes:
        return 1
    # ids, coefficients and the segments alone must fit, which says where to begin
    room = budget.disk_bytes - (16 * budget.batch_size + budget.other_bytes) * budget.steps
    every = max(2, math.ceil(budget.steps * segment_bytes(header) / room)) if room > 0 else budget.steps
    while every < budget.steps and size(every) > budget.disk_bytes:
        every += max(every // 100, 1)
    every = min(every, budget.steps)
    if size(every) > budget.disk_bytes:
        raise ValueError(
            f"no every=k fits disk_budget = {format_bytes(budget.disk_bytes)}: {budget.steps} steps take "
            f"{format_bytes(size(1))} with every=1 and {format_bytes(size(every))} with every={every}"
        )
    return every


def _header(model: nn.Module, optimizer: torch.optim.Optimizer, every: int, log_dtype: torch.dtype | None) -> Header:
    """What the Recorder would write; digests and values are placeholders of the right size."""
    rules = optimizers.from_torch(optimizer)
    groups = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    model = modules.inner_module(model)
    params = modules.trainable_parameters(model, groups)
    if not params:
        raise ValueError("the optimizer holds no trainable parameter of the model")
    for name, p in params.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise UnsupportedError(f"parameter '{name}' is {p.dtype}; float32 and float64 are supported")
    return Header(
        parameters={name: (p.shape, p.dtype) for name, p in params.items()},
        groups={name: groups[p] for name, p in params.items()},
        optimizer=rules,
        training_flags=modules.training_flags(model),
        constants=dict(model.named_buffers()),
        frozen_digests={name: _DIGEST for name, _ in model.named_parameters() if name not in params},
        reduction="mean",
        every=every,
        log_dtype=log_dtype,
    )


def _chunk_bytes(header: Header, steps: int, batch_size: float) -> int:
    """A chunk's file, every step one batch and every parameter with a gradient."""
    ids, groups = round(steps * batch_size), len(header.optimizer)
    tensors = {
        "coefficients": (torch.float64, [ids]),
        "batch_ids": (torch.int64, [ids]),
        "micro_sizes": (torch.int64, [steps]),
        "micro_counts": (torch.int64, [steps]),
        "settings": (torch.float64, [steps, groups, len(header.optimizer[0].setting_names)]),
        "absent": (torch.int64, [0, 2]),
        "params": (header.row_dtype, [header.num_rows(steps), header.row_size]),
    }
    if header.slots:
        segments = header.num_segments(steps)
        tensors["state"] = (header.state_dtype, [segments, len(header.slots), header.row_size])
        tensors["state_counts"] = (torch.int64, [segments, len(header.parameters)])
    return _file_bytes(tensors)


def _file_bytes(tensors: dict[str, tuple[torch.dtype, list[int]]]) -> int:
    data = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    return len(safetensors_head(tensors)) + data


def _manifest_bytes(header: Header, steps: int, num_chunks: int, chunk_bytes: int) -> int:
    def size(rows: int) -> int:
        row = {"file": chunk_name(0), "start": steps, "steps": steps // num_chunks, "sha256": _DIGEST}
        row |= {"bytes": chunk_bytes // num_chunks, "max_id": 9999}
        body = manifest_head(header, _DIGEST) | {"marks": {}, "chunks": [row] * rows, "complete": True, "sha256": _DIGEST}
        return len(json.dumps(body, indent=1))

    return size(1) + (num_chunks - 1) * (size(2) - size(1))


def _memory_bytes(header: Header, capacity: int, batch_size: float, num_buffers: int, on_host: bool) -> int:
    rows = header.num_rows(capacity) * header.row_size * header.row_dtype.itemsize
    segments = header.num_segments(capacity)
    state = segments * (len(header.slots) * header.row_size * header.state_dtype.itemsize + 8 * len(header.parameters))
    batches = round(16 * batch_size * capacity)
    constants = sum(v.numel() * v.element_size() for v in (header.constants or {}).values())
    # parameters on the CPU are compared with a row of their own where no exact one of every step is stored
    own = on_host and not (header.every == 1 and header.row_dtype == header.state_dtype)
    return num_buffers * (rows + state + batches) + constants + own * header.row_size * header.state_dtype.itemsize
