"""What all benchmarks share: one thread, and results small enough to be kept."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

KEPT = ("min", "median", "rounds")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Of the machine and of every benchmark only what somebody reads."""
    cpu = output_json["machine_info"]["cpu"]
    output_json["machine_info"] = {
        "node": output_json["machine_info"]["node"],
        "cpu": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
        "python": output_json["machine_info"]["python_version"],
        "torch": torch.__version__,
    }
    output_json["commit_info"] = {key: output_json["commit_info"].get(key) for key in ("id", "dirty")}
    for entry in output_json["benchmarks"]:
        stats = {key: float(f"{entry['stats'][key]:.4g}") for key in KEPT}
        kept = {"group": entry["group"], "name": entry["name"], "stats": stats, "extra_info": entry["extra_info"]}
        entry.clear()
        entry.update(kept)
