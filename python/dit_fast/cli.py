"""The command line, `dit-fast`."""

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from dit_fast import cli_arguments as arguments
from dit_fast import cli_bench, cli_log, cli_score
from dit_fast.errors import LogError, UnsupportedError

if TYPE_CHECKING:
    from dit_fast.demo import DemoReport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Which training samples made a model what it is, and when.",
    epilog="Try it: dit-fast demo. Help of one command: dit-fast score --help. Status 2 and one line: what was asked is wrong.",
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


@app.command(epilog="Example: dit-fast info --json")
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what was built and what is active: CPU, CUDA, BLAS, versions."""
    from dit_fast import build_info

    facts = build_info()
    if as_json:
        arguments.print_json(facts)
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    console.print(table)


@app.command(epilog="Example: dit-fast demo --data mnist --out runs/demo")
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


for command, example in (
    (cli_log.explain, "dit-fast explain --problem my_module:make_problem --log runs/mine"),
    (cli_log.verify, "dit-fast verify runs/mine"),
    (cli_log.estimate, "dit-fast estimate runs/mine --problem my_module:make_problem --windows epochs"),
    (cli_score.score, "dit-fast score runs/mine --problem my_module:make_problem --query my_module:make_query"),
    (cli_score.compare, "dit-fast compare scores.safetensors other.safetensors"),
    (cli_score.report, "dit-fast report scores.safetensors --problem my_module:make_problem --log runs/mine"),
    (cli_bench.bench, "dit-fast bench"),
):
    app.command(epilog=f"Example: {example}")(command)


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit status 2."""
    try:
        status = app(prog_name="dit-fast", standalone_mode=False)
    except (ValueError, TypeError, OSError, LogError, UnsupportedError, ImportError) as error:
        _refuse(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("dit-fast: stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _refuse_usage(error)
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(reason: str) -> NoReturn:
    print(f"dit-fast: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


def _refuse_usage(error: Any) -> NoReturn:
    """What the parser raises, whose classes typer takes from click or from a copy of its own."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    context = getattr(error, "ctx", None)
    _refuse(f"{error.format_message()}{f' ({context.command_path} --help)' if context else ''}")
