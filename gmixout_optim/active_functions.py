"""Layers whose backward computes the gradient of the active rows or columns of a weight alone.

The gradients of input and bias are the ordinary ones. Each :class:`torch.autograd.Function` takes,
beside the arguments of its functional, which have one dtype:

- ``columns``: the active columns of the input, which are saved in place of it; None where rows are
  active.
- ``positions``: int64, the active rows or columns of the weight.
- ``deliver`` and ``draw``: ``deliver(active, draw)`` makes the weight's gradient from its active
  part, of shape (rows, ...) or (outputs, columns, ...). ``draw`` (0-d int64, on the CPU) is saved
  like a tensor of the layer, so that what checkpointing computes again comes with its own.
- ``leaf``: in compiled code, where ``deliver`` is None, the tensor whose gradient is the active
  part. The weight has none then.

A backward that may be differentiated (``create_graph=True``) makes a dense gradient: the whole one
with rows; with columns what was saved allows no more than zeros elsewhere, and whoever
differentiates through it is told so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_aten = torch.ops.aten


class ActiveLinear(Function):
    """:func:`torch.nn.functional.linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        columns: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        leaf: Tensor | None,
        deliver: Any,
        draw: Tensor | None,
    ) -> Tensor:
        _remember(ctx, columns is None, weight, leaf, deliver)
        _save(ctx, input if columns is None else columns, weight, positions, draw)
        output: Tensor = _aten.linear(input, weight, bias)
        # In-place operations on a view that was made in here would raise.
        output = _aten._unsafe_view(output, output.shape)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved, weight, positions, draw = ctx.saved_tensors
        of_input = grad.matmul(weight) if ctx.needs_input_grad[0] else None
        grad = grad.reshape(-1, grad.shape[-1])
        of_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        if ctx.by_rows and not _is_differentiated(ctx):
            grad = grad.index_select(1, positions)
        active = grad.t().mm(saved.reshape(-1, saved.shape[-1]))
        of_weight, of_leaf = _delivered(ctx, active, positions, draw)
        return of_input, None, of_weight, of_bias, None, of_leaf, None, None


class ActiveConvolution(Function):
    """:func:`torch.nn.functional.conv1d`, ``conv2d`` and ``conv3d``, with one group."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        columns: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        leaf: Tensor | None,
        deliver: Any,
        draw: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> Tensor:
        _remember(ctx, columns is None, weight, leaf, deliver)
        ctx.form = stride, padding, dilation, False, [0] * len(stride), 1
        ctx.input_shape = input.shape
        _save(ctx, input if columns is None else columns, weight, positions, draw)
        output: Tensor = _aten.convolution(input, weight, bias, *ctx.form)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved, weight, positions, draw = ctx.saved_tensors
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = _gradient_of_input(ctx, grad, weight)
        dims = [dim for dim in range(grad.ndim) if dim != 1]
        of_bias = grad.sum(dims) if ctx.needs_input_grad[3] else None
        if ctx.by_rows and not _is_differentiated(ctx):
            grad = grad.index_select(1, positions)
        active = _gradient_of_filters(ctx, grad, saved)
        of_weight, of_leaf = _delivered(ctx, active, positions, draw)
        return of_input, None, of_weight, of_bias, None, of_leaf, *[None] * 5


class ActiveEmbedding(Function):
    """:func:`torch.nn.functional.embedding`; ``by_rows`` says whether ``positions`` are rows."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        padding_idx: int,
        positions: Tensor,
        leaf: Tensor | None,
        deliver: Any,
        draw: Tensor | None,
        by_rows: bool,
    ) -> Tensor:
        _remember(ctx, by_rows, weight, leaf, deliver)
        ctx.padding_idx = padding_idx
        ctx.save_for_backward(input, positions, draw)
        output: Tensor = _aten.embedding(weight, input, padding_idx)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, positions, draw = ctx.saved_tensors
        rows = ctx.weight_shape[0]
        if _is_differentiated(ctx):
            whole = _aten.embedding_dense_backward(grad, input, rows, ctx.padding_idx, False)
            return None, whole, *[None] * 6
        if ctx.by_rows:
            # Where each row goes; what is not active goes to one more row, which is left out.
            count = positions.shape[0]
            places = torch.full((rows,), count, device=grad.device)
            places = places.index_copy(0, positions, torch.arange(count, device=grad.device))
            places = torch.where(input == ctx.padding_idx, count, places[input])
            active = _aten.embedding_dense_backward(grad, places, count + 1, count, False)[:count]
        else:
            grad = grad.index_select(-1, positions)
            active = _aten.embedding_dense_backward(grad, input, rows, ctx.padding_idx, False)
        of_weight, of_leaf = _delivered(ctx, active, positions, draw)
        return None, of_weight, None, None, of_leaf, None, None, None


class _WithZeros(Function):
    """The active columns of a gradient, with zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, active: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
        return active.new_zeros(shape).index_copy(1, positions, active)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "cannot differentiate through the gradient of a weight of which only the active "
            "columns were computed (grad_layout='active', granularity='column'): use "
            "granularity='row' or grad_layout='packed', with which it is whole"
        )


def _remember(ctx: Any, by_rows: bool, weight: Tensor, leaf: Tensor | None, deliver: Any) -> None:
    ctx.by_rows, ctx.deliver, ctx.weight_shape = by_rows, deliver, weight.shape
    ctx.leaf_dtype = None if leaf is None else leaf.dtype


def _save(ctx: Any, input: Tensor, weight: Tensor, positions: Tensor, draw: Tensor | None) -> None:
    """The weight only where backward reads it: it may change until then, as in a plain layer."""
    ctx.save_for_backward(input, weight if ctx.needs_input_grad[0] else None, positions, draw)


def _is_differentiated(ctx: Any) -> bool:
    """Whether somebody differentiates through the backward pass."""
    return ctx.deliver is not None and torch.is_grad_enabled()


def _delivered(
    ctx: Any, active: Tensor, positions: Tensor, draw: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and leaf."""
    if ctx.deliver is None:
        return None, active.to(ctx.leaf_dtype)
    if not _is_differentiated(ctx):
        return ctx.deliver(active, draw), None
    if not ctx.by_rows:
        active = _WithZeros.apply(active, positions, ctx.weight_shape)  # type: ignore[no-untyped-call]
    return active, None


def _gradient_of_input(ctx: Any, grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a convolution's input, which was not saved."""
    of_input: Tensor
    shape = ctx.input_shape
    if _is_pointwise(ctx, grad):
        matrix = weight.flatten(1).t()
        product = matrix.expand(grad.shape[0], *matrix.shape).bmm(grad.flatten(2))
        product = product.view(shape[0], shape[1], *grad.shape[2:])
        if product.shape == shape:
            return product
        of_input = grad.new_zeros(shape)
        of_input[_seen(ctx)] = product
        return of_input
    # Only the input's shape is read. On a CPU it would be copied if it were expanded.
    like = grad.new_zeros(1).expand(shape)
    if grad.is_cpu and not _is_differentiated(ctx):
        like = grad.new_empty(shape)
    wanted = [True, False, False]
    of_input = _aten.convolution_backward(grad, like, weight, None, *ctx.form, wanted)[0]
    return of_input


def _gradient_of_filters(ctx: Any, grad: Tensor, input: Tensor) -> Tensor:
    """The gradient of the weight for the outputs and input channels that are given."""
    kernel = ctx.weight_shape[2:]
    if _is_pointwise(ctx, grad) and input.is_contiguous():
        product = grad.flatten(2).bmm(input[_seen(ctx)].flatten(2).transpose(1, 2))
        return product.sum(0).view(*product.shape[1:], *kernel)
    filters = grad.new_zeros(grad.shape[1], input.shape[1], *kernel)  # not read
    wanted = [False, True, False]
    of_filters: Tensor = _aten.convolution_backward(grad, input, filters, None, *ctx.form, wanted)[
        1
    ]
    return of_filters


def _is_pointwise(ctx: Any, grad: Tensor) -> bool:
    """Whether a convolution is a product of matrices, which takes a half of the time or less."""
    _, padding, *_ = ctx.form
    return ctx.weight_shape[2:].numel() == 1 and not any(padding) and grad.is_contiguous()


def _seen(ctx: Any) -> tuple[Any, ...]:
    """What of its input a pointwise convolution sees."""
    return (..., *(slice(None, None, step) for step in ctx.form[0]))
