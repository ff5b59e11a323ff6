"""Logged factors: rebuilt per-sample gradients against torch.func, and every refusal."""

import contextlib
import json
import math
import os
import signal
from fnmatch import fnmatch

import pytest
import torch
from torch import nn
from torch.nn import functional

import dit_fast as dit
from dit_fast.factored import Lookup, Outer, Plain

N = 24
F64 = torch.float64


class Net(nn.Module):
    """Embedding, attention out of linear layers, LayerNorm, a head on the mean: sequences everywhere."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6, padding_idx=3)
        self.positions = nn.Embedding(5, 6)
        self.norm = nn.LayerNorm(6)
        self.query, self.key, self.value = nn.Linear(6, 4, bias=False), nn.Linear(6, 4), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions(torch.arange(5).expand(len(tokens), 5))
        h = self.norm(x)
        weights = torch.softmax(self.query(h) @ self.key(h).transpose(1, 2) / 2, -1)
        return self.head(torch.tanh(self.norm(x + weights @ self.value(h))).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def cnn():
    """A first layer that is least as products, one as images, one unfolded, group norm, groups, a convolution's bias alone."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=(1, 2), bias=False),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Conv2d(4, 10, (3, 2), stride=2, dilation=(2, 1), padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(10, 12, 3, padding="same"),
        nn.Conv2d(12, 6, 3, stride=2, groups=2),
        nn.PReLU(6),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def made(name):
    """(model, x, y) in float64."""
    torch.manual_seed(3)
    model = {"mlp": mlp, "cnn": cnn, "net": Net}[name]().double()
    x = {"mlp": torch.randn(N, 5), "cnn": torch.randn(N, 1, 9, 8), "net": torch.randint(7, (N, 5))}[name]
    x = x.double() if x.is_floating_point() else x
    model(x[:1])
    return model, x, torch.randint(3, (N,))


def each_loss(z, y):
    return functional.cross_entropy(z, y, reduction="none")


def batches(steps, size=5):
    return torch.randint(N, (steps, size), generator=torch.Generator().manual_seed(9))


def record(
    path, model, x, y, steps=4, factors=True, micro=1, loss=each_loss, l2=0.0, momentum=0.0, with_batch=False, **options
):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    with dit.Recorder(path, model, optimizer, factors=factors, **options) as recorder:
        train(recorder, model, optimizer, x, y, batches(steps), micro, loss, l2, with_batch)
    return dit.Trajectory.open(path)


def train(recorder, model, optimizer, x, y, ids_of_steps, micro=1, loss=each_loss, l2=0.0, with_batch=False):
    for step in ids_of_steps:
        optimizer.zero_grad()
        for ids in step.tensor_split(micro):
            penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad) * l2 / 2
            ((loss(model(x[ids]), y[ids]) + penalty).mean() / micro).backward()
            recorder.batch(ids, scale=1 / micro, batch=(x[ids], y[ids]) if with_batch else None)
        optimizer.step()


def rows_of(factors, shapes):
    """The rows [B, R, *shape] of every parameter, by literal sums over positions."""
    found = {}
    for part in factors.parts:
        if isinstance(part, Plain):
            found[part.name] = part.rows
            continue
        size, num_rows, positions, _ = part.deltas.shape
        weight = torch.zeros(size, num_rows, *shapes[part.weight], dtype=part.deltas.dtype).flatten(3)
        for b in range(size):
            for r in range(num_rows):
                for s in range(positions):
                    if isinstance(part, Outer):
                        weight[b, r] += torch.outer(part.deltas[b, r, s], part.inputs[b, s])
                    else:
                        assert isinstance(part, Lookup) and part.indices.dtype == torch.int64
                        weight[b, r, part.indices[b, s]] += part.deltas[b, r, s]
        found[part.weight] = weight.reshape(size, num_rows, *shapes[part.weight])
        if isinstance(part, Outer) and part.bias is not None:
            found[part.bias] = part.deltas.sum(2)
    return found


def per_sample(model, params, x, y, loss=each_loss):
    def one(values, a, b):
        return loss(torch.func.functional_call(model, values, (a[None],)), b[None])[0]

    return torch.func.vmap(torch.func.grad(one), (None, 0, 0))(params, x, y)


def assert_close(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference, size = (found[name] - value).abs().max(), value.abs().max()
        assert found[name].shape == value.shape and difference <= tolerance * max(size, 1e-3), (name, difference, size)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "cnn", "net"])
def test_rebuilt_gradients_are_those_of_single_samples(tmp_path, name, micro):
    model, x, y = made(name)
    run = record(tmp_path / "log", model, x, y, micro=micro, chunk_bytes=1 << 12)
    run.verify()
    shapes = {n: s for n, (s, _) in run.parameters.items()}
    assert run.factor_layout.shapes == shapes and run.factor_layout.curvature == "fisher"
    for t in range(run.num_steps):
        micros = run.factors(t)
        assert torch.equal(torch.cat([f.ids for f in micros]), run.batch_ids(t)) and len(micros) == micro
        assert torch.equal(torch.cat([f.coefficients for f in micros]), run.coefficients(t))
        for factors in micros:
            assert factors.step == t and (factors.slopes == 1).all() and (factors.curvature == 1).all()
            found = {n: rows[:, 0] for n, rows in rows_of(factors, shapes).items()}
            assert_close(found, per_sample(model, run.params(t), x[factors.ids], y[factors.ids]))


def test_the_smallest_form_is_kept(tmp_path):
    model, x, y = made("cnn")
    record(tmp_path / "log", model, x, y, steps=1)
    parts = json.loads((tmp_path / "log" / "manifest.json").read_text())["factors"]["parts"]
    kinds = {part["weight"]: part["kind"] for part in parts}
    assert kinds["0.weight"] == "rows" and kinds["9.weight"] == "outer"
    assert "convolution" in (kinds["3.weight"], kinds["5.weight"])
