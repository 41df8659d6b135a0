"""The models to measure with, in plain torch, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from gmixout_optim.bench.models.convnext import ConvNeXt, ConvNeXtConfig
from gmixout_optim.bench.models.llama import Llama, LlamaConfig, LlamaLayer, config_of
from gmixout_optim.bench.models.mlp import MLP
from gmixout_optim.bench.models.resnet import ResNet, ResNetConfig
from gmixout_optim.bench.models.vit import VisionTransformer, ViTConfig
from gmixout_optim.bench.models.workload import Workload

MODELS: dict[str, Callable[[], Workload]] = {
    "vit_b_16": partial(VisionTransformer, ViTConfig(patch=16, width=768, depth=12, heads=12)),
    "vit_s_14": partial(VisionTransformer, ViTConfig(patch=14, width=384, depth=12, heads=6)),
    "vit_l_14": partial(VisionTransformer, ViTConfig(patch=14, width=1024, depth=24, heads=16)),
    "resnet50": partial(ResNet, ResNetConfig(blocks=(3, 4, 6, 3))),
    "convnext_t": partial(
        ConvNeXt, ConvNeXtConfig(blocks=(3, 3, 9, 3), widths=(96, 192, 384, 768))
    ),
    # one decoder layer of Llama-3.2-1B, for 512 tokens
    "llama-block": partial(
        LlamaLayer,
        LlamaConfig(width=2048, depth=1, heads=32, key_heads=8, hidden=8192, tokens=512),
    ),
    # Llama-3.2-1B
    "llama-1b": partial(
        Llama,
        LlamaConfig(
            width=2048,
            depth=16,
            heads=32,
            key_heads=8,
            hidden=8192,
            vocabulary=128256,
            rotary_base=500000.0,
        ),
    ),
    # one decoder layer of Llama-2-7B
    "llama-7b-layer": partial(
        LlamaLayer, LlamaConfig(width=4096, depth=1, heads=32, key_heads=32, hidden=11008)
    ),
}

FEWEST_WEIGHTS, MOST_WEIGHTS = 100, 10**12


def find_model(name: str) -> Callable[[], Workload]:
    """What builds the model of a name in :data:`MODELS`, or the MLP of so many weights as the name
    says.

    Raises:
        ValueError: neither.
    """
    if name in MODELS:
        return MODELS[name]
    try:
        weights = int(float(name))
    except (ValueError, OverflowError):
        weights = 0
    if not FEWEST_WEIGHTS <= weights <= MOST_WEIGHTS:
        raise ValueError(
            f"model must be one of {', '.join(MODELS)} or a number of weights such as 1e6, from "
            f"{FEWEST_WEIGHTS} to {MOST_WEIGHTS:.0e}, got {name!r}"
        )
    return partial(MLP, weights)


def shapes_of(name: str) -> list[torch.Size]:
    """The shapes of a model's parameters in the order of ``parameters()``; takes no memory."""
    return _shapes(find_model(name))


def llama_shapes(weights: int) -> list[torch.Size]:
    """The same of a Llama of about so many weights, see :func:`config_of`."""
    return _shapes(partial(Llama, config_of(weights)))


def _shapes(build: Callable[[], Workload]) -> list[torch.Size]:
    with torch.device("meta"):
        model = build()
    return [param.shape for param in model.parameters()]


def count_weights(name: str) -> int:
    """How many weights a model has; takes no memory."""
    return sum(shape.numel() for shape in shapes_of(name))
