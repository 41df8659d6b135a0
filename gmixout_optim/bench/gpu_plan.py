"""What a step costs on a GPU, calculated: ``python -m gmixout_optim.bench --plan-gpu h100``.

Launches and bytes are those of the code that torch.compile makes for the device; nothing runs on
it. The times are bounds: a device does not reach its bandwidth, and whether the host keeps up with
it depends on the host.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bench.models import shapes_of
from gmixout_optim.bench.options import PROGRAM, add_cells, model_name
from gmixout_optim.bench.pretend.device import pretend, why_not
from gmixout_optim.bench.table import pipe_table
from gmixout_optim.cells import Granularity
from gmixout_optim.index_sets import active_cells

_SECTOR = 32  # bytes that a GPU moves at least

# What the host takes to launch a kernel, in seconds, from a loop of prepared launches.
_LAUNCH = 4e-6


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet: compute capability, and bytes that its memory moves in a second."""

    title: str
    capability: tuple[int, int]
    bandwidth: float


DEVICES = {
    "h100": Device("H100 SXM", (9, 0), 3.35e12),
    "a100": Device("A100 80 GB", (8, 0), 2.04e12),
    "4090": Device("GeForce RTX 4090", (8, 9), 1.01e12),
}


@dataclass(frozen=True)
class Cost:
    """Of a step.

    Attributes:
        title: of the optimizer.
        weights: that it steps.
        launches: of kernels.
        bytes: that these name.
        sectors: bytes of the sectors of 32 that they lie in.
        memory: seconds for these at the device's bandwidth.
        launching: seconds for the launches at 4 microseconds each.
        redraw: launches of a redraw, 0 for none.
    """

    title: str
    weights: int
    launches: int
    bytes: int
    sectors: int
    memory: float
    launching: float
    redraw: int

    @property
    def least(self) -> float:
        """Seconds: the host launches ahead of the device."""
        return max(self.memory, self.launching)


def plan(model: str, device: Device, settings: Sequence[tuple[Granularity, str]]) -> list[Cost]:
    """AdamW's own step, and those of the wrapper with each granularity and gradient layout."""
    from gmixout_optim.bench.pretend.fake import pass_fakes_as_tensors
    from gmixout_optim.bench.pretend.trace import trace

    pretend(device.capability)
    pass_fakes_as_tensors()
    shapes = shapes_of(model)
    costs = [_plain_cost(shapes, device)]
    for cells, grad_layout in settings:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = trace(
                shapes, torch.optim.AdamW, granularity=cells, grad_layout=grad_layout, steps=4
            )
        step, redraw = traced.phases["step 3"], traced.phases["redraw 4"]
        kernels = [kernel for graph in step.graphs for kernel in graph.launches]
        gathered = sum(sum(k.gathered.values()) + sum(k.scattered.values()) for k in kernels)
        each = _sector_bytes(traced.optimizer)
        sectors = sum(kernel.direct for kernel in kernels) + round(gathered * each)
        moved = sum(kernel.bytes for kernel in kernels)
        weights = sum(m.slot.anchor.numel() for m in traced.optimizer._members if m.slot)
        title = f"GMixout, {cells}, {grad_layout} gradients"
        costs.append(
            _cost(title, weights, step.all_launches, moved, sectors, device, redraw.all_launches)
        )
    return costs


def _cost(
    title: str, weights: int, launches: int, moved: int, sectors: int, device: Device, redraw: int
) -> Cost:
    seconds = sectors / device.bandwidth
    return Cost(title, weights, launches, moved, sectors, seconds, launches * _LAUNCH, redraw)


# A launch of torch's fused optimizers takes so many tensors, in so many chunks.
_FUSED_TENSORS, _FUSED_CHUNKS, _FUSED_CHUNK = 36, 320, 1 << 16


def _plain_cost(shapes: Sequence[torch.Size], device: Device) -> Cost:
    """Of ``AdamW(fused=True)``: weights and two moments are read and written, gradients read."""
    weights = sum(shape.numel() for shape in shapes)
    chunks = sum(-(-shape.numel() // _FUSED_CHUNK) for shape in shapes)
    launches = max(-(-len(shapes) // _FUSED_TENSORS), -(-chunks // _FUSED_CHUNKS))
    moved = 7 * 4 * weights
    return _cost("AdamW(fused=True)", weights, launches, moved, moved, device, 0)


def _sector_bytes(optimizer: GMixoutOptimizer) -> float:
    """Bytes of the sectors that active elements lie in, for each element, from drawn sets."""
    touched, elements = 0, 0
    for member in optimizer._members:
        grid, size = member.cells.grid, member.param.element_size()
        cells = active_cells(
            grid.cells, 1 - member.cells.mask_prob, seed=0, tensor=member.cells.number, episode=0
        ).long()
        start = cells * grid.inner * size
        stop = start + grid.inner * size - 1
        if grid.inner * size < _SECTOR:
            sectors = len(torch.unique(torch.cat([start // _SECTOR, stop // _SECTOR])))
        else:
            sectors = int((stop // _SECTOR - start // _SECTOR + 1).sum())
        touched += grid.outer * sectors * _SECTOR
        elements += cells.numel() * grid.width
    return touched / elements


def table(model: str, device: Device, costs: Sequence[Cost]) -> str:
    plain = costs[0]
    header = ["optimizer", "weights", "launches", "bytes, MB", "in sectors, MB"]
    header += ["memory, us", "launching, us", "at least", "redraw, launches"]
    rows = [
        [
            cost.title,
            f"{cost.weights / 1e6:.1f}M",
            str(cost.launches),
            f"{cost.bytes / 1e6:.0f}",
            f"{cost.sectors / 1e6:.0f}",
            f"{cost.memory * 1e6:.0f}",
            f"{cost.launching * 1e6:.0f}",
            f"{cost.least / plain.least:.2f}x",
            str(cost.redraw or ""),
        ]
        for cost in costs
    ]
    return (
        f"A step on {model} in float32, d = 0.1; {device.title}. Calculated, not measured: "
        f"{device.bandwidth / 1e12:.2f} TB/s, and {_LAUNCH * 1e6:.0f} us for a launch; the host's "
        "other work is not in it.\n\n" + pipe_table(header, rows)
    )


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    reason = why_not()
    if reason is not None:
        _parser().error(f"--plan-gpu {reason}")
    settings = [(cells, layout) for cells in given.granularity for layout in given.grad_layout]
    device = DEVICES[given.plan_gpu]
    costs = plan(given.model, device, settings)
    if given.json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
    else:
        print(table(given.model, device, costs))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} --plan-gpu",
        description="What a step costs on a GPU, calculated from the code that is made for it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--plan-gpu", choices=DEVICES, required=True, help="the device, of a data sheet")
    add("--model", type=model_name, default="vit_b_16", help="as without --plan-gpu")
    add_cells(parser, ["dense"])
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser
