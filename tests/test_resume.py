"""Going on with a log: from a checkpoint to the log an uninterrupted run would have left, or a clear refusal."""

import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_recorder import FailingFile, manifest, net, state
from torch import nn

import dit_fast as dit
from dit_fast import directory
from dit_fast import log as log_module

N, STEPS = 24, 30

OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
}


def ids_of(t):
    return torch.randint(N, (4 + t % 2,), generator=torch.Generator().manual_seed(t))


class Run:
    """A deterministic training run of step numbers, with a checkpoint before every step."""

    def __init__(self, kind="sgd", options=None):
        generator = torch.Generator().manual_seed(2)
        self.x, self.y = torch.randn(N, 3, generator=generator), torch.randn(N, 2, generator=generator)
        self.model = net()
        self.optimizer = OPTIMIZERS[kind](self.model)
        self.options = {"chunk_bytes": 1, "num_samples": N} | (options or {})
        self.step, self.checkpoints = 0, {}

    def recorder(self, path, **options):
        return dit.Recorder(path, self.model, self.optimizer, **(self.options | options))

    def train(self, stop, recorder):
        """Steps up to `stop`, a mark after every seventh."""
        while self.step < stop:
            self.checkpoints[self.step] = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
            ids = ids_of(self.step)
            self.optimizer.zero_grad()
            ((self.model(self.x[ids]) - self.y[ids]) ** 2).sum(1).mean().backward()
            with recorder.step(ids):
                self.optimizer.step()
            self.step += 1
            if self.step % 7 == 0:
                recorder.mark(f"mark {self.step}")
        self.checkpoints[self.step] = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        return self

    def load(self, checkpoints, step, optimizer=True):
        self.model.load_state_dict(checkpoints[step][0])
        if optimizer:
            self.optimizer.load_state_dict(copy.deepcopy(checkpoints[step][1]))  # torch takes tensors over as they are
        self.step = step
        return self


def recorded(path, kind="sgd", stop=STEPS, **options):
    run = Run(kind, options)
    with run.recorder(path) as recorder:
        run.train(stop, recorder)
    return run


def assert_same_log(path, truth):
    """All that both logs hold is bit for bit the same; only where snapshots lie may differ."""
    one, two = dit.Trajectory.open(path), dit.Trajectory.open(truth)
    one.verify()
    assert (one.num_steps, one.marks, one.num_samples) == (two.num_steps, two.marks, two.num_samples)
    compared = 0
    for t in range(one.num_steps + 1):
        if one.has_params(t) and two.has_params(t):
            compared += 1
            a, b = one.params(t), two.params(t)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), t
        assert one.counts(t) == two.counts(t), t
        if t < one.num_steps:
            assert torch.equal(one.batch_ids(t), two.batch_ids(t)) and torch.equal(one.coefficients(t), two.coefficients(t))
            assert one.settings(t) == two.settings(t) and one.micro_batches(t) == two.micro_batches(t)
            mine, other = one.state(t), two.state(t)
            if mine is not None and other is not None:
                assert all(torch.equal(x, y) for name in mine for x, y in zip(mine[name], other[name], strict=True)), t
    assert compared >= 1 + one.num_steps // one.every


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"every": 3}, {"chunk_bytes": 4000}, {"log_dtype": "bfloat16"}], ids=str)
def test_a_resumed_run_leaves_the_log_of_an_uninterrupted_one(tmp_path, kind, options):
    truth = recorded(tmp_path / "truth", kind, **options)
    stored = [t for t in (3, 4, 5, 6, 9, 12, 18, 27, 30) if dit.Trajectory.open(tmp_path / "truth").has_params(t)]
    assert len(stored) >= 5
    recorded(tmp_path / "log", kind, **options)
    for step in reversed(stored):
        run = Run(kind, options).load(truth.checkpoints, step)
        with run.recorder(tmp_path / "log", resume=True) as recorder:
            assert recorder.num_steps == step
            run.train(STEPS, recorder)
            assert recorder.num_steps == STEPS
        assert_same_log(tmp_path / "log", tmp_path / "truth")
        named = {chunk["file"] for chunk in manifest(tmp_path / "log")["chunks"]}
        assert {file.name for file in (tmp_path / "log").iterdir()} == named | {"manifest.json", "constants.safetensors"}


def test_a_model_before_step_0_would_cut_everything(tmp_path):
    """A checkpoint that was forgotten: the same seed gives the parameters the run began with."""
    recorded(tmp_path / "log")
    before = files(tmp_path / "log")
    with pytest.raises(dit.LogError, match=r"stands before step 0 .* all its 30 steps would be cut: load the checkpoint"):
        Run().recorder(tmp_path / "log", resume=True)
    assert files(tmp_path / "log") == before


def test_a_log_that_begins_late_is_said(tmp_path):
    """A kill before the first chunk was written left no log to go on with."""
    truth = recorded(tmp_path / "truth", "adam")
    run = Run("adam").load(truth.checkpoints, 6)
    with pytest.warns(RuntimeWarning, match="resume=True found no steps at .* though the optimizer has made some"):
        recorder = run.recorder(tmp_path / "log", resume=True)
    recorder.close()


def test_a_directory_without_a_log_starts_a_new_one(tmp_path):
    truth = recorded(tmp_path / "truth")
    for name in ("nothing", "empty", "leftovers", "no steps"):
        if name != "nothing":
            (tmp_path / name).mkdir()
        if name == "leftovers":
            (tmp_path / name / "constants.safetensors").write_bytes(b"x")
            (tmp_path / name / ".chunk-000000.safetensors.partial").write_bytes(b"x")
        if name == "no steps":
            killed = Run()
            log_module.LogWriter(tmp_path / name, dit.Trajectory.open(tmp_path / "truth")._source.header)
            killed.load(truth.checkpoints, 0)
        run = Run()
        with run.recorder(tmp_path / name, resume=True) as recorder:
            assert recorder.num_steps == 0
            run.train(STEPS, recorder)
        assert_same_log(tmp_path / name, tmp_path / "truth")
        assert not list((tmp_path / name).glob(".*"))


def test_marks_after_the_cut_are_dropped_and_those_before_kept(tmp_path):
    first = recorded(tmp_path / "log")
    assert dit.Trajectory.open(tmp_path / "log").marks == {f"mark {t}": t for t in (7, 14, 21, 28)}
    run = Run().load(first.checkpoints, 14)
    with run.recorder(tmp_path / "log", resume=True) as recorder:
        recorder.mark("mark 14")  # the very moment that was marked before
        with pytest.raises(ValueError, match="mark 'mark 7' was set before, at step 7"):
            recorder.mark("mark 7")
        recorder.mark("again")
        run.train(16, recorder)
        with pytest.raises(ValueError, match="mark 'mark 14' was set before, at step 14"):
            recorder.mark("mark 14")
    assert dit.Trajectory.open(tmp_path / "log").marks == {"mark 7": 7, "mark 14": 14, "again": 14}


def test_without_a_step_an_exception_leaves_the_log_and_close_cuts_it(tmp_path):
    first = recorded(tmp_path / "log")
    before = files(tmp_path / "log")
    with pytest.raises(RuntimeError, match="mine"), Run().load(first.checkpoints, 9).recorder(tmp_path / "log", resume=True):
        raise RuntimeError("mine")
    assert files(tmp_path / "log") == before
    with Run().load(first.checkpoints, 9).recorder(tmp_path / "log", resume=True) as recorder:
        recorder.mark("end")
    log = dit.Trajectory.open(tmp_path / "log")
    log.verify()
    assert (log.num_steps, log.marks) == (9, {"mark 7": 7, "end": 9}) and manifest(tmp_path / "log")["complete"] is True
    assert all(torch.equal(value, first.checkpoints[9][0][name]) for name, value in log.params(9).items())


def test_the_latest_of_equal_steps_is_taken_and_adams_counts_tell_them_apart(tmp_path):
    for kind, step in (("sgd", 6), ("adam", 4)):
        run = Run(kind)
        with run.recorder(tmp_path / kind) as recorder:
            run.train(4, recorder)
            run.optimizer.param_groups[0]["lr"] = 0.0
            run.train(6, recorder)
            run.optimizer.param_groups[0]["lr"] = 0.01
            run.train(9, recorder)
        with Run(kind).load(run.checkpoints, 4).recorder(tmp_path / kind, resume=True) as recorder:
            assert recorder.num_steps == step


# what is refused: (how the log was made, how it is resumed, message)


def other_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def resumed(kind="sgd", step=8, optimizer=True, change=None, **options):
    def make(path, checkpoints):
        run = Run(kind, options)
        run.load(checkpoints, step, optimizer)
        if change is not None:
            change(run)
        return run.recorder(path, resume=True)

    return make


def with_other_model(path, checkpoints):
    model = other_net()
    return dit.Recorder(path, model, torch.optim.SGD(model.parameters(), lr=0.1), resume=True, num_samples=N)


def moved(run):
    with torch.no_grad():
        run.model[2].bias[1] = torch.nextafter(run.model[2].bias[1], torch.tensor(9.0))


def with_buffer(run):
    run.model.register_buffer("scale", torch.ones(2))


def frozen(run):
    run.model[0].bias.requires_grad_(False)


def two_groups(run):
    first, *rest = run.model.parameters()
    run.optimizer = torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=0.1)


def buffer_changed(run):
    run.optimizer.state[run.model[0].weight]["momentum_buffer"].mul_(1.01)


MISSING = r"no step of the log at .*log has the model's parameters; it holds 30 steps.*checkpoint.*before making the Recorder"
REFUSED = {
    "no such step": ({}, resumed(change=moved), MISSING),
    "nothing loaded": ({}, resumed(change=lambda run: run.model.load_state_dict(other_seed().state_dict())), MISSING),
    "between rows": ({"every": 3}, resumed(every=3), MISSING.replace("steps", "steps, one in 3 stored")),
    "another model": ({}, with_other_model, r"parameter '0.weight' is another one: .*\[4, 3\].* in the log, .*\[5, 3\].* now"),
    "another optimizer": ({}, resumed("adam", optimizer=False), "its optimizer is SGD by parameter group, this one Adam"),
    "momentum": ({}, resumed("momentum", optimizer=False), "its optimizer had no momentum, this one has"),
    "number of samples": ({}, resumed(num_samples=N + 1), f"its num_samples is {N}, this Recorder's {N + 1}"),
    "every": ({}, resumed(every=2), "its every is 1, this Recorder's 2"),
    "clipping": ({"clip_norm": 1.0}, resumed(clip_norm=2.0), "its clipping is .*1.0.*, this Recorder's .*2.0"),
    "log_dtype": ({}, resumed(log_dtype="float16"), "its log_dtype is None, this Recorder's torch.float16"),
    "reduction": ({}, resumed(reduction="sum"), "its reduction is mean, this Recorder's sum"),
    "buffer": ({}, resumed(change=with_buffer), "buffer 'scale' is another one"),
    "frozen": ({}, resumed(change=frozen), "parameter '0.bias' is in the log alone"),
    "groups": ({}, resumed(change=two_groups), r"its optimizer is SGD by parameter group, this one SGD\+SGD"),
    "no optimizer state": (
        {"kind": "adam"},
        resumed("adam", optimizer=False),
        r"are those before step 8 of the log at .*, but the optimizer's state of '0.weight' was updated 0 times, not 8 times "
        "as in the log; load the optimizer's state too",
    ),
    "no momentum buffer": (
        {"kind": "momentum"},
        resumed("momentum", 7, optimizer=False),
        "before step 7 .* updated 0 times, not 1 times .* load the optimizer's state too",
    ),
    "another momentum buffer": (
        {"kind": "momentum"},
        resumed("momentum", change=buffer_changed),
        "before step 8 .* the optimizer's momentum_buffer of '0.weight' is not the one in the log; load the optimizer's state",
    ),
    "overwrite too": ({}, lambda p, c: Run().recorder(p, resume=True, overwrite=True), "give one of them"),
}


def other_seed():
    model = net()
    with torch.no_grad():
        model[0].weight.add_(1)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    options, make, message = REFUSED[case]
    run = recorded(tmp_path / "log", **options)
    before = files(tmp_path / "log")
    error = ValueError if case == "overwrite too" else dit.LogError
    with pytest.raises(error, match=message) as caught:
        make(tmp_path / "log", run.checkpoints)
    assert "\n" not in str(caught.value)
    assert files(tmp_path / "log") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: moved(run), r"step 8: parameter '2.bias' was changed between Recorder\(..., resume=True\) and the first"),
        (lambda run: run.model[1].eval(), "train/eval flag of module '1' is another one: True in the log, False now"),
        (lambda run: run.model.register_buffer("late", torch.ones(1)), "buffer 'late' is another one"),
    ],
    ids=["parameters", "flags", "buffer"],
)
def test_refused_at_the_first_step(tmp_path, change, message):
    first = recorded(tmp_path / "log")
    before = files(tmp_path / "log")
    run = Run().load(first.checkpoints, 8)
    refused = pytest.raises(dit.LogError, match=message)
    with refused, run.recorder(tmp_path / "log", resume=True) as recorder:
        change(run)
        run.train(9, recorder)
    assert files(tmp_path / "log") == before


def test_chunks_without_a_manifest_are_not_thrown_away(tmp_path):
    run = recorded(tmp_path / "log")
    (tmp_path / "log/manifest.json").unlink()
    before = files(tmp_path / "log")
    with pytest.raises(dit.LogError, match=r"holds chunks of a log but no manifest.json"):
        Run().load(run.checkpoints, 8).recorder(tmp_path / "log", resume=True)
    assert files(tmp_path / "log") == before
    with Run().recorder(tmp_path / "log", overwrite=True):
        assert not list((tmp_path / "log").glob("chunk*"))


def test_overwrite_deletes_every_generation_and_nothing_else(tmp_path):
    run = recorded(tmp_path / "log")
    with Run().load(run.checkpoints, 9).recorder(tmp_path / "log", resume=True):
        pass
    mine = ("chunk-000001.backup.safetensors", "chunk-1.safetensors", "notes.txt")
    for name in mine:
        (tmp_path / "log" / name).write_text("mine")
    assert (tmp_path / "log/chunk-000002.1.safetensors").exists()
    run = Run()
    with run.recorder(tmp_path / "log", overwrite=True) as recorder:
        run.train(2, recorder)
    own = ("chunk-000000.safetensors", "constants.safetensors", "manifest.json")
    assert sorted(file.name for file in (tmp_path / "log").iterdir()) == sorted([*mine, *own])


@pytest.mark.parametrize(("room", "steps"), [(0, [30]), (500, [30]), (2500, [30]), (20000, range(9, 30))])
def test_a_full_disk(tmp_path, monkeypatch, room, steps):
    """The log is the one before or the one after the cut, and what was trained since as far as it was written."""
    truth = recorded(tmp_path / "truth")
    recorded(tmp_path / "log")
    FailingFile.room = room
    monkeypatch.setattr(log_module, "open", lambda *args, **kw: FailingFile(open(*args, **kw)), raising=False)  # noqa: SIM115
    run = Run().load(truth.checkpoints, 9)
    full = pytest.raises(dit.LogError, match=r"cannot write the log at .*log.*: No space left on device")
    with full, run.recorder(tmp_path / "log", resume=True) as recorder:
        run.train(STEPS, recorder)
    assert not list((tmp_path / "log").glob(".*"))
    log = dit.Trajectory.open(tmp_path / "log")
    log.verify()
    assert log.num_steps in steps
    for t in range(log.num_steps + 1):
        assert all(torch.equal(value, truth.checkpoints[t][0][name]) for name, value in log.params(t).items())


@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_a_read_only_folder(tmp_path, monkeypatch, call):
    run = recorded(tmp_path / "log")
    before = files(tmp_path / "log")

    def fail(*args, **kw):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(directory.os if call == "open" else Path, call, fail)
    with pytest.raises(dit.LogError, match=r"cannot write a log at .*log: Read-only file system"):
        Run().load(run.checkpoints, 9).recorder(tmp_path / "log", resume=True)
    monkeypatch.undo()
    assert files(tmp_path / "log") == before


@pytest.mark.parametrize(
    ("tensor", "message"),
    [("settings", r"chunk-000002.safetensors \(steps 8–11\) is damaged"), ("params", r"verify\(\) says whether .* damaged")],
)
def test_a_damaged_chunk_at_the_cut_is_refused(tmp_path, tensor, message):
    run = recorded(tmp_path / "log")
    rewrite(tmp_path / "log/chunk-000002.safetensors", tensor)
    before = files(tmp_path / "log")
    with pytest.raises(dit.LogError, match=message), Run().load(run.checkpoints, 9).recorder(tmp_path / "log", resume=True):
        pass
    assert files(tmp_path / "log") == before


def rewrite(file, tensor):
    """Flip a bit in the second row of a chunk's tensor."""
    raw = bytearray(file.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + size])[tensor]
    start, stop = entry["data_offsets"]
    raw[8 + size + start + (stop - start) // entry["shape"][0]] ^= 1
    file.write_bytes(raw)


# two writers


HOLD = """
import sys
from dit_fast.directory import Claim
from pathlib import Path
claim = Claim(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read(1)
"""


@pytest.fixture
def holder():
    """Another process that holds a directory until it is ended."""
    held = []

    def hold(path):
        child = subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        held.append(child)
        assert child.stdout.readline() == b"held\n"
        return child

    yield hold
    for child in held:
        child.kill()
        child.communicate()


def test_another_process_that_writes_is_refused_and_its_death_frees_the_directory(tmp_path, holder):
    truth = recorded(tmp_path / "log")
    before = files(tmp_path / "log")
    child = holder(tmp_path / "log")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        run = Run().load(truth.checkpoints, 9)
        with pytest.raises(dit.LogError, match=rf"another process \({child.pid}\) writes a log in .*log; wait for its end"):
            run.recorder(tmp_path / "log", **options)
    child.kill()
    child.wait()
    assert files(tmp_path / "log") == before | {".lock": str(child.pid).encode()}
    dit.Trajectory.open(tmp_path / "log").verify()
    run = Run().load(truth.checkpoints, 9)
    with run.recorder(tmp_path / "log", resume=True) as recorder:
        run.train(STEPS, recorder)
    assert not (tmp_path / "log/.lock").exists()


def test_a_forked_child_does_not_hold_the_directory(tmp_path):
    claim = directory.Claim(tmp_path / "log")
    (ready, tell), (wait, end) = os.pipe(), os.pipe()
    if not (pid := os.fork()):
        os.close(end)
        os.write(tell, b".")
        os.read(wait, 1)
        os._exit(0)
    os.read(ready, 1)
    os.close(claim._fd)  # as the parent's death would
    directory._held.discard(claim._fd)
    directory.Claim(tmp_path / "log").release()
    os.close(end)
    assert os.waitpid(pid, 0)[1] == 0
    for fd in (ready, tell, wait):
        os.close(fd)


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_file_systems_without_locks(tmp_path, monkeypatch, number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(directory.fcntl, "flock", fail)
    run = recorded(tmp_path / "log")
    assert not (tmp_path / "log/.lock").exists()
    assert dit.Trajectory.open(tmp_path / "log").num_steps == run.step


def test_training_is_untouched(tmp_path):
    first = recorded(tmp_path / "log", "adamw")
    run = Run("adamw").load(first.checkpoints, 9)
    torch.manual_seed(3)
    with run.recorder(tmp_path / "log", resume=True) as recorder:
        run.train(STEPS, recorder)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(after, torch.get_rng_state())
    assert all(torch.equal(value, first.checkpoints[STEPS][0][name]) for name, value in state(run.model).items())
