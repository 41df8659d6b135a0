"""GMixout with DistributedDataParallel: gradient accumulation, validation, and checkpoints.

torchrun --nproc-per-node 2 examples/train_ddp.py --folder run
torchrun --nproc-per-node 2 examples/train_ddp.py --folder run --resume
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_task import Spirals, pretrained
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from gmixout_optim import GMixoutOptimizer

ACCUMULATE = 2  # batches to a step


@torch.no_grad()
def accuracy(model: nn.Module, data: Spirals, device: torch.device) -> float:
    """Of all ranks together; each looks at its part of the data."""
    part = slice(dist.get_rank(), None, dist.get_world_size())
    inputs, labels = data.inputs[part].to(device), data.labels[part].to(device)
    model.eval()
    correct = (model(inputs)["logits"].argmax(1) == labels).sum()
    model.train()
    dist.all_reduce(correct)
    return float(correct) / len(data)


def write(item: Any, path: Path) -> None:
    """On rank 0; a run that is killed leaves no half-written file."""
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(item, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def newest(folder: Path) -> Path | None:
    found = [max(folder.glob("epoch-*.pt"), default=None)]
    dist.broadcast_object_list(found)  # rank 0 decides for all
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and the model")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--epochs", type=int, default=10, help="(default: 10)")
    args = parser.parse_args()

    dist.init_process_group()  # gloo for CPUs, nccl for GPUs
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")

    model = DistributedDataParallel(pretrained().to(device))
    # The same settings and seed on all ranks, which then draw the same index sets without
    # communicating. Patterns match with and without DDP's "module." in front.
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    optimizer = GMixoutOptimizer(optimizer, exclude="head.*", resample_every=8)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    data, validation = Spirals(512, turns=(0.2, 0.8)), Spirals(512, seed=2)
    sampler = DistributedSampler(data, seed=0)
    batches = DataLoader(data, batch_size=16, sampler=sampler)

    path, done = newest(args.folder), 0
    if args.resume and path is not None:  # all ranks load what one has saved
        saved = torch.load(path, map_location=device)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        done = saved["epochs"]
    elif path is not None:
        parser.error(f"{path} is there already: --resume, or another --folder")

    for epoch in range(done, args.epochs):
        sampler.set_epoch(epoch)
        for number, batch in enumerate(batches, start=1):
            steps = number % ACCUMULATE == 0 or number == len(batches)
            with nullcontext() if steps else model.no_sync():  # gradients are reduced once a step
                output = model(**{key: item.to(device) for key, item in batch.items()})
                (output["loss"] / ACCUMULATE).backward()
            if steps:
                optimizer.clip_grad_norm_(1.0)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
        with optimizer.eval_weights():  # the weights to deploy
            found = accuracy(model, validation, device)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: accuracy {found:.3f}", flush=True)
        kept = {
            "model": model.module.state_dict(),
            "optimizer": optimizer.state_dict(),  # exact in mid-episode, and the same on all ranks
            "scheduler": scheduler.state_dict(),
            "epochs": epoch + 1,
        }
        write(kept, args.folder / f"epoch-{epoch + 1:03d}.pt")

    optimizer.consolidate()  # from here on the model holds the weights to deploy
    write(model.module.state_dict(), args.folder / "model.pt")
    dist.barrier()  # nobody leaves while rank 0 writes
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
