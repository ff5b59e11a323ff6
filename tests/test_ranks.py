"""DistributedDataParallel: two processes leave the log, and the scores, of the same run in one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks_children import STEPS, WORLD, N, adamw, data, losses, micro_batches, net, train
from torch import nn

import dit_fast as dit

CHILDREN = Path(__file__).with_name("ranks_children.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder, what rank 0 says, what rank 1 says)."""
    folder = tmp_path_factory.mktemp("ranks")
    children = [
        subprocess.Popen(
            [sys.executable, CHILDREN, str(rank), str(WORLD), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        answers = [child.communicate(timeout=100) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert not any(child.returncode for child in children), "\n".join(errors for _, errors in answers)
    return folder, *(json.loads(text) for text, _ in answers)


def test_the_log_and_its_scores_are_those_of_one_process(ranks, tmp_path):
    folder = ranks[0]
    model = net()
    optimizer = adamw(model)
    with dit.Recorder(tmp_path / "log", model, optimizer, num_samples=N) as recorder:
        train(model, optimizer, recorder, stop=STEPS + 3)
    many, one = dit.Trajectory.open(folder / "log"), dit.Trajectory.open(tmp_path / "log")
    many.verify()
    assert list(many.parameters) == list(one.parameters) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert many.marks == one.marks and many.num_steps == one.num_steps == STEPS + 3
    for t in range(many.num_steps):
        parts = [micro_batches(t, rank) for rank in range(WORLD)]
        assert many.batch_ids(t).tolist() == [int(i) for part in parts for ids in part for i in ids]
        assert [s.stop - s.start for s in many.micro_batches(t)] == [len(ids) for part in parts for ids in part]
        torch.testing.assert_close(many.coefficients(t), one.coefficients(t), rtol=1e-15, atol=0)
        assert many.settings(t) == one.settings(t)
        for name, value in many.params(t + 1).items():
            torch.testing.assert_close(value, one.params(t + 1)[name], rtol=1e-10, atol=1e-12)
    x, y = data()
    problem = dit.Problem(net(), losses, (x, y))
    query, windows = dit.queries.loss(x[:4], y[:4]), {"whole": (0, STEPS + 3), "late": (5, STEPS + 3)}
    scores = [dit.score(run, problem, query, windows, check=True).scores for run in (many, one)]
    torch.testing.assert_close(*map(torch.as_tensor, scores), rtol=1e-7, atol=1e-12)
    assert torch.as_tensor(scores[0]).abs().max() > 1e-4


def test_resumption_is_known_to_every_rank(ranks):
    assert [answer["resumed at"] for answer in ranks[1:]] == [STEPS, STEPS]


# (what rank 0 says, what rank 1 says)
REFUSED = {
    "existing": ("LogError: .*log holds a log already", "LogError: rank 0: .*log holds a log already"),
    "no ids": ("LogError: rank 1: step 0: .*without ids", r"LogError: step 0: optimizer.step\(\) without ids"),
    "settings": ("LogError: step 0: the optimizer's settings or gradients are not the same in all processes",) * 2,
    "disk": ("LogError: .*refused holds a log by now", "LogError: rank 0: .*refused holds a log by now"),
    "parameters": ("LogError: the model's parameters are not the same in all processes",) * 2,
    "not wrapped": ("UnsupportedError: training in several processes .* DistributedDataParallel alone",) * 2,
    "sharded": ("UnsupportedError: module '' is sharded by FSDP .*: no process holds its parameters whole",) * 2,
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_every_process(ranks, case):
    """What goes wrong in one process ends all of them with a message, and nobody waits."""
    for answer, message in zip(ranks[1:], REFUSED[case], strict=True):
        assert answer[case] is not None
        with pytest.raises(dit.LogError, match=message):
            raise dit.LogError(answer[case])


def test_a_refused_run_leaves_nothing(ranks):
    folder = ranks[0]
    assert not (folder / "other/manifest.json").exists() and not list(folder.glob("*/.*"))


class FullyShardedDataParallel(nn.Sequential):
    pass


def test_fsdp_is_refused_by_name(tmp_path):
    model = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 1)))
    with pytest.raises(dit.UnsupportedError, match=r"module '0' is sharded by FSDP \(FullyShardedDataParallel\)"):
        dit.Recorder(tmp_path / "log", model, adamw(model))
    assert not (tmp_path / "log").exists()


def test_a_second_optimizer_on_one_model_is_refused(tmp_path):
    model = net()
    first = adamw(model[0])
    with dit.Recorder(tmp_path / "one", model, first):
        for second in (adamw(model[0]), adamw(model)):
            with pytest.raises(dit.UnsupportedError, match=r"more than one optimizer on one model is not supported.*one"):
                dit.Recorder(tmp_path / "two", model, second)
        inner = adamw(model[0])
        with pytest.raises(dit.UnsupportedError, match="more than one optimizer"):
            dit.Recorder(tmp_path / "two", model[0], inner)
        other = net()
        with dit.Recorder(tmp_path / "two", other, adamw(other)):  # another model of the same kind
            pass
    with dit.Recorder(tmp_path / "three", model, adamw(model)):
        pass
