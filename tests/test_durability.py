"""The log's promises under accidents: processes killed at any moment, files damaged in any way, many steps."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from durability_children import RUNS, STEPS, TRIALS
from test_log import edit_manifest
from test_resume import Run, assert_same_log, files, ids_of, recorded

import dit_fast as dit
from dit_fast import log as log_module
from dit_fast.log import Chunk, Header, LogWriter, Step

CHILDREN = Path(__file__).with_name("durability_children.py")


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """(folder of logs, report), made by one interpreter that loads torch once."""
    folder = tmp_path_factory.mktemp("durability")
    done = subprocess.run([sys.executable, CHILDREN, folder], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def contents(log):
    """Every (name of a call, step) → what it returns, as comparable values; the call is made when it is asked for."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        return tuple(plain(one) for one in value) if isinstance(value, tuple | list) else value

    per_step = ("batch_ids", "coefficients", "settings", "micro_batches", "state", "counts", "absent", "segment", "params")
    calls = {}
    for t in range(log.num_steps + 1):
        for name in per_step:
            if t < log.num_steps or name in ("params", "counts"):
                calls[name, t] = lambda name=name, t=t: plain(getattr(log, name)(t)) if stored(log, name, t) else None
    for name in (
        "num_samples",
        "marks",
        "groups",
        "optimizer",
        "training_flags",
        "constants",
        "frozen_digests",
        "clip",
        "every",
    ):
        calls[name, None] = lambda name=name: plain(getattr(log, name))
    return calls


def stored(log, name, t):
    return name != "params" or log.has_params(t)


def assert_begins_like(path, truth):
    """The log opens, is sound, and is a beginning of the true one; its number of steps."""
    log = dit.Trajectory.open(path)
    log.verify()
    for t in range(log.num_steps + 1 if log.num_steps else 0):
        if log.has_params(t) and truth.has_params(t):
            own, true = log.params(t), truth.params(t)
            assert own.keys() == true.keys() and all(torch.equal(own[name], true[name]) for name in own), (path, t)
        if t < log.num_steps:
            assert torch.equal(log.batch_ids(t), ids_of(t)) and log.settings(t) == truth.settings(t)
    return log.num_steps


def test_killed_at_random_moments(children):
    """Each log left by a kill is sound; those resumed from an older checkpoint end as an uninterrupted run does."""
    folder, report = children
    assert report["killed"] >= 20
    lengths = []
    for trial in range(TRIALS):
        name = list(RUNS)[trial % len(RUNS)]
        truth = dit.Trajectory.open(folder / f"{name}-truth")
        for suffix in ("killed", "again"):
            path = folder / f"{name}-{trial}-{suffix}"
            if (path / "manifest.json").exists():  # else killed before its first step
                lengths.append(assert_begins_like(path, truth))
        path = folder / f"{name}-{trial}"
        assert_same_log(path, folder / f"{name}-truth")
        assert not list(path.glob(".*")), "a lock or a file half written stayed behind"
    assert len(lengths) >= 20 and len(set(lengths)) > 8 and any(0 < length < STEPS for length in lengths)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_killed_within_the_cut(children, name):
    """Before the manifest is switched there is the old log of 60 steps, afterwards the cut one, and more as it grows."""
    folder = children[0]
    truth, lengths = dit.Trajectory.open(folder / f"{name}-truth"), []
    for path in sorted(folder.glob(f"{name}-cut*")):
        lengths.append(assert_begins_like(path, truth))
        assert lengths[-1] == 30 or lengths[-1] >= 33, path
    assert {30, 33, 60} <= set(lengths) and any(33 < length < 60 for length in lengths)


# damage


def logs(folder):
    """name → path of a small log of each kind that holds state, rows apart, and chunks of a second generation."""
    kinds = {"momentum": ("momentum", {}), "adam": ("adam", {}), "every 3": ("adamw", {"every": 3, "chunk_bytes": 600})}
    for name, (kind, options) in kinds.items():
        first = recorded(folder / name, kind, **options)
        if name == "adam":
            run = Run(kind, options).load(first.checkpoints, 14)
            with run.recorder(folder / name, resume=True) as recorder:
                run.train(23, recorder)
        edit_manifest(folder / name, lambda data: data.update(complete=True))
    return {name: folder / name for name in kinds}


def flip(raw, chance):
    at = chance.randrange(len(raw))
    raw[at] ^= 1 << chance.randrange(8)


def truncate(raw, chance):
    del raw[chance.randrange(len(raw)) :]


def zero(raw, chance):
    at = chance.randrange(len(raw))
    stop = min(at + chance.choice([1, 8, 100]), len(raw))
    raw[at:stop] = bytes(stop - at)


def repeat(raw, chance):
    at = chance.randrange(len(raw))
    raw[at:at] = raw[at : at + chance.choice([1, 8, 64])]


def noise(raw, chance):
    raw[:] = chance.randbytes(chance.choice([0, 7, 8, 200, len(raw)]))


def damage(path, trial, chance):
    """Damage one file, or exchange two; its name."""
    own = sorted(file for file in path.iterdir())
    file = own[trial % len(own)]
    kind = ["flip", "truncate", "zero", "delete", "swap", "repeat", "noise", "flip"][trial // len(own) % 8]
    if kind == "delete":
        file.unlink()
    elif kind == "swap":
        other = chance.choice([one for one in own if one != file])
        one, two = file.read_bytes(), other.read_bytes()
        file.write_bytes(two)
        other.write_bytes(one)
    else:
        raw = bytearray(file.read_bytes())
        {"flip": flip, "truncate": truncate, "zero": zero, "repeat": repeat, "noise": noise}[kind](raw, chance)
        file.write_bytes(raw)
    return f"{kind} {file.name}"


def test_damaged_in_many_ways(tmp_path):
    """Whatever a damaged log returns is what the whole one returns, bit for bit; else it is refused in a line with a file."""
    chance, refused, trials = random.Random(1), 0, 0
    for path in logs(tmp_path).values():
        truth = {call: value() for call, value in contents(dit.Trajectory.open(path)).items()}
        for trial in range(70):
            broken = tmp_path / "broken"
            shutil.copytree(path, broken)
            what = f"{path.name}, trial {trial}: {damage(broken, trial, chance)}"
            whole, trials = True, trials + 1
            try:
                log = dit.Trajectory.open(broken)
                calls = contents(log)
                assert calls.keys() == truth.keys(), what
            except (dit.LogError, dit.UnsupportedError) as error:
                calls, whole = {}, False
                assert_one_line_naming_a_file(error, broken, what)
            for call, value in calls.items():
                try:
                    assert value() == truth[call], (what, call)
                except dit.LogError as error:
                    whole = False
                    assert_one_line_naming_a_file(error, broken, what)
            refused += not whole
            if calls and not whole:
                with pytest.raises(dit.LogError):
                    log.verify()
            elif calls:
                log.verify()
            shutil.rmtree(broken)
    assert trials >= 200 and refused > 0.9 * trials  # the rest are changes of white space in the manifest, or zeroed zeros


def assert_one_line_naming_a_file(error, path, what):
    text = str(error)
    assert "\n" not in text and (str(path) in text) and (".json" in text or ".safetensors" in text), (what, text)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_damaged_log_is_not_resumed(tmp_path, name):
    """Whatever is damaged, going on with it either works on sound chunks or is refused and leaves the files as they are."""
    chance, first = random.Random(2), recorded(tmp_path / "log", name)
    truth, resumed = dit.Trajectory.open(tmp_path / "log"), 0
    for trial in range(40):
        broken = tmp_path / "broken"
        shutil.copytree(tmp_path / "log", broken)
        what = damage(broken, trial, chance)
        before, run = files(broken), Run(name).load(first.checkpoints, 18)
        try:
            with run.recorder(broken, resume=True) as recorder:
                run.train(22, recorder)
        except (dit.LogError, dit.UnsupportedError) as error:
            assert "\n" not in str(error), what
            assert files(broken) == before, what
        else:
            log = dit.Trajectory.open(broken)
            assert recorder.num_steps == 22 == log.num_steps
            resumed += 1
            for t in (18, 20, 22):
                assert all(torch.equal(value, truth.params(t)[n]) for n, value in log.params(t).items()), what
        shutil.rmtree(broken)
    assert 5 < resumed < 35


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_disk_that_turns_read_only_before_the_cut(tmp_path, monkeypatch, call):
    first = recorded(tmp_path / "log", "momentum")
    before = files(tmp_path / "log")
    run = Run("momentum").load(first.checkpoints, 9)

    def fail(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    refused = pytest.raises(dit.LogError, match=r"cannot write the log at .*log: Read-only file system")
    with refused, run.recorder(tmp_path / "log", resume=True) as recorder:
        monkeypatch.setattr(log_module.os, call, fail)
        run.train(12, recorder)
    monkeypatch.undo()
    assert files(tmp_path / "log") == before
    assert all(torch.equal(value, first.checkpoints[9][0][name]) for name, value in run.model.state_dict().items())


# many steps


@pytest.mark.parametrize("size", [4, 512])
def test_a_log_of_ten_thousand_steps_opens_fast(tmp_path, monkeypatch, size):
    """Nothing but the manifest and the chunk asked for is read."""
    monkeypatch.setattr(log_module.os, "fsync", lambda fd: None)
    steps, width = 10_000, 1000
    header = Header(
        parameters={"w": (torch.Size([width]), torch.float32)},
        groups={"w": 0},
        optimizer=(dit.Adam(),),
        num_samples=50,
        training_flags={"": True},
        constants={},
        frozen_digests={},
        reduction="mean",
    )
    (tmp_path / "log").mkdir()
    writer = LogWriter(tmp_path / "log", header)
    monkeypatch.setattr(writer, "update", lambda marks, complete: None)
    step = Step(torch.arange(8), torch.full((8,), 0.125, dtype=torch.float64), (8,), [[0.1, 0.9, 0.999, 1e-8, 0.0, 0.0]])
    for start in range(0, steps, size):
        number = min(size, steps - start)
        rows = torch.arange(start, start + number + 1).float()[:, None].expand(-1, width).contiguous()
        state, counts = torch.zeros(1, 2, width), torch.full((1, 1), start)
        writer.add_chunk(Chunk([step] * number, rows, state, counts), {})
    LogWriter.update(writer, {"end": steps}, complete=True)
    begin = time.perf_counter()
    log = dit.Trajectory.open(tmp_path / "log")
    last = log.params(9_999)["w"]
    seconds = time.perf_counter() - begin
    print(f"opened {steps} steps in chunks of {size} in {seconds:.3f} s")
    assert seconds < 1
    assert last.tolist() == [9_999.0] * width and log.counts(9_999) == {"w": 9_999}
    assert len(log._source._trusted) == 1
