"""How weights are spread over ranks, and what the rank with the most holds of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from gmixout_optim.cells import Granularity, Grid
from gmixout_optim.index_sets import MAX_CELLS, active_count
from gmixout_optim.shards import Piece


@dataclass(frozen=True)
class Sharding:
    """How weights are spread over ``shards * replicas`` ranks.

    Attributes:
        name: as it was asked for.
        shards: ranks that share the weights.
        replicas: ranks that hold the same shard.
    """

    name: str
    shards: int
    replicas: int

    @classmethod
    def of(cls, name: str, ranks: int) -> Sharding:
        """``"fsdp2"``, ``"ddp"`` or ``"hsdp:R"`` with R replicas.

        Raises:
            ValueError: another name, or replicas that the ranks cannot be divided into.
        """
        if name == "fsdp2":
            return cls(name, ranks, 1)
        if name == "ddp":
            return cls(name, 1, ranks)
        kind, _, number = name.partition(":")
        if kind != "hsdp" or not number.isdecimal():
            raise ValueError(
                "sharding must be fsdp2, ddp or hsdp:R with a number of replicas such as hsdp:2, "
                f"got {name!r}"
            )
        replicas = int(number)
        if replicas < 1 or ranks % replicas:
            raise ValueError(f"{ranks} ranks cannot be divided into {replicas} replicas")
        return cls(name, ranks // replicas, replicas)

    def network_bytes(self, shard: int) -> int:
        """Bytes that a rank sends in a training step, and receives, for a shard of so many bytes.

        Weights are gathered for forward and again for backward, gradients are reduced and
        scattered; replicas then all-reduce the gradients of their shard. Each collective moves the
        fewest bytes possible, as a ring does.
        """
        gathered_and_scattered = 3 * (self.shards - 1) * shard
        reduced = 2 * (self.replicas - 1) * shard // self.replicas
        return gathered_and_scattered + reduced


@dataclass(frozen=True)
class Share:
    """A rank's share of a tensor: of all ranks' the largest.

    ``Shard(0)`` of FSDP2 gives each rank the same number of rows, rounded up, so it is the first
    rank's. Which cells are active in it differs between episodes; on average it is a share d.

    Attributes:
        weights: elements.
        active, most: active elements, on average over episodes and at most.
        indices, most_indices: bytes of the index set, likewise.
        drawn: active cells, on average.
        packed: active elements of the whole tensor.
    """

    weights: int
    active: int
    most: int
    indices: int
    most_indices: int
    drawn: int
    packed: int

    @classmethod
    def of(
        cls, shape: Sequence[int], density: float, granularity: Granularity, shards: int
    ) -> Share:
        """The share of a tensor that ``shards`` ranks share.

        Raises:
            ValueError: the tensor has more cells than can be numbered.
        """
        whole = Grid.of(torch.empty(shape, device="meta"), granularity)
        if whole.cells > MAX_CELLS:
            raise ValueError(
                f"a tensor of shape {tuple(shape)} has {whole.cells} cells at granularity="
                f"{granularity!r}, more than {MAX_CELLS}: use a coarser granularity"
            )
        active = active_count(whole.cells, density)
        rows = -(-shape[0] // shards) if shape else 1
        weights = rows * prod(shape[1:])
        sizes = (rows, *shape[1:]) if shape else ()
        offsets = (0,) * len(shape)
        piece = Piece(tuple(shape), offsets, sizes) if sizes != tuple(shape) else None
        local = Grid.of(torch.empty(sizes, device="meta"), granularity, piece)
        is_cut = local.inner < whole.inner  # blocks of elements: kept as single ones
        if whole.outer > 1:  # columns: each shard has a piece of all of them
            width, average, most = rows * whole.inner, float(active), active
        else:
            width = whole.inner
            touched = -(-weights // width) + is_cut
            average = active * weights / (whole.cells * width)
            # A set has one cell in each stratum.
            most = min(active, touched, 1 + -(-(touched - 1) * active // whole.cells))
        address = local.address_dtype.itemsize * (width if is_cut else 1)
        return cls(
            weights=weights,
            active=round(average * width),
            most=min(weights, most * width),
            indices=round(average * address),
            most_indices=most * address,
            drawn=round(average),
            packed=active * whole.width,
        )
