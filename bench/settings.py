"""Trained runs of the workloads W1–W5, and what a torch user would write to score them, each a call without arguments.

W1 62-8-1 ReLU net · W2 784-1 and 784-8-1 (BCE, batch 64, 84 steps of 256 samples, as the official Adult run) · W3
784-1024-1024-10 (cross entropy, batch 128) · W4 conv32-pool-conv64-pool-linear on 28×28 (batch 64) · W5 two transformer
blocks of width 128 on 64 tokens (batch 16), which take the generic path. Data is random and seeded; the run is trained in
the setup with torch.optim.SGD.

    ours        score(check=False), end to end: recognition, comparison with the generic path, query gradients, sweep
    engine      the sweep alone, with the query gradients at hand, as the rivals below have them
    torch_func  vmapped jvp of grad, all columns in one sweep, updates in place
    compiled    the same through torch.compile (one program per number of columns, at most two of those; compiling not timed)
    double      one batched double backward per step, the same otherwise
    generic     score(check=False, backend="generic")
    reference   one backward per sample and one double backward per step, a sweep per endpoint: timed on a few steps of
                one column and scaled (its cost is proportional to both)
    training    the training loop itself, for scale

On reference: for W1 it makes 924 steps of one column (a sweep from each of 21 endpoints, 44 steps long on average), and in
each 64 backward passes of a sample and one double backward. Written with torch.autograd.grad on leaves as it is here, such a
step takes half the time of one with modules, `backward()` and zeroed gradients, and a quarter of `dit_fast.reference`; ratios
to it are smaller by as much.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import dit_fast
from dit_fast import layerwise, native, native_queries, native_sweep, plan, queries
from dit_fast.problem import Evaluator
from dit_fast.replay import Replay
from dit_fast.score import choose_linearizer
from dit_fast.sweep import Linearizer, QueryGradients, sweep


@dataclass(frozen=True)
class Workload:
    widths: tuple[int, ...]
    batch: int
    steps: int
    samples: int
    windows: int
    reference_steps: int = 4


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def binary(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z.squeeze(1), y, reduction="none")


class Setting:
    """A trained run of a workload and every rival on it, as calls without arguments."""

    backend = "native"
    num_queried = 256

    def __init__(self, work: Workload) -> None:
        torch.manual_seed(0)
        self.work = work
        self.model, self.loss = self.build()
        (self.x, self.y), self.val = self.draw(work.samples), self.draw(self.num_queried)
        self.programs: dict[int, Callable[..., Any]] = {}
        epochs = itertools.chain.from_iterable(torch.randperm(work.samples).split(work.batch) for _ in itertools.count())
        self.batches = list(itertools.islice(epochs, work.steps))
        history = {n: [p.detach().clone()] for n, p in self.model.named_parameters()}
        self.train(history)
        self.params = {n: torch.stack(rows) for n, rows in history.items()}
        self.trajectory = dit_fast.Trajectory.from_arrays(
            params=self.params, batch_ids=self.batches, lr=0.05, num_samples=work.samples
        )
        T, W = work.steps, min(work.windows, work.steps)
        self.windows = [(i * T // W, (i + 1) * T // W) for i in range(W)]
        self.ends = sorted({t for window in self.windows for t in window} - {0}, reverse=True)
        self.problem = dit_fast.Problem(self.model, self.loss, (self.x, self.y))
        self.query = queries.loss(*self.val)
        self.gradients = {t: self._query_gradient(t) for t in self.ends}

    def build(self) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
        """The net and its per-sample loss."""
        layers = [m for i, o in itertools.pairwise(self.work.widths) for m in (nn.Linear(i, o), nn.ReLU())]
        return nn.Sequential(*layers[:-1]), cross_entropy if self.work.widths[-1] > 1 else binary

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """n inputs and targets."""
        outputs = self.work.widths[-1]
        y = torch.randint(outputs, (n,)) if outputs > 1 else torch.randint(2, (n,)).float()
        return torch.randn(n, self.work.widths[0]), y

    def train(self, history: dict[str, list[Tensor]] | None = None) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        for ids in self.batches:
            optimizer.zero_grad()
            self.loss(self.model(self.x[ids]), self.y[ids]).mean().backward()
            optimizer.step()
            for name, rows in (history or {}).items():
                rows.append(self.model.get_parameter(name).detach().clone())

    def theta(self, t: int) -> dict[str, Tensor]:
        return {name: rows[t] for name, rows in self.params.items()}

    def _query_gradient(self, t: int) -> dict[str, Tensor]:
        return grad(lambda p: self.loss(functional_call(self.model, p, (self.val[0],)), self.val[1]).mean())(self.theta(t))

    def ours(self, backend: str = "auto") -> Tensor:
        result = dit_fast.score(self.trajectory, self.problem, self.query, self.windows, check=False, backend=backend)
        assert result.meta["backend"] == (self.backend if backend == "auto" else backend)
        return result.scores[:, 0]

    def generic(self) -> Tensor:
        return self.ours("generic")

    @functools.cached_property
    def engine(self) -> Callable[[], Tensor]:
        ev = Evaluator.create(self.problem, self.trajectory, None, None)
        columns, mix = plan.columns(self.trajectory.windows(self.windows), 1)
        at = {t: {n: g[None] for n, g in gradient.items()} for t, gradient in self.gradients.items()}
        with ev.session():
            run = self.prepare(ev, columns, at.__getitem__)

        def scores() -> Tensor:
            with ev.session():
                return mix @ run()

        return scores

    def prepare(self, ev: Evaluator, columns: list[plan.Column], at: QueryGradients) -> Callable[[], Tensor]:
        """The sweep alone, its net recognised."""
        compiled, rows = native.prepare(ev, "exact"), native_queries.rows(ev, native_queries.ends(columns), at)
        return lambda: native_sweep.sweep(ev, columns, compiled, "exact", rows, self.work.samples, lambda n: None)

    def _sweep(self, step: Callable[[int, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
        """Scores [W, N] with step(t, U) → (dots [K, B], H U), columns joining at the ends; difference of endpoints."""
        K = len(self.ends)
        block = {n: rows.new_zeros(K, *rows.shape[1:]) for n, rows in self.params.items()}
        scores, active = torch.zeros(K, self.work.samples, dtype=torch.float64), 0
        for t in reversed(range(self.work.steps)):
            if t + 1 in self.gradients:
                for name, value in self.gradients[t + 1].items():
                    block[name][active] = value
                active += 1
            travelling = {n: value[:active] for n, value in block.items()}
            dots, hvp = step(t, travelling)
            ids, rate = self.batches[t], 0.05
            scores[:active].index_add_(1, ids, dots.double(), alpha=rate / len(ids))
            for name, value in hvp.items():
                travelling[name].sub_(value, alpha=rate)
        before = dict(zip(self.ends, scores, strict=True)) | {0: torch.zeros(self.work.samples).double()}
        return torch.stack([before[stop] - before[start] for start, stop in self.windows])

    def torch_func(self) -> Tensor:
        return self._sweep(self.vmapped)

    def _arguments(self, t: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        return self.theta(t), self.x[self.batches[t]], self.y[self.batches[t]]

    def vmapped(self, t: int, block: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self._products(*self._arguments(t), block)

    def _products(
        self, theta: dict[str, Tensor], x: Tensor, y: Tensor, block: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def mean_and_losses(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            losses = self.loss(functional_call(self.model, p, (x,)), y)
            return losses.mean(), losses

        both: Any = grad(mean_and_losses, has_aux=True)
        hvp, dots = vmap(lambda c: jvp(both, (theta,), (c,))[1])(block)
        return dots, hvp

    def compile(self, backend: str | None) -> None:
        """Makes the programs of `compiled`, one for all columns and one for the first half of them; None compiles nothing."""

        def products(theta: dict[str, Tensor], x: Tensor, y: Tensor, block: dict[str, Tensor]) -> Any:
            return self._products(theta, x, y, block)

        K = len(self.ends)
        for size in {K, -(-K // 2)}:
            block = {n: rows.new_zeros(size, *rows.shape[1:]) for n, rows in self.params.items()}
            # torch.compile cannot take jvp of grad itself (torch 2.13); it takes the plain operations these come down to
            plain = make_fx(products)(*self._arguments(0), block)
            self.programs[size] = torch.compile(plain, dynamic=False, backend=backend) if backend else plain
            self.programs[size](*self._arguments(0), block)

    def compiled(self) -> Tensor:
        def step(t: int, block: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            active = len(next(iter(block.values())))
            size = min(size for size in self.programs if size >= active)
            whole = {n: value._base[:size] for n, value in block.items()}  # type: ignore[index]
            dots, hvp = self.programs[size](*self._arguments(t), whole)
            return dots[:active], {n: value[:active] for n, value in hvp.items()}

        return self._sweep(step)

    def double(self) -> Tensor:
        def step(t: int, block: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            x, y = self.x[self.batches[t]], self.y[self.batches[t]]
            theta = {n: value.detach().requires_grad_() for n, value in self.theta(t).items()}
            a = torch.full((len(x),), 1 / len(x), requires_grad=True)
            total = (a * self.loss(functional_call(self.model, theta, (x,)), y)).sum()
            gradient = torch.autograd.grad(total, list(theta.values()), create_graph=True)
            *hvp, dots = torch.autograd.grad(
                gradient, [*theta.values(), a], [block[n] for n in theta], is_grads_batched=True, materialize_grads=True
            )
            return dots, dict(zip(theta, hvp, strict=True))

        return self._sweep(step)

    def training(self) -> None:
        self.train()

    def reference_share(self) -> float:
        """Of all steps of all columns, those that `reference_steps` makes."""
        return self.work.reference_steps / sum(self.ends)

    def reference_steps(self) -> Tensor:
        """The last few steps of the first column, sample by sample, as the estimator is written down."""
        u = {n: value.clone() for n, value in self.gradients[self.ends[0]].items()}
        scores = torch.zeros(self.work.samples, dtype=torch.float64)
        for t in reversed(range(self.work.steps - self.work.reference_steps, self.work.steps)):
            theta = {n: value.detach().requires_grad_() for n, value in self.theta(t).items()}
            ids = self.batches[t]
            for j in ids.tolist():
                own = self.loss(functional_call(self.model, theta, (self.x[j : j + 1],)), self.y[j : j + 1])[0]
                parts = torch.autograd.grad(own, list(theta.values()))
                scores[j] += 0.05 / len(ids) * sum((u[n] * g).sum().item() for n, g in zip(theta, parts, strict=True))
            total = self.loss(functional_call(self.model, theta, (self.x[ids],)), self.y[ids]).mean()
            gradient = torch.autograd.grad(total, list(theta.values()), create_graph=True)
            product = torch.autograd.grad(gradient, list(theta.values()), list(u.values()), materialize_grads=True)
            for value, part in zip(u.values(), product, strict=True):
                value.sub_(part, alpha=0.05)
        return scores

    def products(self) -> tuple[float, float]:
        """Multiplications per sample of one forward pass, and of its first layer (whose input needs no gradient)."""
        widths = self.work.widths
        return sum(i * o for i, o in itertools.pairwise(widths)), widths[0] * widths[1]

    def flops(self) -> float:
        """Of all sweeps by the formula 2F per step and 6F per column, F = 2·B·products; 2F of the first layer's share."""
        everything, first = (2.0 * self.work.batch * n for n in self.products())
        return self.work.steps * 2 * everything + sum(self.ends) * (6 * everything - 4 * first)

    def column_bytes(self) -> dict[str, int]:
        """The peak of a step per column, here and in vmapped torch.func; empty where it is not told apart."""
        return {}

    def check(self, *names: str) -> None:
        """These rivals, or all, give the same scores; the reference where its steps are all there are."""
        names = names or ("ours", "engine", "torch_func", "double", "generic", *(("compiled",) if self.programs else ()))
        results = {name: getattr(self, name)() for name in names}
        size = self.sizes(results["double"])
        for name, scores in results.items():
            assert ((scores - results["double"]).abs().amax(-1) <= 1e-4 * size).all(), name
        if self.work.reference_steps == self.work.steps and len(self.windows) == 1:
            assert (self.reference_steps() - results["ours"][0]).abs().max() <= 1e-4 * size[0]

    @staticmethod
    def sizes(scores: Tensor) -> Tensor:
        """max|S(t1)| + max|S(t2)| of each window."""
        ends = torch.cat([torch.zeros(1, dtype=torch.float64), scores.cumsum(0).abs().amax(-1)])
        return ends[1:] + ends[:-1]


class GenericSetting(Setting):
    """Scored by `sweep.sweep`."""

    backend = "generic"

    def prepare(self, ev: Evaluator, columns: list[plan.Column], at: QueryGradients) -> Callable[[], Tensor]:
        linearizer = self.linearizer(ev, len(columns))
        return lambda: sweep(ev, columns, linearizer, Replay(ev, False, 0), at, self.work.samples, lambda: None)

    def linearizer(self, ev: Evaluator, num_columns: int) -> Linearizer:
        return choose_linearizer(ev, "exact", "generic", num_columns, 2**30)[0]


class ConvSetting(GenericSetting):
    backend = "layerwise"
    side = 28

    def build(self) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
        first, second, outputs = self.work.widths
        net = nn.Sequential(
            *(nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(second * (self.side // 4) ** 2, outputs)),
        )
        return net, cross_entropy

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 1, self.side, self.side), torch.randint(self.work.widths[-1], (n,))

    def linearizer(self, ev: Evaluator, num_columns: int) -> Linearizer:
        return layerwise.linearizer(ev, layerwise.prepare(ev, "exact"), "exact", num_columns, with_gradient=False)

    def products(self) -> tuple[float, float]:
        first, second, outputs = self.work.widths
        pixels = self.side**2
        shares = [pixels * 9 * first, pixels // 4 * 9 * first * second, pixels // 16 * second * outputs]
        return sum(shares), shares[0]

    def column_bytes(self) -> dict[str, int]:
        """By torch's record of allocations: a step with four columns, a quarter of it."""
        ev = Evaluator.create(self.problem, self.trajectory, None, None)
        with ev.session():
            linearizer, params, batch = self.linearizer(ev, 4), ev.params(0), ev.batches(0)[0]
            block = {n: torch.randn(4, *value.shape) for n, value in params.items()}
            ours = tensor_peak(lambda: linearizer(params, batch)[1](block))
            theirs = tensor_peak(lambda: self.vmapped(0, block))
        return {"bytes_per_column": ours // 4, "bytes_per_column_torch_func": theirs // 4}


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class TransformerSetting(GenericSetting):
    """widths: vocabulary, width, classes."""

    num_queried, tokens = 16, 64

    def build(self) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
        vocabulary, width, _ = self.work.widths
        net = nn.Sequential(nn.Embedding(vocabulary, width), Block(width), Block(width), nn.Linear(width, vocabulary))
        return net, lambda z, y: F.cross_entropy(z.transpose(1, 2), y, reduction="none").mean(1)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        text = torch.randint(self.work.widths[0], (n, self.tokens + 1))
        return text[:, :-1], text[:, 1:]

    def products(self) -> tuple[float, float]:
        vocabulary, width, _ = self.work.widths
        return self.tokens * (2 * (12 * width**2 + 2 * self.tokens * width) + width * vocabulary), 0.0


def tensor_peak(run: Callable[[], Any]) -> int:
    """The most that tensors made in run() took at one time, by torch's record, beside what nothing touches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) != layerwise.ALLOCATION:
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@dataclass(frozen=True)
class Case:
    """A workload, and what it must reach: times faster than a rival, or the share of a quantity at least or at most."""

    setting: type[Setting]
    work: Workload
    small: Workload
    at_least: dict[str, float]
    at_most: dict[str, float] = field(default_factory=dict)


MLP = {"batch": 8, "steps": 3, "samples": 16, "reference_steps": 3}
TINY, CONV = {**MLP, "windows": 1}, {"batch": 4, "steps": 3, "samples": 8, "reference_steps": 3}
CASES = {
    "W1 62-8-1, 21 windows": Case(
        Setting, Workload((62, 8, 1), 64, 84, 256, 21), Workload((32, 8, 1), **MLP, windows=3),
        {"torch_func": 60, "reference": 8000}, {"of_training": 0.15},
    ),
    "W1 62-8-1, 1 window": Case(
        Setting, Workload((62, 8, 1), 64, 84, 256, 1), Workload((32, 8, 1), **TINY), {"torch_func": 200, "reference": 3000}
    ),
    "W2 784-1, 21 windows": Case(
        Setting, Workload((784, 1), 64, 84, 256, 21), Workload((32, 1), **MLP, windows=3), {"torch_func": 45, "reference": 4000}
    ),
    "W2 784-8-1, 21 windows": Case(
        Setting, Workload((784, 8, 1), 64, 84, 256, 21), Workload((32, 8, 1), **MLP, windows=3),
        {"torch_func": 15, "reference": 1000},
    ),
    "W3 784-1024-1024-10, 1 window": Case(
        Setting, Workload((784, 1024, 1024, 10), 128, 8, 1024, 1, 1), Workload((32, 32, 32, 10), **TINY),
        {"torch_func": 1.4, "gemm_share": 0.75, "reference": 20},
    ),
    "W3 784-1024-1024-10, 8 windows": Case(
        Setting, Workload((784, 1024, 1024, 10), 128, 8, 1024, 8, 1), Workload((32, 32, 32, 10), **MLP, windows=3),
        {"torch_func": 1.05, "gemm_share": 0.75, "reference": 24},
    ),
    "W4 convolutions, 1 window": Case(
        ConvSetting, Workload((32, 64, 10), 64, 4, 128, 1, 1), Workload((3, 4, 3), **CONV, windows=1),
        {"torch_func": 1.4, "reference": 3.5},
    ),
    "W4 convolutions, 4 windows": Case(
        ConvSetting, Workload((32, 64, 10), 64, 4, 128, 4, 1), Workload((3, 4, 3), **CONV, windows=3),
        {"torch_func": 1.25, "reference": 4.3},
    ),
    "W5 transformer, 1 window": Case(
        TransformerSetting, Workload((64, 128, 64), 16, 4, 32, 1, 1), Workload((5, 8, 5), **CONV, windows=1),
        {"torch_func": 1.1, "reference": 1.5},
    ),
}  # fmt: skip
