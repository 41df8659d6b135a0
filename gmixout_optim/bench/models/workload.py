"""What every model to measure with can do."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Workload(nn.Module, ABC):
    """A model with a batch to train on. Both are made on torch's default device and in its default
    dtype."""

    @abstractmethod
    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """``size`` random inputs and their targets."""

    @abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, in float32."""


class ImageClassifier(Workload):
    """Of square images with ``image`` pixels a side."""

    def __init__(self, image: int, classes: int) -> None:
        super().__init__()
        self.image, self.classes = image, classes

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        images = torch.randn(size, 3, self.image, self.image)
        return images, torch.randint(self.classes, (size,))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(inputs).float(), targets)


class Regression(Workload):
    """Of tensors, with the mean squared error."""

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(self(inputs).float(), targets.float())
