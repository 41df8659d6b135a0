"""Gradients of which only the active part is kept, packed as backward produces them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gmixout_optim import mixing
from gmixout_optim.mixed_tensor import MixedTensor

if TYPE_CHECKING:
    from gmixout_optim.packed import PackedLayout

_aten = torch.ops.aten

# On the values alone these give what they give on the whole gradient, whose other elements are zero.
_NORMS = {_aten.linalg_vector_norm, _aten.norm, _aten._foreach_norm}
_REDUCTIONS = {_aten.linalg_vector_norm, _aten.norm, _aten.any}
_IN_PLACE = {_aten.mul_, _aten.div_, _aten.clamp_}
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
}


class PackedGradient(Tensor):
    """What ``param.grad`` is with ``grad_layout="packed"``: a gradient that is zero off the active weights.

    Shape, dtype and device are the parameter's. It holds the active values alone, and knows what training loops do
    with gradients: accumulate, scale, clip, zero, norms. Anything else raises a RuntimeError.

    Attributes:
        active: the gradient of the active weights, cell after cell: a vector in the gradient's dtype.
        episode_number: the layout's count of episodes when it was packed; None for zero, which is right in all.
    """

    active: Tensor
    episode_number: int | None

    # Everything arrives at __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # The parameter holds its gradient where the garbage collector does not look: the way back is weak.
    _tensor: weakref.ref[MixedTensor]
    _layout: weakref.ref[PackedLayout]

    @staticmethod
    def __new__(
        cls,
        active: Tensor,
        tensor: weakref.ref[MixedTensor],
        layout: weakref.ref[PackedLayout],
        like: Tensor,
        episode_number: int | None,
    ) -> PackedGradient:
        self: PackedGradient = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=active.dtype, device=active.device
        )
        self.active, self.episode_number = active, episode_number
        self._tensor, self._layout = tensor, layout
        return self

    def dense(self) -> Tensor:
        """A plain copy of the parameter's shape, zero off the active weights."""
        tensor, layout = self._owner()
        dense = tensor.copy_of(torch.zeros(self.shape, dtype=self.dtype, device=self.device))
        mixing.scatter_([tensor.view(dense)], [layout.index_of(tensor)], [self.current()])
        return dense

    def _owner(self) -> tuple[MixedTensor, PackedLayout]:
        tensor, layout = self._tensor(), self._layout()
        if tensor is None or layout is None:
            raise RuntimeError(
                "the GMixoutOptimizer that packed this gradient is gone: call zero_grad() on the model"
            )
        return tensor, layout

    def check_owner(self, layout: PackedLayout) -> None:
        """Raise where another optimizer packed the gradient, or this one in another episode."""
        if self._owner()[1] is not layout:
            raise RuntimeError(
                "a gradient was packed by another GMixoutOptimizer, which has the same parameter: use one of them"
            )
        self.current()

    def current(self) -> Tensor:
        """The values for a step in the running episode; a RuntimeError where they were packed for another."""
        tensor, layout = self._owner()
        if self.episode_number is None:
            index = layout.index_of(tensor)
            size = tensor.elements_at(index)
            return torch.zeros(size, dtype=self.dtype, device=index.device)
        if self.episode_number != layout.episode_number:
            raise RuntimeError(
                f"the gradient of {tensor.name} was packed for an episode that has ended, and other weights are active "
                "now: call zero_grad() before backward(), and backward() again after resample(), resync() or "
                "load_state_dict()"
            )
        return self.active.to(tensor.param.device)

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
            if _keeps_zeros(kind, args, kwargs):
                if kind in _REDUCTIONS:
                    return func(_filled(kind, first.active), *args[1:], **kwargs)
                if kind in _IN_PLACE:
                    func(first.active, *args[1:], **kwargs)
                    return first
                if kind in _SAME_KIND:
                    values = func(first.active, *args[1:], **kwargs)
                    return cls(values, first._tensor, first._layout, first, first.episode_number)
        raise RuntimeError(
            f"{func} is not defined for a packed gradient, which a GMixoutOptimizer with grad_layout='packed' made and "
            "which holds active weights only: read its .active, or .dense() for zeros elsewhere; for another optimizer call "
            "zero_grad() first. Where something else owns the gradients, as the reducer of DistributedDataParallel does, "
            "or differentiates through them, use grad_layout='dense'"
        )

    def _zero(self) -> PackedGradient:
        self.active.zero_()
        self.episode_number = None
        return self

    def _accumulate(self, other: Tensor) -> PackedGradient:
        """What backward does with a gradient where there is one."""
        tensor, layout = self._owner()
        if type(other) is not Tensor or other.shape != self.shape:
            raise RuntimeError("only a dense gradient can be added to a packed gradient")
        more = layout.packed_from(tensor, other)
        if self.episode_number is None:
            self.active, self.episode_number = more.to(self.dtype), layout.episode_number
        else:
            self.current().add_(more)
        return self


def _filled(kind: Any, active: Tensor) -> Tensor:
    """Of a gradient without active weights one of the zeros: some norms are not defined for nothing at all."""
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
    if kind is _aten.clamp_:
        return len(rest) == 2 and None not in rest and rest[0] <= 0 <= rest[1]
    return kind is not _aten.any or not rest


class _Pack:
    """The hook: packs a parameter's gradient while the optimizer is there."""

    def __init__(self, tensor: MixedTensor, layout: PackedLayout) -> None:
        self.tensor, self.layout = weakref.ref(tensor), weakref.ref(layout)

    def __call__(self, param: Tensor) -> None:
        grad, tensor, layout = param.grad, self.tensor(), self.layout()
        if grad is None or tensor is None or layout is None or not _can_be_packed(grad):
            return
        active = layout.packed_from(tensor, grad)
        param.grad = PackedGradient(active, self.tensor, self.layout, param, layout.episode_number)


def pack_gradients_of(param: Tensor, tensor: MixedTensor, layout: PackedLayout) -> None:
    """From the next backward on, ``param.grad`` is packed as soon as it is there, and the dense one is freed."""
    leave_gradients_of(param)
    param.register_post_accumulate_grad_hook(_Pack(tensor, layout))  # type: ignore[no-untyped-call]


def leave_gradients_of(param: Tensor) -> None:
    """Let ``param.grad`` be what backward makes of it, whichever optimizer packed it."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Pack)]:
        del hooks[key]


def _can_be_packed(grad: Tensor) -> bool:
    """Not what is packed, what must be refused when it is used, and what a backward through it needs whole."""
    return type(grad) is Tensor and grad.layout == torch.strided and not grad.requires_grad
