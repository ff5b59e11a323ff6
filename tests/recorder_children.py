"""Accidents for test_recorder.py, each in a forked process of its own: `python recorder_children.py FOLDER`."""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from test_recorder import net, sgd, train

import dit_fast as dit
from dit_fast import log

STEPS = 200


def record(path, steps=STEPS):
    """Train and log; the recorder is left open."""
    model = net()
    optimizer = sgd(model)
    recorder = dit.Recorder(path, model, optimizer, chunk_bytes=1)
    train(model, optimizer, steps, recorder)
    return model, optimizer, recorder


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class MortalFile:
    """Kills the process half-way through its n-th write."""

    def __init__(self, file, countdown):
        self._file, self._countdown = file, countdown

    def write(self, data):
        if self._countdown():
            self._file.write(data[: len(data) // 2])
            die()
        return self._file.write(data)

    def fileno(self):
        return self._file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def killed_at(call, number, after):
    """SIGKILL before or after the number-th `call` of the log's writer, or half-way through a write."""
    left = number

    def countdown():
        nonlocal left
        left -= 1
        return left == 0

    if call == "write":
        log.open = lambda *args, **kw: MortalFile(open(*args, **kw), countdown)  # noqa: SIM115
        return
    real = getattr(os, call)

    def mortal(*args):
        last = countdown()
        if last and not after:
            die()
        value = real(*args)
        if last:
            die()
        return value

    setattr(log.os, call, mortal)


def forked(work):
    """Run in a child to its end; its exit status and what it printed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        answer = work()
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    return os.waitpid(pid, 0)[1], json.loads(text) if text else None


def kill(folder):
    names = []
    plan = [(call, number, after) for call in ("fsync", "replace") for number in (1, 3, 4, 5, 6, 9) for after in (False, True)]
    plan += [("write", number, False) for number in (1, 2, 4, 8, 9, 10, 17, 18, 30)]
    for call, number, after in plan:
        name = f"{call}-{number}-{after}"
        status, _ = forked(lambda: (killed_at(call, number, after), record(folder / name)[2].close()))  # noqa: B023, run at once
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, name
        names.append(name)
    for number in range(4):
        name = f"random-{number}"
        pid = os.fork()
        if pid == 0:
            record(folder / name, steps=STEPS)
            time.sleep(60)
        time.sleep(0.03 + 0.05 * number)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        names.append(name)
    return names


def limited(folder):
    def work():
        model = net()
        optimizer = sgd(model)
        recorder = dit.Recorder(folder / "limit", model, optimizer, chunk_bytes=64 * 1024)
        train(model, optimizer, 2, recorder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            train(model, optimizer, STEPS * 6, recorder)
            recorder.close()
        except dit.LogError as error:
            return {"error": str(error), "steps": recorder.num_steps}

    return forked(work)[1]


def fork_inside(folder):
    """A child, such as a DataLoader's worker, forked while a log is being written."""
    _, optimizer, recorder = record(folder / "fork", steps=9)

    def work():
        try:
            recorder.mark("child")
        except dit.LogError as error:
            optimizer.step()
            recorder.close()
            return {"error": str(error)}

    answer = forked(work)[1]
    recorder.close()
    return answer


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm = net()
    train(warm, sgd(warm), 1)  # what torch loads at its first step is loaded once, not in every child
    target = Path(sys.argv[1])
    report = {"killed": kill(target), "limit": limited(target), "fork": fork_inside(target)}
    print(json.dumps(report), flush=True)
    record(target / "forgotten", steps=6)
