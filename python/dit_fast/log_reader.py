"""A log on disk as a Trajectory reads it: checked once where it is first touched, then memory-mapped."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from dit_fast import optimizers
from dit_fast.errors import LogError, UnsupportedError
from dit_fast.log import (
    CONSTANTS,
    FORMAT,
    MANIFEST,
    VERSION,
    Header,
    Step,
    canonical_digest,
    chunk_name,
    first_nonfinite,
)

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
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
            self._check_chunks()
        except (LogError, UnsupportedError):
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
            raise LogError(f"{self.path / MANIFEST} is not a manifest of this format: {error!r}") from error
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

    def params(self, t: int) -> dict[str, Tensor]:
        """θ[t], 0 ≤ t ≤ T."""
        if not self._chunks:
            raise LogError(f"{self.path}: the run ended before its first chunk was finished, so there are no parameters")
        chunk = self._chunk(min(t, self.num_steps - 1))
        return self.header.split(chunk.rows[t - chunk.row.start])

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
        chunk = self._chunk(t)
        return chunk.steps[t - chunk.row.start]

    def verify(self) -> None:
        """Read and check every chunk, also those already trusted."""
        self._trusted.clear()
        self._open.clear()
        for chunk in self._chunks:
            self._chunk(chunk.start)

    def _parse_header(self, data: Mapping[str, Any]) -> Header:
        rows, optimizer = data["parameters"], optimizers.from_json(data["optimizer"])
        names = [list(rule.setting_names) for rule in optimizer]
        if not rows or any(data["setting_names"] != own for own in names):
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
        )

    def _check_chunks(self) -> None:
        stop = 0
        for number, row in enumerate(self._chunks):
            file = self.path / row.file
            if row.file != chunk_name(number) or row.start != stop or row.steps < 1:
                raise LogError(
                    f"{self.path / MANIFEST}: a gap at step {stop}: the next chunk is {row.file} from step {row.start}"
                )
            if not file.is_file():
                raise LogError(f"{file} (steps {row.start}–{row.stop - 1}) is missing; restore it from a copy")
            stop = row.stop
        beyond = [name for name, step in self.marks.items() if not 0 <= step <= stop]
        if beyond and self.complete:
            raise ValueError(f"marks {beyond} lie outside the run's {stop} steps")
        for name in beyond:  # a killed run may have marked steps whose chunk was never finished
            del self.marks[name]

    def _chunk(self, t: int) -> "_OpenChunk":
        number = next(i for i, row in _around(self._chunks, t) if row.start <= t < row.stop)
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        row = self._chunks[number]
        where = f"{self.path / row.file} (steps {row.start}–{row.stop - 1})"
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
            step, name = chunk.row.start + bad[0], self.header.name_at(bad[1])
            raise LogError(f"{where}: parameter '{name}' holds NaN or infinity before step {step}")
        if number:
            before = self._chunks[number - 1]
            last = _OpenChunk.last_row(self.path / before.file, before)
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


class _OpenChunk:
    """A chunk's memory-mapped rows [n+1, P] and its steps, shapes checked against the manifest."""

    def __init__(self, file: Path, row: _ChunkRow, header: Header, where: str) -> None:
        self.row = row
        try:
            with safe_open(file, framework="pt") as tensors:
                data = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118, not a dict
            self.rows: Tensor = data["params"]
            self.steps = self._parse(data, header)
        except (OSError, KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise LogError(f"{where} is not a chunk of this log: {error}") from error

    @staticmethod
    def last_row(file: Path, row: _ChunkRow) -> Tensor:
        """θ after the last step, without checking the rest."""
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_slice("params")[row.steps]
        except (OSError, ValueError, RuntimeError, IndexError, safetensors.SafetensorError) as error:
            raise LogError(f"{file} (steps {row.start}–{row.stop - 1}) is damaged: {error}") from error

    def _parse(self, data: dict[str, Tensor], header: Header) -> list[Step]:
        row, groups, settings = self.row, len(header.optimizer), len(header.optimizer[0].setting_names)
        counts, sizes = data["micro_counts"].tolist(), data["micro_sizes"].tolist()
        expected = {
            "params": (header.row_dtype, (row.steps + 1, header.row_size)),
            "batch_ids": (torch.int64, (sum(sizes),)),
            "coefficients": (torch.float64, (sum(sizes),)),
            "micro_sizes": (torch.int64, (sum(counts),)),
            "micro_counts": (torch.int64, (row.steps,)),
            "settings": (torch.float64, (row.steps, groups, settings)),
        }
        for name, (dtype, shape) in expected.items():
            if data[name].dtype != dtype or tuple(data[name].shape) != shape:
                raise ValueError(f"{name} is {data[name].dtype} {tuple(data[name].shape)}, not {dtype} {shape}")
        ids = data["batch_ids"]
        limit = row.max_id + 1 if header.num_samples is None else min(header.num_samples, row.max_id + 1)
        if min(counts) < 1 or min(sizes) < 1 or int(ids.min()) < 0 or int(ids.max()) >= limit:
            raise ValueError(f"an empty batch, or an id outside 0..{limit - 1}")
        if not torch.isfinite(data["coefficients"]).all() or not torch.isfinite(data["settings"]).all():
            raise ValueError("coefficients or settings hold NaN or infinity")
        parts = [p.tolist() for p in data["micro_sizes"].split(counts)]
        batch_sizes = [sum(part) for part in parts]
        flat = zip(
            ids.split(batch_sizes), data["coefficients"].split(batch_sizes), parts, data["settings"].tolist(), strict=True
        )
        return [Step(i, a, tuple(part), values) for i, a, part, values in flat]


def _around(chunks: list[_ChunkRow], t: int) -> Iterable[tuple[int, _ChunkRow]]:
    """The chunks, beginning with the one that holds step t if all but the last are of one size."""
    guess = min(t // chunks[0].steps, len(chunks) - 1)
    yield guess, chunks[guess]
    yield from enumerate(chunks)


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
