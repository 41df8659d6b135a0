"""What a step and a redraw launch and move on a GPU, and the registers that their kernels take.

    python -m tests.cuda_without_gpu.kernels GRANULARITY [packed] [80] [deterministic] [vit_b_16]

Prints JSON: launches and bytes of a step, launches, copies and waits of a redraw, and of all
kernels, compiled for that architecture by Triton's own ptxas, registers and bytes spilled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gmixout_optim.bench.models import shapes_of
from gmixout_optim.bench.pretend.device import pretend
from gmixout_optim.bench.pretend.fake import pass_fakes_as_tensors
from gmixout_optim.bench.pretend.kernels import kernels_of
from gmixout_optim.bench.pretend.trace import trace
from tests.cuda_without_gpu.loading import load_kernel

# Of a layer of ViT-B/16.
SHAPES = [(768, 768), (768, 768), (3072, 768), (768,), (768,)]


def main(arguments: list[str]) -> None:
    granularity: Any = arguments[0]
    granularity = int(granularity) if granularity.isdigit() else granularity
    arch = next((int(each) for each in arguments[1:] if each in ("80", "90")), 90)
    shapes: Any = shapes_of("vit_b_16") if "vit_b_16" in arguments else SHAPES
    pretend((arch // 10, arch % 10))
    pass_fakes_as_tensors()
    torch.use_deterministic_algorithms("deterministic" in arguments)
    traced = trace(
        shapes,
        lambda params: torch.optim.AdamW(params),
        granularity=granularity,
        grad_layout="packed" if "packed" in arguments else "dense",
    )
    members = list(traced.optimizer._members)
    step, redraw = traced.phases["step 3"], traced.phases["redraw 4"]
    graphs = step.graphs
    elements = sum(member.slot.anchor.numel() for member in members if member.slot)
    found = dict(
        calls=len(graphs),
        launches=step.compiled_launches,
        eager=step.launches.total(),
        bytes_per_element=sum(graph.bytes for graph in graphs) / elements,
        elements=elements,
        indices=sum(member.index().numel() * member.index().element_size() for member in members),
        waits=sum(step.waits.values()) + sum(redraw.waits.values()),
        others=[line for graph in graphs for line in graph.others],
        on_host=[line for graph in traced.graphs for line in graph.on_host],
        is_atomic=any(kernel.is_atomic for graph in traced.graphs for kernel in graph.launches),
        redraw=redraw.all_launches,
        redraw_copies=redraw.copies.total(),
        large=sum(step.temporaries.values()),
    )
    if "vit_b_16" not in arguments:
        used = [registers(name, text, arch) for name, text in _kernels(traced.sources)]
        found["kernels"] = len(used)
        found["registers"] = max(count for count, _ in used)
        found["spilled"] = sum(spilled for _, spilled in used)
    print(json.dumps(found))


def _kernels(sources: list[str]) -> list[tuple[str, str]]:
    """Each once: those of other sizes are the same code."""
    found: dict[str, tuple[str, str]] = {}
    for source in sources:
        for name, text in kernels_of(source).items():
            found.setdefault(re.sub(r"\d+", "#", text), (name, text))
    return list(found.values())


def registers(name: str, text: str, arch: int) -> tuple[int, int]:
    """Registers of a thread, and bytes spilled."""
    import triton

    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    binaries = []
    plain = triton.compile
    triton.compile = lambda *args, **kwargs: binaries.append(plain(*args, **kwargs)) or binaries[-1]
    try:
        tuner = load_kernel(name, text)
        tuner._precompile_config(tuner.configs[0])
    finally:
        triton.compile = plain
    ptx = Path(tempfile.mkdtemp(), f"{name}.ptx")
    ptx.write_text(binaries[-1].asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    gpu = {80: "sm_80", 90: "sm_90a"}[arch]
    command = [ptxas, "-v", f"--gpu-name={gpu}", ptx, "-o", os.devnull]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", log)
    assert used is not None, log
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    return int(used.group(1)), spilled


if __name__ == "__main__":
    main(sys.argv[1:])
