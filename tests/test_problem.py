"""Problem: every form of data, what is refused, and that the user's model and torch are left as they were."""

import re
import warnings
from collections import namedtuple

import pytest
import torch
from cases import cross_entropy, standard_run
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import dit_fast as dit
from dit_fast import queries
from dit_fast.data import Samples, default_unpack
from dit_fast.problem import Evaluator

X = torch.arange(12.0).reshape(6, 2)
Y = torch.arange(6) % 2
PICKED = torch.tensor([4, 0, 4])
Pair = namedtuple("Pair", "x y")


class Pairs(Dataset):
    """(x, y) with a plain integer y, as torchvision's data sets yield it."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return X[index], int(Y[index])


class Dicts(Pairs):
    def __getitem__(self, index):
        return {"x": X[index], "labels": int(Y[index])}


class Stream(IterableDataset):
    def __len__(self):
        return 6

    def __iter__(self):
        return iter(Pairs())


def stack(items):
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


FORMS = {
    "tuple": ((X, Y), None),
    "list": ([X, Y], None),
    "numpy": ((X.numpy(), Y.numpy()), None),
    "named tuple": (Pair(X, Y), None),
    "TensorDataset": (TensorDataset(X, Y), None),
    "dataset": (Pairs(), None),
    "dataset with ids": (dit.with_ids(Pairs()), None),
    "list of pairs": (list(Pairs()), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_batch(form):
    data, collate_fn = FORMS[form]
    samples = Samples(data, collate_fn)
    x, y = samples.batch(PICKED)
    assert samples.num_samples == 6
    assert x.tolist() == [[8, 9], [0, 1], [8, 9]] and x.dtype == torch.float32
    assert y.tolist() == [0, 0, 0] and y.dtype == torch.int64


@pytest.mark.parametrize("data", [Pairs(), TensorDataset(X, Y), dit.with_ids(Pairs())])
def test_collate_fn_makes_the_batch_of_the_items(data):
    assert Samples(data, lambda items: [int(y) for _, y in items]).batch(torch.tensor([1, 4, 3])) == [1, 0, 1]


def test_trees_of_tensors_keep_their_containers():
    batch = Samples({"pair": (X, Y), "named": Pair(X, Y), "labels": Y.numpy(), "word": "kept"}).batch(torch.tensor([3]))
    assert list(batch) == ["pair", "named", "labels", "word"] and batch["word"] == "kept"
    assert type(batch["pair"]) is tuple and batch["pair"][0].tolist() == [[6, 7]]
    assert type(batch["named"]) is Pair and batch["named"].y.tolist() == [1]
    assert batch["labels"].tolist() == [1]
    assert Samples(X).batch(torch.tensor([5])).tolist() == [[10, 11]]


def test_default_unpack():
    assert default_unpack((1, 2)) == default_unpack([1, 2]) == ((1,), {}, 2)
    assert default_unpack({"ids": 1, "labels": 2, "mask": 3}) == ((), {"ids": 1, "mask": 3}, 2)
    for batch, kind in (((1, 2, 3), "3 items"), ({"x": 1}, "dict"), (X, "Tensor"), ("ab", "2 items")):
        with pytest.raises(TypeError, match=f"a batch of {kind} is neither .*pass unpack"):
            default_unpack(batch)


class ByName(nn.Module):
    """The linear net, with its input by keyword."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x)


SCORED = {
    "dict": ({"x": X, "labels": Y}, {}),
    "dict dataset": (Dicts(), {}),
    "float64 data": ((X.double(), Y), {}),
    "unpack by position": ((Y, X), {"unpack": lambda batch: ((batch[1],), {}, batch[0])}),
    "unpack by keyword": ((X, Y, Y), {"unpack": lambda batch: ([], {"x": batch[0]}, batch[2])}),
    "collate_fn": (Dicts(), {"collate_fn": lambda items: stack([tuple(item.values()) for item in items])}),
}


def short_run(build, data, loss=cross_entropy, dtype=torch.float32, batches=((0, 1), (2, 3), (4, 1)), **changes):
    """Three steps of gradient descent of `build()` on `data` (x, y) in plain torch: (model, trajectory)."""
    torch.manual_seed(0)
    model = build().to(dtype)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    history = {n: [p.detach().clone()] for n, p in named.items()}
    for ids in batches:
        x, y = (part[list(ids)] for part in data)
        gradient = torch.autograd.grad(loss(model(x), y).mean(), list(named.values()))
        for (name, p), g in zip(named.items(), gradient, strict=True):
            p.data -= 0.1 * g
            history[name].append(p.detach().clone())
    params = {n: torch.stack(rows) for n, rows in history.items()}
    return model, dit.Trajectory.from_arrays(params, [list(ids) for ids in batches], 0.1, num_samples=6, **changes)


@pytest.mark.parametrize("form", SCORED)
def test_every_form_of_data_gives_the_same_scores(form):
    data, options = SCORED[form]
    model, trajectory = short_run(ByName, (X, Y))
    query = queries.logit({"x": X[:2]}, 1)
    expected = dit.score(trajectory, dit.Problem(model, cross_entropy, (X, Y)), query, backend="generic").scores
    assert expected.abs().max() > 0
    problem = dit.Problem(model, cross_entropy, data, **options)
    assert torch.equal(dit.score(trajectory, problem, query, backend="generic").scores, expected)


def test_with_ids_names_rows_behind_a_shuffling_loader():
    generator = torch.Generator().manual_seed(0)
    seen = []
    for ids, x, y in DataLoader(dit.with_ids(TensorDataset(X, Y)), batch_size=4, shuffle=True, generator=generator):
        assert torch.equal(x, X[ids]) and torch.equal(y, Y[ids])
        seen += ids.tolist()
    assert seen != sorted(seen) and sorted(seen) == list(range(6))


def test_with_ids_puts_the_id_in_front_of_any_item():
    class One(Pairs):
        def __getitem__(self, index):
            return X[index]

    assert len(dit.with_ids(Pairs())) == 6
    index, item = dit.with_ids(Dicts())[3]
    assert index == 3 and item["labels"] == 1
    assert dit.with_ids(One())[2][0] == 2 and dit.with_ids(One())[2][1].tolist() == [4, 5]
    assert dit.with_ids([["a", "b", "c"]])[0] == (0, "a", "b", "c")
    ids, batch = next(iter(DataLoader(dit.with_ids(Dicts()), batch_size=3)))
    assert ids.tolist() == [0, 1, 2] and batch["x"].tolist() == X[:3].tolist()


REFUSED = {
    "no module": (lambda: dit.Problem("net", cross_entropy, (X, Y)), TypeError, "model must be a torch.nn.Module, got str"),
    "no loss": (lambda: dit.Problem(ByName(), None, (X, Y)), TypeError, "per_sample_loss must be callable"),
    "negative l2": (lambda: dit.Problem(ByName(), cross_entropy, (X, Y), l2=-1e-3), ValueError, "l2 must be 0 or positive"),
    "NaN l2": (lambda: dit.Problem(ByName(), cross_entropy, (X, Y), l2=float("nan")), ValueError, "l2 must be .* nan"),
    "lengths": (lambda: dit.Problem(ByName(), cross_entropy, (X, Y[:4])), ValueError, r"different numbers .*\[4, 6\]"),
    "nested lengths": (lambda: Samples({"a": X, "b": [Y, X[:2]]}), ValueError, r"different numbers of samples \[2, 6\]"),
    "iterable": (lambda: dit.Problem(ByName(), cross_entropy, Stream()), TypeError, "map-style dataset .*got Stream"),
    "generator": (lambda: dit.Problem(ByName(), cross_entropy, iter([1])), TypeError, "map-style dataset"),
    "with_ids of a stream": (lambda: dit.with_ids(Stream()), TypeError, "with_ids needs a map-style dataset .*got Stream"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_problem_refuses(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_problem_says_what_it_is():
    problem = dit.Problem(nn.Linear(2, 2), cross_entropy, (X, Y), l2=0.5)
    assert problem.num_samples == 6
    assert repr(problem) == "Problem(Linear, 6 parameters, 6 samples, l2=0.5)"


WRONG_LOSSES = {
    "scalar": (nn.CrossEntropyLoss(), ValueError, r'returned a scalar; it must return one loss per sample.*reduction="none"'),
    "matrix": (
        lambda z, y: z.square(),
        ValueError,
        r"returned shape \(2, 2\) for a batch of 2; it must be \[2\]: sum or average",
    ),
    "column": (lambda z, y: z[:, :1], ValueError, r"returned shape \(2, 1\) for a batch of 2"),
    "too few": (lambda z, y: z[1:, 0], ValueError, r"returned shape \(1,\) for a batch of 2"),
    "list": (lambda z, y: list(z[:, 0]), TypeError, "must return a tensor .B., got list"),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("loss", WRONG_LOSSES)
def test_losses_that_are_not_one_number_per_sample_are_refused(loss, check):
    function, error, message = WRONG_LOSSES[loss]
    model, trajectory = short_run(ByName, (X, Y))
    with pytest.raises(error, match=message):
        dit.score(trajectory, dit.Problem(model, function, (X, Y)), queries.parameter("linear.bias", 0), check=check)


SAMPLE_IDS = {
    "too large": ([0, 12], ValueError, r"sample_ids must lie in 0\.\.11, got 0\.\.12"),
    "negative": ([-1, 3], ValueError, r"sample_ids must lie in 0\.\.11, got -1\.\.3"),
    "floats": ([0.0], TypeError, "sample_ids must be integers, got torch.float32"),
    "mask": (torch.ones(12, dtype=torch.bool), TypeError, "sample_ids must be integers, got torch.bool"),
    "one number": (3, ValueError, r"sample_ids must be one-dimensional, got shape \(\)"),
    "matrix": ([[1, 2]], ValueError, r"sample_ids must be one-dimensional, got shape \(1, 2\)"),
}


@pytest.mark.parametrize("function", [dit.score, dit.leave_one_out])
@pytest.mark.parametrize("case", SAMPLE_IDS)
def test_bad_sample_ids_are_refused(case, function):
    ids, error, message = SAMPLE_IDS[case]
    run = standard_run("mlp")
    with pytest.raises(error, match=message):
        function(run.trajectory(), run.problem(), queries.parameter("0.bias", 0), sample_ids=ids)


def test_sample_ids_select_and_order_the_scores():
    run = standard_run("mlp")
    query = queries.loss(run.case.x_val, run.case.y_val)
    everybody = dit.score(run.trajectory(), run.problem(), query)
    some = dit.score(run.trajectory(), run.problem(), query, sample_ids=(i for i in (7, 0, 7)))
    assert some.sample_ids.tolist() == [7, 0, 7]
    assert torch.equal(some.scores, everybody.scores[..., [7, 0, 7]])
    assert dit.score(run.trajectory(), run.problem(), query, sample_ids=[]).scores.shape == (1, 1, 0)


class Named(nn.Module):
    """One linear layer of any width under any name, and whatever else is asked."""

    def __init__(self, name="layer", width=2, **more):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(2, width))
        for key, value in more.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(key, value)
            else:
                self.register_buffer(key, value)

    def forward(self, x):
        return getattr(self, self.name)(x)


FOREIGN = {
    "name": (Named("other"), r"the log's parameter 'layer.weight' \(2, 2\) is not in the model: is it another model\?"),
    "shape": (Named(width=3), r"parameter 'layer.weight' is \(3, 2\) in the model, \(2, 2\) in the log"),
    "more": (Named(extra=nn.Parameter(torch.ones(1))), r"'extra' is not in the log; .*requires_grad_\(False\)"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_model_with_other_parameters_than_the_log_is_refused(case):
    model, message = FOREIGN[case]
    _, trajectory = short_run(Named, (X, Y))
    with pytest.raises(dit.LogError, match=message):
        dit.score(trajectory, dit.Problem(model, cross_entropy, (X, Y)), queries.logit(X))


def test_a_parameter_that_was_not_trained_may_be_frozen():
    _, trajectory = short_run(Named, (X, Y))
    model = Named(extra=nn.Parameter(torch.ones(1), requires_grad=False))
    assert dit.score(trajectory, dit.Problem(model, cross_entropy, (X, Y)), queries.logit(X[:1])).scores.abs().max() > 0


def recorded(path, model):
    """Two logged steps of torch.optim.SGD on the first four samples."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with dit.Recorder(path, model, optimizer, num_samples=6) as recorder:
        for ids in ([0, 1], [2, 3]):
            optimizer.zero_grad()
            cross_entropy(model(X[ids]), Y[ids]).mean().backward()
            with recorder.step(ids):
                optimizer.step()
    return dit.Trajectory.open(path)


def frozen(value):
    return nn.Parameter(torch.tensor([value]), requires_grad=False)


def test_a_frozen_parameter_must_be_the_logged_one(tmp_path):
    trajectory = recorded(tmp_path / "log", Named(still=frozen(1.0)))
    query = queries.logit(X[:1])
    assert dit.score(trajectory, dit.Problem(Named(still=frozen(1.0)), cross_entropy, (X, Y)), query).scores.abs().max() > 0
    changed = "the model's frozen parameter '{}' is not the one the run was logged with"
    for model, message in (
        (Named(still=frozen(1.5)), changed.format("still")),
        (Named(still=frozen([1.0])), changed.format("still")),
        (Named(other=frozen(1.0), still=frozen(1.0)), changed.format("other")),
        (Named(), "the log's frozen parameter 'still' is not in the model: is it another model?"),
    ):
        with pytest.raises(dit.LogError, match=re.escape(message)):
            dit.score(trajectory, dit.Problem(model, cross_entropy, (X, Y)), query)


class Scaled(nn.Module):
    def __init__(self, scale=1.0, name="scale"):
        super().__init__()
        self.layer, self.name = nn.Linear(2, 2), name
        self.register_buffer(name, torch.tensor(scale))

    def forward(self, x):
        return self.layer(x) * getattr(self, self.name)


def test_buffers_are_the_logs_and_unknown_ones_are_refused(tmp_path):
    trajectory = recorded(tmp_path / "log", Scaled(3.0))
    query = queries.logit(X[:1])
    expected = dit.score(trajectory, dit.Problem(Scaled(3.0), cross_entropy, (X, Y)), query)
    model = Scaled(0.0)
    assert torch.equal(dit.score(trajectory, dit.Problem(model, cross_entropy, (X, Y)), query).scores, expected.scores)
    assert model.scale == 0 and expected.scores.abs().max() > 0
    for model in (Scaled(3.0, "factor"), Scaled([3.0, 3.0])):
        with pytest.raises(dit.LogError, match=r"the log's buffer 'scale' \(\) is not in the model: is it another model\?"):
            dit.score(trajectory, dit.Problem(model, cross_entropy, (X, Y)), query)


class Wrapped(nn.Module):
    """`inner` and a linear layer, only to be looked at."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 2)


UNSUPPORTED = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), r"BatchNorm1d 'inner' is in train mode: it couples the samples"),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), r"InstanceNorm1d 'inner' updates running"),
    "Dropout": (lambda: nn.Dropout(0.1), r"Dropout 'inner' drops at random in train mode"),
    "Dropout2d": (lambda: nn.Sequential(nn.Tanh(), nn.Dropout2d(0.1)), r"Dropout2d 'inner\.1' drops at random"),
    "LSTM": (lambda: nn.LSTM(4, 4, num_layers=2, dropout=0.3), r"LSTM 'inner' drops at random"),
    "attention": (lambda: nn.MultiheadAttention(4, 2, dropout=0.2), r"MultiheadAttention 'inner' drops at random"),
}
SUPPORTED = {
    "Dropout(0)": lambda: nn.Dropout(0.0),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(4),
    "LSTM": lambda: nn.LSTM(4, 4, num_layers=2),
    "attention": lambda: nn.MultiheadAttention(4, 2),
}


def opened(inner, training):
    """Enter and leave the session of a one-step run of a model with `inner` inside."""
    model = Wrapped(inner).train(training)
    params = {n: p.detach().expand(2, *p.shape) for n, p in model.named_parameters()}
    trajectory = dit.Trajectory.from_arrays(params, [[0, 1]], 0.1)
    with Evaluator.create(dit.Problem(model, cross_entropy, (X, Y)), trajectory, None, None).session():
        pass


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_modules_that_couple_samples_or_draw_at_random_are_refused_in_train_mode_only(case):
    make, message = UNSUPPORTED[case]
    with pytest.raises(dit.UnsupportedError, match=message):
        opened(make(), training=True)
    opened(make(), training=False)


@pytest.mark.parametrize("case", SUPPORTED)
def test_modules_of_the_same_kind_without_chance_are_taken(case):
    opened(SUPPORTED[case](), training=True)


def test_active_dropout_is_refused_by_score_itself():
    run = standard_run("mlp")
    model = nn.Sequential(*run.case.model(), nn.Dropout(0.5))
    query = queries.loss(run.case.x_val, run.case.y_val)
    for function in (dit.score, dit.leave_one_out, dit.reference.score, dit.reference.leave_one_out):
        with pytest.raises(dit.UnsupportedError, match="Dropout '5' drops at random"):
            function(run.trajectory(), run.problem(model=model), query)


@pytest.fixture
def unusual_settings():
    """Torch as no default has it, so that putting back a default would show; the test's own state is put back too."""
    backends = torch.backends
    before = backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision
    default, autocast = torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "tf32"
    backends.cudnn.enabled = False
    backends.mha.set_fastpath_enabled(False)
    backends.cuda.enable_flash_sdp(False)
    torch.set_default_dtype(torch.float64)
    torch.set_autocast_enabled("cpu", True)
    torch.manual_seed(5)
    with torch.no_grad(), warnings.catch_warnings():
        yield
    torch.set_autocast_enabled("cpu", autocast)
    torch.set_default_dtype(default)
    backends.cuda.enable_flash_sdp(True)
    backends.mha.set_fastpath_enabled(True)
    backends.cudnn.enabled = True
    backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision = before


def torch_settings():
    backends = torch.backends
    found = {
        name: getattr(getattr(backends, name.split(".")[0]), name.split(".")[1]).fp32_precision
        for name in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
    }
    return found | {
        "cudnn": backends.cudnn.enabled,
        "mha": backends.mha.get_fastpath_enabled(),
        "sdp": [backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled(), backends.cuda.math_sdp_enabled()],
        "dtype": torch.get_default_dtype(),
        "rng": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "filters": list(warnings.filters),
    }


def model_state(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "objects": {name: id(value) for name, value in model.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "flags": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, h)) for h in hooks] for name, module in model.named_modules()},
    }


def marked_model(run):
    """The run's model with a gradient, a hook and a module in eval mode of the user's own."""
    model = run.case.model()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].register_forward_hook(lambda *_: None)
    model[3].eval()
    return model


WORK = {
    "score": lambda *arguments: dit.score(*arguments),
    "refine": lambda *arguments: dit.score(*arguments, refine=1),
    "float32": lambda *arguments: dit.score(*arguments, dtype=torch.float32, check=False),
    "ggn": lambda *arguments: dit.score(*arguments, hessian="ggn"),
    "retrain": lambda *arguments: dit.leave_one_out(*arguments),
    "reference": lambda *arguments: dit.reference.score(*arguments),
}


class Stop(Exception):
    pass


@pytest.mark.parametrize("work", WORK)
def test_model_and_torch_are_left_as_they_were_also_after_an_error(work, unusual_settings):
    run = standard_run_with_grad("mlp")
    model, calls, stop = marked_model(run), [], {"call": 0}

    def loss(output, target):
        calls.append(torch.rand(()))
        if len(calls) == stop["call"]:
            raise Stop
        return cross_entropy(output, target)

    problem = dit.Problem(model, loss, (run.case.x, run.case.y))
    arguments = run.trajectory(), problem, queries.loss(run.case.x_val, run.case.y_val), [(0, 4), (2, 3)]
    before, settings = model_state(model), torch_settings()
    WORK[work](*arguments)
    assert model_state(model) == before and torch_settings() == settings
    total = len(calls)
    for stop["call"] in (1, total // 2, total):
        calls.clear()
        with pytest.raises(Stop):
            WORK[work](*arguments)
        assert model_state(model) == before and torch_settings() == settings


def standard_run_with_grad(name):
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        return standard_run(name)


class TiedThrice(nn.Module):
    """a.weight is also b.weight and the buffer c, and the layer a has two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.again, self.b.weight = self.a, self.a.weight
        self.register_buffer("c", self.a.weight)

    def forward(self, x):
        assert self.again.weight is self.a.weight
        return self.b(self.a(x)) @ self.c


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_puts_parameters_wherever_they_are_tied_and_the_models_own_back(fails):
    model = TiedThrice()
    own = [model.a.weight, model.a.bias, model.b.weight, model.c]
    params = {n: torch.randn(2, *p.shape) for n, p in model.named_parameters()}
    trajectory = dit.Trajectory.from_arrays(params, [[0, 1]], 0.5)
    ev = Evaluator.create(dit.Problem(model, cross_entropy, (X, Y)), trajectory, None, None)
    weight, bias = (ev.params(1)[n].requires_grad_() for n in ("a.weight", "a.bias"))

    def call(inside):
        output = inside(X)
        if fails:
            raise KeyError("the caller's own")
        return output

    if fails:
        with pytest.raises(KeyError, match="the caller's own"):
            ev.call({"a.weight": weight, "a.bias": bias}, call)
    else:
        output = ev.call({"a.weight": weight, "a.bias": bias}, call)
        torch.testing.assert_close(output, (X @ weight.T + bias) @ weight.T @ weight)
    assert all(now is then for now, then in zip([model.a.weight, model.a.bias, model.b.weight, model.c], own, strict=True))


def test_inside_a_session_torch_is_exact_and_the_flags_are_the_logs(tmp_path, unusual_settings):
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        model = Named()
        model.layer.eval()
        torch.set_default_dtype(torch.float32)
        trajectory = recorded(tmp_path / "log", model.float())
    model.layer.train()
    model.eval()
    with Evaluator.create(dit.Problem(model, cross_entropy, (X, Y)), trajectory, None, torch.float64).session():
        inside = torch_settings()
        assert model.training and not model.layer.training
    precisions = {value for name, value in inside.items() if "." in name}
    assert precisions == {"ieee"}
    assert inside["dtype"] == torch.float64 and inside["grad"] and not inside["autocast"] and not inside["mha"]
    assert inside["sdp"] == [False, False, True]
    assert not model.training and not model.layer.training


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        return gradient


class OnceDifferentiable(nn.Module):
    def forward(self, x):
        return OnceOnly.apply(x)


@pytest.mark.parametrize("hessian", ["exact", "ggn", "fisher", "none"])
def test_a_module_that_hides_its_second_derivatives_is_named_and_keeps_its_hooks(hessian):
    """torch gives zeros there and no error; a score must not."""
    data = X.double(), Y
    model, trajectory = short_run(lambda: nn.Sequential(nn.Linear(2, 2), OnceDifferentiable()), data, dtype=torch.float64)
    before, settings = model_state(model), torch_settings()
    with pytest.raises(dit.UnsupportedError, match="OnceDifferentiable '1' cannot be differentiated twice"):
        dit.score(trajectory, dit.Problem(model, cross_entropy, data), queries.parameter("0.bias", 0), hessian=hessian)
    assert model_state(model) == before and torch_settings() == settings


@pytest.mark.parametrize("work", [dit.score, dit.leave_one_out])
def test_scores_are_the_same_where_gradients_are_switched_off(work, tmp_path):
    trajectory = recorded(tmp_path / "log", Scaled(3.0))
    arguments = trajectory, dit.Problem(Scaled(3.0), cross_entropy, (X, Y)), queries.logit(X[:2])
    expected = work(*arguments, dtype=torch.float64, check=False).scores
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert torch.equal(work(*arguments, dtype=torch.float64, check=False).scores, expected)
            work(*arguments)
    assert expected.abs().max() > 0
