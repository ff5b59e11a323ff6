"""What keeps the Recorder's disk and device work off the training thread: chunk buffers and the thread that writes them."""

import math
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dit_fast.errors import LogError
from dit_fast.log import Chunk, Header, LogWriter, StoredQuery, first_nonfinite
from dit_fast.log_size import segment_bytes

# the disk is called too slow where it held the loop up for more than this share of the run, and for more than these seconds
SLOW_SHARE, SLOW_SECONDS = 0.1, 1.0


class ChunkBuffer(Chunk):
    """A chunk of up to `capacity` steps being filled, in pinned memory for parameters on a GPU.

    changed [capacity+1] says, for parameters on a GPU, that they were no longer what the step before had left when the next
    step began; `ready` is the event after which everything is on the host.
    """

    def __init__(self, header: Header, capacity: int, pinned: bool) -> None:
        # zeroed, so that the memory is there before the training loop writes to it
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, pin_memory=pinned).zero_()

        segments = header.num_segments(capacity)
        super().__init__(
            steps=[],
            rows=zeros(header.num_rows(capacity), header.row_size, dtype=header.row_dtype),
            state=zeros(segments, len(header.slots), header.row_size, dtype=header.state_dtype),
            counts=torch.zeros(segments, len(header.parameters), dtype=torch.int64),
        )
        self.changed = zeros(capacity + 1, dtype=torch.bool)
        self.capacity = capacity
        self.factor_bytes = 0
        self.ready: torch.cuda.Event | None = None


class HostRows:
    """Copies parameters and optimizer state on the CPU into a chunk's rows and compares parameters with the last step's."""

    pinned = False

    def __init__(self, header: Header, params: Sequence[Tensor]) -> None:
        self._params = params
        self._sizes = [p.numel() for p in params]
        # where every step has an exact row of its own, that row is what the next step is compared with
        is_row = header.every == 1 and header.row_dtype == header.state_dtype
        self._own = None if is_row else torch.zeros(header.row_size, dtype=header.state_dtype)
        self._last = torch.zeros(0) if self._own is None else self._own

    def copy(self, buffer: ChunkBuffer, index: int | None) -> None:
        """θ as it is now becomes the last, and row `index` where it is given."""
        if self._own is None:
            assert index is not None
            self._last = buffer.rows[index]
        torch.cat([p.detach().reshape(-1) for p in self._params], out=self._last)
        if self._own is not None and index is not None:
            buffer.rows[index].copy_(self._own)

    def copy_state(self, buffer: ChunkBuffer, segment: int, slots: Sequence[Sequence[Tensor]]) -> None:
        """The optimizer's state as it is now."""
        for row, tensors in zip(buffer.state[segment], slots, strict=True):
            torch.cat([tensor.detach().reshape(-1) for tensor in tensors], out=row)

    def copy_last(self, buffer: ChunkBuffer, index: int) -> None:
        """θ as the last step left it into row `index`."""
        buffer.rows[index].copy_(self._last)
        if self._own is None:
            self._last = buffer.rows[index]

    def was_finite(self, number: int) -> bool:
        """Whether the last step left the parameter of this number without NaN and infinity."""
        return bool(torch.isfinite(self._last.split(self._sizes)[number]).all())

    def first_changed(self, buffer: ChunkBuffer, index: int) -> int | None:
        """The number of the first parameter that is not what the last step left; NaN is equal to nothing."""
        pieces = self._last.split(self._sizes)
        for number, (p, piece) in enumerate(zip(self._params, pieces, strict=True)):
            # numpy, because it compares twice as fast here as torch.equal
            if not np.array_equal(p.detach().numpy(), piece.view(p.shape).to(p.dtype).numpy()):
                return number
        return None

    def seal(self, buffer: ChunkBuffer) -> None:
        """The rows are there already."""


class DeviceRows:
    """The same for parameters on one GPU, without ever waiting for it: the writer thread waits for an event instead.

    The last row is kept on the device, where the comparison is made; its result travels beside the rows as a flag.
    """

    pinned = True

    def __init__(self, header: Header, params: Sequence[Tensor]) -> None:
        self._params = params
        self._device = params[0].device
        self._last = torch.empty(header.row_size, dtype=header.state_dtype, device=self._device)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(self._device))

    def copy(self, buffer: ChunkBuffer, index: int | None) -> None:
        """θ as it is now becomes the last, and row `index` where it is given, enqueued on the current stream."""
        stream = self._enter()
        torch.cat([p.detach().reshape(-1) for p in self._params], out=self._last)
        if index is not None:
            buffer.rows[index].copy_(self._last.to(buffer.rows.dtype), non_blocking=True)
        self._done.record(stream)

    def copy_state(self, buffer: ChunkBuffer, segment: int, slots: Sequence[Sequence[Tensor]]) -> None:
        """The optimizer's state as it is now, enqueued likewise."""
        stream = self._enter()
        for row, tensors in zip(buffer.state[segment], slots, strict=True):
            row.copy_(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(row.dtype), non_blocking=True)
        self._done.record(stream)

    def copy_last(self, buffer: ChunkBuffer, index: int) -> None:
        """θ as the last step left it, from the device, into row `index`."""
        stream = self._enter()
        buffer.rows[index].copy_(self._last.to(buffer.rows.dtype), non_blocking=True)
        self._done.record(stream)

    def was_finite(self, number: int) -> bool:
        """Never asked: the writer thread looks at the rows themselves."""
        return True

    def first_changed(self, buffer: ChunkBuffer, index: int) -> int | None:
        """None: whether a parameter changed is known on the device only, and read by the writer thread."""
        stream = self._enter()
        live = torch.cat([p.detach().reshape(-1) for p in self._params]).to(self._last.dtype)
        buffer.changed[index : index + 1].copy_((live != self._last).any().reshape(1), non_blocking=True)
        self._done.record(stream)
        return None

    def seal(self, buffer: ChunkBuffer) -> None:
        """An event of the buffer's own: the shared one moves on with the next row."""
        buffer.ready = torch.cuda.Event()
        buffer.ready.record(self._enter())

    def _enter(self) -> torch.cuda.Stream:
        """The current stream, made to wait for our last work: the user may have changed streams since."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        return stream


def changed_message(step: int, name: str | None = None) -> str:
    """The parameters are not what the last step left."""
    what = "parameters were" if name is None else f"parameter '{name}' was"
    return (
        f"step {step}: {what} changed after the step before by something else than optimizer.step() (loading weights, "
        "clipping or averaging them, .data, a second optimizer), which the log cannot explain; "
        "the steps before are in the log"
    )


def nonfinite_message(step: int, name: str) -> str:
    """A step left NaN or infinity; step −1 is before the first."""
    when = f"step {step} left" if step >= 0 else "the run begins with"
    return f"{when} NaN or infinity in parameter '{name}'; the log ends before it"


class _Pace:
    """How fast the run fills buffers and the disk empties them, in seconds and steps."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.taken = self.put_steps = 0
        self.waited = self.writing = 0.0
        self.warned = False


class BackgroundWriter:
    """The thread that writes chunks and manifests in order. The first error ends the log; `check` raises it as LogError.

    Once failed it only hands buffers back, so that nobody waits for it in vain.
    """

    def __init__(self, log: LogWriter, header: Header, make_buffer: Callable[[], ChunkBuffer], num_buffers: int) -> None:
        self._log, self._header = log, header
        self._make_buffer, self._num_buffers = make_buffer, num_buffers
        self._jobs: queue.SimpleQueue[
            tuple[ChunkBuffer | StoredQuery | None, dict[str, int], bool] | threading.Event | None
        ] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[ChunkBuffer | None] = queue.SimpleQueue()
        self._error: str | None = None
        self._pace = _Pace()
        self._thread = threading.Thread(target=self._run, name="dit_fast log writer", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong, again at every call."""
        if self._error is not None:
            raise LogError(self._error)

    def take(self) -> ChunkBuffer:
        """An empty buffer; waits for the disk where all are full."""
        start = time.perf_counter()
        buffer = self._free.get()
        self._pace.taken += 1
        if self._pace.taken > self._num_buffers:  # before, it is the making of the buffers that is waited for
            self._pace.waited += time.perf_counter() - start
        if buffer is None:
            self._free.put(None)
            raise LogError(self._error)
        return buffer

    def put(self, buffer: ChunkBuffer, marks: Mapping[str, int]) -> None:
        """Write this chunk; its buffer is free again afterwards."""
        self._pace.put_steps += len(buffer.steps)
        self._jobs.put((buffer, dict(marks), False))

    def warn_if_slow(self) -> None:
        """One RuntimeWarning where the disk is slower than the run, with the MB/s needed and reached and a k that would do."""
        pace, log = self._pace, self._log
        elapsed = time.perf_counter() - pace.began
        if pace.warned or pace.waited < SLOW_SECONDS or pace.waited < SLOW_SHARE * elapsed or not log.num_steps:
            return
        pace.warned = True
        steps_per_second = pace.put_steps / max(elapsed - pace.waited, 1e-9)
        needed = steps_per_second * log.num_bytes / log.num_steps
        reached = log.num_bytes / max(pace.writing, 1e-9)
        # a quarter more than the rows alone ask for: chunks repeat a row, and hold ids
        every = max(math.ceil(1.25 * steps_per_second * segment_bytes(self._header) / reached), self._header.every + 1)
        warnings.warn(
            f"the disk under {log.path} is slower than the run and has held it up for {pace.waited:.1f} s: the log needs "
            f"{needed / 1e6:.3g} MB/s, the disk reaches {reached / 1e6:.3g} MB/s; Recorder(..., every={every}) would write "
            "less (estimate_log says how much)",
            RuntimeWarning,
            stacklevel=2,
        )

    def put_marks(self, marks: Mapping[str, int], complete: bool = False) -> None:
        """Write the manifest with these marks."""
        self._jobs.put((None, dict(marks), complete))

    def put_query(self, query: StoredQuery, marks: Mapping[str, int]) -> None:
        """Write a query's gradients, and the manifest with them."""
        self._jobs.put((query, dict(marks), False))

    def drain(self) -> None:
        """Wait until everything put so far is on disk; LogError where it could not be written."""
        reached = threading.Event()
        self._jobs.put(reached)
        reached.wait()
        self.check()

    def join(self) -> None:
        """Wait until everything put so far is on disk and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            for _ in range(self._num_buffers):
                self._free.put(self._make_buffer())
        except Exception as error:
            self._error = f"no memory for the buffers of the log at {self._log.path} ({error}); use smaller chunk_bytes"
            self._free.put(None)
        while (job := self._jobs.get()) is not None:
            if isinstance(job, threading.Event):
                job.set()
                continue
            buffer, marks, complete = job
            try:
                if self._error is None and isinstance(buffer, ChunkBuffer):
                    self._write_chunk(buffer, marks)
                elif self._error is None:
                    if isinstance(buffer, StoredQuery):
                        self._log.add_query(buffer)
                    self._log.update(marks, complete)
            except LogError as error:
                self._error = str(error)
            except Exception as error:  # whatever it is must reach the user, who does not see this thread
                reason = (isinstance(error, OSError) and error.strerror) or repr(error)
                self._error = f"cannot write the log at {self._log.path}: {reason}; it holds {self._log.num_steps} steps"
            if isinstance(buffer, ChunkBuffer):
                buffer.steps, buffer.factor_bytes = [], 0
                self._free.put(buffer)

    def _write_chunk(self, buffer: ChunkBuffer, marks: Mapping[str, int]) -> None:
        """The longest sound beginning of the chunk; LogError where that is not all of it."""
        if buffer.ready is not None:
            buffer.ready.synchronize()
        every = self._header.every
        start, keep, problem = self._log.num_steps, len(buffer.steps), None
        changed = buffer.changed[: keep + 1].nonzero()
        if len(changed):
            problem = changed_message(start + int(changed[0]))
            keep = int(changed[0]) // every * every
        if bad := first_nonfinite(buffer.rows[: self._header.num_rows(keep)]):
            problem = nonfinite_message(min(start + bad[0] * every, start + keep) - 1, self._header.name_at(bad[1]))
            keep = max(bad[0] - 1, 0) * every
        if keep:
            start_time = time.perf_counter()
            self._log.add_chunk(Chunk(buffer.steps[:keep], buffer.rows, buffer.state, buffer.counts), marks)
            self._pace.writing += time.perf_counter() - start_time
        if problem:
            raise LogError(problem)
