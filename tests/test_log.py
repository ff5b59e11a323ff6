"""The log on disk: its promises as a format, and every kind of damage."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch

import dit_fast as dit
from dit_fast.log import Chunk, Header, LogWriter, Step, canonical_digest, first_nonfinite

SHAPES = {"a": ((2, 3), torch.float32), "b": ((), torch.float64), "c": ((5,), torch.float32)}
CHUNKS = (3, 3, 2)


def header():
    return Header(
        parameters={name: (torch.Size(shape), dtype) for name, (shape, dtype) in SHAPES.items()},
        groups={"a": 0, "b": 1, "c": 1},
        optimizer=(dit.SGD(), dit.SGD(weight_decay=0.25)),
        num_samples=50,
        training_flags={"": True, "c": False},
        constants={"scale": torch.arange(3.0), "count": torch.tensor(7)},
        frozen_digests={"f": "0" * 64},
        reduction="mean",
    )


def write_log(path, chunks=CHUNKS, rows=None, complete=True):
    """A small log by hand: (rows [T+1, 12], steps)."""
    generator = torch.Generator().manual_seed(3)
    total = sum(chunks)
    if rows is None:
        rows = torch.randn(total + 1, 12, generator=generator).double()
        rows[:, 6] /= 3  # "b", which float32 would not hold
    steps = []
    for t in range(total):
        size = 2 + t % 3
        ids, weights = torch.randint(50, (size,), generator=generator), torch.rand(size, generator=generator).double()
        steps.append(Step(ids, weights, (size - 1, 1), [[0.1 / (t + 1), *[0.0] * 5], [0.3, 0, 0, 0, 0.25, 0]]))
    path.mkdir()
    writer, at = LogWriter(path, header()), 0
    for size in chunks:
        none = torch.zeros(1, 0, 12), torch.zeros(1, 2, dtype=torch.int64)
        writer.add_chunk(Chunk(steps[at : at + size], rows[at : at + size + 1].contiguous(), *none), {"early": 2})
        at += size
    writer.update({"early": 2, "end": total}, complete)
    return rows, steps


def everything(trajectory):
    """All a trajectory says, as one comparable value."""
    steps = range(trajectory.num_steps)
    return (
        trajectory.num_samples,
        trajectory.marks,
        trajectory.groups,
        trajectory.optimizer,
        trajectory.training_flags,
        trajectory.frozen_digests,
        {name: value.tolist() for name, value in trajectory.constants.items()},
        [{name: value.tolist() for name, value in trajectory.params(t).items()} for t in range(trajectory.num_steps + 1)],
        [
            (
                trajectory.batch_ids(t).tolist(),
                trajectory.coefficients(t).tolist(),
                trajectory.settings(t),
                trajectory.micro_batches(t),
            )
            for t in steps
        ],
    )


def read_everything(path):
    trajectory = dit.Trajectory.open(path)
    trajectory.verify()
    return everything(trajectory)


def edit_manifest(path, change):
    """Change a manifest and seal it again, as another program might."""
    file = path / "manifest.json"
    data = json.loads(file.read_text())
    del data["sha256"]
    change(data)
    file.write_text(json.dumps(data | {"sha256": canonical_digest(data)}))


def rewrite_chunk(path, number, change):
    """Change a chunk's tensors and name its new sha256 in the manifest."""
    file = path / f"chunk-{number:06d}.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    file.write_bytes(safetensors.numpy.save(tensors))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit_manifest(path, lambda data: data["chunks"][number].update(sha256=digest))


@pytest.fixture
def log(tmp_path):
    write_log(tmp_path / "log")
    return tmp_path / "log"


def test_round_trip(tmp_path):
    rows, steps = write_log(tmp_path / "log")
    run = dit.Trajectory.open(tmp_path / "log")
    assert (run.num_steps, run.num_samples, run.path) == (8, 50, tmp_path / "log")
    assert run.marks == {"early": 2, "end": 8}
    assert run.groups == {"a": 0, "b": 1, "c": 1}
    assert run.optimizer == (dit.SGD(), dit.SGD(weight_decay=0.25))
    assert run.training_flags == {"": True, "c": False}
    assert run.frozen_digests == {"f": "0" * 64}
    assert run.constants["scale"].tolist() == [0, 1, 2] and run.constants["count"].item() == 7
    for t in [8, 0, 7, 3, 6, *range(9)]:
        params = run.params(t)
        assert {n: (tuple(v.shape), v.dtype) for n, v in params.items()} == SHAPES
        assert torch.cat([v.double().reshape(-1) for v in params.values()]).equal(rows[t])
    for t, step in enumerate(steps):
        assert run.batch_ids(t).equal(step.ids) and run.coefficients(t).equal(step.coefficients)
        assert run.micro_batches(t) == [slice(0, len(step.ids) - 1), slice(len(step.ids) - 1, len(step.ids))]
        rates = [(group["lr"], group["weight_decay"]) for group in run.settings(t)]
        assert rates == [(0.1 / (t + 1), 0.0), (0.3, 0.25)]
    run.verify()


def test_anyone_can_read_it_with_safetensors_and_json(tmp_path):
    rows, steps = write_log(tmp_path / "log")
    manifest = json.loads((tmp_path / "log/manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["complete"]) == ("dit_fast log", 1, True)
    assert manifest["parameters"][1] == {"name": "b", "shape": [], "dtype": "float64", "group": 1}
    assert [(c["file"], c["start"], c["steps"]) for c in manifest["chunks"]] == [
        ("chunk-000000.safetensors", 0, 3),
        ("chunk-000001.safetensors", 3, 3),
        ("chunk-000002.safetensors", 6, 2),
    ]
    chunk = safetensors.numpy.load_file(tmp_path / "log/chunk-000001.safetensors")
    assert np.array_equal(chunk["params"], rows[3:7].numpy())
    assert chunk["batch_ids"].tolist() == [i for step in steps[3:6] for i in step.ids.tolist()]
    assert chunk["micro_counts"].tolist() == [2, 2, 2] and chunk["micro_sizes"].tolist() == [1, 1, 2, 1, 3, 1]
    assert chunk["settings"].shape == (3, 2, 6)
    raw = (tmp_path / "log/chunk-000001.safetensors").read_bytes()
    assert manifest["chunks"][1]["sha256"] == hashlib.sha256(raw).hexdigest() and manifest["chunks"][1]["bytes"] == len(raw)


def test_more_chunks_than_are_kept_open(tmp_path):
    rows, _ = write_log(tmp_path / "log", chunks=(1,) * 20)
    run = dit.Trajectory.open(tmp_path / "log")
    kept = [run.params(t)["b"] for t in range(20, -1, -1)]
    assert len(run._source._open) == 8
    assert [float(v) for v in kept] == [float(rows[t, 6]) for t in range(20, -1, -1)]


def test_rows_of_any_range_across_chunks(log):
    rows, _ = write_log(log.parent / "again")
    trajectory = dit.Trajectory.open(log.parent / "again")
    T = trajectory.num_steps
    for start in range(T + 2):
        for stop in range(start, T + 2):
            assert torch.equal(trajectory.rows(start, stop), rows[start:stop])
    assert [step.ids.tolist() for step in trajectory.steps(1, T)] == [trajectory.batch_ids(t).tolist() for t in range(1, T)]
    for start, stop in ((-1, 2), (0, T + 2), (3, 1)):
        with pytest.raises(ValueError):
            trajectory.rows(start, stop)


def test_reading_never_writes_to_the_file(log):
    before = (log / "chunk-000000.safetensors").read_bytes()
    dit.Trajectory.open(log).params(0)["b"].fill_(9.0)
    assert (log / "chunk-000000.safetensors").read_bytes() == before


def test_unfinished_and_unnamed_files_are_ignored(log):
    before = read_everything(log)
    (log / ".chunk-000003.safetensors.partial").write_bytes(b"half")
    shutil.copy(log / "chunk-000000.safetensors", log / "chunk-000003.safetensors")
    (log / ".manifest.json.partial").write_bytes(b"{")
    assert read_everything(log) == before


def test_marks_beyond_a_killed_run_are_dropped(tmp_path):
    write_log(tmp_path / "log", complete=False)
    edit_manifest(tmp_path / "log", lambda data: data["marks"].update(late=9))
    assert dit.Trajectory.open(tmp_path / "log").marks == {"early": 2, "end": 8}
    edit_manifest(tmp_path / "log", lambda data: data.update(complete=True))
    with pytest.raises(dit.LogError, match="late"):
        dit.Trajectory.open(tmp_path / "log")


def test_a_log_without_chunks_opens(tmp_path):
    write_log(tmp_path / "log", chunks=(), complete=False)
    run = dit.Trajectory.open(tmp_path / "log")
    assert run.num_steps == 0 and "0 steps" in repr(run)
    with pytest.raises(dit.LogError, match="before its first chunk"):
        run.params(0)
    with pytest.raises(ValueError, match="no steps"):
        run.windows()


def test_number_of_samples_is_the_largest_id_where_not_known(log):
    edit_manifest(log, lambda data: data.update(num_samples=None))
    run = dit.Trajectory.open(log)
    assert run.num_samples == 1 + max(int(run.batch_ids(t).max()) for t in range(run.num_steps))


def test_flipped_bits_and_truncations_are_found_or_harmless(log, tmp_path):
    truth = read_everything(log)
    generator = np.random.default_rng(0)
    files = sorted(file.name for file in log.iterdir())
    caught = 0
    for trial in range(200):
        broken = tmp_path / f"broken{trial}"
        shutil.copytree(log, broken)
        file = broken / files[trial % len(files)]
        raw = bytearray(file.read_bytes())
        if trial % 4 == 3:
            raw = raw[: generator.integers(len(raw))]
        else:
            raw[generator.integers(len(raw))] ^= 1 << generator.integers(8)
        file.write_bytes(raw)
        try:
            assert read_everything(broken) == truth, f"{file.name}: other data from trial {trial}"
        except dit.LogError as error:
            assert str(broken) in str(error) and "\n" not in str(error)
            caught += 1
        shutil.rmtree(broken)
    assert caught > 180  # the rest are flips in the manifest's white space


def test_a_manifest_that_says_other_things_is_found(log):
    text = (log / "manifest.json").read_text()
    for old, new in (('"early": 2', '"early": 3'), ('"weight_decay": 0.25', '"weight_decay": 0.35'), ('"": true', '"": false')):
        assert text.count(old) == 1
        (log / "manifest.json").write_text(text.replace(old, new))
        with pytest.raises(dit.LogError, match=r"manifest.json is damaged"):
            dit.Trajectory.open(log)
    (log / "manifest.json").write_text(text.replace("\n", "\n\n"))
    dit.Trajectory.open(log).verify()


def test_verify_reads_again_what_it_trusted(log):
    run = dit.Trajectory.open(log)
    run.verify()
    with open(log / "chunk-000002.safetensors", "r+b") as file:
        file.seek(-9, 2)
        file.write(b"\x7f")
    with pytest.raises(dit.LogError, match=r"chunk-000002\.safetensors \(steps 6–7\) is damaged"):
        run.verify()


def test_damage_is_found_at_first_touch_of_the_chunk(log):
    file = log / "chunk-000001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    run = dit.Trajectory.open(log)
    run.params(2)
    for call in (run.batch_ids, run.params, run.settings):
        with pytest.raises(dit.LogError, match=r"chunk-000001\.safetensors \(steps 3–5\) is damaged"):
            call(4)


def remove(name):
    return lambda path: (path / name).unlink()


def overwrite(name, data):
    return lambda path: (path / name).write_bytes(data)


def manifest(change):
    return lambda path: edit_manifest(path, change)


def chunk(number, change):
    return lambda path: rewrite_chunk(path, number, change)


def assign(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


def replace(name, function):
    return lambda tensors: tensors.update({name: np.ascontiguousarray(function(tensors[name]))})


def splice(path):
    shutil.copy(path / "chunk-000000.safetensors", path / "chunk-000001.safetensors")
    edit_manifest(path, lambda data: data["chunks"][1].update(sha256=data["chunks"][0]["sha256"], max_id=49))
    edit_manifest(path, lambda data: data["chunks"][0].update(max_id=49))


DAMAGE = {
    "no manifest": (remove("manifest.json"), "holds no log: there is no manifest.json"),
    "no json": (overwrite("manifest.json", b"{,"), "manifest.json cannot be read"),
    "no text": (overwrite("manifest.json", b"\xff\xfe\x00"), "manifest.json cannot be read"),
    "deep json": (overwrite("manifest.json", b"[" * 200_000), "manifest.json cannot be read"),
    "a list": (overwrite("manifest.json", b"[]"), "is not the manifest of a dit_fast log"),
    "empty": (overwrite("manifest.json", b""), "manifest.json cannot be read"),
    "other format": (manifest(lambda d: d.update(format="x")), "is not the manifest of a dit_fast log"),
    "other version": (manifest(lambda d: d.update(version=2)), "format version 2; this dit_fast reads version 1"),
    "no chunks key": (manifest(lambda d: d.pop("chunks")), "not a manifest of this format.*chunks"),
    "chunks no list": (manifest(lambda d: d.update(chunks=3)), "not a manifest of this format"),
    "chunk no dict": (manifest(lambda d: d.update(chunks=["x"])), "not a manifest of this format"),
    "start no integer": (manifest(lambda d: d["chunks"][0].update(start="0")), "must be integers"),
    "marks no dict": (manifest(lambda d: d.update(marks=[1])), "not a manifest of this format"),
    "no parameters": (manifest(lambda d: d.update(parameters=[])), "not a manifest of this format"),
    "twice": (manifest(lambda d: d["parameters"][0].update(name="b")), "named twice"),
    "group outside": (manifest(lambda d: d["parameters"][0].update(group=2)), "belongs to no group"),
    "dtype": (manifest(lambda d: d["parameters"][0].update(dtype="int8")), "not a manifest of this format.*int8"),
    "setting names": (manifest(lambda d: d.update(setting_names=["lr"])), "setting_names"),
    "gap": (manifest(lambda d: d["chunks"].pop(1)), "a gap at step 3"),
    "gap in steps": (manifest(lambda d: d["chunks"][2].update(start=7)), "a gap at step 6"),
    "path outside": (manifest(lambda d: d["chunks"][0].update(file="../x")), "a gap at step 0"),
    "no chunk": (remove("chunk-000001.safetensors"), r"chunk-000001.safetensors \(steps 3–5\) is missing"),
    "no constants": (remove("constants.safetensors"), "constants.safetensors cannot be read"),
    "constants": (overwrite("constants.safetensors", b"x" * 40), "constants.safetensors is damaged"),
    "other shape": (
        manifest(lambda d: d["parameters"][0].update(shape=[2, 4])),
        r"chunk-000000.*params is .*\(4, 12\), not .*\(4, 14\)",
    ),
    "fewer steps": (manifest(lambda d: (d["chunks"][2].update(steps=1), d["marks"].clear())), "chunk-000002.*params is"),
    "too few settings": (chunk(0, replace("settings", lambda v: v[:, :1])), "chunk-000000.*settings is"),
    "too few ids": (chunk(0, replace("batch_ids", lambda v: v[:-1])), "chunk-000000.*batch_ids is"),
    "ids of another type": (chunk(0, replace("batch_ids", lambda v: v.astype(np.int32))), "chunk-000000.*batch_ids is"),
    "negative id": (chunk(2, assign("batch_ids", 0, -1)), "chunk-000002.*an id outside 0"),
    "id outside": (chunk(2, assign("batch_ids", 0, 50)), "chunk-000002.*an id outside 0"),
    "sizes": (chunk(1, assign("micro_sizes", slice(0, 2), [0, 2])), "chunk-000001.*an empty batch"),
    "counts": (chunk(1, assign("micro_counts", 0, 3)), "chunk-000001.*micro_sizes is"),
    "negative counts": (chunk(1, assign("micro_counts", slice(0, 2), [-1, 5])), "chunk-000001.*an empty batch"),
    "NaN coefficient": (chunk(1, assign("coefficients", 0, np.nan)), "chunk-000001.*coefficients or settings hold NaN"),
    "infinite rate": (chunk(1, assign("settings", (0, 0, 0), np.inf)), "chunk-000001.*coefficients or settings hold NaN"),
    "NaN": (chunk(1, assign("params", (2, 7), np.nan)), r"chunk-000001.*parameter 'c' holds NaN or infinity before step 5"),
    "infinity": (
        chunk(0, assign("params", (0, 5), -np.inf)),
        r"chunk-000000.*parameter 'a' holds NaN or infinity before step 0",
    ),
    "no params": (chunk(0, lambda tensors: tensors.pop("params")), "chunk-000000.*is not a chunk of this log.*params"),
    "other first row": (
        chunk(1, assign("params", (0, 0), 9.0)),
        "chunk-000001.*before step 3 are not those that chunk-000000.safetensors ends with",
    ),
    "chunks of two runs": (splice, "chunk-000001.*before step 3 are not those that chunk-000000.safetensors ends with"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(case, log):
    damage, message = DAMAGE[case]
    read_everything(log)
    damage(log)
    with pytest.raises(dit.LogError, match=message) as caught:
        read_everything(log)
    assert "\n" not in str(caught.value)
    assert str(log) in str(caught.value)


def test_a_manifest_of_an_unknown_optimizer_is_unsupported(log):
    edit_manifest(log, lambda data: data["optimizer"][0].update(kind="Lion"))
    with pytest.raises(dit.UnsupportedError, match="Lion"):
        dit.Trajectory.open(log)


def test_first_nonfinite():
    rows = torch.full((3, 4), 3e38)  # sums overflow, values do not
    assert first_nonfinite(rows) is None
    rows[2, 1], rows[2, 3] = float("inf"), float("nan")
    assert first_nonfinite(rows) == (2, 1)
    rows[1, 0] = -float("inf")
    assert first_nonfinite(rows) == (1, 0)


def test_path_that_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(dit.LogError, match=r"manifest.json"):
        dit.Trajectory.open(tmp_path / "file")
    with pytest.raises(dit.LogError, match="holds no log"):
        dit.Trajectory.open(tmp_path / "nothing")
