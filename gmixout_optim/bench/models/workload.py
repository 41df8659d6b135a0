"""What every model to measure with can do."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Workload(nn.Module, ABC):
    """A model with a batch to train on. Both are made on torch's default device and in its default dtype."""

    @abstractmethod
    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """``size`` random inputs and their targets."""

    @abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, in float32."""
