"""Runs whose per-sample gradients are at hand in factors, taken literally: one sample, one row, one backward pass at a time."""

from dataclasses import replace

import torch
from cases import Case, make_case, schedule, train
from torch import nn

import dit_fast
from dit_fast.factored import Factors, Layout, Lookup, Outer, Plain, Projection
from dit_fast.trajectory import Trajectory


class Tokens(nn.Module):
    """An embedding, a linear layer over positions, a norm and a head: every kind of part."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(7, 4), nn.Linear(4, 5)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3, bias=False)

    def forward(self, tokens):
        return self.head(self.norm(self.mix(self.embedding(tokens)).tanh()).mean(1))


def factor_case(name):
    """A case of cases.py, or "tokens": classes of sequences."""
    if name != "tokens":
        return make_case(name)
    case = make_case("transformer")

    def model():
        torch.manual_seed(3)
        return Tokens().double()

    return Case(model, make_case("mlp").loss, case.x, case.y[:, 0] % 3, case.x_val, case.y_val[:, 0] % 3)


def rows_of_sample(model, loss, x, y, curvature, label=None):
    """One sample's slopes [R], curvature [R, R]; layer → (inputs [S, I], deltas [R, S, O]); parameter → rows [R, *shape]."""
    seen = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)}
    handles = [
        m.register_forward_hook(lambda module, args, output, n=n: seen.update({n: (args[0].detach(), output)}))
        for n, m in layers.items()
    ]
    z = model(x[None])
    for handle in handles:
        handle.remove()
    own = {name for n in layers for name in (f"{n}.weight", f"{n}.bias")}
    others = {name: p for name, p in model.named_parameters() if name not in own}
    losses = lambda z: loss(z, y[None])[0]  # noqa: E731
    if curvature == "fisher":
        targets, slopes, second = [losses(z)], torch.ones(1), torch.ones(1, 1)
    elif curvature == "ggn":
        targets = list(z.flatten())
        slopes = torch.func.grad(losses)(z.detach()).flatten()
        second = torch.func.hessian(losses)(z.detach()).reshape(z.numel(), z.numel())
    else:
        targets = [losses(z), loss(z, label[None])[0]]
        slopes, second = torch.tensor([1.0, 0.0]), torch.diag(torch.tensor([0.0, 1.0]))
    wanted = [output for _, output in seen.values()] + list(others.values())
    rows = [torch.autograd.grad(target, wanted, retain_graph=True) for target in targets]
    found = {}
    for i, (name, (inputs, _)) in enumerate(seen.items()):
        module = layers[name]
        if isinstance(module, nn.Conv2d):
            inputs = nn.functional.unfold(inputs, module.kernel_size, padding=module.padding)[0].T
            deltas = [row[i][0].flatten(1).T for row in rows]
        else:
            inputs = inputs[0].reshape(-1, *inputs.shape[2:]) if isinstance(module, nn.Embedding) else inputs[0]
            inputs = inputs if isinstance(module, nn.Embedding) else inputs.reshape(-1, inputs.shape[-1])
            deltas = [row[i][0].reshape(-1, row[i].shape[-1]) for row in rows]
        found[name] = (inputs, torch.stack(deltas))
    plain = {name: torch.stack([row[len(seen) + i] for row in rows]) for i, name in enumerate(others)}
    return slopes.double(), second.double(), found, plain


def literal_factors(run, t, curvature="fisher", projections=None, part=slice(None), labels=None):
    """The factors of a micro-batch of step t of a run of cases.py."""
    model = run.case.model()
    model.load_state_dict({name: value[t] for name, value in run.params.items()}, strict=False)
    ids = run.batches[t][part]
    labels = ids * 0 if labels is None else labels[ids]
    samples = [
        rows_of_sample(model, run.case.loss, run.case.x[j], run.case.y[j], curvature, label)
        for j, label in zip(ids.tolist(), labels, strict=True)
    ]
    modules, parts = dict(model.named_modules()), []
    for name in samples[0][2]:
        inputs, deltas = (torch.stack([sample[2][name][i] for sample in samples]) for i in (0, 1))
        if isinstance(modules[name], nn.Embedding):
            parts.append(Lookup(f"{name}.weight", inputs, deltas))
        else:
            bias = None if modules[name].bias is None else f"{name}.bias"
            parts.append(projected(Outer(f"{name}.weight", bias, inputs, deltas), projections or {}))
    for name in samples[0][3]:
        parts.append(Plain(name, torch.stack([sample[3][name] for sample in samples])))
    slopes, second = (torch.stack([sample[i] for sample in samples]) for i in (0, 1))
    return Factors(t, ids, run.coefficients[t][part], slopes, second, tuple(parts))


def projected(part, projections):
    """An outer part's factors through the projection of its weight."""
    if part.weight not in projections:
        return part
    p = projections[part.weight]
    return replace(part, inputs=part.inputs @ p.inputs.T, deltas=part.deltas @ p.outputs.T)


def random_projections(run, sizes):
    """{weight: (o, i)} → projections of these weights, their biases with them."""
    generator, made = torch.Generator().manual_seed(5), {}
    for weight, (o, i) in sizes.items():
        shape = run.params[weight].shape[1:]
        outputs = torch.randn(o, shape[0], generator=generator, dtype=torch.float64) / o**0.5
        inputs = torch.randn(i, shape[1:].numel(), generator=generator, dtype=torch.float64) / i**0.5
        made[weight] = Projection(outputs, inputs)
        bias = weight.replace("weight", "bias")
        if bias in run.params:
            made[bias] = Projection(outputs, None)
    return made


class FactorTrajectory(Trajectory):
    """A run with factors at hand, step by step."""

    def __init__(self, source, factors, layout, marked=None):
        super().__init__(source)
        self._factors, self._layout, self._marked = factors, layout, marked

    @property
    def factor_layout(self):
        return self._layout

    @property
    def marked_queries(self):
        """As the log has them: step → (labels, parameter → [Q, *shape])."""
        found = {}
        for t, flat in ({} if self._marked is None else self._marked.by_step).items():
            shapes = {name: shape for name, (shape, _) in self.parameters.items()}
            pieces = flat.split([shape.numel() for shape in shapes.values()], 1)
            named = {n: piece.view(-1, *shape) for (n, shape), piece in zip(shapes.items(), pieces, strict=True)}
            found[t] = (self._marked.names(len(flat)), named)
        return found

    def factors(self, t):
        return list(self._factors[t])


def layout_of(run, curvature="fisher", projections=None, l2=None, names=None):
    """The layout of all parameters, or of those named."""
    projections = projections or {}
    shapes = {}
    for name, value in run.params.items():
        if names is not None and name not in names:
            continue
        own = value.shape[1:]
        if name in projections:
            p = projections[name]
            own = torch.Size([len(p.outputs)] if p.inputs is None else [len(p.outputs), len(p.inputs)])
        shapes[name] = own
    return Layout(shapes, curvature, run.l2 if l2 is None else l2, projections, torch.float64)


def with_factors(run, curvature="fisher", projections=None, marked=None, layout=None, keep=lambda part: True, **changes):
    """run.trajectory() with the literal factors of every step."""
    source = run.trajectory(**changes)
    labels = torch.arange(len(run.case.x)) * 5 % 3
    factors = [
        [
            replace(f, parts=tuple(part for part in f.parts if keep(part)))
            for f in (literal_factors(run, t, curvature, projections, part, labels) for part in source.micro_batches(t))
        ]
        for t in range(source.num_steps)
    ]
    layout = layout or layout_of(run, curvature, projections)
    return FactorTrajectory(source._source, factors, layout, marked)


def factor_run(name, **options):
    """A run of a factor case with ragged batches, repeated ids and a moving rate."""
    case = factor_case(name)
    return train(case, *schedule(len(case.x)), **options)


def loss(run):
    return dit_fast.queries.loss(run.case.x_val, run.case.y_val)


def ready_gradients(run, ends, rows=2):
    """queries.gradients of each of the first `rows` validation losses, by autograd at the parameters of the ends."""
    found = {}
    for t in ends:
        model = run.case.model()
        model.load_state_dict({name: value[t] for name, value in run.params.items()}, strict=False)
        params = [dict(model.named_parameters())[name] for name in run.params]
        losses = run.case.loss(model(run.case.x_val[:rows]), run.case.y_val[:rows])
        each = [torch.autograd.grad(value, params, retain_graph=True) for value in losses]
        found[t] = torch.stack([torch.cat([g.flatten() for g in row]) for row in each])
    return dit_fast.queries.gradients(found)
