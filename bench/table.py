"""One readable table of the results that `make bench` wrote: python bench/table.py bench/results/….json"""

import json
import sys
from typing import Any

HEAD = ("workload", "sweep ms", "all ms", "reference", "torch.func", "compiled", "double", "generic", "of training",
        "GFLOP/s", "of sgemm", "MB", "asked of the sweep")  # fmt: skip


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The workloads, the growth of the first, and retraining; times faster than each rival, best times of one run."""
    found: list[tuple[str, ...]] = []
    whole = {b["group"]: b["extra_info"] for b in results["benchmarks"] if b["name"].endswith("-ours]")}
    for entry in results["benchmarks"]:
        info, name = entry["extra_info"], entry["name"]
        if name.startswith("bench_score") and "gates" in info:
            title, all_ms = entry["group"], whole.get(entry["group"], {}).get("milliseconds")
        elif name.startswith("bench_growth") and info:
            title, all_ms = f"W1, {name.split('[')[1][:-1]}", info["milliseconds"] * info["times_ours"]
        elif name.startswith("bench_leave_one_out") and info:
            gates = {f"≥{ratio}× {rival}": info[f"times_{rival}"] >= ratio for rival, ratio in info["required"].items()}
            cells = [
                number(info["ours_seconds"] * 1e3),
                "",
                "",
                number(info["times_vmapped"]),
                "",
                "",
                number(info["times_generic"]),
            ]
            found.append((f"256 models retrained, {name.split('[')[1][:-1]}", *cells, "", "", "", "", said(gates)))
            continue
        else:
            continue
        ratios = [number(info.get(f"times_{rival}")) for rival in ("reference", "torch_func", "compiled", "double", "generic")]
        shares = [number(info.get(key)) for key in ("of_training", "gflops", "gemm_share", "peak_mb_ours")]
        found.append((title, number(info["milliseconds"]), number(all_ms), *ratios, *shares, said(info.get("gates", {}))))
    return found


def number(value: float | None) -> str:
    """Three digits, or nothing."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def said(gates: dict[str, bool]) -> str:
    return ", ".join(f"{text} {'met' if met else 'MISSED'}" for text, met in gates.items())


def table(results: dict[str, Any]) -> str:
    lines = [HEAD, *rows(results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    first, *rest = (
        " | ".join(
            cell.ljust(w) if i in (0, len(HEAD) - 1) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    machine, commit = results["machine_info"], str(results["commit_info"]["id"])[:7]
    title = f"{machine['cpu']}, one thread, float32, torch {machine['torch']}, commit {commit}; × faster than each rival"
    return "\n".join([title, "", first.rstrip(), "-+-".join("-" * w for w in widths), *(line.rstrip() for line in rest)])


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print(table(json.load(file)))
