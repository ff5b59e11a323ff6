"""Dual numbers layer by layer against the generic path and the slow literal estimator; what is refused, with its reason."""

import random
import re
from functools import partial

import pytest
import torch
from cases import Case, cross_entropy, make_case, relative_error, schedule, train
from torch import nn
from torch.nn import functional as F

import dit_fast
from dit_fast import dual_rows, layerwise, pooling, queries
from dit_fast.linearize import linearize
from dit_fast.problem import Evaluator

C = nn.Conv2d
SHAPE = (2, 7, 6)


class Residual(nn.Module):
    """Two blocks with shortcuts, one of them through a convolution, and a mean over positions."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = C(2, 4, 3, padding=1), C(4, 4, 3, padding=1), C(4, 4, 3, padding=1)
        self.norm, self.down, self.short = nn.GroupNorm(2, 4), C(4, 6, 3, 2, 1), C(4, 6, 1, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.b(torch.tanh(self.norm(self.a(x))))
        x = torch.add(self.down(x), self.short(x))
        x += x.sigmoid()
        return self.head(F.gelu(x).mean((2, 3)))


class LeNet(nn.Module):
    """Functional pooling, a view with a size, dropout that is off."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.dropout = C(2, 3, 3, padding=1), nn.Linear(18, 3), nn.Dropout(0.0)

    def forward(self, x):
        x = F.max_pool2d(F.silu(self.conv(x)), 3, stride=2)
        x = F.avg_pool2d(x, 1)
        return self.fc(self.dropout(x.view(x.size(0), -1)))


class Sequence(nn.Module):
    """One dimension, positions last and then first, layers on [B, S, I]."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.mix = nn.Conv1d(2, 6, 3, padding=1, groups=2), nn.MaxPool1d(2, 1), nn.Linear(41, 5)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(30, 3)

    def forward(self, x):
        h = self.pool(F.elu(self.conv(x.flatten(2))))
        return self.head(self.norm(self.mix(h)).tanh().reshape(x.shape[0], -1))


class Tied(nn.Module):
    """The same convolution twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = C(2, 2, 3, padding=1), nn.Linear(84, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(torch.tanh(self.conv(x)))).flatten(1))


def seq(*modules):
    """These modules, and a linear layer to three outputs behind them."""

    def build():
        made = [make() for make in modules]
        body = nn.Sequential(*made, nn.Flatten())
        body.eval()
        return nn.Sequential(*made, nn.Flatten(), nn.Linear(body(torch.zeros(1, *SHAPE)).shape[1], 3))

    return build


def conv(*arguments, **keywords):
    return lambda: C(*arguments, **keywords)


def batch_norm():
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.eval()


# fmt: off
NETS = {
    "convolution alone": seq(conv(2, 4, 3)),
    "stride padding dilation": seq(conv(2, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)), nn.Tanh, conv(4, 3, 2)),
    "padding same": seq(conv(2, 4, 3, padding="same"), nn.Tanh, conv(4, 3, (3, 1), padding="valid")),
    "groups": seq(conv(2, 4, 3, groups=2), nn.Sigmoid, conv(4, 8, 3, 1, 1, groups=4, bias=False), conv(8, 6, 1, groups=2)),
    "no bias": seq(conv(2, 4, 3, bias=False), nn.Tanh, conv(4, 4, 3, bias=False)),
    "relu and pool": seq(conv(2, 4, 3, padding=1), nn.ReLU, lambda: nn.MaxPool2d(2), conv(4, 4, 2), nn.ReLU),
    "in place": seq(conv(2, 4, 3), lambda: nn.ReLU(inplace=True), conv(4, 4, 2), lambda: nn.ELU(inplace=True)),
    "leaky": seq(conv(2, 4, 3), lambda: nn.LeakyReLU(0.2), lambda: nn.MaxPool2d(2, 1), conv(4, 3, 2)),
    "leaky that falls": seq(conv(2, 4, 3), lambda: nn.LeakyReLU(-0.3), lambda: nn.MaxPool2d(2), conv(4, 3, 1)),
    "elu": seq(conv(2, 4, 3), lambda: nn.ELU(0.7), conv(4, 3, 2)),
    "gelu and pool": seq(conv(2, 4, 3), nn.GELU, lambda: nn.MaxPool2d(2), conv(4, 3, 2)),
    "gelu by tanh": seq(conv(2, 4, 3), lambda: nn.GELU(approximate="tanh"), conv(4, 3, 2)),
    "silu, overlap": seq(conv(2, 4, 3, padding=1), nn.SiLU, lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), conv(4, 3, 2)),
    "pool dilated": seq(conv(2, 4, 3, padding=1), lambda: nn.MaxPool2d(2, 2, dilation=2), nn.Tanh),
    "average": seq(conv(2, 4, 3), nn.Tanh, lambda: nn.AvgPool2d(2, 1, 1), conv(4, 3, 2), lambda: nn.AdaptiveAvgPool2d(2)),
    "pool first": seq(lambda: nn.AvgPool2d(2), lambda: nn.MaxPool2d(2, 1), conv(2, 4, 2), nn.Tanh),
    "group norm": seq(conv(2, 4, 3), lambda: nn.GroupNorm(2, 4), nn.Tanh, conv(4, 3, 2)),
    "bare norms": seq(lambda: nn.GroupNorm(1, 2, affine=False), conv(2, 4, 3), lambda: nn.LayerNorm(4, 1e-3, False)),
    "layer norm": seq(conv(2, 4, 3), lambda: nn.LayerNorm([5, 4]), nn.SiLU, lambda: nn.LayerNorm([4, 5, 4], bias=False)),
    "norm first": seq(lambda: nn.LayerNorm([7, 6]), conv(2, 4, 3), nn.Tanh),
    "batch norm": seq(conv(2, 4, 3), batch_norm, nn.Tanh, conv(4, 3, 2)),
    "mlp": seq(nn.Flatten, lambda: nn.Linear(84, 6), nn.Tanh, lambda: nn.Linear(6, 5), nn.ReLU),
    "residual": Residual,
    "functional": LeNet,
    "sequence": Sequence,
    "tied": Tied,
}
# fmt: on


def case_of(build, loss=cross_entropy, num_samples=12, seed=0, dtype=torch.float64, shape=SHAPE):
    def model():
        torch.manual_seed(seed)
        made = build().to(dtype)
        for module in made.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d):
                for p in module.parameters():
                    nn.init.normal_(p, 0.8, 0.3)
        return made

    torch.manual_seed(seed + 1)
    n = num_samples + 5
    x = torch.randn(n, *shape).to(dtype)
    y = torch.randint(3, (n,)) if loss is cross_entropy else torch.randn(n, 3).to(dtype)
    return Case(model, loss, x[:num_samples], y[:num_samples], x[num_samples:], y[num_samples:])


def evaluator(case, size=5, dtype=torch.float64, coefficients=None):
    params = {n: torch.stack([p.detach()] * 2) for n, p in case.model().named_parameters()}
    ids = torch.arange(size)
    trajectory = dit_fast.Trajectory.from_arrays(
        params=params, batch_ids=[ids], lr=0.1, num_samples=len(case.x), coefficients=coefficients
    )
    return Evaluator.create(dit_fast.Problem(case.model(), case.loss, (case.x, case.y)), trajectory, None, dtype)


def error_of(ours, theirs):
    pairs = [(ours[1][0], theirs[1][0]), *((ours[0][n], v) for n, v in theirs[0].items())]
    pairs += [(ours[1][1][n], v) for n, v in theirs[1][1].items()]
    scale = max(float(v.abs().max()) for v in theirs[1][1].values()) or 1.0
    return max(float((a - b).abs().max()) / max(float(b.abs().max()), scale) for a, b in pairs)


def both(ev, hessian="exact", num_columns=3, columns_hint=3, l2=0.0):
    """(g, pull(probe)) of this path and of the generic one."""
    ev.l2 = l2
    with ev.session():
        net = layerwise.prepare(ev, hessian)
        params, batch = ev.params(0), ev.batches(0)[0]
        probe = {n: torch.randn(num_columns, *v.shape, dtype=v.dtype) for n, v in params.items()}
        ours = layerwise.linearizer(ev, net, hessian, columns_hint)(params, batch)
        theirs = linearize(ev, params, batch, hessian, columns_per_pull=1)
        return (ours[0], ours[1](probe)), (theirs[0], theirs[1](probe))


@pytest.mark.parametrize("hessian", ["exact", "ggn", "none"])
@pytest.mark.parametrize("name", NETS)
def test_every_layer_and_curvature(name, hessian):
    assert error_of(*both(evaluator(case_of(NETS[name])), hessian)) < 1e-10


@pytest.mark.parametrize("num_columns", [1, 2, 5, 11])
@pytest.mark.parametrize("name", ["relu and pool", "residual", "groups"])
def test_columns_and_chunks_change_nothing(name, num_columns, monkeypatch):
    ev = evaluator(case_of(NETS[name]), size=7, coefficients=[[0.1, 0.7, 0.0, -0.2, 0.3, 0.4, 0.5]])
    whole, truth = both(ev, num_columns=num_columns)
    monkeypatch.setattr(layerwise, "COLUMNS_AT_ONCE", 2)
    monkeypatch.setattr(layerwise, "CHUNK_BYTES", 1 << 12)
    torch.manual_seed(0)
    cut, again = both(ev, num_columns=num_columns, l2=0.3)
    assert error_of(whole, truth) < 1e-10
    assert error_of(cut, again) < 1e-10


def test_the_comparison_would_see_a_dropped_hessian_and_dropped_coefficients():
    ev = evaluator(case_of(Residual), coefficients=[[0.1, 0.7, 0.5, 0.2, 0.3]])
    torch.manual_seed(0)
    exact, truth = both(ev)
    torch.manual_seed(0)
    ggn = both(ev, "ggn")[0]
    assert error_of(exact, truth) < 1e-10
    assert error_of(ggn, truth) > 1e-2
    plain = evaluator(case_of(Residual))
    torch.manual_seed(0)
    assert error_of(both(plain)[0], truth) > 1e-2


def squared(z, t):
    return (z - t).square().sum(1)


def absolute(z, t):
    return (z - t).abs().mean(1)


def temperature(z, t):
    return F.cross_entropy(z / 2, t.softmax(1), reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("loss", [squared, absolute, temperature])
def test_any_loss_of_single_samples(loss):
    for hessian in ("exact", "ggn", "none"):
        assert error_of(*both(evaluator(case_of(NETS["relu and pool"], loss)), hessian)) < 1e-10


def binary(z, t):
    return 0.3 * F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(1)


def weighted_classes(z, y):
    return F.cross_entropy(z, y, reduction="none", weight=torch.tensor([1.0, 1.0, 2.5], dtype=z.dtype))


def without_a_class(z, y):
    return F.cross_entropy(z, torch.where(y == 1, -100, y), reduction="none")


@pytest.mark.parametrize("hessian", ["exact", "ggn", "none"])
@pytest.mark.parametrize("loss", [cross_entropy, binary, squared, weighted_classes, without_a_class])
def test_known_losses_and_those_that_seem_to_be_known(loss, hessian, monkeypatch):
    case = case_of(NETS["mlp"], loss if loss in (binary, squared) else cross_entropy)
    case.loss = loss
    if loss is binary:
        case.y = case.y.sigmoid()
    ev = evaluator(case, size=9, coefficients=[[0.1, 0.7, 0.0, -0.2, 0.3, 0.4, 0.5, 0.6, 0.2]])
    found = []
    at = layerwise.KnownLoss.at
    if loss in (weighted_classes, without_a_class):
        monkeypatch.setattr(layerwise, "recognize_loss", lambda *_: ("cross_entropy", 1.0))
    monkeypatch.setattr(layerwise.KnownLoss, "at", lambda *operands: found.append(at(*operands)) or found[-1])
    assert error_of(*both(ev, hessian)) < 1e-10
    known = loss in (cross_entropy, binary, squared)
    assert len(found) == (0 if hessian == "none" else 2) and all((one is not None) == known for one in found)


@pytest.mark.parametrize("name", ["silu", "relu"])
def test_only_cotangents_that_nothing_else_holds_are_overwritten(name):
    f = getattr(F, name)

    class Shared(nn.Module):
        """Activations in front of sums, one of them behind a view, and one that two operations take."""

        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.head = C(2, 4, 3), C(4, 4, 1), C(4, 4, 1), nn.Linear(80, 3)

        def forward(self, x):
            x = f(self.stem(x))
            x = f(self.a(x)) + f(self.b(x))
            return self.head(f(x).flatten(1) + f(x.flatten(1)))

    ev = evaluator(case_of(Shared))
    assert error_of(*both(ev)) < 1e-10
    with ev.session():
        net = layerwise.prepare(ev, "exact")
    activations = [owned for node, owned in zip(net.nodes, net.owned, strict=True) if node.activation]
    assert activations == [True, False, False, False, False]


@pytest.mark.parametrize("name", ["residual", "functional", "relu and pool"])
def test_the_twins_serve_devices_without_compiled_operations(name, monkeypatch):
    for module in (dual_rows, pooling):
        monkeypatch.setattr(module, "is_compiled", lambda device: False)
        for op in ("activation_values", "activation_columns", "loss_columns", "max_pool", "pool_tangent", "pool_transposed"):
            monkeypatch.setattr(module, op, None, raising=False)
    assert error_of(*both(evaluator(case_of(NETS[name])))) < 1e-10


def test_float32():
    ev = evaluator(case_of(NETS["group norm"], dtype=torch.float32), dtype=torch.float32)
    assert error_of(*both(ev)) < 1e-4


def score_of(run, backend, windows=((0, 7), (2, 5)), trajectory=None, problem=None, **options):
    query = queries.loss(run.case.x_val, run.case.y_val)
    problem = problem or run.problem()
    return dit_fast.score(trajectory or run.trajectory(), problem, query, list(windows), backend=backend, **options)


@pytest.mark.parametrize("name", ["relu and pool", "residual", "sequence", "batch norm"])
def test_scores_match_the_reference(name):
    run = train(case_of(NETS[name]), *schedule(12), weight_decay=0.02, l2=0.03)
    problem = run.problem()
    ours = score_of(run, "auto", problem=problem)
    assert ours.meta["backend"] == "layerwise" and "agrees with the generic path" in ours.meta["why"]
    slow = dit_fast.reference.score(
        run.trajectory(), run.problem(), queries.loss(run.case.x_val, run.case.y_val), [(0, 7), (2, 5)]
    )
    assert relative_error(ours.scores, slow.scores) < 1e-10


@pytest.mark.parametrize("hessian", ["exact", "ggn", "none"])
def test_scores_of_micro_batches_and_repeated_ids(hessian):
    sizes = [[2, 2], [3], [5], [1], [3, 1], [2], [6]]
    run = train(make_case("cnn"), *schedule(12), micro_batches=sizes)
    ours, generic = (score_of(run, backend, hessian=hessian) for backend in ("layerwise", "generic"))
    assert relative_error(ours.scores, generic.scores) < 1e-10


@pytest.mark.parametrize("kind", ["adam", "momentum", "clipped", "every"])
def test_runs_that_need_the_gradient_or_a_replay(kind, tmp_path):
    case = case_of(NETS["gelu and pool"])
    model = case.model()
    if kind == "adam":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if kind == "momentum" else 0)
    clip = {"clip_norm": 0.5} if kind == "clipped" else {}
    with dit_fast.Recorder(tmp_path / "run", model, optimizer, every=3 if kind == "every" else 1, **clip) as recorder:
        for ids in schedule(12)[0]:
            optimizer.zero_grad()
            case.loss(model(case.x[ids]), case.y[ids]).mean().backward()
            if kind == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            with recorder.step(ids):
                optimizer.step()
    trajectory = dit_fast.Trajectory.open(tmp_path / "run")
    problem = dit_fast.Problem(case.model(), case.loss, (case.x, case.y))
    query = queries.loss(case.x_val, case.y_val)
    ours, generic = (dit_fast.score(trajectory, problem, query, (0, 7), backend=b) for b in ("layerwise", "generic"))
    assert relative_error(ours.scores, generic.scores) < 1e-10


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = C(2, 3, 3), nn.Linear(60, 3)

    def forward(self, x):
        return self.head(2 * self.conv(x).flatten(1))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = C(2, 2, 3, padding=1), nn.Linear(84, 3)

    def forward(self, x):
        return self.head((self.conv(x) * x).flatten(1))


class Broadcast(Gated):
    def forward(self, x):
        return self.head((self.conv(x) + x.mean((2, 3), keepdim=True)).flatten(1))


class Overwritten(Gated):
    """The sum overwrites what is used again: the graph of operations does not show it."""

    def forward(self, x):
        h = self.conv(x)
        g = h
        h += torch.tanh(h)
        return self.head((g + h).flatten(1))


class MeanOverSamples(Gated):
    def forward(self, x):
        h = self.conv(x)
        return self.head((h + h.mean((0, 1))).flatten(1))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Scaled, "mul does not take one of the net's own values|mul is none of the operations"),
        (Gated, "mul does not take one of the net's own values"),
        (Broadcast, "add is no sum of two of the net's own values of one shape"),
        (Overwritten, "does not agree with the generic path on the first batch"),
        (MeanOverSamples, "mean does not give one tensor with a row per sample"),
        (seq(conv(2, 3, 3), nn.Softplus), "module '1' is none of the operations"),
        (seq(conv(2, 3, 3, padding=1, padding_mode="circular")), "module '0' pads with something else than zeros"),
        (seq(conv(2, 3, 2, padding="same")), "module '0' pads its two sides differently"),
        (seq(conv(2, 3, 3), lambda: nn.PReLU()), "module '1' is none of the operations"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_refused_with_its_reason(build, reason):
    run = train(case_of(build), *schedule(12, 3))
    auto = score_of(run, "auto", [(0, 3)], check=False)
    assert auto.meta["backend"] == "generic"
    assert re.search(reason, auto.meta["why"]) and "\n" not in auto.meta["why"], auto.meta["why"]
    with pytest.raises(ValueError, match="backend='layerwise' cannot be used"):
        score_of(run, "layerwise", [(0, 3)], check=False)


def test_a_linear_net_is_left_to_the_generic_path_unless_asked_for():
    run = train(case_of(seq(nn.Flatten, lambda: nn.Linear(84, 4), nn.ELU)), *schedule(12, 3))
    assert "no convolution" in score_of(run, "auto", [(0, 3)]).meta["why"]
    ours, generic = (score_of(run, b, [(0, 3)]) for b in ("layerwise", "generic"))
    assert relative_error(ours.scores, generic.scores) < 1e-10


def test_a_frozen_layer_has_no_tangent():
    case = case_of(seq(conv(2, 4, 3), nn.Tanh, conv(4, 3, 2, bias=False), nn.GELU))
    for frozen in (["0.weight", "0.bias"], ["2.weight"], ["0.weight"], ["5.bias"]):
        model = case.model()
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        params = {n: torch.stack([p.detach()] * 2) for n, p in model.named_parameters() if p.requires_grad}
        trajectory = dit_fast.Trajectory.from_arrays(params=params, batch_ids=[[0, 1, 2]], lr=0.1, num_samples=12)
        ev = Evaluator.create(dit_fast.Problem(model, case.loss, (case.x, case.y)), trajectory, None, torch.float64)
        assert error_of(*both(ev)) < 1e-10


def test_columns_take_a_third_of_the_memory_of_vmapped_torch_func():
    net = seq(conv(2, 16, 3, padding=1), nn.ReLU, lambda: nn.MaxPool2d(2), conv(16, 16, 3, padding=1), nn.ReLU)
    ev = evaluator(case_of(net, num_samples=512, dtype=torch.float32), 512, torch.float32)
    with ev.session():
        made, params, batch = layerwise.prepare(ev, "exact"), ev.params(0), ev.batches(0)[0]
        block = {n: torch.randn(8, *v.shape) for n, v in params.items()}
        ours = peak_memory(lambda: layerwise.linearizer(ev, made, "exact", 8, False)(params, batch)[1](block))
        theirs = peak_memory(lambda: linearize(ev, params, batch, mode="forward_over_reverse")[1](block))
    assert ours < theirs / 3


def peak_memory(run):
    """The most that tensors made in run() took at one time, by torch's record, beside what nothing touches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) != layerwise.ALLOCATION:
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def random_net(seed):
    """A net of random layers, as a constructor."""

    def build():
        random_layers = random.Random(seed)
        channels, modules = 2, []
        for _ in range(random_layers.choice((1, 2, 3))):
            groups = random_layers.choice((1, 1, 1, channels))
            out = groups * random_layers.choice((1, 2, 3))
            modules.append(C(channels, out, random_layers.choice((1, 2, 3)), random_layers.choice((1, 1, 2)), 1, groups=groups))
            channels = out
            extra = [
                partial(nn.GroupNorm, 1, channels), lambda: nn.MaxPool2d(2, 1), lambda: nn.AvgPool2d(2, 1), nn.Identity,
                lambda: nn.Dropout(0.0),
            ]  # fmt: skip
            kinds = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU]
            order = [random_layers.choice(extra)(), random_layers.choice(kinds)()]
            random_layers.shuffle(order)
            modules += order
        return seq(*(lambda m=m: m for m in modules))()

    return build


@pytest.mark.parametrize("seed", range(40))
def test_random_nets(seed):
    hessian = ("exact", "exact", "ggn", "none")[seed % 4]
    ev = evaluator(case_of(random_net(seed), seed=seed), size=1 + seed % 6)
    assert error_of(*both(ev, hessian, num_columns=1 + seed % 4, l2=0.1 * (seed % 2))) < 1e-10
