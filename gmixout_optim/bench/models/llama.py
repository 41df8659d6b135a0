"""Llama's decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmixout_optim.bench.models.workload import Regression, Workload


@dataclass(frozen=True)
class LlamaConfig:
    """Channels, layers, heads of queries and of keys, channels inside the MLP; ``tokens`` in a
    sequence."""

    width: int
    depth: int
    heads: int
    key_heads: int
    hidden: int
    vocabulary: int = 32000
    rotary_base: float = 10000.0
    tokens: int = 128


# Channels of a head, and channels per layer of the published models, Llama-2-7B for example.
_HEAD, _ASPECT = 128, 128


def config_of(weights: int) -> LlamaConfig:
    """The config of about so many weights, in the proportions of Llama-2-7B.

    With width d and as many keys as queries, a layer has 4 d^2 weights in its attention and 8 d^2
    in its MLP (three matrices of d x 8/3 d), L layers 12 L d^2, and the embedding, which is the
    output layer too, 32000 d. The width is the multiple of 512 nearest to the one at which L =
    d / 128 meets the number, so that up to 512 ranks have equal shares of the layers' matrices; the
    number of layers then makes up the weights to within half a layer.
    """
    vocabulary, step = LlamaConfig.vocabulary, 512

    def weights_at(width: int) -> float:
        return 12 * width**3 / _ASPECT + vocabulary * width

    width = step
    while weights_at(width + step // 2) < weights:
        width += step
    hidden = -(-8 * width // (3 * 256)) * 256
    layer = 4 * width**2 + 3 * width * hidden + 2 * width
    depth = max(1, round((weights - vocabulary * width) / layer))
    heads = width // _HEAD
    return LlamaConfig(width, depth, heads=heads, key_heads=heads, hidden=hidden)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.base = config.rotary_base
        self.channels = config.width // config.heads
        keys = config.key_heads * self.channels
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, keys, bias=False)
        self.v_proj = nn.Linear(config.width, keys, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            projection(tokens).unflatten(-1, (-1, self.channels)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(
            rotate(query, self.base), rotate(key, self.base), value, is_causal=True, enable_gqa=True
        )
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return projected


def rotate(heads: Tensor, base: float) -> Tensor:
    """Turn pairs of channels by angles that grow with the position; ``heads`` is (batch, heads,
    tokens, channels)."""
    tokens, channels = heads.shape[-2:]
    pair = torch.arange(channels // 2, device=heads.device)
    position = torch.arange(tokens, device=heads.device)
    angle = position[:, None] * base ** (-2 * pair / channels)
    cos, sin = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    first, second = heads.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        gated = nn.functional.silu(self.gate_proj(tokens)) * self.up_proj(tokens)
        projected: Tensor = self.down_proj(gated)
        return projected


class DecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.width, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.self_attn(self.input_layernorm(tokens))
        transformed: Tensor = tokens + self.mlp(self.post_attention_layernorm(tokens))
        return transformed


class Llama(Workload):
    """All of it; embeddings are the output layer too."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.Sequential(*(DecoderLayer(config) for _ in range(config.depth)))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        decoded = self.norm(self.layers(self.embed_tokens(words)))
        return nn.functional.linear(decoded, self.embed_tokens.weight)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        words = torch.randint(self.config.vocabulary, (size, self.config.tokens + 1))
        return words[:, :-1], words[:, 1:]

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(inputs).flatten(0, 1).float(), targets.flatten())


class LlamaLayer(Regression):
    """One decoder layer by itself, on random hidden states."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = DecoderLayer(config)

    def forward(self, tokens: Tensor) -> Tensor:
        transformed: Tensor = self.layer(tokens)
        return transformed

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        shape = (size, self.config.tokens, self.config.width)
        return torch.randn(shape), torch.randn(shape)
