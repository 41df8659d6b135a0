"""What ranks that train one model have to agree on, and calls that all of them have to make."""

from __future__ import annotations

import gc
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from numbers import Real
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from gmixout_optim.members import Members, parameters
from gmixout_optim.param_groups import unwrapped
from gmixout_optim.settings import SAVED, Run
from gmixout_optim.shards import is_dtensor, meshes_of
from gmixout_optim.warn import warn

# Seconds of waiting for other ranks before a warning says so.
_PATIENCE = 30.0

# How often some ranks have met in meet().
_rounds: dict[str, int] = {}


def check_alike(members: Members, groups: Sequence[dict[str, Any]]) -> None:
    """Raise where ranks that train the same model have other seeds, settings or counters.

    A small all-gather of ranks whose gradients are reduced together, which all step. Other ranks
    are not waited for.

    Raises:
        RuntimeError: names what differs, on all of these ranks.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return
    params = [param for _, _, _, param in parameters(groups)]
    facts = dict(_facts(members, groups))
    own = [distributed.get_rank(), *map(_number_of, facts.values())]
    tables = [_gathered(own, along, device) for along, device in _groups_of(params)]
    differing = {row[0]: row for table in tables for row in table if row[1:] != own[1:]}
    if differing:
        kinds = zip(facts.items(), own[1:], *(row[1:] for row in differing.values()), strict=True)
        named = [fact for fact, mine, *theirs in kinds if any(each != mine for each in theirs)]
        shown = [name if isinstance(value, tuple) else f"{name}={value!r}" for name, value in named]
        raise RuntimeError(
            f"ranks differ: {', '.join(shown)} on rank {own[0]} are not those of ranks "
            f"{str(sorted(differing))[1:-1]}, and they would train other weights. Build the "
            "optimizer with the same settings, and the same parameters in the same order, on all "
            "ranks; load a state dict on all of them or on none"
        )


def _gathered(row: list[int], along: list[Any], device: torch.device) -> list[list[int]]:
    """The rows of all ranks of a mesh, gathered along one of its dimensions after the other."""
    table = torch.tensor([row], dtype=torch.int64, device=device)
    for group in along:
        parts = [torch.empty_like(table) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, table, group=group)
        table = torch.cat(parts)
    rows: list[list[int]] = table.tolist()
    return rows


def _facts(members: Members, groups: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What has to be the same on all ranks. Tuples are too long to be shown."""
    run: Run = members.run
    for key in SAVED:
        yield key, getattr(run, key)
    yield "the number of trained tensors", len(members.trained())
    yield "the options of the groups", tuple(map(_options, groups))
    mixed = [
        (unwrapped(m.name), tuple(m.param.shape), m.cells.mask_prob, m.cells.granularity)
        for m in members
    ]
    yield "the parameters that are mixed", tuple(mixed)
    shapes = [tuple(param.shape) for _, _, _, param in parameters(groups)]
    yield "the parameters", tuple(shapes)


def _options(group: dict[str, Any]) -> tuple[Any, ...]:
    """A group's options that are numbers, or several: its lr, betas, anchor_decay and so on."""
    return tuple(
        (key, item if isinstance(item, Real) else tuple(item))
        for key, item in sorted(group.items())
        if isinstance(item, Real)
        or (isinstance(item, list | tuple) and all(isinstance(each, Real) for each in item))
    )


def _number_of(value: Any) -> int:
    """An int64 that tells values apart."""
    if isinstance(value, int):
        return int(value)
    digest = hashlib.sha256(repr(value).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _groups_of(params: Sequence[Tensor]) -> Iterator[tuple[list[Any], torch.device]]:
    """The process groups over which gradients are reduced, in the same order on all ranks: those of
    the dimensions of each mesh, or DDP's; and the device on which they communicate."""
    meshes = meshes_of(params)
    for mesh in meshes:
        yield _groups_of_mesh(mesh), _device_of(mesh)
    if meshes or distributed.get_world_size() == 1:
        return
    own = set(map(id, params))
    for found in _instances_of(DistributedDataParallel):
        if any(id(param) in own for param in found.parameters()):
            yield [found.process_group], found.device or params[0].device


def _groups_of_mesh(mesh: Any) -> list[Any]:
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]


def _device_of(mesh: Any) -> torch.device:
    return torch.device(mesh.device_type)


def _instances_of(kind: type) -> list[Any]:
    # Not isinstance(): objects that pretend to be of another class compute the answer.
    return [item for item in gc.get_objects() if issubclass(type(item), kind)]


def check_not_replaced(params: Iterable[Tensor]) -> None:
    """Raise where DTensors have the gradients that parameters of the same shapes lack.

    ``fully_shard()`` and ``parallelize_module()`` replace the parameters of a module.
    """
    params = list(params)
    lost = [p for p in params if p.requires_grad and p.grad is None and not is_dtensor(p)]
    if not lost or "torch.distributed.tensor" not in sys.modules:
        return
    own = set(map(id, params))
    leaves = [item for item in _instances_of(Tensor) if is_dtensor(item) and item.is_leaf]
    found = Counter(each.shape for each in leaves if each.grad is not None and id(each) not in own)
    if Counter(param.shape for param in lost) <= found:
        raise RuntimeError(
            f"{len(lost)} of the optimizer's {len(params)} parameters have no gradient, and as "
            "many DTensors of the same shapes have one: fully_shard() and parallelize_module() put "
            "new parameters in place of those that the optimizer was built with. Build the base "
            "and its GMixoutOptimizer after them"
        )


def meet(tensors: Iterable[Any], call: str, facts: Callable[[], object]) -> None:
    """Wait until all ranks that hold pieces of tensors are in the same call, and for the same.

    Collectives of ranks in different calls would pair up, or hang.

    Args:
        facts: returns what decides which collectives follow, whose ``repr`` is compared. Called
            only where a tensor is a DTensor.

    Raises:
        RuntimeError: the others are not there within the timeout of the process group, or have
            other facts: then on all ranks.
    """
    meshes = meshes_of(tensors)
    if not meshes:
        return
    _wait_for_all(meshes, call)
    own = [distributed.get_rank(), _number_of((call, facts()))]
    tables = [_gathered(own, _groups_of_mesh(mesh), _device_of(mesh)) for mesh in meshes]
    others = sorted({row[0] for table in tables for row in table if row[1] != own[1]})
    if others:
        raise RuntimeError(
            f"{call}: ranks {str(others)[1:-1]} are in another call, or have other parameters, "
            f"state or counters than rank {own[0]}. All ranks have to call it on the same "
            "optimizer, in the same order, with a state dict of the same run; and parameters have "
            "to be trained on all of their ranks or on none"
        )


def _wait_for_all(meshes: list[Any], call: str) -> None:
    ranks = sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()})
    if len(ranks) < 2:
        return
    own, count = distributed.get_rank(), len(ranks)
    store: Any = distributed.distributed_c10d._get_default_store()
    where = f"gmixout/{hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]}"
    number = _rounds.get(where, 0)
    here = f"{where}/{number}"
    store.set(f"{here}/{own}", "")
    if store.add(f"{here}/count", 1) == count:
        store.set(f"{here}/all", "")
    # Ahead of collectives that other ranks may be waiting in for this one.
    timeout = 0.8 * store.timeout.total_seconds()
    patience = min(_PATIENCE, timeout / 2)
    if not _is_set(store, f"{here}/all", patience):
        missing = _missing(store, here, ranks)
        warn(
            f"{call} is waiting for ranks {missing}: parameters are in pieces on several ranks, "
            "and all of them have to call it"
        )
        if not _is_set(store, f"{here}/all", timeout - patience):
            missing = _missing(store, here, ranks)
            store.add(f"{here}/count", -1)
            _forget(store, here, own, is_first=False)
            raise RuntimeError(
                f"{call} is a collective call where parameters are in pieces on several ranks, "
                f"and ranks {missing} have not called it: do so on all ranks, as in "
                "'state = optimizer.state_dict()' before 'if rank == 0:', or save with "
                "torch.distributed.checkpoint"
            )
    _rounds[where] = number + 1
    if number:  # all ranks have left the meeting before this one
        _forget(store, f"{where}/{number - 1}", own, is_first=own == ranks[0])


def _is_set(store: Any, key: str, seconds: float) -> bool:
    """Whether a key is set in time."""
    try:
        store.wait([key], timedelta(seconds=seconds))
    except RuntimeError:
        return False
    return True


def _forget(store: Any, there: str, own: int, is_first: bool) -> None:
    """Delete what a meeting left in the store, which is there for as long as the training."""
    keys = [f"{there}/{own}", *([f"{there}/count", f"{there}/all"] if is_first else [])]
    with suppress(RuntimeError):  # some stores cannot
        for key in keys:
            store.delete_key(key)


def _missing(store: Any, here: str, ranks: list[int]) -> str:
    missing: list[int] = [rank for rank in ranks if not store.check([f"{here}/{rank}"])]
    return str(missing)[1:-1]
