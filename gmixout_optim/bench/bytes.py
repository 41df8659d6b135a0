"""What training keeps: bytes in memory by part, and in a file to resume from."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.packed_gradient import PackedGradient
from gmixout_optim.shards import local_of


@dataclass
class Bytes:
    """Bytes between two steps, by part.

    Attributes:
        weights: the model's parameters.
        gradients: what ``param.grad`` holds.
        state: the base's state.
        masters, anchors, indices: the wrapper's trained values, anchors and index sets.
        optimizer: all that an optimizer keeps, the last four.
        beyond_weights: all but the weights.
    """

    weights: int
    gradients: int
    state: int
    masters: int = 0
    anchors: int = 0
    indices: int = 0
    optimizer: int = field(init=False)
    beyond_weights: int = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = self.state + self.masters + self.anchors + self.indices
        self.beyond_weights = self.gradients + self.optimizer


def bytes_of(optimizer: Optimizer) -> Bytes:
    """Of an optimizer that has stepped, its gradients in place; of DTensors what this rank has."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    weights = sum(local_of(param).nbytes for param in params)
    gradients = sum(kept_gradient(param).nbytes for param in params)
    if not isinstance(optimizer, GMixoutOptimizer):
        state = sum(local_of(item).nbytes for item in tensors_in(optimizer.state))
        return Bytes(weights, gradients, state)
    report = optimizer.report()
    return Bytes(
        weights,
        gradients,
        state=report.total("state_bytes"),
        masters=report.total("value_bytes"),
        anchors=report.total("anchor_bytes"),
        indices=report.total("index_bytes"),
    )


def kept_gradient(param: Tensor) -> Tensor:
    """The plain tensor that a parameter's gradient is kept in."""
    assert param.grad is not None
    grad = local_of(param.grad)
    return grad.active if isinstance(grad, PackedGradient) else grad


def tensors_in(item: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict | list | tuple):
        for part in item.values() if isinstance(item, dict) else item:
            yield from tensors_in(part)


@dataclass
class ResumeFile:
    """``torch.save(optimizer.state_dict())``: its size, and the bytes of integer tensors in it."""

    bytes: int
    integer_bytes: int


def resume_file(optimizer: Optimizer) -> ResumeFile:
    state_dict = optimizer.state_dict()
    counter = _ByteCounter()
    torch.save(state_dict, counter)
    whole = [t for t in tensors_in(state_dict) if not t.is_floating_point()]
    return ResumeFile(counter.written, sum(tensor.nbytes for tensor in whole))


class _ByteCounter(io.BytesIO):
    """A file that only counts: a state may not fit in memory twice."""

    written = 0

    def write(self, data: Any, /) -> int:
        self.written += len(data)
        return len(data)
