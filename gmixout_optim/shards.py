"""Parameters of which each rank holds a piece: DTensors, as FSDP2 and tensor parallel make them.

A tensor that is no DTensor is a piece of itself. :mod:`torch.distributed.tensor` is not imported
before somebody else has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from math import inf, prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Piece(NamedTuple):
    """A box of a tensor.

    Attributes:
        shape: the whole tensor's.
        offsets, sizes: where the box begins and how large it is, in each dimension.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def meshes_of(tensors: Iterable[Any]) -> list[Any]:
    """The meshes of the DTensors among these, in order."""
    return list(dict.fromkeys(each.device_mesh for each in tensors if is_dtensor(each)))


def mesh_of(tensor: Tensor) -> Any:
    """Its mesh, None for a plain tensor: torch's operators on lists take tensors of one mesh."""
    return tensor.device_mesh if is_dtensor(tensor) else None


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def piece_of(param: Tensor) -> Piece | None:
    """Which part of a parameter this rank holds; None for all of it."""
    if not is_dtensor(param):
        return None
    (chunk,) = param.__create_chunk_list__()  # type: ignore[no-untyped-call]
    piece = Piece(tuple(param.shape), tuple(chunk.offsets), tuple(chunk.sizes))
    return None if piece.sizes == piece.shape else piece


def why_unusable(param: Tensor) -> str:
    """Why a parameter's pieces cannot be mixed; "" where they can, or it has none."""
    if not is_dtensor(param):
        return ""
    if any(placement.is_partial() for placement in param.placements):
        return "its pieces are summands of it (Partial)"
    cuts = [(getattr(each, "dim", None), each) for each in param.placements]
    for place, (dim, placement) in enumerate(cuts):
        # FSDP2 cuts what tensor parallel has cut already, in a later dimension of the mesh.
        factor = getattr(placement, "split_factor", 1)
        later = zip(cuts[place + 1 :], param.device_mesh.shape[place + 1 :], strict=True)
        if factor > 1 and factor != prod(size for (other, _), size in later if other == dim):
            return f"its pieces are not contiguous ({placement})"
    return ""


def like(param: Tensor, local: Tensor) -> Tensor:
    """A tensor of the shape of ``param`` of which this rank holds ``local``."""
    if not is_dtensor(param):
        return local
    return type(param).from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def are_alike(grad: Tensor | None, param: Tensor) -> bool:
    """Whether a gradient is in the same pieces as its parameter."""
    return is_dtensor(grad) and is_dtensor(param) and grad.placements == param.placements


def settled(grad: Tensor | None, param: Tensor) -> Tensor | None:
    """A gradient in the pieces of its parameter. Sequence parallel leaves summands of it.

    Collective where it is not yet.
    """
    if not is_dtensor(grad) or not is_dtensor(param) or are_alike(grad, param):
        return grad
    moved: Tensor = grad.redistribute(placements=param.placements)
    return moved


def whole_of(tensor: Tensor) -> Tensor:
    """All of a tensor. Collective where it is in pieces."""
    whole: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    return whole


def cut(whole: Tensor, param: Tensor) -> Tensor:
    """A tensor like ``param`` from the whole one, which is no DTensor; always a copy."""
    piece = piece_of(param)
    if piece is not None:
        for dim, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
            whole = whole.narrow(dim, offset, size)
    return like(param, whole.to(local_of(param).device, copy=True))


def placed_like(tensor: Tensor, param: Tensor) -> Tensor:
    """A copy of a tensor of the shape of ``param`` in the same pieces.

    Collective where it is in other pieces.
    """
    if is_dtensor(tensor) and is_dtensor(param):
        same = tensor.device_mesh == param.device_mesh and tensor.placements == param.placements
        if same:
            return like(param, tensor._local_tensor.to(local_of(param).device, copy=True))
    return cut(whole_of(tensor.detach()), param)


def joined(param: Tensor, values: Tensor, places: Tensor, size: int) -> Tensor:
    """A vector of ``size`` in equal parts on the ranks of ``param``. Collective.

    Args:
        values: what this rank has of it. Where ranks have the same places, they have the same
            values.
        places: where these lie, int64.
    """
    assert is_dtensor(param)
    from torch.distributed.tensor import Partial, Replicate, Shard

    # As integers sums with zeros keep all bits.
    bits = values.view(_INT_OF_SIZE[values.element_size()])
    wide = bits if bits.element_size() >= 4 else bits.to(torch.int32)
    whole = torch.zeros(size, dtype=wide.dtype, device=wide.device)
    whole[places] = wide
    kinds = [_is_cut(placement) for placement in param.placements]
    summands: Any = [Partial("sum") if cut else Replicate() for cut in kinds]
    parts: Any = [Shard(0) if cut else Replicate() for cut in kinds]
    vector = type(param).from_local(whole, param.device_mesh, summands, run_check=False)
    own = vector.redistribute(placements=parts)._local_tensor.to(bits.dtype).view(values.dtype)
    return type(param).from_local(
        own, param.device_mesh, parts, run_check=False, shape=torch.Size([size]), stride=(1,)
    )


def any_of_ranks(flags: Sequence[bool], params: Sequence[Tensor]) -> list[bool]:
    """Whether flags are set on any rank that has a piece of any of the parameters. Collective."""
    from torch import distributed

    numbers = torch.tensor(flags, dtype=torch.int32, device="cpu")
    for mesh in meshes_of(params):
        numbers = numbers.to(mesh.device_type)
        for dim in range(mesh.ndim):
            distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    return list(map(bool, numbers.tolist()))


def total_norm(gradients: Sequence[tuple[Tensor, Tensor]], norm_type: float) -> Tensor:
    """The norm of the norms of gradients. Collective where parameters are in pieces.

    Args:
        gradients: parameters, and what this rank has of their gradients, of any shape.
    """
    if not any(is_dtensor(param) for param, _ in gradients):
        return get_total_norm([grad for _, grad in gradients if grad.numel()], norm_type)
    alike: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for param, grad in gradients:
        kind = (
            (param.device_mesh, tuple(map(_is_cut, param.placements))) if is_dtensor(param) else ()
        )
        alike.setdefault(kind, []).append((param, grad))
    norms = [_norms(pairs, float(norm_type)) for pairs in alike.values()]
    together = torch.cat([some.to(norms[0].device) for some in norms])
    norm: Tensor = torch.linalg.vector_norm(together, norm_type)
    return norm


def _norms(pairs: list[tuple[Tensor, Tensor]], p: float) -> Tensor:
    """The norms of gradients whose parameters are cut alike."""
    first, nothing = pairs[0][0], 0.0 if p >= 0 else inf
    norms = torch.stack(
        [
            torch.linalg.vector_norm(grad, p) if grad.numel() else grad.new_tensor(nothing)
            for _, grad in pairs
        ]
    )
    if not is_dtensor(first):
        return norms
    if abs(p) == inf:
        return _reduced(first, norms, "MAX" if p > 0 else "MIN")
    if p == 0:  # counts
        return _reduced(first, norms, "SUM")
    return _reduced(first, norms**p, "SUM") ** (1 / p)


def _reduced(param: DTensor, values: Tensor, operation: str) -> Tensor:
    """Numbers of the pieces of a parameter, over all of them. Collective."""
    from torch import distributed

    values = values.clone()
    for dim, placement in enumerate(param.placements):
        if _is_cut(placement):
            how = getattr(distributed.ReduceOp, operation)
            distributed.all_reduce(values, how, group=param.device_mesh.get_group(dim))
    return values


def _is_cut(placement: Any) -> bool:
    # A _StridedShard is none of torch's Shards in some versions.
    return not placement.is_replicate()


# The parameters of each FSDP2 module, by id.
_pieces: WeakKeyDictionary[torch.nn.Module, frozenset[int]] = WeakKeyDictionary()


def reshard(params: set[int]) -> None:
    """Have FSDP2 gather parameters, given by id, again before the next forward pass.

    It may keep gathered weights from one forward pass to the next, which would not show what was
    written to the pieces since.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    from torch.distributed._composable_state import _module_state_mapping

    for module in list(_module_state_mapping):
        if not isinstance(module, fsdp.FSDPModule) or params.isdisjoint(_pieces_of(module)):
            continue
        # A step in a hook of backward, which needs the weights still: FSDP2 reshards at its end.
        if module._get_fsdp_state()._training_state.name == "IDLE":
            module.reshard()


def _pieces_of(module: Any) -> frozenset[int]:
    pieces = _pieces.get(module)
    if pieces is None:
        state = module._get_fsdp_state()
        # Before torch 2.12 a module had one group of parameters.
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        held = [each.sharded_param for group in groups if group for each in group.fsdp_params]
        pieces = _pieces[module] = frozenset(map(id, held))
    return pieces
