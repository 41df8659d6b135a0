"""ConvNeXt: depthwise convolutions and pointwise layers, as in torchvision's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmixout_optim.bench.models.workload import ImageClassifier


@dataclass(frozen=True)
class ConvNeXtConfig:
    """Blocks and channels of the stages, pixels."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    image: int = 224
    classes: int = 1000


class ChannelNorm(nn.LayerNorm):
    """Of images: over the channels of each pixel."""

    def forward(self, images: Tensor) -> Tensor:
        normed: Tensor = super().forward(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.norm(self.depthwise(images).permute(0, 2, 3, 1))
        summed: Tensor = images + (self.scale * self.mlp(pixels)).permute(0, 3, 1, 2)
        return summed


class ConvNeXt(ImageClassifier):
    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__(config.image, config.classes)
        first, *_, last = config.widths
        self.stages = nn.Sequential(nn.Conv2d(3, first, 4, 4), ChannelNorm(first, eps=1e-6))
        inputs = first
        for blocks, width in zip(config.blocks, config.widths, strict=True):
            if width != inputs:
                self.stages.append(ChannelNorm(inputs, eps=1e-6))
                self.stages.append(nn.Conv2d(inputs, width, 2, 2))
            self.stages.extend(Block(width) for _ in range(blocks))
            inputs = width
        self.norm = nn.LayerNorm(last, eps=1e-6)
        self.head = nn.Linear(last, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.stages(images).mean((2, 3))))
        return logits
