"""score() against what a torch user would write (settings.py), one CPU thread, and how its cost grows.

    pytest bench/bench_score.py --benchmark-only --benchmark-group-by=group

All rivals are checked against one another before any is timed. extra_info of `engine` and `ours`: how many times faster than
each rival (best times of this run, taken in turn), GFLOP/s by the formula 2F per step and 6F per column (first layer 2F), the
share of the sgemm rate measured in the same run, peak memory of `ours` and of torch_func, and the gates. Where the sweep goes
by inner products of samples (784-1 and 784-8-1, `native_sweep.py`) it makes fewer products than the formula counts, and the
share may pass 1.
"""

import functools
from typing import Any

import pytest
from settings import CASES, Setting, Workload
from timing import best_seconds, compare, gemm, peak_megabytes

RIVALS = ["engine", "ours", "torch_func", "compiled", "double", "generic", "reference_steps", "training"]
# growth of the sweep of 62-8-1 with the columns, the samples of a batch and the steps
GROWTH = {
    **{f"K={k}": Workload((62, 8, 1), 64, 64, 256, k) for k in (1, 2, 4, 8, 16, 32, 64)},
    **{f"B={b}": Workload((62, 8, 1), b, 84, 256, 21) for b in (1, 16, 256)},
    **{f"T={t}": Workload((62, 8, 1), 64, t, 256, 21) for t in (21, 336, 672)},
}


@functools.lru_cache(maxsize=1)
def setting(name: str) -> tuple[Setting, str | None]:
    """The workload's rivals, checked, and why torch.compile is not among them, if so."""
    made, failure = CASES[name].setting(CASES[name].work), None
    try:
        made.compile("inductor")
    except Exception as error:  # the compiler behind it may fail in any way, on machines without one for a start
        failure = f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        made.programs.clear()
    made.check()
    return made, failure


@functools.lru_cache(maxsize=1)
def rival_seconds(name: str) -> dict[str, float]:
    made, failure = setting(name)
    rivals = [rival for rival in RIVALS if rival != "compiled" or failure is None]
    best = best_seconds({rival: getattr(made, rival) for rival in rivals} | {"gemm": gemm()})
    best["reference"] = best.pop("reference_steps") / made.reference_share()
    return best


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("name", CASES)
def bench_score(benchmark, name, rival, monkeypatch):
    case = CASES[name]
    if benchmark.disabled:
        monkeypatch.setattr(case.setting, "side", 8, raising=False)
        monkeypatch.setattr(case.setting, "tokens", 4, raising=False)
        small = case.setting(case.small)
        if rival == "compiled":
            # torch.compile itself takes seconds to get going: once is enough
            small.compile("eager" if name == next(iter(CASES)) else None)
        small.check()
        benchmark(getattr(small, rival))
        return
    made, failure = setting(name)
    if rival == "compiled" and failure:
        pytest.skip(f"RIVAL NOT TIMED: {failure}")
    benchmark.group = name
    seconds = rival_seconds(name)
    about = seconds["reference"] * made.reference_share() if rival == "reference_steps" else seconds[rival]
    benchmark.pedantic(getattr(made, rival), rounds=max(1, min(50, int(0.3 / about))))
    if rival in ("engine", "ours"):
        benchmark.extra_info.update(compare(rival, seconds, made.flops()))
    if rival == "engine":
        memory = {f"peak_mb_{name}": peak_megabytes(getattr(made, name)) for name in ("ours", "torch_func")}
        benchmark.extra_info.update(memory | made.column_bytes() | gates(name, benchmark.extra_info))


def gates(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What is asked of the sweep, and whether it is met."""
    met = {}
    for what, value in CASES[name].at_least.items():
        reached = found.get(what, found.get(f"times_{what}"))
        met[f"≥{value:g} {what}"] = reached >= value
    for what, value in CASES[name].at_most.items():
        met[f"≤{value:g} {what}"] = found[what] <= value
    return {"gates": met}


@pytest.mark.parametrize("size", GROWTH)
def bench_growth(benchmark, size):
    work = GROWTH[size]
    if benchmark.disabled:
        work = Workload(work.widths, min(work.batch, 8), 3, 16, min(work.windows, 3), 3)
    made = Setting(work)
    made.check("ours", "engine", "double")
    benchmark.group = "growth of W1 62-8-1"
    benchmark(made.engine)
    if benchmark.disabled:
        return
    rivals = ["engine", "ours", "double", "training"]
    seconds = best_seconds({rival: getattr(made, rival) for rival in rivals} | {"gemm": gemm()}, budget=1.0)
    benchmark.extra_info.update(compare("engine", seconds, made.flops()))
    benchmark.extra_info["peak_mb_ours"] = peak_megabytes(made.ours)
    benchmark.extra_info["µs_per_column_and_step"] = round(seconds["engine"] * 1e6 / sum(made.ends), 3)
