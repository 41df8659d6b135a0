"""The library on tensors of a device that is not there: all that it is asked to do is recorded.

Tensors on the device are fake: they have no memory and no values, and where the host asks for one
it gets a number. Tensors on the CPU stay real.
"""

from __future__ import annotations

import builtins
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gmixout_optim.bench.pretend.device import CUDA

_aten = torch.ops.aten

# What makes no kernel on a device, beside views.
_FREE = {
    *(_aten.detach, _aten.alias, _aten.lift_fresh, _aten.empty, _aten.empty_like),
    *(_aten.new_empty, _aten.empty_strided, _aten.new_empty_strided, torch.ops.prim.device),
}

# Ops that give a value to the host, and what they give here.
_TO_HOST: dict[Any, Callable[[Tensor], Any]] = {
    _aten._local_scalar_dense: lambda tensor: _number(tensor),
    _aten.item: lambda tensor: _number(tensor),
    _aten.equal: lambda tensor: False,
    _aten.is_nonzero: lambda tensor: True,
}


def _number(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records, for each phase, waits for the device, copies to and from it, launches, and large
    temporaries.

    Attributes:
        phase: the current one.
        large: bytes from which on a temporary is recorded.
        calls: of compiled code, the function and its graph.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self.large = 1 << 62
        self.waits: dict[str, Counter[str]] = {}
        self.copies: dict[str, Counter[str]] = {}
        self.launches: dict[str, Counter[str]] = {}
        self.temporaries: dict[str, Counter[str]] = {}
        self.calls: dict[str, list[tuple[str, int]]] = {}

    def note_call(self, function: str, graph: int) -> None:
        self.calls.setdefault(self.phase, []).append((function, graph))

    def note(self, what: dict[str, Counter[str]], text: str) -> None:
        what.setdefault(self.phase, Counter())[text] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        kind = func._overloadpacket
        if not any(_is_of_device(item) for item in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if kind in _TO_HOST:
            self.note(self.waits, f"{kind.__name__} {where()}")
            return _TO_HOST[kind](args[0])
        if kind is _aten.nonzero:
            self.note(self.waits, f"nonzero {where()}")
            return torch.empty(max(1, args[0].numel() // 10), args[0].ndim, device=CUDA).long()
        is_fill = kind is not _aten.index and len(args) > 2 and _is_number(args[2])
        if kind in (_aten.index, _aten.index_put_, _aten.index_put) and not is_fill:
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.note(self.waits, f"index by a mask {where()}")
        if kind in (_aten._to_copy, _aten.copy_):
            source = args[0] if kind is _aten._to_copy else args[1]
            to = kwargs.get("device") if kind is _aten._to_copy else args[0].device
            if to is not None and source.device.type != torch.device(to).type:
                return self._copy(kind, source, torch.device(to), args, kwargs)
        if kind.__name__.startswith("_fused_"):  # in place, and some have no fake form
            self.note(self.launches, kind.__name__)
            return None
        result = func(*args, **kwargs)
        if not func.is_view and kind not in _FREE:
            self.note(self.launches, kind.__name__)
        before = {id(item) for item in given}
        made = [] if func.is_view else tree_leaves(result)
        for tensor in made:
            is_new = isinstance(tensor, Tensor) and id(tensor) not in before
            if is_new and tensor.nbytes >= self.large:
                self.note(self.temporaries, f"{kind.__name__} {tuple(tensor.shape)} {where()}")
        return result

    def _copy(self, kind: Any, source: Tensor, to: torch.device, args: Any, kwargs: Any) -> Any:
        is_free = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if not is_free:
            self.note(self.waits, f"copy {source.device.type} to {to.type} {where()}")
        self.note(self.copies, f"{source.device.type} to {to.type} {tuple(source.shape)} {where()}")
        if kind is _aten.copy_:
            return args[0]
        dtype = kwargs.get("dtype") or source.dtype
        if to.type == "cpu":
            with unset_fake_temporarily():
                return torch.ones(source.shape, dtype=dtype)
        return torch.empty(source.shape, dtype=dtype, device=to)


def _is_number(value: Any) -> bool:
    """Whether an assignment by a mask is a fill."""
    return isinstance(value, Tensor) and value.numel() == 1 and value.is_cpu


def _is_of_device(item: Any) -> bool:
    device = item.device if isinstance(item, Tensor) else item
    return isinstance(device, torch.device) and device.type == "cuda"


def where() -> str:
    """The library's innermost lines."""
    frames = [f for f in traceback.extract_stack() if "gmixout_optim/" in f.filename]
    ours = [f for f in frames if "/bench/" not in f.filename]
    names = [f"{f.filename.split('gmixout_optim/')[-1]}:{f.lineno}" for f in reversed(ours[-3:])]
    return " < ".join(names) or "caller"


_recorders: list[Recorder] = []


@contextmanager
def recording() -> Iterator[Recorder]:
    """In the block tensors on the device are fake, and what is done with them is recorded."""
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    torch.cuda.is_available = available
    with fake, Recorder() as recorder:
        _recorders.append(recorder)
        try:
            yield recorder
        finally:
            _recorders.pop()


def pass_fakes_as_tensors() -> None:
    """Where torch and the library ask for the exact type of a tensor, or for its memory."""

    def type_of(item: Any, *more: Any) -> Any:
        kind = builtins.type(item, *more) if more else builtins.type(item)
        return Tensor if kind is FakeTensor else kind

    for name in ("bases", "layout", "packed", "packed_gradient", "plan"):
        vars(sys.modules[f"gmixout_optim.{name}"])["type"] = type_of
    sys.modules["torch.optim.optimizer"]._foreach_supported_types.append(FakeTensor)
    FakeTensor.tolist = _waiting("tolist", lambda tensor: [1] * tensor.numel())  # type: ignore[method-assign]
    # Of memory that is not there.
    Tensor.data_ptr = _unless_fake(Tensor.data_ptr, 0)  # type: ignore[method-assign]
    Tensor.is_set_to = _unless_fake(Tensor.is_set_to, True)  # type: ignore[method-assign]
    for name, convert in (("__float__", float), ("__int__", int), ("__bool__", bool)):
        setattr(FakeTensor, name, _waiting(name, _converted(convert)))
    for name in ("item", "__index__"):
        setattr(FakeTensor, name, _waiting(name, _number))
    torch.tensor, torch.as_tensor = _by_way_of_cpu(torch.tensor), _by_way_of_cpu(torch.as_tensor)


def _unless_fake(plain: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any) -> Any:
        return answer if isinstance(self, FakeTensor) else plain(self, *args)

    return method


def _converted(convert: Callable[[Any], Any]) -> Callable[[Tensor], Any]:
    return lambda tensor: convert(_number(tensor))


def _waiting(name: str, value: Callable[[Any], Any]) -> Callable[..., Any]:
    """A method that asks the device for a value."""
    plain = getattr(Tensor, name)

    def method(self: Tensor, *args: Any) -> Any:
        if self.device.type != "cuda" or not _recorders:
            return plain(self, *args)
        _recorders[-1].note(_recorders[-1].waits, f"{name} {where()}")
        return value(self)

    return method


def _by_way_of_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A constructor of values, which the fake mode would make without the recorder's notice."""

    def made(*args: Any, pin_memory: bool = False, device: Any = None, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], FakeTensor):
            return make(*args, device=device, **kwargs)
        tensor = make(*args, **kwargs)
        return tensor if device is None else tensor.to(device)

    return made
