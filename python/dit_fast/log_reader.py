"""A log on disk as a Trajectory reads it: checked once where it is first touched, then memory-mapped."""

import hashlib
import json
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from dit_fast import optimizers
from dit_fast.errors import LogError, UnsupportedError
from dit_fast.factor_log import FactorSpec, layout_of, unpack
from dit_fast.factored import Factors, Layout
from dit_fast.log import (
    CONSTANTS,
    FORMAT,
    MANIFEST,
    VERSION,
    Chunk,
    Header,
    Step,
    canonical_digest,
    chunk_number,
    first_nonfinite,
    update_counts,
)
from dit_fast.optimizers import Clip, State

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_LOG_DTYPES = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OPEN_CHUNKS = 8


class LogReader:
    """A source of a Trajectory: the manifest is read at once, chunks when they are touched. Raises LogError."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        data = _read_manifest(self.path / MANIFEST)
        try:
            self.header = self._parse_header(data)
            self._chunks = [_ChunkRow(**row) for row in data["chunks"]]
            self.marks = {name: int(step) for name, step in data["marks"].items()}
            self.complete = bool(data["complete"])
            self._queries = [_QueryRow(**row) for row in data.get("queries", [])]
            self._check_chunks()
        except (LogError, UnsupportedError):
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
            raise LogError(f"{self.path / MANIFEST} is not a manifest of this format: {error!r}") from error
        self.manifest = data
        self._starts = [chunk.start for chunk in self._chunks]
        self._digest: str = data["sha256"]
        largest = max((chunk.max_id for chunk in self._chunks), default=-1)
        self.num_samples = self.header.num_samples if self.header.num_samples is not None else largest + 1
        self._open: OrderedDict[int, _OpenChunk] = OrderedDict()
        self._trusted: set[int] = set()

    @property
    def num_steps(self) -> int:
        """T, the steps of all finished chunks."""
        return self._chunks[-1].stop if self._chunks else 0

    @property
    def digest(self) -> str:
        """The manifest's sha256, which covers those of all chunks."""
        return self._digest

    def params(self, t: int) -> dict[str, Tensor] | None:
        """θ[t], 0 ≤ t ≤ T; None between two stored rows."""
        chunk, at = self._at(t)
        if at == chunk.row.steps:
            return self.header.split(chunk.rows[-1])
        return None if at % self.header.every else self.header.split(chunk.rows[at // self.header.every])

    def state(self, t: int) -> dict[str, State] | None:
        """The optimizer's state before step t, 0 ≤ t < T; None where no segment begins."""
        chunk, at = self._at(t)
        start, _ = self.segment(t)
        if start != t:
            return None
        states = [self.header.split(row) for row in chunk.state[at // self.header.every]]
        return {name: tuple(state[name] for state in states) for name in self.header.parameters}

    def counts(self, t: int) -> Tensor:
        """int64 [parameters]: updates of each parameter's state before step t, 0 ≤ t ≤ T."""
        chunk, at = self._at(t)
        return chunk.counts[at]

    def segment(self, t: int) -> tuple[int, int]:
        """The steps start ≤ s < stop, t among them, at whose start both parameters and state are stored."""
        chunk, at = self._at(t)
        if self.header.every == 1:
            return chunk.row.start, chunk.row.stop
        start = chunk.row.start + at // self.header.every * self.header.every
        return start, min(start + self.header.every, chunk.row.stop)

    def _at(self, t: int) -> tuple["_OpenChunk", int]:
        """The chunk that holds step t, or the last step for t = T, and the position of t in it."""
        if not self._chunks:
            raise LogError(f"{self.path}: the run ended before its first chunk was finished, so there are no parameters")
        chunk = self._chunk(min(t, self.num_steps - 1))
        return chunk, t - chunk.row.start

    def rows(self, start: int, stop: int) -> Tensor:
        """θ[start] … θ[stop − 1], flat: [n, P]; a view where they lie in one chunk."""
        pieces = []
        while start < stop:
            chunk = self._chunk(min(start, self.num_steps - 1))
            piece = chunk.rows[start - chunk.row.start : stop - chunk.row.start]
            pieces.append(piece)
            start += len(piece)
        if not pieces:
            return torch.empty(0, self.header.row_size, dtype=self.header.row_dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def step(self, t: int) -> Step:
        """What step t was made of, 0 ≤ t < T."""
        chunk, at = self._at(t)
        return chunk.steps[at]

    @cached_property
    def factor_layout(self) -> Layout | None:
        """What is the same in the factors of all steps; None where there are none."""
        shapes = {name: shape for name, (shape, _) in self.header.parameters.items()}
        return None if self.header.factors is None else layout_of(self.header.factors, shapes)

    def factors(self, t: int) -> list[Factors]:
        """The micro-batches of step t in factors, 0 ≤ t < T."""
        spec, layout = self.header.factors, self.factor_layout
        if spec is None or layout is None:
            raise LogError(f"the log at {self.path} holds no factors: they are written by Recorder(..., factors=True)")
        chunk, at = self._at(t)
        step = chunk.steps[at]
        pieces = zip(step.ids.split(step.micro_sizes), step.coefficients.split(step.micro_sizes), step.factors, strict=True)
        try:
            return [unpack(spec, layout, t, ids, a, tensors) for ids, a, tensors in pieces]
        except (ValueError, RuntimeError, IndexError) as error:
            raise LogError(f"{self._where(chunk.row)} is damaged: step {t}: {error}") from error

    @property
    def queries(self) -> list[tuple[str, int]]:
        """(mark, step) of the stored queries."""
        return [(row.mark, row.step) for row in self._queries if row.step <= self.num_steps]

    def marked_queries(self) -> dict[int, tuple[list[str], dict[str, Tensor]]]:
        """step → (labels, gradients [Q, …] per parameter) of the queries stored at marks."""
        found, layout = {}, self.factor_layout
        for row in self._queries:
            if row.step > self.num_steps:  # of a killed run, whose last chunk was never finished
                continue
            file, where = self.path / row.file, f"{self.path / row.file} (query at mark '{row.mark}', step {row.step})"
            if _file_digest(file) != row.sha256:
                raise LogError(f"{where} is damaged: its sha256 is not the manifest's; restore the file from a copy")
            gradients = safetensors.torch.load_file(file)
            shapes = {} if layout is None else {name: (len(row.labels), *shape) for name, shape in layout.shapes.items()}
            if {name: tuple(value.shape) for name, value in gradients.items()} != shapes:
                raise LogError(f"{where} is damaged: its gradients are not of the parameters and shapes of the factors")
            found[row.step] = list(row.labels), {name: gradients[name] for name in shapes}
        return found

    def verify(self) -> None:
        """Read and check every chunk, also those already trusted."""
        self._trusted.clear()
        self._open.clear()
        self.marked_queries()
        for chunk in self._chunks:
            self._chunk(chunk.start)
            for t in range(chunk.start, chunk.stop) if self.header.factors is not None else ():
                self.factors(t)

    def rows_from_end(self) -> Iterator[tuple[list[int], Tensor]]:
        """(steps, rows [n, P] before them) of every chunk, the last chunk first; memory-mapped, without checking the values."""
        for row in reversed(self._chunks):
            try:
                with safe_open(self.path / row.file, framework="pt") as tensors:
                    rows = tensors.get_tensor("params")
            except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
                raise LogError(f"{self._where(row)} is damaged: {error}") from error
            expected = self.header.row_dtype, (self.header.num_rows(row.steps), self.header.row_size)
            if (rows.dtype, tuple(rows.shape)) != expected:
                raise LogError(f"{self._where(row)} is damaged: its parameters are {rows.dtype} {tuple(rows.shape)}")
            yield [*range(row.start, row.stop, self.header.every), row.stop], rows

    def beginning(self, step: int) -> tuple[int, Chunk | None]:
        """The log's first `step` steps, θ[step] stored: how many whole chunks, and what is left, the beginning of the next."""
        number = bisect_right(self._starts, step) - 1
        if step == self.num_steps or step == self._starts[number]:
            return (len(self._chunks) if step == self.num_steps else number), None
        chunk, every = self._chunk(step), self.header.every
        keep = step - chunk.row.start
        segments = self.header.num_segments(keep)
        counts = chunk.counts[:keep][:: every if every > 1 else keep]
        return number, Chunk(chunk.steps[:keep], chunk.rows[: self.header.num_rows(keep)], chunk.state[:segments], counts)

    def _where(self, row: "_ChunkRow") -> str:
        return f"{self.path / row.file} (steps {row.start}–{row.stop - 1})"

    def _parse_header(self, data: Mapping[str, Any]) -> Header:
        rows, optimizer = data["parameters"], optimizers.from_json(data["optimizer"])
        names = [list(rule.setting_names) for rule in optimizer]
        if not rows or data["every"] < 1 or any(data["setting_names"] != own for own in names):
            raise ValueError(f"setting_names {data['setting_names']} and the optimizer's {names} must agree")
        if len({row["name"] for row in rows}) < len(rows) or not all(0 <= row["group"] < len(optimizer) for row in rows):
            raise ValueError("a parameter is named twice or belongs to no group")
        constants = self.path / CONSTANTS
        if _file_digest(constants) != data["constants"]["sha256"]:
            raise LogError(f"{constants} is damaged: its sha256 is not the manifest's; restore the file from a copy")
        return Header(
            parameters={row["name"]: (torch.Size(row["shape"]), _DTYPES[row["dtype"]]) for row in rows},
            groups={row["name"]: int(row["group"]) for row in rows},
            optimizer=optimizer,
            num_samples=None if data["num_samples"] is None else int(data["num_samples"]),
            training_flags={name: bool(flag) for name, flag in data["training_flags"].items()},
            constants=safetensors.torch.load_file(constants),
            frozen_digests=dict(data["frozen"]),
            reduction=data["reduction"],
            clip=Clip(**data["clip"]),
            every=int(data["every"]),
            log_dtype=_LOG_DTYPES[data["log_dtype"]],
            rng=data["rng"],
            batch_tree=data["batch"],
            factors=None if data.get("factors") is None else FactorSpec.from_json(data["factors"]),
        )

    def _check_chunks(self) -> None:
        stop = 0
        for number, row in enumerate(self._chunks):
            file = self.path / row.file
            if (chunk_number(row.file) or (None,))[0] != number or row.start != stop or row.steps < 1:
                raise LogError(
                    f"{self.path / MANIFEST}: a gap at step {stop}: the next chunk is {row.file} from step {row.start}"
                )
            if not file.is_file():
                raise LogError(f"{self._where(row)} is missing; restore it from a copy")
            stop = row.stop
        beyond = [name for name, step in self.marks.items() if not 0 <= step <= stop]
        if beyond and self.complete:
            raise ValueError(f"marks {beyond} lie outside the run's {stop} steps")
        for name in beyond:  # a killed run may have marked steps whose chunk was never finished
            del self.marks[name]

    def _chunk(self, t: int) -> "_OpenChunk":
        number = bisect_right(self._starts, t) - 1
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        row = self._chunks[number]
        where = self._where(row)
        if number not in self._trusted and _file_digest(self.path / row.file) != row.sha256:
            raise LogError(f"{where} is damaged: its sha256 is not the manifest's; restore the file from a copy")
        chunk = _OpenChunk(self.path / row.file, row, self.header, where)
        if number not in self._trusted:
            self._check_values(number, chunk, where)
            self._trusted.add(number)
        self._open[number] = chunk
        if len(self._open) > _OPEN_CHUNKS:
            self._open.popitem(last=False)
        return chunk

    def _check_values(self, number: int, chunk: "_OpenChunk", where: str) -> None:
        if bad := first_nonfinite(chunk.rows):
            step = min(chunk.row.start + bad[0] * self.header.every, chunk.row.stop)
            name = self.header.name_at(bad[1])
            raise LogError(f"{where}: parameter '{name}' holds NaN or infinity before step {step}")
        if number:
            before = self._chunks[number - 1]
            last = _OpenChunk.last_row(self.path / before.file, before, self.header)
            if not torch.equal(last, chunk.rows[0]):
                raise LogError(
                    f"{where}: its parameters before step {chunk.row.start} are not those that {before.file} ends with"
                )


@dataclass(frozen=True)
class _ChunkRow:
    """A chunk as the manifest names it: steps start ≤ t < start + steps."""

    file: str
    start: int
    steps: int
    sha256: str
    bytes: int
    max_id: int

    def __post_init__(self) -> None:
        if not all(type(value) is int for value in (self.start, self.steps, self.bytes, self.max_id)):
            raise TypeError(f"start, steps, bytes and max_id of {self.file} must be integers")

    @property
    def stop(self) -> int:
        return self.start + self.steps


@dataclass(frozen=True)
class _QueryRow:
    """A stored query as the manifest names it."""

    file: str
    mark: str
    step: int
    labels: list[str]
    sha256: str
    bytes: int


class _OpenChunk:
    """A chunk's memory-mapped rows and states and its steps, shapes checked against the manifest."""

    def __init__(self, file: Path, row: _ChunkRow, header: Header, where: str) -> None:
        self.row = row
        try:
            with safe_open(file, framework="pt") as tensors:
                data = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118, not a dict
            self.rows: Tensor = data["params"]
            self.state: Tensor = data.get("state", torch.empty(header.num_segments(row.steps), 0, header.row_size))
            self.steps = self._parse(data, header)
            before = data["state_counts"][0] if header.slots else torch.zeros(len(header.parameters), dtype=torch.int64)
            self.counts = update_counts(header, before, self.steps)
        except (OSError, KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise LogError(f"{where} is not a chunk of this log: {error}") from error

    @staticmethod
    def last_row(file: Path, row: _ChunkRow, header: Header) -> Tensor:
        """θ after the last step, without checking the rest."""
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_slice("params")[header.num_rows(row.steps) - 1]
        except (OSError, ValueError, RuntimeError, IndexError, safetensors.SafetensorError) as error:
            raise LogError(f"{file} (steps {row.start}–{row.stop - 1}) is damaged: {error}") from error

    def _parse(self, data: dict[str, Tensor], header: Header) -> list[Step]:
        row, groups, settings = self.row, len(header.optimizer), len(header.optimizer[0].setting_names)
        counts, sizes = data["micro_counts"].tolist(), data["micro_sizes"].tolist()
        expected = {
            "params": (header.row_dtype, (header.num_rows(row.steps), header.row_size)),
            "absent": (torch.int64, (len(data["absent"]), 2)),
            "batch_ids": (torch.int64, (sum(sizes),)),
            "coefficients": (torch.float64, (sum(sizes),)),
            "micro_sizes": (torch.int64, (sum(counts),)),
            "micro_counts": (torch.int64, (row.steps,)),
            "settings": (torch.float64, (row.steps, groups, settings)),
        }
        if header.slots:
            segments = header.num_segments(row.steps)
            expected |= {
                "state": (header.state_dtype, (segments, len(header.slots), header.row_size)),
                "state_counts": (torch.int64, (segments, len(header.parameters))),
            }
        if header.rng:
            expected["rng"] = (torch.uint8, (sum(counts), data["rng"].shape[-1]))
        for name, (dtype, shape) in expected.items():
            if data[name].dtype != dtype or tuple(data[name].shape) != shape:
                raise ValueError(f"{name} is {data[name].dtype} {tuple(data[name].shape)}, not {dtype} {shape}")
        ids = data["batch_ids"]
        limit = row.max_id + 1 if header.num_samples is None else min(header.num_samples, row.max_id + 1)
        if min(counts) < 1 or min(sizes) < 1 or int(ids.min()) < 0 or int(ids.max()) >= limit:
            raise ValueError(f"an empty batch, or an id outside 0..{limit - 1}")
        if not torch.isfinite(data["coefficients"]).all() or not torch.isfinite(data["settings"]).all():
            raise ValueError("coefficients or settings hold NaN or infinity")
        absent: list[list[int]] = [[] for _ in range(row.steps)]
        for t, position in data["absent"].tolist():
            if not (0 <= t < row.steps and 0 <= position < len(header.parameters)):
                raise ValueError("absent names a step or a parameter that is not there")
            absent[t].append(position)
        parts = [p.tolist() for p in data["micro_sizes"].split(counts)]
        batch_sizes = [sum(part) for part in parts]
        flat = zip(
            ids.split(batch_sizes), data["coefficients"].split(batch_sizes), parts, data["settings"].tolist(), absent,
            _per_step(data["rng"].unbind() if header.rng else (), counts),
            _per_step(_micro_batches("batch", data) if header.batch_tree is not None else (), counts),
            _per_step(_micro_batches("factor", data) if header.factors is not None else (), counts, header.factors is not None),
            strict=True,
        )  # fmt: skip
        return [Step(i, a, tuple(part), values, tuple(missing), *rest) for i, a, part, values, missing, *rest in flat]


def _per_step(values: Sequence[Any], counts: list[int], is_needed: bool = False) -> list[tuple[Any, ...]]:
    """One value per micro-batch as one tuple per step; empty ones where there are no values."""
    if (values or is_needed) and len(values) != sum(counts):
        raise ValueError(f"{len(values)} values for {sum(counts)} micro-batches")
    ends = [0, *accumulate(counts)]
    return [tuple(values[a:b]) for a, b in pairwise(ends)]


def _micro_batches(name: str, data: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """The tensors of every micro-batch."""
    columns: list[list[Tensor]] = []
    while (key := f"{name}_{len(columns)}") in data:
        flat, shapes = data[key], data[f"{key}_shapes"].tolist()
        pieces = flat.split([math.prod(shape) for shape in shapes])
        columns.append([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])
    return list(zip(*columns, strict=True))


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise LogError(f"{file.parent} holds no log: there is no {MANIFEST}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LogError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise LogError(f"{file} is not the manifest of a dit_fast log")
    if data.get("version") != VERSION:
        raise LogError(f"{file} is of format version {data.get('version')!r}; this dit_fast reads version {VERSION}")
    digest = data.pop("sha256", None)
    if digest != canonical_digest(data):
        raise LogError(f"{file} is damaged: its content is not what its sha256 says; restore the file from a copy")
    return data | {"sha256": digest}


def _file_digest(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise LogError(f"{file} cannot be read: {error.strerror or error}") from error
