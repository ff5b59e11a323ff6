"""dit-fast verify, explain, estimate, score, compare, report and bench: what they give, and one line for each mistake."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch
from test_cli import one_line

import dit_fast as dit
from dit_fast import analysis, cli_arguments, cli_bench

FILE = str(Path(tiny_run.__file__))
PROBLEM = ("--problem", f"{FILE}:make_problem")
ASKED = (*PROBLEM, "--query", f"{FILE}:make_query")


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder with a log and its scores, not to be written to."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_run.record(folder / "log")
    tiny_run.scored(folder / "log").save(folder / "scores.safetensors")
    return folder


@pytest.fixture
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_json(status_and_output) -> dict:
    status, out, err = status_and_output
    assert (status, err, out.count("\n")) == (0, "", 1), (status, out, err)
    return json.loads(out)


def test_verify_reads_the_whole_log_and_says_what_it_holds(command, kept, tmp_path):
    facts = as_json(command("verify", str(kept / "log"), "--json"))
    assert (facts["intact"], facts["finished"], facts["steps"], facts["samples"]) == (True, True, 12, 24)
    assert facts["marks"] == {f"epoch {e}": 3 * e for e in range(1, 5)}
    assert facts["sha256"] == dit.Trajectory.open(kept / "log").digest
    status, out, _ = command("verify", str(kept / "log"))
    assert status == 0 and "every chunk was read and checked" in out


def test_verify_finds_damage_in_any_chunk(command, tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dit.Recorder(tmp_path / "log", model, optimizer, chunk_bytes=64) as recorder:
        for t in range(12):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            with recorder.step([t]):
                optimizer.step()
    chunks = sorted((tmp_path / "log").glob("chunk-*"))
    assert len(chunks) == 3
    assert as_json(command("verify", str(tmp_path / "log"), "--json"))["steps"] == 12
    for chunk in chunks:
        damaged = tmp_path / f"damaged-{chunk.stem}"
        shutil.copytree(tmp_path / "log", damaged)
        raw = bytearray(chunk.read_bytes())
        raw[-1] ^= 1
        (damaged / chunk.name).write_bytes(raw)
        assert chunk.name in one_line(command("verify", str(damaged)))


def test_a_run_that_was_stopped_is_said_to_be(command, kept, tmp_path):
    from dit_fast.log import canonical_digest

    shutil.copytree(kept / "log", tmp_path / "log")
    manifest = json.loads((tmp_path / "log" / "manifest.json").read_text())
    body = {name: value for name, value in manifest.items() if name != "sha256"} | {"complete": False}
    (tmp_path / "log" / "manifest.json").write_text(json.dumps(body | {"sha256": canonical_digest(body)}))
    assert as_json(command("verify", str(tmp_path / "log"), "--json"))["finished"] is False
    assert "the run was stopped, or is going on" in command("verify", str(tmp_path / "log"))[1]


def test_explain_says_what_score_then_chooses(command, kept):
    found = as_json(command("explain", *PROBLEM, "--log", str(kept / "log"), "--json"))
    result = tiny_run.scored(kept / "log")
    assert (found["backend"], found["why"]) == (result.meta["backend"], result.meta["why"])
    assert found["usable"] == ["generic", "layerwise", "native"] and found["columns"] == 4
    assert "not made of per-sample gradients" in found["backends"]["factors"]
    generic = as_json(command("explain", *PROBLEM, "--log", str(kept / "log"), "--hessian", "fisher", "--json"))
    assert generic["backend"] == "factors"


def test_explain_without_a_log(command, here):
    status, out, _ = command("explain", *PROBLEM)
    assert status == 0
    assert "one step of plain SGD is assumed" in out and "yes, chosen" in out and "16-5-3 gelu" in out
    assert "--windows needs --log" in one_line(command("explain", *PROBLEM, "--windows", "epochs"))
    (here / "dataless.py").write_text(
        "import torch, dit_fast\n"
        "def make(): return dit_fast.Problem(torch.nn.Linear(1, 1), torch.nn.MSELoss(reduction='none'))\n"
    )
    assert "name the log too" in one_line(command("explain", "--problem", "dataless.py:make"))


def test_explain_names_a_layer_that_is_not_compiled(command, here):
    (here / "odd.py").write_text(
        "import torch, dit_fast\n"
        "model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Softplus(), torch.nn.Linear(4, 2))\n"
        "def make(): return dit_fast.Problem(model, torch.nn.CrossEntropyLoss(reduction='none'), "
        "(torch.rand(9, 3), torch.zeros(9, dtype=torch.int64)))\n"
    )
    found = as_json(command("explain", "--problem", "odd.py:make", "--json"))
    assert found["backend"] == "generic" and found["details"]["mode"] == "double_backward"
    assert "module '1' is none of the operations that are compiled" in found["backends"]["native"]


def test_estimate_of_a_score_is_that_of_the_function(command, kept):
    found = as_json(command("estimate", str(kept / "log"), *ASKED, "--windows", "epochs", "--json"))
    run_, problem = dit.Trajectory.open(kept / "log"), tiny_run.make_problem()
    expected = dit.estimate_score(run_, problem, tiny_run.make_query(), "epochs")
    assert (found["flops"], found["columns"], found["read_bytes"]) == (expected.flops, expected.columns, expected.read_bytes)
    assert found["retraining"]["models"] == 24
    assert command("estimate", str(kept / "log"), *ASKED)[0] == 0


def test_estimate_of_a_log_to_come(command):
    found = as_json(command("estimate", *PROBLEM, "--steps", "1000", "--batch-size", "8", "--optimizer", "adam", "--json"))
    expected = dit.estimate_log(tiny_run.model, torch.optim.Adam(tiny_run.model.parameters()), steps=1000, batch_size=8)
    assert found["disk_bytes"] == expected.disk_bytes and found["state_replayed"]
    assert "on disk" in command("estimate", *PROBLEM, "--steps", "1000", "--batch-size", "8")[1]


def test_score_writes_what_the_function_gives(command, kept, here):
    status, out, err = command("score", str(kept / "log"), *ASKED, "--windows", "epochs,whole")
    assert (status, err) == (0, "")
    saved, expected = dit.Influence.load("scores.safetensors"), tiny_run.scored(kept / "log")
    assert torch.equal(saved.scores, expected.scores) and saved.windows == expected.windows
    with open("scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == expected.scores.flatten().tolist()
    first = repr(float(expected.scores[1, 0, 0]))
    assert list(rows[24].values()) == ["epoch 2", "3", "6", "loss", "0", first, "False"]
    assert list(rows[24]) == ["window", "start", "stop", "query", "sample", "score", "retrained"]
    assert f"{expected.top(1, window=0)[0][0]}: {expected.top(1, window=0)[0][1]:+.3g}" in out


def test_score_as_json_and_its_options(command, kept, here):
    options = ("--samples", "2,5:8", "--windows", "early=0:6,6:12", "--hessian", "ggn", "--refine", "1", "--no-csv")
    found = as_json(command("score", str(kept / "log"), *ASKED, *options, "--out", "s.safetensors", "--json"))
    saved = dit.Influence.load("s.safetensors")
    assert found["windows"] == {"early": [0, 6], "6-12": [6, 12]} and found["samples"] == 4
    assert saved.sample_ids.tolist() == [2, 5, 6, 7] and saved.meta["hessian"] == "ggn" and saved.retrained.sum() == 2
    assert [path.name for path in here.iterdir()] == ["s.safetensors"]
    assert found["top"]["early"]["loss"][0]["sample"] == saved.top(1, window=0)[0][0]


def test_queries_by_name(command, kept, here):
    assert command("score", str(kept / "log"), *PROBLEM, "--query", "training-loss")[0] == 0
    trajectory, problem = dit.Trajectory.open(kept / "log"), tiny_run.make_problem()
    expected = dit.score(trajectory, problem, dit.queries.loss(tiny_run.x, tiny_run.y), "epochs")
    assert torch.equal(dit.Influence.load("scores.safetensors").scores, expected.scores)
    for name, size in (("parameter:3.bias", 3), ("parameter:1.weight[0,2]", 1)):
        assert command("score", str(kept / "log"), *PROBLEM, "--query", name, "--overwrite", "--windows", "whole")[0] == 0
        assert dit.Influence.load("scores.safetensors").scores.shape == (1, size, 24)


def test_modules_are_found_in_the_working_folder_and_loaded_once(command, kept, here, monkeypatch):
    (here / "my_own_module.py").write_text("from tiny_run import *\nloaded = []\n")
    assert (
        command("score", str(kept / "log"), "--problem", "my_own_module:make_problem", "--query", "my_own_module:make_query")[0]
        == 0
    )
    (here / "counted.py").write_text("from tiny_run import *\nwith open('loads', 'a') as file: file.write('x')\n")
    names = ("--problem", "counted.py:make_problem", "--query", "counted.py:make_query")
    assert command("score", str(kept / "log"), *names, "--overwrite")[0] == 0
    assert (here / "loads").read_text() == "x"


def test_compare_of_two_files_is_the_analysis(command, kept, here):
    trajectory, problem = dit.Trajectory.open(kept / "log"), tiny_run.make_problem()
    other = dit.score(trajectory, problem, tiny_run.make_query(), "epochs", hessian="none")
    other.save("other.safetensors")
    scores = dit.Influence.load(kept / "scores.safetensors")
    found = as_json(command("compare", str(kept / "scores.safetensors"), "other.safetensors", "--json"))
    for row, expected in zip(found["windows"], analysis.compare(scores, other), strict=True):
        assert row == {name: pytest.approx(expected[name]) for name in row}
        assert set(row) == {"window", "samples", "pearson", "spearman", "kendall", "top"}
    assert [row["window"] for row in found["windows"]] == [f"epoch {e}" for e in range(1, 5)]
    status, out, _ = command("compare", str(kept / "scores.safetensors"), "other.safetensors")
    assert status == 0 and f"{found['windows'][1]['pearson']:.3f}" in out


def test_stdout_is_json_alone_whatever_there_is_to_say(command, kept, here):
    scores = dit.Influence.load(kept / "scores.safetensors")
    scores.meta["log"] = "another"
    scores.save(here / "other.safetensors")
    status, out, err = command("compare", str(kept / "scores.safetensors"), str(here / "other.safetensors"), "--json")
    assert status == 0 and json.loads(out)["windows"] and err == "note: these scores are of two different logs\n"
    (here / "talkative.py").write_text(
        "print('loading')\nimport tiny_run\ndef make():\n    print('made')\n    return tiny_run.make_problem()\n"
    )
    status, out, err = command("explain", "--problem", "talkative.py:make", "--json")
    assert status == 0 and json.loads(out)["backend"] and err == "loading\nmade\n"


def test_compare_with_retraining(command, kept, here):
    retrain = ("--retrain", "9", "--log", str(kept / "log"), *ASKED, "--out", "truth.safetensors")
    found = as_json(command("compare", str(kept / "scores.safetensors"), *retrain, "--json"))
    truth = dit.Influence.load("truth.safetensors")
    assert truth.meta["method"] == "retrain" and len(truth.sample_ids) == 9
    assert all(row["samples"] == 9 and row["pearson"] > 0.9 for row in found["windows"])
    again = as_json(command("compare", str(kept / "scores.safetensors"), "truth.safetensors", "--json"))
    assert again == found


def test_report_writes_a_page(command, kept, here):
    (here / "flipped.txt").write_text("1, 5\n9\n")
    page = ("report", str(kept / "scores.safetensors"), "--out", "page.html")
    found = as_json(command(*page, *ASKED, "--log", str(kept / "log"), "--truth", "flipped.txt", "--title", "Mine", "--json"))
    text = (here / "page.html").read_text("utf-8")
    assert found == {"out": "page.html", "bytes": len(text.encode())}
    assert "<h1>Mine</h1>" in text and '"ids":[1,5,9]' in text and "data:image/png" in text and '"training":[[0,' in text
    (here / "lines.txt").write_text("\n".join(f"text {j}" for j in range(24)))
    assert command(*page, "--texts", "lines.txt", "--overwrite")[0] == 0
    assert '"text 3"' in (here / "page.html").read_text("utf-8")


def test_bench_times_what_it_says(command, monkeypatch):
    monkeypatch.setattr(cli_bench, "SAMPLES", 64)
    monkeypatch.setattr(cli_bench, "EPOCHS", 2)
    threads = torch.get_num_threads()
    found = as_json(command("bench", "--repeat", "1", "--json"))
    assert list(found["seconds"])[:2] == ["training", "training while recording"]
    assert len(found["seconds"]) == 6 and all(value > 0 for value in found["seconds"].values())
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(cli_bench, "AGREEMENT", -1.0)
    assert "do not agree" in one_line(command("bench", "--repeat", "1"))


LOG, SCORES = "{kept}/log", "{kept}/scores.safetensors"
MISTAKES = [
    # what is named is not there, or something else
    (("verify", "none"), "there is no log none"),
    (("verify", SCORES), "there is no log"),
    (("verify", "{kept}"), "manifest.json"),
    (("score", "none", *ASKED), "there is no log none"),
    (("estimate", "none", *PROBLEM), "there is no log none"),
    (("compare", "none", SCORES), "there is no file of scores none"),
    (("report", "none"), "there is no file of scores none"),
    (("compare", SCORES, LOG), "there is no file of scores"),
    (("report", LOG + "/manifest.json", "--out", "r.html"), "is not a file of dit_fast scores, or is damaged"),
    (("report", LOG + "/constants.safetensors", "--out", "r.html"), "it holds no scores"),
    # functions
    (("explain", "--problem", "nonsense"), "'nonsense' is not module:function, such as my_module:make"),
    (("explain", "--problem", "no_such_module:f"), "cannot import no_such_module: No module named 'no_such_module'"),
    (("explain", "--problem", "no_such_file.py:f"), "there is no file no_such_file.py"),
    (("explain", "--problem", FILE + ":nothing"), "has no 'nothing'"),
    (("explain", "--problem", FILE + ":make_query"), "gave an object of type Query; it must return a dit_fast.Problem"),
    (("explain", "--problem", FILE + ":make_none"), "gave None; it must return a dit_fast.Problem"),
    (("explain", "--problem", FILE + ":not_callable"), "gave an object of type int"),
    (
        ("explain", "--problem", FILE + ":make_failure"),
        "make_failure() failed: KeyError: 'a key\\nof two lines' (tiny_run.py, line",
    ),
    (
        ("score", LOG, *PROBLEM, "--query", FILE + ":make_problem"),
        "gave an object of type Problem; it must return one of dit_fast.qu",
    ),
    (("score", LOG, *PROBLEM, "--query", "loss"), "'loss' is not module:function"),
    (("score", LOG, *PROBLEM, "--query", "parameter:9.weight"), "query parameter '9.weight' is not in the log"),
    (("score", LOG, *PROBLEM, "--query", "parameter:"), "is not parameter:NAME"),
    # windows, samples, options
    (
        ("score", LOG, *ASKED, "--windows", "early"),
        "--windows 'early' is none of epochs, whole, START:STOP and NAME=START:STOP",
    ),
    (("score", LOG, *ASKED, "--windows", "0:99"), "is outside the run, which has 12 steps"),
    (("score", LOG, *ASKED, "--windows", "a=0:3,a=3:6"), "names two windows 'a'"),
    (("score", LOG, *ASKED, "--windows", ","), "windows is empty"),
    (("score", LOG, *ASKED, "--samples", "one"), "--samples 'one' is neither an id nor a range"),
    (("score", LOG, *ASKED, "--samples", ","), "names no sample"),
    (("score", LOG, *ASKED, "--samples", "99"), "sample_ids must lie in 0..23"),
    (("score", LOG, *ASKED, "--samples", "@none"), "--samples: cannot read none: No such file"),
    (("score", LOG, *ASKED, "--hessian", "exactly"), "hessian='exactly' is not one of"),
    (("explain", *PROBLEM, "--hessian", "exactly"), "hessian='exactly' is not one of"),
    (("score", LOG, *ASKED, "--method", "guess"), "method='guess' is not one of"),
    (("score", LOG, *ASKED, "--backend", "factors"), "backend='factors' cannot be used"),
    (("score", LOG, *ASKED, "--refine", "-1"), "refine must be a number of samples"),
    (("score", LOG, *ASKED, "--device", "toaster"), "--device 'toaster' is no device"),
    (("score", LOG, *ASKED, "--memory-budget", "lots"), "memory_budget 'lots' is not understood"),
    # outputs
    (("score", LOG, *ASKED, "--out", "taken.safetensors"), "taken.safetensors exists: name another file, or pass --overwrite"),
    (("score", LOG, *ASKED, "--csv", "taken.safetensors"), "--csv taken.safetensors exists"),
    (("score", LOG, *ASKED, "--out", "no/s.safetensors"), "there is no folder no"),
    (("score", LOG, *ASKED, "--out", "."), "--out . is a folder"),
    (("score", LOG, *ASKED, "--out", "same", "--csv", "same"), "name two files"),
    (("report", SCORES, "--out", "taken.safetensors"), "exists: name another file, or pass --overwrite"),
    (("report", SCORES, "--out", "no/r.html"), "there is no folder no"),
    # the rest
    (("estimate", LOG), "estimate needs --problem"),
    (("estimate", *PROBLEM), "estimate needs a LOG, or --steps and --batch-size"),
    (("estimate", LOG, *PROBLEM, "--steps", "3"), "--steps and --batch-size are for a run to come"),
    (("estimate", *PROBLEM, "--steps", "0", "--batch-size", "1"), "steps must be a positive integer"),
    (("estimate", *PROBLEM, "--steps", "3", "--batch-size", "1", "--optimizer", "lion"), "--optimizer 'lion' is not one of"),
    (("compare", SCORES), "compare needs two files of scores, or one and --retrain K"),
    (("compare", SCORES, SCORES, "--retrain", "3"), "compare needs two files of scores, or one and --retrain K"),
    (("compare", SCORES, "--retrain", "3"), "--retrain needs --log, --problem, --query too"),
    (("compare", SCORES, "--retrain", "1", "--log", LOG, *ASKED), "--retrain must be between 2 and the 24 samples"),
    (("compare", SCORES, SCORES, "--value", "accuracy"), "no query 'accuracy'"),
    (("compare", SCORES, SCORES, "--value", "3"), "query 3 does not exist"),
    (
        ("compare", SCORES, "--retrain", "3", "--log", LOG, *PROBLEM, "--query", FILE + ":make_two_queries"),
        "ask the same query",
    ),
    (("report", SCORES, "--out", "r.html", "--query", FILE + ":make_query"), "--query needs --problem and --log"),
    (("report", SCORES, "--out", "r.html", "--image-shape", "4x4"), "--image-shape needs --problem"),
    (("report", SCORES, "--out", "r.html", *PROBLEM, "--image-shape", "four"), "'four' is not HEIGHTxWIDTH"),
    (("report", SCORES, "--out", "r.html", *PROBLEM, "--image-shape", "5x5"), "no image shape 5x5"),
    (("report", SCORES, "--out", "r.html", "--truth", "none"), "--truth: cannot read none"),
    (("report", SCORES, "--out", "r.html", "--truth", "words.txt"), "holds 'no', which is no sample id"),
    (("report", SCORES, "--out", "r.html", "--texts", "words.txt"), "there is none for sample"),
    (("report", SCORES, "--out", "r.html", "--truth", "taken.safetensors"), "is no text in UTF-8"),
    (("bench", "--repeat", "0"), "--repeat"),
    (("score", LOG, "--query", "training-loss"), "Missing option '--problem'"),
    (("score", LOG, *ASKED, "--refine", "some"), "Invalid value for '--refine'"),
    (("score", "--nonsense"), "No such option: --nonsense"),
    (("nonsense",), "No such command 'nonsense'"),
]


@pytest.mark.parametrize(("arguments", "reason"), MISTAKES, ids=[" ".join(a)[:70].replace(FILE, "") for a, _ in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_no_file(command, kept, here, arguments, reason):
    (here / "taken.safetensors").write_bytes(b"\xff")
    (here / "words.txt").write_text("no ids")
    assert reason in one_line(command(*(word.replace("{kept}", str(kept)) for word in arguments)))
    assert {path.name for path in here.iterdir()} == {"taken.safetensors", "words.txt"}
    assert (here / "taken.safetensors").read_bytes() == b"\xff"


def test_a_folder_that_cannot_be_written_is_said(here, monkeypatch):
    monkeypatch.setattr(cli_arguments.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match="cannot be written: permission denied"):
        cli_arguments.check_output(Path("new"), overwrite=False)


def test_scores_of_another_log_are_not_compared_with_retraining_on_this(command, kept, here):
    scores = dit.Influence.load(kept / "scores.safetensors")
    dit.Influence(**(vars(scores) | {"meta": {"log": "other"}})).save("s.safetensors")
    err = one_line(command("compare", "s.safetensors", "--retrain", "3", "--log", str(kept / "log"), *ASKED))
    assert "the scores are of another log" in err


def test_each_subcommand_has_help_with_an_example(command):
    for name in ("verify", "explain", "estimate", "score", "compare", "report", "bench", "info", "demo"):
        status, out, _ = command(name, "--help")
        assert status == 0 and f"Example: dit-fast {name}" in " ".join(out.split()), name
