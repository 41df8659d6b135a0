"""Recognising layers that have no pretrained weights, which must not be mixed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gmixout_optim.members import Member
from gmixout_optim.on_host import numbers_of
from gmixout_optim.shards import local_of
from gmixout_optim.warn import warn


def fresh_layers(params: Iterable[Tensor]) -> list[Tensor]:
    """The matrices and filters that hold one constant, or what torch.nn layers start from.

    ``torch.nn.Linear`` and the convolutions draw from U(-b, b) with b = 1 / sqrt(fan_in): a sharp
    edge at b and a variance of b**2 / 3, which training does not leave in place.
    """
    candidates = list(filter(_is_candidate, params))
    held = [local_of(param.detach()) for param in candidates]
    ends = numbers_of([end for piece in held for end in torch.aminmax(piece)])
    fresh, edged = [], []
    for param, piece, low, high in zip(candidates, held, ends[::2], ends[1::2], strict=True):
        if low == high:
            fresh.append(param)
        elif _ends_at_the_bound(param, max(-low, high)):
            edged.append((param, piece))
    sizes = numbers_of([piece.float().square().mean() for _, piece in edged])
    return fresh + [
        param
        for (param, piece), size in zip(edged, sizes, strict=True)
        if abs(size / (_bound(param) ** 2 / 3) - 1) < 6 * (0.8 / piece.numel()) ** 0.5 + 1e-3
    ]


def _is_candidate(param: Tensor) -> bool:
    is_filled = param.ndim >= 2 and local_of(param).numel() >= 2 and not param.is_meta
    return is_filled and param.is_floating_point()


def _bound(param: Tensor) -> float:
    return 1 / math.sqrt(param.shape[1:].numel())


def _ends_at_the_bound(param: Tensor, largest: float) -> bool:
    # Of n uniform draws the largest is within 10 / n of the bound, all but 1 in e**10 times.
    count, bound = local_of(param).numel(), _bound(param)
    return count >= 64 and (1 - 10 / count) * bound <= largest <= bound * 1.001


def warn_of_fresh_layers(members: Iterable[Member]) -> None:
    members = list(members)
    fresh = set(map(id, fresh_layers(member.param for member in members)))
    names = [member.name for member in members if id(member.param) in fresh]
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warn(
            f"{shown} will be mixed but looks freshly initialised: such a layer has no pretrained "
            "weights worth returning to and would hardly learn. Exclude it (exclude='head.*', "
            "with a base built from model.named_parameters()) or give its parameter group "
            "mask_prob=0"
        )
