"""The code that a GPU would get, run by Triton's interpreter, against eager steps on a CPU.

python -m tests.cuda_without_gpu.interpret [case ...]
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it as it is imported

import re
import sys
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import nn
from triton.runtime import interpreter

from gmixout_optim import GMixoutOptimizer
from tests.cuda_without_gpu.loading import load_kernel
from tests.cuda_without_gpu.on_cpu import run_on_cpu
from tests.optimizers import ELEMENTWISE

_BLOCK, _COMBO_BLOCK = 256, 1024


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """One of libdevice's functions, which the interpreter does not have."""

    def op(*args: Any) -> Any:
        tensors = [
            arg if isinstance(arg, tl.core.tensor) else tl.core.to_tensor(arg) for arg in args
        ]
        shape = np.broadcast_shapes(*(each.handle.data.shape for each in tensors))
        data = [np.broadcast_to(each.handle.data, shape) for each in tensors]
        with np.errstate(all="ignore"):
            result = function(*data).astype(data[0].dtype)
        kind = tensors[0].type.scalar
        widest = max(tensors, key=lambda each: each.handle.data.size).type
        whole = widest.with_element_ty(kind) if hasattr(widest, "with_element_ty") else widest
        return tl.core.tensor(interpreter.TensorHandle(result, kind), whole)

    return op


_LIBDEVICE = {
    name: _elementwise(getattr(np, of))
    for name, of in (
        *(("pow", "power"), ("mul_rn", "multiply"), ("add_rn", "add"), ("sub_rn", "subtract")),
        *(("div_rn", "divide"), ("sqrt", "sqrt"), ("abs", "abs"), ("copysign", "copysign")),
        *(("isinf", "isinf"), ("isnan", "isnan"), ("signbit", "signbit")),
    )
}
# Looked up in each call: the interpreter replaces them while it runs a kernel.
_MATH = {name: lambda x, name=name: getattr(tl, name)(x) for name in ("abs", "exp", "log", "sqrt")}


def _prepare() -> None:
    names: Any = types.ModuleType("interpreted_names")
    names.libdevice = types.SimpleNamespace(**_LIBDEVICE)
    names.tl_math = types.SimpleNamespace(**_MATH)
    sys.modules[names.__name__] = names
    plain = interpreter._convert_float

    def convert(x: Any, of: Any, to: Any, mode: Any) -> Any:
        """To nearest even, as a GPU does; the interpreter truncates to bfloat16."""
        if to != tl.bfloat16 or mode is not None:
            return plain(x, of, to, mode)
        wide = torch.from_numpy(np.ascontiguousarray(x.view(np.float32)))
        return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert


class Kernel:
    """A kernel whose launches the interpreter runs."""

    launches = 0

    def __init__(self, name: str, text: str) -> None:
        self.is_combo = "SequentialComboKernelGrid" in text
        self.sizes = [int(size) for size in re.findall(r"'xnumel_\d+': (\d+)", text)]
        self.has_rows = "YBLOCK" in text
        text = re.sub(r"@triton_heuristics.*?\n\)\n@triton\.jit", "@triton.jit", text, flags=re.S)
        text = re.sub(
            r"from torch\._inductor\.runtime\.triton_helpers import libdevice, math as tl_math",
            "from interpreted_names import libdevice, tl_math",
            text,
        )
        text = text.replace("triton_helpers.set_driver_to_gpu()", "")
        self.function = load_kernel(name, text)

    def run(self, *args: Any, stream: Any = None) -> None:
        Kernel.launches += 1
        if self.is_combo:
            self.function[(sum(-(-size // _COMBO_BLOCK) for size in self.sizes),)](*args)
        elif self.has_rows:
            rows, columns = args[-2:]
            grid = (-(-columns // 64), -(-rows // 16))
            self.function[grid](*args, XBLOCK=64, YBLOCK=16)
        else:
            self.function[(-(-args[-1] // _BLOCK),)](*args, XBLOCK=_BLOCK)


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(48, 64), (48, 64), (6, 4, 3, 3), (60,), (33,), ()]
    params = [nn.Parameter((torch.randn(shape) * 0.5).to(dtype)) for shape in shapes]
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    return params


def train(
    make: Callable[..., torch.optim.Optimizer],
    compile: bool,
    sources: list[str],
    dtype: torch.dtype = torch.float32,
    steps: int = 8,
    **settings: Any,
) -> list[torch.Tensor]:
    """The weights after some steps and two redraws. Nothing is compiled after the first redraw."""
    params = parameters(dtype)
    settings = {"resample_every": 3, "mask_prob": 0.7, **settings}
    optimizer = GMixoutOptimizer(make(params), compile=compile, **settings)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    made = []
    for step in range(steps):
        for number, param in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + number)
            noise = torch.randn(param.shape, generator=generator)
            param.grad = torch.empty_like(param).copy_(0.5 * param.detach() + noise)
            for hook in list((param._post_accumulate_grad_hooks or {}).values()):
                hook(param)
        optimizer.step()
        if step > 4:
            scheduler.step()
        made.append(len(sources))
    assert made[3:] == [made[3]] * len(made[3:]), f"compiled again: {made}"
    return [param.detach().clone() for param in params]


_NOT_COMPILED = ("SGD-dampening", "ASGD", "Rprop")  # they drop their state at a redraw

Settings = dict[str, Any]


def cases() -> dict[str, tuple[Callable[..., torch.optim.Optimizer], Settings]]:
    found = {
        case.name: (case, Settings()) for case in ELEMENTWISE if case.name not in _NOT_COMPILED
    }

    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)

    bf16, fp16 = torch.bfloat16, torch.float16
    for granularity in ("element", 4, "column", "row"):
        for layout in ("dense", "packed"):
            name = f"AdamW {granularity} {layout}"
            found[name] = adamw, dict(granularity=granularity, grad_layout=layout)
    found["anchor_decay 0"] = adamw, dict(anchor_decay=0.0)
    found["bfloat16"] = adamw, dict(dtype=bf16)
    found["float16 packed"] = adamw, dict(dtype=fp16, grad_layout="packed")
    for granularity in ("element", "column", "row"):
        name = f"bfloat16 {granularity}, rounded stochastically"
        found[name] = adamw, dict(dtype=bf16, stochastic_rounding=True, granularity=granularity)
    found["float16, rounded stochastically"] = adamw, dict(dtype=fp16, stochastic_rounding=True)
    return found


def differences(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    """What differs by more than rounding; "" for nothing."""
    dtype = ours[0].dtype
    pairs = list(zip(ours, theirs, strict=True))
    if dtype == torch.float32:
        is_close = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    else:  # a rounding here and there may go the other way
        bounds = [2 * torch.finfo(dtype).eps * b.float().abs().clamp(min=1e-3) for _, b in pairs]
        is_close = all(
            bool(((a.float() - b.float()).abs() <= bound).all())
            for (a, b), bound in zip(pairs, bounds, strict=True)
        )
        others = sum(int((a != b).sum()) for a, b in pairs)
        is_close &= others < 0.01 * sum(a.numel() for a, _ in pairs)
    worst = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    return "" if is_close else f"differs by up to {worst:.2e}"


def main(names: list[str]) -> int:
    warnings.filterwarnings("error", message=".*could not be compiled.*")
    _prepare()
    sources = run_on_cpu(Kernel)
    failed = 0
    for name, (make, settings) in cases().items():
        if names and name not in names:
            continue
        start, Kernel.launches = time.perf_counter(), 0
        wrong = differences(
            train(make, True, sources, **settings), train(make, False, sources, **settings)
        )
        if not Kernel.launches:
            wrong = "launches nothing"
        failed += bool(wrong)
        took = time.perf_counter() - start
        print(f"{'FAILED' if wrong else 'ok'}  {name}: {wrong} {took:.1f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
