"""Residual networks of bottleneck blocks: the parameters of torchvision's, in their order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from gmixout_optim.bench.models.workload import ImageClassifier

EXPANSION = 4


@dataclass(frozen=True)
class ResNetConfig:
    """Blocks in each of the stages, channels of the first, pixels."""

    blocks: tuple[int, ...]
    width: int = 64
    image: int = 224
    classes: int = 1000


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.downsample.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(images)).relu()
        hidden = self.bn2(self.conv2(hidden)).relu()
        summed: Tensor = self.bn3(self.conv3(hidden)) + self.downsample(images)
        return summed.relu()


class ResNet(ImageClassifier):
    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config.image, config.classes)
        self.conv1 = nn.Conv2d(3, config.width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.stages = nn.Sequential()
        channels = config.width
        for stage, blocks in enumerate(config.blocks):
            width = config.width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.stages.append(Bottleneck(channels, width, stride))
                channels = EXPANSION * width
        self.fc = nn.Linear(channels, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.pool(self.bn1(self.conv1(images)).relu())
        logits: Tensor = self.fc(self.stages(hidden).mean((2, 3)))
        return logits
