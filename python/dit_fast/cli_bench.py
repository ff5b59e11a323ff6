"""The subcommand bench: what recording, scores and retraining cost on this machine, on a small run made for it."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn

from dit_fast import cli_arguments as arguments
from dit_fast.cli_log import JSON, console
from dit_fast.data import with_ids
from dit_fast.problem import Problem
from dit_fast.queries import Query, loss
from dit_fast.recorder import Recorder
from dit_fast.retrain import leave_one_out
from dit_fast.score import score
from dit_fast.trajectory import Trajectory

SAMPLES, FEATURES, HIDDEN, BATCH, EPOCHS = 512, 62, 8, 64, 10
# of the largest score, by which the compiled and the generic path may differ in float32
AGREEMENT = 1e-4


def bench(
    threads: Annotated[int, typer.Option(help="Of torch; one is the fastest for nets as small as this.", min=1)] = 1,
    repeat: Annotated[int, typer.Option(help="Runs of each, of which the fastest counts.", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Time recording, scores and retraining of a small run on this machine: a few seconds. (make bench: the full suite.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            seconds = _measure(Path(folder), repeat)
    finally:
        torch.set_num_threads(before)
    training = seconds["training"]
    if as_json:
        net = f"{FEATURES}-{HIDDEN}-1"
        facts = {"net": net, "samples": SAMPLES, "batch": BATCH, "epochs": EPOCHS, "threads": threads}
        arguments.print_json(facts | {"seconds": seconds})
        return
    console.print(
        f"net {FEATURES}-{HIDDEN}-1, {SAMPLES} samples, batches of {BATCH}, {EPOCHS} epochs of SGD, {threads} thread(s); "
        f"the fastest of {repeat}; both backends agree"
    )
    table = Table("what")
    for heading in ("milliseconds", "× training"):
        table.add_column(heading, justify="right")
    for what, value in seconds.items():
        table.add_row(what, f"{1000 * value:,.1f}", f"{value / training:.2f}")
    console.print(table)


def _measure(folder: Path, repeat: int) -> dict[str, float]:
    """Seconds of each; ValueError where the backends do not agree."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES + 128, FEATURES, generator=generator)
    y = (x[:, :5].sum(1, keepdim=True) > 0).float()
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train = (x[:SAMPLES], y[:SAMPLES])

    def fit(log: Path | None) -> None:
        model.load_state_dict(start)
        _train(model, train, log)

    logs = iter(range(1_000_000))
    seconds = {"training": _fastest(repeat, lambda: fit(None))[0]}
    seconds["training while recording"], _ = _fastest(repeat, lambda: fit(folder / str(next(logs))))
    run = Trajectory.open(folder / "0")
    problem = Problem(model, _losses, train)
    query = loss(x[SAMPLES:], y[SAMPLES:])
    scores = {}
    for backend, windows in (("native", "epochs"), ("native", None), ("generic", "epochs")):
        what = f"score, {EPOCHS if windows else 1} window{'s' * bool(windows)}, {backend}"
        seconds[what], scores[what] = _fastest(repeat, _scoring(run, problem, query, windows, backend))
    ours, theirs = (value.scores for what, value in scores.items() if f"{EPOCHS} windows" in what)
    if float((ours - theirs).abs().max()) > AGREEMENT * float(theirs.abs().max()):
        raise ValueError("the compiled and the generic scores do not agree on this machine: please report it")
    retrain = f"true retraining without each of {SAMPLES} samples"
    seconds[retrain], _ = _fastest(repeat, lambda: leave_one_out(run, problem, query, "epochs"))
    return seconds


def _scoring(run: Trajectory, problem: Problem, query: Query, windows: Any, backend: str) -> Callable[[], Any]:
    return lambda: score(run, problem, query, windows, backend=backend, check=False)


def _losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output, target, reduction="none")[:, 0]


def _train(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], log: Path | None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.BCEWithLogitsLoss()
    dataset = with_ids(torch.utils.data.TensorDataset(*data))
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()

    if log is None:
        for _ in range(EPOCHS):
            for _, x, y in loader:
                step(x, y)
                optimizer.step()
        return
    with Recorder(log, model, optimizer) as recorder:
        for epoch in range(EPOCHS):
            for ids, x, y in loader:
                step(x, y)
                with recorder.step(ids):
                    optimizer.step()
            recorder.mark(f"epoch {epoch + 1}")


def _fastest(repeat: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of `repeat` runs after one that does not count, and what the last returned."""
    run()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - began)
    return min(times), result
