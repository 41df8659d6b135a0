"""Models whose parameters are spread over ranks, and trainings that are the same on any number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.shards import is_dtensor, whole_of


class Block(nn.Module):
    """Two matrices, of which tensor parallel cuts the first by rows and the second by columns."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Sizes that no number of ranks divides, and a parameter with fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 37)
        self.blocks = nn.ModuleList([Block(37, 48) for _ in range(2)])
        self.head = nn.Linear(37, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def net(dtype: torch.dtype = torch.float64) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


class Terms(nn.Module):
    """A sum over weights, each times an integer: gradients are integers, whoever adds them up."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(7,), (10, 40), (3, 33), (40, 8), (6, 4, 3)]
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        )

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for weight in self.weights:
            factor = (torch.arange(weight.numel()) % 7 - 3).view(weight.shape).to(x.dtype)
            if is_dtensor(weight):
                mesh, placements = weight.device_mesh, weight.placements
                factor = distribute_tensor(factor, mesh, placements, src_data_rank=None)
            total = total + x * whole_of((weight * factor).sum())
        return total


class Exact(nn.Module):
    """With the loss of :func:`train_exactly` every weight's gradient is exact in any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Terms(), Terms()])

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = sum(block(x) for block in self.blocks)  # type: ignore[assignment]
        return total


def exact(dtype: torch.dtype = torch.float32) -> nn.Module:
    return Exact().to(dtype)


def train_exactly(
    model: nn.Module, optimizer: Any, spread: str, steps: range, before: Any = None
) -> None:
    """Twelve rows of small integers a step, which the ranks share."""
    for step in steps:
        rows = torch.tensor([1.0, 0.0, -1.0, 2.0] * 3).roll(step) * (1 - 2 * (step % 2))
        part = part_of_batch(spread, len(rows))
        ranks = len(rows) // len(rows[part])  # DDP and FSDP2 take the mean
        optimizer.zero_grad()
        if before is not None:
            before()
        dtype = next(model.parameters()).dtype
        (ranks * model(rows[part].sum().to(dtype))).backward()
        optimizer.step()


def one(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module, **options: Any) -> nn.Module:
    options.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, **options)
    return fully_shard(model, **options)


def hsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "shard"))
    return fsdp(model, mesh=mesh)


def tp(model: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        if isinstance(block, Terms):
            for place, weight in enumerate(block.weights):
                cut = distribute_tensor(
                    weight.detach(), mesh, [Shard(min(place % 3, 1, weight.ndim - 1))]
                )
                block.weights[place] = nn.Parameter(cut)
        else:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def fsdp_tp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    return fsdp(tp(model, mesh["tp"]), mesh=mesh["dp"])


SPREADS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "one": one,
    "ddp": ddp,
    "fsdp": fsdp,
    "hsdp": hsdp,
    "tp": tp,
    "fsdp_tp": fsdp_tp,
}


def part_of_batch(spread: str, rows: int) -> slice:
    """Which rows of the global batch this rank has."""
    if spread in ("one", "tp"):
        return slice(None)
    rank, size = dist.get_rank(), dist.get_world_size()
    if spread == "fsdp_tp":
        rank, size = rank // (size // 2), 2
    assert rows % size == 0
    return slice(rank * rows // size, (rank + 1) * rows // size)


def whole_weights(model: nn.Module) -> list[Tensor]:
    return [whole_of(param.detach()).clone() for param in model.parameters()]


def whole_masks(optimizer: GMixoutOptimizer) -> list[Tensor]:
    return [
        whole_of(optimizer.active_mask(param)).clone()
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def wrap(model: nn.Module, base: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> Any:
    settings: dict[str, Any] = dict(exclude="*head*", resample_every=3, mask_prob=0.7, seed=5)
    lr = options.pop("lr", 0.01)
    return GMixoutOptimizer(base(model.named_parameters(), lr=lr), **{**settings, **options})


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 5, generator=generator, dtype=dtype)
    return x, torch.randn(12, 2, generator=generator, dtype=dtype)


def train(
    model: nn.Module, optimizer: Any, spread: str, steps: range, clip: float | None = None
) -> list[Tensor]:
    """Returns the norms of the gradients, where they are clipped."""
    norms = []
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = batch(step, dtype)
        part = part_of_batch(spread, len(x))
        optimizer.zero_grad()
        (model(x[part]) - y[part]).square().mean().backward()
        if clip is not None:
            norms.append(whole_of(optimizer.clip_grad_norm_(clip)))
        optimizer.step()
    return norms
