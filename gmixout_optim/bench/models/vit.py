"""Vision transformers: the parameters of torchvision's, in their order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmixout_optim.bench.models.workload import ImageClassifier


@dataclass(frozen=True)
class ViTConfig:
    """Pixels, channels, blocks, attention heads; an MLP is four times as wide as its block."""

    patch: int
    width: int
    depth: int
    heads: int
    image: int = 224
    classes: int = 1000


class Attention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.in_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.in_proj(tokens).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.ln_1(tokens))
        transformed: Tensor = tokens + self.mlp(self.ln_2(tokens))
        return transformed


class VisionTransformer(ImageClassifier):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config.image, config.classes)
        length = (config.image // config.patch) ** 2 + 1
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.conv_proj = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.encoder = Encoder(config, length)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        first = self.class_token.expand(len(patches), -1, -1)
        logits: Tensor = self.head(self.encoder(torch.cat([first, patches], 1))[:, 0])
        return logits


class Encoder(nn.Module):
    def __init__(self, config: ViTConfig, length: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, length, config.width).normal_(std=0.02))
        self.layers = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.ln = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        encoded: Tensor = self.ln(self.layers(tokens + self.pos_embedding))
        return encoded
