"""How true each curvature is: scores against true retraining, what they cost, and how large their log is.

    OMP_NUM_THREADS=1 python bench/bench_fidelity.py     # writes bench/results/fidelity.md and .png

One run for each net, 512 samples, SGD, batch 64, 12 epochs, at the largest of the rates .01, .03, .1, .3, 1, 3 at which the
training loss falls in every epoch: Adult and 20 Newsgroups with two classes, MNIST with ten. For each
method and window: Pearson, Spearman and Kendall correlation of the scores of 64 random samples with leave-one-out retraining,
overlap of the leading tenth, and the linear datamodeling score (Spearman of summed scores with the true change, 32 groups of
a tenth of the samples). The query is the mean loss on 200 validation samples. "fisher" and its compressed forms are scored
from logged factors, the others from the parameters of every step. What is timed is score() with all windows in one call.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paper import datasets
from torch import Tensor, nn

import dit_fast as dit
from dit_fast import analysis

RESULTS = Path(__file__).parent / "results"
SIZES = (4, 16, 64, 256)
BATCH = 64


@dataclass(frozen=True)
class Net:
    """A data set, a net and how it is trained."""

    data: str
    build: Callable[[int, int], nn.Module]
    rate: float
    epochs: int = 12

    def __str__(self) -> str:
        return self.data


def mlp(num_inputs: int, num_outputs: int) -> nn.Module:
    """inputs-64-32-outputs, GELU."""
    sizes = [num_inputs, 64, 32]
    hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.GELU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, num_outputs))


def small(num_inputs: int, num_outputs: int) -> nn.Module:
    """inputs-8-outputs, ReLU: the net of the paper's code."""
    return nn.Sequential(nn.Linear(num_inputs, 8), nn.ReLU(), nn.Linear(8, num_outputs))


def linear(num_inputs: int, num_outputs: int) -> nn.Module:
    """Logistic regression."""
    return nn.Sequential(nn.Linear(num_inputs, num_outputs))


def cnn(num_inputs: int, num_outputs: int) -> nn.Module:
    """conv8-conv16-linear on 28×28 images, GELU."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(16 * 7 * 7, num_outputs),
    )  # fmt: skip


NETS = {
    "adult 8 ReLU": Net("adult", small, 0.3),
    "20 Newsgroups linear": Net("news", linear, 3.0),
    "MNIST 64-32 GELU": Net("mnist", mlp, 0.1),
    "MNIST conv8-conv16 GELU": Net("mnist", cnn, 0.03),
}


class Case:
    """A net trained and logged in each way, and the truth of it."""

    def __init__(self, net: Net, folder: Path, num_train: int, epochs: int, compared: int, groups: int) -> None:
        self.net, self.folder, self.epochs = net, folder, epochs
        self.x, self.y, x_val, y_val = load(net.data, num_train)
        classes = 1 if self.y.is_floating_point() else 10
        self.make = lambda: net.build(self.x[0].numel(), classes)
        self.loss = bce if classes == 1 else nn.CrossEntropyLoss(reduction="none")
        self.query = dit.queries.loss(x_val, y_val)
        trajectory = self.log("parameters")
        steps = trajectory.num_steps
        third = steps // 3
        self.windows = {"first third": (0, third), "last third": (steps - third, steps), "whole run": (0, steps)}
        generator = torch.Generator().manual_seed(0)
        self.chosen = torch.randperm(num_train, generator=generator)[:compared].sort().values
        self.groups = analysis.draw_groups(num_train, groups, removed=0.1)
        arguments = (trajectory, self.problem(), self.query, self.windows)
        self.truth = dit.leave_one_out(*arguments, sample_ids=self.chosen, show_progress=False)
        self.of_groups = dit.leave_one_out(*arguments, groups=self.groups, show_progress=False)

    def problem(self) -> dit.Problem:
        """The model at its start, the loss and the data."""
        torch.manual_seed(0)
        return dit.Problem(self.make(), self.loss, (self.x, self.y))

    def log(self, name: str, **options: Any) -> dit.Trajectory:
        """The run, trained anew with the same seeds and logged with these options."""
        torch.manual_seed(0)
        model = self.make()
        optimizer = torch.optim.SGD(model.parameters(), lr=self.net.rate)
        generator = torch.Generator().manual_seed(1)
        path = self.folder / name
        with dit.Recorder(path, model, optimizer, num_samples=len(self.y), **options) as recorder:
            for _ in range(self.epochs):
                for ids in torch.randperm(len(self.y), generator=generator).split(BATCH):
                    optimizer.zero_grad()
                    self.loss(model(self.x[ids]), self.y[ids]).mean().backward()
                    with recorder.step(ids, batch=(self.x[ids], self.y[ids]) if options else None):
                        optimizer.step()
        return dit.Trajectory.open(path)

    def methods(self) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
        """name → (log, options of the Recorder, options of score)."""
        by_factors = {"hessian": "fisher", "backend": "factors"}
        by_outputs = {"hessian": "ggn", "backend": "factors"}

        def logged(**options: Any) -> dict[str, Any]:
            return {"factors": dit.FactorOptions(per_sample_loss=self.loss, **options), "every": 512}

        return {
            "exact": ("parameters", {}, {}),
            "ggn": ("parameters", {}, {"hessian": "ggn"}),
            "ggn, logged factors": ("ggn", logged(curvature="ggn"), by_outputs),
            "ggn, projected to 64": ("ggn-64", logged(curvature="ggn", project=64), by_outputs),
            "ggn, one sampled output": ("sampled", logged(curvature="sampled ggn"), by_outputs),
            "fisher, logged factors": ("factors", logged(), by_factors),
            "fisher, bfloat16 factors": ("bfloat16", logged(dtype="bfloat16"), by_factors),
            **{f"fisher, projected to {r}": (f"project-{r}", logged(project=r), by_factors) for r in SIZES},
            "none": ("parameters", {}, {"hessian": "none"}),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row for each method and window."""
        found: list[dict[str, Any]] = []
        uncompressed = None
        for name, (log, recorder, options) in self.methods().items():
            trajectory = dit.Trajectory.open(self.folder / log) if (self.folder / log).exists() else self.log(log, **recorder)
            began = time.perf_counter()
            scores = dit.score(trajectory, self.problem(), self.query, self.windows, show_progress=False, **options)
            seconds = time.perf_counter() - began
            if name == "fisher, logged factors":
                uncompressed = scores.scores
            size = sum(file.stat().st_size for file in (self.folder / log).iterdir())
            datamodeling = analysis.lds(scores, self.of_groups, bootstrap=0).values
            for w, window in enumerate(self.windows):
                ours, true = scores.scores[w, 0], self.truth.scores[w, 0].numpy()
                row = {"method": name, "window": window, **analysis.agreement(ours[self.chosen].numpy(), true)}
                row |= {"lds": float(datamodeling[w]), "seconds": seconds, "bytes": size, "backend": scores.meta["backend"]}
                if uncompressed is not None:
                    row["with uncompressed"] = float(np.corrcoef(ours.numpy(), uncompressed[w, 0].numpy())[0, 1])
                found.append(row)
        return found


def bce(output: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of each sample [B]."""
    return nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), target, reduction="none")


def load(name: str, num_train: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, y, x_val, y_val); ten classes of MNIST, two of the others. "random" needs no files."""
    if name == "random":
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(num_train + 20, 6, generator=generator)
        y = (x[:, 0] + x[:, 1] > 0).float()
        return x[:num_train], y[:num_train], x[num_train:], y[num_train:]
    if name != "mnist":
        split = datasets.load(name, 0, num_train, 200)
        return split.x.flatten(1), split.y, split.x_val, split.y_val
    with np.load(datasets.FOLDER / "mnist.npz") as arrays:
        images, labels = arrays["x_train"], arrays["y_train"]
    order = np.random.default_rng(0).permutation(len(images))[: num_train + 200]
    x = (torch.tensor(images[order], dtype=torch.float32)[:, None] / 255 - 0.13) / 0.31
    y = torch.tensor(labels[order], dtype=torch.long)
    return x[:num_train], y[:num_train], x[num_train:], y[num_train:]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("net", [Net("random", small, 0.3)], ids=str)
@pytest.mark.benchmark(group="fidelity")
def bench_rows(net, benchmark, tmp_path):
    """The code of the table on a net of a moment; the table itself takes minutes and is made by the command above."""
    case = Case(net, tmp_path, num_train=40, epochs=6, compared=8, groups=4)
    rows = benchmark.pedantic(case.rows, rounds=1)
    assert len(rows) == 3 * len(case.methods())
    by = {(row["method"], row["window"]): row for row in rows}
    assert by["exact", "whole run"]["pearson"] > 0.9
    # nothing is projected where the size asked for is not below a layer's own
    assert by["fisher, projected to 256", "whole run"]["with uncompressed"] > 1 - 1e-9
    assert by["fisher, projected to 4", "whole run"]["bytes"] < by["fisher, logged factors", "whole run"]["bytes"]


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The rows in markdown, a table for each net."""
    lines = []
    for name, rows in results.items():
        columns = ["method", "window", "Pearson", "Spearman", "Kendall", "top 10 %", "LDS", "score, s", "log, MB"]
        lines += [f"**{name}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in rows:
            measures = (f"{row[key]:.2f}" for key in ("pearson", "spearman", "kendall", "top", "lds"))
            cells = [row["method"], row["window"], *measures, f"{row['seconds']:.2f}", f"{row['bytes'] / 1e6:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The correlation of compressed with uncompressed scores over the size of the projection, and of both with the truth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(results), 3.4), layout="constrained")
    for axes, (name, rows) in zip(
        figure.subplots(1, len(results), sharey=True, squeeze=False)[0], results.items(), strict=True
    ):
        whole = {row["method"]: row for row in rows if row["window"] == "whole run"}
        projected = [whole[f"fisher, projected to {r}"] for r in SIZES]
        axes.plot(SIZES, [row["with uncompressed"] for row in projected], marker="o", label="with uncompressed fisher")
        axes.plot(SIZES, [row["pearson"] for row in projected], marker="s", label="with retraining")
        axes.axhline(
            whole["fisher, logged factors"]["pearson"], color="0.5", linestyle=":", label="uncompressed, with retraining"
        )
        axes.set(xscale="log", xticks=SIZES, xticklabels=SIZES, xlabel="size of the projection", title=name)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("Pearson, whole run")
            axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=80)


def main(names: list[str]) -> None:
    """All nets, or those named; prints the table and writes it with its figure."""
    import tempfile

    torch.set_num_threads(1)
    results = {}
    for name in names or NETS:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            net = NETS[name]
            results[name] = Case(net, Path(folder), num_train=512, epochs=net.epochs, compared=64, groups=32).rows()
            print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    text = table(results)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "fidelity.md").write_text(text, "utf-8")
    draw(results, RESULTS / "fidelity.png")


if __name__ == "__main__":
    main(sys.argv[1:])
