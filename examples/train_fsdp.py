"""GMixout with FSDP2: mixed precision, clipping, validation, and checkpoints that any number of
ranks goes on from.

    torchrun --nproc-per-node 2 examples/train_fsdp.py --folder run
    torchrun --nproc-per-node 4 examples/train_fsdp.py --folder run --resume
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_text import pretrained, text
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gmixout_optim import GMixoutOptimizer

BATCH = 48  # of all ranks together: a number of them that divides it changes nothing but rounding
VALIDATION = -1  # the number of a batch that is not trained on


def loss_of(model: nn.Module, dialect: int, batch: int, device: torch.device) -> Tensor:
    """The mean loss of this rank's rows of a batch."""
    words = text(dialect, batch, BATCH)[dist.get_rank() :: dist.get_world_size()].to(device)
    logits = model(words[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), words[:, 1:].flatten())


def mean_over_ranks(value: Tensor) -> float:
    value = value.detach().clone()
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def save(folder: Path, step: int, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """All ranks call this, and each writes its part."""
    weights, state = get_state_dict(model, optimizer)
    kept = {"model": weights, "optimizer": state, "scheduler": scheduler.state_dict(), "step": step}
    dcp.save(kept, checkpoint_id=folder / f"step-{step:06d}")


def newest(folder: Path) -> str | None:
    """The last checkpoint that is complete: ``.metadata`` is written last."""
    found = [max((file.parent for file in folder.glob("step-*/.metadata")), default=None)]
    dist.broadcast_object_list(found)  # rank 0 decides for all
    return None if found[0] is None else str(found[0])


def load(path: str, model: nn.Module, optimizer: Any, scheduler: Any) -> int:
    """All ranks call this; returns the number of steps that were taken."""
    weights, state = get_state_dict(model, optimizer)
    kept = {"model": weights, "optimizer": state, "scheduler": scheduler.state_dict(), "step": 0}
    dcp.load(kept, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"]
    )
    scheduler.load_state_dict(kept["scheduler"])
    return int(kept["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and the model")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--steps", type=int, default=100, help="(default: 100)")
    parser.add_argument("--save-every", type=int, default=25, help="steps (default: 25)")
    args = parser.parse_args()

    dist.init_process_group()  # gloo for CPUs, nccl for GPUs
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")

    # First spread the model over the ranks, then build the optimizer: fully_shard() puts new
    # parameters into the model.
    model = pretrained().to(device)  # the same weights on all ranks; in your script, a checkpoint
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # The same settings and seed on all ranks. A model with a new head excludes it here.
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
    optimizer = GMixoutOptimizer(optimizer, resample_every=10, grad_layout="packed")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    path, step = newest(args.folder), 0
    if args.resume and path is not None:
        step = load(path, model, optimizer, scheduler)
    elif path is not None:
        parser.error(f"{path} is there already: --resume, or another --folder")

    def report(loss: float) -> None:
        with optimizer.eval_weights(), torch.no_grad():  # the weights to deploy
            found = mean_over_ranks(loss_of(model, 1, VALIDATION, device))
        if dist.get_rank() == 0:
            print(f"step {step}: training loss {loss:.4f}, validation loss {found:.4f}", flush=True)

    while step < args.steps:
        loss = loss_of(model, 1, step, device)
        loss.backward()
        optimizer.clip_grad_norm_(1.0)  # the norm over all ranks, and over active weights alone
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        step += 1
        if step % args.save_every == 0 or step == args.steps:
            report(mean_over_ranks(loss))
            save(args.folder, step, model, optimizer, scheduler)

    optimizer.consolidate()  # from here on the model holds the weights to deploy
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options)  # plain tensors, on rank 0 alone
    if dist.get_rank() == 0:
        torch.save(whole, args.folder / "model.tmp")
        os.replace(args.folder / "model.tmp", args.folder / "model.pt")
    dist.barrier()  # nobody leaves while rank 0 writes
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
