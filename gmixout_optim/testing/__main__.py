"""What the checks cost: ``python -m gmixout_optim.testing``."""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import nn

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bench.models import shapes_of
from gmixout_optim.bench.timing import Cost, Turn, take_turns
from gmixout_optim.cells import Granularity
from gmixout_optim.testing import InvariantMonitor, check_invariants
from gmixout_optim.testing.checks import take_snapshot

_GRANULARITIES: tuple[Granularity, ...] = ("element", 16, "row")


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of the checks, in steps of fused AdamW.")
    parser.add_argument("--model", default="vit_s_14", help="of the bench, or a number of weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    shapes, device = shapes_of(arguments.model), torch.device(arguments.device)
    print(
        "| | GMixout's step | check_invariants | the monitor's check | snapshot, bytes per weight |"
    )
    print("|---|---|---|---|---|")
    for granularity in _GRANULARITIES:
        print(_row(granularity, shapes, device, arguments.rounds), flush=True)


def _row(
    granularity: Granularity, shapes: list[torch.Size], device: torch.device, rounds: int
) -> str:
    plain, base = (_adamw(shapes, device) for _ in range(2))
    optimizer = GMixoutOptimizer(base, granularity=granularity, resample_every=None)
    optimizer.step()
    monitor = InvariantMonitor(optimizer)
    monitor.start()
    turns = [plain.step, optimizer.step, lambda: check_invariants(optimizer), monitor.check]
    samples = take_turns(rounds, [Turn(call) for call in turns], device)
    costs = [Cost.of(times, samples[0]).plain_steps.median for times in samples[1:]]
    wrapped = [cost / costs[0] for cost in costs]
    held = take_snapshot(optimizer).bytes / sum(shape.numel() for shape in shapes)
    cells = [
        f"{costs[0]:.1f}",
        *(f"{a:.1f} ({b:.1f})" for a, b in zip(costs[1:], wrapped[1:], strict=True)),
    ]
    return f"| {granularity} | {' | '.join(cells)} | {held:.1f} |"


def _adamw(shapes: list[torch.Size], device: torch.device) -> torch.optim.AdamW:
    params = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return torch.optim.AdamW(params, lr=1e-5, fused=True)


if __name__ == "__main__":
    main()
