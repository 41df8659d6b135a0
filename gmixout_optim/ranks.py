"""What ranks that train one model have to agree on, and calls that all of them have to make."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from gmixout_optim.members import Members, parameters
from gmixout_optim.param_groups import unwrapped
from gmixout_optim.settings import SAVED, Run
from gmixout_optim.shards import is_dtensor
from gmixout_optim.warn import warn

# Seconds of waiting for other ranks before a warning says so.
_PATIENCE = 30.0

# How often some ranks have met in wait_for_all().
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
    own = list(map(_number_of, facts.values()))
    for group, device in _groups_of(params):
        mine = torch.tensor(own, dtype=torch.int64, device=device)
        gathered = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(gathered, mine, group=group)
        ranks = distributed.get_process_group_ranks(group)
        others = {rank: row.tolist() for rank, row in zip(ranks, gathered, strict=True)}
        differing = {rank: row for rank, row in others.items() if row != own}
        if differing:
            kinds = list(zip(facts.items(), own, *differing.values(), strict=True))
            named = [fact for fact, mine, *theirs in kinds if any(each != mine for each in theirs)]
            shown = [
                name if isinstance(value, tuple) else f"{name}={value!r}" for name, value in named
            ]
            raise RuntimeError(
                f"ranks differ: {', '.join(shown)} on rank {distributed.get_rank()} are not those "
                f"of ranks {str(list(differing))[1:-1]}, and they would train other weights. Build "
                "the optimizer with the same settings, and the same parameters in the same order, "
                "on all ranks; load a state dict on all of them or on none"
            )


def _facts(members: Members, groups: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What has to be the same on all ranks. Tuples are too long to be shown."""
    run: Run = members.run
    for key in SAVED:
        yield key, getattr(run, key)
    yield "the number of trained tensors", len(members.trained())
    mixed = [
        (unwrapped(m.name), tuple(m.param.shape), m.cells.mask_prob, m.cells.granularity)
        for m in members
    ]
    yield "the parameters that are mixed", tuple(mixed)
    shapes = [tuple(param.shape) for _, _, _, param in parameters(groups)]
    yield "the parameters", tuple(shapes)


def _number_of(value: Any) -> int:
    """An int64 that tells values apart."""
    if isinstance(value, int):
        return int(value)
    digest = hashlib.sha256(repr(value).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _groups_of(params: Iterable[Tensor]) -> Iterator[tuple[Any, torch.device]]:
    """The process groups over which gradients of parameters are reduced, in the same order on all
    ranks, and the device on which they communicate."""
    params = list(params)
    meshes = dict.fromkeys(param.device_mesh for param in params if is_dtensor(param))
    for mesh in meshes:
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                yield mesh.get_group(dim), torch.device(mesh.device_type)
    if meshes or distributed.get_world_size() == 1:
        return
    own = set(map(id, params))
    for found in _instances_of(DistributedDataParallel):
        if any(id(param) in own for param in found.parameters()):
            yield found.process_group, found.device or params[0].device


def _instances_of(kind: type) -> list[Any]:
    # Not isinstance(): objects that pretend to be of another class compute the answer.
    return [item for item in gc.get_objects() if issubclass(type(item), kind)]


def check_not_replaced(params: Iterable[Tensor]) -> None:
    """Raise where other parameters, of the same shapes, have the gradients.

    ``fully_shard()`` and ``parallelize_module()`` replace the parameters of a module. Those on a
    mesh of the optimizer's own are others, which it does not train.
    """
    params = list(params)
    if any(param.grad is not None for param in params):
        return
    shapes = {param.shape for param in params}
    meshes = {param.device_mesh for param in params if is_dtensor(param)}
    for other in _instances_of(Tensor):
        if not is_dtensor(other) or not other.is_leaf or other.grad is None:
            continue
        if other.device_mesh in meshes:
            continue
        if other.shape in shapes and not any(other is param for param in params):
            raise RuntimeError(
                f"none of the optimizer's parameters has a gradient, and a DTensor of shape "
                f"{tuple(other.shape)} has one: fully_shard() and parallelize_module() put new "
                "parameters in place of those that the optimizer was built with. Build the base "
                "and its GMixoutOptimizer after them"
            )


def wait_for_all(params: Iterable[Tensor], call: str) -> None:
    """Wait until all ranks that hold pieces of parameters are in the same call.

    Collectives of ranks in different calls would pair up, or hang.

    Raises:
        RuntimeError: they are not there within the timeout of the process group.
    """
    meshes = dict.fromkeys(param.device_mesh for param in params if is_dtensor(param))
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
