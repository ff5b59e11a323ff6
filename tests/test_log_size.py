"""Sizes stated before a run, against logs really written; every="auto"."""

import re

import pytest
import torch
from torch import nn

import dit_fast as dit
from dit_fast.byte_sizes import format_bytes, parse_bytes
from dit_fast.log import Header

N, BATCH = 40, 6
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-3),
    "two_groups": lambda params: torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 1e-4}], lr=1e-3),
}


def net(width=8):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3), nn.BatchNorm1d(3).eval(), nn.Linear(3, 2))
    for p in model[3:].parameters():
        p.requires_grad_(False)
    return model


def record(path, optimizer, steps=23, width=8, **options):
    """The log's directory, size and Recorder; the model is in eval mode, so that batch normalization is taken."""
    model = net(width).eval()
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    x, y = torch.randn(N, 5), torch.randn(N, 2)
    with dit.Recorder(path, model, made, **options) as recorder:
        for _ in range(steps):
            ids = torch.randint(N, (BATCH,))
            made.zero_grad()
            (model(x[ids]) - y[ids]).square().mean().backward()
            with recorder.step(ids):
                made.step()
    return recorder, sum(file.stat().st_size for file in path.iterdir())


def estimate(optimizer, steps=23, width=8, **options):
    model = net(width).eval()
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    return dit.estimate_log(model, made, steps=steps, batch_size=BATCH, **options)


@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize("log_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_log_is_as_large_as_was_said(tmp_path, optimizer, every, log_dtype, width):
    options = {"every": every, "log_dtype": log_dtype, "chunk_bytes": 500 if width == 8 else 5000}
    recorder, size = record(tmp_path / "log", optimizer, width=width, **options)
    said = estimate(optimizer, width=width, **options)
    assert said.disk_bytes == pytest.approx(size, rel=0.01)
    assert said.bytes_per_step == said.disk_bytes / 23
    assert said.num_chunks == len(list((tmp_path / "log").glob("chunk-*"))) > 1
    assert said.parameters_replayed == (every > 1) and said.state_replayed == (optimizer != "sgd")
    # what the Recorder really held: its buffers (three, alike) and the row that comparisons need
    buffer, rows = recorder._recording._buffer, recorder._recording._rows
    tensors = (buffer.rows, buffer.state, buffer.counts)
    held = 3 * sum(t.numel() * t.element_size() for t in tensors)
    held += 0 if rows._own is None else rows._own.numel() * rows._own.element_size()
    constants = sum(b.numel() * b.element_size() for b in net().buffers())
    assert said.memory_bytes == held + 3 * 16 * BATCH * said.steps_per_chunk + constants
    assert buffer.capacity == said.steps_per_chunk


def test_a_wrong_size_would_be_seen(tmp_path):
    """The negative control: another k, and another dtype, are off by more than the tolerance."""
    _, size = record(tmp_path / "log", "adam", width=300, every=5)
    for options in ({"every": 1}, {"every": 4}, {"every": 5, "log_dtype": "bfloat16"}):
        assert estimate("adam", width=300, **options).disk_bytes != pytest.approx(size, rel=0.01)


def test_an_estimate_reads_as_a_sentence():
    assert re.fullmatch(
        r"LogEstimate\(1,000 steps of 75 parameters, every=5: \S+ KiB on disk, \S+ B per step, 2 chunks of up to 510 steps, "
        r"\S+ KiB of memory; replayed: parameters, state\)",
        repr(estimate("adam", steps=1000, every=5)),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a positive integer"),
        ({"every": "auto"}, "every must be a positive integer"),
        ({"log_dtype": "float32"}, "log_dtype must be"),
    ],
)
def test_estimate_log_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        estimate("sgd", **options)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        dit.estimate_log(net(), torch.optim.SGD(net().parameters(), 0.1), steps=3, batch_size=0)
    with pytest.raises(ValueError, match="no trainable parameter of the model"):
        dit.estimate_log(net(), torch.optim.SGD(net().parameters(), 0.1), steps=3, batch_size=1)
    half = net().half()
    with pytest.raises(dit.UnsupportedError, match="float16; float32 and float64 are supported"):
        dit.estimate_log(half, torch.optim.SGD(half.parameters(), 0.1), steps=3, batch_size=1)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("share", [1.01, 0.7, 0.35, 0.2])
def test_auto_takes_the_smallest_k_that_fits(tmp_path, optimizer, share):
    steps, width = 60, 300
    sizes = {k: estimate(optimizer, steps, width, every=k).disk_bytes for k in range(1, steps + 1)}
    budget = int(share * sizes[1])
    fits = [k for k, size in sizes.items() if size <= budget]
    recorder, size = record(tmp_path / "log", optimizer, steps, width, every="auto", disk_budget=budget, total_steps=steps)
    assert recorder.every == dit.Trajectory.open(tmp_path / "log").every == fits[0]
    assert size <= budget


def test_auto_that_fits_nowhere_says_what_would_be_needed(tmp_path):
    with pytest.raises(
        ValueError, match=r"no every=k fits disk_budget = 20 KiB: 23 steps take .* KiB with every=1 and .* with every=23"
    ):
        record(tmp_path / "log", "adam", width=300, every="auto", disk_budget="20KiB", total_steps=23)


def test_many_steps_are_decided_quickly():
    from dit_fast.log_size import DiskBudget, choose_every

    header = Header({"w": (torch.Size([1000]), torch.float32)}, {"w": 0}, (dit.SGD(),))
    every = choose_every(header, DiskBudget(100 * 1_000_000, 1_000_000, 2), 64 << 20)
    assert 100 < every < 1_000_000
    with pytest.raises(ValueError, match="no every=k fits"):
        choose_every(header, DiskBudget(90 * 1_000_000, 1_000_000, 2), 64 << 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": "auto"}, 'every="auto" needs disk_budget'),
        ({"every": "auto", "disk_budget": 10**6}, "total_steps, the number of steps of the run"),
        ({"every": "auto", "disk_budget": "much", "total_steps": 3}, "disk_budget 'much' is not understood"),
        ({"every": "auto", "disk_budget": 10**6, "total_steps": 0}, "total_steps must be a positive integer"),
        ({"every": 2, "disk_budget": 10**6}, 'are for every="auto"'),
        ({"every": "often"}, "every must be a positive integer"),
        ({"every": None}, "every must be a positive integer"),
    ],
)
def test_auto_refuses_arguments_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        record(tmp_path / "log", "sgd", **options)


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("500 MB", 5 * 10**8), ("1.5k", 1500), (12, 12), ("7", 7), ("3 tib", 3 << 40)]
)
def test_bytes_as_people_write_them(text, size):
    assert parse_bytes(text, "x") == size


def test_bytes_as_people_read_them():
    assert [format_bytes(n) for n in (0, 999, 1000, 123456789, 5 << 40)] == ["0 B", "999 B", "0.977 KiB", "118 MiB", "5 TiB"]


def test_auto_counts_stored_batches_and_random_states(tmp_path):
    steps = 40
    model = nn.Sequential(nn.Linear(20, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    budget = 60_000 + steps * (5056 + 4 * (20 * 4 + 8))
    with dit.Recorder(
        tmp_path / "log", model, optimizer, every="auto", disk_budget=budget, total_steps=steps, store_batches=True
    ) as recorder:
        for _ in range(steps):
            x, y = torch.randn(4, 20), torch.randint(2, (4,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            with recorder.step(range(4), batch=(x, y)):
                optimizer.step()
    size = sum(file.stat().st_size for file in (tmp_path / "log").iterdir())
    assert 0.5 * budget < size <= budget
