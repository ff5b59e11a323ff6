"""Logged factors: rebuilt per-sample gradients against torch.func, and every refusal."""

import json
import os
import signal
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

import dit_fast as dit
from dit_fast.factored import Lookup, Outer, Plain
from dit_fast.log import canonical_digest

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


def binary_loss(z, y):
    return functional.binary_cross_entropy_with_logits(z.squeeze(-1), (y > 0).to(z.dtype), reduction="none")


@pytest.mark.parametrize("name", ["cnn", "net"])
def test_ggn_rows_are_jacobians_with_slopes_and_curvature(tmp_path, name):
    model, x, y = made(name)
    loss = lambda z, y: each_loss(z, y) * (1 + y)  # noqa: E731
    options = dit.FactorOptions(curvature="ggn", per_sample_loss=loss, l2=0.1)
    run = record(tmp_path / "log", model, x, y, steps=2, micro=2, factors=options, loss=loss, l2=0.1, with_batch=True)
    shapes = {n: s for n, (s, _) in run.parameters.items()}
    assert run.factor_layout.curvature == "ggn" and run.factor_layout.l2 == 0.1
    for factors in run.factors(1):
        params = run.params(1)

        def outputs(values, ids=factors.ids):
            return torch.func.functional_call(model, values, (x[ids],))

        assert_close(rows_of(factors, shapes), torch.func.jacrev(outputs)(params))
        z = outputs(params)
        for b, i in enumerate(factors.ids):
            one = lambda v, i=i: loss(v[None], y[i : i + 1])[0]  # noqa: E731
            torch.testing.assert_close(factors.slopes[b], torch.func.grad(one)(z[b]), rtol=0, atol=1e-12)
            torch.testing.assert_close(factors.curvature[b], torch.func.hessian(one)(z[b]), rtol=0, atol=1e-12)


def test_ggn_of_scalar_outputs_does_not_divide_by_a_slope_of_zero(tmp_path):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double(), torch.randn(N, 4, dtype=F64), None
    with torch.no_grad():
        y = model(x)[:, 0]
    loss = lambda z, y: (z[:, 0] - y) ** 2 / 2  # noqa: E731
    options = dit.FactorOptions(curvature="ggn", per_sample_loss=loss)
    run = record(tmp_path / "log", model, x, y, steps=1, factors=options, loss=loss, with_batch=True)
    (factors,) = run.factors(0)
    assert (factors.slopes == 0).all() and (factors.curvature == 1).all()
    shapes = {n: s for n, (s, _) in run.parameters.items()}
    ids = factors.ids
    jacobian = torch.func.jacrev(lambda v: torch.func.functional_call(model, v, (x[ids],)))(run.params(0))
    assert_close(rows_of(factors, shapes), jacobian)


@pytest.mark.parametrize("classes", [3, 1])
def test_sampled_ggn_is_gauss_newton_in_the_mean(tmp_path, classes):
    """Over many draws at one point; the second row against the gradient for one of the labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, classes)).double()
    x, y = torch.randn(1, 2, dtype=F64).expand(N, 2).contiguous(), torch.randint(classes, (N,))
    loss = each_loss if classes > 1 else binary_loss
    options = dit.FactorOptions(curvature="sampled ggn", per_sample_loss=loss)
    before = torch.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    with dit.Recorder(tmp_path / "log", model, optimizer, factors=options) as recorder:
        train(recorder, model, optimizer, x, y, torch.arange(N).repeat(30, 40), loss=loss, with_batch=True)
    assert torch.equal(torch.get_rng_state(), before)
    run = dit.Trajectory.open(tmp_path / "log")
    shapes = {n: s for n, (s, _) in run.parameters.items()}
    (factors,) = run.factors(0)
    assert (factors.slopes == torch.tensor([1.0, 0.0])).all()
    assert (factors.curvature == torch.tensor([[0.0, 0.0], [0.0, 1.0]])).all()
    draws, seen = [], []
    for t in range(run.num_steps):
        (factors,) = run.factors(t)
        (last,) = [p for p in factors.parts if getattr(p, "weight", None) == "2.weight"]
        draws.append(last.deltas[:, 1, 0])
        seen.append((last.deltas, last.inputs))
    z = model(x[:1])[0].detach()
    p = torch.softmax(z, 0) if classes > 1 else torch.sigmoid(z)
    fisher = torch.diag(p) - torch.outer(p, p) if classes > 1 else (p * (1 - p)).reshape(1, 1)
    stacked = torch.cat(draws)
    assert ((stacked.T @ stacked / len(stacked)) - fisher).abs().max() < 0.01, "28,800 draws"
    rows = rows_of(run.factors(0)[0], shapes)
    labels = range(classes if classes > 1 else 2)
    choices = [per_sample(model, params, x[:1], torch.tensor([c]), loss) for c in labels]
    for b in range(3):
        assert any(all((rows[n][b, 1] - g[n][0]).abs().max() < 1e-12 for n in params) for g in choices)


@pytest.mark.parametrize("project", [3, {"embed*": (4, None), "positions*": (None, 2), "norm*": 4, "*": (2, 3)}])
@pytest.mark.parametrize("name", ["cnn", "net"])
def test_projected_factors_are_projected_gradients(tmp_path, name, project):
    model, x, y = made(name)
    if name == "cnn" and isinstance(project, dict):
        project = {"*": (None, 5)}
    options = dit.FactorOptions(project=project, seed=4)
    run = record(tmp_path / "log", model, x, y, steps=2, factors=options)
    layout = run.factor_layout
    assert any(layout.shapes[n] != s for n, (s, _) in run.parameters.items())
    (factors,) = run.factors(1)
    dense = per_sample(model, run.params(1), x[factors.ids], y[factors.ids])
    expected = {n: layout.projections[n](g) if n in layout.projections else g for n, g in dense.items()}
    assert_close({n: rows[:, 0] for n, rows in rows_of(factors, layout.shapes).items()}, expected)
    for bias in [n for n in layout.projections if n.endswith("bias") and n.replace("bias", "weight") in layout.projections]:
        weight = bias.replace("bias", "weight")
        if "norm" not in bias and not bias.startswith(("1.", "6.")):
            assert torch.equal(layout.projections[bias].outputs, layout.projections[weight].outputs)


def test_projections_keep_inner_products_in_the_mean():
    from dit_fast.projections import make_projection

    gradient, total = torch.randn(2, 6, 8, dtype=F64), torch.zeros((), dtype=F64)
    for seed in range(2000):
        a, b = make_projection(seed, "w", (6, 8), (3, 4))(gradient)
        total += (a * b).sum() / 2000
    exact = (gradient[0] * gradient[1]).sum()
    assert abs(total - exact) < 0.1 * gradient[0].norm() * gradient[1].norm()


def test_bfloat16_halves_the_bytes_and_rounds_once(tmp_path):
    model, x, y = made("mlp")
    exact = record(tmp_path / "a", model, x, y, steps=1)
    rounded = record(tmp_path / "b", made("mlp")[0], x, y, steps=1, factors=dit.FactorOptions(dtype="bfloat16"))
    assert rounded.factor_layout.dtype == torch.bfloat16
    for mine, theirs in zip(rounded.factors(0)[0].parts, exact.factors(0)[0].parts, strict=True):
        assert mine.deltas.dtype == torch.bfloat16
        assert torch.equal(mine.deltas, theirs.deltas.bfloat16()) and torch.equal(mine.inputs, theirs.inputs.bfloat16())


def test_layers_choose_by_pattern(tmp_path):
    for number, (layers, expected) in enumerate(
        [("4", ["4.weight", "4.bias"]), (["!0", "!*bias"], ["2.weight", "4.weight"]), ("2.bias", ["2.bias"])]
    ):
        model, x, y = made("mlp")
        run = record(tmp_path / str(number), model, x, y, steps=1, factors=dit.FactorOptions(layers=layers))
        assert list(run.factor_layout.shapes) == expected
        (factors,) = run.factors(0)
        dense = per_sample(model, run.params(0), x[factors.ids], y[factors.ids])
        found = {n: rows[:, 0] for n, rows in rows_of(factors, run.factor_layout.shapes).items()}
        assert_close(found, {n: dense[n] for n in expected})
    with pytest.raises(ValueError, match=r"no trained parameter or module is called 'hed'"):
        record(tmp_path / "x", *made("mlp"), factors=dit.FactorOptions(layers="hed"))


def test_training_is_the_same_bit_for_bit(tmp_path):
    histories = []
    loss_options = {"per_sample_loss": each_loss}
    for number, factors in enumerate(
        [False, True, dit.FactorOptions(curvature="ggn", **loss_options),
         dit.FactorOptions(curvature="sampled ggn", project=2, **loss_options)]
    ):  # fmt: skip
        model, x, y = made("net")
        model.float()
        torch.manual_seed(0)
        with_batch = isinstance(factors, dit.FactorOptions)
        run = record(tmp_path / str(number), model, x, y, factors=factors, micro=2, momentum=0.9, with_batch=with_batch)
        histories.append((run.params(run.num_steps), torch.rand(3)))
    for params, drawn in histories[1:]:
        assert torch.equal(drawn, histories[0][1])
        assert all(torch.equal(value, histories[0][0][n]) for n, value in params.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("clip", [{"clip_norm": 0.05}, {"clip_value": 0.01}])
def test_clipped_gradients_pass_the_check(tmp_path, clip):
    model, x, y = made("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dit.Recorder(tmp_path / "log", model, optimizer, factors=True, **clip) as recorder:
        for ids in batches(2):
            optimizer.zero_grad()
            each_loss(model(x[ids]), y[ids]).mean().backward()
            if "clip_norm" in clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            else:
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
            with recorder.step(ids):
                optimizer.step()


class Across(nn.Module):
    """Its first layer sees [S, B, ·] with S = B."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.transpose(0, 1))).transpose(0, 1).mean(1))


class Twice(nn.Module):
    """A linear layer called twice, and a parameter that a caller's layer uses besides."""

    def __init__(self, leaks=False):
        super().__init__()
        self.layer, self.leaks = nn.Linear(4, 4), leaks

    def forward(self, x):
        z = self.layer(torch.tanh(self.layer(x)))
        return z @ self.layer.weight if self.leaks else z


def test_a_layer_called_twice_is_summed(tmp_path):
    torch.manual_seed(1)
    model, x, y = Twice().double(), torch.randn(N, 4, dtype=F64), torch.randint(4, (N,))
    run = record(tmp_path / "log", model, x, y, steps=1)
    (factors,) = run.factors(0)
    dense = per_sample(model, run.params(0), x[factors.ids], y[factors.ids])
    assert_close({n: rows[:, 0] for n, rows in rows_of(factors, dict(run.factor_layout.shapes)).items()}, dense)


def test_layers_used_otherwise_are_caught(tmp_path):
    torch.manual_seed(1)
    x, y = torch.randn(N, 5, 4), torch.randint(3, (N,))
    with pytest.raises(dit.UnsupportedError, match=r"more than the first row of Linear 'first'"):
        record(tmp_path / "a", Across(), x, y)
    with pytest.raises(dit.UnsupportedError, match=r"step 0: factors: Linear 'first' .* is the batch in dimension 0"):
        record(tmp_path / "b", Across(), torch.randn(N, 6, 4), y)
    with pytest.raises(dit.LogError, match=r"step 0: factors: the gradient of 'layer.weight' is not the sum"):
        record(tmp_path / "c", Twice(leaks=True), x[:, 0], y)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.b(self.a(x)) * self.scale


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return functional.linear(x, self.layer.weight, self.layer.bias)


def test_parameters_that_cannot_be_had_are_named(tmp_path):
    x, y = torch.randn(N, 4), torch.randint(4, (N,))
    with pytest.raises(dit.UnsupportedError, match=r"'a.weight' is tied"):
        record(tmp_path / "a", Tied(), x, y)
    with pytest.raises(dit.UnsupportedError, match=r"'scale' of Tied '' cannot be had"):
        record(tmp_path / "b", Tied(), x, y, factors=dit.FactorOptions(layers="!a.weight"))
    run = record(tmp_path / "c", Tied(), x, y, factors=dit.FactorOptions(layers=["!a.weight", "!scale"]))
    assert list(run.factor_layout.shapes) == ["a.bias", "b.bias"]
    with pytest.raises(
        dit.UnsupportedError, match=r"step 0: .*'layer.weight' has a gradient, but Linear 'layer' was not called"
    ):
        record(tmp_path / "d", Unused(), x, y)
    parametrized = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(dit.UnsupportedError, match=r"parametrized"):
        record(tmp_path / "e", parametrized, x, y)


class Positions(nn.Module):
    """Position embeddings as most write them, without the batch, and a head of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.pos, self.head = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens) + self.pos(torch.arange(tokens.shape[1]))).mean(1))


@pytest.mark.parametrize("length", [5, 4])  # of the sequences; the batch has 4
def test_an_embedding_without_the_batch_is_named_with_the_way_out(tmp_path, length):
    model, x, y = Positions(), torch.randint(7, (N, length)), torch.randint(3, (N,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run(path, factors):
        with dit.Recorder(path, model, optimizer, factors=factors, num_samples=N) as recorder:
            train(recorder, model, optimizer, x, y, batches(2, size=4))

    with pytest.raises(dit.UnsupportedError, match=r"Embedding 'pos'.*expand\(B, S\).*layers=\[\"!pos\"\]\)"):
        run(tmp_path / "log", True)
    run(tmp_path / "out", dit.FactorOptions(layers=["!pos"]))
    assert set(dit.Trajectory.open(tmp_path / "out").factor_layout.shapes) == {"embed.weight", "head.weight", "head.bias"}


def test_parameters_of_another_name_are_another_model(tmp_path):
    record(tmp_path / "log", *made("mlp"))
    manifest = json.loads((tmp_path / "log/manifest.json").read_text())
    del manifest["sha256"]
    for row in manifest["parameters"]:
        row["name"] = f"other.{row['name']}"
    manifest["sha256"] = canonical_digest(manifest)
    (tmp_path / "log/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(dit.LogError, match=r"factors are of parameter '\d.\w+', which is not in the log: are they of another"):
        dit.Trajectory.open(tmp_path / "log").index()


def test_a_forgotten_l2_and_wrong_coefficients_are_caught(tmp_path):
    model, x, y = made("mlp")
    with pytest.raises(dit.LogError, match=r"step 0: .*l2"):
        record(tmp_path / "a", model, x, y, l2=1e-3)
    record(tmp_path / "b", made("mlp")[0], x, y, l2=1e-3, factors=dit.FactorOptions(l2=1e-3))
    for number, curvature in enumerate(["fisher", "ggn"]):
        model, x, y = made("mlp" if number == 0 else "net")
        options = dit.FactorOptions(per_sample_loss=each_loss, curvature=curvature)
        with pytest.raises(dit.LogError, match=r"coefficients"):
            record(tmp_path / f"c{number}", model, x, y, with_batch=True, factors=options, reduction="sum")
    with pytest.raises(dit.UnsupportedError, match=r"sampled ggn"):
        options = dit.FactorOptions(curvature="sampled ggn", per_sample_loss=lambda z, y: 2 * each_loss(z, y))
        loss = options.per_sample_loss
        record(tmp_path / "d", made("net")[0], x, y, with_batch=True, factors=options, loss=loss)
    with pytest.raises(dit.UnsupportedError, match=r"inplace=False"):
        model, x, y = made("mlp")
        options = dit.FactorOptions(curvature="ggn", per_sample_loss=each_loss)
        record(tmp_path / "e", model, x, y, with_batch=True, factors=options)


def test_the_loop_must_match_the_names(tmp_path):
    model, x, y = made("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def recorder(name, **options):
        optimizer.zero_grad()
        return dit.Recorder(tmp_path / name, model, optimizer, factors=True, **options)

    def loss(ids):
        return each_loss(model(x[ids]), y[ids]).mean()

    ids = torch.arange(4)
    with pytest.raises(dit.LogError, match=r"step 0: factors: 2 backward"), recorder("a") as log:
        loss(ids).backward()
        loss(ids).backward()
        with log.step(ids):
            optimizer.step()
    with pytest.raises(dit.UnsupportedError, match=r"different orders"), recorder("b") as log:
        (loss(ids) + loss(ids)).backward()
        log.batch(ids)
        log.batch(ids)
        optimizer.step()
    with pytest.raises(ValueError, match=r"step 0: factors: a sample with coefficient 0"), recorder("c") as log:
        loss(ids).backward()
        with log.step(ids, coefficients=[0, 1, 1, 1]):
            optimizer.step()
    with pytest.raises(dit.UnsupportedError, match=r"changed in place"), recorder("d") as log:
        piece = x[ids].clone()
        each_loss(model(piece), y[ids]).mean().backward()
        piece.zero_()
        with log.step(ids):
            optimizer.step()
    with recorder("e") as log:  # a pass for its value alone, one thrown away, one under no_grad, then the step's own
        loss(ids)
        loss(torch.arange(9)).backward()
        optimizer.zero_grad()
        with torch.no_grad():
            loss(ids)
        loss(ids).backward()
        with log.step(ids):
            optimizer.step()
    with pytest.raises(ValueError, match=r'every="auto"'):
        recorder("f", every="auto", disk_budget="1GiB", total_steps=3)
    with pytest.raises(ValueError, match=r"need the batch"):
        options = dit.FactorOptions(curvature="ggn", per_sample_loss=each_loss)
        with dit.Recorder(tmp_path / "g", model, optimizer, factors=options) as log:
            log.batch(ids)
    with pytest.raises(dit.UnsupportedError, match=r"closure"), recorder("h") as log:
        optimizer.step(lambda: log.batch(ids))
    with pytest.raises(dit.LogError, match=r"holds no factors"):
        record(tmp_path / "i", *made("mlp"), factors=False).factors(0)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"curvature": "exact"},
        {"curvature": "ggn"},
        {"l2": -1.0},
        {"project": 0},
        {"project": {"*": (1, 2, 3)}},
    ],
)
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError, match=r"factors: "):
        dit.FactorOptions(**options)


def test_chunks_are_bounded_by_the_factors_bytes(tmp_path):
    model, x, y = made("mlp")
    run = record(tmp_path / "log", model, x, y, steps=12, chunk_bytes=4000, every=512)
    run.verify()
    chunks = json.loads((tmp_path / "log" / "manifest.json").read_text())["chunks"]
    assert len(chunks) > 2 and run.num_steps == 12 and all(row["bytes"] < 12000 for row in chunks)


def test_a_damaged_log_is_refused(tmp_path):
    from safetensors.torch import load_file

    from dit_fast.log import canonical_digest

    path = tmp_path / "log"
    record(path, *made("mlp"), factors=dit.FactorOptions(project=3))
    manifest = json.loads((path / "manifest.json").read_text())
    assert load_file(path / "chunk-000000.safetensors").keys() >= {"factor_0", "factor_0_shapes", "factor_5"}

    def changed(change):
        body = json.loads(json.dumps(manifest))
        del body["sha256"]
        change(body["factors"])
        (path / "manifest.json").write_text(json.dumps(body | {"sha256": canonical_digest(body)}))
        return dit.Trajectory.open(path)

    with pytest.raises(dit.LogError, match=r"projection of '0.weight' made from seed 5"):
        changed(lambda f: f.update(seed=5)).factors(0)
    with pytest.raises(dit.LogError, match=r"damaged: step 0: 6 tensors for 4"):
        changed(lambda f: f.update(parts=f["parts"][:2])).factors(0)
    with pytest.raises(dit.LogError, match=r"not a manifest"):
        changed(lambda f: f.pop("parts"))
    changed(lambda f: None).verify()


def continued(path, steps, resume, factors=True, upto=None):
    """The run of the other tests up to a step, from its beginning without a Recorder where it goes on."""
    model, x, y = made("net")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = batches(steps)
    start = 0
    if resume:
        start = resume
        for step in ids[:start]:
            optimizer.zero_grad()
            each_loss(model(x[step]), y[step]).mean().backward()
            optimizer.step()
    with dit.Recorder(path, model, optimizer, factors=factors, chunk_bytes=1, resume=bool(resume)) as recorder:
        for t, step in enumerate(ids[start:upto], start):
            train(recorder, model, optimizer, x, y, [step])
            recorder.mark(f"step {t}", query=dit.queries.logit(x[:2], 1))
    return dit.Trajectory.open(path)


def same(mine, theirs):
    assert mine.num_steps == theirs.num_steps
    for t in range(mine.num_steps):
        for a, b in zip(mine.factors(t), theirs.factors(t), strict=True):
            for p, q in zip(a.parts, b.parts, strict=True):
                assert all(torch.equal(v, w) for v, w in zip(vars(p).values(), vars(q).values(), strict=True)
                           if isinstance(v, torch.Tensor))  # fmt: skip
    assert mine.marked_queries.keys() == theirs.marked_queries.keys()
    for t, (labels, block) in mine.marked_queries.items():
        assert labels == theirs.marked_queries[t][0]
        assert all(torch.equal(value, theirs.marked_queries[t][1][n]) for n, value in block.items())


def test_resume_goes_on_with_factors_and_queries(tmp_path):
    whole = continued(tmp_path / "whole", 12, resume=0)
    continued(tmp_path / "log", 12, resume=0, upto=9)
    with pytest.raises(dit.LogError, match=r"its factors were logged with other dtype: "):
        continued(tmp_path / "log", 12, resume=6, factors=dit.FactorOptions(dtype="bfloat16"))
    with pytest.raises(dit.LogError, match=r"factors are logged in it"):
        continued(tmp_path / "log", 12, resume=6, factors=False)
    with pytest.raises(dit.LogError, match=r"its factors were logged with other seed: \d, not \d"):
        continued(tmp_path / "log", 12, resume=6, factors=dit.FactorOptions(seed=1))
    run = continued(tmp_path / "log", 12, resume=6)
    run.verify()
    same(run, whole)
    assert set(run.marked_queries) == set(range(1, 13))
    named = {row["file"] for row in json.loads((tmp_path / "log" / "manifest.json").read_text())["queries"]}
    assert {p.name for p in (tmp_path / "log").glob("query-*")} == named


def test_a_killed_run_leaves_its_finished_chunks(tmp_path):
    pid = os.fork()
    if pid == 0:
        try:
            continued(tmp_path / "log", 400, resume=0)
        finally:
            os._exit(1)
    while not (tmp_path / "log" / "chunk-000004.safetensors").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    run = dit.Trajectory.open(tmp_path / "log")
    run.verify()
    assert run.num_steps >= 4 and set(run.marked_queries) >= set(range(1, run.num_steps))
    for t in range(min(run.num_steps, 10)):
        assert torch.equal(run.factors(t)[0].ids, run.batch_ids(t))


@pytest.mark.parametrize("project", [None, 3])
def test_marks_keep_the_gradients_of_queries(tmp_path, project):
    model, x, y = made("net")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = dit.FactorOptions(per_sample_loss=each_loss, project=project, layers="!key")
    asked = [dit.queries.loss(x[:7], y[:7]), dit.queries.custom(lambda m: m.head.weight[:2].sum(1))]
    with dit.Recorder(tmp_path / "log", model, optimizer, factors=options) as recorder:
        train(recorder, model, optimizer, x, y, batches(2))
        flags, drawn = [m.training for m in model.modules()], torch.get_rng_state()
        recorder.mark("end", query=asked)
        assert flags == [m.training for m in model.modules()] and torch.equal(torch.get_rng_state(), drawn)
        with pytest.raises(ValueError, match=r"a query was stored at step 2 by mark 'end'"):
            recorder.mark("again", query=asked)
    run = dit.Trajectory.open(tmp_path / "log")
    run.verify()
    ((step, (labels, block)),) = run.marked_queries.items()
    assert step == 2 and labels == ["loss", "custom[0]", "custom[1]"]
    layout = run.factor_layout

    def values(params):
        z = torch.func.functional_call(model, params, (x[:7],))
        return torch.cat([each_loss(z, y[:7]).mean().reshape(1), params["head.weight"][:2].sum(1)])

    dense = torch.func.jacrev(values)(run.params(2))
    expected = {n: layout.projections[n](dense[n]) if n in layout.projections else dense[n] for n in layout.shapes}
    assert_close(block, expected)
    file = next((tmp_path / "log").glob("query-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(dit.LogError, match=r"query-000000.safetensors \(query at mark 'end', step 2\) is damaged"):
        run.verify()
    dit.Recorder(tmp_path / "log", *opt(model), overwrite=True).close()
    assert not file.exists()


def opt(model):
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_marks_without_what_they_need(tmp_path):
    model, x, y = made("mlp")
    with dit.Recorder(tmp_path / "a", *opt(model)) as recorder:
        train(recorder, model, recorder._optimizer, x, y, batches(1))
        with pytest.raises(ValueError, match=r"a query is stored in a log with factors"):
            recorder.mark("m", query=dit.queries.logit(x[:2], 1))
    with dit.Recorder(tmp_path / "b", *opt(model), factors=True) as recorder:
        train(recorder, model, recorder._optimizer, x, y, batches(1))
        with pytest.raises(ValueError, match=r"mark 'm': this query needs a loss"):
            recorder.mark("m", query=dit.queries.loss(x[:2], y[:2]))
        recorder.mark("m", query=dit.queries.logit(x[:2], 1))


def test_what_a_projected_log_could_never_be_scored_with_is_refused_at_once(tmp_path):
    model = mlp()
    options = dit.FactorOptions(project=3)
    with pytest.raises(dit.UnsupportedError, match="projected factors are for SGD"):
        dit.Recorder(tmp_path / "a", model, torch.optim.AdamW(model.parameters()), factors=options)
    with pytest.raises(dit.UnsupportedError, match="cannot say how gradients were clipped"):
        dit.Recorder(tmp_path / "b", model, torch.optim.SGD(model.parameters(), 0.1), factors=options, clip_norm=1.0)
