"""What a log in half precision costs in accuracy: the run of the demo (digits with flipped labels, GELU
net, 200 SGD steps), logged three times.

    OMP_NUM_THREADS=1 pytest bench/bench_log_dtype.py --benchmark-only -s

Prints a table, and keeps it in extra_info: for each dtype of the log and each window the change of the scores relative to
those of the float32 log (largest |Δ| over max|S(t1)| + max|S(t2)|), Pearson and Spearman with true retraining on the
float32 log, and the bytes of the log. What is timed is the score.
"""

import torch
from torch import nn

import dit_fast as dit
from dit_fast import analysis, demo

DTYPES = (None, "float16", "bfloat16")
COMPARED = 64


class Digits:
    """The demo's data and training, logged in a dtype of one's choice; true retraining from the float32 log."""

    def __init__(self, folder, epochs, compared):
        self.data, self.folder, self.epochs = demo.load("digits"), folder, epochs
        self.y, _ = demo._flip(self.data.y, self.data.num_classes, seed=0)
        self.chosen = torch.randperm(len(self.data.y), generator=torch.Generator().manual_seed(0))[:compared].sort().values
        truth = self.log(None)
        ends = [w.stop for w in truth[0].windows("epochs")]
        self.windows = {"first epoch": (0, ends[0]), "last epoch": (ends[-2], ends[-1]), "whole run": (0, ends[-1])}
        self.truth = dit.leave_one_out(*truth, self.windows, sample_ids=self.chosen, show_progress=False).scores[:, 0]

    def log(self, dtype):
        data = self.data
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(data.x.shape[1], data.hidden), nn.GELU(), nn.Linear(data.hidden, data.hidden), nn.GELU(),
            nn.Linear(data.hidden, data.num_classes),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=data.lr)
        dataset = dit.with_ids(torch.utils.data.TensorDataset(data.x, self.y))
        generator = torch.Generator().manual_seed(0)
        loader = torch.utils.data.DataLoader(dataset, batch_size=data.batch_size, shuffle=True, generator=generator)
        path = self.folder / str(dtype)
        with dit.Recorder(path, model, optimizer, log_dtype=dtype, overwrite=True) as recorder:
            for epoch in range(self.epochs):
                for ids, x, y in loader:
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    with recorder.step(ids):
                        optimizer.step()
                recorder.mark(f"epoch {epoch}")
        problem = dit.Problem(model, nn.CrossEntropyLoss(reduction="none"), (data.x, self.y))
        return dit.Trajectory.open(path), problem, dit.queries.loss(data.x_val, data.y_val)


def bench_log_dtype(benchmark, tmp_path):
    quick = benchmark.disabled
    digits = Digits(tmp_path, epochs=2 if quick else demo.load("digits").epochs, compared=8 if quick else COMPARED)
    logs = {dtype: digits.log(dtype) for dtype in DTYPES}
    ends = {f"to {t}": (0, t) for window in digits.windows.values() for t in window if t}
    rows, exact = {}, None
    for dtype, arguments in logs.items():
        result = dit.score(*arguments, digits.windows | ends, show_progress=False)
        scores = result.scores[:, 0]
        exact = scores if exact is None else exact
        for number, (window, (start, stop)) in enumerate(digits.windows.items()):
            sizes = [float(exact[result.window_index(f"to {t}")].abs().max()) for t in (start, stop) if t]
            agreement = analysis.agreement(scores[number, digits.chosen].numpy(), digits.truth[number].numpy())
            change = float((scores[number] - exact[number]).abs().max()) / sum(sizes)
            rows[f"{dtype or 'float32'}, {window}"] = (change, agreement["pearson"], agreement["spearman"])
        rows[f"{dtype or 'float32'}, bytes"] = sum(f.stat().st_size for f in arguments[0].path.glob("chunk-*"))
    benchmark.pedantic(dit.score, logs[None], {"show_progress": False}, rounds=1 if quick else 5)
    benchmark.extra_info |= rows
    print(f"\n{'log, window':28} {'change':>8} {'Pearson':>8} {'Spearman':>8}")
    for name, row in rows.items():
        print(f"{name:28} {row:>8,}" if isinstance(row, int) else f"{name:28} {row[0]:8.1e} {row[1]:8.4f} {row[2]:8.4f}")
    worst = {
        dtype: max(row[0] for name, row in rows.items() if name.startswith(dtype) and "bytes" not in name)
        for dtype in DTYPES[1:]
    }
    assert worst["float16"] < 0.02 and worst["bfloat16"] < 0.15
