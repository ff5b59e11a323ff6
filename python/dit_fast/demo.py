"""The demo: flip labels, train while logging, score, find the flipped ones, compare with true retraining."""

import gzip
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dit_fast
from dit_fast import analysis, report

FLIPPED = 0.10
INSPECTED = (0.10, 0.20)
COMPARED = 64


@dataclass(frozen=True)
class DemoData:
    """Inputs float32 [n, features], labels int64 [n], for training and validation, and the sizes of a fitting run."""

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    num_classes: int
    hidden: int
    epochs: int
    lr: float
    batch_size: int = 50
    image_shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class DemoReport:
    """What the demo found: rows of its tables, and the files it left."""

    settings: dict[str, str]
    inspected: tuple[float, ...]
    detection: list[tuple[str, list[float]]]
    compared: int
    agreement: list[tuple[str, float, float]]
    costs: list[tuple[str, float, str]]
    files: list[tuple[Path, str]]


def load(name: str) -> DemoData:
    """ "digits" comes with scikit-learn; "adult" and "mnist" from the folder DIT_FAST_DATA. ValueError where it is absent."""
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        return _split(x / 16.0, y, num_train=1000, num_val=797, hidden=32, epochs=10, lr=0.2, image_shape=(8, 8))
    if name not in ("adult", "mnist"):
        raise ValueError(f"demo data {name!r} is not one of 'digits', 'adult', 'mnist'")
    folder = os.environ.get("DIT_FAST_DATA")
    file = {"mnist": "mnist.npz", "adult": "adult-training.csv.gz"}[name]
    if not folder or not (Path(folder) / file).is_file():
        where = f"{folder!r} has none" if folder else "it is not set"
        raise ValueError(f"demo data {name!r} needs {file} in the folder named by DIT_FAST_DATA; {where}")
    if name == "mnist":
        with np.load(Path(folder) / file) as arrays:
            x, y = arrays["x_train"][:6000], arrays["y_train"][:6000]
        return _split(
            x.reshape(len(x), -1) / 255.0, y, num_train=4000, num_val=2000, hidden=32, epochs=5, lr=0.2, image_shape=(28, 28)
        )
    with gzip.open(Path(folder) / file, "rt", encoding="utf-8") as lines:
        table = np.array([[value.strip() for value in line.split(",")] for line in lines if line.strip()])
    x, y = _one_hot(table[:, :-1]), (table[:, -1] == ">50K").astype(int)
    return _split(x, y, num_train=3000, num_val=3000, hidden=16, epochs=8, lr=0.2)


def run(data_name: str, folder: Path, seed: int = 0, say: Callable[[str], None] = print) -> DemoReport:
    """The whole demo; leaves the log, the scores and the plots in `folder`, which must not hold an earlier one."""
    data = load(data_name)
    with _one_thread():
        return _run(data_name, data, folder, seed, say)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The nets are so small that a second thread is mostly waited for: up to six times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(data_name: str, data: DemoData, folder: Path, seed: int, say: Callable[[str], None]) -> DemoReport:
    torch.manual_seed(seed)
    y, flipped = _flip(data.y, data.num_classes, seed)
    corrupted = flipped.numpy()

    say(f"training on {len(y)} samples, {int(flipped.sum())} with a flipped label, and logging every step …")
    model = nn.Sequential(
        nn.Linear(data.x.shape[1], data.hidden), nn.GELU(), nn.Linear(data.hidden, data.hidden), nn.GELU(),
        nn.Linear(data.hidden, data.num_classes),
    )  # fmt: skip
    start = {name: value.clone() for name, value in model.state_dict().items()}
    # an epoch of each, so that what torch does once is in neither time
    with tempfile.TemporaryDirectory() as aside:
        _train(model, data, y, seed, recorder=None, epochs=1)
        _train(model, data, y, seed, recorder=Path(aside) / "log", epochs=1)
    model.load_state_dict(start)
    plain_seconds = _train(model, data, y, seed, recorder=None, epochs=data.epochs)
    model.load_state_dict(start)
    logged_seconds = _train(model, data, y, seed, recorder=folder / "log", epochs=data.epochs)

    say("scoring every epoch, in one sweep …")
    trajectory = dit_fast.Trajectory.open(folder / "log")
    problem = dit_fast.Problem(model, nn.CrossEntropyLoss(reduction="none"), (data.x, y))
    query = dit_fast.queries.loss(data.x_val, data.y_val)
    windows = {w.name: (w.start, w.stop) for w in trajectory.windows("epochs")}
    first, *_, last = windows
    windows["whole run"] = (0, trajectory.num_steps)
    result = dit_fast.score(trajectory, problem, query, windows)
    result.save(folder / "scores.safetensors")
    score_seconds = result.meta["seconds"]

    say(f"retraining without each of {COMPARED} samples, to compare …")
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:COMPARED].sort().values
    truth = dit_fast.leave_one_out(trajectory, problem, query, windows, sample_ids=chosen)

    shown = {"first epoch": first, "last epoch": last, "whole run": "whole run"}
    rows = {name: result.scores[result.window_index(w), 0] for name, w in shown.items()}
    pairs = {
        name: (row[chosen].numpy(), truth.scores[result.window_index(shown[name]), 0].numpy()) for name, row in rows.items()
    }
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(data.x), y, reduction="none").numpy()
    rankings = {f"DIT, {name}": analysis.suspicion(row) for name, row in rows.items()} | {"training loss at the end": losses}
    found = [(name, [analysis.found_fraction(r, corrupted, i) for i in INSPECTED]) for name, r in rankings.items()]
    found.append(("random (expected)", list(INSPECTED)))
    agreement = {name: analysis.agreement(*pair) for name, pair in pairs.items()}
    files = _save_plots(folder, result, rankings, corrupted, pairs)
    page = report.write(
        result,
        folder / "report.html",
        trajectory=trajectory,
        problem=problem,
        asked=query,
        corrupted=corrupted,
        retrained=truth,
        image_shape=data.image_shape,
        title=f"Which samples made this net: {data_name}",
    )
    files.append((page, "the report: open it in a browser"))
    steps = trajectory.num_steps
    return DemoReport(
        settings={
            "data": f"{data_name}: {len(y)} training, {len(data.y_val)} validation, {int(flipped.sum())} labels flipped",
            "net": f"{data.x.shape[1]}-{data.hidden}-{data.hidden}-{data.num_classes} GELU, {steps} SGD steps, seed {seed}",
            "accuracy": f"{_accuracy(model, data):.1%} on the validation samples",
        },
        inspected=INSPECTED,
        detection=found,
        compared=COMPARED,
        agreement=[(name, values["pearson"], values["spearman"]) for name, values in agreement.items()],
        costs=[
            ("training", plain_seconds, "1.0× training"),
            ("training while logging", logged_seconds, _times(logged_seconds, plain_seconds)),
            (f"scores, {len(windows)} windows × {len(y)} samples", score_seconds, _times(score_seconds, plain_seconds)),
            (f"true retraining of {COMPARED} samples", truth.meta["seconds"], _times(truth.meta["seconds"], plain_seconds)),
        ],
        files=files,
    )


def _split(
    x: Any,
    y: Any,
    num_train: int,
    num_val: int,
    hidden: int,
    epochs: int,
    lr: float,
    image_shape: tuple[int, int] | None = None,
) -> DemoData:
    order = np.random.default_rng(0).permutation(len(x))[: num_train + num_val]
    x, y = torch.tensor(np.asarray(x)[order], dtype=torch.float32), torch.tensor(np.asarray(y)[order], dtype=torch.int64)
    return DemoData(
        x[:num_train], y[:num_train], x[num_train:], y[num_train:], int(y.max()) + 1, hidden=hidden, epochs=epochs, lr=lr,
        image_shape=image_shape,
    )  # fmt: skip


def _one_hot(table: Any) -> Any:
    """Numeric columns standardised, the others one-hot (the first 30 values of each)."""
    columns = []
    for column in table.T:
        try:
            numbers = column.astype(float)
            columns.append(((numbers - numbers.mean()) / (numbers.std() or 1.0))[:, None])
        except ValueError:
            columns.append(column[:, None] == np.unique(column)[:30])
    return np.concatenate(columns, axis=1)


def _flip(y: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels with FLIPPED of them moved to another class, and which."""
    generator = torch.Generator().manual_seed(seed + 1)
    flipped = torch.zeros(len(y), dtype=torch.bool)
    flipped[torch.randperm(len(y), generator=generator)[: round(FLIPPED * len(y))]] = True
    shift = torch.randint(1, num_classes, y.shape, generator=generator)
    return torch.where(flipped, (y + shift) % num_classes, y), flipped


def _train(model: nn.Module, data: DemoData, y: Tensor, seed: int, recorder: Path | None, epochs: int) -> float:
    """Seconds of the run; logged at `recorder` where it is a folder."""
    optimizer = torch.optim.SGD(model.parameters(), lr=data.lr)
    dataset = dit_fast.with_ids(torch.utils.data.TensorDataset(data.x, y))
    generator = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(dataset, batch_size=data.batch_size, shuffle=True, generator=generator)
    began = time.perf_counter()
    if recorder is None:
        for _ in range(epochs):
            for _, x_batch, y_batch in loader:
                _backward(model, optimizer, x_batch, y_batch)
                optimizer.step()
    else:
        with dit_fast.Recorder(recorder, model, optimizer, num_samples=len(y)) as log:
            for epoch in range(epochs):
                for ids, x_batch, y_batch in loader:
                    _backward(model, optimizer, x_batch, y_batch)
                    with log.step(ids):
                        optimizer.step()
                log.mark(f"epoch {epoch + 1}")
    return time.perf_counter() - began


def _backward(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def _accuracy(model: nn.Module, data: DemoData) -> float:
    with torch.no_grad():
        return float((model(data.x_val).argmax(1) == data.y_val).float().mean())


def _times(seconds: float, unit: float) -> str:
    return f"{seconds / unit:.1f}× training"


def _save_plots(folder: Path, result: Any, rankings: Any, corrupted: Any, pairs: Any) -> list[tuple[Path, str]]:
    from dit_fast import plots

    figures = {
        "detection.png": (plots.detection(rankings, corrupted), "flipped labels found against samples inspected"),
        "agreement.png": (plots.agreement(pairs), "scores against true retraining"),
        "heatmap.png": (result.plot(), "every window and sample"),
    }
    files = [(folder / "log", "the log"), (folder / "scores.safetensors", "the scores: dit_fast.Influence.load(path)")]
    for name, (figure, what) in figures.items():
        figure.savefig(folder / name, dpi=110)
        files.append((folder / name, what))
    return files
