"""The optimizers to wrap and to measure against, each in its fastest form."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Element-wise ones: what they keep can be packed. Settings that change neither time nor bytes are
# torch's defaults.
BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adamax": (torch.optim.Adamax, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "rprop": (torch.optim.Rprop, {}),
}


def make_base(name: str, params: Iterable[Tensor], form: str | None) -> Optimizer:
    return BASES[name][0](params, **arguments_of(name, form))


def arguments_of(name: str, form: str | None) -> dict[str, Any]:
    return {**BASES[name][1], **({} if form is None else {form: True})}


def fastest_form(name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """``"fused"`` where the class has it for the dtype on the device, else ``"foreach"``; None for
    neither."""
    for form in ("fused", "foreach"):
        if form in inspect.signature(BASES[name][0]).parameters:
            param = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
            param.grad = torch.zeros_like(param)
            try:
                make_base(name, [param], form).step()
            except RuntimeError:  # not on every device
                continue
            return form
    return None
