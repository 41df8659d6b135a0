"""Steps and redraws of an optimizer on a device that is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bench.pretend.capture import Capture
from gmixout_optim.bench.pretend.device import CUDA
from gmixout_optim.bench.pretend.fake import Recorder, recording
from gmixout_optim.bench.pretend.kernels import Graph, early_writes, read_graph


@dataclass
class Phase:
    """What one part of a training asks of the device.

    Attributes:
        calls: of compiled code: by which function, and the graph.
        launches: of eager kernels.
        waits: of the host for the device.
        copies: between the two.
        temporaries: large ones.
    """

    calls: list[tuple[str, Graph]]
    launches: Counter[str]
    waits: Counter[str]
    copies: Counter[str]
    temporaries: Counter[str]

    @property
    def graphs(self) -> list[Graph]:
        return [graph for _, graph in self.calls]

    @property
    def compiled_launches(self) -> int:
        return sum(len(graph.launches) for graph in self.graphs)

    @property
    def all_launches(self) -> int:
        return self.compiled_launches + self.launches.total()


@dataclass
class Trace:
    """Attributes:
    sources, graphs: of all code that was compiled.
    phases: by name: "step 1", and "redraw 4" for that after the fourth step.
    planned: the numbers of the steps that were taken as the one before.
    early_writes: of all graphs, see :func:`.kernels.early_writes`.
    optimizer: after them.
    """

    sources: list[str]
    graphs: list[Graph]
    phases: dict[str, Phase]
    planned: list[int]
    early_writes: list[str]
    optimizer: GMixoutOptimizer


Call = Callable[[GMixoutOptimizer, int], None]


def trace(
    shapes: Iterable[Sequence[int]],
    make_base: Callable[[list[tuple[str, nn.Parameter]]], Optimizer],
    dtype: torch.dtype = torch.float32,
    steps: int = 6,
    resample_every: int = 4,
    memory_format: torch.memory_format | None = None,
    before_step: Call | None = None,
    further: dict[str, Callable[[GMixoutOptimizer], Any]] | None = None,
    **settings: Any,
) -> Trace:
    """Takes steps, each after a backward pass.

    Args:
        before_step: called with the optimizer and the step's number, from 1.
        further: phases after the steps, by name.
        settings: of the wrapper.
    """
    capture = Capture()
    capture.start()
    with recording() as recorder:
        capture.note = recorder.note_call
        params = [nn.Parameter(_made(shape, dtype, memory_format)) for shape in shapes]
        recorder.large = max(param.nbytes for param in params)
        named = [(f"p{number}", param) for number, param in enumerate(params)]
        settings = {"compile": "auto", "resample_every": resample_every, **settings}
        optimizer = GMixoutOptimizer(make_base(named), **settings)
        optimizer.register_resample_pre_hook(_begin_redraw(recorder))
        planned: list[int] = []
        for step in range(1, steps + 1):
            _backward(recorder, params)
            recorder.phase = f"step {step}"
            if before_step is not None:
                before_step(optimizer, step)
            plan = _plan_of(optimizer)
            optimizer.step()
            if plan is not None and _plan_of(optimizer) is plan:
                planned.append(step)
        for name, call in (further or {}).items():
            _backward(recorder, params)
            recorder.phase = name
            call(optimizer)
    names = [
        *(recorder.calls | recorder.launches | recorder.waits),
        *(f"step {step}" for step in range(1, steps + 1)),
    ]
    graphs = list(map(read_graph, capture.sources))
    nothing: Counter[str] = Counter()
    phases = {
        name: Phase(
            [(function, graphs[number]) for function, number in recorder.calls.get(name, [])],
            *(
                noted.get(name, nothing)
                for noted in (
                    recorder.launches,
                    recorder.waits,
                    recorder.copies,
                    recorder.temporaries,
                )
            ),
        )
        for name in dict.fromkeys(names)
    }
    writes = [
        line
        for source, pairs in zip(capture.sources, capture.pairs, strict=True)
        for line in early_writes(source, pairs)
    ]
    return Trace(capture.sources, graphs, phases, planned, writes, optimizer)


def _made(
    shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format | None
) -> torch.Tensor:
    tensor = torch.empty(tuple(shape), device=CUDA, dtype=dtype)
    if memory_format is not None and tensor.ndim == 4:
        tensor = tensor.to(memory_format=memory_format)
    return tensor


def _plan_of(optimizer: GMixoutOptimizer) -> Any:
    return getattr(optimizer._layout, "_plan", None)  # the dense layout has none


def _begin_redraw(recorder: Recorder) -> Callable[[Any], None]:
    def hook(optimizer: Any) -> None:
        recorder.phase = recorder.phase.replace("step", "redraw")

    return hook


def _backward(recorder: Recorder, params: list[nn.Parameter]) -> None:
    """Autograd does not run on fake tensors: gradients appear, and their hooks are called."""
    recorder.phase = "backward"
    for param in params:
        param.grad = torch.empty_like(param)
        for hook in list((param._post_accumulate_grad_hooks or {}).values()):
            hook(param)
