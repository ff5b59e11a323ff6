"""A hundred random nets and schedules of awkward shapes: every backend that fits gives the slow literal estimator's numbers.

Batches of one sample, a ragged last batch, an id twice in a batch, runs of one step, layers one wide, any number of columns.
"""

import random

import pytest
import torch
from cases import Case, cross_entropy, train
from mlp_cases import ACTIVATIONS, LOSSES, make_case
from torch import nn

import dit_fast
from dit_fast import native, queries

FLAVOURS = [nn.ReLU, nn.Tanh, nn.SiLU, nn.GELU, nn.ELU]


def feed_forward(draw: random.Random, seed: int) -> Case:
    widths = [draw.choice((1, 2, 3, 5, 8, 9)) for _ in range(draw.choice((2, 3, 4, 5)))]
    loss = draw.choice([name for name in LOSSES if widths[-1] > 1 or name != "cross_entropy"])
    return make_case(widths, draw.choice(list(ACTIVATIONS)), loss, draw.random() < 0.8, 7, seed, draw.random() < 0.2)


def convolutional(draw: random.Random, seed: int) -> Case:
    shape = (draw.choice((1, 2)), draw.choice((3, 4, 5)), draw.choice((1, 2, 5)))
    layers, channels = [], shape[0]
    for _ in range(draw.choice((1, 2))):
        out, kernel = draw.choice((1, 2, 9)), draw.choice((1, 3))
        layers.append((channels, out, kernel, kernel // 2, draw.choice(FLAVOURS), draw.random() < 0.4))
        channels = out

    def model() -> nn.Module:
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for inputs, outputs, kernel, padding, flavour, pooled in layers:
            modules += [nn.Conv2d(inputs, outputs, kernel, padding=padding), flavour()]
            modules += [nn.MaxPool2d((2, 1), 1)] if pooled else []
        body = nn.Sequential(*modules, nn.Flatten())
        return nn.Sequential(body, nn.Linear(body(torch.zeros(1, *shape)).shape[1], 3)).double()

    torch.manual_seed(seed + 1)
    x, y = torch.randn(12, *shape).double(), torch.randint(3, (12,))
    return Case(model, cross_entropy, x[:7], y[:7], x[7:], y[7:])


def schedule(draw: random.Random) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    size, steps = draw.choice((1, 1, 2, 3, 5)), draw.choice((1, 2, 3))
    sizes = [size] * (steps - 1) + [draw.randint(1, size)]
    # with replacement: ids meet themselves in a batch
    batches = [torch.tensor([draw.randrange(7) for _ in range(n)]) for n in sizes]
    coefficients = [torch.tensor([draw.uniform(0.1, 1) for _ in ids], dtype=torch.float64) for ids in batches]
    return batches, coefficients, [draw.uniform(0.05, 0.3) for _ in sizes]


@pytest.mark.parametrize("seed", range(100))
def test_every_backend_meets_the_reference(seed, monkeypatch):
    draw = random.Random(seed)
    is_mlp = seed % 5 < 3
    case = feed_forward(draw, seed) if is_mlp else convolutional(draw, seed)
    run = train(case, *schedule(draw), weight_decay=draw.choice((0, 0.03)), l2=draw.choice((0, 0.05)))
    T, Q = len(run.batches), draw.choice((1, 2, 3))
    middle = draw.randrange(T)
    windows = [(0, T), *([(0, middle), (middle, T)] if middle else [])]
    query = queries.losses(case.x_val[:Q], case.y_val[:Q])
    options = {"hessian": draw.choice(("exact", "exact", "ggn", "none"))}
    truth = dit_fast.reference.score(run.trajectory(), run.problem(), query, windows, **options).scores
    size = truth.abs().amax()
    for backend in ["auto", "layerwise", "generic", *(["native", "by inner products"] if is_mlp else [])]:
        if backend == "by inner products":
            monkeypatch.setattr(native, "GRAM_SHARE", float("inf"))
            backend = "native"
        result = dit_fast.score(run.trajectory(), run.problem(), query, windows, backend=backend, **options)
        assert (result.scores - truth).abs().amax() <= 1e-10 * size, (backend, result.meta)
    assert result.meta["backend"] == ("native" if is_mlp else "generic")
