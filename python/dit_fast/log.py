"""The log's format and how it is written; log_reader.py reads it (design §4).

A directory of `manifest.json` and `chunk-NNNNNN.safetensors`, readable with json and safetensors alone. A chunk holds n
consecutive steps and stands alone, k being the manifest's `every`:

    params        [⌈n/k⌉+1, P]        θ before every k-th step and after the last, flat in the manifest's order of
                                      parameters, in their widest dtype or the `log_dtype` asked for
    state         [segments, slots, P]    the optimizer's state before the first step of each segment, where the optimizer
                                      has any; a segment is the chunk for k = 1, else the steps between two rows
    state_counts  int64 [segments, parameters]    how often each parameter's state was updated before that
    absent        int64 [A, 2]        (step in the chunk, position of the parameter): parameters without a gradient, which
                                      the optimizer left alone
    batch_ids     int64 [ΣB]          the ids of all steps, one after the other
    coefficients  float64 [ΣB]        their a_b
    micro_sizes   int64 [Σcounts]     the sizes of the micro-batches; one, B, for an ordinary step
    micro_counts  int64 [n]           micro-batches per step
    rng           uint8 [batches, size]    where dropout was active: the random generator's state before each micro-batch
    factor_i, factor_i_shapes    where factors were logged: the i-th tensor of every micro-batch, likewise (below)
    batch_i, batch_i_shapes    where batches were stored: the i-th tensor of every micro-batch, flat, and their shapes;
                                      the manifest's `batch` says how they belong together
    settings      float64 [n, groups, settings]    in the order of the manifest's `setting_names`

The manifest names every finished chunk with its sha256 and carries its own, over its canonical JSON without that key.
Files are written aside, fsynced and renamed, so that a reader sees whole files or none; what the manifest does not name
is ignored.

A log that was gone on with (`resume=True`) is first cut after the step it goes on from. What is kept of the chunk that holds
this step is written beside it under a name of a new generation, `chunk-NNNNNN.G.safetensors`; then the manifest is switched
to it; then what the manifest names no more is deleted. Chunks that follow are of that generation too. So at every moment
there is one whole log, the one before or the one after.

Factors are per-sample gradients ready for scores (factored.py). The manifest's `factors` says the dtype they are stored in,
the curvature, l2, which layers were asked for, the sizes, seed and sha256 of the projections of each parameter, and lists
their parts, each of one layer. A micro-batch's tensors are, in this order, for curvature "ggn" slopes [B, R] and curvature
[B, R, R], then those of each part by its kind: "outer" inputs [B, S, I] and deltas [B, R, S, O]; "convolution" images
[B, C, H, W], which `geometry` says how to unfold, and deltas; "lookup" indices int32 [B, S] and deltas; "rows" the gradients
[B, R, …] of one parameter as they are. Deltas are not multiplied by a_b.

Gradients of queries stored at marks are files `query-NNNNNN[.G].safetensors` of one tensor [Q, …] per parameter, in the
projected space, which the manifest's `queries` lists with mark, step, labels and sha256.

While a Recorder lives it holds an advisory lock on the file `.lock` of the directory (directory.py), which readers ignore.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dit_fast import optimizers
from dit_fast.factor_log import FactorSpec
from dit_fast.optimizers import Clip, Rule

FORMAT, VERSION = "dit_fast log", 1
MANIFEST, CONSTANTS = "manifest.json", "constants.safetensors"

_QUERY = re.compile(r"query-([0-9]{6,})(?:\.([1-9][0-9]*))?\.safetensors")
_CHUNK = re.compile(r"chunk-([0-9]{6,})(?:\.([1-9][0-9]*))?\.safetensors")
# pieces small enough to be hashed and written out of the cache
_PIECE = 4 << 20
_CODES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Header:
    """What is said once about a run; None = not known, as in runs made from arrays.

    parameters: name → (shape, dtype). groups: name → index of the parameter group. optimizer: one rule per group.
    training_flags: module name → train or eval. constants: buffer name → value. frozen_digests: name → sha256 of the
    parameters that were not trained (`modules.tensor_digest`). reduction: "mean" or "sum", for information.
    rng: "cpu" or "cuda", the random generator whose state is logged. batch_tree: the layout of stored batches (`as_tree`).
    clip: how gradients were clipped. every: k, the steps between two stored rows. log_dtype: of the stored rows, None = the
    parameters' own. factors: what is said of per-sample gradients, where they are logged.
    """

    parameters: dict[str, tuple[torch.Size, torch.dtype]]
    groups: dict[str, int]
    optimizer: tuple[Rule, ...]
    num_samples: int | None = None
    training_flags: dict[str, bool] | None = None
    constants: dict[str, Tensor] | None = None
    frozen_digests: dict[str, str] | None = None
    reduction: str | None = None
    clip: Clip = field(default_factory=Clip)
    every: int = 1
    log_dtype: torch.dtype | None = None
    rng: str | None = None
    batch_tree: Any = None
    factors: FactorSpec | None = None

    @property
    def state_dtype(self) -> torch.dtype:
        """The widest of the parameters' dtypes, exact for all of them."""
        return torch.float64 if torch.float64 in {dtype for _, dtype in self.parameters.values()} else torch.float32

    @property
    def row_dtype(self) -> torch.dtype:
        """The dtype of stored parameters."""
        return self.log_dtype or self.state_dtype

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the optimizer's state tensors; none for SGD without momentum."""
        return optimizers.slots_of(self.optimizer)

    def num_rows(self, num_steps: int) -> int:
        """Rows of parameters in a chunk of so many steps."""
        return -(-num_steps // self.every) + 1

    def num_segments(self, num_steps: int) -> int:
        """Segments in a chunk of so many steps, each of which begins with the optimizer's state."""
        return 1 if self.every == 1 else -(-num_steps // self.every)

    @property
    def row_size(self) -> int:
        """P."""
        return sum(shape.numel() for shape, _ in self.parameters.values())

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """A flat row [P] as name → tensor of its own shape and dtype, views where the dtype is the row's."""
        pieces = row.split([shape.numel() for shape, _ in self.parameters.values()])
        return {n: p.view(s).to(d) for p, (n, (s, d)) in zip(pieces, self.parameters.items(), strict=True)}

    def name_at(self, position: int) -> str:
        """The parameter that a position in a row belongs to."""
        for name, (shape, _) in self.parameters.items():
            position -= shape.numel()
            if position < 0:
                return name
        raise IndexError(position)


@dataclass(frozen=True)
class Step:
    """What one step was made of: ids [B] int64, coefficients a [B] float64, the sizes of its micro-batches (sum B), the
    settings of the optimizer [groups][settings] in the order of `setting_names`, the positions of the parameters that
    had no gradient, and per micro-batch the random generator's state and the tensors of the stored batch and of the factors,
    where logged."""

    ids: Tensor
    coefficients: Tensor
    micro_sizes: tuple[int, ...]
    settings: list[list[float]]
    absent: tuple[int, ...] = ()
    rng: tuple[Tensor, ...] = ()
    batches: tuple[tuple[Tensor, ...], ...] = ()
    factors: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors."""
        return sum(tensor.numel() * tensor.element_size() for tensors in self.factors for tensor in tensors)


def update_counts(header: Header, before: Tensor, steps: Iterable[Step]) -> Tensor:
    """int64 [n+1, parameters]: how often each parameter's state was updated before each of n steps and after the last."""
    groups = torch.tensor([header.groups[name] for name in header.parameters])
    rows = [before]
    for step in steps:
        counted = [
            rule.counted(dict(zip(rule.setting_names, values, strict=True)))
            for rule, values in zip(header.optimizer, step.settings, strict=True)
        ]
        added = torch.tensor(counted, dtype=torch.int64)[groups]
        if step.absent:
            added[list(step.absent)] = 0
        rows.append(rows[-1] + added)
    return torch.stack(rows)


@dataclass
class Chunk:
    """The content of a chunk: its steps, rows of parameters, states [segments, slots, P] and their counts, as in the module
    docstring; rows, states and counts may hold more than the steps need."""

    steps: list[Step]
    rows: Tensor
    state: Tensor
    counts: Tensor


@dataclass(frozen=True)
class StoredQuery:
    """Gradients of a query's Q values at a mark: labels, and [Q, …] per parameter as the factors have them."""

    mark: str
    step: int
    labels: list[str]
    gradients: dict[str, Tensor]


def as_tree(batch: Any) -> tuple[Any, list[Tensor]]:
    """A batch as (its layout in JSON, its tensors): dicts, lists and tuples of tensors and of plain values."""
    found: list[Tensor] = []

    def layout(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            found.append(tree)
            return {"tensor": len(found) - 1}
        if isinstance(tree, Mapping):
            return {"dict": {str(key): layout(value) for key, value in tree.items()}}
        if isinstance(tree, list | tuple):
            return {"list" if isinstance(tree, list) else "tuple": [layout(value) for value in tree]}
        if tree is None or isinstance(tree, bool | int | float | str):
            return {"value": tree}
        raise TypeError(f"a stored batch holds tensors, dicts, lists, tuples and plain values, not {type(tree).__name__}")

    return layout(batch), found


def from_tree(layout: Any, tensors: Sequence[Tensor]) -> Any:
    """The batch that `as_tree` took apart."""
    ((kind, content),) = layout.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: from_tree(value, tensors) for key, value in content.items()}
    if kind in ("list", "tuple"):
        values = [from_tree(value, tensors) for value in content]
        return values if kind == "list" else tuple(values)
    return content


def as_doubles(values: Any) -> Tensor:
    """A float64 copy on the CPU; through numpy, because torch reads Python floats as float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return torch.from_numpy(np.array(values, dtype=np.float64))


def first_nonfinite(rows: Tensor) -> tuple[int, int] | None:
    """(row, column) of the first NaN or infinity in rows [n, P]; None where there is none."""
    values = (rows if rows.dtype in (torch.float32, torch.float64) else rows.float()).numpy()
    with np.errstate(all="ignore"):  # sums first, because they need no [n, P] of flags; they may overflow themselves
        suspects = np.flatnonzero(~np.isfinite(values.sum(axis=1)))
    for row in suspects:
        bad = np.flatnonzero(~np.isfinite(values[row]))
        if len(bad):
            return int(row), int(bad[0])
    return None


class LogWriter:
    """Writes a log chunk by chunk; whatever is on disk at any moment is a whole log. Raises OSError."""

    def __init__(self, path: Path, header: Header) -> None:
        constants = safetensors.torch.save({n: v.contiguous() for n, v in (header.constants or {}).items()})
        digest, _ = _write_file(path / CONSTANTS, [constants])
        self._begin(path, header, manifest_head(header, digest), [], generation=0)
        self.update({}, complete=False)

    @classmethod
    def resume(
        cls, path: Path, header: Header, manifest: Mapping[str, Any], num_chunks: int, generation: int, step: int
    ) -> "LogWriter":
        """Goes on after the first chunks of the log with this manifest and the queries up to `step`, writing files of this
        generation.

        Nothing is written before the next `add_chunk` or `update`.
        """
        changing = ("marks", "chunks", "queries", "complete", "sha256")
        head = {name: value for name, value in manifest.items() if name not in changing}
        writer = cls.__new__(cls)
        writer._begin(path, header, head, list(manifest["chunks"][:num_chunks]), generation)
        writer._queries = [row for row in manifest.get("queries", []) if row["step"] <= step]
        writer._num_queries = len(writer._queries)
        return writer

    def _begin(self, path: Path, header: Header, head: dict[str, Any], chunks: list[dict[str, Any]], generation: int) -> None:
        self.path, self._header, self._head = path, header, head
        self._chunks, self._generation = chunks, generation
        self._queries: list[dict[str, Any]] = []
        self._num_queries = 0

    @property
    def files(self) -> set[str]:
        """Names of the log's files."""
        return {MANIFEST, CONSTANTS, *(row["file"] for row in (*self._chunks, *self._queries))}

    @property
    def num_steps(self) -> int:
        """Steps in finished chunks."""
        return sum(chunk["steps"] for chunk in self._chunks)

    @property
    def num_bytes(self) -> int:
        """Bytes of finished chunks."""
        return sum(chunk["bytes"] for chunk in self._chunks)

    def add_chunk(self, chunk: "Chunk", marks: Mapping[str, int]) -> None:
        """The next len(chunk.steps) steps."""
        steps, segments = chunk.steps, self._header.num_segments(len(chunk.steps))
        absent = [(t, position) for t, step in enumerate(steps) for position in step.absent]
        tensors = {
            "coefficients": torch.cat([step.coefficients for step in steps]),
            "batch_ids": torch.cat([step.ids for step in steps]),
            "micro_sizes": torch.tensor([size for step in steps for size in step.micro_sizes], dtype=torch.int64),
            "micro_counts": torch.tensor([len(step.micro_sizes) for step in steps], dtype=torch.int64),
            "settings": torch.tensor([step.settings for step in steps], dtype=torch.float64),
            "absent": torch.tensor(absent, dtype=torch.int64).reshape(-1, 2),
            "params": chunk.rows[: self._header.num_rows(len(steps))],
        }
        if self._header.slots:
            tensors |= {"state": chunk.state[:segments], "state_counts": chunk.counts[:segments]}
        if self._header.rng:
            tensors["rng"] = torch.stack([state for step in steps for state in step.rng])
        if self._header.batch_tree is not None:
            tensors |= _flattened("batch", [batch for step in steps for batch in step.batches])
        if self._header.factors is not None:
            tensors |= _flattened("factor", [micro for step in steps for micro in step.factors])
        file = chunk_name(len(self._chunks), self._generation)
        digest, size = _write_file(self.path / file, _safetensors(tensors))
        row = {"file": file, "start": self.num_steps, "steps": len(steps), "sha256": digest, "bytes": size}
        self._chunks.append(row | {"max_id": int(tensors["batch_ids"].max())})
        self.update(marks, complete=False)

    def add_query(self, query: StoredQuery) -> None:
        """A file of its own; the manifest names it when it is written next."""
        file = query_name(self._num_queries, self._generation)
        self._num_queries += 1
        digest, size = _write_file(self.path / file, _safetensors(query.gradients))
        row = {"file": file, "mark": query.mark, "step": query.step, "labels": query.labels, "sha256": digest, "bytes": size}
        self._queries = [*(old for old in self._queries if old["mark"] != query.mark), row]

    def update(self, marks: Mapping[str, int], complete: bool) -> None:
        """Write the manifest anew."""
        queries = {"queries": self._queries} if self._queries else {}
        body = self._head | {"marks": dict(marks), "chunks": self._chunks, "complete": complete} | queries
        text = json.dumps(body | {"sha256": canonical_digest(body)}, indent=1, allow_nan=False)
        _write_file(self.path / MANIFEST, [text.encode()])


def _flattened(name: str, batches: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The i-th tensors of all micro-batches end to end, with their shapes."""
    tensors = {}
    for i, column in enumerate(zip(*batches, strict=True)):
        tensors[f"{name}_{i}"] = torch.cat([tensor.reshape(-1) for tensor in column])
        tensors[f"{name}_{i}_shapes"] = torch.tensor([tensor.shape for tensor in column], dtype=torch.int64)
    return tensors


def manifest_head(header: Header, constants_digest: str) -> dict[str, Any]:
    """The part of the manifest that stays: all but marks, chunks and whether the run was completed."""
    factors = {} if header.factors is None else {"factors": header.factors.to_json()}
    return factors | {
        "format": FORMAT,
        "version": VERSION,
        "parameters": [
            {"name": n, "shape": list(s), "dtype": str(d).removeprefix("torch."), "group": header.groups[n]}
            for n, (s, d) in header.parameters.items()
        ],
        "optimizer": optimizers.to_json(header.optimizer),
        "setting_names": list(header.optimizer[0].setting_names),
        "slots": list(header.slots),
        "clip": {"norm": header.clip.norm, "value": header.clip.value},
        "every": header.every,
        "rng": header.rng,
        "batch": header.batch_tree,
        "log_dtype": None if header.log_dtype is None else str(header.log_dtype).removeprefix("torch."),
        "num_samples": header.num_samples,
        "reduction": header.reduction,
        "training_flags": header.training_flags,
        "constants": {"file": CONSTANTS, "sha256": constants_digest},
        "frozen": header.frozen_digests,
        "versions": {"dit_fast": own_version(), "torch": torch.__version__},
    }


def _write_file(path: Path, buffers: Iterable[Any]) -> tuple[str, int]:
    """Write the whole file or nothing: aside, fsync, rename, fsync of the folder. → (sha256, bytes)."""
    aside = path.with_name(f".{path.name}.partial")
    digest, size = hashlib.sha256(), 0
    try:
        with open(aside, "wb", buffering=0) as file:
            for buffer in buffers:
                whole = memoryview(buffer).cast("B")
                for at in range(0, len(whole), _PIECE):
                    piece = whole[at : at + _PIECE]
                    digest.update(piece)
                    size += len(piece)
                    while piece:
                        piece = piece[file.write(piece) :]
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    return digest.hexdigest(), size


def _safetensors(tensors: Mapping[str, Tensor]) -> list[Any]:
    """The file as a header and the tensors' own memory; safetensors.save would copy it all while holding the GIL."""
    return [
        safetensors_head({name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}),
        *(tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in tensors.values()),
    ]


def safetensors_head(tensors: Mapping[str, tuple[torch.dtype, list[int]]]) -> bytes:
    """The beginning of a safetensors file that holds these tensors, name → (dtype, shape), in this order."""
    entries: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def chunk_name(number: int, generation: int = 0) -> str:
    """The file of chunk `number`, counted from 0; generation 0 is that of a log never resumed."""
    return f"chunk-{number:06d}{f'.{generation}' if generation else ''}.safetensors"


def query_name(number: int, generation: int = 0) -> str:
    """The file of a query stored at a mark."""
    return f"query-{number:06d}{f'.{generation}' if generation else ''}.safetensors"


def query_number(file: str) -> tuple[int, int] | None:
    """(number, generation) of a query's file; None for any other name."""
    match = _QUERY.fullmatch(file)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def chunk_number(file: str) -> tuple[int, int] | None:
    """(number, generation) of a chunk's file; None for any other name."""
    match = _CHUNK.fullmatch(file)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def canonical_digest(body: Mapping[str, Any]) -> str:
    """sha256 of JSON without white space and with sorted keys: what a manifest says, however it is laid out."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@cache
def own_version() -> str:
    """dit_fast's version, for what is written."""
    try:
        return version("dit_fast")
    except PackageNotFoundError:  # run from the source tree
        return "unknown"
