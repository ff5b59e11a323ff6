"""The Recorder: what it writes is what happened, what it cannot stand for it refuses, and no accident damages a log."""

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dit_fast as dit
from dit_fast import background as background_module
from dit_fast import log as log_module
from dit_fast import recording as recording_module
from dit_fast.background import ChunkBuffer, DeviceRows

N = 24


def net(dtype=torch.float32):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(N, 3, generator=generator, dtype=dtype), torch.randn(N, 2, generator=generator, dtype=dtype)


def batches(steps, size=5):
    return torch.randint(N, (steps, size), generator=torch.Generator().manual_seed(9))


def backward(model, ids, factor=1.0):
    x, y = data(next(model.parameters()).dtype)
    (((model(x[ids]) - y[ids]) ** 2).sum(1).mean() * factor).backward()


def state(model):
    return {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in model.named_parameters()}


def train(model, optimizer, steps, recorder=None, scheduler=None):
    """Plain steps, recorded where there is a recorder: θ[0] … θ[T]."""
    history = [state(model)]
    for ids in batches(steps):
        optimizer.zero_grad()
        backward(model, ids)
        if recorder is None:
            optimizer.step()
        else:
            with recorder.step(ids):
                optimizer.step()
        if scheduler is not None:
            scheduler.step()
        history.append(state(model))
    return history


def assert_rows(path, history):
    """The log opens, is sound, and its parameters are a beginning of `history`, bit for bit; returns the trajectory."""
    run = dit.Trajectory.open(path)
    run.verify()
    for t in range(run.num_steps + 1 if run.num_steps else 0):
        params = run.params(t)
        assert params.keys() == history[t].keys()
        for name, value in params.items():
            assert value.dtype == history[t][name].dtype and torch.equal(value, history[t][name]), (t, name)
    return run


def manifest(path):
    return json.loads((path / "manifest.json").read_text())


class Odd(nn.Module):
    """Non-contiguous, tied, float64, scalar, frozen and unused parameters, and buffers, in one model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.transposed = nn.Parameter(torch.randn(4, 3).t())
        self.tied = self.transposed
        self.wide = nn.Parameter(torch.randn(2, 4, dtype=torch.float64) / 3)
        self.scalar = nn.Parameter(torch.tensor(0.3))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.other = nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.arange(8.0).reshape(2, 4).t())
        self.frozen_again = self.frozen
        self.register_buffer("shift_again", self.shift)
        self.register_buffer("hidden", torch.tensor(3), persistent=False)

    def forward(self, x):
        hidden = torch.tanh(x @ self.transposed * self.frozen + self.shift[:, 0]) * self.scalar
        return (hidden.double() @ self.wide.t()).float() + self.other


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 1 << 20])
def test_round_trip_of_an_odd_model_with_groups_and_a_schedule(tmp_path, chunk_bytes):
    model = Odd()
    assert not model.transposed.is_contiguous()
    groups = [{"params": [model.scalar, model.transposed]}, {"params": [model.wide], "lr": 0.02, "weight_decay": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=chunk_bytes, num_samples=N) as recorder:
        history = train(model, optimizer, 14, recorder, scheduler)
        assert recorder.num_steps == 14
    logged = ("transposed", "wide", "scalar")
    run = assert_rows(tmp_path / "log", [{name: row[name] for name in logged} for row in history])
    assert run.num_steps == 14 and run.num_samples == N
    assert run.parameters["wide"] == ((2, 4), torch.float64) and run.parameters["scalar"] == ((), torch.float32)
    assert run.groups == {"transposed": 0, "wide": 1, "scalar": 0}
    assert run.optimizer == (dit.SGD(), dit.SGD(weight_decay=0.1))
    assert set(run.frozen_digests) == {"frozen", "other"}
    assert run.constants.keys() == {"shift", "hidden"} and torch.equal(run.constants["shift"], model.shift)
    assert run.training_flags == {"": True}
    for t, ids in enumerate(batches(14)):
        assert torch.equal(run.batch_ids(t), ids) and run.coefficients(t).tolist() == [0.2] * 5
        first, second = run.settings(t)
        assert (first["lr"], first["weight_decay"]) == (pytest.approx(0.3 * 0.9**t), 0.0)
        assert (second["lr"], second["weight_decay"]) == (pytest.approx(0.02 * 0.9**t), 0.1)
    assert len(manifest(tmp_path / "log")["chunks"]) == (
        1 if chunk_bytes == 1 << 20 else 14 // 4 + 1 if chunk_bytes == 1 else 2
    )


def test_rows_replay_by_the_rule(tmp_path):
    """Ids, coefficients, settings and rows belong together: the rule leads from each row to the next."""
    model = net(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.05)
    with dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1) as recorder:
        for ids in batches(6, size=6):
            optimizer.zero_grad()
            for part in (ids[:4], ids[4:]):
                backward(model, part, factor=0.5)
                recorder.batch(part, scale=0.5)
            optimizer.step()
    run, (x, y) = dit.Trajectory.open(tmp_path / "log"), data(torch.float64)
    for t in range(run.num_steps):
        params = {n: p.requires_grad_() for n, p in run.params(t).items()}
        losses = ((torch.func.functional_call(model, params, (x[run.batch_ids(t)],)) - y[run.batch_ids(t)]) ** 2).sum(1)
        total = (run.coefficients(t) * losses).sum()
        for (name, p), g in zip(params.items(), torch.autograd.grad(total, list(params.values())), strict=True):
            expected, _ = dit.SGD.forward(p.detach(), g, (), 0, run.settings(t)[run.groups[name]])
            torch.testing.assert_close(run.params(t + 1)[name], expected, rtol=1e-13, atol=1e-14)


def test_names_are_those_of_the_inner_module(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dit.Recorder(tmp_path / "log", nn.DataParallel(model), optimizer) as recorder:
        history = train(model, optimizer, 2, recorder)
    assert_rows(tmp_path / "log", history)


IDS = {
    "list": [3, 3, 1],
    "int32": torch.tensor([3, 3, 1], dtype=torch.int32),
    "numpy": np.array([3, 3, 1], np.uint8),
}


@pytest.mark.parametrize("kind", IDS)
def test_ids_and_coefficients(tmp_path, kind):
    """mean, sum, scale, given coefficients; repeated ids; any kind of integers; one or several micro-batches."""
    for reduction, share in (("mean", 1 / 3), ("sum", 1.0)):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        backward(model, [0])
        with dit.Recorder(tmp_path / reduction, model, optimizer, reduction=reduction) as recorder:
            with recorder.step(IDS[kind]):
                optimizer.step()
            with recorder.step(IDS[kind], coefficients=[0.1, 0.2, 0.3]):
                optimizer.step()
            recorder.batch(IDS[kind], scale=0.5)
            recorder.batch([7], 0.25, coefficients=torch.tensor([3.0]))
            optimizer.step()
            recorder.batch([2, 4])
            with recorder.step():
                optimizer.step()
        run = dit.Trajectory.open(tmp_path / reduction)
        assert [run.batch_ids(t).tolist() for t in range(4)] == [[3, 3, 1], [3, 3, 1], [3, 3, 1, 7], [2, 4]]
        assert run.coefficients(0).tolist() == [share] * 3
        assert run.coefficients(1).tolist() == [0.1, 0.2, 0.3]
        assert run.coefficients(2).tolist() == [share * 0.5] * 3 + [0.75]
        assert run.micro_batches(1) == [slice(0, 3)] and run.micro_batches(2) == [slice(0, 3), slice(3, 4)]
        assert run.num_samples == 8


def test_ids_are_copied(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.tensor([1, 2])
    backward(model, ids)
    with dit.Recorder(tmp_path / "log", model, optimizer) as recorder:
        for _ in range(2):
            ids[:] = torch.tensor([1, 2])
            recorder.batch(ids)
            ids.fill_(9)
            optimizer.step()
            ids.fill_(8)
    run = dit.Trajectory.open(tmp_path / "log")
    assert run.batch_ids(0).tolist() == run.batch_ids(1).tolist() == [1, 2]


def test_a_closure_may_compute_gradients_and_name_batches(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with dit.Recorder(tmp_path / "log", model, optimizer) as recorder:

        def closure():
            optimizer.zero_grad()
            backward(model, [1, 2])
            recorder.batch([1, 2])

        optimizer.step(closure)
        optimizer.step(closure=closure)
    assert [dit.Trajectory.open(tmp_path / "log").batch_ids(t).tolist() for t in range(2)] == [[1, 2], [1, 2]]


def test_marks(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1) as recorder:
        with pytest.warns(RuntimeWarning, match="mark 'start' before the first step"):
            recorder.mark("start")
        train(model, optimizer, 5, recorder)
        recorder.mark("one")
        with pytest.raises(ValueError, match="mark 'one' was set before, at step 5"):
            recorder.mark("one")
        with pytest.raises(TypeError, match="non-empty string"):
            recorder.mark(3)
        train(model, optimizer, 3, recorder)
    run = dit.Trajectory.open(tmp_path / "log")
    assert run.marks == {"start": 0, "one": 5}
    assert [(w.name, w.start, w.stop) for w in run.windows("epochs")] == [("one", 0, 5), ("after one", 5, 8)]
    assert manifest(tmp_path / "log")["complete"] is True


def test_training_is_untouched(tmp_path):
    """Parameters, gradients, flags, buffers and random numbers are bit-equal to a run without a Recorder."""
    runs = []
    for record in (True, False):
        torch.manual_seed(0)
        np.random.seed(0)
        model = nn.Sequential(net(), nn.LayerNorm(2))
        model[1].eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(11)
        if record:
            with dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1) as recorder:
                history = train(model, optimizer, 9, recorder)
        else:
            history = train(model, optimizer, 9)
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        versions = [p._version for p in model.parameters()]
        flags = [m.training for m in model.modules()]
        hooks = (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks))
        runs.append((history, grads, versions, flags, hooks, torch.get_rng_state(), np.random.random()))
    with_log, without = runs
    assert str(with_log[:5]) == str(without[:5])
    for a, b in zip(with_log[0], without[0], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(with_log[1][name], without[1][name]) for name in without[1])
    assert torch.equal(with_log[5], without[5]) and with_log[6] == without[6]


# what is refused at construction


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1} | options))


def half_net():
    model = net()
    model[0].to(torch.bfloat16)
    return model


CONSTRUCTION = {
    "rmsprop": (
        net,
        lambda m: torch.optim.RMSprop(m.parameters()),
        {},
        dit.UnsupportedError,
        "torch.optim.rmsprop.RMSprop is not supported; supported: torch.optim.SGD, Adam and AdamW",
    ),
    "amsgrad": (
        net,
        lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True),
        {},
        dit.UnsupportedError,
        r"AdamW with amsgrad=True \(parameter group 0\)",
    ),
    "every": (net, sgd, {"every": 0}, ValueError, "every must be a positive integer"),
    "clip_norm": (net, sgd, {"clip_norm": -1.0}, ValueError, "clip_norm must be a positive number"),
    "two clips": (net, sgd, {"clip_norm": 1.0, "clip_value": 1.0}, ValueError, "clip_norm or clip_value, not both"),
    "log_dtype": (net, sgd, {"log_dtype": "int8"}, ValueError, 'log_dtype must be "bfloat16", "float16" or None'),
    "foreign parameter": (
        net,
        lambda m: torch.optim.SGD([*m.parameters(), torch.ones(7)], lr=0.1),
        {},
        ValueError,
        r"group 0 .* shape \(7,\)",
    ),
    "nothing to train": (net, lambda m: sgd(m.requires_grad_(False)), {}, ValueError, "no trainable parameter"),
    "half precision": (half_net, sgd, {}, dit.UnsupportedError, r"'0.weight' is torch.bfloat16"),
    "reduction": (net, sgd, {"reduction": "none"}, ValueError, 'reduction must be "mean" or "sum"'),
    "num_samples": (net, sgd, {"num_samples": 0}, ValueError, "num_samples must be a positive integer"),
    "chunk_bytes": (net, sgd, {"chunk_bytes": 1.5}, ValueError, "chunk_bytes must be a positive integer"),
    "no module": (lambda: 3, lambda m: sgd(net()), {}, TypeError, "model must be a torch.nn.Module"),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_refused_at_construction(tmp_path, case):
    make, optimize, options, error, message = CONSTRUCTION[case]
    model = make()
    with pytest.raises(error, match=message):
        dit.Recorder(tmp_path / "log", model, optimize(model), **options)
    assert not (tmp_path / "log").exists()


def test_an_existing_log_is_refused_or_overwritten(tmp_path):
    model = net()
    optimizer = sgd(model)
    with dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1) as recorder:
        history = train(model, optimizer, 9, recorder)
    (tmp_path / "log/notes.txt").write_text("mine")
    with pytest.raises(dit.LogError, match=r"holds a log already; .*overwrite=True"):
        dit.Recorder(tmp_path / "log", model, optimizer)
    assert_rows(tmp_path / "log", history)
    with dit.Recorder(tmp_path / "log", model, optimizer, overwrite=True) as recorder:
        history = train(model, optimizer, 2, recorder)
    assert assert_rows(tmp_path / "log", history).num_steps == 2
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == [
        "chunk-000000.safetensors",
        "constants.safetensors",
        "manifest.json",
        "notes.txt",
    ]


def test_two_recorders_on_one_run(tmp_path):
    model = net()
    optimizer = sgd(model)
    recorder = dit.Recorder(tmp_path / "log", model, optimizer)
    with pytest.raises(dit.LogError, match="this optimizer is being recorded already"):
        dit.Recorder(tmp_path / "other", model, optimizer)
    with pytest.raises(dit.LogError, match="another Recorder writes to"):
        dit.Recorder(tmp_path / "log", model, sgd(model))
    recorder.close()
    with dit.Recorder(tmp_path / "log", model, optimizer) as recorder:
        history = train(model, optimizer, 2, recorder)
    assert_rows(tmp_path / "log", history)


def test_a_run_without_a_step_leaves_no_log(tmp_path):
    model = net()
    recorder = dit.Recorder(tmp_path / "log", model, sgd(model))
    with pytest.warns(RuntimeWarning, match="mark 'start' before the first step"):
        recorder.mark("start")
    recorder.close()
    with pytest.raises(dit.LogError, match="holds no log"):
        dit.Trajectory.open(tmp_path / "log")


# what is refused at a step: (model, optimizer, recorder, do(model, optimizer, recorder) at step 3, error, message)


def stepping(change):
    """An ordinary step after `change(model, optimizer)`."""

    def do(model, optimizer, recorder):
        change(model, optimizer)
        with recorder.step([1, 2]):
            optimizer.step()

    return do


def naming(*args, **kwargs):
    def do(model, optimizer, recorder):
        with recorder.step(*args, **kwargs):
            optimizer.step()

    return do


def twice(model, optimizer, recorder):
    with recorder.step([1]):
        optimizer.step()
        optimizer.step()


def never(model, optimizer, recorder):
    with recorder.step([1]):
        pass


def nested(model, optimizer, recorder):
    with recorder.step([1]), recorder.step([2]):
        optimizer.step()


def named_twice(model, optimizer, recorder):
    recorder.batch([1])
    with recorder.step([2]):
        optimizer.step()


def naming_rows(model, optimizer, recorder):
    optimizer.zero_grad()
    backward(model, [1, 2, 3, 4, 5])
    with recorder.step([1, 2, 3, 4]):
        optimizer.step()


def sparse_gradient(model, optimizer):
    model[0].weight.grad = model[0].weight.grad.to_sparse()


@torch.no_grad()
def in_place(model, optimizer):
    model[0].weight[1, 1] += 1e-6


def through_data(model, optimizer):
    model[2].bias.data = model[2].bias.data * 1.01


def add_group(model, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def buffer_in_place(model, optimizer):
    model.get_buffer("scale").add_(1)


def buffer_replaced(model, optimizer):
    model.scale = model.scale + 1


def frozen_changed(model, optimizer):
    model.frozen.add_(1)


def set_eval(model, optimizer):
    model[1].eval()


def turn_double(model, optimizer):
    model[0].weight.grad = None
    model[0].weight.data = model[0].weight.data.double()


STEP = {
    "no ids": (lambda m, o, r: o.step(), dit.LogError, r"step 3: optimizer.step\(\) without ids"),
    "not entered": (lambda m, o, r: (r.step([1]), o.step()), dit.LogError, r"step 3: optimizer.step\(\) without ids"),
    "twice": (twice, dit.LogError, r"step 4: a second optimizer.step\(\) within one recorder.step"),
    "never": (never, dit.LogError, r"step 3: .* without optimizer.step\(\); nothing was logged"),
    "nested": (nested, dit.LogError, "step 3: .* within another"),
    "named twice": (named_twice, dit.LogError, r"step 3: samples were named by recorder.batch\(\) and again"),
    "float ids": (naming([0.5]), TypeError, "step 3: ids must be integers"),
    "bool ids": (naming(torch.tensor([True])), TypeError, "step 3: ids must be integers"),
    "text ids": (naming(["a"]), TypeError, "step 3: ids must be integers"),
    "2-D ids": (naming([[1, 2]]), ValueError, "step 3: ids must be one-dimensional"),
    "empty ids": (naming([]), ValueError, "step 3: ids is empty"),
    "negative ids": (naming([4, -2]), ValueError, "step 3: id -2 is negative"),
    "ids outside": (naming([4, N]), ValueError, f"step 3: id {N} is outside the samples 0..{N - 1}"),
    "coefficients": (naming([4, 5], [0.1]), ValueError, "step 3: coefficients must be finite, one per id"),
    "NaN coefficients": (naming([4], [np.nan]), ValueError, "step 3: coefficients must be finite"),
    "coefficients alone": (naming(coefficients=[1.0]), ValueError, "step 3: coefficients or a batch without ids"),
    "fewer ids than rows": (naming_rows, ValueError, r"step 3: 4 ids for a model input of shape \[5, 3\]; name the sample"),
    "scale": (lambda m, o, r: r.batch([1], scale=np.inf), ValueError, "step 3: scale must be finite"),
    "sparse gradient": (stepping(sparse_gradient), dit.UnsupportedError, "step 3: parameter '0.weight' has a sparse gradient"),
    "momentum later": (
        stepping(lambda m, o: o.param_groups[0].update(momentum=0.5)),
        dit.UnsupportedError,
        "step 3: momentum was 0 when recording began",
    ),
    "another group": (stepping(add_group), dit.LogError, "step 3: the optimizer's parameters are not those"),
    "changed in place": (stepping(in_place), dit.LogError, "step 3: parameter '0.weight' was changed"),
    "changed by .data": (stepping(through_data), dit.LogError, "step 3: parameter '2.bias' was changed"),
    "changed dtype": (stepping(turn_double), dit.LogError, "step 3: parameter '0.weight' was changed"),
    "buffer in place": (stepping(buffer_in_place), dit.LogError, "step 3: buffer 'scale' changed"),
    "buffer replaced": (stepping(buffer_replaced), dit.LogError, "step 3: buffer 'scale' changed"),
    "frozen parameter": (stepping(frozen_changed), dit.LogError, "step 3: frozen parameter 'frozen' changed"),
    "flags": (stepping(set_eval), dit.LogError, r"step 3: module '1' \(Tanh\) was in train mode at the first step"),
}


@pytest.mark.parametrize("case", STEP)
def test_refused_at_a_step(tmp_path, case):
    """The error names the step, the steps before are in the log, and the refused step did not move the parameters."""
    do, error, message = STEP[case]
    model = net()
    model.register_buffer("scale", torch.ones(2))
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with (
        pytest.raises(error, match=message) as caught,
        dit.Recorder(tmp_path / "log", model, optimizer, num_samples=N) as recorder,
    ):
        history = [{n: p for n, p in row.items() if n != "frozen"} for row in train(model, optimizer, 3, recorder)]
        do(model, optimizer, recorder)
    assert "\n" not in str(caught.value)
    if case == "twice":
        history.append({name: p for name, p in state(model).items() if name != "frozen"})
    assert assert_rows(tmp_path / "log", history).num_steps == len(history) - 1
    assert manifest(tmp_path / "log")["complete"] is False
    if case not in ("changed in place", "changed by .data", "changed dtype"):
        assert all(torch.equal(p.detach(), history[-1][n]) for n, p in model.named_parameters() if n != "frozen")


def test_an_error_that_is_caught_does_not_end_the_log(tmp_path):
    model = net()
    optimizer = sgd(model)
    with dit.Recorder(tmp_path / "log", model, optimizer) as recorder:
        backward(model, [1])
        for refused in (naming([0.5]), never, lambda m, o, r: o.step(), nested, naming([])):
            with pytest.raises((dit.LogError, TypeError, ValueError)):
                refused(model, optimizer, recorder)
        history = train(model, optimizer, 3, recorder)
    run = assert_rows(tmp_path / "log", history)
    assert run.batch_ids(0).tolist() == batches(3)[0].tolist() and run.num_steps == 3


def test_buffers_may_be_written_with_the_value_they_have(tmp_path):
    model = net()
    model.register_buffer("scale", torch.ones(2))
    optimizer = sgd(model)
    with dit.Recorder(tmp_path / "log", model, optimizer) as recorder:
        for _ in range(2):
            train(model, optimizer, 1, recorder)
            model.scale.copy_(torch.ones(2))
            model.scale = torch.ones(2)
    assert dit.Trajectory.open(tmp_path / "log").num_steps == 2


def test_a_buffer_changed_behind_the_version_counter_is_found_at_close(tmp_path):
    model = net()
    model.register_buffer("scale", torch.ones(2))
    optimizer = sgd(model)
    recorder = dit.Recorder(tmp_path / "log", model, optimizer)
    train(model, optimizer, 2, recorder)
    model.scale.numpy()[0] = 5
    with pytest.raises(dit.LogError, match="step 2: buffer 'scale' changed"):
        recorder.close()


UNSUPPORTED_MODULES = {
    "batch norm": (lambda: nn.BatchNorm1d(2), "BatchNorm1d '1' is in train mode"),
    "instance norm": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 2)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten()),
        "InstanceNorm1d '1.1' updates running statistics",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED_MODULES)
def test_modules_are_refused_at_the_first_step_and_fine_in_eval_mode(tmp_path, case):
    make, message = UNSUPPORTED_MODULES[case]
    model = nn.Sequential(net(), make())
    before = state(model)
    optimizer = sgd(model)
    with pytest.raises(dit.UnsupportedError, match=message), dit.Recorder(tmp_path / "log", model, optimizer) as recorder:
        train(model, optimizer, 1, recorder)
    assert all(torch.equal(before[n], p) for n, p in state(model).items())
    model[1].eval()
    with dit.Recorder(tmp_path / "log", model, optimizer) as recorder:
        history = train(model, optimizer, 2, recorder)
    assert assert_rows(tmp_path / "log", history).training_flags["1"] is False


@pytest.mark.parametrize("change", [in_place, through_data])
def test_parameters_changed_before_close(tmp_path, change):
    model = net()
    optimizer = sgd(model)
    recorder = dit.Recorder(tmp_path / "log", model, optimizer)
    history = train(model, optimizer, 3, recorder)
    change(model, optimizer)
    with pytest.raises(dit.LogError, match=r"step 3: parameter '.*' was changed"):
        recorder.close()
    assert assert_rows(tmp_path / "log", history).num_steps == 3
    assert manifest(tmp_path / "log")["complete"] is False
    recorder.close()  # a second time is nothing


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_parameters_that_are_not_finite(tmp_path, value, chunk_bytes):
    model = net()
    optimizer = sgd(model)
    bad = pytest.raises(dit.LogError, match=r"step 5 left NaN or infinity in parameter '0.bias'")
    with bad, dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=chunk_bytes) as recorder:
        history = train(model, optimizer, 5, recorder)
        backward(model, [1])
        model[0].bias.grad[2] = value
        with recorder.step([1]):
            optimizer.step()
        recorder.close()
    assert assert_rows(tmp_path / "log", history).num_steps == 5


def test_a_run_that_begins_with_nan(tmp_path):
    model = net()
    model[0].weight.data[0, 0] = np.inf
    optimizer = sgd(model)
    begins = pytest.raises(dit.LogError, match=r"begins with NaN or infinity in parameter '0.weight'")
    with begins, dit.Recorder(tmp_path / "log", model, optimizer) as recorder, recorder.step([1]):
        optimizer.step()
    assert dit.Trajectory.open(tmp_path / "log").num_steps == 0


class Mine(Exception):
    pass


def test_the_users_exception_is_not_masked(tmp_path):
    model = net()
    optimizer = sgd(model)
    with pytest.raises(Mine) as caught, dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1) as recorder:
        history = train(model, optimizer, 6, recorder)
        with recorder.step([1]):
            raise Mine
    assert not hasattr(caught.value, "__notes__")
    assert assert_rows(tmp_path / "log", history).num_steps == 6
    assert manifest(tmp_path / "log")["complete"] is False
    with pytest.raises(Mine) as caught, dit.Recorder(tmp_path / "two", model, optimizer) as recorder:
        history = train(model, optimizer, 6, recorder)
        in_place(model, optimizer)
        raise Mine
    assert "step 6: parameter '0.weight' was changed" in caught.value.__notes__[0]
    assert assert_rows(tmp_path / "two", history).num_steps == 6


def test_after_close_nothing_is_recorded_or_hindered(tmp_path):
    model = net()
    optimizer = sgd(model)
    with dit.Recorder(tmp_path / "log", model, optimizer) as recorder:
        history = train(model, optimizer, 2, recorder)
    train(model, optimizer, 2)
    for call in (lambda: recorder.step([1]), lambda: recorder.batch([1]), lambda: recorder.mark("x"), recorder.__enter__):
        with pytest.raises(dit.LogError, match="is closed"):
            call()
    assert assert_rows(tmp_path / "log", history).num_steps == 2
    assert not [thread for thread in threading.enumerate() if "dit_fast" in thread.name]


# the disk


class FailingFile:
    """A file that fails as a full disk does, half-way through a write, once `room` bytes are used up."""

    room = 0

    def __init__(self, file):
        self._file = file

    def write(self, data):
        if len(data) > FailingFile.room:
            self._file.write(data[: FailingFile.room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FailingFile.room -= len(data)
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


@pytest.mark.parametrize("room", [0, 30, 1800, 3000, 5000, 9000, 15000])
def test_a_full_disk(tmp_path, monkeypatch, room):
    """The error reaches a later call; the log holds finished chunks only; training up to there is as without a log."""
    model, twin = net(), net()
    optimizer = sgd(model)
    FailingFile.room = room
    monkeypatch.setattr(log_module, "open", lambda *args, **kw: FailingFile(open(*args, **kw)), raising=False)  # noqa: SIM115
    full = pytest.raises(dit.LogError, match=r"cannot write the log at .*log.*: No space left on device")
    with full, dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1) as recorder:
        train(model, optimizer, 60, recorder)
    assert room < 100 or recorder.num_steps > 0
    history = train(twin, sgd(twin), 60)
    assert all(torch.equal(p, history[recorder.num_steps][name]) for name, p in state(model).items())
    assert not list((tmp_path / "log").glob("*.partial")) and not list((tmp_path / "log").glob(".*"))
    if (tmp_path / "log/manifest.json").exists():
        assert assert_rows(tmp_path / "log", history).num_steps % 4 == 0
        assert manifest(tmp_path / "log")["complete"] is False
    else:
        assert room <= 1800


class HesitantFile(FailingFile):
    """A file that takes a few bytes at a time, as the operating system may."""

    def write(self, data):
        return self._file.write(data[:100])


def test_short_writes(tmp_path, monkeypatch):
    model = net()
    optimizer = sgd(model)
    monkeypatch.setattr(log_module, "open", lambda *args, **kw: HesitantFile(open(*args, **kw)), raising=False)  # noqa: SIM115
    with dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1) as recorder:
        history = train(model, optimizer, 9, recorder)
    assert assert_rows(tmp_path / "log", history).num_steps == 9


class SlowFile(FailingFile):
    """A file on a disk of so many bytes per second."""

    speed = 1e6

    def write(self, data):
        time.sleep(len(data) / self.speed)
        return self._file.write(data)


def slow_run(path, monkeypatch, steps=24, action="always", **options):
    """At least 10 ms a step, 80 kB of parameters each; the warnings of the whole run."""
    monkeypatch.setattr(log_module, "open", lambda *args, **kw: SlowFile(open(*args, **kw)), raising=False)  # noqa: SIM115
    monkeypatch.setattr(background_module, "SLOW_SECONDS", 0.1)
    model = nn.Linear(200, 100, bias=False)
    optimizer = sgd(model)
    with (
        warnings.catch_warnings(record=True) as caught,
        dit.Recorder(path, model, optimizer, chunk_bytes=400_000, queue_chunks=1, **options) as recorder,
    ):
        warnings.simplefilter(action)
        for ids in batches(steps):
            time.sleep(0.01)
            optimizer.zero_grad()
            model(torch.ones(5, 200)).square().mean().backward()
            with recorder.step(ids):
                optimizer.step()
    assert dit.Trajectory.open(path).num_steps == steps
    return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


def test_a_slow_disk_is_named_once_with_the_k_that_would_do(tmp_path, monkeypatch):
    messages = slow_run(tmp_path / "log", monkeypatch)
    assert len(messages) == 1
    pattern = r"the log needs (\S+) MB/s, the disk reaches (\S+) MB/s; Recorder\(\.\.\., every=(\d+)\)"
    needed, reached, every = re.search(pattern, messages[0]).groups()
    assert 0.5 < float(reached) <= 1.0
    assert (
        float(reached) < float(needed) <= 100 * 4 / 3 * 0.08
    )  # at most 100 steps a second, a row repeated in every chunk of four
    assert slow_run(tmp_path / "sparse", monkeypatch, every=int(every)) == []


def test_a_fast_disk_is_not_named(tmp_path, monkeypatch):
    monkeypatch.setattr(SlowFile, "speed", 1e9)
    assert slow_run(tmp_path / "log", monkeypatch) == []


@pytest.mark.parametrize(("waited", "elapsed", "is_slow"), [(1.5, 10, True), (1.5, 100, False), (0.5, 1, False)])
def test_what_counts_as_slow(tmp_path, waited, elapsed, is_slow):
    """More than a second, and more than a tenth of the run."""
    model = net()
    optimizer = sgd(model)
    with dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1) as recorder:
        train(model, optimizer, 9, recorder)
        writer = recorder._recording.writer
        deadline = time.perf_counter() + 10
        while not writer._log.num_steps and time.perf_counter() < deadline:
            time.sleep(0.01)
        writer._pace.waited, writer._pace.began = waited, time.perf_counter() - elapsed
        with pytest.warns(RuntimeWarning, match="slower than the run") if is_slow else contextlib.nullcontext():
            writer.warn_if_slow()


def test_a_slow_disk_as_an_error_leaves_a_whole_log(tmp_path, monkeypatch):
    """Where the user turns warnings into errors, the step it comes in is refused and those before are written."""
    with pytest.raises(RuntimeWarning, match=r"the disk under .* is slower than the run"):
        slow_run(tmp_path / "log", monkeypatch, action="error")
    run = dit.Trajectory.open(tmp_path / "log")
    run.verify()
    assert 0 < run.num_steps < 24


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_an_error_of_the_writer_reaches_the_next_call(tmp_path, monkeypatch, name):
    model = net()
    optimizer = sgd(model)
    recorder = dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1)
    history = train(model, optimizer, 2, recorder)
    failed = threading.Event()

    def fail(*args):
        failed.set()
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(log_module.os, name, fail)
    train(model, optimizer, 2, recorder)
    with contextlib.suppress(dit.LogError):  # the writer may have failed by now
        recorder.mark("queued behind the failure")
    assert failed.wait(5)
    recorder._recording.writer._jobs.put((None, {}, False))
    message = "cannot write the log at .*: Read-only file system; it holds 0 steps"
    deadline = 500
    while recorder._recording.writer._error is None and deadline:
        threading.Event().wait(0.01)
        deadline -= 1
    for call in (lambda: recorder.step([1]), lambda: recorder.batch([1]), lambda: recorder.mark("m"), recorder.close):
        with pytest.raises(dit.LogError, match=message):
            call()
    monkeypatch.undo()
    assert assert_rows(tmp_path / "log", history).num_steps == 0


def test_a_path_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    model = net()
    for path in (tmp_path / "file", tmp_path / "file/log"):
        with pytest.raises(dit.LogError, match=r"cannot write a log at .*file.*: (Not a directory|File exists)"):
            dit.Recorder(path, model, sgd(model))


def test_a_manifest_that_appears_before_the_first_step(tmp_path):
    model = net()
    optimizer = sgd(model)
    recorder = dit.Recorder(tmp_path / "log", model, optimizer)
    (tmp_path / "log/manifest.json").write_text("{}")
    with pytest.raises(dit.LogError, match="does another Recorder write there"):
        train(model, optimizer, 1, recorder)
    assert (tmp_path / "log/manifest.json").read_text() == "{}"
    recorder.close()


def test_a_slow_disk_holds_the_loop_and_loses_nothing(tmp_path, monkeypatch):
    model = net()
    optimizer = sgd(model)
    real = os.fsync
    monkeypatch.setattr(log_module.os, "fsync", lambda fd: (threading.Event().wait(0.01), real(fd))[1])
    with dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1, queue_chunks=1) as recorder:
        history = train(model, optimizer, 41, recorder)
    assert assert_rows(tmp_path / "log", history).num_steps == 41


# parameters on a GPU


class NoEvent:
    """Stands for a CUDA event where there is no GPU; `waited` counts the writer's waits."""

    waited = 0

    def record(self, stream):
        pass

    def synchronize(self):
        NoEvent.waited += 1


class NoStream:
    def wait_event(self, event):
        pass


@pytest.fixture
def device_path(monkeypatch):
    """The code for parameters on a GPU, run on the CPU: its order of copies, flags and errors, though not its overlap."""

    class Rows(DeviceRows):
        pinned = False

    monkeypatch.setattr(recording_module, "HostRows", Rows)
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: NoStream())


@pytest.mark.parametrize("change_at", [4, 7, 8, 9, 11])
def test_device_rows(tmp_path, device_path, change_at):
    """A change between steps is seen by the writer: the log ends before it, whatever came after."""
    model = net()
    optimizer = sgd(model)
    NoEvent.waited = 0
    with dit.Recorder(tmp_path / "whole", model, optimizer, chunk_bytes=1) as recorder:
        history = train(model, optimizer, 11, recorder)
    assert assert_rows(tmp_path / "whole", history).num_steps == 11
    assert NoEvent.waited == 3  # once a chunk, by the writer thread
    changed = pytest.raises(dit.LogError, match=f"step {change_at}: parameters were changed")
    with changed, dit.Recorder(tmp_path / "changed", model, optimizer, chunk_bytes=1) as recorder:
        history = train(model, optimizer, change_at, recorder)
        through_data(model, optimizer)
        train(model, optimizer, 11 - change_at, recorder)
    assert assert_rows(tmp_path / "changed", history).num_steps == change_at


@pytest.mark.parametrize("bad_at", [3, 4, 6])
def test_device_rows_that_are_not_finite(tmp_path, device_path, bad_at):
    model = net()
    optimizer = sgd(model)
    bad = pytest.raises(dit.LogError, match=f"step {bad_at} left NaN or infinity in parameter '0.bias'")
    with bad, dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1) as recorder:
        history = train(model, optimizer, bad_at, recorder)
        model[0].bias.grad[2] = float("nan")
        with recorder.step([1]):
            optimizer.step()
        train(model, optimizer, 4, recorder)
    assert assert_rows(tmp_path / "log", history).num_steps == bad_at


@pytest.mark.cuda
def test_parameters_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        assert os.environ.get("DIT_FAST_REQUIRE_CUDA") != "1", "DIT_FAST_REQUIRE_CUDA=1, but there is no CUDA device"
        pytest.skip("no CUDA device")
    model = net().cuda()
    optimizer = sgd(model)
    (x, y), history = data(), [state(model)]
    side = torch.cuda.Stream()
    with dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1, queue_chunks=1) as recorder:
        for t, ids in enumerate(batches(30)):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side if t % 3 == 0 else torch.cuda.current_stream()):
                optimizer.zero_grad()
                (model(x[ids].cuda()) - y[ids].cuda()).square().mean().backward()
                with recorder.step(ids):
                    optimizer.step()
            torch.cuda.current_stream().wait_stream(side)
            history.append(state(model))
    run = assert_rows(tmp_path / "log", [{n: p.cpu() for n, p in row.items()} for row in history])
    assert run.num_steps == 30
    changed = pytest.raises(dit.LogError, match="step 5: parameters were changed")
    with changed, dit.Recorder(tmp_path / "changed", model, optimizer) as recorder:
        for t, ids in enumerate(batches(9)):
            if t == 5:
                through_data(model, optimizer)
            with recorder.step(ids):
                optimizer.step()
    assert dit.Trajectory.open(tmp_path / "changed").num_steps == 5


@pytest.mark.parametrize("room", [0, 2])
def test_no_memory_for_buffers(tmp_path, monkeypatch, room):
    model = net()
    optimizer = sgd(model)
    made = []

    def short(*args):
        if len(made) == room:
            raise RuntimeError("not enough memory")
        made.append(ChunkBuffer(*args))
        return made[-1]

    monkeypatch.setattr(recording_module, "ChunkBuffer", short)
    none_left = pytest.raises(dit.LogError, match=r"no memory for the buffers .*not enough memory.*smaller chunk_bytes")
    with none_left, dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=1) as recorder:
        train(model, optimizer, 40, recorder)
    assert dit.Trajectory.open(tmp_path / "log").num_steps == 0
    assert not [thread for thread in threading.enumerate() if "dit_fast" in thread.name]


CHILDREN = Path(__file__).with_name("recorder_children.py")


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Runs that were killed, ran out of room, forked or forgot close(), all in one interpreter that loads torch once."""
    folder = tmp_path_factory.mktemp("children")
    done = subprocess.run([sys.executable, CHILDREN, folder], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def expected_history():
    model = net()
    return train(model, sgd(model), 200)


def test_killed_runs(children):
    """SIGKILL at every kind of system call, some in the middle of a write, and at random moments."""
    folder, report = children
    history = expected_history()
    seen = set()
    for name in report["killed"]:
        path = folder / name
        if not (path / "manifest.json").exists():
            seen.add(None)
            continue
        run = assert_rows(path, history)
        for t in range(run.num_steps):
            assert torch.equal(run.batch_ids(t), batches(200)[t])
        assert manifest(path)["complete"] is False
        seen.add(run.num_steps)
    assert None in seen and 0 in seen and 4 in seen and 8 in seen and max(s or 0 for s in seen) >= 12


def test_a_killed_run_leaves_a_path_that_is_refused_or_overwritten(children, tmp_path):
    folder, _ = children
    path = folder / "replace-9-True"
    model = net()
    with pytest.raises(dit.LogError, match="overwrite=True"):
        dit.Recorder(path, model, sgd(model))


def test_a_limit_on_file_sizes(children):
    """A true error of the operating system: RLIMIT_FSIZE stands for a full disk."""
    folder, report = children
    assert "cannot write the log at" in report["limit"]["error"] and "File too large" in report["limit"]["error"]
    run = assert_rows(folder / "limit", expected_history())
    assert run.num_steps == 0 and report["limit"]["steps"] > 0


def test_a_forked_child_does_not_write(children):
    folder, report = children
    assert "belongs to process" in report["fork"]["error"]
    assert assert_rows(folder / "fork", expected_history()).num_steps == 9
    assert manifest(folder / "fork")["complete"] is True


def test_a_program_that_forgets_close(children):
    folder, _ = children
    assert assert_rows(folder / "forgotten", expected_history()).num_steps == 6
    assert manifest(folder / "forgotten")["complete"] is False


@pytest.mark.parametrize("every", [1, 3])
def test_flush_puts_everything_on_disk(tmp_path, every):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    recorder = dit.Recorder(tmp_path / "log", model, optimizer, every=every)
    recorder.flush()  # nothing to write yet
    history = train(model, optimizer, 5, recorder)
    recorder.mark("five")
    recorder.flush()
    recorder.flush()
    halfway = dit.Trajectory.open(tmp_path / "log")
    assert halfway.num_steps == 5 and halfway.marks == {"five": 5}
    assert all(torch.equal(value, history[5][name]) for name, value in halfway.params(5).items())
    history += train(model, optimizer, 4, recorder)[1:]
    recorder.close()
    run = dit.Trajectory.open(tmp_path / "log")
    run.verify()
    assert run.num_steps == 9 and run.segment(5)[0] == 5 and run.state(5) is not None
    for t in range(10):
        if run.has_params(t):
            assert all(torch.equal(value, history[t][name]) for name, value in run.params(t).items())
    with pytest.raises(dit.LogError, match="is closed"):
        recorder.flush()


def test_a_step_that_is_not_finite_between_stored_ones(tmp_path):
    model = net()
    optimizer = sgd(model)
    bad = pytest.raises(dit.LogError, match=r"step 4 left NaN or infinity in parameter '0.bias'")
    with bad, dit.Recorder(tmp_path / "log", model, optimizer, every=3) as recorder:
        train(model, optimizer, 4, recorder)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, [1])
            model[0].bias.grad[2] = np.nan
            with recorder.step([1]):
                optimizer.step()
    assert dit.Trajectory.open(tmp_path / "log").num_steps == 3


def test_batches_that_no_step_followed_are_said(tmp_path):
    model = net()
    optimizer = sgd(model)
    recorder = dit.Recorder(tmp_path / "log", model, optimizer)
    train(model, optimizer, 2, recorder)
    recorder.batch([1, 2])
    with pytest.warns(RuntimeWarning, match=r"step 2: 1 batches were named and no optimizer.step\(\) followed"):
        recorder.close()
    assert dit.Trajectory.open(tmp_path / "log").num_steps == 2
