"""pull() of the generic primitive in its two modes, float32 on one thread, compared before anything is timed.

    pytest bench/bench_linearize.py --benchmark-only --benchmark-group-by=group

Timed is what a step of a sweep repeats: the pass that linearises the loss, and the pull of K columns at once through it.
extra_info of double_backward: ratio (best time of forward_over_reverse over its own; above 1 it is the faster one).
"""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dit_fast
from dit_fast.linearize import linearize
from dit_fast.problem import Batch, Evaluator, Params

MODES = ("double_backward", "forward_over_reverse")
NUM_COLUMNS = (1, 8, 32)
BATCH = 32


class TinyTransformer(nn.Module):
    """One block of attention and a feed-forward net behind an embedding."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))[:, -1]


def mlp(quick: bool) -> tuple[nn.Module, Tensor, int]:
    inputs, width = (8, 4) if quick else (64, 64)
    net = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))
    return net, torch.randn(BATCH, inputs), 10


def cnn(quick: bool) -> tuple[nn.Module, Tensor, int]:
    size, channels = (4, 2) if quick else (14, 8)
    net = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.GELU(), nn.AvgPool2d(2),
        nn.Conv2d(channels, channels, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(channels * (size // 2) ** 2, 10),
    )  # fmt: skip
    return net, torch.randn(BATCH, 1, size, size), 10


def transformer(quick: bool) -> tuple[nn.Module, Tensor, int]:
    vocabulary, width, positions = (5, 4, 3) if quick else (32, 16, 8)
    return TinyTransformer(vocabulary, width), torch.randint(vocabulary, (BATCH, positions)), vocabulary


NETS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}


def workload(net: str, num_columns: int, quick: bool) -> tuple[Evaluator, Params, Batch, Params]:
    """Seeded: the problem, θ, one batch of BATCH samples and K columns."""
    torch.manual_seed(0)
    model, x, num_classes = NETS[net](quick)
    y = torch.randint(num_classes, (BATCH,))
    params = {name: p.detach().expand(2, *p.shape) for name, p in model.named_parameters()}
    trajectory = dit_fast.Trajectory.from_arrays(params, [list(range(BATCH))], 0.1)
    problem = dit_fast.Problem(model, nn.CrossEntropyLoss(reduction="none"), (x, y))
    ev = Evaluator.create(problem, trajectory, None, None)
    block = {name: torch.randn(num_columns, *shape) for name, shape in ev.shapes.items()}
    return ev, ev.params(0), ev.batches(0)[0], block


def best_seconds(call: Callable[[], object], budget: float = 0.2) -> float:
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.parametrize("num_columns", NUM_COLUMNS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("mode", MODES)
def bench_pull(benchmark, mode, net, num_columns):
    ev, params, batch, block = workload(net, num_columns, quick=benchmark.disabled)
    calls = {m: lambda m=m: linearize(ev, params, batch, "exact", m)[1](block) for m in MODES}
    with ev.session():
        (dots, hvp), (other_dots, other_hvp) = (call() for call in calls.values())
        for ours, theirs in [(dots, other_dots), *((hvp[name], other_hvp[name]) for name in hvp)]:
            # the size of the whole product: an attention's key bias has no gradient but its rounding
            size = max(other_dots.abs().max(), *(value.abs().max() for value in other_hvp.values()))
            assert (ours - theirs).abs().max() <= 1e-4 * size
        benchmark.group = f"pull {net} K={num_columns}"
        benchmark(calls[mode])
        if benchmark.stats is None or mode != MODES[0]:  # --benchmark-disable: nothing was timed
            return
        seconds = {m: best_seconds(call) for m, call in calls.items()}
    benchmark.extra_info.update(
        ratio=round(seconds[MODES[1]] / seconds[MODES[0]], 2),
        ms={m: round(1e3 * s, 3) for m, s in seconds.items()},
        parameters=ev.num_parameters,
    )
