"""What a score will cost, and how it is cut to fit: bytes, columns per sweep, columns per pull."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit_fast.byte_sizes import format_bytes, parse_bytes
from dit_fast.linearize import Hessian, Mode, linearize
from dit_fast.problem import Batch, Evaluator, Params
from dit_fast.trajectory import Window

# blocks of P numbers a column holds at once beside U itself: its cotangent and the Hessian product
BLOCKS_PER_COLUMN = 2
# saved activations a column of a pull adds, as multiples of those of the primal graph (tangents and their cotangents)
GRAPHS_PER_COLUMN = 3
# shares of the budget for the blocks of a sweep, the activations of a pull, and replayed parameters and states
BLOCK_SHARE, PULL_SHARE, REPLAY_SHARE = 0.4, 0.3, 0.2

# a graph that saves more than this no longer shares the CPU's caches between columns: one column at a time is then as
# fast as or faster than all at once, and smaller (`bench/bench_linearize.py`)
CACHED_GRAPH_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Column:
    """One adjoint column: query value `query`, joining at `stop`; q(start) is subtracted at `start` where it is given."""

    query: int
    stop: int
    start: int | None = None


def columns(windows: Sequence[Window], num_queries: int) -> tuple[list[Column], Tensor]:
    """The columns to sweep, latest stop first, and the matrix [W·Q, K] that makes the windows' scores from theirs.

    One column per (window, query), or per (distinct non-zero endpoint, query) with S[t1, t2) = S(t2) − S(t1), whichever
    are fewer.
    """
    if len({t for w in windows for t in (w.start, w.stop)} - {0}) < len(windows):
        return columns_by_endpoint(windows, num_queries)
    spans = sorted({(w.stop, w.start) for w in windows}, reverse=True)
    made = [Column(q, stop, start) for stop, start in spans for q in range(num_queries)]
    position = {span: k for k, span in enumerate(spans)}
    mix = np.zeros((len(windows), num_queries, len(spans), num_queries))
    for i, window in enumerate(windows):
        for q in range(num_queries):
            mix[i, q, position[window.stop, window.start], q] = 1
    return made, torch.from_numpy(mix).flatten(2).flatten(0, 1)


def columns_by_endpoint(windows: Sequence[Window], num_queries: int) -> tuple[list[Column], Tensor]:
    """The same, one column per (distinct non-zero endpoint, query)."""
    endpoints = sorted({t for w in windows for t in (w.start, w.stop)} - {0}, reverse=True)
    made = [Column(q, stop) for stop in endpoints for q in range(num_queries)]
    position = {t: k for k, t in enumerate(endpoints)}
    mix = np.zeros((len(windows), num_queries, len(endpoints), num_queries))
    for i, window in enumerate(windows):
        for q in range(num_queries):
            mix[i, q, position[window.stop], q] = 1
            if window.start:
                mix[i, q, position[window.start], q] = -1
    return made, torch.from_numpy(mix).flatten(2).flatten(0, 1)


def memory_budget(budget: int | float | str | None, device: torch.device) -> int:
    """Bytes from a number or "2GiB", "500 MB"; None: 0.6 of what is free on the device now."""
    if budget is None:
        if device.type == "cuda":
            return int(0.6 * torch.cuda.mem_get_info(device)[0])
        return int(0.6 * _free_host_memory())
    return parse_bytes(budget, "memory_budget")


def columns_per_sweep(budget: int, num_parameters: int, num_samples: int, itemsize: int, num_blocks: int = 1) -> int:
    """How many columns of `num_blocks` blocks (θ and the optimizer's state) travel together; ValueError where not one fits."""
    one = (num_blocks + BLOCKS_PER_COLUMN) * num_parameters * itemsize + 8 * num_samples
    if one > budget:
        raise ValueError(f"one column needs {format_bytes(one)}, more than memory_budget = {format_bytes(budget)}")
    return max(1, int(BLOCK_SHARE * budget) // one)


def columns_per_pull(budget: int, ev: Evaluator, params: Params, batch: Batch, hessian: Hessian, mode: Mode) -> int:
    """How many columns go through one batch's graph together, from the bytes that graph saves for its backward."""
    graph = graph_bytes(lambda: linearize(ev, params, batch, hessian, mode))
    if ev.device.type == "cpu" and graph > CACHED_GRAPH_BYTES:
        return 1
    return max(1, int(PULL_SHARE * budget) // (GRAPHS_PER_COLUMN * graph))


def graph_bytes(run: Callable[[], object]) -> int:
    """Bytes that the autograd graph made by run() saves for its backward, at least 1."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return max(sum(saved.values()), 1)


def _free_host_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(available.split()[1])
    except (OSError, StopIteration, IndexError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
