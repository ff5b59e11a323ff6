"""Nets, data and plain-torch training runs that tests share: what dit_fast is compared on, made without it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dit_fast


class TinyTransformer(nn.Module):
    """Two positions wide attention, LayerNorm, and an output layer tied to the embedding."""

    def __init__(self, vocabulary: int = 7, width: int = 4, positions: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(positions, width) * 0.3)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x))


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, reduction="none")


def token_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).mean(1)


@dataclass
class Case:
    """A net with training and validation data; every tensor float64."""

    model: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Tensor]
    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor


def make_case(name: str, num_samples: int = 12) -> Case:
    generator = torch.Generator().manual_seed(7)
    n = num_samples + 6

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def classes(k: int, *shape: int) -> Tensor:
        return torch.randint(k, shape, generator=generator)

    if name == "mlp":
        x, y = normal(n, 5), classes(3, n)
        build = lambda: nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))  # noqa: E731
        loss = cross_entropy
    elif name == "cnn":
        x, y = normal(n, 2, 6, 6), classes(3, n)
        build = lambda: nn.Sequential(  # noqa: E731
            nn.Conv2d(2, 3, 3, padding=1), nn.GELU(), nn.AvgPool2d(2),
            nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip
        loss = cross_entropy
    elif name == "transformer":
        x, y = classes(7, n, 5), classes(7, n, 5)
        build, loss = TinyTransformer, token_cross_entropy
    else:
        raise KeyError(name)

    def model() -> nn.Module:
        torch.manual_seed(3)
        return build().double()

    return Case(model, loss, x[:num_samples], y[:num_samples], x[num_samples:], y[num_samples:])


@dataclass
class Run:
    """A trained run: what was done in each step, and every θ[t]. The schedule's lists have one entry per step."""

    case: Case
    batches: list[Tensor]
    coefficients: list[Tensor]
    lr: list[float]
    params: dict[str, Tensor]
    weight_decay: float = 0.0
    l2: float = 0.0
    micro_batches: list[list[int]] | None = None

    def trajectory(self, **changes: Any) -> dit_fast.Trajectory:
        arguments = {
            "params": self.params,
            "batch_ids": self.batches,
            "lr": self.lr,
            "coefficients": self.coefficients,
            "optimizer": dit_fast.SGD(weight_decay=self.weight_decay),
            "num_samples": len(self.case.x),
            "micro_batches": self.micro_batches,
        }
        return dit_fast.Trajectory.from_arrays(**(arguments | changes))

    def problem(self, **changes: Any) -> dit_fast.Problem:
        model = changes.pop("model", None) or self.case.model()
        return dit_fast.Problem(model, self.case.loss, (self.case.x, self.case.y), **({"l2": self.l2} | changes))


def schedule(num_samples: int, steps: int = 7, seed: int = 1) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Ragged batches with repeated ids, coefficients that are not all the mean's, a rate that moves; one sample never seen."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(4, 3, 5, 1, 4, 2, 6)[t % 7] for t in range(steps)]
    batches = [torch.randint(num_samples - 1, (size,), generator=generator) for size in sizes]
    batches[0][-1] = batches[0][0]
    coefficients = [torch.full((size,), 1 / size, dtype=torch.float64) for size in sizes]
    coefficients[1] = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)
    return batches, coefficients, [0.3 - 0.02 * (t % 5) for t in range(steps)]


def train(
    case: Case,
    batches: list[Tensor],
    coefficients: list[Tensor],
    lr: list[float],
    *,
    weight_decay: float = 0.0,
    l2: float = 0.0,
    micro_batches: list[list[int]] | None = None,
    sample_weights: Tensor | None = None,
) -> Run:
    """The run by torch.optim.SGD and backward() in an ordinary loop."""
    model = case.model()
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=weight_decay)
    history: dict[str, list[Tensor]] = {name: [p.detach().clone()] for name, p in named.items()}
    for ids, a, rate in zip(batches, coefficients, lr, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        losses = case.loss(model(case.x[ids]), case.y[ids]) + 0.5 * l2 * sum(p.square().sum() for p in named.values())
        weights = a if sample_weights is None else a * sample_weights[ids]
        (weights * losses).sum().backward()
        optimizer.step()
        for name, p in named.items():
            history[name].append(p.detach().clone())
    params = {name: torch.stack(rows) for name, rows in history.items()}
    return Run(case, batches, coefficients, lr, params, weight_decay, l2, micro_batches)


def standard_run(name: str, **options: Any) -> Run:
    case = make_case(name)
    return train(case, *schedule(len(case.x)), **options)


def relative_error(result: Tensor, truth: Tensor, ends: Tensor | None = None) -> float:
    """max |Δ| over samples over max|S(t1)| + max|S(t2)|, which is `ends`, or the truth's own size where absent."""
    result, truth = torch.as_tensor(result).double(), torch.as_tensor(truth).double()
    size = truth.abs().amax(-1) if ends is None else ends
    return float(((result - truth).abs().amax(-1) / size).max())
