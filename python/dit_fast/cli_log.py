"""The subcommands that look before anything is computed: verify, explain, estimate."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dit_fast import cli_arguments as arguments
from dit_fast.byte_sizes import format_bytes

# what the subcommands say alike
PROBLEM = "module:function (or file.py:function) that returns your dit_fast.Problem."
QUERY = "module:function that returns a query; or training-loss; or parameter:NAME[INDEX]."
WINDOWS = "epochs, whole, START:STOP or NAME=START:STOP in steps; several with commas. Epochs where the run has marks."
HESSIAN = "exact, ggn, fisher or none."
JSON = "Print one line of JSON."

console = Console(highlight=False)


def verify(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="The directory a Recorder wrote to.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Read a whole log and check every chunk: checksums, shapes, finite parameters. Status 2 where it is damaged."""
    trajectory = arguments.read_log(log)
    with _bar("checking", trajectory.num_steps) as advance:
        t = 0
        while t < trajectory.num_steps:  # the first touch of a chunk checks it whole
            trajectory.batch_ids(t)
            stop = trajectory.segment(t)[1]
            advance(stop - t)
            t = stop
    facts: dict[str, Any] = {
        "log": str(log),
        "intact": True,
        "finished": trajectory.is_complete,
        "steps": trajectory.num_steps,
        "samples": trajectory.num_samples,
        "parameters": sum(shape.numel() for shape, _ in trajectory.parameters.values()),
        "optimizer": trajectory.optimizer[0].kind,
        "every": trajectory.every,
        "marks": trajectory.marks,
        "bytes": sum(file.stat().st_size for file in log.iterdir() if file.is_file()),
        "sha256": trajectory.digest,
    }
    if as_json:
        arguments.print_json(facts)
        return
    shown = facts | {
        "finished": "yes" if facts["finished"] else "no: the run was stopped, or is going on",
        "intact": "yes, every chunk was read and checked",
        "marks": _marks(trajectory.marks),
        "bytes": format_bytes(facts["bytes"]),
    }
    for name in ("steps", "samples", "parameters"):
        shown[name] = f"{facts[name]:,}"
    print_facts({("size" if name == "bytes" else name): value for name, value in shown.items()})


def explain(
    problem: Annotated[str, typer.Option(help=PROBLEM, show_default=False)],
    log: Annotated[Path | None, typer.Option(help="The log; without it, one step of plain SGD is assumed.")] = None,
    hessian: Annotated[str, typer.Option(help=HESSIAN)] = "exact",
    windows: Annotated[str | None, typer.Option(help=WINDOWS + " With --log.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Say what of a model will be compiled, what will not, and why. Nothing is scored."""
    from dit_fast import explain as explaining

    made = arguments.read_problem(problem)
    columns = 1
    if log is not None:
        trajectory = arguments.read_log(log)
        columns = len(arguments.read_windows(windows, trajectory))
    elif windows is not None:
        raise ValueError("--windows needs --log, whose steps they name")
    else:
        trajectory = explaining.assumed_run(made)
    found = explaining.explain(trajectory, made, hessian=hessian, columns=columns)  # type: ignore[arg-type]
    if as_json:
        arguments.print_json(asdict(found) | {"columns": columns, "assumed": log is None})
        return
    table = Table("backend", "can be used", "why")
    for name, why in found.backends.items():
        chosen = "bold" if name == found.backend else ""
        table.add_row(name, "yes, chosen" if chosen else "yes" if name in found.usable else "no", why, style=chosen)
    console.print(repr(made))
    console.print(f"on {trajectory!r}" if log else "no log named: one step of plain SGD is assumed, and one window")
    console.print(table)
    facts = {"score": f"{found.backend}: {found.why}", "true retraining": f"{found.retrain_backend}: {found.why_retrain}"}
    facts |= {name.replace("_", " "): str(value) for name, value in found.details.items()}
    print_facts(facts)


def estimate(
    log: Annotated[
        Path | None, typer.Argument(metavar="LOG", help="The log of a run; without it, the log of a run to come.")
    ] = None,
    problem: Annotated[str | None, typer.Option(help=PROBLEM, show_default=False)] = None,
    query: Annotated[str, typer.Option(help=QUERY)] = arguments.TRAINING_LOSS,
    windows: Annotated[str | None, typer.Option(help=WINDOWS, show_default=False)] = None,
    samples: Annotated[str | None, typer.Option(help="Ids: 3,14 or 0:100 or @FILE; all where not given.")] = None,
    hessian: Annotated[str, typer.Option(help=HESSIAN)] = "exact",
    memory_budget: Annotated[str | None, typer.Option(help="Such as 2GiB.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Without a log: optimizer steps of the run to come.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Without a log: samples per step.", show_default=False)] = None,
    optimizer: Annotated[str, typer.Option(help="Without a log: sgd, momentum, adam or adamw.")] = "sgd",
    every: Annotated[int, typer.Option(help="Without a log: every k-th step is to be stored.")] = 1,
    log_dtype: Annotated[str | None, typer.Option(help="Without a log: float16 or bfloat16.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Say what a score of a LOG will cost; or, without LOG, how large the log of a run with --steps will be."""
    if problem is None:
        raise ValueError("estimate needs --problem my_module:make_problem")
    made = arguments.read_problem(problem)
    if log is None:
        _estimate_log(made, steps, batch_size, optimizer, every, log_dtype, as_json)
        return
    if steps is not None or batch_size is not None:
        raise ValueError("--steps and --batch-size are for a run to come: leave them out, or name no log")
    from dit_fast.estimate import estimate_score

    trajectory = arguments.read_log(log)
    found = estimate_score(
        trajectory,
        made,
        arguments.read_query(query, made),
        arguments.read_windows(windows, trajectory),
        sample_ids=arguments.read_samples(samples),
        hessian=hessian,  # type: ignore[arg-type]
        memory_budget=memory_budget,
    )
    retraining = found.retraining
    cheaper = "retrain" if retraining is not None and retraining.flops < found.flops else "adjoint"
    if as_json:
        arguments.print_json(asdict(found) | {"flops": found.flops, "method": cheaper})
        return
    table = Table("", "score", "true retraining of all")
    rows: dict[str, tuple[Any, Any]] = {
        "FLOPs": (f"{found.flops:.3g}", retraining and f"{retraining.flops:.3g}"),
        "memory": (format_bytes(found.memory_bytes), retraining and format_bytes(retraining.memory_bytes)),
        "read from the log": (format_bytes(found.read_bytes), retraining and format_bytes(retraining.read_bytes)),
        "passes over the log": (found.sweeps, retraining and retraining.passes),
        "columns or models": (f"{found.columns:,} columns", retraining and f"{retraining.models:,} models"),
    }
    for name, (score, true) in rows.items():
        table.add_row(name, str(score), "–" if true is None else str(true))
    console.print(f"{trajectory!r}")
    console.print(table)
    print_facts({"backend": found.backend, "fewer FLOPs": f"--method {cheaper}, which --method auto takes"})
    if found.retraining_refused:
        console.print(f"no retraining: {found.retraining_refused}")


def _estimate_log(
    problem: Any,
    steps: int | None,
    batch_size: int | None,
    optimizer: str,
    every: int,
    log_dtype: str | None,
    as_json: bool,
) -> None:
    import torch

    from dit_fast.log_size import estimate_log

    if steps is None or batch_size is None:
        raise ValueError("estimate needs a LOG, or --steps and --batch-size of a run to come")
    made: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    if optimizer not in made:
        raise ValueError(f"--optimizer {optimizer!r} is not one of {', '.join(made)}")
    trained = [p for p in problem.model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the model has no parameters that require a gradient")
    found = estimate_log(
        problem.model, made[optimizer](trained), steps=steps, batch_size=batch_size, every=every, log_dtype=log_dtype
    )
    if as_json:
        arguments.print_json(asdict(found))
        return
    replayed = [n for n, so in (("parameters", found.parameters_replayed), ("optimizer state", found.state_replayed)) if so]
    facts = {
        "log": f"{found.steps:,} steps of {found.num_parameters:,} parameters, {optimizer}, every {found.every}",
        "on disk": f"{format_bytes(found.disk_bytes)}, {format_bytes(found.bytes_per_step)} per step",
        "files": f"{found.num_chunks:,} of up to {found.steps_per_chunk:,} steps",
        "memory": f"{format_bytes(found.memory_bytes)} while recording",
        "replayed": ", ".join(replayed) or "nothing",
    }
    print_facts(facts)


def print_facts(facts: dict[str, Any]) -> None:
    """Names and values in two columns."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in facts.items():
        table.add_row(name, str(value))
    console.print(table)


class _bar:
    """A bar on stderr, on a terminal alone; gives the function that advances it."""

    def __init__(self, what: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,}"))
        on_terminal = sys.stderr.isatty()
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, disable=not on_terminal
        )
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> Any:
        self._progress.start()
        return lambda steps: self._progress.advance(self._task, steps)

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()


def _marks(marks: dict[str, int]) -> str:
    if not marks:
        return "none"
    named = [f"{name} at {step:,}" for name, step in marks.items()]
    return ", ".join(named if len(named) <= 4 else [*named[:2], "…", named[-1]]) + f" ({len(named)})" * (len(named) > 4)
