"""A machine that torch takes for one with a GPU.

What is patched here is not undone: use a process of its own. Beside a CPU build of torch it takes
Triton, which the CUDA build depends on, and g++. The internals of torch that this package leans on
are those of torch 2.13 with Triton 3.7.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

CUDA = torch.device("cuda:0")

TORCH, TRITON = "2.13", "3.7"

# What inductor asks of a device, of an H100 by its data sheet.
_PROPERTIES: dict[str, Any] = dict(
    name="NVIDIA H100 80GB HBM3",
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    gcnArchName="",
    is_integrated=0,
    uuid="none",
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
)

# A CPU build of torch has no guard of CUDA devices, and asks for one before it dispatches.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""


def why_not() -> str | None:
    """Why code for a GPU cannot be made here; None where it can."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if not torch.__version__.startswith(TORCH):
        return f"leans on internals of torch {TORCH}, and this is {torch.__version__}"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install 'gmixout-optim[cuda-check]'"
    triton = version("triton")
    if not triton.startswith(TRITON):
        return f"leans on internals of Triton {TRITON}, and this is {triton}"
    if shutil.which("g++") is None:
        return "needs g++"
    return None


def pretend(capability: tuple[int, int] = (9, 0)) -> None:
    """Have torch take this machine for one with a GPU.

    Args:
        capability: compute capability: (8, 0) is an A100, (9, 0) an H100.
    """
    _set_guard()
    major, minor = capability
    properties = SimpleNamespace(**_PROPERTIES, major=major, minor=minor)
    stream = SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)
    answers: dict[str, Any] = dict(
        is_available=True,
        is_initialized=True,
        device_count=1,
        current_device=0,
        get_device_properties=properties,
        get_device_capability=capability,
        get_device_name=properties.name,
        is_bf16_supported=True,
        current_stream=stream,
        is_current_stream_capturing=False,
        get_rng_state=torch.zeros(16, dtype=torch.uint8),
        set_rng_state=None,
        memory_allocated=0,
        synchronize=None,
        set_device=None,
        _lazy_init=None,
        _exchange_device=0,
        _maybe_exchange_device=0,
    )
    from torch._dynamo import device_interface

    interface: Any = device_interface.CudaInterface
    for name, answer in answers.items():
        setattr(torch.cuda, name, answering(answer))
        setattr(interface, name.removeprefix("_"), staticmethod(answering(answer)))
    interface.get_raw_stream = staticmethod(answering(0))
    device_interface.get_cuda_stream = answering(0)
    torch.accelerator.is_available = answering(False)
    torch.version.cuda = torch.version.cuda or "13.0"
    torch._C._cuda_getCurrentRawStream = answering(0)
    _set_driver(capability)


def answering(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


def _set_guard() -> None:
    if torch.version.cuda:
        torch._C._ensureCUDADeviceGuardSet()
        return
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        flags = ["-shared", "-fPIC", "-std=c++20", "-I", home / "include", "-L", home / "lib"]
        command = ["g++", *flags, source, "-o", library, "-lc10", f"-Wl,-rpath,{home / 'lib'}"]
        subprocess.run(list(map(str, command)), check=True)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]


def _set_driver(capability: tuple[int, int]) -> None:
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    answers = dict(
        get_current_target=target,
        get_current_device=0,
        get_device_capability=capability,
        get_current_stream=0,
        get_active_torch_device=CUDA,
        get_device_interface=torch.cuda,
        is_active=True,
    )
    driver.set_active(SimpleNamespace(**{key: answering(it) for key, it in answers.items()}))
    triton_helpers.set_driver_to_gpu = lambda: None
