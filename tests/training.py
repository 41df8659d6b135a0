"""Small training runs that the tests share."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def small_model(dtype: torch.dtype = torch.float64, seed: int = 0, bias: bool = True) -> nn.Module:
    """A body and a head, as in fine-tuning; the body's weights are not those of a fresh layer."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(6, 8, bias=bias))
    model.add_module("act", nn.Tanh())
    model.add_module("head", nn.Linear(8, 3, bias=bias))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * 0.3)
    return model.to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(16, 6, generator=generator, dtype=dtype),
        torch.randn(16, 3, generator=generator, dtype=dtype),
    )


def loss_of(model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs, targets = batch(step, dtype)
    return (model(inputs) - targets).square().mean()


def train(
    model: nn.Module,
    optimizer: Optimizer,
    steps: Iterable[int],
    after_backward: Callable[[int], Any] = lambda step: None,
) -> list[float]:
    """A plain loop; optimizers that need a closure get one. Returns the losses."""
    losses = []
    needs_closure = isinstance(getattr(optimizer, "base", optimizer), torch.optim.LBFGS)
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            after_backward(step)
            return loss

        if needs_closure:
            losses.append(float(optimizer.step(closure).detach()))
        else:
            losses.append(float(closure().detach()))
            optimizer.step()
    return losses


def freeze_and_thaw(model: nn.Module) -> Callable[[int], None]:
    """For :func:`train`: steps without the head's gradient, and a body that is frozen and thawed
    again."""

    def after_backward(step: int) -> None:
        if step in (2, 5):
            model.head.weight.grad = None
        model.body.weight.requires_grad_(step not in (3, 4))

    return after_backward


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def saved_and_loaded(state: Any) -> Any:
    """Through a file, as torch loads by default: no pickled objects allowed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_equal(left: Any, right: Any) -> None:
    """Bit for bit, through dicts, lists and tensors (nan equals nan)."""
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor)
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert torch.equal(torch.nan_to_num(left, nan=1e30), torch.nan_to_num(right, nan=1e30))
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_equal(a, b)
    else:
        assert left == right
