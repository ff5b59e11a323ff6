"""Runs for test_durability.py that are killed, each in a forked process of its own: `python durability_children.py FOLDER`."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from recorder_children import forked, killed_at
from test_resume import Run

import dit_fast as dit

STEPS = 120
# name → (kind of optimizer, options of the Recorder); chunks are of few steps
RUNS = {
    "sgd": ("sgd", {}),
    "momentum": ("momentum", {}),
    "adam": ("adam", {"every": 3, "chunk_bytes": 1000}),
    "bfloat16": ("adamw", {"log_dtype": "bfloat16"}),
}
TRIALS = 14
# (call, number, whether after it) of the writer at which a run that goes on is killed; the cut comes first
MOMENTS = [(call, number, after) for call in ("fsync", "replace") for number in (1, 2, 3, 6) for after in (False, True)]
MOMENTS += [("unlink", number, after) for number in (1, 2, 3) for after in (False, True)]
MOMENTS += [("write", number, False) for number in (1, 2, 5, 9, 10, 11, 12)]


def run_to(path, name, checkpoints, step=None, stop=STEPS, tell=lambda: None):
    """Train and log from a checkpoint to the end, on top of what the log holds; `tell` is called after each step."""
    kind, options = RUNS[name]
    run = Run(kind, options)
    if step is not None:
        run.load(checkpoints, step)
    with run.recorder(path, resume=step is not None) as recorder:
        assert recorder.num_steps == (step or 0)
        if run.step and run.step % 7 == 0:  # the kill may have come between the last chunk and the mark at its end
            recorder.mark(f"mark {run.step}")
        while run.step < stop:
            run.train(run.step + 1, recorder)
            tell()


def old_checkpoint(path, chance):
    """A step whose checkpoint the run can go on from."""
    if not (path / "manifest.json").exists():
        return 0
    log = dit.Trajectory.open(path)
    stored = [t for t in range(log.num_steps + 1) if log.has_params(t)] if log.num_steps else [0]
    return chance.choice(stored)


def killed_after(steps, delay, *args):
    """Kill a run some seconds after so many steps."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        run_to(*args, tell=lambda: os.write(write, b"."))
        os._exit(0)
    os.close(write)
    while steps > 0 and (told := os.read(read, steps)):
        steps -= len(told)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.close(read)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def kill_at_random(folder, truths, chance):
    """Runs killed, resumed, killed and resumed to their end; the log after each kill is kept beside the last one."""
    killed = 0
    for trial in range(TRIALS):
        name = list(RUNS)[trial % len(RUNS)]
        checkpoints, path = truths[name], folder / f"{name}-{trial}"
        killed += killed_after(trial * STEPS // TRIALS, 0.01 * chance.random(), path, name, checkpoints)
        if path.exists():
            shutil.copytree(path, folder / f"{name}-{trial}-killed")
        step = old_checkpoint(path, chance)
        killed += killed_after(chance.randrange(STEPS - step), 0.01 * chance.random(), path, name, checkpoints, step)
        if path.exists():
            shutil.copytree(path, folder / f"{name}-{trial}-again")
        step = old_checkpoint(path, chance)
        status, _ = forked(lambda: run_to(path, name, checkpoints, step))  # noqa: B023, run at once
        assert status == 0, (path, step)
    return killed


def kill_within_the_cut(folder, truths):
    """The same at every system call of the cut and of the first chunks after it."""
    first = {}
    for name in ("adam", "sgd"):
        first[name] = folder / f"{name}-whole"
        run_to(first[name], name, truths[name], stop=60)
        for number, (call, count, after) in enumerate(MOMENTS):
            path = folder / f"{name}-cut{number}"
            shutil.copytree(first[name], path)
            step = 30 if number % 2 else 33
            status, _ = forked(lambda: (killed_at(call, count, after), run_to(path, name, truths[name], step)))  # noqa: B023
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (path, call, count, after)


def truth(folder, name):
    """Checkpoints of every step of a run without accidents, whose log is kept."""
    kind, options = RUNS[name]
    run = Run(kind, options)
    with run.recorder(folder / f"{name}-truth") as recorder:
        run.train(STEPS, recorder)
    return run.checkpoints


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    known = {name: truth(target, name) for name in RUNS}
    number = kill_at_random(target, known, random.Random(0))
    kill_within_the_cut(target, known)
    print(json.dumps({"killed": number}))
