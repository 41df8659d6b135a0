"""The time that the host takes for a compiled step on a GPU: all of it but the kernels.

ViT-B/16 with AdamW on one thread of a CPU, batches and graphs as on a GPU; the generated code runs,
its launches do nothing. What a real launch costs comes on top.

    python -m tests.cuda_without_gpu.host_time [element | 16 | column | row] [dense | packed] [-p]
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bench.models import shapes_of
from tests.cuda_without_gpu.on_cpu import run_on_cpu

STEPS = 100


def median_time(call: Callable[[], Any]) -> float:
    """Milliseconds."""
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main(arguments: list[str]) -> None:
    granularity: Any = arguments[0] if arguments else "element"
    granularity = int(granularity) if granularity.isdigit() else granularity
    torch.set_num_threads(1)
    launches = 0

    def launch(*args: Any, **kwargs: Any) -> None:
        nonlocal launches
        launches += 1

    run_on_cpu(lambda name, text: types.SimpleNamespace(run=launch))
    params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes_of("vit_b_16")]
    optimizer = GMixoutOptimizer(
        torch.optim.AdamW(params, fused=True),
        granularity=granularity,
        resample_every=1000,
        compile=True,
        grad_layout="packed" if "packed" in arguments else "dense",
    )

    for param in params:
        param.grad = torch.zeros_like(param)
        for hook in list((param._post_accumulate_grad_hooks or {}).values()):
            hook(param)

    for _ in range(5):
        optimizer.step()
    launches = 0
    whole = median_time(optimizer.step)
    print(f"{granularity}: {whole:.2f} ms, {launches // STEPS} launches")
    plan = optimizer._layout._plan
    assert plan is not None
    run = [call.fused._run for call in plan.calls]
    for call in plan.calls:
        call.fused._run = lambda *tensors: None
    print(f"without the generated code: {median_time(optimizer.step):.2f} ms")
    for call, each in zip(plan.calls, run, strict=True):
        call.fused._run = each
    small = [nn.Parameter(torch.zeros(1)) for _ in params]
    for param in small:
        param.grad = torch.zeros(1)
    plain = torch.optim.AdamW(small, fused=True)
    print(f"AdamW(fused=True) on as many tensors of one weight: {median_time(plain.step):.2f} ms")
    if "-p" in arguments:
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(20):
            optimizer.step()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main(sys.argv[1:])
