"""Processes of a distributed run for test_ranks.py: `python ranks_children.py RANK WORLD FOLDER`."""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import distributed, nn

import dit_fast as dit

N, STEPS, WORLD = 20, 7, 2


def net():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def data():
    generator = torch.Generator().manual_seed(6)
    return torch.randn(N, 3, generator=generator).double(), torch.randn(N, 1, generator=generator).double()


def losses(output, target):
    return (output - target).square().sum(1)


def micro_batches(step, rank):
    """The batches of one rank in one step, of several sizes; two of them in every third step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    sizes = (3 + rank, 2) if step % 3 == 1 else (4 - rank,)
    return [torch.randint(N, (size,), generator=generator) for size in sizes]


def train(model, optimizer, recorder, start=0, stop=STEPS, rank=None):
    """Steps of one rank of WORLD, or of all of them together in one process."""
    x, y = data()
    for step in range(start, stop):
        optimizer.zero_grad()
        ranks = range(WORLD) if rank is None else [rank]
        for number in ranks:
            parts = micro_batches(step, number)
            for ids in parts:
                share = 1 / len(parts) / len(ranks)
                (losses(model(x[ids]), y[ids]).mean() * share).backward()
                recorder.batch(ids, scale=share)
        optimizer.step()
        recorder.mark(f"step {step}")


def message_of(call):
    try:
        call()
    except (dit.LogError, dit.UnsupportedError) as error:
        return f"{type(error).__name__}: {error}"


def step_with(recorder, optimizer, ids):
    if ids is None:
        optimizer.step()
    else:
        with recorder.step(ids):
            optimizer.step()


def main(rank, folder):
    model = net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = adamw(model)
    report, checkpoint = {}, None
    with dit.Recorder(folder / "log", wrapped, optimizer, num_samples=N, chunk_bytes=1) as recorder:
        train(wrapped, optimizer, recorder, rank=rank)
        checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(wrapped, optimizer, recorder, STEPS, STEPS + 2, rank=rank)
    distributed.barrier()
    report["existing"] = message_of(lambda: dit.Recorder(folder / "log", wrapped, optimizer))
    model.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    with dit.Recorder(folder / "log", wrapped, optimizer, num_samples=N, chunk_bytes=1, resume=True) as recorder:
        report["resumed at"] = recorder.num_steps
        train(wrapped, optimizer, recorder, STEPS, STEPS + 3, rank=rank)
    distributed.barrier()

    recorder = dit.Recorder(folder / "refused", wrapped, optimizer)
    (x, y), rows = data(), list(range(N))
    losses(wrapped(x), y).mean().backward()
    report["no ids"] = message_of(lambda: step_with(recorder, optimizer, rows if rank == 0 else None))
    optimizer.param_groups[0]["lr"] = 0.1 + rank
    report["settings"] = message_of(lambda: step_with(recorder, optimizer, rows))
    optimizer.param_groups[0]["lr"] = 0.1
    recorder.close()
    distributed.barrier()
    recorder = dit.Recorder(folder / "refused", wrapped, optimizer, overwrite=True)
    if rank == 0:
        (folder / "refused/manifest.json").write_text("{}")
    report["disk"] = message_of(lambda: step_with(recorder, optimizer, rows))
    recorder.close()

    with torch.no_grad():
        model[0].bias += rank
    report["parameters"] = message_of(lambda: dit.Recorder(folder / "other", wrapped, optimizer))
    with torch.no_grad():
        model[0].bias -= rank
    report["not wrapped"] = message_of(lambda: dit.Recorder(folder / "other", model, optimizer))
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(net(), mesh=distributed.init_device_mesh("cpu", (WORLD,)))
    report["sharded"] = message_of(lambda: dit.Recorder(folder / "other", sharded, adamw(sharded)))
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    number, target = int(sys.argv[1]), Path(sys.argv[3])
    distributed.init_process_group("gloo", init_method=f"file://{target}/store", rank=number, world_size=int(sys.argv[2]))
    main(number, target)
    distributed.barrier()
    distributed.destroy_process_group()
