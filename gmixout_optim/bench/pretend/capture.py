"""The source that torch.compile makes for a device, in place of running it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from gmixout_optim import fused
from gmixout_optim.bench.pretend.device import answering
from gmixout_optim.packed_step import step_parts

# What comes of the source of a graph: its function of a list of tensors.
MakeCall = Callable[[str], Callable[[list[Any]], Any]]


def capture(make_call: MakeCall) -> None:
    """Have ``make_call`` do what is to be done with the source of each graph that is compiled."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.graph import GraphLowering

    def to_module(self: Any, code: Any) -> Any:
        module: Any = ModuleType("captured")
        module.__file__, module.key, module.call = "/dev/null", str(id(code)), make_call(code.value)
        return module

    GraphLowering._compile_to_module_lines = to_module  # type: ignore[method-assign,assignment]
    config.force_disable_caches = True
    config.compile_threads = 1
    functorch_config.enable_autograd_cache = False
    # These make real tensors on the device.
    config.joint_graph_constant_folding = False
    joint_graph.lazy_init = answering(None)
    for message in (".*pgo.*", ".*data pointer of FakeTensor.*", ".*freshly initialised.*"):
        warnings.filterwarnings("ignore", message)


def _pairs(
    function: Callable[..., None], args: Any, leaves: list[Any], made: fused.Fused
) -> list[tuple[int, int]]:
    if function is not step_parts:
        return []
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    number = {place: n for n, place in enumerate(made._ordered(range(len(tensors))))}  # type: ignore[arg-type]
    place = {id(tensor): place for place, tensor in enumerate(tensors)}
    items = [item for part in args[0] for item in part.items if item.value is None]
    return [
        (number[place[id(item.weights)]], number[place[id(item.written)]])  # type: ignore[index]
        for item in items
    ]


_compiled = fused._compiled


class Capture:
    """The sources that the library's compiled code consists of.

    Attributes:
        sources: of all graphs.
        pairs: of each, the numbers of the arguments that are one parameter, read and written.
        note: called with the function and the number of the source in each call of compiled code.
    """

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.pairs: list[list[tuple[int, int]]] = []
        self.note: Callable[[str, int], None] = lambda function, number: None

    def start(self) -> None:
        """From now on compiled code is source, and does nothing when it is called."""
        capture(self._keep)
        fused.forget()

        def noting(function: Callable[..., None], args: Any, leaves: list[Any]) -> fused.Fused:
            number = len(self.sources)
            with _disable_current_modes():
                made = _compiled(function, args, leaves)
            self.pairs.append(_pairs(function, args, leaves, made))
            run = made._run

            def call(*tensors: Any) -> None:
                self.note(function.__name__, number)
                with _disable_current_modes():
                    run(*tensors)

            made._run = call
            return made

        fused._compiled = noting

    def _keep(self, source: str) -> Callable[[list[Any]], Any]:
        self.sources.append(source)
        return answering(())
