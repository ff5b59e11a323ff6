"""What replay adds to a score: every=10 against every=1 under SGD, and the state of Adam; one thread, 784-32-32-10 net.

    OMP_NUM_THREADS=1 pytest bench/bench_replay.py --benchmark-only

Scores of all logs of one run are compared before anything is timed. extra_info: ratio (time of this score over that of the
log that needs the least replay: every=1), replay share (a pass of replay alone over the whole score), bytes of the log,
difference from the scores of every=1.
"""

import time

import pytest
import torch
from torch import nn

import dit_fast as dit
from dit_fast.problem import Evaluator
from dit_fast.replay import Replay

N, BATCH, EPOCHS = 1000, 64, 3
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-3),
}
# of the largest score; float32 logs, which every=10 replays to rounding
TOLERANCE = {"sgd": 1e-5, "adam": 1e-4}


class Runs:
    """One run per optimizer, logged with several k at once by training it anew from the same seed."""

    def __init__(self, folder, quick):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(N, 784, generator=generator)
        teacher = torch.randn(784, 10, generator=generator)
        self.y = ((self.x - 0.5) @ teacher).argmax(1)
        self.epochs = 1 if quick else EPOCHS
        self.folder = folder

    def log(self, optimizer, every):
        """(trajectory, problem, query) of the run logged with this k; the log has the default size of chunks."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10))
        made = OPTIMIZERS[optimizer](model.parameters())
        path = self.folder / f"{optimizer}-{every}"
        with dit.Recorder(path, model, made, every=every) as recorder:
            for _ in range(self.epochs):
                for ids in torch.randperm(N).split(BATCH):
                    made.zero_grad()
                    nn.functional.cross_entropy(model(self.x[ids]), self.y[ids]).backward()
                    with recorder.step(ids):
                        made.step()
        problem = dit.Problem(model, nn.CrossEntropyLoss(reduction="none"), (self.x, self.y))
        return dit.Trajectory.open(path), problem, dit.queries.loss(self.x[:200], self.y[:200])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("every", [1, 10])
def bench_score(benchmark, tmp_path, optimizer, every):
    runs = Runs(tmp_path, benchmark.disabled)
    arguments = {k: runs.log(optimizer, k) for k in {1, every}}
    results = {k: dit.score(*a, show_progress=False) for k, a in arguments.items()}
    truth, scores = results[1].scores, results[every].scores
    difference = float((scores - truth).abs().max() / truth.abs().max())
    assert difference <= TOLERANCE[optimizer]

    def score(k):
        return dit.score(*arguments[k], check=False, show_progress=False)

    benchmark.group = f"score, {optimizer}"
    benchmark.pedantic(score, (every,), rounds=1 if benchmark.disabled else 5, warmup_rounds=0 if benchmark.disabled else 1)
    calls = {k: lambda k=k: score(k) for k in arguments} | {"replay": lambda: replay_pass(arguments[every], optimizer)}
    seconds = best_seconds(calls, rounds=1 if benchmark.disabled else 7)
    benchmark.extra_info |= {
        "ratio": round(seconds[every] / seconds[1], 2),
        "replay share": round(seconds["replay"] / seconds[every], 3),
        "log bytes": sum(file.stat().st_size for file in arguments[every][0].path.iterdir()),
        "difference": difference,
        "drift": results[every].meta.get("replay_drift", 0.0),
        "steps": arguments[every][0].num_steps,
    }


def replay_pass(arguments, optimizer):
    """Every point from the last step to the first, as a sweep asks for them."""
    trajectory, problem, _ = arguments
    ev = Evaluator.create(problem, trajectory, None, None)
    with ev.session():
        replay = Replay(ev, optimizer == "adam", 1 << 30)
        for t in reversed(range(trajectory.num_steps)):
            replay.at(t)


def best_seconds(calls, rounds):
    """The best time of each call, taken in turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best
