"""Numbers that the host wants to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def numbers_of(tensors: Sequence[Tensor]) -> list[Any]:
    """The numbers in 0-d tensors. The host waits once for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    numbers: list[Any] = [None] * len(tensors)
    for places in groups.values():
        values = torch.stack([tensors[place] for place in places]).tolist()
        for place, value in zip(places, values, strict=True):
            numbers[place] = value
    return numbers
