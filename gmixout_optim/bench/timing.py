"""Clocks: calls that take turns, bandwidth, kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch.profiler import ProfilerActivity, profile

# By type of device: large enough that no cache holds it, and that a call takes no time beside it.
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}

# Memory that the system gives to a process for the first time can take many times as long.
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Spread:
    """The median and the range from the 10th to the 90th percentile of what was measured."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        """Of two samples or more."""
        tenths = quantiles(samples, n=10, method="inclusive")
        return cls(median(samples), tenths[0], tenths[-1])


@dataclass(frozen=True)
class Cost:
    """A time in milliseconds, and as a ratio to the plain optimizer's step in the same round."""

    ms: Spread
    plain_steps: Spread

    @classmethod
    def of(cls, samples: list[float], steps: list[float]) -> Cost:
        ratios = [sample / step for sample, step in zip(samples, steps, strict=True)]
        return cls(Spread.of(samples), Spread.of(ratios))


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """The time from the call until the device has done what it asked for, on an idle device."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Turn:
    """A call to time; ``prepare`` is called before it, untimed."""

    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def take_turns(rounds: int, turns: Sequence[Turn], device: torch.device) -> list[list[float]]:
    """Milliseconds of each call, a list for each, without those of a warm-up.

    Taking turns, the calls meet the same weather: ratios within a round hold where the machine's
    speed drifts.
    """
    samples: list[list[float]] = [[] for _ in turns]
    for _ in range(WARM_UP_ROUNDS + rounds):
        for turn, times in zip(turns, samples, strict=True):
            turn.prepare()
            times.append(milliseconds(turn.call, device))
    return [times[WARM_UP_ROUNDS:] for times in samples]


def copy_bandwidth(device: torch.device) -> Spread:
    """Bytes per second, read and written, of ``dst.copy_(src)``."""
    size = COPIED_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    (times,) = take_turns(10, [Turn(lambda: target.copy_(source))], device)
    return Spread.of([2 * size / (1e-3 * t) for t in times])


def count_kernels(call: Callable[[], object], device: torch.device) -> int | None:
    """How many kernels a call launches on a CUDA device, without copies and fills; None on a
    CPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        synchronise(device)
    names = [
        event.name
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)
