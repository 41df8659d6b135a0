"""Functions compiled for tensors that are alike, and called without the guards of torch.compile.

In each call torch.compile checks whatever it took for granted. For hundreds of tensors that takes
longer than the kernels. Here all that compiled code depends on is in a key, which is made once for
as long as the arguments stay.

A function is traced on stand-ins: fake tensors, each with memory of its own. So the same tensor can
be passed twice, as source and as destination, and gather and scatter fuse into one kernel. The
compiler is not told that they are one: each element must be read before it is written, which
tests/test_cuda_without_gpu.py checks in the generated code.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from gmixout_optim.mixing import without_sorting

# Sizes and indices are right by construction, and to check them takes time in each call. The others
# are off unless somebody turned them on for models: code is shared, and called with other tensors.
_OPTIONS = {
    "size_asserts": False,
    "assert_indirect_indexing": False,
    "triton.cudagraphs": False,
    "cpp_wrapper": False,
    "freezing": False,
}

ALIGNMENT = 16  # bytes

# Code is kept for optimizers to come; of more, that which was made first is dropped.
_MOST_KEPT = 1024
_kept: dict[Hashable, Fused] = {}


class Fused:
    """Compiled code of a function that returns nothing and works on its tensors in place.

    Attributes:
        has_run: whether a call has ever succeeded.
    """

    def __init__(self, run: Callable[..., Any], places: list[int]) -> None:
        self._run = run
        self._ordered = _picking(places)
        self.has_run = False

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Call it with tensors in the order in which they lie in the function's arguments."""
        self._run(*self._ordered(tensors))
        self.has_run = True


def _picking(places: list[int]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """What picks the tensors at these places."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda tensors: [tensors[place] for place in places]


def fuse(
    function: Callable[..., None], *args: Any, changing: int = 0
) -> tuple[Fused, list[Tensor]]:
    """Compiled code of a function for arguments that are like these, and the tensors among them.

    Args:
        args: constants, and tensors, in nested lists, tuples and dicts.
        changing: how many of the tensors, the last ones, differ from call to call. Only their
            alignment is checked in each call.

    Raises:
        Exception: whatever a compiler may fail with.
    """
    leaves, structure = tree_flatten(args)
    staying = len(leaves) - changing
    form = (*map(_form, leaves), *map(_is_aligned, leaves[:staying]))
    key = function, str(structure), form, torch.get_default_dtype()
    if key not in _kept:
        if len(_kept) >= _MOST_KEPT:
            del _kept[next(iter(_kept))]
        with FakeTensorMode():
            stand_ins = list(map(_stand_in, leaves))
        for leaf, stand_in in zip(leaves[:staying], stand_ins, strict=False):
            if isinstance(leaf, Tensor) and _is_aligned(leaf):
                torch._dynamo.mark_static_address(stand_in, guard=False)
        _kept[key] = _compiled(function, tree_unflatten(stand_ins, structure), stand_ins)
    return _kept[key], [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def forget() -> None:
    """Have everything compiled again."""
    _kept.clear()


def _form(leaf: Any) -> Hashable:
    """What compiled code depends on of an argument."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.shape, leaf.stride(), leaf.device
    return leaf if isinstance(leaf, type) else (type(leaf), repr(leaf))


def _is_aligned(leaf: Any) -> bool:
    """Whether code may read it in the largest pieces; what is no tensor counts as aligned."""
    return not isinstance(leaf, Tensor) or leaf.data_ptr() % ALIGNMENT == 0


def _stand_in(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)


def _compiled(function: Callable[..., None], args: Any, leaves: list[Any]) -> Fused:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    place_of = {id(tensor): place for place, tensor in enumerate(tensors)}
    made: list[Fused] = []

    def backend(graph: Any, examples: Any) -> Callable[..., tuple[()]]:
        if graph.graph.output_node().args[0]:
            raise RuntimeError(f"{function.__name__} makes new tensors for a state it is given")
        run = torch._inductor.compile(graph, examples, options=_OPTIONS)

        def note_places(*inputs: Tensor) -> tuple[()]:
            made.append(Fused(run, [place_of[id(tensor)] for tensor in inputs]))
            return ()

        return note_places

    # torch counts recompilations by code object and gives up after a few: each has its own.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    with torch.no_grad(), without_sorting():
        torch.compile(own, dynamic=False, fullgraph=True, backend=backend)(*args)
    if not made:
        raise RuntimeError("torch.compile is switched off")
    return made[0]
