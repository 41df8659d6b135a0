"""Graphs that are made for a GPU, called with tensors on the CPU.

The library steps CPU parameters as if they were on a GPU. Each function is compiled on stand-ins
that are, and of the source that comes out the calls of kernels are replaced.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gmixout_optim import compiled, fused, packed
from gmixout_optim.bench.pretend.capture import capture
from gmixout_optim.bench.pretend.device import CUDA, pretend

# Makes what a kernel's launches call, of its name and source.
MakeKernel = Callable[[str, str], Any]


def run_on_cpu(make_kernel: MakeKernel) -> list[str]:
    """From now on the library's compiled code is a GPU's. Returns the sources, as they are made."""
    pretend()
    sources: list[str] = []

    def make_call(source: str) -> Callable[[list[Any]], Any]:
        sources.append(source)
        return _made(source, make_kernel)

    capture(make_call)
    fused.forget()
    fused._stand_in = _stand_in
    for module in (compiled, packed):
        module.is_launched = lambda tensor: True
    compiled.Compiler._wants = lambda self, member: True
    return sources


def _stand_in(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    # Learning rates and keys of random bits are on the host.
    is_on_host = leaf.ndim == 0 and leaf.dtype in (torch.float64, torch.int64)
    device = leaf.device if is_on_host else CUDA
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)


_REPLACED = {
    r"^from torch\._C import _cuda_getCurrentRawStream.*$": "get_raw_stream = lambda *_: 0",
    r"async_compile\.wait\(globals\(\)\)": "",
    r"async_compile = AsyncCompile\(\)": "async_compile = _Kernels()",
    r"torch\.cuda\._DeviceGuard\(0\)": "_nothing()",
    r"torch\.cuda\.set_device\(0\)": "pass",
    r"^empty_strided_cuda = .*$": "empty_strided_cuda = _empty_strided",
}


def _made(source: str, make_kernel: MakeKernel) -> Callable[[list[Any]], Any]:
    for pattern, replacement in _REPLACED.items():
        source = re.sub(pattern, replacement, source, flags=re.M)
    kernels = types.SimpleNamespace(triton=lambda name, text, **_: make_kernel(name, text))
    names: dict[str, Any] = dict(
        _nothing=contextlib.nullcontext,
        _Kernels=lambda: kernels,
        _empty_strided=lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
    )
    exec(compile(source, "captured", "exec"), names)
    return names["call"]
