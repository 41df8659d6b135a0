"""A plain multi-layer perceptron of a given number of weights."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from gmixout_optim.bench.models.workload import Regression

# Larger models get more layers rather than wider ones, as real ones do, up to a number of layers.
WIDEST = 4096
DEEPEST = 100


class MLP(Regression):
    """Square matrices without biases, at least 4 of them, and a last one that makes up the number.

    Args:
        weights: how many weights, met to within half a row of the last matrix.
    """

    def __init__(self, weights: int) -> None:
        super().__init__()
        self.width = max(min(WIDEST, isqrt(weights // 4)), isqrt(weights // DEEPEST))
        squares = weights // self.width**2 - 1
        self.outputs = round((weights - squares * self.width**2) / self.width)
        self.layers = nn.ModuleList(
            nn.Linear(self.width, outputs, bias=False)
            for outputs in [self.width] * squares + [self.outputs]
        )

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = nn.functional.gelu(layer(inputs))
        return inputs

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size, self.width), torch.randn(size, self.outputs)
