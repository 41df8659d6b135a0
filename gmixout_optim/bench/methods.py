"""Ways to fine-tune that are compared by whole training steps. All but ours and AdamW are optional.

Each takes a model, changes it where the method does, and returns its optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bench.bases import fastest_form
from gmixout_optim.bench.bytes import kept_gradient
from gmixout_optim.report import nbytes_of

LR = 1e-4
RANK = 16  # of LoRA
PROJECTION_RANK = 128  # of GaLore and APOLLO
DENSITY = 0.1


def adamw(model: nn.Module) -> Optimizer:
    params = [param for param in model.parameters() if param.requires_grad]
    form = fastest_form("adamw", params[0].dtype, params[0].device)
    return AdamW(params, lr=LR, fused=form == "fused" or None)


def gmixout(model: nn.Module, **settings: Any) -> Optimizer:
    return GMixoutOptimizer(adamw(model), mask_prob=1 - DENSITY, resample_every=None, **settings)


def lora(model: nn.Module) -> Optimizer:
    """Of rank 16 in all linear layers and convolutions (peft)."""
    peft = import_module("peft")
    targets = [*_layers(model, nn.Linear), *_layers(model, nn.Conv2d)]
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, target_modules=targets), model)
    return adamw(model)


def shira(model: nn.Module) -> Optimizer:
    """A fixed random mask on all linear layers, of about a tenth of their weights (peft)."""
    peft = import_module("peft")
    names = list(_layers(model, nn.Linear))
    matrices = [model.get_submodule(name).weight for name in names]
    sizes = sum(weight.numel() for weight in matrices if isinstance(weight, Tensor))
    sides = sum(sum(weight.shape) for weight in matrices if isinstance(weight, Tensor))
    rank = max(1, round(DENSITY * sizes / sides))
    config = peft.ShiraConfig(r=rank, mask_type="random", target_modules=names)
    peft.inject_adapter_in_model(config, model)
    return adamw(model)


def _projected(model: nn.Module, name: str) -> Optimizer:
    """Gradients of matrices projected to rank 128 (pytorch_optimizer)."""
    pytorch_optimizer = import_module("pytorch_optimizer")
    matrices = [param for param in model.parameters() if param.ndim == 2]
    others = [param for param in model.parameters() if param.ndim != 2]
    projected = dict(params=matrices, rank=PROJECTION_RANK, update_proj_gap=200, scale=1.0)
    projected["projection_type"] = "std" if name == "GaLore" else "random"
    groups = [projected, {"params": others}]
    optimizer: Optimizer = getattr(pytorch_optimizer, name)(groups, lr=LR)
    return optimizer


def badam(model: nn.Module) -> Optimizer:
    """One block of layers at a time, the next one in each step (badam)."""
    optimizer: Optimizer = import_module("badam").BlockOptimizer(
        adamw(model),
        list(model.named_parameters()),
        block_prefix_list=[[prefix] for prefix in _blocks(model)],
        switch_block_every=1,
        switch_mode="descending",
        verbose=0,
    )
    return optimizer


def eight_bit(model: nn.Module) -> Optimizer:
    """AdamW with moments of 8 bits (torchao)."""
    optimizer: Optimizer = import_module("torchao.optim").AdamW8bit(model.parameters(), lr=LR)
    return optimizer


METHODS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": adamw,
    "GMixout, packed, element": partial(gmixout, grad_layout="packed"),
    "GMixout, active, column": partial(gmixout, grad_layout="active", granularity="column"),
    "GMixout, active, row": partial(gmixout, grad_layout="active", granularity="row"),
    "LoRA": lora,
    "SHiRA": shira,
    "GaLore": partial(_projected, name="GaLore"),
    "APOLLO": partial(_projected, name="APOLLO"),
    "BAdam": badam,
    "AdamW, 8 bits": eight_bit,
}


def _layers(model: nn.Module, kind: type[nn.Module]) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, kind) and getattr(module, "groups", 1) == 1:
            yield name


def _blocks(model: nn.Module) -> Iterator[str]:
    """Name prefixes of the parts of the longest sequence of layers."""
    sequences = [
        (len(module), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential)
    ]
    length, name = max(sequences, default=(1, ""))
    for number in range(length):
        prefix = f"{name}.{number}." if name else ""
        if any(key.startswith(prefix) for key, _ in model.named_parameters()):
            yield prefix


def kept_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """What is kept beside the model's own weights, its gradients in place."""
    params = list(model.parameters())
    kept = sum(kept_gradient(param).nbytes for param in params if param.grad is not None)
    kept += sum(param.nbytes for name, param in model.named_parameters() if _is_added(name))
    if isinstance(optimizer, GMixoutOptimizer):
        return kept + optimizer.report().total("bytes")
    inner = getattr(optimizer, "base_optimizer", optimizer)
    return kept + nbytes_of(inner.state)


def _is_added(name: str) -> bool:
    return "lora_" in name or "shira_" in name


def why_missing(name: str) -> str | None:
    """Why a method cannot be had; None where it can."""
    packages = {"LoRA": "peft", "SHiRA": "peft", "BAdam": "badam", "AdamW, 8 bits": "torchao"}
    packages |= {"GaLore": "pytorch_optimizer", "APOLLO": "pytorch_optimizer"}
    if name not in packages:
        return None
    try:
        import_module(packages[name])
    except Exception as error:  # also where what it needs does not fit this torch
        return f"{packages[name]} cannot be imported ({type(error).__name__})"
    return None
