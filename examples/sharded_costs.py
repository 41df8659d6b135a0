"""What an optimizer keeps on each rank under FSDP2, and what its state dict takes: measured.

torchrun --nproc-per-node 2 examples/sharded_costs.py
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bench.models.llama import Llama, LlamaConfig

MB = 1e6


def local_bytes(item: Any) -> int:
    """Of what this rank holds of all tensors in nested dicts and lists."""
    if isinstance(item, dict | list | tuple):
        return sum(map(local_bytes, item.values() if isinstance(item, dict) else item))
    if not isinstance(item, torch.Tensor):
        return 0
    return item.to_local().nbytes if isinstance(item, DTensor) else item.nbytes


def peak(call: Callable[[], Any]) -> float:
    """MB of tensors beyond those that the process had before, while a call runs."""
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / MB


def seconds(call: Callable[[], Any]) -> float:
    """That this process computes in a call; it may wait for others."""
    dist.barrier()
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(grad_layout: str | None, folder: Path) -> dict[str, float]:
    """Of AdamW, and with a layout of gradients, of GMixout around it."""
    torch.manual_seed(0)
    config = LlamaConfig(512, 4, heads=8, key_heads=8, hidden=1408, vocabulary=4096, tokens=16)
    model = Llama(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer: Any = torch.optim.AdamW(model.named_parameters())
    if grad_layout is not None:
        optimizer = GMixoutOptimizer(optimizer, grad_layout=grad_layout)
    inputs, targets = model.batch(1)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(inputs, targets).backward()
        optimizer.step()
    grads = [param.grad._local_tensor for param in model.parameters()]
    found = {
        "weights": local_bytes([param.detach() for param in model.parameters()]),
        "gradients": sum(getattr(grad, "active", grad).nbytes for grad in grads),
    }
    if grad_layout is None:
        found["base state"] = local_bytes(list(optimizer.state.values()))
    else:
        report = optimizer.report()  # this rank's
        found |= {
            "base state": report.total("state_bytes"),
            "anchors": report.total("anchor_bytes"),
            "indices": report.total("index_bytes"),
        }
    found["state dict"] = local_bytes(optimizer.state_dict())
    found = {key: value / MB for key, value in found.items()}
    found["seconds of state_dict()"] = min(seconds(optimizer.state_dict) for _ in range(3))
    found["peak of state_dict()"] = peak(optimizer.state_dict)

    def save() -> None:
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)

    found["seconds of saving"] = seconds(save)
    found["checkpoint"] = sum(file.stat().st_size for file in folder.iterdir()) / MB
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*looks freshly initialised")
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    titles = {"AdamW": None, "GMixout": "dense", "GMixout, packed gradients": "packed"}
    found = [measure(kind, Path(folders[0], str(kind))) for kind in titles.values()]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if dist.get_rank() == 0:
        print(f"{len(ranks)} ranks; of the rank with the most, MB and seconds")
        print("| | " + " | ".join(titles) + " |\n|---|" + "---|" * len(titles))
        for key in found[1]:
            most = [max(rank[way].get(key, 0) for rank in ranks) for way in range(len(titles))]
            print(f"| {key} | " + " | ".join(f"{value:.3g}" for value in most) + " |")
        shutil.rmtree(folders[0])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
