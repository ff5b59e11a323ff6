"""Times of several rivals in turn, so that a slow spell of the machine meets them all, and what follows from them."""

import ctypes
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

import dit_fast


def best_seconds(calls: dict[str, Callable[[], object]], budget: float = 8.0, rounds: int = 3) -> dict[str, float]:
    """The best time of each, over at least so many rounds and until `budget` seconds are over."""
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + budget
    for number in itertools.count():
        if number >= rounds and time.perf_counter() > end:
            break
        for name, call in calls.items():
            turn = time.perf_counter() + 0.05  # long enough for the caches to be the rival's own
            while True:
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
                if time.perf_counter() > turn:
                    break
    return best


def gemm() -> Callable[[], object]:
    """A 1024³ float32 product, 2·1024³ FLOPs."""
    a, b = torch.randn(2, 1024, 1024)
    return lambda: a @ b


def compare(own: str, seconds: dict[str, float], flops: float) -> dict[str, Any]:
    """How many times faster `own` is than the others, and its rate beside that of `gemm` in the same run."""
    mine, peak = seconds[own], 2 * 1024**3 / seconds["gemm"]
    return (
        {"milliseconds": round(mine * 1e3, 3)}
        | {f"times_{other}": round(seconds[other] / mine, 2) for other in seconds if other not in (own, "gemm")}
        | {"of_training": round(mine / seconds["training"], 3) if "training" in seconds else None}
        | {"gflops": round(flops / mine / 1e9, 1), "gemm_share": round(flops / mine / peak, 3)}
        | {"gemm_gflops": round(peak / 1e9, 1), "blas": dit_fast.build_info()["blas"]}
    )


def peak_megabytes(call: Callable[[], object]) -> float | None:
    """What call() adds to this process's memory at its peak, workspaces of compiled code included; None off Linux."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forgets the peak
        before = _status("VmRSS")
        call()
        return round((_status("VmHWM") - before) / 1024, 1)
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))
