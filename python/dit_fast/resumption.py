"""Going on with a log: the logged step that a model stands at, and the log cut after it (design §4)."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_fast import modules
from dit_fast.directory import log_files
from dit_fast.errors import LogError
from dit_fast.log import Header, LogWriter, chunk_number, query_number
from dit_fast.log_reader import LogReader

# what must be as it was besides the parameters and the optimizer: field of the header → how a message calls it
_OPTIONS = {
    "num_samples": "num_samples",
    "every": "every",
    "clip": "clipping",
    "log_dtype": "log_dtype",
    "reduction": "reduction",
}
# elements of each row looked at before whole rows are compared
_PREFIX = 64


@dataclass(frozen=True)
class Point:
    """The step that a log is gone on from: the updates of each parameter's optimizer state before it, and digests of the
    parameters as they were when it was found."""

    log: LogReader
    step: int
    counts: Tensor
    digests: dict[str, str]

    def marks(self) -> dict[str, int]:
        """The marks up to this step."""
        return {name: step for name, step in self.log.marks.items() if step <= self.step}

    def check_params(self, params: Mapping[str, Tensor]) -> None:
        """LogError where parameters are not what they were when the point was found."""
        for name, p in params.items():
            if modules.tensor_digest(p) != self.digests[name]:
                raise LogError(
                    f"step {self.step}: parameter '{name}' was changed between Recorder(..., resume=True) and the first step; "
                    f"load the checkpoint before making the Recorder. The log at {self.log.path} was left as it is"
                )


def find_point(log: LogReader, params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Point:
    """The last stored step whose parameters are the model's bit for bit, in the log's dtype, and whose optimizer state, as
    far as it is stored, is the optimizer's; LogError where there is none."""
    header = log.header
    flat = torch.cat([p.detach().reshape(-1).to("cpu", header.state_dtype) for p in params.values()]).to(header.row_dtype)
    problem = (
        f"no step of the log at {log.path} has the model's parameters; it holds {log.num_steps} steps"
        f"{f', one in {header.every} stored' if header.every > 1 else ''}. Load a checkpoint of a step that is in the log, "
        "model and optimizer, before making the Recorder (Trajectory.open(path).verify() says whether the log is damaged)"
    )
    found = False
    for step in _equal_steps(log, flat):
        difference = _state_difference(log, step, params, optimizer)
        if difference is None:
            digests = {name: modules.tensor_digest(p) for name, p in params.items()}
            return Point(log, step, log.counts(step), digests)
        if not found:  # an earlier step may have the same parameters, where the rate was 0
            found = True
            problem = (
                f"the model's parameters are those before step {step} of the log at {log.path}, but {difference}; "
                "load the optimizer's state too, from the same checkpoint"
            )
    raise LogError(problem)


def _equal_steps(log: LogReader, flat: Tensor) -> Iterable[int]:
    """Steps whose stored row is `flat` bit for bit, the last first."""
    bits = flat.view(torch.uint8)
    size, last = _PREFIX * flat.element_size(), -1
    for steps, rows in log.rows_from_end():
        stored = rows.view(torch.uint8)
        for index in reversed((stored[:, :size] == bits[:size]).all(1).nonzero().flatten().tolist()):
            if torch.equal(stored[index], bits):
                if steps[index] != last:  # a chunk ends with the row its neighbour begins with
                    yield steps[index]
                last = steps[index]


def _state_difference(log: LogReader, step: int, params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> str | None:
    """How the optimizer's state differs from what the log says of the step; the state itself is stored where a segment
    begins, the counts of its updates are known everywhere."""
    slots = log.header.slots
    if not slots:
        return None
    counts, now = log.counts(step), update_counts(params, optimizer)
    if "momentum_buffer" in slots:  # torch does not count the updates of a momentum buffer
        counts = counts.clamp(max=1)
    for name, then, count in zip(params, counts.tolist(), now.tolist(), strict=True):
        if then != count:
            return f"the optimizer's state of '{name}' was updated {count} times, not {int(then)} times as in the log"
    state = log.state(step) if step < log.num_steps else None
    for name, p in params.items() if state is not None else ():
        assert state is not None
        for slot, stored in zip(slots, state[name], strict=True):
            if not _same(slot_of(optimizer, p, slot).detach().cpu(), stored):
                return f"the optimizer's {slot} of '{name}' is not the one in the log"
    return None


def check_same(log: LogReader, now: Header, with_flags: bool) -> None:
    """LogError where the run that goes on is not of the log's kind."""
    for difference in _differences(log.header, now, with_flags):
        raise LogError(f"cannot go on with the log at {log.path}: {difference}; choose another path, or pass overwrite=True")


def _differences(then: Header, now: Header, with_flags: bool) -> Iterable[str]:
    yield from _different_items("parameter", then.parameters, now.parameters)
    if list(then.parameters) != list(now.parameters):
        yield "the parameters are in another order"
    kinds = [rule.kind for rule in then.optimizer], [rule.kind for rule in now.optimizer]
    if kinds[0] != kinds[1]:
        yield f"its optimizer is {'+'.join(kinds[0])} by parameter group, this one {'+'.join(kinds[1])}"
    yield from _different_items("parameter group of", then.groups, now.groups)
    for old, new in zip(then.optimizer, now.optimizer, strict=True):
        if set(new.slots) - set(old.slots):
            yield "its optimizer had no momentum, this one has"
    for field, what in _OPTIONS.items():
        if getattr(then, field) != getattr(now, field):
            yield f"its {what} is {getattr(then, field)}, this Recorder's {getattr(now, field)}"
    yield from _different_items("frozen parameter", then.frozen_digests or {}, now.frozen_digests or {}, shown=False)
    buffers, own = then.constants or {}, now.constants or {}
    for name in buffers.keys() | own.keys():
        if name not in buffers or name not in own or not _same(buffers[name], own[name]):
            yield f"buffer '{name}' is another one"
    if (then.factors is None) != (now.factors is None):
        yield f"factors are {'not ' if then.factors is None else ''}logged in it"
    elif then.factors is not None and now.factors is not None:
        difference = then.factors.difference(now.factors, with_parts=with_flags)
        if difference is not None:
            yield difference
    if with_flags:
        if (then.rng is None) != (now.rng is None):
            yield f"dropout was {'in' if then.rng is None else ''}active in it and is not so now"
        if then.batch_tree != now.batch_tree:
            yield "its batches are stored in another way"
        yield from _different_items("train/eval flag of module", then.training_flags or {}, now.training_flags or {})


def _different_items(what: str, then: Mapping[str, object], now: Mapping[str, object], shown: bool = True) -> Iterable[str]:
    for name in [*then, *(name for name in now if name not in then)]:
        if name not in now or name not in then:
            yield f"{what} '{name}' is in {'the log' if name in then else 'the model'} alone"
        elif then[name] != now[name]:
            values = f": {then[name]} in the log, {now[name]} now" if shown else ""
            yield f"{what} '{name}' is another one{values}"


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, in dtype and shape."""
    return modules.tensor_digest(a) == modules.tensor_digest(b)


def cut(point: Point, marks: Mapping[str, int]) -> LogWriter:
    """The log without what follows the point, and its writer; a kill at any moment leaves the log before or after.

    Raises OSError, and LogError for a damaged chunk.
    """
    log, path = point.log, point.log.path
    generations = [found[1] for file in log_files(path) if (found := chunk_number(file.name) or query_number(file.name))]
    num_chunks, rest = log.beginning(point.step)
    writer = LogWriter.resume(path, log.header, log.manifest, num_chunks, max(generations, default=0) + 1, point.step)
    if rest is None:
        writer.update(marks, complete=False)
    else:
        writer.add_chunk(rest, marks)
    for file in log_files(path):
        if file.name not in writer.files:
            with contextlib.suppress(OSError):  # the manifest names it no more, so it does no harm
                file.unlink()
    return writer


def update_counts(params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    """int64 [parameters]: how often each parameter's state was updated so far; a momentum buffer counts once."""
    counts = []
    for p in params.values():
        state = optimizer.state.get(p, {})
        counts.append(int(state["step"]) if "step" in state else int(state.get("momentum_buffer") is not None))
    return torch.tensor(counts, dtype=torch.int64)


def slot_of(optimizer: torch.optim.Optimizer, p: Tensor, slot: str) -> Tensor:
    """The parameter's state tensor, zeros where torch has not made it yet."""
    tensor = optimizer.state.get(p, {}).get(slot)
    return torch.zeros_like(p) if tensor is None else tensor
