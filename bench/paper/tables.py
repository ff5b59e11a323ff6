"""Results on disk: results/NAME.json with every seed's figures, results/NAME.md and README.md with the table made of it."""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# makes tables with their titles of rows
Report = Callable[[list[dict[str, Any]]], dict[str, str]]

HERE = Path(__file__).parent
GIT = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
# asked when a script begins: it may change while one runs
COMMIT = subprocess.run(GIT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def spread(values: Sequence[float | None], digits: int = 2, scale: float = 1.0) -> str:
    """ "mean ± standard deviation" over seeds (of the sample, n − 1); seeds without a value are left out and counted."""
    known = np.array([value for value in values if value is not None and value == value]) * scale
    if not len(known):
        return "–"
    deviation = known.std(ddof=1) if len(known) > 1 else 0.0
    missing = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{known.mean():.{digits}f} ± {deviation:.{digits}f}{missing}"


def mean(values: Sequence[float | None]) -> float:
    """Of those that there are; NaN where there are none."""
    known = [value for value in values if value is not None and value == value]
    return sum(known) / len(known) if known else float("nan")


def percent(values: Sequence[float | None], digits: int = 0) -> str:
    """The same in per cent."""
    return spread(values, digits, 100.0)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; text columns come first and numbers after."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """What all scripts take: --seeds and --quick."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 (default 5)")
    made.add_argument("--quick", action="store_true", help=quick)
    return made


def origin(began: float, seeds: int) -> dict[str, Any]:
    """Where and how figures were made."""
    name = Path(sys.argv[0]).stem
    return {
        "command": f"python -m bench.paper.{name} --seeds {seeds}",
        "commit": COMMIT,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {torch.get_num_threads()} thread",
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "seconds": round(time.perf_counter() - began),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text("utf-8")) if info.is_file() else None
    return found.group(1).strip() if found else platform.machine()


def section(record: dict[str, Any], tables: dict[str, str]) -> str:
    """Tables with their titles, and where they come from."""
    made = record["origin"]
    source = (
        f"`{made['command']}` at commit {made['commit']}, {made['date']}, {made['machine']}, "
        f"torch {made['versions']['torch']}, {made['seconds']} s."
    )
    return "\n\n".join([*(f"**{title}**\n\n{table}" for title, table in tables.items()), source]) + "\n"


def write(name: str, record: dict[str, Any], text: str) -> None:
    """results/NAME.json and .md, and the part of README.md between the marks of that name."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(as_json(record) + "\n", "utf-8")
    (folder / f"{name}.md").write_text(text, "utf-8")
    readme = HERE / "README.md"
    if readme.is_file():
        old = readme.read_text("utf-8")
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        readme.write_text(marks.sub(lambda m: f"{m[1]}\n{text}\n{m[2]}", old), "utf-8")


def as_json(record: dict[str, Any]) -> str:
    """Rows as lists under the names of their columns, a line each, so that files stay small and differences can be read."""
    columns = list(record["rows"][0])
    rows = ",\n".join(json.dumps([row[name] for name in columns], ensure_ascii=False) for row in record["rows"])
    origin, names = (json.dumps(part, ensure_ascii=False) for part in (record["origin"], columns))
    return f'{{"origin": {origin},\n"columns": {names},\n"rows": [\n{rows}\n]}}'


def read(name: str) -> dict[str, Any]:
    """What results/NAME.json holds, its rows as dicts again; FileNotFoundError where it was not made."""
    record = json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))
    return {"origin": record["origin"], "rows": [dict(zip(record["columns"], row, strict=True)) for row in record["rows"]]}


def finish(name: str, began: float, arguments: argparse.Namespace, rows: list[Any], report: Report) -> None:
    """Prints the tables and, unless --quick, writes them with their rows and origin."""
    record = rounded({"origin": origin(began, arguments.seeds), "rows": rows})
    text = section(record, report(record["rows"]))
    if not arguments.quick:
        write(name, record, text)
    print(text)


def rounded(value: Any) -> Any:
    """Floats to five significant digits, NaN as null, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value else None
    return value
