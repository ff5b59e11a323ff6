"""What the command line names: functions of the user's, windows, samples, files to read and to write."""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from dit_fast import queries
from dit_fast.data import Samples
from dit_fast.problem import Problem
from dit_fast.queries import Query
from dit_fast.result import Influence
from dit_fast.trajectory import Trajectory

TRAINING_LOSS = "training-loss"
PARAMETER = "parameter:"


def read_problem(spec: str) -> Problem:
    """The Problem that `module:function` or `path/file.py:function` returns; ValueError or TypeError for anything else."""
    made = _make(spec, "--problem")
    if not isinstance(made, Problem):
        raise TypeError(f"--problem {spec} gave {_kind(made)}; it must return a dit_fast.Problem")
    return made


def read_query(spec: str, problem: Problem) -> list[Query]:
    """The queries of `module:function`, of "training-loss", or of "parameter:NAME" or "parameter:NAME[0,1]"."""
    if spec == TRAINING_LOSS:
        if problem.samples is None:
            raise ValueError(f"--query {TRAINING_LOSS} needs a problem with data; this one's batches are in the log")
        return [queries.loss(problem.samples.batch(_all_ids(problem.samples)))]
    if spec.startswith(PARAMETER):
        name, index = _parameter(spec)
        return [queries.parameter(name, index)]
    made = _make(spec, "--query", f"; or {TRAINING_LOSS}, or {PARAMETER}NAME")
    try:
        return queries.as_list(made)
    except TypeError as error:
        raise TypeError(f"--query {spec} gave {_kind(made)}; it must return one of dit_fast.queries, or a list") from error


def read_windows(spec: str | None, trajectory: Trajectory) -> dict[str, tuple[int, int]]:
    """{name: (start, stop)} of "epochs", "whole", "0:100" or "early=0:100", or several of these with commas.

    None = "epochs" where the run has marks, "whole" where it has none.
    """
    spec = spec or ("epochs" if trajectory.marks else "whole")
    found: dict[str, tuple[int, int]] = {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        for name, span in _windows(item, trajectory):
            if found.setdefault(name, span) != span:
                raise ValueError(
                    f"--windows {spec!r} names two windows {name!r}: give one of them another name, NAME=START:STOP"
                )
    trajectory.windows(found)  # which says what is wrong with their steps
    return found


def read_samples(spec: str | None, option: str = "--samples") -> list[int] | None:
    """Ids from "3,14", "0:100" (without 100) or both, or "@FILE" with ids in it; None for None."""
    if spec is None:
        return None
    if spec.startswith("@"):
        return read_ids(Path(spec[1:]), option)
    ids: list[int] = []
    for item in filter(None, (part.strip() for part in spec.split(","))):
        match = re.fullmatch(r"(\d+)(?::(\d+))?", item)
        if not match:
            raise ValueError(f"{option} {item!r} is neither an id nor a range such as 0:100, nor @FILE")
        first = int(match[1])
        ids += range(first, int(match[2])) if match[2] else [first]
    if not ids:
        raise ValueError(f"{option} {spec!r} names no sample")
    return ids


def read_ids(path: Path, option: str) -> list[int]:
    """The sample ids in a text file, between spaces, commas or lines."""
    words = re.split(r"[\s,]+", _text(path, option).strip())
    wrong = next((word for word in words if not re.fullmatch(r"\d+", word)), None)
    if wrong is not None:
        raise ValueError(
            f"{option}: {path} holds {wrong[:40]!r}, which is no sample id" if wrong else f"{option}: {path} is empty"
        )
    return [int(word) for word in words]


def read_lines(path: Path, option: str) -> list[str]:
    """The lines of a text file."""
    return _text(path, option).splitlines()


def read_scores(path: Path) -> Influence:
    """A file that `result.save` wrote; ValueError where there is none or it is damaged."""
    if not path.is_file():
        raise ValueError(f"there is no file of scores {path}")
    return Influence.load(path)


def read_log(path: Path) -> Trajectory:
    """A log directory; ValueError where there is none, LogError where it is damaged."""
    if not path.is_dir():
        raise ValueError(f"there is no log {path}: a log is the directory that a Recorder was given")
    return Trajectory.open(path)


def check_output(path: Path, overwrite: bool, option: str = "--out") -> None:
    """ValueError where a file cannot be written at `path`, or one is there and may not be replaced."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
    if path.exists() and not overwrite:
        raise ValueError(f"{option} {path} exists: name another file, or pass --overwrite")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written: permission denied")


def print_json(facts: Any) -> None:
    """One line of JSON on stdout; what is no number becomes null."""
    typer.echo(json.dumps(_finite(facts), allow_nan=False, ensure_ascii=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _windows(item: str, trajectory: Trajectory) -> Sequence[tuple[str, tuple[int, int]]]:
    if item in ("epochs", "whole"):
        return [(w.name, (w.start, w.stop)) for w in trajectory.windows("epochs" if item == "epochs" else None)]
    name, _, span = item.rpartition("=")
    match = re.fullmatch(r"(\d+):(\d+)", span.strip())
    if not match:
        raise ValueError(f"--windows {item!r} is none of epochs, whole, START:STOP and NAME=START:STOP (in steps)")
    start, stop = int(match[1]), int(match[2])
    return [(name.strip() or f"{start}-{stop}", (start, stop))]


def _parameter(spec: str) -> tuple[str, tuple[int, ...] | None]:
    match = re.fullmatch(r"([\w.]+)(?:\[([\d,\s]+)\])?", spec.removeprefix(PARAMETER))
    if not match:
        raise ValueError(f"--query {spec!r} is not {PARAMETER}NAME or {PARAMETER}NAME[INDEX,INDEX]")
    return match[1], None if match[2] is None else tuple(int(part) for part in match[2].split(",") if part.strip())


def _all_ids(samples: Samples) -> Any:
    import torch

    return torch.arange(samples.num_samples)


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"{option}: cannot read {path}: {reason}") from error


def _make(spec: str, option: str, otherwise: str = "") -> Any:
    """What the function of `spec` returns, or the object itself where it is no function."""
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise ValueError(f"{option} {spec!r} is not module:function, such as my_module:make or path/to/file.py:make{otherwise}")
    module = _guarded(lambda: _load(source), f"{option} {spec}: cannot import {source}")
    if not hasattr(module, name):
        raise ValueError(f"{option} {spec}: {source} has no {name!r}")
    made = getattr(module, name)
    return _guarded(made, f"{option} {spec}: {name}() failed") if callable(made) else made


def _load(source: str) -> Any:
    if not source.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(source)
    path = Path(source).resolve()
    known = sys.modules.get(path.stem)
    # a second function of the same file gets the same module, so that both see the same model
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    sys.path.insert(0, str(path.parent))  # for what the file imports from beside it
    loaded = importlib.util.spec_from_file_location(path.stem, path)
    assert loaded is not None and loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    sys.modules[path.stem] = module
    try:
        loaded.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _guarded(call: Callable[[], Any], what: str) -> Any:
    """call(); whatever the user's code raises becomes a ValueError in one line that names where.

    What it prints goes to stderr, for stdout may be read by a script.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return call()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())
        if isinstance(error, FileNotFoundError | ModuleNotFoundError):
            raise ValueError(f"{what}: {reason}") from error
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise ValueError(f"{what}: {type(error).__name__}: {reason} ({place})") from error


def _kind(made: Any) -> str:
    return "None" if made is None else f"an object of type {type(made).__name__}"
