"""Gradients that backward computes for the active rows or columns alone: ``grad_layout="active"``.

While a parameter is marked, the functionals that use weights (``F.linear``, ``F.conv1d`` and so on)
are wrapped: called with a marked weight they go through
:mod:`gmixout_optim.active_functions`, with any other they are what they were. Modules and
Parameters stay as they are. Whatever uses a weight in another way has a dense gradient, which is
packed afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial, wraps
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gmixout_optim.active_functions import ActiveConvolution, ActiveEmbedding, ActiveLinear
from gmixout_optim.cells import Cells
from gmixout_optim.members import Member
from gmixout_optim.packed_gradient import (
    PackedGradient,
    accumulate,
    leave_gradients,
    pack_gradients,
)

# The attribute of a Parameter that holds its mark. A dict keyed by Parameter would not do:
# torch.compile does not guard on the identity of a tensor.
_MARK = "_gmixout_active"

# Layers with fewer multiply-adds stay dense: the overhead exceeds what is saved. Convolutions, for
# which backward is called twice, need so many times as many (docs/performance.md has the figures).
LEAST_MULTIPLY_ADDS = 1 << 22
_CONVOLUTION_FACTOR = 3


class Mark:
    """What a marked weight's gradient is computed for. There is a new one for each draw.

    Attributes:
        by_rows: whether rows are active, or columns.
        positions: int64, which ones.
        blocks, block: int64, the blocks of so many columns that these are.
        leaf: takes the gradient in compiled code, which a tensor subclass would not pass; without
            memory of its own.
        number, draw: of the draw, as an int and 0-d on the CPU.
        member: whose weight it is.
        deliver: of the functions.
        form: shape and dtype of the weight.
        has_leaf: whether compiled code may use the leaf: not where somebody has hooks on the
            weight, which it would pass by, nor where sets vary in size, which would have it
            compiled again.
    """

    def __init__(self, member: Member, by_rows: bool) -> None:
        cells = member.cells
        grid, device = cells.grid, cells.local.device
        index = member.index()
        chosen = grid.cells_at(index)
        self.by_rows = by_rows
        self.number = member.run.draws
        self.member = weakref.ref(member)
        self.form = cells.form
        self.has_leaf = _may_have_leaf(member)
        like = torch.empty_strided(grid.shape, grid.strides, device="meta")
        self.deliver = partial(_packed, self.member, like)
        self.draw = torch.tensor(self.number, device="cpu")
        self.blocks, self.block = chosen, 1
        if by_rows:
            self.positions = chosen
            shape = (chosen.shape[0], *grid.shape[1:])
        else:
            self.block = grid.shape[1] // grid.cells
            inside = torch.arange(self.block, device=device)
            self.positions = (chosen[:, None] * self.block + inside).flatten()
            shape = (grid.shape[0], self.positions.shape[0], *grid.shape[2:])
        leaf = torch.empty(1, dtype=cells.local.dtype, device=device).expand(shape)
        self.leaf = leaf.detach().requires_grad_()
        hook = partial(_receive, member=self.member, deliver=self.deliver, draw=self.draw)
        self.leaf.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def fits(self, member: Member) -> bool:
        cells = member.cells
        return (
            self.member() is member
            and self.number == member.run.draws
            and self.form == cells.form
            and self.leaf.device == cells.local.device
            and self.has_leaf == _may_have_leaf(member)
        )

    def columns_of(self, input: Tensor) -> Tensor:
        """The active columns of an input, which are its last dimension."""
        blocks = input.reshape(*input.shape[:-1], -1, self.block)
        return blocks.index_select(-2, self.blocks).flatten(-2)

    def __reduce__(self) -> tuple[Any, ...]:
        # Somebody pickles or copies the parameter; torch.load(weights_only=True) knows this type.
        return torch.Size, ()


def _may_have_leaf(member: Member) -> bool:
    hooks = len(member.param._post_accumulate_grad_hooks or ())
    is_hooked = member.param._backward_hooks or hooks > 1  # one is that which packs
    return member.run.sampler == "stratified" and not is_hooked


def _packed(
    member: weakref.ref[Member], like: Tensor, active: Tensor, draw: Tensor
) -> PackedGradient:
    """The gradient of a weight with the shape and strides of ``like``."""
    owner = member()
    if owner is not None:
        owner.gradient_kind = "active"
    return PackedGradient(active.reshape(-1), member, like, int(draw))


def _receive(
    leaf: Tensor, *, member: weakref.ref[Member], deliver: Callable[..., Any], draw: Tensor
) -> None:
    """What compiled code gave the leaf goes to the parameter."""
    grad, leaf.grad = leaf.grad, None
    owner = member()
    if owner is None:
        raise RuntimeError(
            "the GMixoutOptimizer of which the forward pass computed active gradients is gone: "
            "compute the loss again"
        )
    if grad is not None:
        accumulate(owner.param, deliver(grad, draw))


# The marked parameters, by id.
_marked: dict[int, weakref.finalize[..., Any]] = {}
_lock = RLock()


def take_gradients(member: Member, active: bool) -> None:
    """From the next forward pass on the parameter's gradients are packed, or ``active``."""
    pack_gradients(member)
    if not active or not member.packs_gradients:
        return
    mark = getattr(member.param, _MARK, None)
    by_rows = _is_by_rows(member.cells)
    if by_rows is None or (isinstance(mark, Mark) and mark.fits(member)):
        return
    with torch.inference_mode(False), torch.enable_grad():
        setattr(member.param, _MARK, Mark(member, by_rows))
    key = id(member.param)
    with _lock:
        if key not in _marked:
            _marked[key] = weakref.finalize(member, _unmark, member.param)
        if not _in_place:
            _wrap_functionals()


def can_be_active(member: Member) -> bool:
    """Whether its cells are such that a part of a product gives the gradient."""
    return _is_by_rows(member.cells) is not None


def give_up_gradients(param: Tensor) -> None:
    """Let ``param.grad`` be what backward makes of it, whichever optimizer took it."""
    leave_gradients(param)
    _unmark(param)


def _unmark(param: Tensor) -> None:
    with _lock:
        finalizer = _marked.pop(id(param), None)
        if finalizer is None:
            return
        finalizer.detach()
        if hasattr(param, _MARK):
            delattr(param, _MARK)
        if not _marked:
            _unwrap_functionals()


def _is_by_rows(cells: Cells) -> bool | None:
    """Whether whole rows of a matrix or filter are active; None where not even columns are."""
    grid = cells.grid
    if len(grid.shape) < 2 or cells.is_distributed:  # forward passes do not see its pieces
        return None
    if grid.outer > 1:
        return False
    return True if cells.are_outputs else None


def _mark_of(input: Any, weight: Any, multiply_adds: Callable[[], int]) -> Mark | None:
    """The mark of a weight whose gradient is to be computed actively in this call."""
    if type(weight) is not nn.Parameter:
        return None
    mark = getattr(weight, _MARK, None)
    if type(mark) is not Mark or not torch.is_grad_enabled() or not weight.requires_grad:
        return None
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() or not mark.has_leaf:
            return None
    elif type(input) not in (Tensor, nn.Parameter) or not _is_eager() or not _is_of(mark, weight):
        return None
    if DistributedDataParallel._active_ddp_module is not None:
        raise RuntimeError(
            "grad_layout='active' does not work with DistributedDataParallel, whose reducer needs "
            "whole gradients: use grad_layout='dense'"
        )
    is_usable = (
        len(mark.positions) > 0
        and mark.positions.device == weight.device
        and mark.form == (weight.dtype, weight.shape)
        and input.layout == torch.strided
        and not input.is_nested
    )
    return mark if is_usable and multiply_adds() >= max(1, LEAST_MULTIPLY_ADDS) else None


def _is_eager() -> bool:
    """Whether no transform of torch.func, forward-mode autograd or trace is active."""
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def _is_of(mark: Mark, weight: Tensor) -> bool:
    """Not of a shallow copy, which has the same mark, nor where a redraw failed half-way."""
    member = mark.member()
    return member is not None and member.param is weight and member.run.draws == mark.number


def _dtype_of(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """The dtype of the product; None where dtypes do not match, which the functional refuses."""
    device, dtypes = input.device.type, {input.dtype, weight.dtype}
    if bias is not None:
        dtypes.add(bias.dtype)
    if not torch.is_autocast_enabled(device):
        return input.dtype if len(dtypes) == 1 else None
    fits = torch.float64 not in dtypes and all(dtype.is_floating_point for dtype in dtypes)
    return torch.get_autocast_dtype(device) if fits else None


def _arguments(mark: Mark, weight: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """The weight, and positions, leaf, deliver and draw of the functions."""
    if torch.compiler.is_compiling():  # the gradient goes to the leaf
        return weight.detach(), (mark.positions, mark.leaf, None, None)
    return weight, (mark.positions, None, mark.deliver, mark.draw)


def _wrapped_linear(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, **more: Any) -> Tensor:
        mark = _mark_of(input, weight, lambda: input.numel() * weight.shape[0])
        dtype = None if mark is None else _dtype_of(input, weight, bias)
        if mark is None or dtype is None or more or input.shape[-1:] != weight.shape[1:]:
            return original(input, weight, bias, **more)
        input = input.to(dtype)
        columns = None if mark.by_rows else mark.columns_of(input.detach())
        weight, ends = _arguments(mark, weight)
        bias = None if bias is None else bias.to(dtype)
        output: Tensor = ActiveLinear.apply(input, columns, weight.to(dtype), bias, *ends)  # type: ignore[no-untyped-call]
        return output

    return linear


def _wrapped_conv(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        def usual() -> Tensor:
            return original(input, weight, bias, stride, padding, dilation, groups)

        mark = None
        if groups == 1 and not isinstance(padding, str):
            mark = _mark_of(input, weight, lambda: _work(input, weight, stride))
        dtype = None if mark is None else _dtype_of(input, weight, bias)
        if mark is None or dtype is None:
            return usual()
        if input.ndim != weight.ndim or input.shape[1] != weight.shape[1]:
            return usual()
        steps, pads, gaps = (_each(value, weight) for value in (stride, padding, dilation))
        input = input.to(dtype)
        columns = None if mark.by_rows else input.detach().index_select(1, mark.positions)
        weight, ends = _arguments(mark, weight)
        bias = None if bias is None else bias.to(dtype)
        output: Tensor = ActiveConvolution.apply(  # type: ignore[no-untyped-call]
            input, columns, weight.to(dtype), bias, *ends, steps, pads, gaps
        )
        return output

    return conv


def _each(value: Any, weight: Tensor) -> list[int]:
    """An argument of a convolution for each dimension of its kernel."""
    given = list(value) if isinstance(value, tuple | list) else [value]
    return [int(each) for each in given] * (1 if len(given) > 1 else weight.ndim - 2)


def _work(input: Tensor, weight: Tensor, stride: Any) -> int:
    """Multiply-adds, scaled down for the higher overhead of convolutions."""
    steps = torch.Size(_each(stride, weight)).numel()
    pixels = input.numel() // max(1, weight.shape[1] * steps)
    return pixels * weight.numel() // _CONVOLUTION_FACTOR


def _wrapped_embedding(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def embedding(
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        mark = None
        if max_norm is None and not scale_grad_by_freq and not sparse:
            # A dense gradient is as large as the weight, however few the tokens.
            mark = _mark_of(input, weight, lambda: weight.numel())
        if mark is None or not -weight.shape[0] <= (padding_idx or 0) < weight.shape[0]:
            return original(
                input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
            )
        padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
        weight, ends = _arguments(mark, weight)
        output: Tensor = ActiveEmbedding.apply(input, weight, padding, *ends, mark.by_rows)  # type: ignore[no-untyped-call]
        return output

    return embedding


def _wrapped_script(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def script(obj: Any, *args: Any, _frames_up: int = 0, **kwargs: Any) -> Any:
        if isinstance(obj, nn.Module) and _marked:
            raise RuntimeError(
                "torch.jit.script() cannot compile modules while a GMixoutOptimizer with "
                "grad_layout='active' is alive, which wraps the functionals that they call: script "
                "the model before, or call consolidate() first, or use grad_layout='packed'"
            )
        return original(obj, *args, _frames_up=_frames_up + 1, **kwargs)

    return script


# What is wrapped: module, name, how.
_FUNCTIONALS: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (F, "linear", _wrapped_linear),
    (F, "conv1d", _wrapped_conv),
    (F, "conv2d", _wrapped_conv),
    (F, "conv3d", _wrapped_conv),
    (F, "embedding", _wrapped_embedding),
    (torch.jit, "script", _wrapped_script),
]

# Of each what was there before, and what is there now.
_in_place: list[tuple[Any, str, Any, Any]] = []


def _wrap_functionals() -> None:
    for module, name, wrap in _FUNCTIONALS:
        original = getattr(module, name)
        wrapper = wrap(original)
        setattr(module, name, wrapper)
        _in_place.append((module, name, original, wrapper))


def _unwrap_functionals() -> None:
    for module, name, original, wrapper in _in_place:
        # Somebody else's wrapper around ours keeps ours, which does nothing without marks.
        if getattr(module, name) is wrapper:
            setattr(module, name, original)
    _in_place.clear()
