"""Gradients of which only the active part is kept, packed as backward produces them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gmixout_optim import mixing
from gmixout_optim.members import Member
from gmixout_optim.shards import is_dtensor

_aten = torch.ops.aten

# Of the active values these are what they are of the whole gradient, whose other elements are zero.
_NORMS = {_aten.linalg_vector_norm, _aten.norm, _aten._foreach_norm}
_REDUCTIONS = {_aten.linalg_vector_norm, _aten.norm, _aten.any, _aten._is_any_true}
_IN_PLACE = {_aten.mul_, _aten.div_, _aten.clamp_, _aten.nan_to_num_}
_OF_LISTS = {
    _aten._foreach_norm,
    _aten._foreach_mul_,
    _aten._foreach_div_,
    _aten._amp_foreach_non_finite_check_and_unscale_,
}
_SAME_KIND = {
    _aten.alias,
    _aten.clone,
    _aten.detach,
    _aten._to_copy,
    _aten.abs,
    _aten.mul,
    _aten.div,
    _aten.isnan,
    _aten.isinf,
    _aten.nan_to_num,
    _aten.clamp,
}


class PackedGradient(Tensor):
    """A gradient that is zero off the active weights, of ``grad_layout`` "packed" or "active".

    Shape, dtype and device are the parameter's. It holds the active values alone, and knows what
    training loops do with gradients: accumulate, scale, clip, zero, norms. Anything else raises a
    RuntimeError.

    Attributes:
        active: the gradient of the active weights, cell after cell: a vector in the gradient's
            dtype.
        draw: the index set that it was packed for, by :attr:`Run.draws`; None for zero, which fits
            all.
    """

    active: Tensor
    draw: int | None

    # Everything arrives at __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # The parameter holds its gradient where the garbage collector does not look: a strong reference
    # to the member, which holds the parameter, would keep both alive.
    _member: weakref.ref[Member]

    @staticmethod
    def __new__(
        cls, active: Tensor, member: weakref.ref[Member], like: Tensor, draw: int | None
    ) -> PackedGradient:
        self: PackedGradient = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=active.dtype, device=active.device
        )
        self.active, self.draw, self._member = active, draw, member
        return self

    def dense(self) -> Tensor:
        """A plain copy of the parameter's shape, zero off the active weights."""
        member = self._owner()
        grid = member.cells.grid
        dense = grid.copy(torch.zeros(self.shape, dtype=self.dtype, device=self.device))
        mixing.scatter_(grid.view(dense), member.index(), self._current())
        return dense

    def current_for(self, member: Member) -> Tensor:
        """The values for a step of ``member`` in the running episode.

        Raises:
            RuntimeError: another optimizer packed them, or this one for an episode that has ended.
        """
        if self._owner() is not member:
            raise RuntimeError(
                "a gradient was packed by another GMixoutOptimizer, which has the same parameter: "
                "use one of them"
            )
        return self._current()

    def _owner(self) -> Member:
        member = self._member()
        if member is None:
            raise RuntimeError(
                "the GMixoutOptimizer that packed this gradient is gone: call zero_grad() on the "
                "model"
            )
        return member

    def _current(self) -> Tensor:
        member = self._owner()
        if self.draw is None:
            index = member.index()
            size = member.cells.grid.size_at(index)
            return torch.zeros(size, dtype=self.dtype, device=index.device)
        if self.draw != member.run.draws:
            raise RuntimeError(
                f"the gradient of {member.name} was packed for an episode that has ended, and "
                "other weights are active now: call zero_grad() before backward(), and backward() "
                "again after resample(), resync() or load_state_dict()"
            )
        device = member.cells.placement[0]
        return self.active if self.active.device == device else self.active.to(device)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"PackedGradient(shape={tuple(self.shape)}, active={self.active.numel()}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kind, first, kwargs = func._overloadpacket, args[0], kwargs or {}
        kwargs.pop("memory_format", None)  # of a vector there is one
        if kind is _aten._foreach_zero_:
            for grad in first:
                grad.zero_()
            return None
        if kind in _OF_LISTS and _keeps_zeros(kind, args, kwargs):
            values = [
                _filled(kind, grad.active) if isinstance(grad, cls) else grad for grad in first
            ]
            return func(values, *args[1:], **kwargs)
        if isinstance(first, cls):
            if kind is _aten.zero_:
                return first._zero()
            if kind is _aten.add_ and not kwargs:
                return first._accumulate(args[1])
            if kind is _aten.view and tuple(args[1]) == tuple(first.shape):
                return cls(first.active, first._member, first, first.draw)  # DTensor.to_local()
            if kind is _aten.copy_ and isinstance(args[1], cls):
                return first._copy(args[1])
            if kind is _aten.new_empty_strided:
                return cls(torch.zeros_like(first.active), first._member, first, None)
            if _keeps_zeros(kind, args, kwargs):
                if kind in _REDUCTIONS:
                    return func(_filled(kind, first.active), *args[1:], **kwargs)
                if kind in _IN_PLACE:
                    func(first.active, *args[1:], **kwargs)
                    return first
                if kind in _SAME_KIND:
                    values = func(first.active, *args[1:], **kwargs)
                    return cls(values, first._member, first, first.draw)
        # Autograd adds up what several uses of a weight gave.
        if kind is _aten.add and not kwargs:
            ours, other = args if isinstance(first, cls) else args[::-1]
            if not isinstance(other, torch.nn.Parameter):
                return ours.clone()._accumulate(other)
        if kind is _aten.add_ and not kwargs:
            return first.add_(args[1].dense())
        raise RuntimeError(
            f"{func} is not defined for a packed gradient, which a GMixoutOptimizer with "
            "grad_layout='packed' or 'active' made and which holds active weights only: read its "
            ".active, or .dense() for zeros elsewhere; for another optimizer call zero_grad() "
            "first. Where something else owns the gradients, as the reducer of "
            "DistributedDataParallel does, or differentiates through them, use grad_layout='dense'"
        )

    def _copy(self, other: PackedGradient) -> PackedGradient:
        self._check_owner(other)
        self.active, self.draw = other.active.to(self.dtype, copy=True), other.draw
        return self

    def _check_owner(self, other: PackedGradient) -> None:
        if other._member() is not self._member():
            raise RuntimeError(
                "a packed gradient of another parameter, or of another optimizer, cannot be added "
                "to this packed gradient: their active weights are others"
            )

    def _zero(self) -> PackedGradient:
        self.active.zero_()
        self.draw = None
        return self

    def _accumulate(self, other: Tensor) -> PackedGradient:
        """What backward does with a gradient where there is one."""
        if type(other) not in (Tensor, PackedGradient) or other.shape != self.shape:
            raise RuntimeError("only a gradient of its parameter can be added to a packed gradient")
        if isinstance(other, PackedGradient):
            self._check_owner(other)
            more, draw = other.active, other.draw
        else:
            member = self._owner()
            if self.draw not in (None, member.run.draws):
                return self  # of an episode that has ended: a step with it is refused
            more, draw = _active_part(member, other), member.run.draws
        if draw is None:
            return self
        if self.draw is None:
            self.active, self.draw = more.to(self.dtype, copy=True), draw
        elif self.draw == draw:
            self.active.add_(more)
        else:
            self.draw = min(self.draw, draw)  # the one that has ended
        return self


def accumulate(param: Tensor, grad: PackedGradient) -> None:
    """What backward does with the gradient of a parameter."""
    if param.grad is None:
        param.grad = grad
    else:
        param.grad.add_(grad)


def _active_part(member: Member, grad: Tensor) -> Tensor:
    """The active part of a dense gradient, in its dtype, in the running episode."""
    with torch.no_grad():
        grad = grad if grad.layout == torch.strided else grad.to_dense()
        return mixing.gather_gradient(member.cells.grid.view(grad), member.index())


def _filled(kind: Any, active: Tensor) -> Tensor:
    """The norm of an empty tensor raises; take one zero."""
    return active if active.numel() or kind not in _NORMS else active.new_zeros(1)


def _keeps_zeros(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether zeros in the first argument stay zeros, or change nothing in what is reduced."""
    rest = [*args[1:], *kwargs.values()]
    for item in rest:
        if isinstance(item, Tensor) and item.numel() != 1:
            return False
        if isinstance(item, list | tuple) and any(isinstance(each, Tensor) for each in item):
            return False
    if kind in _NORMS:  # of positive order, and of the whole
        return (
            len(args) <= 2
            and kwargs.keys() <= {"dtype"}
            and (len(args) < 2 or args[1] is None or args[1] > 0)
        )
    if kind in (_aten.clamp, _aten.clamp_):
        return len(rest) == 2 and None not in rest and rest[0] <= 0 <= rest[1]
    return kind is not _aten.any or not rest


# The hook of each parameter whose gradients are packed, or are to own their memory, by its id,
# whichever optimizer does it.
_hooks: dict[int, tuple[RemovableHandle, weakref.finalize[..., Any]]] = {}


def pack_gradients(member: Member) -> None:
    """From the next backward on ``param.grad`` is packed, and the dense gradient freed.

    Does nothing for a frozen parameter, on which torch takes no hook.
    """
    if member.packs_gradients or not member.param.requires_grad:
        return
    leave_gradients(member.param)
    owner = weakref.ref(member)

    def pack(param: Tensor) -> None:
        member = owner()
        if member is None or not member.cells.has_own_pieces_as_gradient:
            return
        cells, grad = member.cells, member.cells.gradient
        if grad is not None and _can_be_packed(grad):
            active = _active_part(member, grad)
            cells.gradient = PackedGradient(active, owner, cells.local, member.run.draws)
            member.gradient_kind = "packed"

    _hook(member.param, pack, member)
    member.packs_gradients = True


def own_gradients(param: Tensor, owner: object) -> None:
    """From the next backward on a DTensor's gradient has memory of its own, while ``owner`` lives.

    FSDP2 makes the gradients of several parameters views of one buffer: with one of them left, that
    of packed ones would not be freed.
    """
    if id(param) in _hooks or not is_dtensor(param) or not param.requires_grad:
        return

    def copy(param: Tensor) -> None:
        grad = param.grad
        if (
            is_dtensor(grad)
            and grad._local_tensor.untyped_storage().nbytes() > grad._local_tensor.nbytes
        ):
            grad._local_tensor = grad._local_tensor.clone()

    _hook(param, copy, owner)


def _hook(param: Tensor, hook: Callable[[Tensor], None], owner: object) -> None:
    """Call ``hook(param)`` as soon as there is a gradient, while ``owner`` lives."""
    handle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    _hooks[id(param)] = handle, weakref.finalize(owner, _unhook, id(param))


def _unhook(key: int) -> None:
    handle, _ = _hooks.pop(key)
    handle.remove()


def leave_gradients(param: Tensor) -> None:
    """Let ``param.grad`` be what backward makes of it, whichever optimizer packed it."""
    if id(param) in _hooks:
        _, forget = _hooks[id(param)]
        forget()


def _can_be_packed(grad: Tensor) -> bool:
    """Not what is packed, what the step refuses, and what a backward through it needs whole."""
    return type(grad) is Tensor and grad.layout == torch.strided and not grad.requires_grad
