"""The command line, `dit-fast`."""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dit_fast.errors import LogError, UnsupportedError

if TYPE_CHECKING:
    from dit_fast.demo import DemoReport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which training samples made a model what it is, and when.",
)
console = Console()


def _print_version(wanted: bool) -> None:
    if wanted:
        from dit_fast.log import own_version

        typer.echo(f"dit-fast {own_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Which training samples made a model what it is, and when."""


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what was built and what is active: CPU, CUDA, BLAS, versions."""
    from dit_fast import build_info

    facts = build_info()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    console.print(table)


@app.command()
def demo(
    data: Annotated[
        str, typer.Option(help="digits (no download), or adult or mnist from the folder DIT_FAST_DATA.")
    ] = "digits",
    out: Annotated[Path | None, typer.Option(help="Folder for log, scores and plots; a new one where it is not given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the net, the flips and the order of batches.")] = 0,
) -> None:
    """Flip labels, train while logging, find the flipped labels, compare with true retraining. About ten seconds."""
    missing = [name for name in ("matplotlib", "scipy", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the demo needs {', '.join(missing)}: pip install 'dit_fast[demo]'")
    from dit_fast import demo as program

    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a new folder")
    if out is not None and out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty: name a new folder")
    folder = out or Path(tempfile.mkdtemp(prefix="dit-fast-demo-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made: {error.strerror}") from error
    report = program.run(data, folder, seed, say=console.print)
    _print_report(report)


def _print_report(report: "DemoReport") -> None:
    for name, value in report.settings.items():
        console.print(f"[bold]{name}[/bold]: {value}")
    found = Table()
    found.add_column("samples ranked by")
    for share in report.inspected:
        found.add_column(f"in the top {share:.0%}", justify="right")
    for name, values in report.detection:
        found.add_row(name, *(f"{value:.0%}" for value in values))
    agreement = Table()
    for heading in ("window", "Pearson", "Spearman"):
        agreement.add_column(heading, justify="left" if heading == "window" else "right")
    for name, pearson, spearman in report.agreement:
        agreement.add_row(name, f"{pearson:.3f}", f"{spearman:.3f}")
    costs = Table()
    for heading in ("what", "seconds", "relative"):
        costs.add_column(heading, justify="left" if heading == "what" else "right")
    for what, seconds, relative in report.costs:
        costs.add_row(what, f"{seconds:.2f}", relative)
    titled = {
        "flipped labels found": found,
        f"scores against true retraining of {report.compared} samples": agreement,
        "cost": costs,
    }
    for title, table in titled.items():
        # not as the table's own title, which is wrapped to the table's width
        console.print(f"\n[italic]{title}[/italic]", highlight=False)
        console.print(table)
    console.print()
    for path, what in report.files:
        # no wrapping, so that a path can be copied
        console.print(f"{path}  ({what})", soft_wrap=True, highlight=False)


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit status 2."""
    try:
        app()
    except (ValueError, TypeError, OSError, LogError, UnsupportedError) as error:
        print(f"dit-fast: {error}", file=sys.stderr)
        sys.exit(2)
