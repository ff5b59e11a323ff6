"""The subcommands that compute scores, compare them and show them: score, compare, report."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dit_fast import cli_arguments as arguments
from dit_fast.cli_log import HESSIAN, JSON, PROBLEM, QUERY, WINDOWS, console

if TYPE_CHECKING:
    from dit_fast.result import Influence

SCORES = "A file that score wrote, or result.save from Python."
OVERWRITE = "Replace files that exist."


def score(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="The directory a Recorder wrote to.", show_default=False)],
    problem: Annotated[str, typer.Option(help=PROBLEM, show_default=False)],
    query: Annotated[str, typer.Option(help=QUERY, show_default=False)],
    windows: Annotated[str | None, typer.Option(help=WINDOWS, show_default=False)] = None,
    samples: Annotated[str | None, typer.Option(help="Ids: 3,14 or 0:100 or @FILE; all where not given.")] = None,
    hessian: Annotated[str, typer.Option(help=HESSIAN)] = "exact",
    query_at: Annotated[str, typer.Option(help="endpoint or final: where the query's gradient is taken.")] = "endpoint",
    method: Annotated[str, typer.Option(help="adjoint, retrain (true changes) or auto (the one of fewer FLOPs).")] = "adjoint",
    refine: Annotated[int, typer.Option(help="The k largest scores of each window by true retraining.")] = 0,
    backend: Annotated[str, typer.Option(help="auto, native, factors, layerwise or generic.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; the model's own where not given.")] = None,
    memory_budget: Annotated[str | None, typer.Option(help="Such as 2GiB.", show_default=False)] = None,
    check: Annotated[bool, typer.Option(help="Replay a few steps first and refuse a problem that misses them.")] = True,
    progress: Annotated[bool | None, typer.Option(help="A bar; on a terminal where not given.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Where the scores go.")] = Path("scores.safetensors"),
    csv: Annotated[Path | None, typer.Option(help="Where the table goes; --out with .csv where not given.")] = None,
    write_csv: Annotated[bool, typer.Option("--write-csv/--no-csv", help="Whether there is a table.")] = True,
    top: Annotated[int, typer.Option(help="Samples shown of each window.", min=0)] = 3,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Score every training sample of a LOG in every window; writes safetensors and CSV."""
    from dit_fast.score import score as compute

    arguments.check_output(out, overwrite)
    table = csv or out.with_suffix(".csv")
    files = {"--out": out} | ({"--csv": table} if write_csv else {})
    if len({path.resolve() for path in files.values()}) < len(files):
        raise ValueError(f"--out and --csv are both {out}: name two files")
    if write_csv:
        arguments.check_output(table, overwrite, "--csv")
    trajectory = arguments.read_log(log)
    made = arguments.read_problem(problem)
    result = compute(
        trajectory,
        made,
        arguments.read_query(query, made),
        arguments.read_windows(windows, trajectory),
        sample_ids=arguments.read_samples(samples),
        hessian=hessian,  # type: ignore[arg-type]
        query_at=query_at,
        method=method,
        refine=refine,
        backend=backend,
        device=_device(device),
        memory_budget=memory_budget,
        check=check,
        show_progress=progress,
    )
    result.save(out)
    if write_csv:
        result.to_csv(table)
    names = {option.removeprefix("--"): str(path) for option, path in files.items()}
    if as_json:
        arguments.print_json(names | _summary(result, top))
        return
    _print_leading(result, top)
    meta = result.meta
    console.print(f"{meta['seconds']:.2f} s, {meta.get('backend', meta['method'])}: {meta.get('why', '')}")
    for path in files.values():
        console.print(str(path), soft_wrap=True)


def compare(
    first: Annotated[Path, typer.Argument(metavar="SCORES", help=SCORES, show_default=False)],
    second: Annotated[
        Path | None, typer.Argument(metavar="TRUTH", help="Scores to compare with, of the same windows.", show_default=False)
    ] = None,
    retrain: Annotated[int | None, typer.Option(help="In place of TRUTH: retrain without each of k samples.")] = None,
    log: Annotated[Path | None, typer.Option(help="With --retrain: the log.", show_default=False)] = None,
    problem: Annotated[str | None, typer.Option(help="With --retrain: " + PROBLEM, show_default=False)] = None,
    query: Annotated[str | None, typer.Option(help="With --retrain: " + QUERY, show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="With --retrain: of the choice of samples.")] = 0,
    out: Annotated[Path | None, typer.Option(help="With --retrain: where the true changes go.", show_default=False)] = None,
    value: Annotated[str, typer.Option(help="Which of several query values, by number or label.")] = "0",
    progress: Annotated[bool | None, typer.Option(help="A bar; on a terminal where not given.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Say how well two files of scores agree, or scores with true retraining, window by window."""
    from dit_fast import analysis

    if (second is None) == (retrain is None):
        raise ValueError("compare needs two files of scores, or one and --retrain K")
    scores = arguments.read_scores(first)
    of = _value(value, scores)
    if second is not None:
        truth = arguments.read_scores(second)
    else:
        if out is not None:
            arguments.check_output(out, overwrite)
        truth = _retrained(scores, retrain or 0, log, problem, query, seed, progress)
        if out is not None:
            truth.save(out)
    if scores.meta.get("log") != truth.meta.get("log"):
        print("note: these scores are of two different logs", file=sys.stderr)
    rows = [
        {name: row[name] for name in ("window", "samples", "pearson", "spearman", "kendall", "top")}
        for row in analysis.compare(scores, truth, of)
    ]
    if as_json:
        arguments.print_json({"query": scores.queries[scores.query_index(of)], "windows": rows})
        return
    table = Table("window")
    for heading in ("samples", "Pearson", "Spearman", "Kendall", "top 10 %"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = (_number(row[name]) for name in ("pearson", "spearman", "kendall"))
        table.add_row(row["window"], f"{row['samples']:,}", *numbers, _number(row["top"], "{:.0%}"))
    console.print(f"{first} against {second or f'true retraining of {len(truth.sample_ids)} samples'}", soft_wrap=True)
    console.print(table)
    console.print("top 10 %: the share of the tenth of samples with the largest true |change| that is among ours")


def report(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help=SCORES, show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Where the page goes; SCORES with .html where not given.")] = None,
    problem: Annotated[str | None, typer.Option(help="For samples and labels, and with --log for losses: " + PROBLEM)] = None,
    log: Annotated[Path | None, typer.Option(help="For the run's losses.", show_default=False)] = None,
    query: Annotated[str | None, typer.Option(help="For its value along the run, with --log: " + QUERY)] = None,
    value: Annotated[str, typer.Option(help="Which of several query values is shown, by number or label.")] = "0",
    truth: Annotated[Path | None, typer.Option(help="A text file with the ids of samples known to be corrupted.")] = None,
    retrained: Annotated[Path | None, typer.Option(help="Scores by true retraining, to compare with.")] = None,
    image_shape: Annotated[str | None, typer.Option(help="How a row of the data is a picture: 28x28 or 3x32x32.")] = None,
    texts: Annotated[Path | None, typer.Option(help="A text file with a line for each sample.", show_default=False)] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Write one HTML page that shows scores; it opens in any browser and needs no network."""
    from dit_fast import report as page

    path = out or scores.with_suffix(".html")
    result = arguments.read_scores(scores)
    arguments.check_output(path, overwrite)
    made = None if problem is None else arguments.read_problem(problem)
    if query is not None and (made is None or log is None):
        raise ValueError("--query needs --problem and --log, along which it is asked")
    if image_shape is not None and (made is None or made.samples is None):
        raise ValueError("--image-shape needs --problem, whose data the pictures are")
    page.write(
        result,
        path,
        query=_value(value, result),
        trajectory=None if log is None else arguments.read_log(log),
        problem=made,
        asked=None if query is None or made is None else arguments.read_query(query, made),
        corrupted=None if truth is None else arguments.read_ids(truth, "--truth"),
        retrained=None if retrained is None else arguments.read_scores(retrained),
        samples=None if texts is None else arguments.read_lines(texts, "--texts"),
        image_shape=None if image_shape is None else _shape(image_shape),
        title=title,
    )
    if as_json:
        arguments.print_json({"out": str(path), "bytes": path.stat().st_size})
        return
    console.print(f"{path}  (open it in a browser)", soft_wrap=True)


def _retrained(
    scores: "Influence",
    count: int,
    log: Path | None,
    problem: str | None,
    query: str | None,
    seed: int,
    progress: bool | None,
) -> "Influence":
    """True changes of `count` of the samples, chosen at random, in the windows of `scores`."""
    import torch

    from dit_fast.retrain import leave_one_out

    missing = [f"--{name}" for name, given in (("log", log), ("problem", problem), ("query", query)) if given is None]
    if log is None or problem is None or query is None:
        raise ValueError(f"--retrain needs {', '.join(missing)} too")
    if not 2 <= count <= len(scores.sample_ids):
        raise ValueError(f"--retrain must be between 2 and the {len(scores.sample_ids)} samples of the scores, got {count}")
    trajectory = arguments.read_log(log)
    if scores.meta.get("log") != trajectory.digest:
        raise ValueError(f"the scores are of another log than {log}")
    made = arguments.read_problem(problem)
    asked = arguments.read_query(query, made)
    chosen = torch.randperm(len(scores.sample_ids), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    windows = {w.name: (w.start, w.stop) for w in scores.windows}
    ids = scores.sample_ids[chosen]
    truth = leave_one_out(trajectory, made, asked, windows, sample_ids=ids, show_progress=progress)
    if truth.queries != scores.queries:
        raise ValueError(f"--query {query} has the values {truth.queries}, the scores {scores.queries}: ask the same query")
    return truth


def _summary(result: "Influence", top: int) -> dict[str, Any]:
    shown = {
        window.name: {
            query: [{"sample": j, "score": value} for j, value in result.top(top, window=i, query=q)]
            for q, query in enumerate(result.queries)
        }
        for i, window in enumerate(result.windows)
    }
    return {
        "windows": {window.name: [window.start, window.stop] for window in result.windows},
        "queries": result.queries,
        "samples": len(result.sample_ids),
        "top": shown,
        "meta": dict(result.meta),
    }


def _print_leading(result: "Influence", top: int) -> None:
    num_windows, num_queries, num_samples = result.scores.shape
    values = f"{num_queries} query values" if num_queries > 1 else result.queries[0]
    console.print(f"{num_samples:,} samples, {num_windows} windows, {values}")
    if not top or not num_samples:
        return
    table = Table("window", "steps", f"largest of {result.queries[0]} (sample: score)")
    for i, window in enumerate(result.windows):
        leading = "  ".join(f"{j}: {value:+.3g}" for j, value in result.top(top, window=i))
        table.add_row(window.name, f"{window.start}:{window.stop}", leading)
    console.print(table)
    console.print("above 0: removing the sample raises the query's value (for a loss: the sample helped)")


def _value(value: str, scores: "Influence") -> int:
    return scores.query_index(int(value) if value.lstrip("-").isdigit() else value)


def _number(value: float, form: str = "{:.3f}") -> str:
    return "–" if value != value else form.format(value)


def _shape(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--image-shape {text!r} is not HEIGHTxWIDTH or CHANNELSxHEIGHTxWIDTH, such as 28x28")
    return tuple(int(part) for part in parts)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is no device: name cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no CUDA device")
    return device
