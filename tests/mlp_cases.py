"""Feed-forward nets that the compiled ops' tests share: trained runs, and random numbers for an op itself."""

import itertools

import torch
from cases import Case, schedule, train
from torch import nn
from torch.nn import functional as F

from dit_fast import mlp

ACTIVATIONS = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}
LOSSES = {
    "cross_entropy": lambda y, t: F.cross_entropy(y, t, reduction="none"),
    "bce_logits": lambda y, t: F.binary_cross_entropy_with_logits(y, t, reduction="none").sum(1),
    "squared_error": lambda y, t: (y - t).square().mean(1),
    "half_squared_error": lambda y, t: 0.5 * (y - t).square().sum(1),
}


def draw_targets(loss, size, outputs):
    if loss == "cross_entropy":
        return torch.randint(outputs, (size,))
    return torch.rand(size, outputs).double() if loss == "bce_logits" else torch.randn(size, outputs).double()


def make_case(widths, activation="tanh", loss="cross_entropy", bias=True, num_samples=12, seed=0, last=False):
    """A net of these widths in float64; with `last`, the activation stands behind the last layer too."""

    def build():
        torch.manual_seed(seed)
        modules = []
        for inputs, outputs in itertools.pairwise(widths):
            modules += [nn.Linear(inputs, outputs, bias=bias), ACTIVATIONS[activation]()]
        return nn.Sequential(*(modules if last else modules[:-1])).double()

    torch.manual_seed(seed + 1)
    x, x_val = torch.randn(num_samples, widths[0]).double(), torch.randn(5, widths[0]).double()
    y, y_val = (draw_targets(loss, n, widths[-1]) for n in (num_samples, 5))
    return Case(build, LOSSES[loss], x, y, x_val, y_val)


def make_run(*arguments, steps=7, options=None, **keywords):
    case = make_case(*arguments, **keywords)
    plan = [part[:steps] for part in schedule(len(case.x), max(steps, 2))]
    return train(case, *plan, **(options or {}))


def op_case(widths, activation, loss, settings, K=3, n=4, seed=0, dtype=torch.float64, bias=True, sizes=None):
    """(net, steps, blocks, momenta, scores) of random numbers; settings(n, 2L) → [n, 2L, 6]."""
    g = torch.Generator().manual_seed(seed)
    layers, at = [], 1
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        at += 2
        biased = at + inputs * outputs if bias else None
        layers.append(mlp.MlpLayer(outputs, inputs, at, biased, "identity" if last else activation, 0.3))
        at += inputs * outputs + (outputs if bias else 0)
    net = mlp.Mlp(tuple(layers), loss, 0.7)
    M, N, C = 9, 6, widths[-1]
    sizes = sizes or [1 + (3 * t) % 5 for t in range(n)]
    B = sum(sizes)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    targets = torch.randint(C, (M,), generator=g) if loss == "cross_entropy" else normal(M, C).sigmoid()
    steps = mlp.MlpSteps(
        theta=normal(n, at + 3), x=normal(M, widths[0]), targets=targets,
        rows=torch.randint(M, (B,), generator=g), ids=torch.randint(N, (B,), generator=g),
        coefficients=normal(B).double(), offsets=torch.tensor([0, *sizes]).cumsum(0),
        settings=settings(n, 2 * len(layers)),
    )  # fmt: skip
    shapes = [s for la in layers for s in ((la.outputs, la.inputs), (la.outputs,) if bias else None)]
    blocks, momenta = (
        [None if s is None else mlp.mlp_block(K, s, dtype, i == 0).copy_(normal(K, *s)) for i, s in enumerate(shapes)]
        for _ in range(2)
    )
    return net, steps, blocks, momenta, normal(K, N).double()


def copies(tensors):
    return [None if value is None else value.clone() for value in tensors]


def setting(**values):
    row = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": 0.0, "first": 0.0} | values

    def make(n, parameters):
        table = torch.tensor([row[name] for name in mlp.SETTINGS], dtype=torch.float64).expand(n, parameters, 6).clone()
        table[..., 0] *= 1 + 0.1 * torch.arange(n)[:, None] + 0.05 * torch.arange(parameters)
        table[0, :, -1] = 1
        return table

    return make


SETTINGS = {
    "plain": setting(),
    "decay": setting(weight_decay=0.05),
    "momentum": setting(momentum=0.9),
    "dampened": setting(momentum=0.9, dampening=0.3, weight_decay=0.05),
    "nesterov": setting(momentum=0.8, nesterov=1.0, weight_decay=0.05),
}
