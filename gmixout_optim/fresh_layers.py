"""Recognising layers that have no pretrained weights, which must not be mixed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gmixout_optim.members import Member
from gmixout_optim.warn import warn


def looks_freshly_initialised(param: Tensor) -> bool:
    """Whether a matrix or filter holds one constant, or what torch.nn layers start from.

    ``torch.nn.Linear`` and the convolutions draw from U(-b, b) with b = 1 / sqrt(fan_in): a sharp
    edge at b and a variance of b**2 / 3, which training does not leave in place.
    """
    if param.ndim < 2 or param.numel() < 2 or param.is_meta or not param.is_floating_point():
        return False
    weights = param.detach()
    low, high = (float(end) for end in torch.aminmax(weights))
    if low == high:
        return True
    count = param.numel()
    bound = float(param[0].numel()) ** -0.5
    largest = max(-low, high)
    # Of n uniform draws the largest is within 10 / n of the bound, all but 1 in e**10 times.
    edge = 1 - 10 / count
    if count < 64 or not edge * bound <= largest <= bound * 1.001:
        return False
    ratio = float(weights.float().square().mean()) / (bound**2 / 3)
    return bool(abs(ratio - 1) < 6 * (0.8 / count) ** 0.5 + 1e-3)


def warn_of_fresh_layers(members: Iterable[Member]) -> None:
    names = [member.name for member in members if looks_freshly_initialised(member.param)]
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warn(
            f"{shown} will be mixed but looks freshly initialised: such a layer has no pretrained "
            "weights worth returning to and would hardly learn. Exclude it (exclude='head.*', "
            "with a base built from model.named_parameters()) or give its parameter group "
            "mask_prob=0"
        )
